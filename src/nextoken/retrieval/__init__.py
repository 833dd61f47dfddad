"""Retrieval from next-token distributions: texts found by one word, and ranked by one token."""

from nextoken.retrieval.first import Reranked, rerank, rerank_by_generation
from nextoken.retrieval.first_fit import RankedList, fit_first, rank_loss
from nextoken.retrieval.fusion import Index, Ranking, ndcg
from nextoken.retrieval.promptreps import PASSAGE, QUERY, Representations, WordPrompt, represent

__all__ = [
    "PASSAGE",
    "QUERY",
    "Index",
    "RankedList",
    "Ranking",
    "Representations",
    "Reranked",
    "WordPrompt",
    "fit_first",
    "ndcg",
    "rank_loss",
    "represent",
    "rerank",
    "rerank_by_generation",
]

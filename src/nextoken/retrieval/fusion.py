"""Fusion: texts found by dense and by sparse representations, and by both at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy import sparse

from nextoken.retrieval.promptreps import Representations

_FLOOR = 1e-9
Run: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Numbers of the texts found for one query, best first, and their scores."""


@dataclass(frozen=True)
class Ranking:
    """Texts found for Q queries, best first.

    Args:
        texts: numbers of the texts [Q, k]; -1 beyond those found.
        scores: theirs [Q, k]; -inf beyond.
    """

    texts: np.ndarray
    scores: np.ndarray


class Index:
    """Representations of N texts, made ready for search: rows for dense, an inverted index for sparse.

    The inverted index is scipy's CSC matrix: for each word the texts that have it, and its impact there. A product of
    sparse matrices then walks only the words of the query.

    Args:
        texts: from `represent`.
    """

    def __init__(self, texts: Representations) -> None:
        self.dense = texts.dense
        self.inverted = sparse.csc_matrix(texts.sparse)

    def __len__(self) -> int:
        return len(self.dense)

    def search(self, queries: Representations, *, k: int = 10, alpha: float = 0.5, depth: int = 1000) -> Ranking:
        """The k texts of highest alpha d + (1 - alpha) s, d and s the query's scores scaled to 0 ... 1.

        d = h_q . h_t and s = sum_v q_v t_v, each over the `depth` best texts of its own run, scaled by the least and
        the greatest of them; a text that a run does not hold has 0 there, and a run that holds nothing at all (no word
        in common with any text) is replaced by the other. Equal scores stand in the order of the texts.

        Args:
            queries: represented by the same model.
            k: texts per query.
            alpha: weight of the dense run; 1 is dense alone and 0 sparse alone.
            depth: texts of each run that take part.

        Raises:
            ValueError: alpha is not from 0 to 1, k or depth not positive, or the representations do not fit.

        Source: PromptReps, arXiv:2404.18424, section 3.3.
        """
        if not 0 <= alpha <= 1 or k < 1 or depth < 1:
            raise ValueError(
                f"alpha must be from 0 to 1, k and depth at least 1, got {alpha=:g}, k={k} and depth={depth}"
            )
        if queries.dense.shape[1] != self.dense.shape[1] or queries.sparse.shape[1] != self.inverted.shape[1]:
            raise ValueError("queries and texts are represented by different models; use the same one for both")
        near = queries.dense @ self.dense.T
        common = (queries.sparse @ self.inverted.T).toarray()
        texts = np.full((len(queries), k), -1)
        scores = np.full((len(queries), k), -np.inf)
        for number, (dense, words) in enumerate(zip(near, common, strict=True)):
            found, value = fuse(_best(dense, depth), _best(words, depth, above=0), alpha=alpha)
            texts[number, : len(found[:k])] = found[:k]
            scores[number, : len(found[:k])] = value[:k]
        return Ranking(texts, scores)


def fuse(dense: Run, words: Run, *, alpha: float) -> Run:
    """alpha scaled(dense) + (1 - alpha) scaled(words), best first; scaled(s) = (s - min) / (max - min) over a run.

    A run that is empty is replaced by the other. Neither a constant added to the scores of a run nor a positive factor
    changes anything. A run at weight 0 brings in no texts of its own.
    """
    if alpha == 1 or not len(words[0]):
        return dense
    if alpha == 0 or not len(dense[0]):
        return words
    texts = np.union1d(dense[0], words[0])
    total = np.zeros(len(texts))
    for (found, scores), weight in ((dense, alpha), (words, 1 - alpha)):
        spread = max(scores.max() - scores.min(), _FLOOR)
        total[np.searchsorted(texts, found)] += weight * (scores - scores.min()) / spread
    order = np.argsort(-total, kind="stable")
    return texts[order], total[order]


def ndcg(ranking: Ranking, relevance: np.ndarray, *, k: int = 10) -> np.ndarray:
    """sum_i (2^rel_i - 1) / log2(i + 2) over the first k, over the same of the best order [Q]; NaN without relevance.

    Args:
        ranking: of the queries.
        relevance: of each text to each query [Q, N], 0 for none.
        k: how far down the ranking counts.
    """
    if relevance.shape[0] != len(ranking.texts):
        raise ValueError(f"relevance is for {relevance.shape[0]} queries and the ranking of {len(ranking.texts)}")
    discount = 1 / np.log2(np.arange(k) + 2)
    gain = 2.0**relevance - 1
    found = ranking.texts[:, :k]
    own = np.where(found >= 0, np.take_along_axis(gain, np.maximum(found, 0), axis=1), 0)
    best = -np.sort(-gain, axis=1)[:, :k]
    with np.errstate(invalid="ignore", divide="ignore"):
        share: np.ndarray = (own @ discount[: own.shape[1]]) / (best @ discount[: best.shape[1]])
    return share


def _best(scores: np.ndarray, depth: int, *, above: float = -np.inf) -> Run:
    """The best texts of one run, those beyond `above` only."""
    order = np.argsort(-scores, kind="stable")[:depth]
    order = order[scores[order] > above]
    return order, scores[order].astype(np.float64)

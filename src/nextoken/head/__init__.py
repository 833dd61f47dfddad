"""Statistics of softmax(h W^T) in one sweep over the vocabulary, without its logits, and losses by the same sweep."""

from nextoken.head._read import statistics, statistics_from_logits
from nextoken.head._statistics import Statistics
from nextoken.head._unembedding import Head

__all__ = ["Head", "Statistics", "statistics", "statistics_from_logits"]

"""Statistics of softmax(h W^T) in one sweep over the vocabulary, without its logits, and losses by the same sweep."""

from nextoken.head._compare import Comparison, compare, compare_logits
from nextoken.head._loss import cross_entropy, entropy, kl_to_teacher
from nextoken.head._read import statistics, statistics_from_logits
from nextoken.head._statistics import Statistics
from nextoken.head._unembedding import Head

__all__ = [
    "Comparison",
    "Head",
    "Statistics",
    "compare",
    "compare_logits",
    "cross_entropy",
    "entropy",
    "kl_to_teacher",
    "statistics",
    "statistics_from_logits",
]

"""Paired: by how much one model is better than another on the same bytes, and how sure one can be of that."""

from __future__ import annotations

import math

import numpy as np

from nextoken.scores.quality import Interval, bootstrap
from nextoken.signature.comparison import Comparison

BLOCK = 500
"""Bytes that are drawn together: some ninety words, beyond which surprisals are close to independent."""


def paired_difference(
    comparison: Comparison, *, block: int = BLOCK, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """(sum of -log2 p_a - sum of -log2 p_b) / bytes, in bits per byte, with its bootstrap interval.

    Positive where the second model is better. Both models read the same bytes, so it is their difference on each
    stretch of text that is resampled: an interval far narrower than those of the two figures alone. Stretches are
    `block` bytes of one text, because neighbouring tokens are not independent; the interval is NaN with only one.

    Args:
        comparison: from `nextoken.compare`.
        block: bytes per stretch; a segment belongs to the one in which it begins.
        resamples, level, seed: of the bootstrap.

    Raises:
        ValueError: there is no segment to compare, or block is not positive.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 byte, got {block}")
    if not len(comparison):
        raise ValueError("the two readings share no segment: there is nothing to compare")
    stretch = np.stack([comparison.column("text_id"), comparison.column("byte_start") // block])
    _, member = np.unique(stretch, axis=1, return_inverse=True)
    member = member.reshape(-1)
    size = comparison.column("byte_end") - comparison.column("byte_start")
    bits = np.bincount(member, weights=comparison.column("difference") / math.log(2))
    size = np.bincount(member, weights=size)
    found = bootstrap(_per_byte, bits, size, resamples=resamples, level=level, seed=seed)
    if len(bits) > 1:
        return found
    return Interval(found.value, math.nan, math.nan, math.nan, level)


def _per_byte(bits: np.ndarray, size: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        share: np.ndarray = (weights * bits).sum(-1) / (weights * size).sum(-1)
    return share

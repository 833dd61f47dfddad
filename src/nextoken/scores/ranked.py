"""Ranked: items in the order of a score, those of equal score together, each counted as often as its weight says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Missing = Literal["refuse", "omit"]
"""What is done with an item whose score or outcome is NaN: raise, or leave it out (as if its weight were 0)."""


@dataclass(frozen=True)
class Items:
    """n items that have a score, an outcome and a weight.

    Args:
        scores: [n].
        outcome: what turned out [n], in float64.
        weights: how often each item counts [..., n]; leading axes are resamples.
    """

    scores: np.ndarray
    outcome: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(
        cls,
        scores: np.ndarray,
        outcome: np.ndarray,
        weights: np.ndarray | None,
        *,
        missing: Missing,
        binary: bool = False,
    ) -> Items:
        """Checked arrays.

        Raises:
            ValueError: shapes differ, there is no item, a weight is negative, a value is NaN and `missing` is not
                "omit", or an outcome is neither 0 nor 1 where it should be.
        """
        s, y = np.asarray(scores, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
        if s.ndim != 1 or s.shape != y.shape or not len(s):
            raise ValueError(f"scores and outcomes must be two arrays [n] with n > 0, got {s.shape} and {y.shape}")
        w = np.ones(len(s)) if weights is None else np.asarray(weights, dtype=np.float64)
        if w.shape[-1:] != s.shape or (w < 0).any():
            raise ValueError(f"weights must be [..., {len(s)}] and at least 0, got {w.shape}")
        if missing not in ("refuse", "omit"):
            raise ValueError(f"missing must be 'refuse' or 'omit', got {missing!r}")
        unknown = np.isnan(s) | np.isnan(y)
        if unknown.any():
            if missing == "refuse":
                raise ValueError(
                    f"{int(unknown.sum())} of {len(s)} items have NaN for a score or an outcome: pass missing='omit' "
                    "to leave them out, or say with numbers what they count as"
                )
            s, y, w = np.where(unknown, 0.0, s), np.where(unknown, 0.0, y), w * ~unknown
        if binary and not np.isin(y, (0.0, 1.0)).all():
            raise ValueError(f"outcomes must be 0 or 1, got {y[~np.isin(y, (0.0, 1.0))][0]}")
        return cls(s, y, w)

    @property
    def total(self) -> np.ndarray:
        """Sum of the weights [...]."""
        total: np.ndarray = self.weights.sum(-1)
        return total

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Weighted mean of values [n] over the items [...]; NaN without any weight."""
        return share((self.weights * values).sum(-1), self.total)


class Ranked:
    """Items in ascending order of a key, in G groups of equal keys.

    Args:
        items: n items.
        key: what they are ordered by [n]; their scores by default.
    """

    def __init__(self, items: Items, key: np.ndarray | None = None) -> None:
        key = items.scores if key is None else key
        self.order = np.argsort(key, kind="stable")
        ordered = key[self.order]
        self.starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        self.weights = items.weights[..., self.order]
        self.counts: np.ndarray = np.add.reduceat(self.weights, self.starts, axis=-1)
        """Weight of each group [..., G]."""

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Weighted sum of values [n] in each group [..., G]."""
        sums: np.ndarray = np.add.reduceat(self.weights * values[self.order], self.starts, axis=-1)
        return sums


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(np.asarray(whole) > 0, np.divide(part, whole), np.nan)[()]
    return found

"""Reliability: whether what is said with confidence c comes true with frequency c."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import xlogy

from nextoken.methods import method
from nextoken.scores.ranked import Items, Missing, Ranked, share

By = Literal["width", "mass"]
"""How bins are made: of equal width on [0, 1], or of equal numbers of items."""


@dataclass(frozen=True)
class Reliability:
    """The data of a reliability diagram: bins that hold items, in order.

    Args:
        count: items of each bin.
        confidence: their mean confidence.
        frequency: the share of them that came true.
        low, high: Wilson 95 % interval of the frequency.
    """

    count: np.ndarray
    confidence: np.ndarray
    frequency: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def ece(self) -> float:
        """sum_b (count_b / n) |confidence_b - frequency_b|."""
        return float((self.count * np.abs(self.confidence - self.frequency)).sum() / self.count.sum())

    @property
    def mce(self) -> float:
        """max_b |confidence_b - frequency_b|."""
        return float(np.abs(self.confidence - self.frequency).max())


@dataclass(frozen=True)
class Brier:
    """Brier score = reliability - resolution + uncertainty + within.

    Args:
        score: mean (c - y)^2.
        reliability: sum_b (n_b / n) (mean c - mean y)^2; 0 is calibrated.
        resolution: sum_b (n_b / n) (mean y of the bin - mean y)^2; high tells outcomes apart.
        uncertainty: ybar (1 - ybar), which no forecaster changes.
        within: what differences inside the bins add, 0 where each bin has one confidence (Stephenson et al., 2008).
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


def reliability(
    confidence: np.ndarray, outcome: np.ndarray, *, bins: int = 15, by: By = "mass", missing: Missing = "refuse"
) -> Reliability:
    """Mean confidence and frequency of truth in each bin.

    Args:
        confidence: stated probability [n], from 0 to 1.
        outcome: 0 or 1 [n].
        bins: how many; empty ones are left out.
        by: `width`: the b-th of B is [b / B, (b + 1) / B), the last closed. `mass`: items in order of confidence, cut
            at floor(b n / B); equal confidences share what they have between the bins they fall in.
        missing: of NaN.
    """
    items = _items(confidence, outcome, None, missing)
    count, stated, true = _binned(items, bins, by)
    held = count > 0
    count, stated, true = count[held], stated[held], true[held]
    low, high = wilson(true, count)
    return Reliability(count, stated / count, true / count, low, high)


@method(
    name="ECE",
    arxiv="1706.04599",
    access="black",
    summary="expected calibration error: mean distance of stated confidence from frequency, over bins",
)
def ece(
    confidence: np.ndarray,
    outcome: np.ndarray,
    *,
    bins: int = 15,
    by: By = "mass",
    weights: np.ndarray | None = None,
    missing: Missing = "refuse",
) -> np.ndarray:
    """sum_b (n_b / n) |mean confidence_b - frequency_b|.

    Never read it alone: the base rate stated everywhere has an ECE of 0. It is biased upwards in small samples, and the
    more so the more bins.

    Args:
        confidence, outcome, bins, by, missing: as of `reliability`.
        weights: how often each item counts [..., n].

    Source: Guo et al., arXiv:1706.04599, with bins of equal width.
    """
    items = _items(confidence, outcome, weights, missing)
    _, stated, true = _binned(items, bins, by)
    return share(np.abs(stated - true).sum(-1), items.total)


@method(
    name="KS calibration error",
    arxiv="2006.12800",
    access="black",
    summary="largest gap between the running sums of confidence and of truth; needs no bins",
)
def ks_error(
    confidence: np.ndarray, outcome: np.ndarray, *, weights: np.ndarray | None = None, missing: Missing = "refuse"
) -> np.ndarray:
    """max_k |(1/n) sum_{i <= k} (c_(i) - y_(i))| in ascending order of confidence, equal ones taken together.

    Args:
        confidence, outcome, weights, missing: as of `ece`.

    Source: Gupta et al., arXiv:2006.12800.
    """
    items = _items(confidence, outcome, weights, missing)
    gaps = Ranked(items).sums(items.scores - items.outcome).cumsum(-1)
    return share(np.abs(gaps).max(-1), items.total)


def brier(
    confidence: np.ndarray, outcome: np.ndarray, *, weights: np.ndarray | None = None, missing: Missing = "refuse"
) -> np.ndarray:
    """mean (c - y)^2.

    Args:
        confidence, outcome, weights, missing: as of `ece`.
    """
    items = _items(confidence, outcome, weights, missing)
    return items.mean((items.scores - items.outcome) ** 2)


def log_loss(
    confidence: np.ndarray, outcome: np.ndarray, *, weights: np.ndarray | None = None, missing: Missing = "refuse"
) -> np.ndarray:
    """-mean [y log c + (1 - y) log(1 - c)], nats; inf where the impossible happened.

    Args:
        confidence, outcome, weights, missing: as of `ece`.
    """
    items = _items(confidence, outcome, weights, missing)
    c, y = items.scores, items.outcome
    lost = -(xlogy(y, c) + xlogy(1 - y, 1 - c))
    with np.errstate(invalid="ignore"):
        # An item that does not count must not turn 0 times inf into NaN.
        counted = np.where(items.weights > 0, items.weights * lost, 0.0)
    return share(counted.sum(-1), items.total)


def brier_decomposition(
    confidence: np.ndarray, outcome: np.ndarray, *, bins: int = 15, by: By = "mass", missing: Missing = "refuse"
) -> Brier:
    """The Brier score in Murphy's three parts over bins, and what the bins leave over.

    Args:
        confidence, outcome, bins, by, missing: as of `reliability`.
    """
    items = _items(confidence, outcome, None, missing)
    count, stated, true = _binned(items, bins, by)
    held = count > 0
    count, stated, true = count[held], stated[held], true[held]
    part, gap, hit = count / items.total, (stated - true) / count, true / count
    base = float(items.mean(items.outcome))
    score = float(items.mean((items.scores - items.outcome) ** 2))
    reliable = float((part * gap**2).sum())
    resolved = float((part * (hit - base) ** 2).sum())
    unsure = base * (1 - base)
    return Brier(score, reliable, resolved, unsure, score - (reliable - resolved + unsure))


def wilson(successes: np.ndarray, trials: np.ndarray, *, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the Wilson interval of a proportion; NaN without trials.

    Args:
        successes, trials: numbers of them, of one shape.
        z: normal quantile, 1.96 for 95 %.
    """
    n = np.asarray(trials, dtype=np.float64)
    p = share(np.asarray(successes, dtype=np.float64), n)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return np.maximum(centre - half, 0.0)[()], np.minimum(centre + half, 1.0)[()]


def _items(confidence: np.ndarray, outcome: np.ndarray, weights: np.ndarray | None, missing: Missing) -> Items:
    items = Items.of(confidence, outcome, weights, missing=missing, binary=True)
    if (items.scores < 0).any() or (items.scores > 1).any():
        wrong = items.scores[(items.scores < 0) | (items.scores > 1)][0]
        raise ValueError(
            f"a confidence must be from 0 to 1, got {wrong}: map scores to probabilities first (calibrate)"
        )
    return items


def _binned(items: Items, bins: int, by: By) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, and weighted sums of confidence and of truth, of each bin [..., bins]."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if by == "width":
        place = np.minimum((items.scores * bins).astype(np.int64), bins - 1)
        member = (place[:, None] == np.arange(bins)).astype(np.float64)
        w = items.weights
        return w @ member, (w * items.scores) @ member, (w * items.outcome) @ member
    if by != "mass":
        raise ValueError(f"by must be 'width' or 'mass', got {by!r}")
    ranked = Ranked(items)
    running = _running(ranked.counts)
    edges = np.floor(np.arange(bins + 1) * running[..., -1:] / bins)
    values = (ranked.counts, ranked.sums(items.scores), ranked.sums(items.outcome))
    return tuple(np.diff(_between(edges, running, _running(v)), axis=-1) for v in values)  # type: ignore[return-value]


def _running(values: np.ndarray) -> np.ndarray:
    """0 and the cumulative sums [..., G + 1]."""
    return np.concatenate([np.zeros_like(values[..., :1]), values.cumsum(-1)], axis=-1)


def _between(edges: np.ndarray, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Row by row, the value at each edge [..., m] on the line through (places, values) [..., G + 1]."""
    flat = places.reshape(-1, places.shape[-1])
    # Rows are put one behind the other, so that one call serves all of them.
    shift = np.arange(len(flat))[:, None] * (flat.max() + 1)
    at = (edges.reshape(len(flat), -1) + shift).ravel()
    return np.asarray(np.interp(at, (flat + shift).ravel(), values.ravel()).reshape(edges.shape))

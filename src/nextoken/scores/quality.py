"""Quality: how well a score orders what turned out, tied scores averaged, and how sure one can be of that.

    auroc(scores, is_machine)                        # a number
    bootstrap(auroc, scores, is_machine)             # with its interval
    bootstrap(partial(tpr_at_fpr, fpr=0.01), scores, is_machine)

Every measure takes `weights` [..., n], how often each item counts, and then gives one number per row of them: so a
bootstrap is one call on a matrix of counts. No measure depends on the order in which equal scores are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

from nextoken.methods import method
from nextoken.scores.ranked import Items, Missing, Ranked, share

Measure = Callable[..., np.ndarray]
"""(*arrays [n], weights=[..., n]) -> [...]."""

_ENTRIES = 1 << 22
"""Weights held at once by a bootstrap."""


def auroc(
    scores: np.ndarray, positive: np.ndarray, *, weights: np.ndarray | None = None, missing: Missing = "refuse"
) -> np.ndarray:
    """P(s+ > s-) + P(s+ = s-) / 2 for a positive and a negative item drawn at random; NaN without one of either.

    Args:
        scores: high speaks for positive [n]; infinities are allowed.
        positive: 0 or 1 [n].
        weights: how often each item counts [..., n].
        missing: of NaN.
    """
    items = Items.of(scores, positive, weights, missing=missing, binary=True)
    ranked = Ranked(items)
    plus, minus = ranked.sums(items.outcome), ranked.sums(1 - items.outcome)
    below = minus.cumsum(-1) - minus
    return share((plus * (below + minus / 2)).sum(-1), plus.sum(-1) * minus.sum(-1))


def tpr_at_fpr(
    scores: np.ndarray,
    positive: np.ndarray,
    *,
    fpr: float = 0.01,
    weights: np.ndarray | None = None,
    missing: Missing = "refuse",
) -> np.ndarray:
    """max {TPR(t) : FPR(t) <= fpr} over thresholds s >= t, at which equal scores pass together; 0 where none will do.

    Nothing is interpolated: with fewer than 1 / fpr negatives it asks for no false alarm at all.

    Args:
        scores, positive, weights, missing: as of `auroc`.
        fpr: largest false-positive rate.
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr must be from 0 to 1, got {fpr}")
    items = Items.of(scores, positive, weights, missing=missing, binary=True)
    ranked = Ranked(items, -items.scores)
    plus, minus = ranked.sums(items.outcome).cumsum(-1), ranked.sums(1 - items.outcome).cumsum(-1)
    # Of fpr * negatives the decimal number is meant, not its rounding below.
    allowed = minus <= fpr * minus[..., -1:] + 1e-9
    found = share(np.where(allowed, plus, 0.0).max(-1), plus[..., -1])
    return np.where(minus[..., -1] > 0, found, np.nan)[()]


def pr_auc(
    scores: np.ndarray, positive: np.ndarray, *, weights: np.ndarray | None = None, missing: Missing = "refuse"
) -> np.ndarray:
    """Average precision: sum over thresholds of (recall gained) * (precision there), equal scores passing together.

    It is scikit-learn's `average_precision_score`; a random score has the share of positives. NaN without a positive.

    Args:
        scores, positive, weights, missing: as of `auroc`.
    """
    items = Items.of(scores, positive, weights, missing=missing, binary=True)
    ranked = Ranked(items, -items.scores)
    plus, all_of_them = ranked.sums(items.outcome), ranked.counts.cumsum(-1)
    precision = np.nan_to_num(share(plus.cumsum(-1), all_of_them))
    return share((plus * precision).sum(-1), plus.sum(-1))


@dataclass(frozen=True)
class RiskCoverage:
    """risk[k - 1] is the mean risk of the k most certain of n items, coverage[k - 1] = k / n, aurc their mean."""

    coverage: np.ndarray
    risk: np.ndarray
    aurc: float


def risk_coverage(uncertainty: np.ndarray, risk: np.ndarray, *, missing: Missing = "refuse") -> RiskCoverage:
    """The curve of mean risk of the k most certain items, k = 1 ... n; over equal uncertainties their expected order.

    Args:
        uncertainty: high is unsure [n].
        risk: what answering costs [n]: 0 or 1 for right or wrong, or any number.
        missing: of NaN.
    """
    items = Items.of(uncertainty, risk, None, missing=missing)
    kept = items.weights > 0
    items = Items(items.scores[kept], items.outcome[kept], items.weights[kept])
    ranked = Ranked(items)
    count, total = ranked.counts, ranked.sums(items.outcome)
    group = np.repeat(np.arange(len(count)), count.astype(np.int64))
    before, spent = count.cumsum() - count, total.cumsum() - total
    k = np.arange(1, len(group) + 1)
    curve = (spent[group] + (total / count)[group] * (k - before[group])) / k
    return RiskCoverage(k / len(k), curve, float(curve.mean()))


@method(
    name="AURC",
    arxiv="1805.08206",
    access="black",
    summary="area under the curve of risk over coverage, for answers given only where the score is sure",
)
def aurc(
    uncertainty: np.ndarray, risk: np.ndarray, *, weights: np.ndarray | None = None, missing: Missing = "refuse"
) -> np.ndarray:
    """(1/n) sum_k (mean risk of the k most certain), its expectation over the orders of equal uncertainties.

    A random score has the mean risk; low is good.

    Args:
        uncertainty, risk, missing: as of `risk_coverage`.
        weights: how often each item counts [..., n].

    Source: Geifman, Uziel and El-Yaniv, arXiv:1805.08206.
    """
    items = Items.of(uncertainty, risk, weights, missing=missing)
    return _kept_mean(Ranked(items), items.outcome, 1.0)


@method(
    name="PRR",
    arxiv="2406.15627",
    access="black",
    summary="how much of the quality that an oracle gains by rejecting answers a score gains",
)
def prr(
    uncertainty: np.ndarray,
    quality: np.ndarray,
    *,
    max_rejection: float = 1.0,
    weights: np.ndarray | None = None,
    missing: Missing = "refuse",
) -> np.ndarray:
    """(A(u) - A(random)) / (A(oracle) - A(random)): 1 is perfect, 0 random, negative worse than that.

    A(u) = (1/R) sum_{k = n - R + 1 .. n} (mean quality of the k most certain), R = max_rejection * n; the oracle
    rejects by quality. A(random) is its expectation, the mean quality, where lm-polygraph takes the mean of 1,000
    shuffles; equal uncertainties count at their expected order, where there the order of the items decides. NaN where
    all qualities are equal.

    Args:
        uncertainty: high is unsure [n]. Infinities are allowed: give one to an item without a verdict to reject it
            first.
        quality: high is good [n], on any scale.
        max_rejection: share of the items that may be rejected, above 0 and at most 1.
        weights, missing: as of `aurc`.

    Source: Vashurin et al., arXiv:2406.15627.
    """
    if not 0 < max_rejection <= 1:
        raise ValueError(f"max_rejection must be above 0 and at most 1, got {max_rejection}")
    items = Items.of(uncertainty, quality, weights, missing=missing)
    random = items.mean(items.outcome)
    gained = _kept_mean(Ranked(items), items.outcome, max_rejection) - random
    oracle = _kept_mean(Ranked(items, -items.outcome), items.outcome, max_rejection) - random
    # Qualities that are all equal leave the oracle a gain of rounding only.
    scale = np.abs(items.outcome).max()
    return share(gained, np.where(oracle > 1e-12 * scale, oracle, 0.0))


@dataclass(frozen=True)
class Interval:
    """A measure and its percentile bootstrap interval.

    Args:
        value: of the items as they are.
        low, high: quantiles (1 - level) / 2 and (1 + level) / 2 over the resamples.
        error: standard deviation over the resamples.
        level: nominal coverage.
        undefined: share of the resamples in which the measure does not exist (no positive, say); they are left out.
    """

    value: float
    low: float
    high: float
    error: float
    level: float
    undefined: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    measure: Measure,
    *arrays: np.ndarray,
    groups: np.ndarray | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """measure(*arrays) and the interval of its values over n items drawn with replacement.

    For a paired difference give a function of your own: `lambda a, b, y, weights: auroc(a, y, weights=weights) -
    auroc(b, y, weights=weights)`. Measures that are biased in small samples (ECE) are as biased in each resample, which
    the interval does not show.

    Args:
        measure: takes the arrays, and `weights` [B, n] for B resamples at once.
        arrays: of n items along the last axis.
        groups: ids [n] of items that belong together (tokens of a document); whole groups are drawn then.
        resamples: B.
        level: of the interval.
        seed: of the draws.

    Raises:
        ValueError: no items, or a count or level out of range.
    """
    if not arrays or not 0 < level < 1 or resamples < 1:
        raise ValueError(f"a bootstrap needs arrays, 0 < level < 1 and resamples >= 1, got {level} and {resamples}")
    size = np.shape(arrays[0])[-1]
    if not size:
        raise ValueError("there is no item to draw from")
    member = np.arange(size) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if len(member) != size:
        raise ValueError(f"groups must name one group for each of {size} items, got {len(member)}")
    count = int(member.max()) + 1
    rng, values, left = np.random.default_rng(seed), [], resamples
    while left:
        rows = min(left, max(1, _ENTRIES // size))
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=rows)
        values.append(np.broadcast_to(measure(*arrays, weights=drawn[:, member].astype(np.float64)), (rows,)))
        left -= rows
    found = np.concatenate(values)
    known = found[~np.isnan(found)]
    edges = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else np.full(2, np.nan)
    return Interval(
        value=float(measure(*arrays, weights=np.ones(size))),
        low=float(edges[0]),
        high=float(edges[1]),
        error=float(known.std(ddof=1)) if len(known) > 1 else float("nan"),
        level=level,
        undefined=1 - len(known) / resamples,
    )


def _kept_mean(ranked: Ranked, values: np.ndarray, rejection: float) -> np.ndarray:
    """(1/R) sum_{k = n - R + 1 .. n} of the mean of the first k values, R = floor(rejection * n), at least 1 [...].

    In a group of w equal items with mean m that begins after C items of sum S, the expected sum of the first k is
    S + m (k - C); so its part of the result is (S - m C) (H_{C + w} - H_a) + m (C + w - a), with harmonic numbers and
    a the larger of C and n - R.
    """
    count, total = ranked.counts, ranked.sums(values)
    ends, mean = count.cumsum(-1), np.nan_to_num(share(total, count))
    begins, spent = ends - count, total.cumsum(-1) - total
    n = ends[..., -1:]
    rejected = np.maximum(1.0, np.floor(rejection * n + 1e-9))
    first = np.clip(n - rejected, begins, ends)
    harmonic = digamma(ends + 1) - digamma(first + 1)
    area = ((spent - mean * begins) * harmonic + mean * (ends - first)).sum(-1)
    return share(area, np.where(n > 0, rejected, 0.0)[..., 0])

"""Deferral curves: the quality of a cascade at every share of answers handed to the large model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nextoken.route.confidence import Floats


@dataclass(frozen=True, eq=False)
class DeferralCurve:
    """Quality against deferral rate.

    Args:
        rates: 0, 1/n, ..., 1 [n + 1].
        quality: mean quality [n + 1] with the n r least confident answers deferred.
        random_area: (mean q_S + mean q_L) / 2, the area to be expected of a random order.
    """

    rates: Floats
    quality: Floats
    random_area: float

    @property
    def area(self) -> float:
        """AUC-DF: the area under the curve, by trapezoids, over rates from 0 to 1."""
        return float(np.trapezoid(self.quality, self.rates))

    @property
    def gain(self) -> float:
        """area / random_area - 1.

        Raises:
            ValueError: the quality is 0 throughout.
        """
        if not self.random_area:
            raise ValueError("both models have quality 0 on every answer: nothing can be gained")
        return self.area / self.random_area - 1

    @property
    def peak(self) -> tuple[float, float]:
        """(rate, quality) where the quality is greatest; the lowest such rate."""
        best = int(np.argmax(self.quality))
        return float(self.rates[best]), float(self.quality[best])

    def at(self, rate: float) -> float:
        """The quality at a rate, linear in between.

        Raises:
            ValueError: the rate is not from 0 to 1.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"a deferral rate is from 0 to 1, got {rate}")
        return float(np.interp(rate, self.rates, self.quality))


def deferral_curve(
    confidence: Sequence[float] | Floats, *, small: Sequence[float] | Floats, large: Sequence[float] | Floats
) -> DeferralCurve:
    """Q(k / n) = (sum over the k least confident of q_L + sum over the others of q_S) / n for k = 0, ..., n.

    Answers of equal confidence are taken in random order and the curve is the mean over all such orders, in closed
    form: it does not depend on the order of the data. Confidences of 0 throughout give the random cascade;
    q_S - q_L gives the oracle.

    Args:
        confidence: [n], higher where the small model's answer is better trusted.
        small, large: quality [n] of the small model's answer, which stands if it is kept, and of the large one's.

    Raises:
        ValueError: the three differ in length, are empty, or hold a NaN.

    Source: Language Model Cascades, arXiv:2404.10136, section 4.
    """
    sure, own, other = (np.asarray(values, dtype=np.float64) for values in (confidence, small, large))
    if sure.ndim != 1 or not len(sure) or sure.shape != own.shape or sure.shape != other.shape:
        raise ValueError(
            "give one confidence and two qualities for each answer, and at least one answer; got shapes "
            f"{sure.shape}, {own.shape} and {other.shape}"
        )
    if np.isnan(sure).any() or np.isnan(own).any() or np.isnan(other).any():
        raise ValueError("a confidence or a quality is NaN")
    _, group = np.unique(sure, return_inverse=True)
    difference = np.bincount(group, weights=other - own) / np.bincount(group)
    gained = np.concatenate([[0.0], np.cumsum(difference[np.sort(group)])])
    count = len(sure)
    return DeferralCurve(
        rates=np.arange(count + 1) / count,
        quality=own.mean() + gained / count,
        random_area=float(own.mean() + other.mean()) / 2,
    )


def threshold_for(confidence: Sequence[float] | Floats, rate: float) -> float:
    """The threshold below which a share `rate` of these confidences lies, as nearly as equal ones allow.

    -inf at rate 0, with which nothing is deferred; inf at rate 1, with which everything is. Choose it on answers that
    are not the test's.

    Raises:
        ValueError: there are no confidences, or the rate is not from 0 to 1.
    """
    ordered = np.sort(np.asarray(confidence, dtype=np.float64))
    if not len(ordered) or not 0 <= rate <= 1:
        raise ValueError(f"give at least one confidence and a rate from 0 to 1, got {len(ordered)} and {rate}")
    if rate in (0, 1):
        return -math.inf if rate == 0 else math.inf
    deferred = round(rate * len(ordered))
    if deferred == 0:
        return float(ordered[0])
    if deferred == len(ordered):
        return float(np.nextafter(ordered[-1], math.inf))
    low, high = float(ordered[deferred - 1]), float(ordered[deferred])
    if not math.isfinite(low):
        return high
    middle = low + (high - low) / 2
    # Neighbouring numbers have no middle: then the upper one parts them.
    return middle if middle > low else high

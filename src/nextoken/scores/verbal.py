"""Verbal confidence: whether what a model says of its own sureness is worth anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nextoken.methods import method
from nextoken.scores.quality import Interval, auroc, bootstrap
from nextoken.scores.reliability import wilson

Tier = Literal["valid", "indeterminate", "insufficient", "invalid"]
Rate = tuple[float, float, float]
"""A figure and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Screen:
    """A 2 x 2 table of stated confidence against truth, and the verdict on it.

    Args:
        tier: the verdict.
        reason: the step that decided.
        threshold: from which on a confidence is high.
        counts: (high and right, high and wrong, low and right, low and wrong).
        false_high: L, the share of wrong answers with high confidence, and its Wilson interval (value, low, high).
        false_low: Fp, the share of right answers with low confidence, likewise.
        bias: RBS = Fp - (1 - L), minus Youden's J: above 0 confidence is inverted. Interval by normal approximation.
        same: TRIN, the share of the more frequent of high and low.
        correlation: phi of high and right, with its Fisher interval.
        ceiling: the share of confidences of at least 0.95.
        distinct: how many different confidences there are.
        auroc: of the confidence itself for right answers: what the threshold hides.
        failures: the share of items without a confidence, which are in none of these figures.
        warnings: what else should be known.
    """

    tier: Tier
    reason: str
    threshold: float
    counts: tuple[int, int, int, int]
    false_high: Rate
    false_low: Rate
    bias: Rate
    same: float
    correlation: Rate
    ceiling: float
    distinct: int
    auroc: Interval
    failures: float
    warnings: tuple[str, ...] = ()


@method(
    name="Confidence validity screen",
    arxiv="2604.22215",
    access="black",
    summary="whether stated confidences tell right answers from wrong ones, before anyone uses them",
)
def screen(
    confidence: np.ndarray,
    correct: np.ndarray,
    *,
    threshold: float | Literal["median"] = 0.5,
    order: Literal["study", "package"] = "study",
    resamples: int = 2000,
    seed: int = 0,
) -> Screen:
    """Screen a confidence signal by the table of (c >= threshold) against right answers.

    With a = high and right, b = high and wrong, c = low and right, d = low and wrong: L = b / (b + d), Fp = c / (a +
    c), RBS = Fp - (1 - L), TRIN = max(a + b, c + d) / n. `study`, the first that applies: TRIN > 0.95 is invalid; a
    cell below 5 is insufficient; Fp >= 0.5 is invalid if its interval is above 0.4; L >= 0.95 if its interval is above
    0.9; RBS > 0 if above 0.05 and its interval above 0; where one of these three is reached without its interval it is
    indeterminate; else valid. `package` (validity-screen on PyPI) has no first step, looks at all three and takes the
    worst, and asks no margin of RBS. The two disagree where nearly all confidences are high: invalid against
    insufficient.

    A signal that fails may still order answers, above the threshold: look at `auroc`, and at threshold="median".

    Args:
        confidence: from 0 to 1 [n]; NaN where none could be read, which counts as a failure and not as a low one.
        correct: 0 or 1 [n].
        threshold: from which on it is high; "median" cuts where the halves are most even.
        order: of the steps.
        resamples, seed: of the interval of the AUROC.

    Raises:
        ValueError: shapes differ, there is no item, or a confidence is not from 0 to 1.

    Source: arXiv:2604.22215 and its analysis code.
    """
    said, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if said.ndim != 1 or said.shape != right.shape or not len(said) or not np.isin(right, (0.0, 1.0)).all():
        raise ValueError(f"confidences and 0/1 outcomes must be two arrays [n], n > 0; got {said.shape}, {right.shape}")
    if ((said < 0) | (said > 1)).any():
        raise ValueError("a confidence must be from 0 to 1: divide percentages by 100")
    if order not in ("study", "package"):
        raise ValueError(f"order must be 'study' or 'package', got {order!r}")
    known = ~np.isnan(said)
    c, y = said[known], right[known] > 0
    cut = _median_cut(c) if threshold == "median" else float(threshold)
    high = c >= cut
    counts = (int((high & y).sum()), int((high & ~y).sum()), int((~high & y).sum()), int((~high & ~y).sum()))
    rates = rates_of(*counts)
    tier, reason = (_by_study if order == "study" else _by_package)(counts, rates)
    warnings = []
    if rates["same"][0] >= 0.95:
        warnings.append("nearly all confidences fall on one side of the threshold")
    if len(np.unique(c)) < 3:
        warnings.append("fewer than 3 different confidences")
    if (~known).mean() > 0.3:
        warnings.append("more than 30 % of the answers state no confidence that could be read")
    return Screen(
        tier=tier,
        reason=reason,
        threshold=cut,
        counts=counts,
        false_high=rates["false_high"],
        false_low=rates["false_low"],
        bias=rates["bias"],
        same=rates["same"][0],
        correlation=rates["correlation"],
        ceiling=float((c >= 0.95).mean()) if len(c) else math.nan,
        distinct=len(np.unique(c)),
        auroc=bootstrap(auroc, c, y, resamples=resamples, seed=seed) if len(c) else _UNKNOWN,
        failures=float((~known).mean()),
        warnings=tuple(warnings),
    )


Rates = Mapping[str, Rate]
_UNKNOWN = Interval(math.nan, math.nan, math.nan, math.nan, 0.95, 1.0)


def rates_of(a: int, b: int, c: int, d: int) -> dict[str, Rate]:
    """The rates of a table of high-right, high-wrong, low-right and low-wrong, each with the ends of its 95 % interval.

    A rate without cases is NaN.
    """
    n = a + b + c + d
    parts = {"false_high": (b, b + d), "false_low": (c, a + c)}
    found = {}
    for name, (hits, trials) in parts.items():
        low, high = wilson(np.array(float(hits)), np.array(float(trials)))
        found[name] = (hits / trials if trials else math.nan, float(low), float(high))
    bias = found["false_low"][0] - (1 - found["false_high"][0])
    spread = [
        p * (1 - p) / trials if trials else math.nan
        for (p, _, _), (_, trials) in zip(found.values(), parts.values(), strict=True)
    ]
    half = 1.959964 * math.sqrt(sum(spread))
    found["bias"] = (bias, bias - half, bias + half)
    found["same"] = (max(a + b, c + d) / n if n else math.nan, math.nan, math.nan)
    scale = math.sqrt(float((a + b) * (c + d)) * float((a + c) * (b + d)))
    phi = (a * d - b * c) / scale if scale else math.nan
    reach = 1.959964 / math.sqrt(n - 3) if n > 3 else math.nan
    z = math.atanh(phi) if abs(phi) < 1 else math.copysign(math.inf, phi) if not math.isnan(phi) else math.nan
    found["correlation"] = (phi, math.tanh(z - reach), math.tanh(z + reach))
    return found


def _by_study(counts: tuple[int, int, int, int], rates: Rates) -> tuple[Tier, str]:
    if rates["same"][0] > 0.95:
        return "invalid", "degenerate: more than 95 % of the confidences fall on one side of the threshold"
    if min(counts) < 5:
        return "insufficient", "a cell of the table has fewer than 5 answers"
    for tier, reason in _flags(rates, margin=0.05):
        return tier, reason
    return "valid", "no index is beyond its limit"


def _by_package(counts: tuple[int, int, int, int], rates: Rates) -> tuple[Tier, str]:
    if min(counts) < 5:
        return "insufficient", "a cell of the table has fewer than 5 answers"
    flags = _flags(rates, margin=0.0)
    return min(flags, key=lambda flag: flag[0] != "invalid") if flags else ("valid", "no index is beyond its limit")


def _flags(rates: Rates, *, margin: float) -> list[tuple[Tier, str]]:
    """Each index that is beyond its limit, in the order of the protocol."""
    (low_rate, low_sure, _), (high_rate, high_sure, _) = rates["false_low"], rates["false_high"]
    bias, bias_sure, _ = rates["bias"]
    flags: list[tuple[Tier, str]] = []
    if low_rate >= 0.5:
        flags.append(
            ("invalid" if low_sure > 0.4 else "indeterminate", "half of the right answers have low confidence")
        )
    if high_rate >= 0.95:
        flags.append(
            ("invalid" if high_sure > 0.9 else "indeterminate", "nearly all wrong answers have high confidence")
        )
    if bias > 0:
        sure = bias_sure > 0 and bias > margin
        flags.append(("invalid" if sure else "indeterminate", "confidence is inverted"))
    return flags


def _median_cut(confidence: np.ndarray) -> float:
    """The distinct value at which the shares below, and from it on, are most even."""
    values, counts = np.unique(confidence, return_counts=True)
    if len(values) < 2:
        return float(values[0]) if len(values) else 0.5
    below = counts.cumsum()[:-1]
    return float(values[1 + np.argmin(np.abs(below - counts.sum() / 2))])

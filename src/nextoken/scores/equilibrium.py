"""Equilibrium: whether a series of drifts is pulled back to a level, which one, and what reminders change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nextoken.methods import method

Series = Sequence[np.ndarray]
"""One array of D_t per dialogue."""
Finding = Literal["restoring", "no memory", "no restoring force", "undecided"]


@dataclass(frozen=True)
class Span:
    """An estimate and the ends of its 95 % interval, from dialogues drawn with replacement."""

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


@dataclass(frozen=True)
class Equilibrium:
    """D_{t+1} - D_t = a + b D_t + noise, fitted over all turns of all dialogues.

    Args:
        a, b: by least squares.
        level: D* = -a / b.
        r_squared: of the fit.
        noise: standard deviation of what is left.
        slope: of D_t on t within dialogues: whether it grows at all.
        memoryless: b under the null that turns have no memory (turns of each dialogue shuffled): mean, and the 95 %
        range.
            With no dynamics whatever b is near -1 and R^2 near 1/2, so such a fit shows nothing.
        unrestored: b under the null that nothing pulls back (increments of each dialogue shuffled).
        finding: "restoring" if b is above the first range and below the second, which a force with memory alone brings
            about; else which null it cannot be told from, or "undecided" if neither.
    """

    a: Span
    b: Span
    level: Span
    r_squared: float
    noise: float
    slope: Span
    memoryless: Span
    unrestored: Span
    finding: Finding

    @property
    def phi(self) -> float:
        """1 + b, the autoregressive coefficient."""
        return 1 + self.b.value

    @property
    def spread(self) -> float:
        """Stationary standard deviation, noise / sqrt(1 - phi^2); NaN unless |phi| < 1."""
        return self.noise / math.sqrt(1 - self.phi**2) if abs(self.phi) < 1 else math.nan

    @property
    def half_life(self) -> float:
        """Turns in which half of a deviation is gone, log(1/2) / log(phi); NaN unless 0 < phi < 1."""
        return math.log(0.5) / math.log(self.phi) if 0 < self.phi < 1 else math.nan


@method(
    name="Drift equilibrium",
    arxiv="2510.07777",
    access="black",
    summary="linear recurrence of a drift series, its fixed point, and the two nulls it must be told from",
)
def equilibrium(series: Series, *, resamples: int = 1000, seed: int = 0) -> Equilibrium:
    """Fit D_{t+1} - D_t = a + b D_t + eps and set it against no memory and no restoring force.

    The paper reads b < 0 as a restoring force. But without any dynamics b is -1 (and R^2 is 1/2, and -a/b the mean), as
    its own fits are; a force that acts over turns has -1 < b < 0. Short series are biased downwards, which the nulls
    share, being made of the same turns: so look at them and not at b alone.

    Args:
        series: D_t of each dialogue, without NaN; those of fewer than two turns say nothing.
        resamples: of dialogues for intervals, and of turns for each null.
        seed: of both.

    Raises:
        ValueError: there are fewer than three steps, or D_t never varies.

    Source: arXiv:2510.07777, with nulls of our own.
    """
    used = [np.asarray(one, dtype=np.float64) for one in series if len(one) >= 2]
    if any(one.ndim != 1 or not np.isfinite(one).all() for one in used):
        raise ValueError("each series must be an array [T] of finite numbers: leave out turns without tokens")
    moments = np.array([_moments(one[None])[0] for one in used]).reshape(-1, 6)
    if moments[:, 0].sum() < 3:
        raise ValueError(f"{int(moments[:, 0].sum())} steps are too few to fit a line: at least 3 are needed")
    total = moments.sum(0)
    if not _spread(total) > 0:
        raise ValueError("D_t never varies, so there is no recurrence to fit")
    a, b = _line(total)
    n, _, _, _, _, squares = total
    left = max(float(squares - a * total[2] - b * total[4]), 0.0)
    about = float(squares - total[2] ** 2 / n)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), size=resamples).astype(np.float64)
    a_drawn, b_drawn = _line(drawn @ moments)
    trends = np.array([_trend(one) for one in used])
    trend_drawn = drawn @ trends
    nulls = [_null(used, rng, resamples, increments=increments) for increments in (False, True)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return Equilibrium(
            a=_span(float(a), a_drawn),
            b=_span(float(b), b_drawn),
            level=_span(float(-a / b) if b else math.nan, -a_drawn / b_drawn),
            r_squared=1 - left / about if about > 0 else math.nan,
            noise=math.sqrt(left / max(n - 2, 1)),
            slope=_span(float(trends[:, 0].sum() / trends[:, 1].sum()), trend_drawn[:, 0] / trend_drawn[:, 1]),
            memoryless=nulls[0],
            unrestored=nulls[1],
            finding=_finding(float(b), *nulls),
        )


@dataclass(frozen=True)
class Effect:
    """What a reminder changes, paired by dialogue.

    Args:
        difference: mean D_t after it, with less without, nats per token.
        relative: the same over the mean without.
        push: delta of the recurrence, by which the reminder lowers D_t each turn: -difference * |b|. NaN without a fit.
        dialogues: how many pairs.
    """

    difference: Span
    relative: Span
    push: float
    dialogues: int


def reminder_effect(
    reminded: Series,
    plain: Series,
    *,
    first: int,
    fit: Equilibrium | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Effect:
    """mean over turns t >= first of D_t with a reminder, less that of the same dialogue without it.

    Under D_{t+1} = D_t + a + b D_t - delta the equilibrium moves by -delta / |b|; so the push is the difference times
    |b|, once the series has settled. Give a neutral text of like length as `plain` to know what the words of the
    reminder do.

    Args:
        reminded, plain: D_t of the same dialogues, turn by turn.
        first: turn from which on the reminder can have an effect.
        fit: of the plain series, for the push.
        resamples, seed: of the intervals, over dialogues.

    Raises:
        ValueError: the series are not pairs, or have no turn after `first`.
    """
    pairs = list(zip(reminded, plain, strict=False))
    if len(reminded) != len(plain) or not pairs or any(len(one) != len(other) for one, other in pairs):
        raise ValueError("reminded and plain must be the same dialogues, with as many turns each, and at least one")
    if first < 0 or any(len(one) <= first for one, _ in pairs):
        raise ValueError(f"a dialogue has no turn {first} or later, so the reminder has nothing to change")
    after = np.array([[np.mean(one[first:]), np.mean(other[first:])] for one, other in pairs])
    gaps, base = after[:, 0] - after[:, 1], after[:, 1]
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=resamples) / len(pairs)
    difference = _span(float(gaps.mean()), drawn @ gaps)
    relative = _span(float(gaps.mean() / base.mean()), (drawn @ gaps) / (drawn @ base))
    push = -difference.value * abs(fit.b.value) if fit is not None else math.nan
    return Effect(difference, relative, push, len(pairs))


def _moments(series: np.ndarray) -> np.ndarray:
    """Of each row of D [R, T]: n, sum x, sum y, sum x^2, sum x y, sum y^2, x = D_t and y = D_{t+1} - D_t [R, 6]."""
    x, y = series[:, :-1], np.diff(series, axis=1)
    n = np.full(len(series), x.shape[1], dtype=np.float64)
    return np.stack([n, x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1), (y * y).sum(1)], 1)


def _spread(moments: np.ndarray) -> np.ndarray:
    """n sum x^2 - (sum x)^2, 0 where that is rounding."""
    n, x, _, xx, _, _ = np.moveaxis(moments, -1, 0)
    found = n * xx - x * x
    return np.asarray(np.where(found > 1e-12 * n * xx, found, 0.0))


def _line(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b of least squares from sums [..., 6]."""
    n, x, y, _, xy, _ = np.moveaxis(moments, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        b = np.where(_spread(moments) > 0, (n * xy - x * y) / _spread(moments), np.nan)
        return np.asarray((y - b * x) / n), np.asarray(b)


def _trend(series: np.ndarray) -> tuple[float, float]:
    """sum (t - mean t)(D_t - mean D) and sum (t - mean t)^2 of one dialogue."""
    t = np.arange(len(series)) - (len(series) - 1) / 2
    return float(t @ (series - series.mean())), float(t @ t)


def _null(series: Series, rng: np.random.Generator, count: int, *, increments: bool) -> Span:
    """Mean and 95 % range of b when the turns, or the increments, of each dialogue stand in random order."""
    total = np.zeros((count, 6))
    for length in {len(one) for one in series}:
        block = np.stack([one for one in series if len(one) == length])
        many = np.repeat(block[None], count, 0)
        if increments:
            steps = rng.permuted(np.diff(many, axis=2), axis=2)
            many = np.concatenate([many[:, :, :1], many[:, :, :1] + steps.cumsum(2)], 2)
        else:
            many = rng.permuted(many, axis=2)
        total += _moments(many.reshape(-1, length)).reshape(count, -1, 6).sum(1)
    _, b = _line(total)
    return _span(float(np.nanmean(b)), b)


def _finding(b: float, memoryless: Span, unrestored: Span) -> Finding:
    forgets, wanders = b <= memoryless.high, b >= unrestored.low
    if forgets and wanders:
        return "undecided"
    return "no memory" if forgets else "no restoring force" if wanders else "restoring"


def _span(value: float, drawn: np.ndarray) -> Span:
    known = drawn[np.isfinite(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Span(value, float(low), float(high))

"""Resampling: which particles go on, so that each has n p_i copies on average.

    systematic(p, n, rng)        # p [N] of sum 1 -> indices [n], ascending

Each scheme keeps E[copies of i] = n p_i, which is all that the proof of sequential Monte Carlo asks of it; they differ
in how much the copies vary. `SCHEMES` has them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np

SchemeName = Literal["systematic", "stratified", "residual", "multinomial"]
Scheme: TypeAlias = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def multinomial(p: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n independent draws of p: the most variation."""
    return _invert(p, np.sort(rng.random(n)))


def stratified(p: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """One draw in each n-th of the cumulative, independent of the others."""
    return _invert(p, (np.arange(n) + rng.random(n)) / n)


def systematic(p: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """One uniform number for all n-ths: i gets floor(n p_i) or one more."""
    return _invert(p, (np.arange(n) + rng.random(1)) / n)


def residual(p: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """floor(n p_i) copies for sure, the rest drawn independently by what is left of n p_i."""
    sure = np.floor(n * p)
    rest = n - int(sure.sum())
    copies = np.repeat(np.arange(len(p)), sure.astype(np.int64))
    if rest == 0:
        return copies
    return np.sort(np.concatenate([copies, multinomial(n * p - sure, rest, rng)]))


SCHEMES: dict[str, Scheme] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "multinomial": multinomial,
}


def scheme(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in SCHEMES:
        raise ValueError(f"resampling must be one of {', '.join(SCHEMES)}; got {name!r}")
    return SCHEMES[name]


def _invert(p: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The index at which the cumulative passes each point in [0, 1), in relation to its total; never one with p = 0."""
    cumulative = np.cumsum(p)
    total = cumulative[-1]
    below = np.minimum(points * total, np.nextafter(total, 0.0))
    return np.asarray(cumulative.searchsorted(below, side="right"))

"""Surprisal bounds: how far the mean surprisal of a text strays from its mean entropy, at most, and how seldom.

D = (1/n) sum_t (S_t - H_t) as in `nextoken.scores.concentration`, nats per token, n fixed beforehand. The paper proves
that the errors of tests on D fall exponentially in n (arXiv:2501.02406); the bounds here, with constants, are derived
in the docstrings.
"""

from __future__ import annotations

import math

import numpy as np


def type_one_bound(n: np.ndarray | int, gap: np.ndarray | float, *, vocab_size: int) -> np.ndarray:
    """exp(-n B h(gap / B)) >= P(D >= gap) for gap > 0, P(D <= gap) for gap < 0, h(x) = x - log(1 + x).

    Derivation: K(s) = log E e^(s S_t) = log sum_v A^(1 - s) has K(0) = 0, K'(0) = H_t, and K''(s) is the variance of
    -log A under the tempered A_s ~ A^(1 - s), hence the varentropy of A_s over (1 - s)^2. No distribution on V tokens
    has a varentropy above B = log(V - 1)^2 / 4 + 1 (Reeb and Wolf, arXiv:1304.0036), so K(s) - s H_t is at most
    B (-log(1 - s) - s), what a centred Gamma variable of shape B has. The sum of n such steps has n times that, and
    Chernoff's bound at the best s = gap / (B + gap) is the formula. For small gaps it is exp(-n gap^2 / (2 B)).

    Args:
        n: tokens, fixed beforehand.
        gap: of D, nats.
        vocab_size: V.
    """
    bound = _varentropy_bound(vocab_size)
    x = np.asarray(gap, dtype=np.float64) / bound
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(x > -1, np.where(np.isposinf(x), np.inf, x - np.log1p(np.maximum(x, -1.0))), np.inf)
        rate = np.where(np.isnan(x), np.nan, rate)
        # An infinite rate over no tokens is no evidence.
        return np.exp(-np.where(np.asarray(n) > 0, np.asarray(n) * bound * rate, 0.0))[()]


def type_two_bound(n: int, gap: float, *, excess: float, square: float) -> float:
    """exp(-n (excess - gap)^2 / (2 square)) >= P(D < gap) for text drawn from another model B.

    Where the mean over the text of CE(B, A) - H(A) is at least `excess` and that of E_B[log^2 A] at most `square`:
    since S_t >= 0, E e^(-s S) <= exp(-s E S + s^2 E S^2 / 2), and the rest is Chernoff's. So a test that rejects at D
    >= gap misses B's text with a probability that falls exponentially in n as soon as excess > gap; otherwise the bound
    is 1. Both means can be had from `nextoken.scores.detection.cross_moments(A, texts, sampling=B)`.

    Args:
        n: tokens.
        gap: at which the test rejects, nats.
        excess: mean of CE(B, A) - H(A), nats.
        square: mean of E_B[log^2 A], nats^2.

    Raises:
        ValueError: square is not above 0.
    """
    if not square > 0:
        raise ValueError(f"square must be above 0, got {square}")
    return math.exp(-n * max(excess - gap, 0.0) ** 2 / (2 * square))


def tolerance(n: int, level: float, *, vocab_size: int) -> float:
    """The gap, nats, at which `type_one_bound(n, gap)` is the level: what D of n tokens from A seldom exceeds.

    Raises:
        ValueError: n is below 1, or the level not between 0 and 1.
    """
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"n must be at least 1 and level between 0 and 1, got {n} and {level}")
    from scipy.optimize import brentq

    bound = _varentropy_bound(vocab_size)
    wanted = -math.log(level) / (n * bound)
    # x - log(1 + x) is at least x / 2 from x = 3 on.
    root: float = brentq(lambda x: x - math.log1p(x) - wanted, 0.0, max(3.0, 2 * wanted))
    return bound * root


def _varentropy_bound(vocab_size: int) -> float:
    """B: no distribution on V tokens has a varentropy above it, nats^2."""
    if vocab_size < 2:
        raise ValueError(f"a vocabulary has at least 2 tokens, got {vocab_size}")
    return math.log(vocab_size - 1) ** 2 / 4 + 1

"""Tails: exact probabilities that fair or unfair bits come out as they did, or better."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom

_SIGMAS, _STEPS = 12, 80
"""Half of the window that a sum is looked at in: standard deviations, and largest weights, beyond which nothing is."""
_NOTHING = -60.0
"""log of a share of the law's transform that is left out."""


def binomial_tail(ones: int, n: int, share: float = 0.5) -> float:
    """P(Bin(n, share) >= ones); 1 for n = 0."""
    return float(binom.sf(ones - 1, n, share)) if n else 1.0


def z_score(ones: int, n: int, share: float = 0.5) -> float:
    """(ones - n share) / sqrt(n share (1 - share)); NaN for n = 0."""
    return (ones - n * share) / math.sqrt(n * share * (1 - share)) if n else math.nan


def weighted_tail(total: int, n: int, weights: Sequence[int]) -> float:
    """P(sum_i a_i K_i >= total), K_i ~ Bin(n, 1/2) independent, a_i positive integers; 1 for n = 0.

    The law of the sum is tilted by e^(lambda x) until `total` is its mean, found there from its characteristic function
    by a Fourier transform, and tilted back: the relative error is some 1e-9 however small the probability.

    Args:
        total: the sum observed.
        n: bits of each weight.
        weights: the a_i.
    """
    a = np.asarray(weights, dtype=np.float64)
    most = n * int(a.sum())
    if n == 0 or total <= 0:
        return 1.0
    if total > most:
        return 0.0
    if total == most:
        return 2.0 ** -(n * len(a))
    if 2 * total <= most:
        # The law is symmetric: the small side is the one that can be found precisely.
        return 1.0 - weighted_tail(most - total + 1, n, weights)
    tilt = float(brentq(lambda t: n * float((a / (1 + np.exp(-t * a))).sum()) - total, 0.0, _highest(a, total, n)))
    q = 1 / (1 + np.exp(-tilt * a))
    spread = math.sqrt(n * float((a * a * q * (1 - q)).sum()))
    size = 1 << math.ceil(math.log2(2 * (_SIGMAS * spread + _STEPS * a.max()) + 2))
    spectrum = np.zeros(size // 2 + 1, dtype=np.complex128)
    places = np.arange(len(spectrum))
    law = np.ones(len(places), dtype=np.complex128)
    for weight, chance in zip(a, q, strict=True):
        law *= 1 - chance + chance * np.exp(2j * np.pi / size * weight * places)
        # Nearly all frequencies are nothing after a weight or two: powers of n of what is below 1.
        kept = n * np.log(np.abs(law) + 1e-300) > _NOTHING
        places, law = places[kept], law[kept]
    spectrum[places] = law**n * np.exp(-2j * np.pi * ((places * total) % size) / size)
    # What is above `total` by 0 .. size / 2, from the real transform of the conjugate spectrum.
    above = np.fft.irfft(np.conj(spectrum), size)[: size // 2]
    cumulant = n * float((np.logaddexp(0, tilt * a) - math.log(2)).sum())
    return float(np.exp(cumulant - tilt * total) * (above * np.exp(-tilt * np.arange(len(above)))).sum())


def _highest(weights: np.ndarray, total: int, n: int) -> float:
    """A tilt at which the mean is above `total`."""
    tilt = 1.0 / float(weights.max())
    while n * float((weights / (1 + np.exp(-tilt * weights))).sum()) <= total:
        tilt *= 2
    return tilt

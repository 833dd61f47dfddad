"""Scales: how the number of a column becomes a colour, the same in every text, on the page and in the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from nextoken.signature.columns import PLACE

if TYPE_CHECKING:
    from nextoken.signature.signature import Signature

BINS = 33
"""Colours of a ramp; odd, so that a diverging ramp has a middle."""


@dataclass(frozen=True)
class Scale:
    """fraction(v) = (g(v) - g(low)) / (g(high) - g(low)), held within [0, 1].

    g is the identity, the signed square root, or sign(v) log(1 + |v|). `low` has no colour and `high` the strongest;
    in a diverging scale the middle has none and either end is strong. Ends are fixed, so that texts and models
    compare; numbers beyond them take the colour of the end.

    Args:
        low: value at the uncoloured end; may be the greater one.
        high: value at the coloured end.
        ticks: values that the legend names.
        shape: g.
        diverging: both signs matter.
        unit: for legends.
        is_fitted: the ends come from the numbers at hand, for want of natural ones.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    shape: Literal["linear", "sqrt", "log"] = "linear"
    diverging: bool = False
    unit: str = ""
    is_fitted: bool = False

    def fraction(self, values: np.ndarray) -> np.ndarray:
        """Place on the ramp of each value, NaN where it is unknown."""
        ends = self._shaped(np.array([self.low, self.high]))
        placed: np.ndarray = (self._shaped(np.asarray(values, dtype=np.float64)) - ends[0]) / (ends[1] - ends[0])
        np.clip(placed, 0.0, 1.0, out=placed)
        return placed

    def bins(self, values: np.ndarray) -> np.ndarray:
        """Colour of each value, from 0 to BINS - 1; -1 where it is unknown."""
        placed = self.fraction(values)
        numbers: np.ndarray = np.floor(np.nan_to_num(placed) * (BINS - 1) + 0.5).astype(np.int64)
        numbers[np.isnan(placed)] = -1
        return numbers

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        if self.shape == "linear":
            return values
        size = np.abs(values)
        grown: np.ndarray = np.sqrt(size) if self.shape == "sqrt" else np.log1p(size)
        grown *= np.sign(values)
        return grown


_SHARE = Scale(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
_LOGPROB = Scale(0.0, -12.0, (0.0, -3.0, -6.0, -9.0, -12.0), unit="nats")
_ENTROPY = Scale(0.0, 8.0, (0.0, 2.0, 4.0, 6.0, 8.0), unit="nats")
_DIVERGENCE = Scale(0.0, 4.0, (0.0, 0.25, 1.0, 2.0, 4.0), "sqrt", unit="nats")

SCALES: dict[str, Scale] = {
    "logprob": _LOGPROB,
    "rank": Scale(0.0, 10_000.0, (0.0, 10.0, 100.0, 1_000.0, 10_000.0), "log"),
    "mass_above": _SHARE,
    "entropy": _ENTROPY,
    "varentropy": Scale(0.0, 16.0, (0.0, 1.0, 4.0, 9.0, 16.0), "sqrt", unit="nats²"),
    "skewness": Scale(-16.0, 16.0, (-16.0, -4.0, 0.0, 4.0, 16.0), "sqrt", diverging=True),
    "kurtosis": Scale(1.0, 1_000.0, (1.0, 10.0, 100.0, 1_000.0), "log"),
    "collision": _SHARE,
    "mean_logprob": Scale(-6.0, -24.0, (-6.0, -12.0, -18.0, -24.0), unit="nats"),
    "std_logprob": Scale(0.0, 6.0, (0.0, 2.0, 4.0, 6.0), unit="nats"),
    "top1_prob": _SHARE,
    "margin": _SHARE,
    "half_sum": Scale(1.0, 300.0, (1.0, 3.0, 10.0, 100.0, 300.0), "log"),
    "quarter_sum": Scale(1.0, 30_000.0, (1.0, 10.0, 100.0, 1_000.0, 30_000.0), "log"),
    "cube_sum": _SHARE,
    "fourth_sum": _SHARE,
    "rest_mass": _SHARE,
    "entropy_lower": _ENTROPY,
    "entropy_upper": _ENTROPY,
    "cross_entropy": replace(_ENTROPY, high=12.0, ticks=(0.0, 3.0, 6.0, 9.0, 12.0)),
    "kl": _DIVERGENCE,
    "reverse_kl": _DIVERGENCE,
    "js": Scale(0.0, math.log(2), (0.0, 0.2, 0.4, 0.6), unit="nats"),
    "against_logprob": _LOGPROB,
}
"""Columns with ends of their own; `scale` fits the others."""


def scale(name: str, values: np.ndarray) -> Scale:
    """The scale of a column; one without natural ends (log_normalizer) reaches from the 2nd to the 98th percentile."""
    if name in SCALES:
        return SCALES[name]
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    low, high = np.percentile(known, [2, 98]).tolist() if len(known) else (0.0, 1.0)
    if high <= low:
        high = low + 1.0
    return Scale(low, high, (low, (low + high) / 2, high), is_fitted=True)


def colourable(signature: Signature) -> tuple[str, ...]:
    """The columns that have a colour for each token."""
    kept = {*PLACE, "top_ids", "top_logprobs", "hidden"}
    return tuple(name for name in signature.columns if name not in kept)


def check_colour(signature: Signature, colour: str) -> None:
    """Raise ValueError unless tokens can be coloured by this column."""
    if colour not in colourable(signature):
        raise ValueError(
            f"cannot colour by {colour!r}: the columns to colour by are {', '.join(colourable(signature))}"
        )

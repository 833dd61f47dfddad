"""Rows: columns of a signature, reduced text by text without a loop over texts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nextoken.signature.signature import Signature

Values = np.ndarray


class Rows:
    """The rows of a signature as ragged arrays: values [N] go in, one number per text [T] comes out.

    A text without rows gives NaN (and 0 where things are summed or counted). NaN in a row makes its text NaN.

    Args:
        signature: N rows of T texts.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.offsets: Values = signature.row_offsets
        self.counts: Values = np.diff(self.offsets)
        """Rows of each text [T]."""
        self.text: Values = np.repeat(np.arange(len(self.counts)), self.counts)
        """Which text each row belongs to [N]."""

    def __getitem__(self, column: str) -> Values:
        """A column in float64 [N].

        Raises:
            KeyError: the signature has no such column.
        """
        values: Values = self.signature.column(column).astype(np.float64)
        return values

    def sum(self, values: Values) -> Values:
        """Sum over the rows of each text, 0 for a text without rows."""
        return self._reduced(np.add.reduceat, values, 0.0)

    def mean(self, values: Values) -> Values:
        """Mean over the rows of each text."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sum(values) / np.where(self.counts > 0, self.counts, np.nan)

    def max(self, values: Values) -> Values:
        """Largest of the rows of each text."""
        return self._reduced(np.maximum.reduceat, values, np.nan)

    def min(self, values: Values) -> Values:
        """Smallest of the rows of each text."""
        return self._reduced(np.minimum.reduceat, values, np.nan)

    def lowest(self, values: Values, share: float) -> Values:
        """Mean of the max(1, floor(share * n)) smallest of the n rows of each text.

        Raises:
            ValueError: share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        # Of a product such as 0.29 * 100 the floor is that of the decimal number meant, not of its rounding below.
        taken = np.maximum(1, np.floor(share * self.counts + 1e-9)).astype(np.int64)
        kept = self._places() < taken[self.text]
        total = self.sum(np.where(kept, self._sorted(values), 0.0))
        return np.where((self.counts > 0) & (self.sum(np.isnan(values)) == 0), total / taken, np.nan)

    def quantile(self, values: Values, q: float) -> Values:
        """The q-quantile of the rows of each text, linear between order statistics, as numpy's default.

        Raises:
            ValueError: q is not from 0 to 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be from 0 to 1, got {q}")
        there = self.counts > 0
        last = np.maximum(self.counts - 1, 0)
        low = np.floor(q * last).astype(np.int64)
        ordered = np.append(self._sorted(values), np.nan)
        begin = np.where(there, self.offsets[:-1], len(values))
        lower, upper = ordered[begin + low], ordered[begin + np.minimum(low + 1, last)]
        share = q * last - low
        with np.errstate(invalid="ignore"):
            # The lower end alone where it is meant: an infinite end times a weight of 0 would give no number.
            between = np.where((share == 0) | (lower == upper), lower, (1 - share) * lower + share * upper)
        return np.where(self.sum(np.isnan(values)) > 0, np.nan, between)

    def _places(self) -> Values:
        """Where each row stands in its text, from 0 [N]."""
        places: Values = np.arange(len(self.text)) - self.offsets[:-1][self.text]
        return places

    def _sorted(self, values: Values) -> Values:
        """The values with those of each text in ascending order [N]."""
        ordered: Values = values[np.lexsort((values, self.text))]
        return ordered

    def _reduced(self, reduce: Callable[[Values, Values], Values], values: Values, empty: float) -> Values:
        result = np.full(len(self.counts), empty)
        there = self.counts > 0
        if there.any():
            result[there] = reduce(values.astype(np.float64), self.offsets[:-1][there])
        return result

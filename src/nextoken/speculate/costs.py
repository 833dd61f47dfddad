"""Costs: what passes of the target take, by how much is fed, measured while they run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

Kind = tuple[bool, int]
"""Whether the passes are over trees, and how many tokens of each row."""


@dataclass
class _Measured:
    last: deque[float]
    """Seconds of the last few passes."""
    at: int
    """Number of the last of them."""
    seconds: float = math.nan
    """Their median, which one interrupted pass does not move."""


@dataclass
class _Table:
    """The passes over one number of rows."""

    measured: dict[Kind, _Measured] = field(default_factory=dict)
    curves: dict[bool, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    """Seconds by size, made when asked for and dropped with each measurement."""


class Costs:
    """c(b, n): seconds of a pass of the target over n tokens of each of b rows, apart for chains and trees.

    Each is the median of the last `window` passes of about this b and n (b to within a tenth, n to within a third), and
    forgotten `memory` passes after the last of them. Between two sizes the cost is taken to be linear. Of numbers of
    rows not yet seen, the sizes cost in relation to plain passes what they did for the nearest that was.

    Args:
        window: passes kept of each kind.
        memory: passes for which a measurement is good; that of plain passes is kept until there is another.
    """

    def __init__(self, *, window: int = 9, memory: int = 400) -> None:
        self.window, self.memory = window, memory
        self._tables: dict[int, _Table] = {}
        self._passes = 0

    def record(self, rows: int, size: int, seconds: float, *, trees: bool) -> None:
        """A pass over `size` tokens of each of `rows` rows took `seconds`."""
        self._passes += 1
        table = self._tables.setdefault(_rows(rows), _Table())
        kind = (trees and size > 1, _size(size))
        known = table.measured.get(kind)
        if known is None or self._is_old(known):
            known = table.measured[kind] = _Measured(deque(maxlen=self.window), 0)
        known.last.append(seconds)
        known.at, known.seconds = self._passes, median(known.last)
        table.curves.clear()

    def plain(self, rows: int) -> float | None:
        """c(b, 1), or None if no such pass was seen."""
        table = self._tables.get(_rows(rows))
        known = None if table is None else table.measured.get((False, 1))
        return None if known is None else known.seconds

    def plain_age(self, rows: int) -> int:
        """Passes since the last one over a single token of each row.

        Raises:
            KeyError: no such pass was seen.
        """
        return self._passes - self._tables[_rows(rows)].measured[False, 1].at

    def bounds(self, rows: int, size: int, *, trees: bool) -> tuple[float, float]:
        """c(b, n) where it was measured, twice; else what it is at least and at most.

        Beyond the largest size n' measured it is at least c(b, n'), and grows no faster than up to there; if only plain
        passes are known, n tokens take no longer than n passes. Trees never measured grow no faster than chains.

        Raises:
            KeyError: no plain pass was seen.
        """
        size = _size(size)
        curve = self._curve(rows, trees=trees and size > 1)
        for (small, low), (large, high) in pairwise(curve):
            if size <= large:
                share = (size - small) / (large - small)
                between = low + share * (high - low)
                return between, between
        (_, plain), (largest, seconds) = curve[0], curve[-1]
        if size <= largest:
            return seconds, seconds
        if largest > 1:
            return seconds, max(seconds, plain + (seconds - plain) * (size - 1) / (largest - 1))
        return plain, self.bounds(rows, size, trees=False)[1] if trees else size * plain

    def _curve(self, rows: int, *, trees: bool) -> tuple[tuple[int, float], ...]:
        """Seconds of the sizes that are known, plain passes first."""
        number = _rows(rows)
        table = self._tables[number]
        if trees not in table.curves:
            plain = table.measured[False, 1].seconds
            # Of other numbers of rows the nearest last, so that it overrides those further away.
            elsewhere = sorted((other for other in self._tables if other != number), key=lambda n: -abs(n - number))
            known: dict[int, float] = {}
            for other in elsewhere:
                base = self._tables[other].measured.get((False, 1))
                if base is not None and base.seconds > 0:
                    scale = plain / base.seconds
                    known |= {size: s * scale for size, s in self._fresh(self._tables[other].measured, trees).items()}
            known |= self._fresh(table.measured, trees)
            table.curves[trees] = tuple(sorted({**known, 1: plain}.items()))
        return table.curves[trees]

    def _fresh(self, measured: Mapping[Kind, _Measured], trees: bool) -> dict[int, float]:
        return {size: m.seconds for (kind, size), m in measured.items() if kind == trees and not self._is_old(m)}

    def _is_old(self, known: _Measured) -> bool:
        return self._passes - known.at > self.memory


def _rows(rows: int) -> int:
    """Numbers of rows told apart: up to 8, each; above, steps of a fifth."""
    return round(4 * math.log2(rows))


def _size(size: int) -> int:
    """Sizes told apart: 1, 2, 3, 4, 6, 8, 12, ..., each for those up to it."""
    power = 1 << (size - 1).bit_length()
    return 3 * power // 4 if power >= 4 and size <= 3 * power // 4 else power

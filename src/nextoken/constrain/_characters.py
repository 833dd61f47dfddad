"""Characters: sets of code points as Python's `re` means them, and as the bytes of their UTF-8 forms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Ranges = tuple[tuple[int, int], ...]
"""Disjoint ranges of code points, both ends included, in order."""

LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_SIZES = (0x7F, 0x7FF, 0xFFFF, LAST)
"""The last code points that take 1, 2, 3 and 4 bytes."""


def merged(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """The same code points in disjoint ranges that do not touch."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return tuple(found)


def complement(ranges: Ranges) -> Ranges:
    """All other code points."""
    edges = [-1, *(edge for low, high in ranges for edge in (low - 1, high + 1)), LAST + 1]
    starts, ends = [edges[0] + 1, *edges[2::2]], [*edges[1:-1:2], edges[-1] - 1]
    return tuple((low, high) for low, high in zip(starts, ends, strict=True) if low <= high)


def spellable(ranges: Ranges) -> Ranges:
    """The same without surrogates, which have no UTF-8 form."""
    below, above = _SURROGATES[0] - 1, _SURROGATES[1] + 1
    parts = [part for low, high in ranges for part in ((low, min(high, below)), (max(low, above), high))]
    return tuple((low, high) for low, high in parts if low <= high)


@lru_cache(maxsize=256)
def matching(one: str, flags: int) -> Ranges:
    """The characters that `re` matches with the pattern `one` of a single character: `re` itself is asked for all."""
    found = re.compile(f"(?:{one})+", flags).finditer(_every_character())
    return tuple((_code_point(match.start()), _code_point(match.end() - 1)) for match in found)


@lru_cache(maxsize=1024)
def alike(character: str, flags: int) -> Ranges:
    """The characters that `re` takes for this one when it ignores case."""
    pattern = re.compile(re.escape(character), flags | re.IGNORECASE)
    return merged([(ord(c), ord(c)) for c in {*_cased(), character} if pattern.fullmatch(c)])


@lru_cache(maxsize=1)
def _every_character() -> str:
    code_points = np.arange(LAST + 1, dtype="<u4")
    outside = (code_points < _SURROGATES[0]) | (code_points > _SURROGATES[1])
    return code_points[outside].tobytes().decode("utf-32-le")


@lru_cache(maxsize=1)
def _cased() -> tuple[str, ...]:
    return tuple(c for c in _every_character() if c.lower() != c or c.upper() != c)


def _code_point(index: int) -> int:
    """Of the character at `index` of all characters."""
    return index if index < _SURROGATES[0] else index + 1 + _SURROGATES[1] - _SURROGATES[0]


class ByteTrees:
    """Sets of characters as trees over bytes, with equal subtrees stored once.

    A node is a tuple of (low, high, child): a byte in low..high leads to node `child`, or ends the character where that
    is `DONE`. Every way down a tree ends a character of the set.
    """

    DONE = 0

    def __init__(self) -> None:
        self.nodes: list[tuple[tuple[int, int, int], ...]] = [()]
        self._numbers: dict[tuple[tuple[int, int, int], ...], int] = {}

    def root(self, ranges: Ranges) -> int:
        """The node at which characters of these ranges begin, surrogates left out; a bare node if there are none."""
        return self._node([spelt for low, high in spellable(ranges) for spelt in _spelt(low, high)])

    def _node(self, spelt: Sequence[tuple[tuple[int, int], ...]]) -> int:
        # Ranges of first bytes are equal or disjoint: only single bytes have less than every continuation below them.
        rests: dict[tuple[int, int], list[tuple[tuple[int, int], ...]]] = {}
        for first, *rest in spelt:
            rests.setdefault(first, []).append(tuple(rest))
        edges = tuple(
            (low, high, self.DONE if rest == [()] else self._node(rest)) for (low, high), rest in sorted(rests.items())
        )
        number = self._numbers.get(edges)
        if number is None:
            number = self._numbers[edges] = len(self.nodes)
            self.nodes.append(edges)
        return number


def _spelt(low: int, high: int) -> list[tuple[tuple[int, int], ...]]:
    """The UTF-8 forms of the code points low..high, as sequences of byte ranges that are independent of each other."""
    found: list[tuple[tuple[int, int], ...]] = []
    before = -1
    for last in _SIZES:
        first, end = max(low, before + 1), min(high, last)
        if first <= end:
            found += _between(chr(first).encode(), chr(end).encode())
        before = last
    return found


def _between(low: bytes, high: bytes) -> list[tuple[tuple[int, int], ...]]:
    """Sequences of byte ranges for the forms from `low` to `high`, which are of one length."""
    if len(low) == 1:
        return [((low[0], high[0]),)]
    rest = len(low) - 1
    least, most = b"\x80" * rest, b"\xbf" * rest
    if low[0] == high[0]:
        return [((low[0], low[0]), *tail) for tail in _between(low[1:], high[1:])]
    found: list[tuple[tuple[int, int], ...]] = []
    first, last = low[0], high[0]
    if low[1:] != least:
        found += [((first, first), *tail) for tail in _between(low[1:], most)]
        first += 1
    if high[1:] != most:
        last -= 1
    if first <= last:
        found.append(((first, last), *[(0x80, 0xBF)] * rest))
    if high[1:] != most:
        found += [((last + 1, last + 1), *tail) for tail in _between(least, high[1:])]
    return found

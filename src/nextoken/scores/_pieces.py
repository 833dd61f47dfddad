"""Pieces: a file cut into parts that are coded by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

BREAKS = 100
"""How far back from the end of a piece a space is looked for, in bytes."""


def rounds(source: BinaryIO, size: int, *, streams: int) -> Iterator[list[bytes]]:
    """Up to `streams` pieces of up to `size` bytes at a time, ending before a space or at least between characters."""
    rest, ended = b"", False
    while not ended or rest:
        pieces: list[bytes] = []
        while len(pieces) < streams and (rest or not ended):
            if len(rest) < size and not ended:
                more = source.read(size - len(rest))
                ended, rest = not more, rest + more
                continue
            cut = _cut(rest, size)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        if pieces:
            yield pieces


def _cut(data: bytes, size: int) -> int:
    if len(data) < size:
        return len(data)
    space = max(data.rfind(mark, max(1, size - BREAKS), size) for mark in (b" ", b"\n"))
    if space > 0:
        return space
    # A character that the end would part has at most three bytes of continuation before it.
    for back in range(min(4, size - 1)):
        if data[size - back - 1] & 0xC0 != 0x80:
            return size - back - 1 if data[size - back - 1] >= 0xC0 else size - back
    return size

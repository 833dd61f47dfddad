"""Arithmetic coding of integers whose shares are integers, in a range of 64 bits."""

from __future__ import annotations

_TOP = 1 << 64
_LEAST = 1 << 56
"""The range is at least this before a symbol: shares of up to 32 bits lose at most 2^-24 of it."""


class Encoder:
    """Symbols in, bytes out. A symbol [start, start + size) of 2^bits costs -log2(size / 2^bits) bits."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._low, self._range = 0, _TOP

    def put(self, start: int, size: int, bits: int) -> None:
        """Code one symbol.

        Args:
            start, size: of its stretch, size at least 1.
            bits: at most 32.
        """
        part = self._range >> bits
        self._low += part * start
        self._range = part * size
        if self._low >= _TOP:
            self._carry()
        while self._range < _LEAST:
            self._out.append(self._low >> 56)
            self._low = (self._low << 8) & (_TOP - 1)
            self._range <<= 8

    def finish(self) -> bytes:
        """The code: the fewest bytes that, followed by zeros for ever, lie in the last range."""
        for size in range(9):
            unit = 1 << (64 - 8 * size)
            value = -(-self._low // unit) * unit
            if value < self._low + self._range:
                break
        self._low = value
        if self._low >= _TOP:
            self._carry()
        self._out += self._low.to_bytes(8, "big")[:size]
        return bytes(self._out).rstrip(b"\0")

    def _carry(self) -> None:
        self._low -= _TOP
        at = len(self._out) - 1
        while self._out[at] == 255:
            self._out[at] = 0
            at -= 1
        self._out[at] += 1


class Decoder:
    """Bytes in, symbols out: `peek` for where in 2^bits the code points, then `take` with the stretch found there."""

    def __init__(self, code: bytes) -> None:
        self._code = code
        self._at = 8
        # Beyond the end stand zeros, which the encoder left out.
        self._value = int.from_bytes(code[:8].ljust(8, b"\0"), "big")
        self._range = _TOP

    def peek(self, bits: int) -> int:
        """A number in [start, start + size) of the next symbol; some number below 2^bits if the code is damaged."""
        return min(self._value // (self._range >> bits), (1 << bits) - 1)

    def take(self, start: int, size: int, bits: int) -> None:
        """Go on after the symbol with this stretch."""
        part = self._range >> bits
        self._value = max(self._value - part * start, 0)
        self._range = part * size
        while self._range < _LEAST:
            byte = self._code[self._at] if self._at < len(self._code) else 0
            self._value = ((self._value << 8) | byte) & (_TOP - 1)
            self._at += 1
            self._range <<= 8

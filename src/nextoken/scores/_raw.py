"""Raw bytes among coded tokens: where they stand, how many, and what they are."""

from __future__ import annotations

from nextoken.errors import InputError
from nextoken.scores._arithmetic import Decoder, Encoder
from nextoken.scores._container import Part
from nextoken.scores._spelled import Spelled

_BITS = 16


class _Places:
    """Before each token one symbol says whether raw bytes stand there, while any are still to come.

    Its share is (k + 1/2) / (n + 1) after k of n places (Krichevsky and Trofimov): files without raw bytes pay nothing,
    and others about the entropy of the places.
    """

    def __init__(self, stretches: int, tokens: int) -> None:
        self.left, self.tokens = stretches, tokens
        self._seen = self._hits = 0

    def share(self) -> int:
        """Of raw bytes being next, out of 2^16."""
        exact = ((2 * self._hits + 1) << _BITS) // (2 * self._seen + 2)
        return min(max(exact, 1), (1 << _BITS) - 1)

    def count(self, is_raw: bool) -> None:
        self._seen += 1
        self._hits += is_raw
        self.left -= is_raw


class RawWriter:
    """Codes the raw stretches of a part."""

    def __init__(self, encoder: Encoder, spelled: Spelled) -> None:
        self._encoder, self._raw = encoder, spelled.raw
        self._places = _Places(len(spelled.raw), len(spelled.ids))

    def put(self, place: int) -> None:
        """What stands before the token of this number, or at the end."""
        places, data = self._places, self._raw.get(place)
        if not places.left:
            return
        if place < places.tokens:
            share = places.share()
            if data is None:
                self._encoder.put(share, (1 << _BITS) - share, _BITS)
            else:
                self._encoder.put(0, share, _BITS)
        places.count(data is not None)
        if data is not None:
            # Elias's gamma code: as many ones as the length has bits after its first, a zero, these bits.
            extra = len(data).bit_length() - 1
            for bit in (*[1] * extra, 0, *(len(data) >> i & 1 for i in reversed(range(extra)))):
                self._encoder.put(bit, 1, 1)
            for byte in data:
                self._encoder.put(byte, 1, 8)


class RawReader:
    """Decodes what a `RawWriter` coded."""

    def __init__(self, decoder: Decoder, part: Part) -> None:
        self._decoder, self._limit = decoder, part.length
        self._places = _Places(part.raws, part.tokens)

    def take(self, place: int) -> dict[int, bytes]:
        """{place: bytes} if raw bytes stand there, else {}."""
        places, decoder = self._places, self._decoder
        if not places.left:
            return {}
        is_raw = True
        if place < places.tokens:
            share = places.share()
            is_raw = decoder.peek(_BITS) < share
            decoder.take(*((0, share) if is_raw else (share, (1 << _BITS) - share)), _BITS)
        places.count(is_raw)
        if not is_raw:
            return {}
        extra = 0
        while self._symbol(1):
            extra += 1
            if 1 << extra > self._limit:
                raise InputError("a stretch of raw bytes is longer than its part")
        size = 1
        for _ in range(extra):
            size = size << 1 | self._symbol(1)
        return {place: bytes(self._symbol(8) for _ in range(size))}

    def _symbol(self, bits: int) -> int:
        found = self._decoder.peek(bits)
        self._decoder.take(found, 1, bits)
        return found

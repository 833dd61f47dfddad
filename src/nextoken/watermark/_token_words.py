"""TokenWords: a random word of 64 bits for every context and token, under a key."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nextoken.decode.transform import Context
from nextoken.watermark.key import Key

Words = NDArray[np.uint64]

_KEPT = 32
"""Contexts whose words are kept: 8 MiB at 32,768 tokens."""
_BLOCK = 4
"""Numbers that Philox makes at a time."""


class TokenWords:
    """r(context, v), v = 0, 1, 2, ...: independent and uniform on 0 .. 2^64 - 1 to whoever does not hold the key.

    r(context, .) is the stream of Philox seeded by HMAC-SHA-256(key, purpose, context), so that the word of a token
    does not depend on the size of the vocabulary, and one is found without those before it.

    Args:
        key: the secret.
        purpose: different purposes give independent words.
    """

    def __init__(self, key: Key, purpose: str) -> None:
        self._key, self._purpose = key, purpose
        self._row = lru_cache(maxsize=_KEPT)(self._made)

    def row(self, context: tuple[int, ...], size: int) -> Words:
        """The words of tokens 0 .. size - 1 [size]; not to be written to."""
        return self._row(context, size)

    def at(self, context: tuple[int, ...], tokens: Sequence[int]) -> Words:
        """The words of some tokens [len(tokens)], each at the same cost however high its number."""
        return np.array([self._one(context, token) for token in tokens], dtype=np.uint64)

    def _made(self, context: tuple[int, ...], size: int) -> Words:
        words: Words = self._stream(context).random_raw(size)
        words.setflags(write=False)
        return words

    def _one(self, context: tuple[int, ...], token: int) -> int:
        stream = self._stream(context)
        stream.advance(token // _BLOCK)
        return int(stream.random_raw(_BLOCK)[token % _BLOCK])

    def _stream(self, context: tuple[int, ...]) -> np.random.Philox:
        return np.random.Philox(key=self._key.seed(self._purpose, *context))


def recent(context: Context, row: int, width: int) -> tuple[int, ...] | None:
    """The last `width` tokens of prompt and output of a row; None where there are fewer."""
    output = context.outputs[row]
    tail = tuple(output[max(0, len(output) - width) :])
    if len(tail) < width:
        prompt, missing = context.prompts[row], width - len(tail)
        tail = (*prompt[max(0, len(prompt) - missing) :], *tail)
    return tail if len(tail) == width else None

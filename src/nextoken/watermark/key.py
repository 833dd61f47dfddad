"""Key: a secret that makes numbers look random to whoever does not hold it."""

from __future__ import annotations

import hashlib
import hmac
import secrets

import numpy as np
from numpy.typing import NDArray

SHORTEST = 16
"""Bytes: 128 bits, beyond guessing."""


class Key:
    """A secret of at least 16 bytes; it never shows in `repr`, messages or what is saved.

    Random numbers are a function of the key and of labels: HMAC-SHA-256(key, labels) seeds a counter generator
    (Philox). `uniform` takes that generator's raw output, which is the same on every machine and device and with every
    version of numpy, so that a mark made today is found in years; what `generator` makes of it numpy may change.

    Args:
        secret: bytes, or a text of as many bytes in UTF-8. `Key.new()` draws one.

    Raises:
        TypeError: the secret is neither bytes nor a text.
        ValueError: fewer than 16 bytes.
    """

    def __init__(self, secret: bytes | str) -> None:
        if not isinstance(secret, bytes | bytearray | str):
            # bytes(20) would be twenty zeros: a number must not become a key that everybody knows.
            raise TypeError(f"a key is made of bytes or a text, not of {type(secret).__name__}; Key.new() draws one")
        data = secret.encode() if isinstance(secret, str) else bytes(secret)
        if len(data) < SHORTEST:
            raise ValueError(
                f"a key of {len(data)} bytes can be guessed: give at least {SHORTEST} random ones, or draw a key with "
                "Key.new()"
            )
        self._secret = data

    @classmethod
    def new(cls) -> Key:
        """A key drawn from the system's randomness; `reveal` gives its bytes, to be kept."""
        return cls(secrets.token_bytes(32))

    def reveal(self) -> bytes:
        """The secret itself."""
        return self._secret

    def seed(self, *labels: int | str | bytes) -> int:
        """A number of 128 bits made of the key and the labels."""
        return int.from_bytes(self._digest(labels)[:16], "big")

    def generator(self, *labels: int | str | bytes) -> np.random.Generator:
        """Random numbers that belong to these labels."""
        return np.random.Generator(np.random.Philox(key=self.seed(*labels)))

    def uniform(self, *labels: int | str | bytes, size: int | tuple[int, ...]) -> NDArray[np.float64]:
        """Numbers in the open interval (0, 1), as many as `size` says; more of them begin with the same."""
        # Multiples of 2^-52 shifted by half a step: neither 0 nor 1 can come, whose logarithms would be infinite.
        steps = np.asarray(np.random.Philox(key=self.seed(*labels)).random_raw(size)) >> np.uint64(12)
        return np.asarray(steps * 2.0**-52 + 2.0**-53, dtype=np.float64)

    def derive(self, *labels: int | str | bytes) -> Key:
        """A key of its own for one purpose."""
        return Key(self._digest(("derived", *labels)))

    def _digest(self, labels: tuple[int | str | bytes, ...]) -> bytes:
        # Type and length go before each label, so that no two lists of labels spell the same message.
        message = b"".join(_framed(label) for label in labels)
        return hmac.new(self._secret, message, hashlib.sha256).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self._digest(("hash",)))

    def __repr__(self) -> str:
        return "Key(...)"

    def __deepcopy__(self, memo: dict[int, object]) -> Key:
        return self

    def __reduce__(self) -> str:
        raise TypeError("a Key is not pickled, for secrets do not belong into files: keep key.reveal() in a safe place")


def _framed(label: int | str | bytes) -> bytes:
    if isinstance(label, int):
        kind, data = b"i", label.to_bytes((label.bit_length() + 8) // 8, "big", signed=True)
    elif isinstance(label, str):
        kind, data = b"s", label.encode()
    else:
        kind, data = b"b", label
    return kind + len(data).to_bytes(8, "big") + data

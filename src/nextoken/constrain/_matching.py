"""Matching: llguidance's parser read byte by byte, and asked for the masks of any vocabulary."""

from __future__ import annotations

import importlib
from bisect import bisect_left
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from nextoken.errors import NextokenError
from nextoken.model.vocab import Vocab


def llguidance() -> Any:
    """The package, which is optional.

    Raises:
        NextokenError: it is not installed.
    """
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise NextokenError(
            "JSON schemas and grammars need the package llguidance: pip install 'nextoken[grammar]'"
        ) from error


class Alphabet:
    """What a matcher reads: the tokens of a vocabulary (none: bytes alone), then the 256 bytes, then an end.

    With the bytes behind the tokens, a matcher takes a text byte by byte and still tells which tokens fit.
    """

    def __init__(self, vocab: Vocab | None = None) -> None:
        spelt = () if vocab is None else vocab.token_bytes
        ends = frozenset[int]() if vocab is None else vocab.eos_ids
        self.size = len(spelt)
        self.eos_token_id = self.size + 256
        self.bos_token_id = None
        # llguidance marks what stands for no bytes by 0xff, which begins no UTF-8.
        self.special_token_ids = [i for i, spelled in enumerate(spelt) if not spelled or i in ends]
        named = {i: b"\xff<special %d>" % i for i in self.special_token_ids}
        self.tokens = [
            *(named.get(i, spelled) for i, spelled in enumerate(spelt)),
            *(bytes([byte]) for byte in range(256)),
            b"\xff<end>",
        ]
        self.special_token_ids.append(self.eos_token_id)
        self._spelled = np.array([i not in named for i in range(self.size)], dtype=np.bool_)
        self._ordered = sorted((spelled, i) for i, spelled in enumerate(spelt) if i not in named)
        package = llguidance()
        self.tokenizer = package.LLTokenizer(package.TokenizerWrapper(self))

    def __call__(self, text: bytes | str) -> list[int]:
        """Byte by byte."""
        return [self.size + byte for byte in (text.encode() if isinstance(text, str) else text)]

    def mask(self, matcher: Any) -> Tensor:
        """The tokens that a matcher of this alphabet can go on with [V], bool."""
        forced = matcher.compute_ff_bytes()
        bits = np.zeros(self.size, dtype=np.bool_)
        if forced:
            # Where bytes are forced llguidance allows only their tokenisation, and not every token that spells them.
            bits[[token for token in self._beside(forced) if matcher.validate_tokens([token]) == 1]] = True
        else:
            packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            bits = np.unpackbits(packed, count=self.size, bitorder="little").astype(np.bool_) & self._spelled
        return torch.from_numpy(bits)

    def _beside(self, forced: bytes) -> list[int]:
        """Tokens of which `forced` is a beginning, or which are a beginning of `forced`."""
        found = []
        for size in range(1, len(forced) + 1):
            at = bisect_left(self._ordered, (forced[:size], 0))
            goes_on = forced if size == len(forced) else None
            while at < len(self._ordered) and (
                self._ordered[at][0] == forced[:size] or (goes_on and self._ordered[at][0].startswith(goes_on))
            ):
                found.append(self._ordered[at][1])
                at += 1
        return found


_ALPHABETS: WeakKeyDictionary[Vocab, Alphabet] = WeakKeyDictionary()


def alphabet(vocab: Vocab) -> Alphabet:
    """The alphabet of a vocabulary, made once and kept as long as the vocabulary is."""
    found = _ALPHABETS.get(vocab)
    if found is None:
        found = _ALPHABETS[vocab] = Alphabet(vocab)
    return found

"""Constraint: a set of texts, decided by their beginnings, byte by byte.

    here = Regex(r"[0-9]{4}").start()     # nothing read yet
    here = here.advance(b"19")            # still viable: a Place
    here.advance(b"x")                    # None: no text of the set begins so
    here.is_complete                      # False: "19" itself is not of the set
    Regex(a) & Regex(b)                   # texts of both sets

Bytes, not tokens, are what a constraint speaks of: the same one holds for every tokenizer, and a token is one step of
several bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nextoken.model.vocab import Vocab


class Place(ABC):
    """How far a text has been read under a constraint. Places are values: `advance` leaves the old one as it was."""

    @abstractmethod
    def advance(self, data: bytes) -> Place | None:
        """The place after `data`, or None if no text of the set begins so.

        None must be right; a place that turns out to lead nowhere is allowed, and costs wasted work only.
        """

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether what was read so far is a text of the set."""

    def allowed(self, vocab: Vocab) -> Tensor:
        """Which tokens keep the text viable [V], bool: spelled tokens by their bytes, end tokens where it is complete.

        Other specials stand for no bytes and are never allowed. One `advance` per token; automata override it.
        """
        return self.narrow(torch.ones(vocab.size, dtype=torch.bool), vocab)

    def narrow(self, mask: Tensor, vocab: Vocab) -> Tensor:
        """`mask & allowed(vocab)`, [V] bool, asking only about the tokens of `mask`."""
        wanted = mask.nonzero()[:, 0].tolist()
        narrowed = torch.zeros_like(mask)
        narrowed[[token for token in wanted if self.allows(token, vocab)]] = True
        return narrowed

    def allows(self, token: int, vocab: Vocab) -> bool:
        """`allowed(vocab)[token]`, alone."""
        if token in vocab.eos_ids:
            return self.is_complete
        spelled = vocab.token_bytes[token]
        return bool(spelled) and self.advance(spelled) is not None


class Constraint(ABC):
    """A set of byte strings; `a & b` is their intersection."""

    @abstractmethod
    def start(self) -> Place:
        """The place before anything is read."""

    def viable(self, prefix: bytes | str) -> bool:
        """Whether a text of the set may begin so; False is certain."""
        return self.start().advance(_bytes(prefix)) is not None

    def complete(self, text: bytes | str) -> bool:
        """Whether the text is of the set."""
        place = self.start().advance(_bytes(text))
        return place is not None and place.is_complete

    def __and__(self, other: Constraint) -> Constraint:
        return Both(self, other)


class Both(Constraint):
    """The texts that two constraints share.

    A beginning is viable if it is so for each; that no single text is in both sets shows only when the way ends. The
    second is asked only about tokens that the first allows: put the one that is quicker to ask first.
    """

    def __init__(self, first: Constraint, second: Constraint) -> None:
        self.first, self.second = first, second

    def __repr__(self) -> str:
        return f"{self.first!r} & {self.second!r}"

    def start(self) -> Place:
        return _BothPlace(self.first.start(), self.second.start())


class _BothPlace(Place):
    def __init__(self, first: Place, second: Place) -> None:
        self.first, self.second = first, second

    def advance(self, data: bytes) -> Place | None:
        first = self.first.advance(data)
        second = None if first is None else self.second.advance(data)
        return None if first is None or second is None else _BothPlace(first, second)

    @property
    def is_complete(self) -> bool:
        return self.first.is_complete and self.second.is_complete

    def allowed(self, vocab: Vocab) -> Tensor:
        return self.second.narrow(self.first.allowed(vocab), vocab)

    def narrow(self, mask: Tensor, vocab: Vocab) -> Tensor:
        return self.second.narrow(self.first.narrow(mask, vocab), vocab)

    def allows(self, token: int, vocab: Vocab) -> bool:
        return self.first.allows(token, vocab) and self.second.allows(token, vocab)


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text

"""Regex and Choice: texts that match a regular expression of Python's `re`, or are one of a few."""

from __future__ import annotations

import re
from collections.abc import Iterable
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nextoken.constrain._automaton import Automaton, Items
from nextoken.constrain._spelling import spelling
from nextoken.constrain._syntax import Graph
from nextoken.constrain.constraint import Constraint, Place
from nextoken.methods import method
from nextoken.model.vocab import Vocab

_MASK_ROOM = 1 << 26
"""Bytes of masks kept per vocabulary."""


@method(name="Regex constraint", access="gray", summary="texts that match a regular expression, byte by byte")
class Regex(Constraint):
    """{s : re.fullmatch(pattern, s)}, in UTF-8, with exact beginnings: one is viable if and only if it can be finished.

    The pattern is parsed by Python's own parser and means what it means to `re`: `\\d`, `\\w`, `\\s` and
    `(?i)` go by Unicode unless `(?a)` is set, `.` leaves out the newline unless `(?s)` is set, anchors may stand
    anywhere, and laziness makes no difference. What is recognised is a regular language: lookaround, backreferences,
    word boundaries, conditional and atomic groups and possessive quantifiers are refused.

    The automaton over bytes is made deterministic as texts need it, without states that lead nowhere, and the mask of a
    vocabulary is kept per state: the first time it takes one walk over the tree of the tokens' bytes.

    Args:
        pattern: a text; flags are set inside, as in `(?is)...`.

    Raises:
        ValueError: the pattern is malformed, too large, matches nothing, or has a part that is refused.
    """

    def __init__(self, pattern: str) -> None:
        if not isinstance(pattern, str):
            raise ValueError(f"a regular expression is a text (str), got {type(pattern).__name__}")
        self.pattern = pattern
        self._automaton = Automaton(Graph(pattern))
        self._masks: WeakKeyDictionary[Vocab, dict[int, Tensor]] = WeakKeyDictionary()
        self._forgotten = 0
        # Places of several threads share the automaton, whose numbers must not change during a walk.
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"Regex({self.pattern!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Regex) and other.pattern == self.pattern

    def __hash__(self) -> int:
        return hash(self.pattern)

    def start(self) -> Place:
        return _RegexPlace(self, self._automaton.start)

    def _advanced(self, items: Items, data: bytes) -> Items | None:
        automaton = self._automaton
        with self._lock:
            automaton.forget()
            number = automaton.number(items)
            for byte_class in automaton.classed(data):
                number = automaton.move(number, byte_class)
                if number == Automaton.DEAD:
                    return None
            return automaton.items[number]

    def _allowed(self, items: Items, vocab: Vocab) -> Tensor:
        automaton = self._automaton
        with self._lock:
            automaton.forget()
            if self._forgotten != automaton.forgotten:
                self._masks.clear()
                self._forgotten = automaton.forgotten
            masks = self._masks.setdefault(vocab, {})
            number = automaton.number(items)
            mask = masks.get(number)
            if mask is None:
                if len(masks) * vocab.size >= _MASK_ROOM:
                    masks.clear()
                mask = torch.from_numpy(spelling(vocab).mask(automaton, number))
                mask[sorted(vocab.eos_ids)] = automaton.accepts(items)
                masks[number] = mask
            return mask.clone()


class _RegexPlace(Place):
    def __init__(self, regex: Regex, items: Items) -> None:
        self._regex, self._items = regex, items

    def advance(self, data: bytes) -> Place | None:
        items = self._regex._advanced(self._items, data)
        return None if items is None else _RegexPlace(self._regex, items)

    @property
    def is_complete(self) -> bool:
        return self._regex._automaton.accepts(self._items)

    def allowed(self, vocab: Vocab) -> Tensor:
        return self._regex._allowed(self._items, vocab)

    def narrow(self, mask: Tensor, vocab: Vocab) -> Tensor:
        return mask & self.allowed(vocab)


class Choice(Regex):
    """{s : s is one of the texts}.

    Args:
        texts: at least one.

    Raises:
        ValueError: there is none, or one is no text.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        if not self.texts or not all(isinstance(text, str) for text in self.texts):
            raise ValueError(f"Choice takes texts, at least one; got {self.texts!r}")
        super().__init__("|".join(map(re.escape, self.texts)))

    def __repr__(self) -> str:
        return f"Choice({list(self.texts)!r})"

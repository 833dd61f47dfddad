"""Predicate: texts of which a Python function says so."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from nextoken.constrain.constraint import Constraint, Place
from nextoken.methods import method


@method(name="Predicate constraint", access="gray", summary="texts of which any Python function says so")
class Predicate(Constraint):
    """{s : complete(s)}, whose beginnings are those of which `viable` says so.

    Both are given text. A last character of which only some bytes were read is held back: they are viable if some
    character begins with them, and no text is complete within a character. Bytes that are no UTF-8 are never viable.

    Masks ask `viable` about every token of the vocabulary: put constraints that are quicker to ask before it, as in
    `Regex(...) & Predicate(...)`, or sample by rejection.

    Args:
        complete: whether a text is of the set.
        viable: whether a text of the set may begin so. It must not say no of a beginning that can be finished; that it
            says yes too often costs wasted work and dead ends only, and without it every beginning may be finished.

    An exception of either goes through, with a note of the text that was asked about.
    """

    def __init__(self, complete: Callable[[str], object], *, viable: Callable[[str], object] | None = None) -> None:
        for name, function in (("complete", complete), ("viable", viable)):
            if not callable(function) and not (name == "viable" and function is None):
                raise ValueError(f"`{name}` of a predicate is a function of a text, got {function!r}")
        self._functions = {"complete": complete, "viable": viable or _always}

    def __repr__(self) -> str:
        complete, viable = (getattr(f, "__qualname__", repr(f)) for f in self._functions.values())
        return f"Predicate({complete})" if viable == _always.__qualname__ else f"Predicate({complete}, viable={viable})"

    def start(self) -> Place:
        return _PredicatePlace(self, "", b"")

    def _asked(self, name: str, text: str) -> bool:
        try:
            return bool(self._functions[name](text))
        except Exception as error:
            error.add_note(f"raised by the function `{name}` of the constraint {self!r}, asked about {text!r}")
            raise


class _PredicatePlace(Place):
    def __init__(self, predicate: Predicate, text: str, held: bytes) -> None:
        self._predicate, self._text, self._held = predicate, text, held
        self._is_complete: bool | None = None if not held else False

    def advance(self, data: bytes) -> Place | None:
        reader = codecs.getincrementaldecoder("utf-8")()
        try:
            more = reader.decode(self._held + data)
        except UnicodeDecodeError:
            return None
        held, text = reader.getstate()[0], self._text + more
        if held[:1] == b"\xed" and held[1:] >= b"\xa0":  # surrogates, which the decoder refuses a byte later
            return None
        if more and not self._predicate._asked("viable", text):
            return None
        return _PredicatePlace(self._predicate, text, held)

    @property
    def is_complete(self) -> bool:
        if self._is_complete is None:
            self._is_complete = self._predicate._asked("complete", self._text)
        return self._is_complete


def _always(text: str) -> bool:
    return True

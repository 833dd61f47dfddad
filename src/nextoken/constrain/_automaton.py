"""Automaton: a graph of a pattern, made deterministic over UTF-8 bytes as texts come, without dead ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nextoken.constrain._characters import ByteTrees
from nextoken.constrain._syntax import Accept, Anchor, Branch, Character, Condition, Graph

NEWLINE = 10


class Before:
    """What stands just before a place, as far as `^` wants to know."""

    OTHER: Final = 0
    NEWLINE: Final = 1
    NOTHING: Final = 2


class Ahead:
    """What may still come, each less than the next: an anchor `$` passed at a place binds what follows it."""

    END: Final = 0
    LAST_NEWLINE: Final = 1
    """The end, or a newline and then the end."""
    LINE_END: Final = 2
    """The end, or a newline and then anything."""
    ANYTHING: Final = 3


_BINDS = {
    Anchor.TEXT_END: Ahead.END,
    Anchor.LAST_LINE_END: Ahead.LAST_NEWLINE,
    Anchor.LINE_END: Ahead.LINE_END,
}
_HOLDS_AFTER = {Anchor.TEXT_START: {Before.NOTHING}, Anchor.LINE_START: {Before.NOTHING, Before.NEWLINE}}

Stand: TypeAlias = tuple[int, int, int]
"""A state of the graph between two characters, with what came `Before` and what may lie `Ahead`."""
Item: TypeAlias = tuple[int, int, int]
"""A state of the graph, the node of its character reached so far, and what may lie `Ahead`."""
Items: TypeAlias = frozenset[Item]
"""A state of the automaton: every item that the bytes read so far may have led to. Empty ones do not exist."""


class Automaton:
    """Sets of items, and how each byte leads from one to the next.

    Only stands from which the end can be reached are ever entered, so there is no state without a completion. States
    are numbered as they are met: `table[number, byte class]` is the next number, or DEAD, or UNKNOWN. Call `forget`
    between walks, never within one: it gives all numbers back when they have become many.

    Raises:
        ValueError: the graph leads to its end by no text.
    """

    DEAD, UNKNOWN = -1, -2
    MOST_ITEMS = 500_000
    """Of all states together, a state of the table counting for a sixteenth of one per class."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._uses_lines = any(isinstance(s, Condition) and s.anchor is Anchor.LINE_START for s in graph.states)
        self._living = self._stands_that_end((graph.start, Before.NOTHING, Ahead.ANYTHING))
        self.classes, self._examples = byte_classes(graph.trees)
        self._translation = self.classes.tobytes()
        self.start: Items = frozenset(self._entered((graph.start, Before.NOTHING, Ahead.ANYTHING)))
        if not self.start:
            raise ValueError(f"the regular expression {graph.pattern!r} matches no text at all")
        # Kept per item, since many states share items.
        self._step = lru_cache(maxsize=1 << 16)(self._stepped)
        self.forgotten = 0
        """How often all numbers were given back."""
        self._clear()

    def _clear(self) -> None:
        self._numbers: dict[Items, int] = {}
        self.items: list[Items] = []
        self._held = 0
        self.table: NDArray[np.int32] = np.full((64, len(self._examples)), self.UNKNOWN, dtype=np.int32)

    def forget(self) -> None:
        """Give back all numbers if the states take too much room."""
        if self._held + self.table.size // 16 > self.MOST_ITEMS:
            self._clear()
            self.forgotten += 1

    def number(self, items: Items) -> int:
        """The number of a state, a new one if it has none."""
        number = self._numbers.get(items)
        if number is None:
            number = self._numbers[items] = len(self.items)
            self.items.append(items)
            self._held += len(items)
            if number == len(self.table):
                self.table = np.concatenate([self.table, np.full_like(self.table, self.UNKNOWN)])
        return number

    def classed(self, data: bytes) -> bytes:
        """The class of each byte."""
        return data.translate(self._translation)

    def move(self, number: int, byte_class: int) -> int:
        """The state after a byte of this class, or DEAD."""
        following = int(self.table[number, byte_class])
        if following == self.UNKNOWN:
            byte = self._examples[byte_class]
            items = frozenset(after for item in self.items[number] for after in self._step(item, byte))
            following = self.number(items) if items else self.DEAD
            self.table[number, byte_class] = following
        return following

    def moves(self, numbers: NDArray[np.int32], byte_classes: NDArray[np.uint8]) -> NDArray[np.int32]:
        """`move` of each number by its byte class [N]."""
        following = self.table[numbers, byte_classes]
        unknown = following == self.UNKNOWN
        if unknown.any():
            asked = {*zip(numbers[unknown].tolist(), byte_classes[unknown].tolist(), strict=True)}
            for number, byte_class in asked:
                self.move(number, byte_class)
            following = self.table[numbers, byte_classes]
        return following

    def accepts(self, items: Items) -> bool:
        """Whether the text may end here."""
        return (0, ByteTrees.DONE, Ahead.END) in items

    def _stepped(self, item: Item, byte: int) -> tuple[Item, ...]:
        """The items after one byte."""
        state, node, ahead = item
        at = self._graph.states[state]
        if not isinstance(at, Character) or (ahead < Ahead.ANYTHING and byte != NEWLINE):
            return ()
        child = next((child for low, high, child in self._graph.trees.nodes[node] if low <= byte <= high), None)
        if child is None:
            return ()
        if child == ByteTrees.DONE:
            return tuple(self._entered(self._after(at, ahead, newline=byte == NEWLINE)))
        # Within a character of several bytes, which is no newline.
        return ((state, child, ahead),) if self._after(at, ahead, newline=False) in self._living else ()

    def _after(self, at: Character, ahead: int, *, newline: bool) -> Stand:
        before = Before.NEWLINE if newline and self._uses_lines else Before.OTHER
        return at.then, before, Ahead.END if ahead == Ahead.LAST_NEWLINE else Ahead.ANYTHING

    def _entered(self, stand: Stand) -> Iterator[Item]:
        """The items that a stand amounts to: the characters, or the end, that its branches lead to."""
        waiting, seen = [stand], {stand}
        while waiting:
            here = waiting.pop()
            if here not in self._living:
                continue
            state, _, ahead = here
            at = self._graph.states[state]
            if isinstance(at, Character):
                yield state, at.node, ahead
            elif isinstance(at, Accept):
                yield state, ByteTrees.DONE, Ahead.END
            else:
                fresh = [following for following in self._passed(here) if following not in seen]
                waiting += fresh
                seen.update(fresh)

    def _passed(self, stand: Stand) -> list[Stand]:
        """The stands to which a branch or an anchor leads without a character."""
        state, before, ahead = stand
        at = self._graph.states[state]
        if isinstance(at, Branch):
            return [(then, before, ahead) for then in at.thens]
        assert isinstance(at, Condition)
        if at.anchor in _BINDS:
            return [(at.then, before, min(ahead, _BINDS[at.anchor]))]
        return [(at.then, before, ahead)] if before in _HOLDS_AFTER[at.anchor] else []

    def _followed(self, stand: Stand) -> list[Stand]:
        """All stands to which one leads, by a character or without."""
        state, _, ahead = stand
        at = self._graph.states[state]
        if isinstance(at, Accept):
            return []
        if not isinstance(at, Character):
            return self._passed(stand)
        after = [self._after(at, ahead, newline=True)] if at.newline and ahead > Ahead.END else []
        return after + ([self._after(at, ahead, newline=False)] if at.others and ahead == Ahead.ANYTHING else [])

    def _stands_that_end(self, start: Stand) -> set[Stand]:
        """The stands reached from `start` from which the end of the pattern can be reached."""
        leads_from: dict[Stand, list[Stand]] = {start: []}
        waiting = [start]
        while waiting:
            here = waiting.pop()
            for following in self._followed(here):
                if following not in leads_from:
                    leads_from[following] = []
                    waiting.append(following)
                leads_from[following].append(here)
        living = {stand for stand in leads_from if isinstance(self._graph.states[stand[0]], Accept)}
        waiting = list(living)
        while waiting:
            fresh = [stand for stand in leads_from[waiting.pop()] if stand not in living]
            living.update(fresh)
            waiting += fresh
        return living


def byte_classes(trees: ByteTrees) -> tuple[NDArray[np.uint8], Sequence[int]]:
    """Bytes that no tree tells apart: the class of each byte [256], and one byte of each class."""
    edges = {0, NEWLINE, NEWLINE + 1}
    for node in trees.nodes:
        for low, high, _ in node:
            edges |= {low, high + 1}
    starts = np.zeros(257, dtype=np.int64)
    starts[list(edges)] = 1
    # A byte counts where its class begins; there are at most 256 classes.
    return (starts[:256].cumsum() - 1).astype(np.uint8), sorted(edges - {256})

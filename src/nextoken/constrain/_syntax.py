"""Syntax: a pattern of Python's `re`, parsed by Python's own parser, as a graph of characters, branches and anchors."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nextoken.constrain._characters import LAST, ByteTrees, Ranges, alike, complement, matching, merged, spellable

_PARSER: Any = importlib.import_module("re._parser")  # without stubs; it is what `re` itself compiles from

MOST_STATES = 50_000
"""The largest graph: a pattern's characters, with those that repetitions copy."""

_CLASSES = re.ASCII | re.LOCALE | re.UNICODE  # of these one holds: a group that sets one takes back the others


class Anchor(Enum):
    """A condition on where in the text a place is."""

    TEXT_START = "at the beginning"
    LINE_START = "at the beginning or after a newline"
    TEXT_END = "at the end"
    LAST_LINE_END = "at the end or before a newline that ends the text"
    LINE_END = "at the end or before a newline"


@dataclass(frozen=True)
class Character:
    """One character of a set, a node of `Graph.trees`; then state `then`."""

    node: int
    then: int
    newline: bool
    """Whether the newline is of the set."""
    others: bool
    """Whether anything else is."""


@dataclass(frozen=True)
class Condition:
    """An anchor, which must hold; then state `then`."""

    anchor: Anchor
    then: int


@dataclass
class Branch:
    """Any of these states."""

    thens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Accept:
    """The end of the pattern."""


State = Character | Condition | Branch | Accept


class Graph:
    """What a pattern matches as a graph: a text is in the set if it leads from `start` to the one `Accept`, state 0.

    Raises:
        ValueError: the pattern is malformed, too large, or has a part that no automaton can follow.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.states: list[State] = [Accept()]
        self.trees = ByteTrees()
        self._kinds: dict[Ranges, tuple[int, bool, bool]] = {}
        try:
            parsed = _PARSER.parse(pattern)
            self.start = self._sequence(parsed, parsed.state.flags, 0)
        except re.error as error:
            raise ValueError(f"the regular expression {_shown(pattern)} is malformed: {error}") from None
        except OverflowError as error:
            raise ValueError(f"the regular expression {_shown(pattern)} cannot be read: {error}") from None
        except RecursionError:
            raise ValueError(f"the regular expression {_shown(pattern)} is nested too deeply") from None

    def _sequence(self, items: Any, flags: int, then: int) -> int:
        """The state from which `items` lead to `then`: built from the end, so that each state knows what follows."""
        for operator, argument in reversed(list(items)):
            then = self._one(str(operator), argument, flags, then)
        return then

    def _one(self, operator: str, argument: Any, flags: int, then: int) -> int:
        match operator:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                return self._character(_characters(operator, argument, flags), then)
            case "BRANCH":
                return self._add(Branch([self._sequence(option, flags, then) for option in argument[1]]))
            case "SUBPATTERN":
                _, added, removed, inside = argument
                kept = flags & ~_CLASSES if added & _CLASSES else flags
                return self._sequence(inside, (kept | added) & ~removed, then)
            case "MAX_REPEAT" | "MIN_REPEAT":
                return self._repeat(argument, flags, then)
            case "AT" if str(argument) in _ANCHORS:
                plain, multiline = _ANCHORS[str(argument)]
                return self._add(Condition(multiline if flags & re.MULTILINE else plain, then))
        name = str(argument) if operator == "AT" else operator
        raise ValueError(_refusal(name, argument, self.pattern))

    def _repeat(self, argument: Any, flags: int, then: int) -> int:
        least, most, inside = argument
        if most == _PARSER.MAXREPEAT:
            loop = Branch()
            after = self._add(loop)
            loop.thens += [self._sequence(inside, flags, after), then]
            copies = 0
        else:
            after, copies = then, most - least
        for _ in range(copies):
            before = len(self.states)
            after = self._add(Branch([self._sequence(inside, flags, after), then]))
            if len(self.states) == before + 1:  # nothing in it: more of it changes nothing
                break
        for _ in range(least):
            before = len(self.states)
            after = self._sequence(inside, flags, after)
            if len(self.states) == before:
                break
        return after

    def _character(self, ranges: Ranges, then: int) -> int:
        if ranges not in self._kinds:
            newline = any(low <= 10 <= high for low, high in ranges)
            size = sum(high - low + 1 for low, high in spellable(ranges))
            self._kinds[ranges] = self.trees.root(ranges), newline, size > newline
        node, newline, others = self._kinds[ranges]
        return self._add(Character(node, then, newline, others))

    def _add(self, state: State) -> int:
        if len(self.states) >= MOST_STATES:
            raise ValueError(
                f"the regular expression {_shown(self.pattern)} is too large: its automaton needs more than "
                f"{MOST_STATES} states; lower its repetition counts"
            )
        self.states.append(state)
        return len(self.states) - 1


_ANCHORS = {
    "AT_BEGINNING": (Anchor.TEXT_START, Anchor.LINE_START),
    "AT_BEGINNING_STRING": (Anchor.TEXT_START, Anchor.TEXT_START),
    "AT_END": (Anchor.LAST_LINE_END, Anchor.LINE_END),
    "AT_END_STRING": (Anchor.TEXT_END, Anchor.TEXT_END),
}


def _characters(operator: str, argument: Any, flags: int) -> Ranges:
    if operator == "ANY":
        return ((0, LAST),) if flags & re.DOTALL else complement(((10, 10),))
    if operator == "IN":
        return _set(argument, flags)
    ranges = alike(chr(argument), flags & _CLASSES) if flags & re.IGNORECASE else ((argument, argument),)
    return ranges if operator == "LITERAL" else complement(ranges)


def _set(items: Sequence[tuple[Any, Any]], flags: int) -> Ranges:
    """Of `[...]`: computed where it is plain ranges, else asked of `re`."""
    names = [str(kind) for kind, _ in items]
    if "CATEGORY" in names or flags & re.IGNORECASE:
        inside = "".join(_written(str(kind), value) for kind, value in items)
        return matching(f"[{inside}]", flags & (_CLASSES | re.IGNORECASE))
    ranges = merged(
        [(value, value) if str(kind) == "LITERAL" else value for kind, value in items if str(kind) != "NEGATE"]
    )
    return complement(ranges) if "NEGATE" in names else ranges


def _written(kind: str, value: Any) -> str:
    """A part of a set in the notation of `re`."""
    match kind:
        case "NEGATE":
            return "^"
        case "LITERAL":
            return f"\\U{value:08x}"
        case "RANGE":
            return f"\\U{value[0]:08x}-\\U{value[1]:08x}"
        case _:
            name = str(value).removeprefix("CATEGORY_")
            letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[name.removeprefix("NOT_")]
            return "\\" + (letter.upper() if name.startswith("NOT_") else letter)


_TOKEN = re.compile(
    r"\\(?:[1-9]\d?|.)|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|\(\?(?:P=|<?[=!]|>|\()|[*+?}]\+|.", re.DOTALL
)
_UNFOLLOWED = {
    "ASSERT": ("lookaround", r"\(\?<?="),
    "ASSERT_NOT": ("lookaround", r"\(\?<?!"),
    "GROUPREF": ("a backreference", r"\(\?P=|\\[1-9]"),
    "GROUPREF_IGNORE": ("a backreference", r"\(\?P=|\\[1-9]"),
    "GROUPREF_EXISTS": ("a conditional group", r"\(\?\("),
    "ATOMIC_GROUP": ("an atomic group", r"\(\?>"),
    "POSSESSIVE_REPEAT": ("a possessive quantifier", r"[*+?}]\+"),
    "AT_BOUNDARY": ("a word boundary", r"\\b"),
    "AT_NON_BOUNDARY": ("a word boundary", r"\\B"),
}


def _refusal(name: str, argument: Any, pattern: str) -> str:
    """What is not supported, and where the first of its kind stands: the parser's tree does not tell."""
    what, spelling = _UNFOLLOWED.get(name, (name.lower(), "(?!)"))
    verbose = re.match(r"\(\?[a-z]*x[a-z]*\)", pattern)
    scanner = re.compile(rf"#[^\n]*|{_TOKEN.pattern}", re.DOTALL) if verbose else _TOKEN
    found = next((m for m in scanner.finditer(pattern) if re.match(spelling, m[0])), None)
    where = f", {found[0]!r} at position {found.start()}" if found else ""
    return (
        f"the regular expression {_shown(pattern)} has {what}{where}, which no automaton over bytes can follow; "
        "say it another way"
    )


def _shown(pattern: str) -> str:
    text = repr(pattern)
    return text if len(text) <= 80 else f"{text[:77]}..."

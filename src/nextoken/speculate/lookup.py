"""Guesses looked up in what was said before."""

from __future__ import annotations

from collections.abc import Sequence

from nextoken.methods import method
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row


@method(
    name="Prompt lookup",
    access="black",
    summary="guess that what followed the same words before follows again",
)
class PromptLookup(Drafter):
    """What followed the last earlier occurrence of the longest suffix of at most `longest` tokens.

    Args:
        length: guesses per pass.
        longest, shortest: suffixes tried, longest first.
    """

    def __init__(self, *, length: int = 8, longest: int = 4, shortest: int = 1) -> None:
        if length < 1 or not 1 <= shortest <= longest:
            raise ValueError(
                f"length must be at least 1 and 1 <= shortest <= longest, got {length}, {shortest}, {longest}"
            )
        self.length, self.longest, self.shortest = length, longest, shortest
        self._seen: dict[int, _Index] = {}

    def propose(self, rows: Sequence[Row]) -> Draft:
        return Draft(tuple(self._guess(row) for row in rows))

    def leave(self, ticket: int) -> None:
        self._seen.pop(ticket, None)

    def _guess(self, row: Row) -> Branches:
        index = self._seen.setdefault(row.running.ticket, _Index(self.longest))
        context = row.context
        index.read(context)
        tokens = index.following(context, self.shortest)[: min(self.length, row.room)]
        return Branches.chosen(tokens, range(ROOT, len(tokens) - 1))


class _Index:
    """Where each run of up to n tokens of a growing text last ended, but for the very last."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.ends: dict[tuple[int, ...], int] = {}
        self.read_to = 0

    def read(self, context: Sequence[int]) -> None:
        """Take in what is new, so that every run that something follows is known."""
        for end in range(self.read_to + 1, len(context)):
            for size in range(1, min(self.longest, end) + 1):
                self.ends[tuple(context[end - size : end])] = end
        self.read_to = max(self.read_to, len(context) - 1)

    def following(self, context: Sequence[int], shortest: int) -> Sequence[int]:
        """What came after the last earlier occurrence of the longest known suffix."""
        for size in range(min(self.longest, len(context)), shortest - 1, -1):
            end = self.ends.get(tuple(context[len(context) - size :]))
            if end is not None:
                return context[end:]
        return ()

"""Draft: a tree of guesses at what comes next, and Drafter: what makes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextoken.decode.request import Running
from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.model.next import Next

ROOT = -1
"""The node from which a draft hangs: the last token drawn, which is fed together with it."""


@dataclass(frozen=True)
class Branches:
    """The guesses of one row.

    Args:
        tokens: of each node, parents before their children.
        parents: index of the node each one continues, ROOT for the last token drawn.
        candidates: for each node (or ROOT) its children in the order drawn. A child drawn more than once stands more
            than once.
        laws: for each node (or ROOT) with drawn children the draft's own distribution [V] there, of which the first
            child was drawn; probabilities in float64 that sum to 1. None if the candidates were chosen and not drawn.
        replacement: whether later children were drawn from the same distribution, or from it without those before.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    candidates: Mapping[int, Sequence[int]] = field(default_factory=dict)
    laws: Mapping[int, Tensor] | None = None
    replacement: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every node continues the one before."""
        return self.parents == tuple(range(ROOT, len(self.parents) - 1))

    @classmethod
    def chosen(cls, tokens: Sequence[int], parents: Sequence[int]) -> Branches:
        """Guesses that were chosen rather than drawn, siblings in the order of preference."""
        candidates: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            candidates.setdefault(parent, []).append(node)
        return cls(tuple(tokens), tuple(parents), candidates)


@dataclass(frozen=True)
class Draft:
    """The guesses of all rows, ready to be fed: node 0 of each tree is the row's last token."""

    rows: tuple[Branches, ...]

    @property
    def size(self) -> int:
        """Nodes fed per row, the last token included."""
        return 1 + max(map(len, self.rows))

    @property
    def is_chain(self) -> bool:
        return all(row.is_chain for row in self.rows)

    def tokens(self, last: Sequence[int]) -> Tensor:
        """Token ids [B, size], ABSENT where a row has fewer nodes."""
        rows = [[token, *row.tokens] for token, row in zip(last, self.rows, strict=True)]
        return torch.tensor([[*row, *[ABSENT] * (self.size - len(row))] for row in rows])

    def parents(self) -> Tensor:
        """Parents [B, size] of the nodes as fed, -1 for what stands before the last token."""
        rows = [[-1, *(parent + 1 for parent in row.parents)] for row in self.rows]
        return torch.tensor([[*row, *[0] * (self.size - len(row))] for row in rows])


@dataclass(frozen=True)
class Row:
    """A sequence for which a drafter guesses.

    Args:
        running: its request, and what was drawn so far.
        context: prompt and output; the last token has not been fed to the target yet.
        room: most tokens that a guess may go on for.
        generator: of the drafter's random numbers for this row.
        state, place: the target's state, in which this is row number `place`; None while the prompt is being read. A
            drafter that is a part of its target may run ahead in it, and must leave its kept tokens as they are.
    """

    running: Running
    context: tuple[int, ...]
    room: int
    generator: torch.Generator
    state: State | None = None
    place: int = 0


class Drafter(ABC):
    """Guesses what the target will say.

    Nothing that it does changes the law of the output, only how fast it comes. One drafter serves one loop at a time.
    """

    needs_trees: bool = False
    """Whether it guesses trees, which recurrent targets cannot look at."""

    @abstractmethod
    def propose(self, rows: Sequence[Row]) -> Draft:
        """Guesses for each row: no path longer than its `room`."""

    def prompted(self, rows: Sequence[Row], said: Next) -> None:
        """The target read the prompts of these new rows: `said` [B, n] after each of their tokens, the shorter ones
        standing to the left. A row's `context` is its prompt so far."""
        return None

    def observe(self, rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        """What the target said: `said` [B, size] after each node as fed, and which nodes of each row were accepted.

        Called once after every pass; the rows are those for which the draft was proposed.
        """
        return None

    def leave(self, ticket: int) -> None:
        """The row of this ticket is done: forget it."""
        return None

    def check(self, target: LanguageModel) -> None:
        """Raise ValueError if the drafter cannot guess for this target."""
        return None

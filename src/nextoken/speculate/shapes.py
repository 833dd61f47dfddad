"""Shapes: how a draft tree grows from the draft's own distributions, level by level.

Children of a node are drawn without replacement, by Gumbel-top-k: the k largest of log q + Gumbel noise, in falling
order, are k draws of q one after the other, each without those before. Where the target is decoded greedily nothing is
drawn and the most probable tokens are chosen.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from nextoken.decode.search import conditioned, gumbels
from nextoken.methods import method
from nextoken.model.next import Next
from nextoken.speculate.draft import ROOT, Branches

_LEFT = 1e-6  # of a distribution's mass: below, what is left after some draws is rounding


@dataclass
class Growth:
    """The tree of one row while it grows.

    Args:
        room: longest path.
        generator: of the draws.
        ends: tokens after which nothing follows.
        is_chosen: whether the most probable tokens are taken, instead of drawn ones.
    """

    room: int
    generator: torch.Generator
    ends: frozenset[int]
    is_chosen: bool
    replacement: bool = False
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """log q of each node given its parent."""
    candidates: dict[int, list[int]] = field(default_factory=dict)
    laws: dict[int, Tensor] = field(default_factory=dict)

    def add(self, parent: int, token: int, law: Tensor) -> int:
        """A new child of `parent`, of law q [V] there; returns its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depth(parent) + 1)
        self.log_probs.append(math.log(float(law[token])))
        self.laws.setdefault(parent, law)
        self.candidates.setdefault(parent, []).append(len(self.tokens) - 1)
        return len(self.tokens) - 1

    def depth(self, node: int) -> int:
        """Tokens from the root to the node, both counted but for the root."""
        return 0 if node == ROOT else self.depths[node]

    def path(self, node: int) -> list[int]:
        """The nodes from the root to this one."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def can_grow(self, node: int) -> bool:
        """Whether something may follow the node."""
        return self.depth(node) < self.room and (node == ROOT or self.tokens[node] not in self.ends)

    def perturbed(self, log_law: Tensor) -> Tensor:
        """log q + Gumbel noise [V], or log q where the best are chosen."""
        return log_law if self.is_chosen else log_law + gumbels(log_law.shape, self.generator)

    def draw(self, law: Tensor, k: int) -> list[int]:
        """k tokens of law q [V] without replacement, in the order drawn; fewer if q has fewer."""
        best = self.perturbed(law.log()).topk(min(k, int((law > 0).sum())))
        return best.indices.tolist()

    def branches(self) -> Branches:
        laws = None if self.is_chosen else self.laws
        return Branches(tuple(self.tokens), tuple(self.parents), self.candidates, laws, self.replacement)


class Shape(ABC):
    """How trees grow. A shape is shared by all rows; what it must remember of a row is in `Plan`."""

    is_chain: bool = False
    listens: bool = False
    """Whether its plans want to hear all that the draft says, and not its distributions only."""

    @abstractmethod
    def begin(self, growth: Growth) -> Plan:
        """The plan of a new tree."""


class Plan(ABC):
    """The growth of one tree."""

    @abstractmethod
    def level(self, laws: Mapping[int, Tensor]) -> Sequence[int]:
        """Add nodes, given the draft's distribution [V] after each node last asked for (ROOT at first).

        Returns:
            The nodes after which the draft's distribution is wanted next; none ends the growth.
        """

    def hear(self, node: int, said: Next) -> None:
        """What the draft says [1, 1] after a node (or ROOT), just before `level` is given its distribution there."""
        return None


@dataclass(frozen=True)
class Chain(Shape):
    """One guess after the other: plain speculative sampling.

    Args:
        length: guesses per pass.
        confidence: guess no further after a token of q below it, which is kept.
    """

    length: int = 4
    confidence: float = 0.0
    is_chain = True

    def __post_init__(self) -> None:
        if self.length < 1 or not 0 <= self.confidence <= 1:
            raise ValueError(f"length must be 1 or more and confidence from 0 to 1, got {self}")

    def begin(self, growth: Growth) -> Plan:
        return _ChainPlan(self, growth)


@dataclass
class _ChainPlan(Plan):
    shape: Chain
    growth: Growth

    def level(self, laws: Mapping[int, Tensor]) -> Sequence[int]:
        growth = self.growth
        ((node, law),) = laws.items()
        if not growth.can_grow(node):
            return ()
        (token,) = growth.draw(law, 1)
        new = growth.add(node, token, law)
        sure = float(law[token]) >= self.shape.confidence
        return (new,) if sure and growth.depths[new] < self.shape.length and growth.can_grow(new) else ()


@method(
    name="RSD-C",
    arxiv="2402.14160",
    access="gray",
    summary="draft trees of constant branching, siblings drawn without replacement",
)
@dataclass(frozen=True)
class Branching(Shape):
    """b_l children of every node of level l, drawn without replacement.

    Args:
        branching: b_0, b_1, ...; their running products are the sizes of the levels.

    Source: Jeon et al., arXiv:2402.14160, section 3.2.
    """

    branching: tuple[int, ...] = (4, 2, 2, 1)

    def __post_init__(self) -> None:
        if not self.branching or any(b < 1 for b in self.branching):
            raise ValueError(f"branching needs one number of at least 1 per level, got {self.branching}")

    def begin(self, growth: Growth) -> Plan:
        return _BranchingPlan(self, growth)


@dataclass
class _BranchingPlan(Plan):
    shape: Branching
    growth: Growth

    def level(self, laws: Mapping[int, Tensor]) -> Sequence[int]:
        growth, branching = self.growth, self.shape.branching
        added = [
            growth.add(node, token, law)
            for node, law in laws.items()
            if growth.can_grow(node)
            for token in growth.draw(law, branching[growth.depth(node)])
        ]
        return [node for node in added if growth.depths[node] < len(branching) and growth.can_grow(node)]


@method(
    name="RSD-S",
    arxiv="2402.14160",
    access="gray",
    summary="draft trees of whole sequences drawn without replacement, by stochastic beam search",
)
@dataclass(frozen=True)
class StochasticBeam(Shape):
    """The tree of `width` sequences of `depth` tokens drawn without replacement from the draft's law of sequences.

    Of every entry with perturbed log-probability G, the children's Gumbels of location phi + log q are conditioned on
    their maximum being G; the `width` largest of all children are the next level. Nodes that no longer lead anywhere
    stay as guesses.

    Source: Jeon et al., arXiv:2402.14160, section 3.2; Kool et al., arXiv:1903.06059.
    """

    width: int = 4
    depth: int = 4

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"width and depth must be at least 1, got {self}")

    def begin(self, growth: Growth) -> Plan:
        return _BeamPlan(self, growth)


@dataclass
class _BeamPlan(Plan):
    shape: StochasticBeam
    growth: Growth
    entries: dict[int, tuple[float, float]] = field(default_factory=lambda: {ROOT: (0.0, 0.0)})
    """phi and G of each node of the last level."""

    def level(self, laws: Mapping[int, Tensor]) -> Sequence[int]:
        growth = self.growth
        found: list[tuple[float, float, int, int]] = []
        for node, law in laws.items():
            if not growth.can_grow(node):
                continue
            phi, largest = self.entries[node]
            log_probs = phi + law.log()
            values = log_probs if growth.is_chosen else conditioned(growth.perturbed(log_probs), largest)
            best = values.topk(min(self.shape.width, int((law > 0).sum())))
            found += [
                (value, float(log_probs[token]), node, token)
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        kept = sorted(found, key=lambda entry: entry[0], reverse=True)[: self.shape.width]
        self.entries = {growth.add(node, token, laws[node]): (phi, value) for value, phi, node, token in kept}
        return [node for node in self.entries if growth.depths[node] < self.shape.depth and growth.can_grow(node)]


@method(
    name="DySpec",
    arxiv="2410.11744",
    access="gray",
    summary="draft trees that grow where the next token is likeliest to be reached",
)
@dataclass(frozen=True)
class Dynamic(Shape):
    """The tree of the `nodes` places that the verification is likeliest to reach.

    A place for a node below parent c, after siblings y_1 .. y_j, is worth v(c) prod_i (1 - R_i(y_i)), R_i the draft's
    distribution without the siblings before. The place of greatest worth is filled by a draw y from R, which opens one
    below (worth v R(y)) and one beside (worth v (1 - R(y))). If a guess stands with the chance R(y) that the draft gave
    it, v is the chance that it is tried, and no tree of this size has more guesses tried on average.

    With `threshold` every place of at least that worth is filled, a level at a time, so that one pass of the draft
    serves a level and not a node.

    Args:
        nodes: most nodes.
        threshold: tau of the layered variant; None fills strictly by worth.
        depth: longest path.

    Source: DySpec, arXiv:2410.11744, algorithms 1 and 2.
    """

    nodes: int = 24
    threshold: float | None = None
    depth: int = 16

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.depth < 1 or (self.threshold is not None and not 0 < self.threshold < 1):
            raise ValueError(f"nodes and depth must be at least 1, threshold between 0 and 1; got {self}")

    def begin(self, growth: Growth) -> Plan:
        growth.room = min(growth.room, self.depth)
        return _GreedyPlan(self, growth) if self.threshold is None else _LayeredPlan(self, growth, self.threshold)


@dataclass(order=True)
class _Place:
    """Where a node could stand: what it is worth (negated), and what is left to draw from."""

    cost: float
    number: int
    parent: int = field(compare=False)
    rest: Tensor | None = field(compare=False, default=None)


@dataclass
class _GreedyPlan(Plan):
    shape: Dynamic
    growth: Growth
    places: list[_Place] = field(default_factory=lambda: [_Place(-1.0, -1, ROOT)])
    numbers: count[int] = field(default_factory=count)

    def level(self, laws: Mapping[int, Tensor]) -> Sequence[int]:
        growth, places = self.growth, self.places
        while places and len(growth.tokens) < self.shape.nodes:
            place = places[0]
            if place.rest is None:
                if not growth.can_grow(place.parent):
                    heapq.heappop(places)
                    continue
                if place.parent not in laws:
                    return (place.parent,)
                place.rest = laws[place.parent]
            heapq.heappop(places)
            for opened in _filled(growth, place):
                heapq.heappush(places, _Place(-opened[0], next(self.numbers), *opened[1:]))
        return ()


@dataclass
class _LayeredPlan(Plan):
    shape: Dynamic
    growth: Growth
    threshold: float
    worth: dict[int, float] = field(default_factory=lambda: {ROOT: 1.0})

    def level(self, laws: Mapping[int, Tensor]) -> Sequence[int]:
        growth, added = self.growth, []
        for node, law in laws.items():
            place: _Place | None = _Place(-self.worth[node], 0, node, law) if growth.can_grow(node) else None
            while place is not None and -place.cost >= self.threshold and len(growth.tokens) < self.shape.nodes:
                opened = _filled(growth, place)
                place = None
                for value, parent, rest in opened:
                    if rest is None:
                        self.worth[parent] = value
                        added.append(parent)
                    else:
                        place = _Place(-value, 0, parent, rest)
        return [node for node in added if self.worth[node] >= self.threshold and growth.can_grow(node)]


def _filled(growth: Growth, place: _Place) -> list[tuple[float, int, Tensor | None]]:
    """Fill a place; returns those that it opens, below and beside, as (worth, parent, what is left)."""
    assert place.rest is not None
    (token,) = growth.draw(place.rest, 1)
    law = growth.laws.get(place.parent, place.rest)
    chance = float(place.rest[token])
    node = growth.add(place.parent, token, law)
    opened: list[tuple[float, int, Tensor | None]] = [(-place.cost * chance, node, None)]
    if 1 - chance > _LEFT:
        rest = place.rest.clone()
        rest[token] = 0
        opened.append((-place.cost * (1 - chance), place.parent, rest / rest.sum()))
    return opened


@dataclass(frozen=True)
class Independent(Shape):
    """`sequences` guesses of `length` tokens, drawn independently of each other: what `KSequential` selects from."""

    sequences: int = 4
    length: int = 4

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.length < 1:
            raise ValueError(f"sequences and length must be at least 1, got {self}")

    def begin(self, growth: Growth) -> Plan:
        growth.replacement = True
        return _IndependentPlan(self, growth, {ROOT: self.sequences})


@dataclass
class _IndependentPlan(Plan):
    shape: Independent
    growth: Growth
    passing: dict[int, int]
    """How many sequences go through each node of the last level."""

    def level(self, laws: Mapping[int, Tensor]) -> Sequence[int]:
        growth, passing = self.growth, dict[int, int]()
        for node, law in laws.items():
            if not growth.can_grow(node):
                continue
            if growth.is_chosen:
                tokens = growth.draw(law, 1)
            else:
                share = self.passing[node]
                tokens = torch.multinomial(law, share, replacement=True, generator=growth.generator).tolist()
            known: dict[int, int] = {}
            for token in tokens:
                if token in known:
                    growth.candidates[node].append(known[token])
                else:
                    known[token] = growth.add(node, token, law)
                passing[known[token]] = passing.get(known[token], 0) + 1
        self.passing = passing
        return [node for node in passing if growth.depths[node] < self.shape.length and growth.can_grow(node)]

"""Arms: what there is to choose from, drafters each in trees of several widths and depths, and how each has fared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from nextoken.model.base import LanguageModel
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row
from nextoken.speculate.draft_model import DraftModel
from nextoken.speculate.lookup import PromptLookup
from nextoken.speculate.recycling import WIDTHS, Recycling, template
from nextoken.speculate.shapes import Branching, Chain
from nextoken.speculate.stand import WIDTHS as STAND_WIDTHS
from nextoken.speculate.stand import Stand
from nextoken.speculate.suffix import SuffixAutomaton
from nextoken.speculate.tree_template import Place

Widths = tuple[tuple[int, ...], ...]
"""Children of the nodes of each level, as `recycling.template` takes them."""

LENGTHS = (1, 2, 4, 8, 16)
SMALL: tuple[Widths, ...] = (
    ((1,),),
    ((1,), (1,)),
    ((1,), (1,), (1,), (1,)),
    ((2,), (1, 1)),
    ((3,), (2, 1), (1, 1)),
    ((6,), (3, 2, 1), (2, 1, 1), (1, 1), (1,)),
)
"""Trees that lie within those of `Recycling` and `Stand`, so that one look at the large ones tells of all."""
DRAFTED = ((1,), (1, 1), (1, 1, 1), (1,) * 5, (1,) * 8, (2, 1), (3, 2, 1))
"""Branchings for a draft model."""


@dataclass
class Mean:
    """A mean that forgets: of about the last 32."""

    value: float = math.nan
    count: float = 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, 32)
        self.value = value if self.count == 1 else self.value + (value - self.value) / self.count

    def or_else(self, prior: float) -> float:
        return prior if math.isnan(self.value) else self.value


@dataclass
class Arm:
    """A family's guesses within one tree."""

    family: Family
    widths: Widths
    gain: Mean
    """Tokens per row and pass."""
    places: frozenset[Place] = frozenset()
    seconds: Mean = field(default_factory=Mean)
    """Of guessing, per unit of `Family.work`."""
    share: Mean = field(default_factory=lambda: Mean(1.0, 1))
    """Of passes with a guess."""
    nodes: Mean = field(default_factory=Mean)
    """Of those."""

    def __post_init__(self) -> None:
        self.places = frozenset(_places(self.widths))
        self.nodes = Mean(float(len(self.places)), 1)

    @property
    def depth(self) -> int:
        return len(self.widths)

    @property
    def branches(self) -> bool:
        return any(count > 1 for counts in self.widths for count in counts)

    @property
    def name(self) -> str:
        return f"{self.family.name} {len(self.places)}"


class Family:
    """A drafter, and how it is made to guess within each of some trees, the largest last.

    Args:
        name: for people.
        drafter: what learns.
        aim: gives the drafter that guesses within a tree.
        trees: that it may be asked for.
        is_model: whether it asks a model: then it guesses only to be verified, never to be compared with the text,
            since guesses cost much, and as much for many rows as for one.
    """

    def __init__(
        self,
        name: str,
        drafter: Drafter,
        aim: Callable[[Widths], Drafter],
        trees: Sequence[Widths],
        *,
        is_model: bool = False,
    ) -> None:
        self.name, self.drafter, self.aim, self.is_model = name, drafter, aim, is_model
        self.arms = [Arm(self, tree, Mean(1.0, 2)) for tree in trees]
        self.at = 0
        """Number of the last pass that it guessed for."""
        if is_model:
            self.hope(0)
        self.learns = type(drafter).observe is not Drafter.observe
        self.seconds = Mean()
        """Of guessing, per unit of work."""
        self.learning = Mean()
        """Seconds of learning, per place."""
        self.met: set[int] = set()
        """Rows it has guessed for: the first time it reads all of their text."""

    def hope(self, at: int) -> None:
        """Suppose of each arm the best, which trying it will put right."""
        self.at = at
        for arm in self.arms:
            arm.gain = Mean(len(arm.widths) + 1.0, 1)

    def work(self, arm: Arm, rows: int) -> int:
        """What the time for guesses grows with: passes of a draft model, or places of all rows."""
        return arm.depth if self.is_model else rows * len(arm.places)

    def propose(self, arm: Arm, rows: Sequence[Row], clock: Callable[[], float]) -> Draft:
        """Guesses within the arm's tree, timed."""
        begun = clock()
        draft = self.aim(arm.widths).propose(rows)
        each = (clock() - begun) / self.work(arm, len(rows))
        tickets = {row.running.ticket for row in rows}
        if tickets <= self.met:
            arm.seconds.add(each)
            self.seconds.add(each)
        elif math.isnan(self.seconds.value):
            self.seconds.value = each  # until there is a better one, which then replaces it
        self.met |= tickets
        return draft


def plain_families() -> Iterator[Family]:
    """Those that need no model."""
    chains = [((1,),) * length for length in LENGTHS]
    lookup, suffix, recycling = PromptLookup(), SuffixAutomaton(), Recycling()

    def looked_up(widths: Widths) -> Drafter:
        lookup.length = len(widths)
        return lookup

    def by_suffix(widths: Widths) -> Drafter:
        suffix.length = len(widths)
        return suffix

    templates = {widths: template(widths) for widths in (*SMALL, WIDTHS)}

    def recycled(widths: Widths) -> Drafter:
        recycling.parents, recycling.ranks = templates[widths]
        return recycling

    stands = {widths: Stand(widths=widths) for widths in (*SMALL, STAND_WIDTHS)}
    shared = stands[STAND_WIDTHS]
    for stand in stands.values():
        stand.memory = shared.memory
    yield Family("lookup", lookup, looked_up, chains)
    yield Family("suffix", suffix, by_suffix, chains)
    yield Family("recycling", recycling, recycled, (*SMALL, WIDTHS))
    yield Family("stand", shared, stands.__getitem__, (*SMALL, STAND_WIDTHS))


def drafted(model: LanguageModel) -> Family:
    """One draft model in several shapes, which share what it has read."""
    shapes = {_grown(branching): branching for branching in DRAFTED if max(branching) == 1 or model.supports_trees}
    drafter = DraftModel(model)

    def aim(widths: Widths) -> Drafter:
        branching = shapes[widths]
        drafter.shape = Chain(len(branching)) if max(branching) == 1 else Branching(branching)
        return drafter

    return Family("draft", drafter, aim, list(shapes), is_model=True)


def _grown(branching: Sequence[int]) -> Widths:
    """The widths of a tree of this branching."""
    return tuple((count,) * math.prod(branching[:level]) for level, count in enumerate(branching))


def _places(widths: Widths) -> list[Place]:
    """The places of a tree."""
    return places_of(Branches.chosen([0] * len(template(widths)[0]), template(widths)[0]))


def places_of(branches: Branches) -> list[Place]:
    """The place of each node."""
    places: list[Place] = []
    number: dict[int, int] = {}
    for node, parent in enumerate(branches.parents):
        number[node] = list(branches.candidates[parent]).index(node)
        places.append((*(() if parent == ROOT else places[parent]), number[node]))
    return places


def places_along(branches: Branches, path: Sequence[int]) -> list[Place]:
    """The places of the nodes of a path from the root."""
    place: Place = ()
    places = []
    for node in path:
        place = (*place, list(branches.candidates[branches.parents[node]]).index(node))
        places.append(place)
    return places

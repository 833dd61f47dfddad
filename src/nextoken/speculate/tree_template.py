"""Tree templates: which places of a draft tree are worth a node, counted where guesses have stood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.next import Next
from nextoken.speculate.draft import Branches, Draft, Drafter, Row

Place = tuple[int, ...]
"""Where a node stands: on the way from the root, the number of each node among its siblings, in the order drawn."""


class Census(Drafter):
    """Another drafter's guesses, counted where they stand: `counts[place]` passes accepted the node at this place.

    Args:
        drafter: what guesses, with a tree much larger than the one looked for.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.needs_trees = drafter.needs_trees
        self.counts: Counter[Place] = Counter()

    def propose(self, rows: Sequence[Row]) -> Draft:
        return self.drafter.propose(rows)

    def prompted(self, rows: Sequence[Row], said: Next) -> None:
        self.drafter.prompted(rows, said)

    def observe(self, rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        for branches, nodes in zip(draft.rows, accepted, strict=True):
            place: Place = ()
            for node in nodes:
                place = (*place, _number(branches, node))
                self.counts[place] += 1
        self.drafter.observe(rows, draft, said, accepted)

    def leave(self, ticket: int) -> None:
        self.drafter.leave(ticket)

    def check(self, target: LanguageModel) -> None:
        self.drafter.check(target)


@method(
    name="Draft tree from counts",
    arxiv="2506.04708",
    access="gray",
    summary="the tree of a given size whose places were accepted most often",
)
def best_template(counts: Mapping[Place, int], *, nodes: int) -> tuple[tuple[int, ...], ...]:
    """argmax over trees t of `nodes` places of sum_{i in t} counts[i], as the widths of its levels.

    A tree has with each place the one above and the siblings before it, for later draws need the earlier ones. Of equal
    trees the shallowest, by the sum of depths. Where counts fall along the tree, as those of a long run do, these are
    the `nodes` largest counts, which is what the paper takes. All places if there are no more than `nodes`.

    Args:
        counts: how often each place was accepted; see `Census`.
        nodes: size of the tree.

    Returns:
        Widths as `recycling.template`, `Stand` and `Recycling` take them.

    Raises:
        ValueError: `nodes` is below 1, or nothing was counted.

    Source: Song et al., arXiv:2506.04708, there for 80 of 625 places.
    """
    if nodes < 1:
        raise ValueError(f"a tree needs at least one node, got nodes={nodes}")
    places = _closed(counts)
    if not places:
        raise ValueError("nothing was counted: no guess stood, so there is no place to prefer")
    # The places form a binary tree: the first child of each, and its next sibling. What is looked for is connected in
    # it and has its root, so the best of each size is the best split of the size between the two sides.
    exchange = 1 + sum(map(len, places))  # one acceptance is worth more than any depth
    best: dict[Place | None, list[int]] = {None: [0]}
    split: dict[Place, list[int]] = {}
    for place in sorted(places, reverse=True):  # what is below and beside first
        below, beside = best[_key((*place, 0), places)], best[_key((*place[:-1], place[-1] + 1), places)]
        own = counts.get(place, 0) * exchange - len(place)
        found, ways = [0], [0]
        for size in range(1, min(nodes, len(below) + len(beside) - 1) + 1):
            options = range(max(0, size - len(beside)), min(size - 1, len(below) - 1) + 1)
            way = max(options, key=lambda taken: below[taken] + beside[size - 1 - taken])
            found.append(own + below[way] + beside[size - 1 - way])
            ways.append(way)
        best[place], split[place] = found, ways
    kept: list[Place] = []
    waiting: list[tuple[Place, int]] = [((0,), min(nodes, len(places)))]
    while waiting:
        place, size = waiting.pop()
        if size:
            kept.append(place)
            taken = split[place][size]
            waiting += [((*place, 0), taken), ((*place[:-1], place[-1] + 1), size - 1 - taken)]
    return _widths(kept)


def _number(branches: Branches, node: int) -> int:
    """The number of a node among its siblings."""
    return list(branches.candidates.get(branches.parents[node], ())).index(node)


def _closed(counts: Mapping[Place, int]) -> set[Place]:
    """The places, with those above and the siblings before."""
    return {
        (*place[:depth], number)
        for place in counts
        for depth in range(len(place))
        for number in range(place[depth] + 1)
    }


def _key(place: Place, places: set[Place]) -> Place | None:
    return place if place in places else None


def _widths(places: Sequence[Place]) -> tuple[tuple[int, ...], ...]:
    """Children of the nodes of each level, in order, nodes without any at the end left out."""
    width = Counter(place[:-1] for place in places)
    level: list[Place] = [()]
    found = []
    while any(width[place] for place in level):
        counts = [width[place] for place in level]
        last = max(number for number, count in enumerate(counts) if count)
        found.append(tuple(counts[: last + 1]))
        level = [(*place, number) for place in level for number in range(width[place])]
    return tuple(found)

"""Tree templates: the best of all trees of a size, and what is counted."""

from __future__ import annotations

import heapq
import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.speculate.test_laws import TARGET, outputs

from nextoken.decode.loop import Loop
from nextoken.model.table import TableModel
from nextoken.speculate.acceptance import Follow
from nextoken.speculate.draft import ROOT
from nextoken.speculate.loop import Speculation
from nextoken.speculate.recycling import Recycling, template
from nextoken.speculate.stand import CHANCES, WIDTHS, Stand
from nextoken.speculate.tree_template import Census, best_template


def places_of(widths: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    parents, ranks = template(widths)
    places: list[tuple[int, ...]] = []
    for parent, rank in zip(parents, ranks, strict=True):
        places.append((*(places[parent] if parent != ROOT else ()), rank))
    return places


def is_closed(tree: tuple[tuple[int, ...], ...]) -> bool:
    inside = {(), *tree}
    return all(p[:-1] in inside and (p[-1] == 0 or (*p[:-1], p[-1] - 1) in inside) for p in tree)


@pytest.mark.paper("2506.04708")
@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans())
def test_no_tree_of_its_size_was_accepted_more_often(seed: int, nodes: int, zeros: bool) -> None:
    """Against every tree; counts here do not fall along the tree, as those of a short run may not."""
    source = random.Random(seed)
    everything = [place for depth in (1, 2, 3) for place in itertools.product(range(2), repeat=depth)]
    counts = {place: source.randint(0 if zeros else 1, 6) for place in everything}
    trees = [tree for tree in itertools.combinations(everything, nodes) if is_closed(tree)]
    best = max((sum(counts[p] for p in tree), -sum(map(len, tree))) for tree in trees)
    found = places_of(best_template(counts, nodes=nodes))
    assert len(found) == nodes and is_closed(tuple(found))
    assert (sum(counts[p] for p in found), -sum(map(len, found))) == best


def likeliest(chances: tuple[float, ...], nodes: int) -> list[float]:
    """The products of the likeliest places, best first."""
    heap, found = [(-chance, (rank,)) for rank, chance in enumerate(chances)], list[float]()
    heapq.heapify(heap)
    while len(found) < nodes:
        cost, place = heapq.heappop(heap)
        found.append(-cost)
        for rank, chance in enumerate(chances):
            heapq.heappush(heap, (cost * chance, (*place, rank)))
    return found


@pytest.mark.paper("2506.04708")
def test_of_independent_chances_the_likeliest_places_are_found() -> None:
    chances, counts = (0.62, 0.17, 0.08), {}
    for depth in range(1, 11):
        for place in itertools.product(range(3), repeat=depth):
            worth = math.prod(chances[rank] for rank in place)
            if worth > 5e-3:
                counts[place] = round(worth * 1e9)
    found = places_of(best_template(counts, nodes=30))
    assert sorted((counts[p] for p in found), reverse=True) == sorted(counts.values(), reverse=True)[:30]
    worth = sum(math.prod(chances[rank] for rank in place) for place in found)
    assert worth == pytest.approx(sum(likeliest(chances, 30)))


def test_the_default_tree_is_the_best_for_its_chances() -> None:
    places = places_of(WIDTHS)
    assert len(places) == 60 and is_closed(tuple(places)) and max(map(len, places)) == 9
    worth = sum(math.prod(CHANCES[rank] for rank in place) for place in places)
    assert worth == pytest.approx(sum(likeliest(CHANCES, 60)))


def test_limits() -> None:
    assert best_template({(0,): 5, (0, 0): 5, (0, 0, 0): 5, (1,): 5}, nodes=2) == ((2,),)  # ties to the shallower
    even = {(0,): 9, (0, 0): 1, (1,): 9, (1, 0): 9, (1, 0, 0): 1}
    assert best_template(even, nodes=4) == ((2,), (1, 1))
    assert best_template({(0, 0, 0): 9}, nodes=9) == ((1,), (1,), (1,))
    assert best_template({(2,): 1}, nodes=3) == ((3,),)  # a third guess needs the first two
    assert best_template({(0,): 3, (1,): 2, (1, 0): 1}, nodes=3) == ((2,), (0, 1))
    with pytest.raises(ValueError, match="at least one"):
        best_template({(0,): 1}, nodes=0)
    with pytest.raises(ValueError, match="no guess stood"):
        best_template({}, nodes=3)


@pytest.mark.paper("2506.04708")
def test_a_census_counts_what_stands_and_changes_nothing() -> None:
    census = Census(Recycling(k=3, widths=((3,), (2, 1), (1,))))
    speculation = Speculation(census, Follow())
    assert outputs(speculation.loop(TARGET), "", 60, length=30) == outputs(Loop(TARGET), "", 60, length=30)
    assert speculation.tally.failures == 0
    assert sum(census.counts.values()) == speculation.tally.accepted > 0
    assert all(count <= census.counts[place[:-1]] for place, count in census.counts.items() if len(place) > 1)
    # The tree found is good for what draws guesses as for what chooses them.
    widths = best_template(census.counts, nodes=4)
    for drafter in (Recycling(k=3, widths=widths), Stand(widths=widths)):
        assert drafter.needs_trees
    assert len(places_of(widths)) == 4


def test_a_census_passes_on_what_it_is_told() -> None:
    cycle = TableModel.from_counts([[0, 1, 2, 3] * 5], ["a", "b", "c", "d"], order=1)
    census = Census(Stand(widths=((2,), (1,))))
    speculation = Speculation(census)
    loop = speculation.loop(cycle)
    with pytest.warns(UserWarning, match="another vocabulary"):
        speculation.loop(TARGET)
    outputs(loop, "greedy", 1, length=20)
    assert set(census.counts) == {(0,), (0, 0)}

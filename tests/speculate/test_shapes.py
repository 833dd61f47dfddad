"""Shapes of draft trees: the laws of what they draw, the best tree of a size, and their limits."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from nextoken.speculate.draft import ROOT
from nextoken.speculate.recycling import template
from nextoken.speculate.shapes import Branching, Chain, Dynamic, Growth, Independent, Shape, StochasticBeam

FALSE_ALARM = 1e-4
SIZE = 3


def table(seed: int, *, peaked: float = 1.0) -> Tensor:
    """q after each last token, and after the root in the last row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(peaked * torch.randn(SIZE + 1, SIZE, generator=generator, dtype=torch.float64), -1)


def grown(shape: Shape, q: Tensor, seed: int, *, room: int = 8, is_chosen: bool = False) -> Growth:
    growth = Growth(room, torch.Generator().manual_seed(seed), frozenset(), is_chosen)
    plan, wanted = shape.begin(growth), [ROOT]
    while wanted:
        laws: Mapping[int, Tensor] = {node: q[growth.tokens[node] if node != ROOT else SIZE] for node in wanted}
        wanted = list(plan.level(laws))
    return growth


@pytest.mark.paper("2402.14160")
def test_siblings_are_drawn_one_after_the_other_without_those_before() -> None:
    q = table(1)
    root = q[SIZE].tolist()
    counts = Counter(tuple(grown(Branching((2,)), q, seed).tokens) for seed in range(6000))
    statistic = 0.0
    for a, b in itertools.permutations(range(SIZE), 2):
        expected = 6000 * root[a] * root[b] / (1 - root[a])
        statistic += (counts[a, b] - expected) ** 2 / expected
    assert statistic < chi2.isf(FALSE_ALARM, 5)


@pytest.mark.paper("2402.14160")
def test_a_beam_is_a_draw_of_sequences_without_replacement() -> None:
    q = table(2)
    mass = {(a, b): float(q[SIZE, a] * q[a, b]) for a in range(SIZE) for b in range(SIZE)}
    counts: Counter[frozenset[tuple[int, int]]] = Counter()
    for seed in range(6000):
        growth = grown(StochasticBeam(2, 2), q, seed)
        leaves = [n for n in range(len(growth.tokens)) if growth.depths[n] == 2]
        counts[frozenset((growth.tokens[growth.parents[n]], growth.tokens[n]) for n in leaves)] += 1
    statistic, degrees = 0.0, -1
    for x, y in itertools.combinations(mass, 2):
        expected = 6000 * (mass[x] * mass[y] / (1 - mass[x]) + mass[y] * mass[x] / (1 - mass[y]))
        statistic += (counts[frozenset((x, y))] - expected) ** 2 / expected
        degrees += 1
    assert statistic < chi2.isf(FALSE_ALARM, degrees)


def worth(place: tuple[int, ...], orders: Mapping[tuple[int, ...], list[int]], q: Tensor) -> float:
    """Chance that a place, a path of sibling numbers, is reached, if guesses stand with the chance they were drawn."""
    value, token = 1.0, SIZE
    above: tuple[int, ...] = ()
    for number, rank in enumerate(place):
        order, left = orders[above], 1.0
        for earlier in order[:rank]:
            value *= 1 - float(q[token, earlier]) / left
            left -= float(q[token, earlier])
        if number + 1 < len(place):
            value *= float(q[token, order[rank]]) / left
        token, above = order[rank], (*above, rank)
    return value


@pytest.mark.paper("2410.11744")
@pytest.mark.parametrize("seed", range(6))
def test_no_tree_of_its_size_has_places_that_are_likelier_reached(seed: int) -> None:
    """Against every tree of 4 places, the draws at each place being the same."""
    q = table(seed, peaked=1.5)
    growth = grown(Dynamic(4), q, seed, is_chosen=True)
    orders: dict[tuple[int, ...], list[int]] = {(): q[SIZE].argsort(descending=True).tolist()}
    # Chosen siblings come in the order of probability, whatever the tree.
    for depth in range(1, 5):
        for path in itertools.product(range(SIZE), repeat=depth):
            above = path[:-1]
            token = orders[above][path[-1]]
            orders[path] = q[token].argsort(descending=True).tolist()
    places = [path for depth in range(1, 5) for path in itertools.product(range(SIZE), repeat=depth)]

    def closed(tree: tuple[tuple[int, ...], ...]) -> bool:
        inside = set(tree)
        return all((len(p) == 1 or p[:-1] in inside) and (p[-1] == 0 or (*p[:-1], p[-1] - 1) in inside) for p in inside)

    shallow = [p for p in places if sum(p) + len(p) <= 4]  # deeper or later places need more than four nodes
    best = max(sum(worth(p, orders, q) for p in tree) for tree in itertools.combinations(shallow, 4) if closed(tree))
    own = 0.0
    for node in range(len(growth.tokens)):
        path: list[int] = []
        at = node
        while at != ROOT:
            path.append(growth.candidates[growth.parents[at]].index(at))
            at = growth.parents[at]
        own += worth(tuple(path[::-1]), orders, q)
    assert len(growth.tokens) == 4
    assert own == pytest.approx(best)


@pytest.mark.paper("2410.11744")
def test_dynamic_trees_are_deep_where_the_draft_is_sure_and_wide_where_it_is_not() -> None:
    sure, unsure = torch.full((SIZE + 1, SIZE), 0.01).double(), torch.full((SIZE + 1, SIZE), 1 / SIZE).double()
    sure[:, 0] = 0.98
    deep, wide = grown(Dynamic(9), sure, 0, room=20), grown(Dynamic(9), unsure, 0, room=20)
    assert max(deep.depths) >= 8
    assert max(wide.depths) <= 3
    assert sorted(len(c) for c in wide.candidates.values())[-1] == SIZE


@pytest.mark.paper("2410.11744")
def test_the_layered_tree_has_every_place_above_the_threshold() -> None:
    q = table(5)
    growth = grown(Dynamic(500, threshold=0.08), q, 3)
    for node, law in growth.laws.items():
        value, left = 1.0, 1.0
        at = node
        while at != ROOT:
            parent = growth.parents[at]
            rest = 1.0
            for sibling in growth.candidates[parent]:
                chance = float(growth.laws[parent][growth.tokens[sibling]]) / rest
                if sibling == at:
                    value *= chance
                    break
                value *= 1 - chance
                rest -= float(growth.laws[parent][growth.tokens[sibling]])
            at = parent
        for child in growth.candidates[node]:
            assert value >= 0.08 - 1e-9
            value *= 1 - float(law[growth.tokens[child]]) / left
            left -= float(law[growth.tokens[child]])
        assert value < 0.08 or len(growth.candidates[node]) == SIZE


def test_limits() -> None:
    q = table(6)
    for seed in range(5):
        single = grown(Dynamic(1), q, seed)
        assert single.tokens == grown(Chain(1), q, seed).tokens == grown(StochasticBeam(1, 1), q, seed).tokens
    one_hot = torch.zeros(SIZE + 1, SIZE, dtype=torch.float64)
    one_hot[:, 1] = 1
    for shape in (Chain(4), Dynamic(4), StochasticBeam(3, 4), Branching((2, 2, 2, 2)), Independent(3, 4)):
        growth = grown(shape, one_hot, 0)
        assert growth.tokens == [1] * 4 and growth.branches().is_chain


def test_nothing_follows_an_end_or_goes_beyond_the_room() -> None:
    q = table(7)
    for shape in (Chain(6), Dynamic(30), StochasticBeam(3, 6), Branching((2,) * 6), Independent(3, 6)):
        growth = Growth(3, torch.Generator().manual_seed(0), frozenset({2}), is_chosen=False)
        plan, wanted = shape.begin(growth), [ROOT]
        while wanted:
            assert all(node == ROOT or growth.tokens[node] != 2 for node in wanted)
            wanted = list(plan.level({n: q[growth.tokens[n] if n != ROOT else SIZE] for n in wanted}))
        assert max(growth.depths) <= 3


def test_confidence_stops_after_the_token_and_keeps_it() -> None:
    q = torch.tensor([[0.9, 0.05, 0.05]] * 4).double()
    for seed in range(30):
        tokens = grown(Chain(6, confidence=0.5), q, seed).tokens
        assert all(token == 0 for token in tokens[:-1])
        assert len(tokens) == 6 or tokens[-1] != 0


@pytest.mark.paper("2408.08696")
def test_the_template_of_recycling() -> None:
    parents, ranks = template()
    depth: list[int] = []
    for parent in parents:
        depth.append(1 if parent == ROOT else depth[parent] + 1)
    assert Counter(depth) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert len(parents) == 80 and max(ranks) == 7
    with pytest.raises(ValueError, match="level 1"):
        template(((2,), (1, 1, 1)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain(0),
        lambda: Chain(2, confidence=2.0),
        lambda: Branching(()),
        lambda: StochasticBeam(0, 1),
        lambda: Dynamic(0),
        lambda: Dynamic(3, threshold=1.0),
        lambda: Independent(0, 3),
    ],
)
def test_arguments_out_of_range(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]

"""Blocks on weighted populations: each keeps the measure it says it keeps, by enumeration of every outcome."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chance import outcomes
from nextoken.constrain.particles import (
    Population,
    advance,
    merge,
    pick,
    pool,
    prune,
    resample,
    spawn,
    twisted,
    weigh,
)
from nextoken.constrain.resampling import SCHEMES, Scheme, scheme

Word = tuple[int, ...]
Measure = dict[Word, float]

P = {(): (0.7, 0.3), (0,): (0.2, 0.8), (1,): (0.5, 0.5)}
"""Chance of each symbol after a word."""
SCORE = {(0,): 0.5, (1,): 0.2, (0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.25, (1, 1): 2.0}
PSI = {(): 1.0, (0,): 0.3, (1,): 2.0, (0, 0): 1.5, (0, 1): 0.4, (1, 0): 0.7, (1, 1): 0.2}


def log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def grow(word: Word, rng: Any) -> tuple[Word, float]:
    """A symbol more, and its score."""
    rng.expect([P[word][0]])
    longer = (*word, int(rng.random() > P[word][0]))
    return longer, log(SCORE[longer])


def log_psi(word: Word) -> float:
    return log(PSI[word])


TARGET: Measure = {(a, b): P[()][a] * SCORE[(a,)] * P[(a,)][b] * SCORE[(a, b)] for a, b in product((0, 1), repeat=2)}


def measure(program: Callable[[Any], Population[Word]]) -> Measure:
    """E[sum_i w_i 1{x_i = x}] of every x."""
    found: Measure = {}
    for probability, population in outcomes(program):
        for item, log_weight in zip(population.items, population.log_weights.tolist(), strict=True):
            found[item] = found.get(item, 0.0) + probability * math.exp(log_weight)
    return {item: mass for item, mass in found.items() if mass > 0}


def agrees(found: Measure, expected: Measure) -> bool:
    items = found.keys() | expected.keys()
    return all(abs(found.get(item, 0.0) - expected.get(item, 0.0)) < 1e-9 for item in items)


def cells(p: np.ndarray, n: int) -> list[np.ndarray]:
    """Where the outcome of any scheme may change as one of its uniform numbers moves."""
    cumulative = np.cumsum(p)
    rest = n * p - np.floor(n * p)
    return [cumulative, (n * cumulative) % 1.0, np.cumsum(rest) / max(rest.sum(), 1e-300)]


def enumerable(own: Scheme) -> Scheme:
    def drawn(p: np.ndarray, n: int, rng: Any) -> np.ndarray:
        rng.expect(*cells(p, n))
        return own(p, n, rng)

    return drawn


@pytest.mark.paper("1711.03219")
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("weights", [(1, 2, 3), (0, 5, 1), (4, 4, 4), (1, 0, 0), (1, 9)])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_scheme_gives_n_p_copies_on_average(name: str, weights: tuple[int, ...], n: int) -> None:
    p = np.array(weights) / sum(weights)
    copies, total = np.zeros(len(p)), 0.0
    for probability, chosen in outcomes(lambda rng: enumerable(SCHEMES[name])(p, n, rng)):
        assert len(chosen) == n
        total += probability
        copies += probability * np.bincount(chosen, minlength=len(p))
    assert total == pytest.approx(1)
    assert copies == pytest.approx(n * p, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(sum), st.integers(1, 30), st.integers(0, 9))
def test_schemes_stay_near_n_p(raw: list[float], n: int, seed: int) -> None:
    p = np.array(raw) / sum(raw)
    for name, own in SCHEMES.items():
        chosen = own(p, n, np.random.default_rng(seed))
        copies = np.bincount(chosen, minlength=len(p))
        assert len(chosen) == n and (copies[p == 0] == 0).all() and (np.diff(chosen) >= 0).all()
        if name == "systematic":
            assert (np.abs(copies - n * p) < 1 + 1e-9).all()
        if name == "stratified":
            assert (np.abs(copies - n * p) < 2 + 1e-9).all()
        if name == "residual":
            assert (copies >= np.floor(n * p)).all()


@pytest.mark.paper("1711.03219")
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("n", [1, 2])
def test_smc_keeps_the_target(name: str, n: int) -> None:
    def program(rng: Any) -> Population[Word]:
        population = advance(spawn(n, ()), grow, rng)
        population = resample(population, rng, scheme=enumerable(SCHEMES[name]))
        return advance(population, grow, rng)

    assert agrees(measure(program), TARGET)


BLOCKS: dict[str, Callable[[Population[Word], Any], Population[Word]]] = {
    "resample": lambda population, rng: resample(population, rng, scheme=enumerable(SCHEMES["systematic"])),
    "fewer": lambda population, rng: resample(population, rng, n=1, scheme=enumerable(SCHEMES["residual"])),
    "if uneven": lambda population, rng: (
        resample(population, rng, scheme=enumerable(SCHEMES["multinomial"])) if population.ess < 1.9 else population
    ),
    "merge": lambda population, rng: merge(population),
    "prune": lambda population, rng: prune(population),
    "pool": lambda population, rng: pool([population, population]),
    "pick": lambda population, rng: _picked(population, rng),
}


def _picked(population: Population[Word], rng: Any) -> Population[Word]:
    if population.log_total == -math.inf:
        return Population((), np.zeros(0))
    rng.expect(*cells(population.probabilities, 1))
    item, log_weight = pick(population, rng)
    return Population((item,), np.array([log_weight]))


@pytest.mark.paper("1711.03219")
@given(st.lists(st.sampled_from(sorted(BLOCKS)), max_size=2), st.lists(st.sampled_from(sorted(BLOCKS)), max_size=2))
@settings(max_examples=40)
def test_any_pipeline_of_blocks_keeps_the_target(between: list[str], after: list[str]) -> None:
    def program(rng: Any) -> Population[Word]:
        population = advance(spawn(2, ()), grow, rng)
        for name in between:
            population = BLOCKS[name](population, rng)
        population = advance(population, grow, rng)
        for name in after:
            population = BLOCKS[name](population, rng)
        return population

    if between.count("pool") + after.count("pool") < 2:
        assert agrees(measure(program), TARGET)


INVALID: dict[str, Callable[[Population[Word]], Population[Word]]] = {
    "normalise": lambda population: (
        Population(population.items, population.log_weights - population.log_total)
        if population.log_total > -math.inf
        else population
    ),
    "best": lambda population: Population(
        (population.items[int(population.log_weights.argmax())],), np.array([population.log_total])
    ),
    "drop duplicates": lambda population: Population(
        tuple(dict.fromkeys(population.items)),
        np.array([population.log_weights[population.items.index(item)] for item in dict.fromkeys(population.items)]),
    ),
    "stop when even": lambda population: Population((), np.zeros(0)) if population.ess > 1.9 else population,
}


@pytest.mark.paper("1711.03219")
@pytest.mark.parametrize("name", INVALID)
def test_invalid_blocks_are_seen(name: str) -> None:
    def program(rng: Any) -> Population[Word]:
        population = INVALID[name](advance(spawn(2, ()), grow, rng))
        return advance(population, grow, rng)

    assert not agrees(measure(program), TARGET)


@pytest.mark.paper("1711.03219")
@pytest.mark.parametrize("between", [[], ["resample"], ["merge", "resample"]])
def test_twists_telescope_to_the_last(between: list[str]) -> None:
    def program(rng: Any) -> Population[Word]:
        step = twisted(grow, log_psi)
        population = advance(weigh(spawn(2, ()), log_psi), step, rng)
        for name in between:
            population = BLOCKS[name](population, rng)
        return advance(population, step, rng)

    assert agrees(measure(program), {word: mass * PSI[word] for word, mass in TARGET.items()})


def test_one_particle_is_importance_sampling() -> None:
    for seed in range(10):

        def program(rng: Any, often: bool) -> Population[Word]:
            population = advance(spawn(1, ()), _plain, rng)
            population = resample(population, np.random.default_rng(5)) if often else population
            return advance(population, _plain, rng)

        with_it, without = (program(np.random.default_rng(seed), often) for often in (True, False))
        assert with_it.items == without.items
        assert with_it.log_weights == pytest.approx(without.log_weights)


def _plain(word: Word, rng: Any) -> tuple[Word, float]:
    longer = (*word, int(rng.random() > P[word][0]))
    return longer, log(SCORE[longer] + 0.1)


def test_without_scores_the_weights_sum_to_1() -> None:
    rng = np.random.default_rng(0)
    population = spawn(7, ())
    for _ in range(2):
        population = resample(advance(population, lambda word, r: (_plain(word, r)[0], 0.0), rng), rng)
    assert population.log_total == pytest.approx(0, abs=1e-12) and population.ess == pytest.approx(7)


@pytest.mark.paper("1711.03219")
def test_nothing_stays_nothing() -> None:
    dead = Population(((0,), (1,)), np.array([-math.inf, -math.inf]))
    rng = np.random.default_rng(0)
    assert dead.log_total == -math.inf and dead.ess == 0 and not dead.probabilities.any()
    gone = resample(dead, rng)
    assert len(gone) == 0 and gone.log_total == -math.inf and gone.ess == 0
    assert len(resample(gone, rng)) == len(prune(dead)) == len(merge(gone)) == 0
    assert advance(dead, _plain, rng).items == dead.items
    assert weigh(dead, lambda word: math.nan).log_total == -math.inf
    with pytest.raises(ValueError, match="nothing to pick"):
        pick(dead, rng)


def test_equal_items_are_merged_by_the_sum_of_their_weights() -> None:
    merged = merge(Population(("a", "b", "a"), np.log([0.1, 0.5, 0.2])))
    assert merged.items == ("a", "b") and np.exp(merged.log_weights) == pytest.approx([0.3, 0.5])


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 particle"):
        spawn(0, ())
    with pytest.raises(ValueError, match="as many weights"):
        Population(("a",), np.zeros(2))
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            Population(("a",), np.array([wrong]))
    with pytest.raises(ValueError, match="got no population"):
        pool([])
    with pytest.raises(ValueError, match="systematic, stratified"):
        scheme("lottery")

"""Rules of acceptance at one node: closed forms, the optimum of transport, and limits."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import chi2
from torch import Tensor

from nextoken.speculate.acceptance import (
    Acceptance,
    Candidates,
    Follow,
    KSequential,
    Recursive,
    Typical,
    best_acceptance,
    residual,
    smallest_rho,
)

FALSE_ALARM = 1e-4


def law(size: int, seed: int, *, zeros: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch._standard_gamma(torch.full((size,), 0.7, dtype=torch.float64), generator=generator)
    weights[torch.rand(size, generator=generator) < zeros] = 0
    weights[int(torch.randint(size, (), generator=generator))] += 0.1
    return weights / weights.sum()


def without_replacement(q: Tensor, k: int, source: random.Random) -> list[int]:
    left, found = q.tolist(), list[int]()
    for _ in range(min(k, sum(x > 0 for x in left))):
        (token,) = source.choices(range(len(left)), left)
        found.append(token)
        left[token] = 0.0
    return found


def emitted(rule: Acceptance, p: Tensor, q: Tensor, k: int, draws: int, *, replacement: bool) -> Counter[int]:
    source = random.Random(3)
    counts: Counter[int] = Counter()
    for _ in range(draws):
        independent = source.choices(range(len(q)), q.tolist(), k=k)
        tokens = independent if replacement else without_replacement(q, k, source)
        counts[rule(p, Candidates(tokens, q, replacement), source.random)] += 1
    return counts


def assert_law(counts: Counter[int], p: Tensor) -> None:
    draws = sum(counts.values())
    assert all(p[token] > 0 for token in counts), "an impossible token was drawn"
    support = [token for token in range(len(p)) if p[token] * draws >= 5]
    statistic = sum((counts[token] - float(p[token]) * draws) ** 2 / (float(p[token]) * draws) for token in support)
    assert statistic < chi2.isf(FALSE_ALARM, len(support) - 1)


@pytest.mark.paper("2402.14160")
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(("size", "k", "seed", "zeros"), [(4, 2, 1, 0), (5, 3, 2, 0), (5, 2, 4, 0.4), (4, 3, 6, 0.3)])
def test_recursive_rejection_keeps_the_law(size: int, k: int, seed: int, zeros: float, replacement: bool) -> None:
    p, q = law(size, seed, zeros=zeros), law(size, seed + 100, zeros=zeros)
    assert_law(emitted(Recursive(), p, q, k, 8000, replacement=replacement), p)


@pytest.mark.paper("2402.14160")
def test_every_token_tried_leaves_nothing_to_reject() -> None:
    p, q = law(4, 8), law(4, 9)
    source = random.Random(0)
    for _ in range(300):
        tokens = without_replacement(q, 4, source)
        assert Recursive()(p, Candidates(tokens, q), source.random) in tokens


def test_an_impossible_guess_never_stands() -> None:
    p, q = torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 0.0]).double()
    for rule in (Recursive(), KSequential()):
        assert rule(p, Candidates([0], q), lambda: 0.0) == 1


def test_guesses_that_were_chosen_are_followed() -> None:
    p = law(5, 3)
    for rule in (Recursive(), KSequential(), Follow()):
        assert rule(p, Candidates([1, 2]), lambda: 0.999999) == int((p > 0).nonzero()[-1])


@pytest.mark.paper("2310.15141")
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10_000), st.sampled_from([0.0, 0.4]))
@settings(max_examples=80)
def test_k_sequential_selection_has_the_law_of_the_target(size: int, k: int, seed: int, zeros: float) -> None:
    p, q = law(size, seed, zeros=zeros), law(size, seed + 1, zeros=zeros)
    rho = smallest_rho(p, q, k)
    assert 1 <= rho <= k
    common = torch.minimum(q, p / rho)
    beta = float(common.sum())
    accepted = 1 - (1 - beta) ** k
    # Of each guess: stands as y with common(y), goes on with 1 - beta; after k of them the residual.
    total = common * (accepted / beta if beta else 0.0) + (1 - accepted) * residual(p, q, k, rho)
    torch.testing.assert_close(total, p, atol=1e-9, rtol=0)
    best = best_acceptance(p, q, k)
    assert (1 - (1 - 1 / k) ** k) * best - 1e-9 <= accepted <= best + 1e-9


@pytest.mark.paper("2310.15141")
def test_k_sequential_selection_draws_what_its_formulas_say() -> None:
    p, q = law(4, 21), law(4, 22)
    assert_law(emitted(KSequential(), p, q, 3, 8000, replacement=True), p)
    # A threshold of 1 for every guess is no coupling: the law test sees it.
    rule = KSequential()
    wrong = Counter[int]()
    source = random.Random(4)
    for _ in range(8000):
        tokens = source.choices(range(4), q.tolist(), k=3)
        stands = next((t for t in tokens if source.random() * float(q[t]) < float(p[t])), None)
        wrong[stands if stands is not None else rule(p, Candidates([], q), source.random)] += 1
    with pytest.raises(AssertionError):
        assert_law(wrong, p)


@pytest.mark.paper("2310.15141")
@pytest.mark.parametrize(("size", "k", "seed"), [(3, 1, 0), (3, 2, 1), (4, 2, 2), (3, 3, 3), (4, 3, 4)])
def test_the_best_acceptance_is_the_optimum_of_transport(size: int, k: int, seed: int) -> None:
    p, q = law(size, seed), law(size, seed + 50)
    drafts = list(itertools.product(range(size), repeat=k))
    mass = [float(np.prod([float(q[x]) for x in draft])) for draft in drafts]
    gain = [-float(y in draft) for draft in drafts for y in range(size)]
    rows = np.zeros((len(drafts) + size, len(drafts) * size))
    for i in range(len(drafts)):
        rows[i, i * size : (i + 1) * size] = 1
    for y in range(size):
        rows[len(drafts) + y, y::size] = 1
    found = linprog(gain, A_eq=rows, b_eq=[*mass, *p.tolist()], bounds=(0, 1))
    assert best_acceptance(p, q, k) == pytest.approx(-found.fun, abs=1e-7)
    if k == 1:
        assert best_acceptance(p, q, 1) == pytest.approx(float(torch.minimum(p, q).sum()))


@pytest.mark.paper("2211.17192")
def test_one_guess_makes_all_drawn_rules_the_same() -> None:
    p, q = law(6, 11), law(6, 12)
    for number in range(200):
        token = random.Random(number).choices(range(6), q.tolist())[0]
        results = {
            rule(p, Candidates([token], q, replacement), random.Random(number).random)
            for rule in (Recursive(), KSequential())
            for replacement in (False, True)
        }
        assert len(results) == 1


def test_k_sequential_selection_refuses_guesses_without_replacement() -> None:
    with pytest.raises(ValueError, match="independent"):
        KSequential()(law(3, 1), Candidates([0, 1], law(3, 2)), lambda: 0.5)


@pytest.mark.paper("2401.10774")
def test_typical_acceptance_takes_the_first_plausible_guess() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).double()
    bar = 0.09 * float((-torch.special.entr(p).sum()).exp())
    assert bar < 0.05
    assert Typical()(p, Candidates([3, 0]), lambda: 0.0) == 3
    strict = Typical(epsilon=0.2, delta=1.0)
    assert strict(p, Candidates([3, 2, 1]), lambda: 0.0) == 1
    assert strict(p, Candidates([3, 2]), lambda: 0.99) == 3  # drawn from p after all
    assert not strict.lossless
    assert Recursive().lossless and KSequential().lossless and Follow().lossless

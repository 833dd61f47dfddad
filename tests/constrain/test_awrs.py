"""AWRS: its weights by enumeration of all orders, its limits, and how few tests it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from chance import Chance, outcomes
from nextoken.constrain import AWRS, NextToken, Place
from nextoken.constrain.awrs import Urn, geometric, recursive
from nextoken.model.vocab import Vocab
from nextoken.testing import check_properly_weighted


class Set(Place):
    """Allows some tokens of a vocabulary of numbers; a mask of it is never made."""

    def __init__(self, allowed: Sequence[bool]) -> None:
        self.c, self.asked = allowed, 0

    def advance(self, data: bytes) -> Place | None:
        self.asked += 1
        return self if self.c[int(data)] else None

    @property
    def is_complete(self) -> bool:
        raise AssertionError("there is no end token to ask about")

    def allowed(self, vocab: Vocab) -> torch.Tensor:
        raise AssertionError("AWRS made a whole mask")


def next_token(p: Sequence[float] | np.ndarray, c: Sequence[bool]) -> NextToken:
    vocab = Vocab([str(i).encode() for i in range(len(p))])
    return NextToken(np.log(np.asarray(p, dtype=float)), Set(c), vocab)


class Enumerated(Urn):
    """An urn that draws what it is told."""

    def __init__(self, p: Sequence[float], chance: Chance) -> None:
        super().__init__(np.array(p), np.cumsum(p), chance)
        self.chance, self.out = chance, set[int]()

    def draw(self) -> int:
        mass = [0.0 if i in self.out else p for i, p in enumerate(self._probs)]
        return self.chance.choose([m / sum(mass) for m in mass])

    def remove(self, token: int) -> None:
        self.out.add(token)
        super().remove(token)
        if len(self.out) == len(self._probs):
            self._recent = float(self._cumulative[-1])


class Phantoms:
    """The uniform number of a geometric one, by its value up to `most`."""

    def __init__(self, urn: Enumerated, most: int) -> None:
        self.urn, self.most = urn, most

    def random(self) -> float:
        m = self.urn.removed
        count = self.urn.chance.choose([*(m**k * (1 - m) for k in range(self.most)), m**self.most])
        return 1 - m ** (count + 0.5)


P, C = (0.4, 0.3, 0.2, 0.1), (False, True, False, True)
four = st.lists(st.floats(0.02, 1), min_size=4, max_size=4).map(lambda raw: [x / sum(raw) for x in raw])
masks = st.lists(st.booleans(), min_size=4, max_size=4)


def mean(program: Any, size: int) -> np.ndarray:
    found = np.zeros(size)
    for probability, (token, log_weight) in outcomes(program):
        if log_weight > -math.inf:
            found[token] += probability * math.exp(log_weight)
    return found


@pytest.mark.paper("2504.05410")
def test_recursive_over_all_orders() -> None:
    """All 24 orders with their Plackett-Luce probabilities, the weight by the recursion written out."""
    found = np.zeros(4)
    for order in permutations(range(4)):
        chance, rest = 1.0, 1.0
        for token in order:
            chance *= P[token] / rest
            rest -= P[token]
        m, rejected = 1.0, 0.0
        for at, token in enumerate(order):
            q = P[token] / (1 - rejected)
            if C[token]:
                sure = at == 3 or C[order[at + 1]]
                found[token] += chance * (m if sure else m * q)
                break
            m, rejected = m * (1 - q), rejected + P[token]
    assert found == pytest.approx([0, 0.3, 0, 0.1])
    ours = mean(lambda chance: recursive(Enumerated(P, chance), next_token(P, C)), 4)
    assert ours == pytest.approx(found)


@pytest.mark.paper("2504.05410")
@given(four, masks, st.sampled_from([math.inf, 1, 2, 3, 4]))
def test_recursive_is_properly_weighted(p: list[float], c: list[bool], most: float) -> None:
    ours = mean(lambda chance: recursive(Enumerated(p, chance), next_token(p, c), max_rejects=most), 4)
    assert ours == pytest.approx(np.array(p) * c, abs=1e-9)


@pytest.mark.paper("2504.05410")
@given(four, masks, st.integers(2, 3), st.integers(1, 3))
def test_geometric_is_properly_weighted(p: list[float], c: list[bool], accepts: int, most: int) -> None:
    p, c = [p[0], p[1], 1 - p[0] - p[1]], c[:3]

    def program(chance: Chance) -> tuple[int, float]:
        urn = Enumerated(p, chance)
        return geometric(urn, next_token(p, c), Phantoms(urn, most), accepts=accepts, max_rejects=most)

    assert mean(program, 3) == pytest.approx(np.array(p) * c, abs=1e-9)


@pytest.mark.paper("2504.05410")
@pytest.mark.parametrize(
    "kernel",
    [
        AWRS(),
        AWRS("recursive"),
        AWRS("geometric"),
        AWRS(max_accepts=4),
        AWRS("recursive", max_rejects=2),
        AWRS("geometric", max_rejects=2),
    ],
    ids=str,
)
def test_awrs_passes_the_public_proof(kernel: AWRS) -> None:
    check_properly_weighted(kernel, draws=1500)


def test_auto_is_the_choice_of_the_library() -> None:
    peaked, flat = next_token([0.7, 0.2, 0.1], [True] * 3), next_token([0.6, 0.3, 0.1], [True] * 3)
    assert AWRS()._is_geometric(peaked) and not AWRS()._is_geometric(flat)
    assert AWRS(max_accepts=3)._is_geometric(flat) and not AWRS("recursive")._is_geometric(peaked)


@pytest.mark.parametrize("variant", ["recursive", "geometric"])
def test_without_a_constraint_the_weight_is_1(variant: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        draw = AWRS(variant)(next_token(P, [True] * 4), rng)
        assert draw.log_weight == pytest.approx(0, abs=1e-12) and draw.checks <= 2


@pytest.mark.parametrize("variant", ["recursive", "geometric"])
def test_nothing_allowed_ends_and_says_so(variant: Any) -> None:
    here = next_token(np.full(500, 0.002), [False] * 500)
    draw = AWRS(variant)(here, np.random.default_rng(0))
    assert draw.is_dead and draw.checks == 500
    capped = AWRS(variant, max_rejects=7)(next_token(np.full(500, 0.002), [False] * 500), np.random.default_rng(0))
    assert capped.is_dead and capped.checks <= 7


def test_a_single_allowed_token_is_found_however_improbable() -> None:
    p = np.full(300, 1.0)
    p[123] = 1e-14
    for variant in ("recursive", "geometric"):
        draw = AWRS(variant)(next_token(p, [i == 123 for i in range(300)]), np.random.default_rng(1))  # type: ignore[arg-type]
        assert draw.token == 123 and -math.inf < draw.log_weight < -20
    # The recursive weight of the only allowed token is certain: what is left when it comes last is it alone.
    recursed = [
        AWRS("recursive")(next_token(p, [i == 123 for i in range(300)]), np.random.default_rng(seed)).log_weight
        for seed in range(5)
    ]
    assert recursed == pytest.approx([math.log(1e-14 / 299)] * 5, rel=1e-3)


@pytest.mark.paper("2504.05410")
def test_tests_do_not_grow_with_the_vocabulary() -> None:
    """Z = 1/4 whatever V is: the mean number of tests stays the same, and no mask is ever made."""
    rng = np.random.default_rng(0)
    means = []
    for size in (40, 400, 4000):
        c = [i % 4 == 0 for i in range(size)]
        here = [next_token(np.full(size, 1 / size), c) for _ in range(200)]
        spent = [AWRS()(token, rng).checks for token in here]
        assert sum(spent) == sum(token.place.asked for token in here)  # type: ignore[attr-defined]
        means.append(np.mean(spent))
    # 1/Z draws to the first accept and one more: 5; standard error 0.2.
    assert all(4 < spent < 6 for spent in means)


@pytest.mark.paper("2504.05410")
def test_tests_grow_with_the_divergence() -> None:
    """With p peaked on forbidden tokens, what grows is log 1/Z, not 1/Z, which rejection with replacement needs."""
    rng = np.random.default_rng(0)
    for power in (2, 6, 10):
        p = np.array([2.0**-i for i in range(1, power + 1)] + [2.0**-power])
        c = [False] * power + [True]
        spent = np.mean([AWRS("recursive")(next_token(p, c), rng).checks for _ in range(200)])
        assert spent <= power + 1


def test_an_urn_gives_what_is_left_by_its_probability() -> None:
    """Chi-square at a false-alarm rate of 1e-4, before and after what was put aside is taken out."""
    p = np.array([0.05, 0.3, 0.0, 0.25, 0.15, 0.25])
    for aside in ([], [0], [1, 0], [1, 3, 4]):
        urn = Urn(p, np.cumsum(p), np.random.default_rng(len(aside)))
        for token in aside:
            urn.remove(token)
        expected = p.copy()
        expected[aside] = 0
        assert urn.left == pytest.approx(expected.sum())
        counts = np.bincount([urn.draw() for _ in range(4000)], minlength=6)
        kept = expected > 0
        assert counts[~kept].sum() == 0
        assert chisquare(counts[kept], 4000 * expected[kept] / expected.sum()).pvalue > 1e-4


@given(st.lists(st.floats(1e-12, 1), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_an_urn_knows_what_is_left_to_full_precision(raw: list[float], shuffle: Any) -> None:
    p = np.array(raw) / sum(raw)
    order = list(range(len(p)))
    shuffle.shuffle(order)
    urn = Urn(p, np.cumsum(p), np.random.default_rng(0))
    for at, token in enumerate(order[:-1]):
        urn.remove(token)
        assert urn.left == pytest.approx(math.fsum(p[order[at + 1 :]]), rel=1e-9)
    urn.remove(order[-1])
    assert urn.left == 0


@pytest.mark.parametrize("settings", [{"variant": "warped"}, {"max_accepts": 1}, {"max_rejects": 0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        AWRS(**settings)

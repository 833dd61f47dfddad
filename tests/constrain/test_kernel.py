"""Kernels: E[w 1{x}] = p(x) c(x) by enumeration of all that chance can do, and what they spend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chance import outcomes
from nextoken.constrain import AWRS, End, FullMask, Kernel, NextToken, Place, Proposal, Rejection
from nextoken.model.vocab import Vocab
from nextoken.testing import check_properly_weighted

P, C = (0.4, 0.3, 0.2, 0.1), (False, True, False, True)


class Tokens(Place):
    """Allows a set of single tokens a, b, ...; counts what it is asked."""

    def __init__(self, allowed: Sequence[bool]) -> None:
        self.c, self.asked, self.masks = tuple(allowed), 0, 0

    def advance(self, data: bytes) -> Place | None:
        self.asked += 1
        return self if self.c[data[0] - ord("a")] else None

    @property
    def is_complete(self) -> bool:
        return self.c[-1]

    def allowed(self, vocab: Vocab) -> torch.Tensor:
        self.masks += 1
        return torch.tensor(self.c)


def next_token(p: Sequence[float] = P, c: Sequence[bool] = C) -> NextToken:
    size = len(p)
    vocab = Vocab([*(bytes([ord("a") + i]) for i in range(size - 1)), b""], eos_ids=[size - 1])
    return NextToken(torch.tensor(p, dtype=torch.float64).log(), Tokens(c), vocab)


def law(kernel: Kernel, p: Sequence[float], c: Sequence[bool], *bounds: Any) -> np.ndarray:
    """E[w 1{x}] of every x, exactly."""

    def program(chance: Any) -> Any:
        chance.expect(*bounds)
        return kernel(next_token(p, c), chance)

    found, total = np.zeros(len(p)), 0.0
    for probability, draw in outcomes(program):
        total += probability
        if not draw.is_dead:
            found[draw.token] += probability * math.exp(draw.log_weight)
    assert total == pytest.approx(1)
    return found


distributions = st.lists(st.floats(0.05, 1), min_size=3, max_size=5).map(lambda raw: [x / sum(raw) for x in raw])


@given(distributions, st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_mask_is_properly_weighted(p: list[float], c: list[bool]) -> None:
    c = c[: len(p)]
    mass = np.array(p) * c
    bounds = np.cumsum(mass) / max(mass.sum(), 1e-9)
    assert law(FullMask(), p, c, bounds) == pytest.approx(mass, abs=1e-9)


@given(distributions, st.lists(st.booleans(), min_size=5, max_size=5), st.integers(2, 3), st.integers(1, 3))
def test_rejection_is_properly_weighted(p: list[float], c: list[bool], accepts: int, most: int) -> None:
    p = [p[0], p[1], 1 - p[0] - p[1]]
    kernel = Rejection(accepts=accepts, max_rejects=most)
    assert law(kernel, p, c[:3], np.cumsum(p)) == pytest.approx(np.array(p) * c[:3], abs=1e-9)


def test_the_end_is_properly_weighted_for_end_tokens() -> None:
    assert law(End(), P, C) == pytest.approx([0, 0, 0, 0.1])
    assert law(End(), P, (True, True, True, False)) == pytest.approx([0, 0, 0, 0])


@given(distributions, st.lists(st.booleans(), min_size=5, max_size=5), st.floats(0.3, 3))
def test_a_proposal_is_properly_weighted(p: list[float], c: list[bool], temperature: float) -> None:
    c = c[: len(p)]
    q = np.array(p) ** (1 / temperature)
    mass = q * c
    bounds = np.cumsum(mass) / max(mass.sum(), 1e-9)
    kernel = Proposal(FullMask(), f"temperature({temperature})")
    assert law(kernel, p, c, bounds) == pytest.approx(np.array(p) * c, abs=1e-9)


def test_a_proposal_without_change_is_its_kernel() -> None:
    for seed in range(20):
        p = (0.41, 0.29, 0.2, 0.1)
        plain = AWRS()(next_token(p), np.random.default_rng(seed))
        same = Proposal(AWRS(), "temperature(1)")(next_token(p), np.random.default_rng(seed))
        assert (same.token, same.checks) == (plain.token, plain.checks)
        assert same.log_weight == pytest.approx(plain.log_weight)


def test_a_proposal_that_removes_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="leave all of them possible"):
        Proposal(AWRS(), "top_k(2)")(next_token(), np.random.default_rng(0))


@pytest.mark.parametrize(
    "kernel", [FullMask(), Rejection(), Rejection(accepts=5, max_rejects=4), Proposal(AWRS(), "temperature(1.3)")]
)
def test_kernels_pass_the_public_proof(kernel: Kernel) -> None:
    check_properly_weighted(kernel, draws=1000)


def test_more_accepts_scatter_less() -> None:
    rng = np.random.default_rng(0)
    scatter = [
        np.var([math.exp(Rejection(accepts=r)(next_token(), rng).log_weight) for _ in range(800)]) for r in (2, 4, 16)
    ]
    assert scatter[0] > scatter[1] > scatter[2]


def test_nothing_is_tested_twice() -> None:
    here = next_token(c=(False, False, False, True))
    draw = Rejection()(here, np.random.default_rng(0))
    place = here.place
    assert isinstance(place, Tokens) and place.asked <= 3 and draw.checks == here.spent <= 4
    assert FullMask()(here, np.random.default_rng(0)).checks == 4 and place.masks == 1
    assert AWRS()(here, np.random.default_rng(0)).checks == 0


def test_places_follow_tokens() -> None:
    here = next_token()
    assert here.after(1) is here.place and here.after(3) is here.place
    with pytest.raises(ValueError, match="not allowed"):
        here.after(0)


def test_misuse_is_refused() -> None:
    for settings in ({"accepts": 1}, {"max_rejects": 0}):
        with pytest.raises(ValueError, match="accepts >= 2"):
            Rejection(**settings)
    with pytest.raises(ValueError, match=r"must be \[4\]"):
        NextToken(torch.zeros(5), Tokens(C), next_token().vocab)

    class Wrong(Kernel):
        def _draw(self, here: NextToken, rng: Any) -> tuple[int, float]:
            return 1, math.nan

    with pytest.raises(ValueError, match="log weight nan"):
        Wrong()(next_token(), np.random.default_rng(0))

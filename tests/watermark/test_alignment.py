"""Alignment: the tables of edits and the sums of blocks against their definitions."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nextoken.watermark import alignment
from nextoken.watermark.alignment import edit_costs, lowest, plain_costs


def edited(costs: np.ndarray, begin: int, gamma: float) -> float:
    """A[k, k] by the recursion of the definition, costs [k, n]."""
    block, n = costs.shape

    @cache
    def best(a: int, b: int) -> float:
        if a == 0 or b == 0:
            return (a + b) * gamma
        matched = best(a - 1, b - 1) + costs[a - 1, (begin + b - 1) % n]
        return min(best(a - 1, b) + gamma, best(a, b - 1) + gamma, matched)

    return best(block, block)


costs_of_blocks = st.tuples(st.integers(1, 5), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float64, (2, *shape), elements=st.floats(-3, 3, width=16))
)


@pytest.mark.paper("2307.15593")
@given(costs_of_blocks, st.sampled_from([0.0, 0.4, 1.0, 5.0]))
def test_edits_cost_what_the_recursion_says(costs: np.ndarray, gamma: float) -> None:
    n = costs.shape[-1]
    expected = [[edited(some, begin, gamma) for begin in range(n)] for some in costs]
    assert edit_costs(costs, gamma) == pytest.approx(np.array(expected))


@pytest.mark.paper("2307.15593")
@pytest.mark.parametrize("gamma", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(4, 9), (6, 7), (8, 5), (7, 30)])
def test_edits_of_random_costs_cost_what_the_recursion_says(shape: tuple[int, int], gamma: float) -> None:
    """Longer blocks than hypothesis tries much: where many matches gain, each token is matched once at most."""
    costs = np.random.default_rng(0).normal(-0.5, size=shape)
    expected = [edited(costs, begin, gamma) for begin in range(shape[1])]
    assert edit_costs(costs, gamma) == pytest.approx(np.array(expected))


def test_edits_are_found_in_portions_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = np.random.default_rng(0).normal(size=(3, 2, 9, 12))
    whole = edit_costs(costs, 0.3)
    monkeypatch.setattr(alignment, "_AT_ONCE", 1)
    assert whole.shape == (3, 2, 12) and (edit_costs(costs, 0.3) == whole).all()
    assert edit_costs(costs[:0], 0.3).shape == (0, 2, 12)


@given(costs_of_blocks, st.data())
def test_blocks_without_edits_are_sums(costs: np.ndarray, data: st.DataObject) -> None:
    length, n = costs.shape[1:]
    block = data.draw(st.integers(1, length))
    expected = [
        [
            [sum(some[begin + s, (place + s) % n] for s in range(block)) for place in range(n)]
            for begin in range(length - block + 1)
        ]
        for some in costs
    ]
    assert plain_costs(costs, block) == pytest.approx(np.array(expected))
    assert lowest(costs, block, math.inf) == pytest.approx(np.array(expected).min((1, 2)))


@given(costs_of_blocks, st.data())
def test_the_lowest_is_over_all_blocks_and_places(costs: np.ndarray, data: st.DataObject) -> None:
    length, n = costs.shape[1:]
    block = data.draw(st.integers(1, length))
    expected = [
        min(edited(some[i : i + block], j, 0.4) for i in range(length - block + 1) for j in range(n)) for some in costs
    ]
    assert lowest(costs, block, 0.4) == pytest.approx(np.array(expected))


@given(costs_of_blocks)
def test_dear_edits_are_none(costs: np.ndarray) -> None:
    """With gamma above half of the range of costs no edit pays, and the cost is the plain one."""
    block = costs.shape[1]
    assert edit_costs(costs, 100.0) == pytest.approx(plain_costs(costs, block)[:, 0], abs=1e-9)
    assert (lowest(costs, block, 0.0) <= lowest(costs, block, 0.4) + 1e-9).all()
    assert (lowest(costs, block, 0.4) <= lowest(costs, block, math.inf) + 1e-9).all()


@given(st.integers(0, 2**32), st.integers(0, 19), st.sampled_from([0.0, 0.2]))
def test_a_token_put_in_costs_two_edits_and_the_match_it_drives_out(seed: int, at: int, gamma: float) -> None:
    """The token itself and the last place of the key are left out, and the last token's match is lost."""
    rng = np.random.default_rng(seed)
    costs = -rng.standard_exponential((20, 40))
    begin = int(rng.integers(40))
    attacked = np.insert(costs, at, -rng.standard_exponential((1, 40)), axis=0)[:20]
    lost = -costs[19, (begin + 19) % 40]
    assert edit_costs(attacked, gamma)[begin] <= plain_costs(costs, 20)[0, begin] + lost + 2 * gamma + 1e-9


def test_blocks_that_do_not_fit_are_refused() -> None:
    costs = np.zeros((4, 8))
    for block in (0, 5):
        with pytest.raises(ValueError, match=f"block of {block} tokens does not fit a text of 4"):
            lowest(costs, block, 0.0)
    for gamma in (-1.0, math.nan):
        with pytest.raises(ValueError, match="at least 0"):
            lowest(costs, 4, gamma)

"""Rows: ragged reductions against a loop over texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import nextoken
from nextoken.model.table import TableModel
from nextoken.scores import Rows

NUMBER = st.floats(-50, 50)
ANY = st.one_of(NUMBER, st.sampled_from([math.nan, math.inf, -math.inf]))


def texts_of(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(numbers, max_size=7), max_size=6)


def laid(texts: list[list[float]]) -> tuple[Rows, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts], dtype=np.int64)]).astype(np.int64)
    values = np.array([value for text in texts for value in text], dtype=np.float64)
    return Rows(SimpleNamespace(row_offsets=offsets)), values  # type: ignore[arg-type]


def by_loop(texts: list[list[float]], reduce: Callable[[list[float]], float], empty: float = math.nan) -> np.ndarray:
    found = []
    for text in texts:
        unknown = any(math.isnan(value) for value in text)
        found.append(empty if not text else math.nan if unknown else reduce(text))
    return np.array(found)


def quantile(values: list[float], q: float) -> float:
    """Linear between order statistics; a weight of 0 takes nothing, of infinities either."""
    ordered, place = sorted(values), q * (len(values) - 1)
    low = math.floor(place)
    parts = [(1 - (place - low), ordered[low]), (place - low, ordered[min(low + 1, len(values) - 1)])]
    if parts[0][1] == parts[1][1]:
        return parts[0][1]
    return sum(weight * value for weight, value in parts if weight)


def lowest(values: list[float], share: float) -> float:
    kept = sorted(values)[: max(1, math.floor(share * len(values) + 1e-9))]
    return sum(kept) / len(kept)


@given(texts_of(ANY))
@example([])
@example([[], [], []])
@example([[], [1.0], [], [2.0, math.nan], []])
def test_reductions_are_loops(texts: list[list[float]]) -> None:
    rows, values = laid(texts)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(rows.sum(values), by_loop(texts, sum, 0.0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            rows.mean(values), by_loop(texts, lambda text: sum(text) / len(text)), rtol=1e-12, atol=1e-12
        )
    np.testing.assert_array_equal(rows.max(values), by_loop(texts, max))
    np.testing.assert_array_equal(rows.min(values), by_loop(texts, min))
    assert rows.counts.tolist() == [len(text) for text in texts]
    assert rows.text.tolist() == [i for i, text in enumerate(texts) for _ in text]


@given(texts_of(ANY), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0])))
@example([[-math.inf, 1.0]], 0.0)
@example([[-math.inf, 1.0]], 0.5)
@example([[-math.inf, 1.0, 2.0]], 0.5)
@example([[1.0, math.inf]], 0.0)
@example([[], [3.0]], 0.3)
def test_quantile_is_a_loop(texts: list[list[float]], q: float) -> None:
    rows, values = laid(texts)
    expected = by_loop(texts, lambda text: quantile(text, q))
    np.testing.assert_allclose(rows.quantile(values, q), expected, rtol=1e-12, atol=1e-12)


@given(texts_of(NUMBER), st.floats(0, 1))
def test_quantile_is_numpys_on_numbers(texts: list[list[float]], q: float) -> None:
    rows, values = laid(texts)
    expected = [np.quantile(text, q) if text else math.nan for text in texts]
    np.testing.assert_allclose(rows.quantile(values, q), expected, rtol=1e-9, atol=1e-9)


@given(texts_of(ANY), st.floats(0.01, 1))
@example([[float(i) for i in range(7)] * 1], 3 / 7)
@example([[], [1.0]], 0.2)
def test_lowest_is_a_loop(texts: list[list[float]], share: float) -> None:
    rows, values = laid(texts)
    with np.errstate(invalid="ignore"):
        expected = by_loop(texts, lambda text: lowest(text, share))
        np.testing.assert_allclose(rows.lowest(values, share), expected, rtol=1e-12, atol=1e-12)


def test_lowest_takes_the_share_that_was_written() -> None:
    """0.29 of 100 is 29, though the product of the two floats is below it."""
    rows, values = laid([[float(i) for i in range(100)]])
    assert rows.lowest(values, 0.29).tolist() == [14.0]


@given(texts_of(NUMBER), st.floats(0.01, 1))
def test_ends_collapse_to_min_max_and_mean(texts: list[list[float]], share: float) -> None:
    rows, values = laid(texts)
    np.testing.assert_array_equal(rows.quantile(values, 0.0), rows.min(values))
    np.testing.assert_array_equal(rows.quantile(values, 1.0), rows.max(values))
    np.testing.assert_allclose(rows.lowest(values, 1.0), rows.mean(values), rtol=1e-12, atol=1e-12)
    assert not (rows.lowest(values, share) > rows.mean(values) + 1e-9).any()


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_a_quantile_out_of_range(q: float) -> None:
    rows, values = laid([[1.0]])
    with pytest.raises(ValueError, match="from 0 to 1"):
        rows.quantile(values, q)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, math.nan])
def test_a_share_out_of_range(share: float) -> None:
    rows, values = laid([[1.0]])
    with pytest.raises(ValueError, match="share"):
        rows.lowest(values, share)


def test_columns_come_in_float64_and_by_text() -> None:
    model = TableModel.random(3, order=1, seed=0)
    signature = nextoken.read(model, ["abc", "", "a"], top=0)
    rows = Rows(signature)
    assert rows["rank"].dtype == rows["logprob"].dtype == np.float64
    assert rows.counts.tolist() == [3, 0, 1]
    assert rows.text.tolist() == [0, 0, 0, 2]
    with pytest.raises(KeyError, match="against="):
        rows["kl"]

"""TableModel against arithmetic done by hand and by enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextoken.model.table import TableModel
from nextoken.testing import check_language_model


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("eos", [False, True])
def test_keeps_the_contract(order: int, eos: bool) -> None:
    proofs = check_language_model(TableModel.random(4, order=order, eos=eos, zeros=0.3, seed=order))
    assert all(proof.skipped is None for proof in proofs)


def test_enumeration_multiplies_the_rows() -> None:
    model = TableModel.given({(): [0.5, 0.3, 0.2], (2,): [0.9, 0.0, 0.1], (0,): [0.1, 0.2, 0.7]}, ["a", "b"], eos=True)
    # <bos> is id 2, <eos> id 3: the rows are p(a), p(b), p(eos).
    strings = model.enumerate(2)
    assert strings[(0, 0)] == pytest.approx(0.9 * 0.1)
    assert strings[(0, 1)] == pytest.approx(0.9 * 0.2)
    assert strings[(0, 3)] == pytest.approx(0.9 * 0.7)
    assert strings[(3,)] == pytest.approx(0.1)
    assert (1, 0) not in strings
    assert sum(strings.values()) == pytest.approx(1)


@given(st.integers(0, 3), st.booleans(), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_enumeration_is_the_law_that_reading_gives(order: int, eos: bool, seed: int) -> None:
    model = TableModel.random(3, order=order, eos=eos, zeros=0.2, seed=seed)
    strings = model.enumerate(4)
    assert sum(strings.values()) == pytest.approx(1, abs=1e-12)
    for string, probability in itertools.islice(strings.items(), 0, None, 7):
        row = [model.vocab.bos_id, *string[:-1]]
        log_probs = model.predict([row]).log_probs()[0]
        read = sum(log_probs[i, token].item() for i, token in enumerate(string))
        assert read == pytest.approx(math.log(probability), abs=1e-9)


def test_a_prefix_conditions_the_enumeration() -> None:
    model = TableModel.random(3, order=2, seed=5)
    whole, rest = model.enumerate(3), model.enumerate(2, prefix=(1,))
    marginal = sum(p for s, p in whole.items() if s[0] == 1)
    for string, probability in rest.items():
        assert probability == pytest.approx(whole[(1, *string)] / marginal)


def test_counts_give_relative_frequencies() -> None:
    model = TableModel.from_counts([[0, 1, 0, 1, 1], [0, 0]], ["a", "b"], order=1)
    assert model.row([0]).exp().tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert model.row([1]).exp().tolist() == pytest.approx([1 / 2, 1 / 2, 0])
    assert model.row().exp().tolist() == pytest.approx([1, 0, 0])


def test_contexts_never_counted_are_uniform() -> None:
    model = TableModel.from_counts([[0]], ["a", "b", "c"], order=1)
    assert model.row([2]).exp().tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_order_zero_forgets_everything() -> None:
    model = TableModel.random(4, order=0, seed=1)
    assert torch.equal(model.row([0, 1]), model.row([3]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.eye(3), "<bos>"),
        (torch.full((3, 3), 0.5), "sum to 1"),
        (torch.ones(2, 3), "every axis 3"),
    ],
)
def test_a_table_that_is_none_is_refused(table: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableModel(table, ["a", "b"])


def test_concentration_and_zeros_do_what_they_say() -> None:
    flat = TableModel.random(6, order=2, concentration=100.0, seed=0)
    peaked = TableModel.random(6, order=2, concentration=0.1, seed=0)
    sparse = TableModel.random(6, order=2, zeros=0.5, seed=0)
    entropy = lambda m: -(m._log_table.exp() * m._log_table.clamp(min=-1e9)).sum(-1).mean()  # noqa: E731
    assert entropy(flat) > 1.75 > 1.0 > entropy(peaked)
    assert 0.4 < (sparse._log_table[:, :6] == float("-inf")).double().mean() < 0.5


def test_digest_tells_tables_apart() -> None:
    assert TableModel.random(3, seed=0).digest == TableModel.random(3, seed=0).digest
    assert TableModel.random(3, seed=0).digest != TableModel.random(3, seed=1).digest

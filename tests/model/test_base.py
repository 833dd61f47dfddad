"""State and LanguageModel: bookkeeping, refusals, and trees by parents."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextoken.model import tree
from nextoken.model.base import ABSENT, TreesNotSupported
from nextoken.model.table import TableModel


@pytest.fixture
def model() -> TableModel:
    return TableModel.random(4, order=2, seed=3)


def test_a_chain_is_kept_as_soon_as_it_is_fed(model: TableModel) -> None:
    state = model.start(2)
    model.extend(state, [[4, 0, 1], [4, 2, ABSENT]])
    assert state.tokens == ((4, 0, 1), (4, 2))
    assert state.lengths == (3, 2)
    assert not state.is_pending


def test_a_tree_waits_for_keep(model: TableModel) -> None:
    state = model.start()
    model.extend(state, [[4]])
    model.extend(state, [[0, 1, 2]], parents=[-1, -1, 0])
    assert state.is_pending and state.tokens == ((4,),)
    for call in (
        lambda: model.extend(state, [[0]]),
        lambda: state.fork([0]),
        lambda: state.rewind(1),
        lambda: state.join(model.start()),
    ):
        with pytest.raises(ValueError, match="keep"):
            call()
    state.keep([0, 2])
    assert state.tokens == ((4, 0, 2),)
    with pytest.raises(ValueError, match="nothing to keep"):
        state.keep([0])


@pytest.mark.parametrize("path", [[1, 2], [2], [0, 1], [5], [0, 2, 2], [-1]])
def test_keep_refuses_what_is_no_path(model: TableModel, path: list[int]) -> None:
    state = model.start()
    model.extend(state, [[4]])
    model.extend(state, [[0, 1, 2]], parents=[-1, -1, 0])
    with pytest.raises(ValueError, match="not a path"):
        state.keep(path)
    state.keep([1])
    assert state.tokens == ((4, 1),)


def test_keep_of_a_chain_keeps_a_beginning(model: TableModel) -> None:
    state = model.start(2)
    model.extend(state, [[4, 0, 1], [4, 2, ABSENT]])
    state.keep([[0], [0, 1]])
    assert state.tokens == ((4,), (4, 2))


def test_keep_refuses_absent_nodes(model: TableModel) -> None:
    state = model.start()
    model.extend(state, [[4]])
    model.extend(state, [[0, ABSENT]], parents=[-1, -1])
    with pytest.raises(ValueError, match="not a path"):
        state.keep([1])


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([[9]], None, "outside the vocabulary"),
        ([[-2]], None, "outside the vocabulary"),
        ([[ABSENT, 1]], None, "end of a chain"),
        ([[0, 1]], [1, -1], "earlier node"),
        ([[0, 1]], [-1, -2], "earlier node"),
        ([[ABSENT, 1]], [-1, 0], "absent"),
        ([[0], [1]], None, r"\[1, n\]"),
        ([[]], None, r"\[1, n\]"),
    ],
)
def test_bad_calls_are_refused(model: TableModel, tokens: list, parents: list | None, message: str) -> None:
    state = model.start()
    with pytest.raises(ValueError, match=message):
        model.extend(state, tokens, parents)
    assert state.tokens == ((),)


def test_a_flat_list_feeds_one_row(model: TableModel) -> None:
    assert model.predict([4, 0, 1]).shape == (1, 3)
    with pytest.raises(ValueError, match=r"\[2, n\]"):
        model.extend(model.start(2), [4, 0])


def test_the_context_is_a_limit_on_depth_not_on_nodes(model: TableModel) -> None:
    model.context_length = 4
    state = model.start()
    model.extend(state, [[4, 0]])
    model.extend(state, [[0, 1, 2, 3, 0]], parents=[-1, -1, 0, 1, -1])
    state.keep([])
    with pytest.raises(ValueError, match="5 tokens do not fit the context of table, 4"):
        model.extend(state, [[0, 1, 2]])


def test_a_recurrent_model_says_so(model: TableModel) -> None:
    model.supports_trees = False
    with pytest.raises(TreesNotSupported, match="chains"):
        model.extend(model.start(), [[4]], parents=[-1])


def test_join_and_fork_carry_tokens(model: TableModel) -> None:
    first, second = model.start(2), model.start()
    model.extend(first, [[4, 0], [4, ABSENT]])
    model.extend(second, [[4, 3, 3]])
    assert first.join(second).fork([2, 0, 0]).tokens == ((4, 3, 3), (4, 0), (4, 0))
    with pytest.raises(ValueError, match="rows"):
        first.fork([2])
    with pytest.raises(ValueError, match="at least one row"):
        first.fork([])


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    return [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(1, 12)))]


@given(trees())
def test_ancestry_and_depth_equal_walking_up(parents: list[int]) -> None:
    rows = torch.tensor([parents])
    depth, sees = tree.depths(rows)[0], tree.ancestry(rows)[0]
    for node in range(len(parents)):
        walk, at = [], node
        while at >= 0:
            walk.append(at)
            at = parents[at]
        assert depth[node] == len(walk) - 1
        assert sees[node].nonzero()[:, 0].tolist() == sorted(walk)
        assert tree.is_path(walk[::-1], parents)

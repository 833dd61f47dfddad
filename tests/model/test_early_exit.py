"""Layers run ahead: the model itself is not changed by it, no layer runs twice, and what was not confirmed is gone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.test_stack import DEPTH, LLAMA, STACKS, V, ids, whole
from torch import Tensor

from nextoken.model.base import ABSENT, State
from nextoken.model.early_exit import EarlyExit
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.testing import check_language_model

EXITS = {family: EarlyExit(stack.model, exit=2) for family, stack in STACKS.items()}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def exit_states(model: HFModel, tokens: Tensor, exit: int) -> Tensor:
    """What transformers gives on from that layer to the next; told apart, the last one would be normed already."""
    seen: list[Tensor] = []
    layer = model.model.model.layers[exit - 1]
    handle = layer.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        model.model(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_it_keeps_the_contract(family: str) -> None:
    check_language_model(EXITS[family], length=8)


def test_it_is_the_model() -> None:
    model, tokens = EXITS["llama"], ids(2, 9)
    close(model.extend(model.start(2), tokens).log_probs(), whole(LLAMA, tokens))
    assert torch.equal(model.predict(tokens).log_probs(), whole(LLAMA, tokens))
    assert (model.digest, model.dtype, model.vocab) == (LLAMA.model.digest, LLAMA.model.dtype, LLAMA.model.vocab)


@pytest.mark.paper("2404.18911")
@pytest.mark.parametrize("family", STACKS)
@pytest.mark.parametrize("exit", [1, DEPTH - 1, DEPTH])
def test_a_split_pass_is_a_whole_pass_and_runs_no_layer_twice(family: str, exit: int) -> None:
    model, tokens = EarlyExit(STACKS[family].model, exit=exit), ids(1, 9)
    state = model.start()
    said = [model.extend(state, tokens[:, :3]).log_probs()]
    for start, end in ((3, 7), (7, 9)):
        # The last token of each piece is left to `extend`.
        found = [model.ahead(state, tokens[:, place : place + 1]) for place in range(start, end - 1)]
        close(torch.cat(found, 1), exit_states(model.stack.model, tokens[:, : end - 1], exit)[:, start:])
        assert state.lengths == (start,)
        assert model.ran_ahead(state) == (tuple(tokens[0, start : end - 1].tolist()),)
        said.append(model.extend(state, tokens[:, start:end]).log_probs())
    close(torch.cat(said, 1), whole(STACKS[family], tokens))
    close(model.exits(state), exit_states(model.stack.model, tokens, exit))
    assert model.layers_run == [9] * DEPTH


class _Told:
    """States beside what they should hold: the kept tokens of each row, and those run ahead."""

    def __init__(self, model: EarlyExit, batch: int) -> None:
        self.model, self.state = model, model.start(batch)
        self.kept: list[list[int]] = [[] for _ in range(batch)]

    def check(self, state: State) -> None:
        """Everything that is remembered is what transformers makes of the tokens."""
        assert [list(row) for row in state.tokens] == self.kept
        exits = self.model.exits(state)
        for row, (kept, ahead) in enumerate(zip(self.kept, self.model.ran_ahead(state), strict=True)):
            text = [*kept, *ahead]
            if text:
                expected = exit_states(self.model.stack.model, torch.tensor([text]), self.model.exit)[0]
                close(exits[row, : len(text)], expected)

    def extend(self, rows: list[list[int]]) -> None:
        width = max(map(len, rows))
        said = self.model.extend(self.state, [[*row, *[ABSENT] * (width - len(row))] for row in rows]).log_probs()
        for number, (kept, row) in enumerate(zip(self.kept, rows, strict=True)):
            kept += row
            if row:
                expected = whole(self.model.stack, torch.tensor([kept]))[0, -len(row) :]
                close(said[number, : len(row)], expected)


@settings(max_examples=12)
@given(st.data())
def test_whatever_happens_a_state_is_what_reading_anew_makes(data: st.DataObject) -> None:
    model = EXITS[data.draw(st.sampled_from(["llama", "mistral"]))]
    told, token = _Told(model, 2), st.integers(2, V - 1)
    told.extend([[3, 4, 5], [6]])
    for _ in range(data.draw(st.integers(2, 6))):
        batch = len(told.kept)
        counts = st.lists(st.integers(0, 3), min_size=batch, max_size=batch).filter(any)
        action = data.draw(st.sampled_from(["ahead", "ahead", "confirm", "confirm", "rewind", "fork", "join", "tree"]))
        if max(map(len, told.kept)) > 30:
            break
        if action == "ahead":
            rows = [[data.draw(token) for _ in range(n)] for n in data.draw(counts)]
            width = max(map(len, rows))
            model.ahead(told.state, [[*row, *[ABSENT] * (width - len(row))] for row in rows])
        elif action == "confirm":
            # A beginning of what is ahead, then other tokens: nothing, a part or all of it is confirmed.
            ahead = model.ran_ahead(told.state)
            rows = [
                [*row[: data.draw(st.integers(0, len(row)))], *(data.draw(token) for _ in range(n))]
                for row, n in zip(ahead, data.draw(counts), strict=True)
            ]
            told.extend(rows)
            assert not any(model.ran_ahead(told.state))
        elif action == "rewind":
            drop = [data.draw(st.integers(0, min(2, len(kept) - 1))) for kept in told.kept]
            told.state.rewind(drop)
            told.kept = [kept[: len(kept) - n] for kept, n in zip(told.kept, drop, strict=True)]
        elif action == "fork":
            rows_kept = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=2))
            told.state = told.state.fork(rows_kept)
            told.kept = [list(told.kept[row]) for row in rows_kept]
        elif action == "join" and batch < 3:
            other = _Told(model, 1)
            other.extend([[7, 8]])
            model.ahead(other.state, [9])
            told.state, told.kept = told.state.join(other.state), told.kept + other.kept
        elif action == "tree":
            model.extend(told.state, [[10, 11, 12]] * batch, [-1, -1, 1])
            told.state.keep([[1, 2]] * batch)
            told.kept = [[*kept, 11, 12] for kept in told.kept]
        told.check(told.state)


def test_a_block_reads_every_exit_state_once_and_again_what_was_replaced() -> None:
    """The block sums the exit states that it sees; its cache holds them as keys."""

    def block(exits: Tensor, call, layer) -> Tensor:  # type: ignore[no-untyped-def]
        keys, _ = layer.update(exits[:, None], exits[:, None])
        n, slots = exits.shape[1], keys.shape[2]
        visible = call.visible
        if visible is None:
            visible = torch.ones(n, slots, dtype=torch.bool).tril(slots - n).expand(len(exits), -1, -1)
        return visible.float() @ keys[:, 0]

    model, tokens = EarlyExit(LLAMA.model, exit=2), ids(2, 8)
    expected = torch.stack([exit_states(LLAMA.model, tokens[row : row + 1], 2)[0].cumsum(0) for row in (0, 1)])
    state = model.start(2)
    first = tokens[:, :4].clone()
    first[1, 2:] = ABSENT
    model.extend(state, first)
    found = model.read_exits(state, block)
    close(found, torch.stack([expected[0, 3], expected[1, 1]]))
    model.ahead(state, [[int(tokens[0, 4]), 5], [int(tokens[1, 2]), ABSENT]])
    model.read_exits(state, block)
    assert model.exits_read == 4 + 2 + 2 + 1
    # Of row 0 the second token ahead is replaced.
    model.extend(state, torch.stack([tokens[0, 4:6], tokens[1, 2:4]]))
    close(model.read_exits(state, block), torch.stack([expected[0, 5], expected[1, 3]]))
    assert model.exits_read == 9 + 1 + 1
    with pytest.raises(ValueError, match="was read already"):
        model.read_exits(state, block)
    # Forked, rewound, and read by another block: from the beginning.
    fork = state.fork([1, 0, 1])
    fork.rewind([1, 3, 0])
    model.extend(fork, [[int(tokens[1, 3])], [int(tokens[0, 3])], [int(tokens[1, 4])]])
    close(model.read_exits(fork, block), torch.stack([expected[1, 3], expected[0, 3], expected[1, 4]]))
    assert model.exits_read == 11 + 3

    def another(exits: Tensor, call, layer) -> Tensor:  # type: ignore[no-untyped-def]
        return block(exits, call, layer)

    close(model.read_exits(fork, another), torch.stack([expected[1, 3], expected[0, 3], expected[1, 4]]))
    assert model.exits_read == 14 + 4 + 4 + 5


def test_misuse_is_told() -> None:
    model = EXITS["llama"]
    for exit in (0, DEPTH + 1):
        with pytest.raises(ValueError, match=f"layers 1 to {DEPTH}"):
            EarlyExit(LLAMA.model, exit=exit)
    with pytest.raises(ValueError, match="another model"):
        model.ahead(EXITS["mistral"].start(), [3])
    with pytest.raises(ValueError, match="another model"):
        model.extend(LLAMA.model.start(), [3])
    state = model.start()
    model.extend(state, [3, 4], [-1, -1])
    with pytest.raises(ValueError, match="cannot run ahead"):
        model.ahead(state, [3])
    state.keep([])
    model.ahead(state, list(range(3, 3 + 60)))
    with pytest.raises(ValueError, match="do not fit the context"):
        model.ahead(state, [3] * 5)
    with pytest.raises(ValueError, match="transformers model is needed"):
        EarlyExit(TableModel.random("abc", order=1, seed=0), exit=1)  # type: ignore[arg-type]


def test_a_fork_has_its_own_tokens_ahead() -> None:
    model = EXITS["llama"]
    state = model.start()
    model.extend(state, [3, 4])
    model.ahead(state, [5])
    fork = state.fork([0])
    model.ahead(fork, [6])
    model.forget_ahead(state)
    assert (model.ran_ahead(state), model.ran_ahead(fork)) == (((),), ((5, 6),))

"""A decoder left at several depths: each exit by hand, tokens that catch up, counts, the contract, and its limits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.test_stack import DEPTH, STACKS, V, ids, random_model
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.model.base import ABSENT
from nextoken.model.exit_counts import ExitCounts
from nextoken.model.hf import HFModel
from nextoken.model.sorted_exits import SortedExits
from nextoken.model.table import TableModel
from nextoken.testing import check_language_model

EXITS = (1, 3, DEPTH)
FAMILIES = ("llama", "mistral", "qwen3")


def mixing(model: HFModel) -> SortedExits:
    """Exits of which each speaks for about a third of random tokens."""
    draft = SortedExits(model, EXITS, thresholds=(1, 1))
    with torch.no_grad():
        first, second, _ = (draft.stack.next(hidden).log_probs() for hidden in draft.states(ids(20, 14, seed=9)))
    sure = first.amax(-1).exp()
    low = float(sure.quantile(2 / 3))
    return draft.at((low, float(second.amax(-1).exp()[sure < low].quantile(0.5))))


DRAFTS = {family: mixing(STACKS[family].model) for family in FAMILIES}
LLAMA = DRAFTS["llama"]


@torch.no_grad()
def by_hand(draft: SortedExits, text: Tensor) -> tuple[list[int], Tensor]:
    """Depth and log-probabilities after each token of a text [n], from the states that transformers returns."""
    network = draft.model.model
    hidden = network(text[None], output_hidden_states=True).hidden_states
    depths, said = [], []
    for place in range(len(text)):
        for depth, threshold in zip(draft.exits, (*draft.thresholds, 0.0), strict=True):
            # Of the last layer transformers returns the normed state.
            state = hidden[depth] if depth == draft.stack.depth else network.model.norm(hidden[depth])
            log_probs = network.lm_head(state[0, place]).log_softmax(-1)
            if float(log_probs.max().exp()) >= threshold and threshold < 1:
                break
        depths.append(depth)
        said.append(log_probs)
    return depths, torch.stack(said)


@pytest.mark.paper("2407.01955")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_is_told_by_the_first_exit_that_is_sure(family: str) -> None:
    draft = DRAFTS[family]
    seen = set[int]()
    for seed in range(4):
        text = ids(1, 12, seed=seed)[0]
        depths, said = by_hand(draft, text)
        found = draft.predict(text[None])
        assert found.depth[0].tolist() == depths
        torch.testing.assert_close(found.log_probs()[0], said, rtol=1e-4, atol=1e-4)
        seen |= set(depths)
    assert seen == set(EXITS)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_the_contract(family: str) -> None:
    draft = DRAFTS[family].at(DRAFTS[family].thresholds)
    assert all(proof.skipped is None for proof in check_language_model(draft, length=14))
    assert min(draft.spent.told) > 0


@pytest.mark.paper("2407.01955")
@settings(max_examples=8)
@given(
    thresholds=st.tuples(*[st.sampled_from([0.0, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0])] * 2),
    cuts=st.lists(st.integers(1, 3), min_size=3, max_size=7),
    seed=st.integers(0, 99),
)
def test_catching_up_late_is_reading_at_once(thresholds: tuple[float, float], cuts: list[int], seed: int) -> None:
    draft, tokens = LLAMA.at(thresholds), ids(2, sum(cuts), seed=seed)
    state, at, said, depths = draft.start(2), 0, [], []
    for n in cuts:
        following = draft.extend(state, tokens[:, at : at + n])
        said.append(following.log_probs())
        depths.append(following.depth)
        at += n
    for row in range(2):
        expected = by_hand(draft, tokens[row])
        assert torch.cat(depths, 1)[row].tolist() == expected[0]
        torch.testing.assert_close(torch.cat(said, 1)[row], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_was_kept_cut_copied_and_joined_it_goes_on_as_if_read_anew(family: str, seed: int) -> None:
    draft, source = DRAFTS[family], random.Random(seed)
    state = draft.start(2)
    for _ in range(9):
        batch = state.batch
        action = source.choice(["chain", "ragged", "tree", "tree", "rewind", "fork", "join"])
        if action in ("chain", "ragged"):
            tokens = ids(batch, source.randint(1, 3), seed=source.randrange(999))
            if action == "ragged":
                tokens[source.randrange(batch), 1:] = ABSENT
            draft.extend(state, tokens)
        elif action == "tree":
            parents = [-1, *(source.randint(-1, node - 1) for node in range(1, 5))]
            draft.extend(state, ids(batch, 5, seed=source.randrange(999)), parents)
            paths = []
            for _ in range(batch):
                path, node = list[int](), source.randint(-1, 4)
                while node >= 0:
                    path.insert(0, node)
                    node = parents[node]
                paths.append(path)
            state.keep(paths)
        elif action == "rewind":
            state.rewind([source.randint(0, min(4, length)) for length in state.lengths])
        elif action == "fork":
            state = state.fork([source.randrange(batch) for _ in range(2)])
        else:
            state = state.join(state.fork([0])).fork([0, batch])
        probe = ids(state.batch, 2, seed=source.randrange(999))
        found, kept = draft.extend(state, probe), state.tokens
        for row, tokens in enumerate(kept):
            depths, said = by_hand(draft, torch.tensor(tokens))
            assert found.depth[row].tolist() == depths[-2:]
            torch.testing.assert_close(found.log_probs()[row], said[-2:], rtol=1e-4, atol=1e-4)
        state.rewind(2)


@pytest.mark.paper("2407.01955")
def test_counts_are_the_layers_that_ran() -> None:
    """Token by token: an exit's layers have read all up to the last token that went there."""
    draft, text = LLAMA.at(LLAMA.thresholds), ids(1, 16, seed=2)
    ran = [0] * DEPTH
    hooks = [
        layer.register_forward_hook(lambda _, inputs, __, at=at: ran.__setitem__(at, ran[at] + inputs[0].shape[1]))
        for at, layer in enumerate(draft.stack.layers)
    ]
    state = draft.start()
    depths = [int(draft.extend(state, text[:, place : place + 1]).depth) for place in range(16)]
    for hook in hooks:
        hook.remove()
    last = [max(place for place, depth in enumerate(depths) if depth >= exit) + 1 for exit in EXITS]
    assert last[1] < 16, "the text should end with tokens that left early"
    assert draft.spent == ExitCounts(
        EXITS,
        tuple(last),
        (16, sum(depth > 1 for depth in depths), sum(depth > 3 for depth in depths)),
        tuple(depths.count(exit) for exit in EXITS),
    )
    assert draft.spent.layers == sum(ran)
    assert draft.spent.heads == sum(draft.spent.judged)
    assert draft.spent.mean_depth == pytest.approx(sum(depths) / 16)


def test_in_a_tree_only_what_is_unsure_and_its_ancestors_go_deeper() -> None:
    draft, nodes = LLAMA.at(LLAMA.thresholds), ids(1, 8, seed=5)
    parents = [-1, 0, 0, 1, 2, 2, 3, 4]
    state = draft.start()
    draft.extend(state, ids(1, 4))
    before, kept = draft.spent, draft.predict(ids(1, 4)).depth[0].tolist()
    spent = draft.spent
    depths = draft.extend(state, nodes, parents).depth[0].tolist()
    for segment, exit in enumerate(EXITS[1:], 1):
        needed = set[int]()
        for node, depth in enumerate(depths):
            while depth >= exit and node >= 0:
                needed.add(node)
                node = parents[node]
        late = 4 - max((place + 1 for place, depth in enumerate(kept) if depth >= exit), default=0)
        assert draft.spent.read[segment] - spent.read[segment] == len(needed) + (late if needed else 0)
    assert before.read[0] == 4


def test_a_threshold_of_nothing_is_the_first_layers_and_one_of_certainty_the_whole_model() -> None:
    text = ids(2, 10)
    shallow, whole = LLAMA.at((0, 0.4)), LLAMA.at((1, 1))
    found = whole.predict(text)
    torch.testing.assert_close(found.log_probs(), LLAMA.model.predict(text).log_probs(), rtol=1e-4, atol=1e-4)
    assert whole.spent == ExitCounts(EXITS, (20, 20, 20), (0, 0, 20), (0, 0, 20))
    found = shallow.predict(text)
    expected = LLAMA.stack.next(LLAMA.states(text)[0]).log_probs()
    torch.testing.assert_close(found.log_probs(), expected, rtol=1e-4, atol=1e-4)
    assert shallow.spent == ExitCounts(EXITS, (20, 0, 0), (20, 0, 0), (20, 0, 0))
    second = LLAMA.at((1, 0))
    assert second.predict(text).depth.unique().tolist() == [3]
    assert second.spent == ExitCounts(EXITS, (20, 20, 0), (0, 20, 0), (0, 20, 0))


def test_judged_logits_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = LLAMA.at((1e-6, 1.0))  # the first exit is asked, and always sure
    said = draft.predict(ids(2, 5))
    expected = said.log_probs()
    monkeypatch.setattr(type(said.head), "logits", lambda *_: pytest.fail("the head was asked again"))
    torch.testing.assert_close(said[0, 2].log_probs()[0, 0], expected[0, 2])
    assert said[[1]].depth.tolist() == [[1] * 5]


def test_long_texts_are_judged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = ids(2, 12)
    expected = LLAMA.predict(text)
    monkeypatch.setattr("nextoken.model._exit_pass._ENTRIES", 3 * V)
    found = LLAMA.predict(text)
    assert torch.equal(found.depth, expected.depth)
    torch.testing.assert_close(found.log_probs(), expected.log_probs(), rtol=1e-4, atol=1e-4)


def test_exits_may_end_below_the_model() -> None:
    draft = SortedExits(LLAMA.model, (1, 2), thresholds=(LLAMA.thresholds[0],))
    assert all(proof.skipped is None for proof in check_language_model(draft))
    assert set(draft.predict(ids(2, 12)).depth.flatten().tolist()) == {1, 2}


# Saving, digests, misuse.


def test_exits_come_back_from_their_folder(tmp_path: Path) -> None:
    LLAMA.save(tmp_path)
    again = SortedExits.load(tmp_path)
    assert (again.exits, again.thresholds, again.digest) == (EXITS, LLAMA.thresholds, LLAMA.digest)
    torch.testing.assert_close(again.predict(ids(1, 8)).log_probs(), LLAMA.predict(ids(1, 8)).log_probs())
    # It is a checkpoint like others.
    assert HFModel.from_pretrained(tmp_path).digest == LLAMA.model.digest
    other = random_model("llama").model
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="another model"):
        SortedExits.load(tmp_path)
    settings_file = tmp_path / "sorted_exits.json"
    record = json.loads(settings_file.read_text())
    del record["settings"]["exits"]
    settings_file.write_text(json.dumps(record))
    with pytest.raises(ModelError, match="'exits' is missing"):
        SortedExits.load(tmp_path)
    with pytest.raises(ModelError, match=r"no sorted_exits\.json"):
        SortedExits.load(tmp_path / "nowhere")


def test_other_thresholds_are_another_model() -> None:
    other = LLAMA.at((0.5, 0.5))
    assert other.digest != LLAMA.digest
    with pytest.raises(ValueError, match="started by another model"):
        other.extend(LLAMA.start(), [[3]])
    with pytest.raises(ValueError, match="same model"):
        other.start().join(LLAMA.start())


def test_misuse_is_told() -> None:
    for exits in ((), (0, 2), (2, 2), (3, 1), (1, DEPTH + 1)):
        with pytest.raises(ValueError, match="exits must be rising"):
            SortedExits(LLAMA.model, exits, thresholds=(0.5,) * (len(exits) - 1))
    for thresholds in ((), (0.5,), (0.5, -0.1), (0.5, float("nan"))):
        with pytest.raises(ValueError, match="need 2 thresholds"):
            LLAMA.at(thresholds)
    with pytest.raises(ValueError, match="transformers model is needed"):
        SortedExits(TableModel.random("abc", order=1, seed=0), (1,), thresholds=())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be taken together"):
        LLAMA.spent + ExitCounts((1,), (0,), (0,), (0,))

"""Values: exact ones against enumeration, networks in files and in memory, and SARSA against exact values."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nextoken.errors import InputError, ModelError, OutputError
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.sarsa import FitStep, LoggedText, Recipe, fit_dead_ends, fit_value, sarsa_targets
from nextoken.model.table import TableModel
from nextoken.model.value import TableValue
from nextoken.model.value_head import HFValue, ValueHead

V = 20


def tokenizer(prefix: str = "w") -> transformers.PreTrainedTokenizerFast:
    words = {"<s>": 0, "</s>": 1, **{f"{prefix}{i}": i for i in range(2, V)}}
    backend = Tokenizer(WordLevel(words, unk_token="<s>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def small(seed: int = 0, **settings: object) -> HFModel:
    config = transformers.LlamaConfig(
        **{
            "vocab_size": V,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "initializer_range": 0.3,
            **settings,
        }
    )
    torch.manual_seed(seed)
    return HFModel(transformers.LlamaForCausalLM(config), tokenizer(), name="small")


def valued(seed: int = 0) -> HFValue:
    value = HFValue.on(small(seed), dropout=0.2)
    torch.manual_seed(seed)
    torch.nn.init.normal_(value.head.outer.weight, std=0.2)
    torch.nn.init.constant_(value.head.outer.bias, -0.5)
    return value


@cache
def dyadic() -> TableModel:
    """Every probability a multiple of 1/4, so that 256 texts of four tokens can hold each as often as it should be."""
    generator = torch.Generator().manual_seed(7)
    table = torch.zeros(5, 5, 5, dtype=torch.float64)
    for context in torch.cartesian_prod(torch.arange(5), torch.arange(5)).tolist():
        tokens = torch.tensor([0, 1, 2, 4])[torch.randperm(4, generator=generator)[:3]]
        table[(*context, tokens)] = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    return TableModel(table, ["a", "b", "c"], eos=True)


def distant(text: tuple[int, ...]) -> float:
    drawn = [token for token in text[1:] if token < 3]
    return -1.0 if len(set(drawn[:1] + drawn[-1:])) > 1 else 0.0


@cache
def exact() -> TableValue:
    return TableValue(dyadic(), distant, length=5)


@cache
def every_text() -> tuple[LoggedText, ...]:
    """The dyadic table's texts, each as often among 256 as its probability says."""
    texts = []
    for drawn, p in dyadic().enumerate(4).items():
        texts += [LoggedText((3, *drawn), 1, distant((3, *drawn)))] * round(256 * p)
    assert len(texts) == 256
    return tuple(texts)


# Exact values.


@given(st.lists(st.integers(0, 2), max_size=3), st.integers(0, 4))
def test_exact_values_are_sums_over_every_ending(begun: list[int], action: int) -> None:
    model = TableModel.random(3, order=2, eos=True, zeros=0.2, seed=5)
    value = TableValue(model, distant, length=5)
    text = (*begun, action)
    if action == 4 or len(text) == 4:
        expected = distant((3, *text))
    else:
        endings = model.enumerate(4 - len(text), prefix=text)
        expected = sum(p * distant((3, *text, *ending)) for ending, p in endings.items())
    assert value.row((3, *begun))[action].item() == pytest.approx(expected, abs=1e-12)


def test_exact_values_follow_trees_and_end_where_texts_end() -> None:
    value = exact()
    state = value.start(2)
    value.extend(state, [[3, 0, 1], [3, 2, ABSENT]])
    tree = value.extend(state, [[1, 2, 0], [4, 0, ABSENT]], parents=[[-1, 0, 0], [-1, -1, -1]])
    torch.testing.assert_close(tree[0, 1], value.row((3, 0, 1, 1, 2)))
    torch.testing.assert_close(tree[1, 1], value.row((3, 2, 0)))
    # A text that ended is worth the same whatever follows.
    assert tree[1, 0].tolist() == [distant((3, 2, 4))] * 5 == value.row((3, 2, 4, 1, 1)).tolist()
    assert value.row((3, 0, 2, 2, 1, 0, 0)).tolist() == [distant((3, 0, 2, 2, 1))] * 5
    state.keep([[0, 2], [1]])
    torch.testing.assert_close(value.extend(state, [[2], [1]])[1, 0], value.row((3, 2, 0, 1)))


def test_rewards_outside_the_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="outside -1"):
        TableValue(dyadic(), lambda text: 1.0, length=3).of((3,))
    with pytest.raises(ValueError, match="length"):
        TableValue(dyadic(), distant, length=1)
    assert TableValue(dyadic(), lambda text: float(len(text)), length=3, low=0, high=9).of((3,)) > 2


# Networks.


def test_a_new_head_knows_nothing_against_any_token() -> None:
    value = HFValue.on(small())
    assert (value.predict([[0, 5, 6]]) == 0).all()
    assert (value.low, value.high, value.vocab.digest) == (-1.0, 0.0, small().vocab.digest)


def test_values_of_single_tokens_are_those_of_the_whole_row() -> None:
    head = valued().head
    hidden = torch.randn(3, 4, 16)
    actions = torch.randint(V, (3, 4))
    torch.testing.assert_close(head.taken(hidden, actions), head(hidden).gather(-1, actions[..., None])[..., 0])


def test_values_are_the_head_on_the_hidden_states_in_chains_and_trees() -> None:
    value = valued()
    ids = torch.tensor([[0, 5, 6, 7], [0, 9, 4, 3]])
    hidden = value.body.model.model(ids).last_hidden_state
    expected = value.head(hidden).detach().clamp(-1, 0)
    torch.testing.assert_close(value.predict(ids), expected)
    torch.testing.assert_close(value.hidden(ids), hidden)
    assert value.hidden(ids).requires_grad and not value.predict(ids).requires_grad
    state = value.start(2)
    pieces = [value.extend(state, ids[:, :1]), value.extend(state, ids[:, 1:])]
    torch.testing.assert_close(torch.cat(pieces, 1), expected)
    state.rewind(3)
    tree = value.extend(state, [[5, 8, 6], [9, 8, 4]], parents=[-1, -1, 0])
    torch.testing.assert_close(tree[:, [0, 2]], expected[:, 1:3])
    assert expected.min() >= -1 and expected.max() <= 0 and expected.std() > 0.1


def test_the_model_it_begins_from_stays_as_it_is() -> None:
    model = small()
    before = model.digest
    value = fit_dead_ends(model, every_text(), recipe=Recipe(epochs=1, rate=1e-2, warm_up=0))
    assert model.digest == before != value.body.digest


def test_a_value_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = valued()
    value.save(tmp_path / "value")
    read = HFValue.load(tmp_path / "value", device="cpu")
    assert read.digest == value.digest and read.name == value.name and read.head.dropout == 0.2
    ids = [[0, 5, 6, 7]]
    torch.testing.assert_close(read.predict(ids), value.predict(ids), rtol=0, atol=0)
    value.save(tmp_path / "value")


def test_a_value_that_was_changed_on_disk_is_refused(tmp_path: Path) -> None:
    where = tmp_path / "value"
    with pytest.raises(ModelError, match=r"no value\.json"):
        HFValue.load(where)
    valued().save(where)
    weights = load_file(where / "value.safetensors")
    save_file({**weights, "outer.bias": weights["outer.bias"] + 1e-3}, where / "value.safetensors")
    with pytest.raises(ModelError, match="not those it was saved with"):
        HFValue.load(where)
    (where / "value.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="no whole value"):
        HFValue.load(where)
    valued().save(where)
    tokenizer("v").save_pretrained(where / "body")
    with pytest.raises(ModelError, match="trained with another vocabulary"):
        HFValue.load(where)
    settings = json.loads((where / "value.json").read_text())
    (where / "value.json").write_text(json.dumps({**settings, "format": 99}))
    with pytest.raises(ModelError, match="format"):
        HFValue.load(where)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        valued().save(tmp_path / "file" / "value")


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="width 8"):
        HFValue(small(), ValueHead(8, V))
    with pytest.raises(ValueError, match="low < high"):
        HFValue(small(), ValueHead(16, V), low=1, high=0)


# SARSA.


def test_targets_by_hand() -> None:
    values = torch.tensor([[-0.1, -0.2, -0.3, -0.4], [-0.5, -0.6, 9.0, 9.0]])
    rewards, last = torch.tensor([-1.0, 0.0]), torch.tensor([3, 1])
    plain = sarsa_targets(values, rewards, last)
    assert plain[0].tolist() == pytest.approx([-0.2, -0.3, -0.4, -1.0])
    assert plain[1, :2].tolist() == pytest.approx([-0.6, 0.0])
    assert sarsa_targets(values, rewards, last, discount=0.5)[0].tolist() == pytest.approx([-0.1, -0.15, -0.2, -1.0])
    half = sarsa_targets(values, rewards, last, trace=0.5)
    third = 0.5 * -0.4 + 0.5 * -1.0
    assert half[0, 2].item() == pytest.approx(third)
    assert half[0, 1].item() == pytest.approx(0.5 * -0.3 + 0.5 * third)


@given(st.integers(1, 6), st.integers(0, 100))
def test_a_full_trace_is_the_reward_at_every_token(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, rewards = torch.randn(3, size, generator=generator), torch.randn(3, generator=generator)
    last = torch.randint(size, (3,), generator=generator)
    targets = sarsa_targets(values, rewards, last, trace=1.0)
    for row in range(3):
        assert targets[row, : int(last[row]) + 1].tolist() == pytest.approx(
            [rewards[row].item()] * (int(last[row]) + 1)
        )


@pytest.mark.paper("2302.14003")
def test_the_fixed_point_of_sarsa_on_logged_texts_is_the_exact_value() -> None:
    """Tabular: texts in the very proportions of the policy, each (s, a) at the mean of its targets."""
    texts = every_text()
    width = max(len(text.tokens) for text in texts) - 1
    last = torch.tensor([len(text.tokens) - 2 for text in texts])
    rewards = torch.tensor([text.reward for text in texts], dtype=torch.float64)
    q: dict[tuple[int, ...], float] = defaultdict(float)
    for _ in range(width):  # what is known moves back by one token a sweep
        values = torch.zeros(len(texts), width, dtype=torch.float64)
        for row, text in enumerate(texts):
            for t in range(len(text.tokens) - 1):
                values[row, t] = q[text.tokens[: t + 2]]
        targets = sarsa_targets(values, rewards, last)
        seen: dict[tuple[int, ...], list[float]] = defaultdict(list)
        for row, text in enumerate(texts):
            for t in range(len(text.tokens) - 1):
                seen[text.tokens[: t + 2]].append(targets[row, t].item())
        q.update({key: sum(found) / len(found) for key, found in seen.items()})
    assert len(q) > 70
    for text, found in q.items():
        assert found == pytest.approx(exact().row(text[:-1])[text[-1]].item(), abs=1e-12)


@pytest.mark.paper("2302.14003")
@pytest.mark.slow
@pytest.mark.parametrize("trace", [0.0, 1.0])
def test_a_network_learns_the_exact_values(trace: float) -> None:
    """Root mean square over the tokens of the log, of which the values spread 0.31."""
    recipe = Recipe(epochs=100, batch=64, rate=3e-3, warm_up=50, trace=trace)
    value = fit_dead_ends(small(hidden_size=32, intermediate_size=64), every_text(), recipe=recipe)
    said, wanted = [], []
    for text in every_text():
        q = value.predict([text.tokens[:-1]])[0]
        said += [q[t, token].item() for t, token in enumerate(text.tokens[1:])]
        wanted += [exact().of(text.tokens[: t + 2]) for t in range(len(text.tokens) - 1)]
    errors = torch.tensor(said) - torch.tensor(wanted)
    assert errors.square().mean().sqrt() < 0.07 < 0.3 < torch.tensor(wanted).std()


def test_each_drawn_token_counts_once_whatever_its_id_or_its_batch() -> None:
    """The id that pads rows is learnt from like others, and given tokens are not."""
    texts = [
        LoggedText((0, 5, 1, 0, 0), 2, -1.0),
        LoggedText((0, 7, 0), 1, 0.0),
        LoggedText((0, 1, 1, 1, 6, 2), 1, 0.0),
    ]
    still = {"epochs": 1, "rate": 1e-12, "warm_up": 0}
    value = valued()
    value.head.dropout = 0.0
    together = fit_value(value, texts, recipe=Recipe(batch=3, **still))[0]
    total = sum(fit_value(value, [text], recipe=Recipe(**still))[0] * (len(text.tokens) - text.given) for text in texts)
    assert together == pytest.approx(total / (3 + 2 + 5), rel=1e-5)
    said = value.predict([texts[0].tokens[:-1]])[0].double()
    taken = [said[t, token].item() for t, token in ((1, 1), (2, 0), (3, 0))]
    by_hand = (taken[0] - taken[1]) ** 2 + (taken[1] - taken[2]) ** 2 + (taken[2] + 1) ** 2
    assert fit_value(value, texts[:1], recipe=Recipe(**still))[0] == pytest.approx(by_hand / 3, rel=1e-4)


class Stopped(Exception):
    pass


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch=32, rate=1e-2, warm_up=3)
    told: list[FitStep] = []
    whole = valued()
    losses = fit_value(whole, every_text(), recipe=recipe, seed=4, on_step=told.append)
    assert [step.step for step in told] == list(range(1, 17)) and {step.steps for step in told} == {16}
    assert tuple(step.loss for step in told) == losses

    def stop(step: FitStep) -> None:
        if step.step == 11:
            raise Stopped

    path = tmp_path / "run.safetensors"
    with pytest.raises(Stopped):
        fit_value(valued(), every_text(), recipe=recipe, seed=4, checkpoint=path, every=5, on_step=stop)
    resumed = valued()
    again: list[FitStep] = []
    found = fit_value(resumed, every_text(), recipe=recipe, seed=4, checkpoint=path, every=5, on_step=again.append)
    assert again[0].step == 11 and found == losses and resumed.digest == whole.digest
    done = valued()
    assert fit_value(done, every_text(), recipe=recipe, seed=4, checkpoint=path) == losses
    assert done.digest == whole.digest
    with pytest.raises(InputError, match="another run"):
        fit_value(valued(), every_text(), recipe=recipe, seed=5, checkpoint=path)
    path.write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read"):
        fit_value(valued(), every_text(), recipe=recipe, seed=4, checkpoint=path)


def test_training_leaves_torch_s_random_numbers_alone() -> None:
    value = valued()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fit_value(value, every_text()[:8], recipe=Recipe(epochs=1))
    assert torch.equal(torch.rand(2), expected)


def test_the_rate_rises_and_falls() -> None:
    recipe = Recipe(rate=1.0, warm_up=4)
    assert [recipe.rate_at(step, 8) for step in range(8)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])
    assert Recipe(rate=1.0, warm_up=500).rate_at(9, 10) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoggedText((0, 5), 2, 0.0), "one drawn"),
        (lambda: Recipe(epochs=0), "epochs"),
        (lambda: Recipe(polyak=0), "polyak"),
        (lambda: Recipe(rate=0), "rate"),
        (lambda: fit_value(valued(), []), "no texts"),
        (lambda: fit_value(valued(), every_text(), every=0), "every"),
        (lambda: fit_value(valued(), [LoggedText((0, V), 1, 0.0)]), "outside the vocabulary"),
        (lambda: fit_value(valued(), [LoggedText((0,) * 30, 1, 0.0)]), "shorten"),
        (lambda: fit_value(valued(), [LoggedText((0, 1), 1, 0.5)]), "bounds"),
        (lambda: fit_dead_ends(small(), [LoggedText((0, 1), 1, -0.5)]), "reward -1"),
        (lambda: fit_dead_ends(small(), [LoggedText((0, 1), 1, 0.0)]), "reward -1"),
    ],
)
def test_misuse_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()

"""Rectification: its caps on every state of a table, its rules against bisection by hand, limits, and misuse."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from nextoken.decode.generate import generate
from nextoken.model.base import LanguageModel
from nextoken.model.hf import HFModel
from nextoken.model.rectified import FLOOR, Rectified, caps, is_dead_end, rectify
from nextoken.model.table import TableModel
from nextoken.model.value import TableValue
from nextoken.model.value_head import HFValue
from nextoken.testing import check_language_model

LENGTH = 6
"""The begin token and five more."""


def undesired(text: tuple[int, ...]) -> float:
    """Harm of two tokens that may lie far apart: an `a` first and a `b` in the end."""
    drawn = [token for token in text[1:] if token < 3]
    return -1.0 if drawn and drawn[0] == 0 and drawn[-1] == 1 else 0.0


@cache
def table(seed: int, zeros: float = 0.0) -> TableModel:
    return TableModel.random(3, order=2, eos=True, concentration=0.5, zeros=zeros, seed=seed)


@cache
def valued(seed: int, zeros: float = 0.0) -> TableValue:
    return TableValue(table(seed, zeros), undesired, length=LENGTH)


def states(model: TableModel, length: int = LENGTH) -> list[tuple[int, ...]]:
    """Every text that is not finished, of tokens that may be drawn."""
    bos = model.vocab.bos_id
    found, level = [], [(bos,)]
    for _ in range(1, length):
        found += level
        level = [(*text, token) for text in level for token in range(bos)]
    return found


def small_hf(seed: int = 0) -> HFModel:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 40)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return HFModel(transformers.LlamaForCausalLM(config), tokenizer, name=f"small{seed}")


def hf_value(seed: int = 1) -> HFValue:
    value = HFValue.on(small_hf(seed))
    torch.manual_seed(seed)
    torch.nn.init.normal_(value.head.outer.weight, std=0.3)
    torch.nn.init.constant_(value.head.outer.bias, -0.5)
    return value


# The contract.


@pytest.mark.parametrize("rule", ["exact", "two_pass", "reweight"])
def test_keeps_the_contract_on_tables(rule: str) -> None:
    for model in (
        Rectified(table(1), valued(1), eps=0.2, rule=rule),
        Rectified(table(2, 0.3), valued(2, 0.3), rule=rule),
    ):
        assert all(proof.skipped is None for proof in check_language_model(model))


def test_keeps_the_contract_with_a_network_for_its_value() -> None:
    model = Rectified(small_hf(), hf_value(), eps=0.1)
    assert all(proof.skipped is None for proof in check_language_model(model))
    plain = small_hf().predict([[0, 5, 7, 9]]).log_probs()
    assert (model.predict([[0, 5, 7, 9]]).log_probs() - plain).abs().max() > 0.1
    nested = Rectified(Rectified(small_hf(), hf_value(2)), hf_value(), rule="two_pass")
    check_language_model(nested)


# The caps hold.


@pytest.mark.paper("2302.14003")
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_the_security_condition_holds_in_every_state_for_every_action(eps: float, zeros: float) -> None:
    """For every x: an action that ends badly with probability >= 1 - x is drawn with probability <= x."""
    bound, dead = 0, 0
    for seed in range(4):
        model, value = table(seed, zeros), valued(seed, zeros)
        safe = Rectified(model, value, eps=eps)
        for text in states(model):
            said = safe.predict([text])[0, -1]
            drawn, base = said.log_probs()[0, 0].exp(), model.row(text[1:]).exp()
            allowed = (1 + value.row(text) - eps).clamp(FLOOR, 1)
            if said.is_dead_end.item():
                dead += 1
                assert allowed[base > 0].sum() < 1
                expected = allowed.masked_fill(base == 0, 0.0)
                torch.testing.assert_close(drawn, expected / expected.sum())
            else:
                assert allowed[base > 0].sum() >= 1
                assert (drawn <= allowed + 1e-12).all()
                bound += int((base > allowed + 1e-9).any())
    assert bound > 20, "the caps bind in many states, so that the test says something"
    assert dead > 0 or zeros == 0


@pytest.mark.paper("2302.14003")
def test_undesired_endings_are_rarer_in_most_states_and_in_all_from_the_start() -> None:
    fell, rose = 0, 0
    for seed in range(6):
        value = valued(seed)
        after = TableValue(Rectified(table(seed), value), undesired, length=LENGTH)
        begin = (table(seed).vocab.bos_id,)
        assert after.of(begin) >= value.of(begin)
        for text in states(table(seed)):
            fell += after.of(text) > value.of(text) + 1e-9
            rose += after.of(text) < value.of(text) - 1e-9
    assert fell > 100 and rose < 0.05 * fell


@pytest.mark.paper("2302.14003")
def test_it_caps_actions_and_not_the_expected_outcome() -> None:
    """The condition may hold and the expected value fall all the same."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([-0.6, -0.65, -0.7])
    capped = rectify(p.log(), caps(q)).exp()
    assert capped.tolist() == pytest.approx([0.4, 0.35, 0.25])
    assert (p @ q).item() == pytest.approx(-0.635) and (capped @ q.double()).item() == pytest.approx(-0.6425)


@pytest.mark.paper("2302.14003")
def test_renormalising_exceeds_the_cap_again_and_the_exact_rule_does_not() -> None:
    p, c = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 1.0, 1.0])
    assert rectify(p, c, rule="two_pass").exp().tolist() == pytest.approx([0.344, 0.492, 0.164], abs=5e-4)
    assert rectify(p, c).exp().tolist() == pytest.approx([0.3, 0.525, 0.175])
    assert rectify(p, c, rule="reweight").exp().tolist() == pytest.approx([0.18 / 0.58, 0.3 / 0.58, 0.1 / 0.58])


def test_a_token_below_its_cap_passes_however_harmful() -> None:
    """A cap is no weight: c = 0.1 leaves p = 0.05 as it is, where reweighting takes nine tenths of it."""
    p, c = torch.tensor([0.05, 0.5, 0.45]).log(), torch.tensor([0.1, 1.0, 1.0])
    for rule in ("exact", "two_pass"):
        torch.testing.assert_close(rectify(p, c, rule=rule), p.double())
    assert rectify(p, c, rule="reweight").exp()[0].item() == pytest.approx(0.005 / 0.955)


@pytest.mark.paper("2302.14003")
def test_with_one_token_to_go_it_is_min_of_k_p_and_one_plus_q() -> None:
    model = table(3)
    reward = {0: -0.9, 1: -0.2, 2: 0.0, 3: 0.0, 4: -0.5}
    value = TableValue(model, lambda text: reward[text[-1]], length=2)
    p = model.row(()).exp().tolist()
    c = [1 + reward[token] for token in range(5)]
    said = Rectified(model, value).predict([[3]]).log_probs()[0, 0].exp().tolist()
    assert said == pytest.approx(bisected(p, c), abs=1e-9)


# The rules, by hand.


def bisected(p: list[float], c: list[float]) -> list[float]:
    """min(k p, c) by bisection on log k, in plain Python; c / sum c where the caps leave no room."""
    room = [cap if x > 0 else 0.0 for x, cap in zip(p, c, strict=True)]
    if sum(room) < 1:
        return [cap / sum(room) for cap in room]

    def capped(log_k: float) -> list[float]:
        return [min(math.exp(log_k) * x, cap) for x, cap in zip(p, c, strict=True)]

    low, high = 0.0, 600.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(capped(middle)) < 1 else (low, middle)
    return capped(high)


def distributions(size: int) -> st.SearchStrategy[list[float]]:
    weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1.0)), min_size=size, max_size=size)
    return weights.filter(any).map(lambda ws: [w / sum(ws) for w in ws])


def values(size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.one_of(st.just(0.0), st.just(-1.0), st.floats(-1, 0)), min_size=size, max_size=size)


@pytest.mark.paper("2302.14003")
@given(distributions(7), values(7), st.floats(0, 1))
def test_exact_is_bisection(p: list[float], q: list[float], eps: float) -> None:
    log_p, cap = torch.tensor(p, dtype=torch.float64).log(), caps(torch.tensor(q, dtype=torch.float64), eps=eps)
    assert rectify(log_p, cap).exp().tolist() == pytest.approx(bisected(p, cap.tolist()), abs=1e-8)


@given(distributions(7), values(7), st.floats(0, 0.5))
def test_uncapped_tokens_keep_their_odds_and_what_moves_is_what_was_removed(
    p: list[float], q: list[float], eps: float
) -> None:
    base = torch.tensor(p, dtype=torch.float64)
    cap = caps(torch.tensor(q, dtype=torch.float64), eps=eps)
    for rule in ("exact", "two_pass"):
        drawn = rectify(base.log(), cap, rule=rule).exp()
        assert drawn.sum().item() == pytest.approx(1)
        assert (drawn[base == 0] == 0).all()
        if is_dead_end(base.log(), cap):
            continue
        if rule == "exact":
            assert (drawn <= cap + 1e-12).all()
            moved, removed = (drawn - base).abs().sum() / 2, (base - cap).clamp(min=0).sum()
            assert moved.item() == pytest.approx(removed.item(), abs=1e-9)
        once = torch.minimum(base, cap) / torch.minimum(base, cap).sum()
        free = (base > 0) & (drawn < cap - 1e-9) & (base < cap) & (once < cap)
        grown = drawn[free] / base[free]
        assert grown.numel() < 2 or (grown.max() / grown.min()).item() == pytest.approx(1, rel=1e-9)
        assert (grown >= 1 - 1e-9).all()


@given(distributions(6), values(6), st.floats(0, 1))
def test_the_other_rules_are_their_formulas(p: list[float], q: list[float], eps: float) -> None:
    log_p = torch.tensor(p, dtype=torch.float64).log()
    c = [min(max(1 + x - eps, FLOOR), 1.0) for x in q]
    cap = caps(torch.tensor(q, dtype=torch.float64), eps=eps)
    assert cap.tolist() == pytest.approx(c, abs=1e-15)
    twice = p
    for _ in range(2):
        clipped = [min(a, b) for a, b in zip(twice, c, strict=True)]
        twice = [x / sum(clipped) for x in clipped]
    assert rectify(log_p, cap, rule="two_pass").exp().tolist() == pytest.approx(twice, abs=1e-9)
    weights = [a * b for a, b in zip(p, c, strict=True)]
    expected = [w / sum(weights) for w in weights]
    assert rectify(log_p, cap, rule="reweight").exp().tolist() == pytest.approx(expected, abs=1e-9)


def test_far_from_even_distributions_and_large_vocabularies_lose_nothing() -> None:
    """Log-probabilities beyond the range of float32, and V of a real model."""
    p = torch.tensor([0.0, -200.0, -201.0, -300.0])
    said = rectify(p, torch.tensor([0.3, 1.0, 1.0, 1.0])).exp()
    total = 1 + math.exp(-1)
    assert said[:3].tolist() == pytest.approx([0.3, 0.7 / total, 0.7 * math.exp(-1) / total])
    generator = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(4 * torch.randn(2, 3, 50_000, generator=generator), -1)
    cap = caps(-(torch.rand(2, 3, 50_000, generator=generator) ** 0.1))
    drawn = rectify(log_p, cap)
    torch.testing.assert_close(drawn.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (drawn.exp() <= cap * (1 + 1e-9)).all() and (log_p.double().exp() > cap).any()


# Limits.


@pytest.mark.parametrize("rule", ["exact", "two_pass", "reweight"])
def test_without_danger_nothing_changes(rule: str) -> None:
    model = table(2, 0.3)
    harmless = Rectified(model, TableValue(model, lambda text: 0.0, length=4), rule=rule)
    for text in states(model, 4):
        said = harmless.predict([text])[0, -1]
        torch.testing.assert_close(said.log_probs()[0, 0], model.row(text[1:]))
        assert not said.is_dead_end.item()


def test_a_set_of_certain_harm_is_shut_out() -> None:
    p = torch.log_softmax(torch.randn(50, generator=torch.Generator().manual_seed(0)), -1)
    q = torch.zeros(50).index_fill(0, torch.arange(10), -1.0)
    for rule in ("exact", "two_pass", "reweight"):
        drawn = rectify(p, caps(q), rule=rule).exp()
        assert (drawn[:10] <= 2 * FLOOR).all()
        torch.testing.assert_close(drawn[10:], torch.softmax(p[10:].double(), -1), atol=1e-5, rtol=1e-5)


def test_with_no_cap_left_every_possible_token_is_as_probable_and_it_is_told() -> None:
    model = table(1, 0.3)
    said = Rectified(model, valued(1, 0.3), eps=1.0).predict([[3, 0, 2], [3, 1, 1]])
    assert said.is_dead_end.all() and said[0, 1].is_dead_end.shape == (1, 1)
    for row, text in enumerate([(0, 2), (1, 1)]):
        possible = model.row(text) > float("-inf")
        expected = possible / possible.sum()
        torch.testing.assert_close(said[row, -1].log_probs()[0, 0].exp(), expected.double())


def test_dead_ends_are_told_where_only_impossible_tokens_would_be_safe() -> None:
    p = torch.tensor([0.5, 0.5, 0.0]).log()
    cap = torch.tensor([0.2, 0.3, 1.0])
    assert is_dead_end(p, cap)
    assert rectify(p, cap).exp().tolist() == pytest.approx([0.4, 0.6, 0.0])
    assert not is_dead_end(torch.tensor([0.5, 0.4, 0.1]).log(), cap)


def test_reweighting_with_exact_values_is_the_model_given_a_good_ending() -> None:
    """p (1 + Q) renormalised, of every text: p(text) / p(good ending), up to the floor of the caps."""
    model, value = table(1), valued(1)
    weighted = Rectified(model, value, rule="reweight")
    begin = (model.vocab.bos_id,)
    good = 1 + value.of(begin)
    for text, p in model.enumerate(LENGTH - 1).items():
        said = weighted.predict([[*begin, *text[:-1]]]).log_probs()[0]
        drawn = said.gather(-1, torch.tensor(text)[:, None]).sum().exp().item()
        assert drawn == pytest.approx(p / good if undesired((*begin, *text)) == 0 else 0.0, abs=1e-5)


def test_what_is_drawn_ends_badly_as_often_as_the_caps_say() -> None:
    """2,000 texts against the exact chance, 4 standard errors: a false-alarm rate of 6e-5."""
    model, value = table(0), valued(0)
    safe = Rectified(model, value, eps=0.1)
    begin = (model.vocab.bos_id,)
    before, after = -value.of(begin), -TableValue(safe, undesired, length=LENGTH).of(begin)
    assert after < 0.8 * before
    made = generate(safe, [""], n=2000, max_tokens=LENGTH - 1, seed=1)
    rate = sum(-undesired((*begin, *text.tokens)) for text in made) / len(made)
    assert abs(rate - after) < 4 * math.sqrt(after * (1 - after) / len(made))


# Use.


def test_trees_and_chains_keep_model_and_value_in_step() -> None:
    safe = Rectified(table(1), valued(1))
    state = safe.start()
    safe.extend(state, [[3, 0]])
    branches = safe.extend(state, [[1, 2, 1]], parents=[-1, -1, 1])
    alone = safe.predict([[3, 0, 2, 1]])[0, -1]
    torch.testing.assert_close(branches[0, 2].log_probs(), alone.log_probs())
    assert branches[0, 2].is_dead_end.item() == alone.is_dead_end.item()
    state.keep([1, 2])
    assert [inner.tokens for inner in state.memory.states] == [((3, 0, 2, 1),)] * 2


def test_digests_tell_settings_apart() -> None:
    base = table(1)
    models: list[LanguageModel] = [
        base,
        Rectified(base, valued(1)),
        Rectified(base, valued(1), eps=0.1),
        Rectified(base, valued(1), rule="two_pass"),
        Rectified(base, TableValue(base, undesired, length=4)),
    ]
    assert len({model.digest for model in models}) == len(models)


def test_the_context_is_the_shorter_one() -> None:
    base = TableModel.random(3, order=2, eos=True, seed=1)
    base.context_length = 9
    policy = TableModel.random(3, order=2, eos=True, seed=1)
    policy.context_length = 7
    assert Rectified(base, TableValue(policy, undesired, length=4)).context_length == 7
    assert Rectified(base, valued(1)).context_length == 9


class Partial(TableModel):
    is_partial = True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rectified(TableModel.random(4), valued(1)), "different vocabularies"),
        (lambda: Rectified(table(1), TableValue(table(1), undesired, length=4, high=1.0)), "from -1 to 0"),
        (lambda: Rectified(table(1), valued(1), eps=1.5), "eps"),
        (lambda: Rectified(table(1), valued(1), rule="three_pass"), "exact, two_pass, reweight"),
        (lambda: Rectified(Partial.random(3, eos=True), valued(1)), "whole distributions"),
    ],
)
def test_misuse_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_float32_models_stay_in_float32() -> None:
    said: Tensor = Rectified(small_hf(), hf_value()).predict([[0, 5]]).log_probs()
    assert said.dtype == torch.float32

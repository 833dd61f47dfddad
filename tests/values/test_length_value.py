"""Length values: closed forms and laws on tables, what is learnt against what is exact, signs, and cut texts."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nextoken.errors import ModelError
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.values._descent import Schedule
from nextoken.values.length_fit import Rollout, discount_for, fit_length_value, rollouts
from nextoken.values.length_value import ExactLengthValue, HFLengthValue, value_of
from nextoken.values.scalar_head import ScalarValue

BOS, EOS = 3, 4
"""Of tables over a, b, c."""


@cache
def table(seed: int = 0, order: int = 2) -> TableModel:
    return TableModel.random(3, order=order, eos=True, seed=seed)


def geometric(stop: float) -> TableModel:
    return TableModel(
        torch.tensor([(1 - stop) / 2, (1 - stop) / 2, 0.0, stop], dtype=torch.float64), ["a", "b"], eos=True
    )


def body(seed: int = 0, width: int = 32) -> HFModel:
    """A small network over the tokens of `table`."""
    words = {"a": 0, "b": 1, "c": 2, "<s>": BOS, "</s>": EOS}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=5,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(seed)
    return HFModel(transformers.LlamaForCausalLM(config), tokenizer, name="body")


@pytest.mark.paper("2604.27039")
@given(stop=st.floats(0.01, 0.99), g=st.floats(0.5, 0.9999))
def test_a_geometric_stop_has_its_closed_form(stop: float, g: float) -> None:
    """E[g^R] = q g / (1 - (1 - q) g), the end counted."""
    value = ExactLengthValue(geometric(stop), discount=g)
    u = value_of(value.predict([[2, 0, 1]]), g)
    assert u[0].tolist() == pytest.approx([(1 - g) / (1 - (1 - stop) * g)] * 3, rel=1e-9)


@pytest.mark.paper("2604.27039")
@pytest.mark.parametrize("order", [0, 1, 2])
def test_exact_values_are_means_over_every_string(order: int) -> None:
    """Against enumeration of all strings up to a depth; what is longer has at most g^depth to say."""
    model, g, depth = TableModel.random(2, order=order, eos=True, seed=3), 0.7, 12
    value = ExactLengthValue(model, discount=g)
    for text in ((), (0,), (1, 0)):
        strings = model.enumerate(depth, prefix=text)
        ended = sum(p * g ** len(s) for s, p in strings.items() if s[-1] in model.vocab.eos_ids)
        u = float(value_of(torch.tensor(value.of((2, *text))), g))
        assert 1 - ended - g**depth <= u <= 1 - ended + 1e-12
        by_length = [sum(p for s, p in strings.items() if len(s) == n and s[-1] == 3) for n in range(1, depth)]
        assert value.law((2, *text), depth - 1).tolist() == pytest.approx(by_length, abs=1e-12)


def test_bellman_holds_and_the_mean_lengthening_is_nothing() -> None:
    model, g = table(), 0.9
    value = ExactLengthValue(model, discount=g)
    for text in ([BOS], [BOS, 0], [BOS, 2, 1]):
        p = model.predict([text]).log_probs()[0, -1].exp()
        d = [float(value.lengthening([*text, x], given=len(text))[0]) for x in range(5) if p[x] > 0]
        assert sum(chance * each for chance, each in zip(p[p > 0].tolist(), d, strict=True)) == pytest.approx(0)
        # SIGN: the end is the token that shortens most, and a longer rest has the larger u and the larger d.
        after = [value.of((*text, x)) for x in (0, 1, 2, EOS)]
        assert after[-1] == 0 and min(d) == d[-1] < 0 < max(d)
        assert np.argsort(after).tolist() == np.argsort(d).tolist()


@pytest.mark.paper("2604.27039")
@given(seed=st.integers(0, 30), g=st.floats(0.6, 0.999))
def test_the_discounted_length_is_below_the_expected_one(seed: int, g: float) -> None:
    """Jensen; and the gap closes as g goes to 1 or as the law narrows to one length."""
    model = TableModel.random(3, order=1, eos=True, seed=seed)
    law = ExactLengthValue(model, discount=g).law([BOS], 4000)
    if float(law.sum()) < 1 - 1e-9:
        return
    mean = float((law * torch.arange(1, 4001)).sum())
    gaps = [mean - ExactLengthValue(model, discount=each).of([BOS]) for each in (g, 1 - (1 - g) / 10)]
    assert gaps[0] >= gaps[1] - 1e-9 and gaps[1] >= -1e-9


def test_a_sure_length_is_told_exactly_and_an_endless_one_is_infinite() -> None:
    # a -> b -> c -> end
    rows = {
        (): [0, 0, 0, 1.0],
        (BOS,): [1.0, 0, 0, 0],
        (0,): [0, 1.0, 0, 0],
        (1,): [0, 0, 1.0, 0],
        (2,): [0, 0, 0, 1.0],
    }
    sure = ExactLengthValue(TableModel.given(rows, ["a", "b", "c"], eos=True), discount=0.99)
    assert sure.predict([[BOS, 0, 1, 2, EOS]])[0].tolist() == pytest.approx([4, 3, 2, 1, 0])
    endless = ExactLengthValue(TableModel.given({(): [1.0, 0, 0, 0]}, ["a", "b", "c"], eos=True), discount=0.99)
    assert endless.predict([[BOS, 0]])[0].tolist() == [math.inf, math.inf]
    assert value_of(torch.tensor([math.inf, 0.0]), 0.99).tolist() == [1.0, 0.0]


@given(length=st.floats(1e-6, 1e6), g=st.floats(0.5, 0.99999))
def test_value_and_length_are_one_number_in_two_units(length: float, g: float) -> None:
    """Through the logit z, even where u rounds to 1: log(1 - u) is log sigmoid(-z)."""
    log_left = length * math.log(g)
    # z = log(u / (1 - u)), written so that neither u nor 1 - u is rounded.
    z = math.log(-math.expm1(log_left)) - log_left
    scalar = shared()
    with torch.no_grad():
        scalar.head.double().outer.bias.fill_(z)
    said = HFLengthValue(scalar, discount=g)._lengths(torch.full((1, 2), z, dtype=torch.float64), [[0, EOS]])
    assert said[0, 0].item() == pytest.approx(length, rel=1e-6) and said[0, 1].item() == 0


@cache
def shared() -> ScalarValue:
    return ScalarValue.on(body())


@pytest.mark.paper("2604.27039")
def test_what_is_learnt_comes_near_to_what_is_exact() -> None:
    """At every token of texts not learnt from: nine tenths of the variance of the exact u are explained."""
    model, g = TableModel.random(3, order=2, eos=True, concentration=0.5, seed=1), 0.9
    exact = ExactLengthValue(model, discount=g)
    texts = rollouts(model, [""], n=2000, max_tokens=60, seed=1)
    value = fit_length_value(body(), texts, discount=g, schedule=Schedule(epochs=4, batch=32, rate=5e-3), seed=0)
    fresh = [text.tokens for text in rollouts(model, [""], n=200, max_tokens=60, seed=2)]
    said, true = (torch.cat([value_of(each.predict([text])[0], g)[:-1] for text in fresh]) for each in (value, exact))
    assert (said - true).square().mean() < 0.1 * true.var()
    assert abs(float((said - true).mean())) < 0.02


def test_each_token_weighs_the_same() -> None:
    """With a body that cannot tell states apart, what is learnt is the token mean, not the mean of the texts' means."""
    texts = [Rollout((BOS, *[0] * (size - 1), EOS), 1) for size in (2, 2, 2, 14)]
    g = 0.8
    targets = [[1 - g**left for left in range(size, 0, -1)] for size in (2, 2, 2, 14)]
    scalar = ScalarValue.on(body())
    torch.nn.init.zeros_(scalar.head.inner.weight)
    # Blind: inner weights stay 0 as their inputs do not.
    scalar.head.inner.weight.requires_grad_(False)
    torch.nn.init.constant_(scalar.head.outer.bias, 0.3)
    value = fit_length_value(scalar, texts, discount=g, schedule=Schedule(epochs=400, batch=4, rate=0.05), seed=0)
    u = value_of(value.predict([[BOS, 0]]), g)
    tokens, per_text = np.mean(np.concatenate(targets)), np.mean([np.mean(t) for t in targets])
    assert u[0].tolist() == pytest.approx([tokens] * 2, abs=0.01) and abs(tokens - per_text) > 0.1


def test_cut_texts_say_at_least_what_was_seen() -> None:
    """Texts with a stop of rate q, cut at a third of their mean: kept as cut, the value stays near the truth."""
    stop, g = 0.1, 0.9
    model = geometric(stop)
    texts = rollouts(model, [""], n=400, max_tokens=8, seed=2)
    cut = [text for text in texts if text.remaining is None]
    assert 0.3 < len(cut) / len(texts) < 0.6 and all(len(text.tokens) == 9 for text in cut)
    true = (1 - g) / (1 - (1 - stop) * g)
    # The table's ids are those of a network over a, b, <s>, </s>.
    words = {"a": 0, "b": 1, "<s>": 2, "</s>": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=3
    )
    net = HFModel(transformers.LlamaForCausalLM(config), tokenizer)
    schedule = Schedule(epochs=12, batch=32, rate=0.02)
    found = {}
    for name, kept in (("cut", texts), ("ended only", [text for text in texts if text.remaining == 0])):
        value = fit_length_value(ScalarValue.on(net), kept, discount=g, schedule=schedule, seed=0)
        found[name] = float(value_of(value.predict([[2, 0, 1, 0]]), g).mean())
    assert found["cut"] == pytest.approx(true, abs=0.05)
    assert found["ended only"] < true - 0.12


def test_known_remainders_are_targets() -> None:
    """A text cut after k of its tokens, with the rest known, teaches what the whole text does."""
    whole = Rollout((BOS, 0, 1, 2, 0, 1, EOS), 2)
    part = Rollout((BOS, 0, 1, 2), 2, remaining=3)
    assert part.length == 5 == whole.length
    from nextoken.values.length_fit import _labels

    assert _labels(part, 0.9).tolist() == pytest.approx(_labels(whole, 0.9).tolist()[:2])
    assert _labels(whole, 0.9).tolist() == pytest.approx([0.9**n for n in (5, 4, 3, 2, 1)])


def test_equal_seeds_give_equal_weights_and_the_model_stays_as_it_is() -> None:
    model, net = table(), body()
    texts = rollouts(model, ["", "ab"], n=20, max_tokens=40, seed=3)
    assert texts == rollouts(model, ["", "ab"], n=20, max_tokens=40, seed=3, max_rows=7)
    assert {text.given for text in texts} == {1, 3}
    before, steps = net.digest, []
    one = fit_length_value(net, texts, seed=4, on_step=steps.append)
    assert one.digest == fit_length_value(net, texts, seed=4).digest != fit_length_value(net, texts, seed=5).digest
    assert net.digest == before != one.scalar.body.digest and one.scalar.owns_body
    assert [step.step for step in steps] == list(range(1, steps[0].steps + 1))
    assert one.discount == discount_for([text.length for text in texts])


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_the_rule_spends_99_percent_of_the_range(lengths: list[int]) -> None:
    g = discount_for(lengths)
    assert 0 < g < 1 and 1 - g ** float(np.quantile(lengths, 0.99)) == pytest.approx(0.99)


def test_a_text_that_fills_the_context_can_be_learnt_from() -> None:
    net = body()
    model = geometric_over_body()
    texts = rollouts(model, ["a" * 60], n=4, max_tokens=10, seed=0)
    limited = [Rollout((*text.tokens[:64], EOS), text.given) for text in texts if len(text.tokens) >= 64]
    assert limited
    fit_length_value(ScalarValue.on(net), limited, discount=0.9, schedule=Schedule(epochs=1))
    too_long = Rollout(tuple([BOS] + [0] * 64), 2, None)
    with pytest.raises(ValueError, match="holds 64"):
        fit_length_value(ScalarValue.on(net), [*limited, too_long])


def geometric_over_body() -> TableModel:
    return TableModel(torch.tensor([0.4, 0.3, 0.29, 0.0, 0.01]), ["a", "b", "c"], eos=True)


def test_saved_and_loaded(tmp_path: Path) -> None:
    net = body()
    texts = rollouts(table(), [""], n=10, max_tokens=40, seed=3)
    value = fit_length_value(ScalarValue.on(net), texts, schedule=Schedule(epochs=1))
    value.save(tmp_path)
    again = HFLengthValue.load(tmp_path, body=net)
    assert torch.equal(again.predict([[BOS, 0, 1]]), value.predict([[BOS, 0, 1]]))
    assert (again.digest, again.discount) == (value.digest, value.discount)
    with pytest.raises(ModelError, match="trained with another body"):
        HFLengthValue.load(tmp_path, body=body(1))
    (tmp_path / "length.json").unlink()
    with pytest.raises(ModelError, match="no length value"):
        HFLengthValue.load(tmp_path, body=net)


def test_misuse_is_refused() -> None:
    net = body()
    with pytest.raises(ValueError, match="came to an end"):
        fit_length_value(net, [Rollout((BOS, 0), 1, None)])
    with pytest.raises(ValueError, match="came to an end"):
        fit_length_value(net, [])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fit_length_value(net, [Rollout((BOS, 9), 1)])
    with pytest.raises(ValueError, match="at least one must be given"):
        Rollout((BOS,), 1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ExactLengthValue(table(), discount=1.0)
    with pytest.raises(ValueError, match="no end token"):
        ExactLengthValue(TableModel.random(2), discount=0.9)
    with pytest.raises(ValueError, match="at least one prompt"):
        rollouts(table(), [])
    with pytest.raises(ValueError, match="at least one must be given"):
        ExactLengthValue(table(), discount=0.9).lengthening([BOS], given=1)

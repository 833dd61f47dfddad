"""Information capacity: by hand on tables, operations against shapes, and the offset that makes a series flat."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig

import nextoken
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.scores.capacity import Capacity, fit_offset, flops_per_token, information_capacity


def live(config: object) -> HFModel:
    model = object.__new__(HFModel)
    model.model, model.name = AutoModelForCausalLM.from_config(config), "live"
    return model


@pytest.mark.paper("2511.08066")
def test_it_is_its_formula_on_a_table() -> None:
    model = TableModel.random(["a", "bé", "c"], order=1, seed=1)
    texts = ["abéc", "bébé", "c"]
    bits = -sum(
        float(model.row(ids[:i])[token])
        for text in texts
        for ids in [model.vocab.encode(text).ids]
        for i, token in enumerate(ids)
    ) / math.log(2)
    found = information_capacity(nextoken.read(model, texts, progress=False), flops=1e6, offset=-2.0)
    # Six tokens over twelve bytes of UTF-8; é has two.
    assert (found.tokens, found.text_bits) == (6, 8 * 12 / 6)
    assert found.model_bits == pytest.approx(bits / 6, rel=1e-6)
    assert found.value == pytest.approx((16 - bits / 6 - 2) / math.log2(1e6), rel=1e-6)
    assert found.expected_bits(1e6) == pytest.approx(found.model_bits)


@pytest.mark.paper("2511.08066")
def test_an_even_model_saves_what_bytes_have_above_its_vocabulary() -> None:
    model = TableModel(torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]), ["aa", "bb", "cc", "dd"])
    found = information_capacity(nextoken.read(model, "aabbddcc", progress=False), flops=2.0)
    assert found.value == found.gain == pytest.approx(16 - 2, rel=1e-6)


def test_batches_and_sharding_change_nothing() -> None:
    texts = ["It was the best of times.", "Call me Ishmael.", "", "Whan that Aprille"]
    whole = information_capacity(nextoken.read("nano", texts, progress=False), flops=1e6)
    narrow = information_capacity(nextoken.read("nano", texts, batch_tokens=7, progress=False), flops=1e6)
    assert whole.value == pytest.approx(narrow.value, rel=1e-5)


@pytest.mark.paper("2511.08066")
@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_gated_model_are_the_papers(tied: bool) -> None:
    d, layers, heads, groups, width, inner, size, length = 32, 3, 4, 2, 8, 56, 100, 64
    config = LlamaConfig(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        intermediate_size=inner,
        vocab_size=size,
        tie_word_embeddings=tied,
    )
    layer = 2 * (2 * d * d) + 2 * (2 * d * groups * width) + 6 * d * inner + 4 * heads * width * (length - 1) / 2
    assert flops_per_token(live(config), tokens=length) == layers * layer + 2 * d * size


@pytest.mark.paper("2511.08066")
def test_attention_counts_what_a_loop_over_steps_does() -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16, intermediate_size=8, vocab_size=9
    )
    model = live(config)
    by_hand = sum(2 * (2 * 4 * 16 * seen) * 2 for seen in range(50)) / 50  # scores and values, per layer
    assert flops_per_token(model, tokens=50) - flops_per_token(model, tokens=1) == pytest.approx(by_hand)


def test_plain_feed_forward_parts_and_experts_are_counted_as_they_are() -> None:
    gpt = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)
    layer = 2 * (4 * 32 * 32) + 4 * 32 * 128 + 4 * 32 * (16 - 1) / 2
    assert flops_per_token(live(gpt), tokens=16) == 2 * layer + 2 * 32 * 50
    moe = Qwen3MoeConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        vocab_size=40,
    )
    expected = 2 * (4 * 32 * 32) + 2 * 32 * 4 + 2 * 6 * 32 * 16 + 2 * 32 * 40
    assert flops_per_token(live(moe), tokens=1) == expected


def test_bundled_models_have_the_operations_of_their_shapes() -> None:
    tiny = nextoken.load("tiny")
    assert isinstance(tiny, HFModel)
    layer = 8 * 256 * 256 + 6 * 256 * 688 + 4 * 256 * 1023 / 2
    assert flops_per_token(tiny) == 5 * layer + 2 * 256 * 4096


def capacity(gain: float, log_flops: float) -> Capacity:
    return Capacity(gain / log_flops, 20.0, 20.0 - gain, 2.0**log_flops, 0.0, 1)


@pytest.mark.paper("2511.08066")
@given(st.floats(1, 40), st.floats(1, 40), st.floats(10, 40), st.floats(1, 20))
def test_the_offset_makes_two_models_equal(g: float, h: float, log: float, more: float) -> None:
    b = fit_offset([[capacity(g, log), capacity(h, log + more)]])
    assert b == pytest.approx((h * log - g * (log + more)) / more, rel=1e-6, abs=1e-6)
    assert (g + b) / log == pytest.approx((h + b) / (log + more), abs=1e-6)


@given(st.floats(-3, 3).filter(lambda shift: abs(shift) > 1e-2))
def test_the_offset_is_the_best_over_several_series(shift: float) -> None:
    series = [[capacity(g, log) for g, log in one] for one in ([(9, 20), (11, 25), (12, 31)], [(7, 18), (9.5, 24)])]

    def unevenness(b: float) -> float:
        total = 0.0
        for models in series:
            values = [(model.gain + b) / math.log2(model.flops) for model in models]
            total += sum((value - sum(values) / len(values)) ** 2 for value in values)
        return total

    best = fit_offset(series)
    assert unevenness(best) < unevenness(best + shift)


def test_a_better_model_has_more_and_a_dearer_one_less() -> None:
    good, bad = capacity(10, 20), capacity(9, 20)
    assert good.value > bad.value and capacity(10, 21).value < good.value


def test_misuse_is_refused() -> None:
    signature = nextoken.read(TableModel.random(3, seed=0), "", progress=False)
    with pytest.raises(ValueError, match="no predicted token"):
        information_capacity(signature, flops=10.0)
    with pytest.raises(ValueError, match="flops"):
        information_capacity(signature, flops=1.0)
    with pytest.raises(ValueError, match="different cost"):
        fit_offset([[capacity(1, 10)], [capacity(2, 11), capacity(3, 11)]])
    model = live(
        LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8, vocab_size=9)
    )
    model.model.config.kv_lora_rank = 4
    with pytest.raises(ValueError, match="compressed keys"):
        flops_per_token(model)

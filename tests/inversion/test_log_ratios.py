"""Distributions in as many numbers as the hidden state has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM

import nextoken
from nextoken.inversion.log_ratios import LogRatioCodec, additive_log_ratios, dimension
from nextoken.model.hf import HFModel


@pytest.fixture(scope="module")
def model():
    return nextoken.load("nano")


@pytest.fixture(scope="module")
def spoken(model):
    """What the model says at 300 places."""
    text = "The old man walked along the shore and looked at the sea, which was grey. " * 20
    ids = list(model.vocab.encode(text).ids)[:300]
    following = model.predict([[model.vocab.bos_id, *torch.randperm(4000)[:149].tolist()], ids[:150]])
    return following.log_probs().flatten(0, 1), following.hidden.flatten(0, 1)


@pytest.mark.paper("2506.17090")
def test_nothing_is_lost(model, spoken):
    log_probs, hidden = spoken
    codec = LogRatioCodec.of_model(model)
    assert codec.size == hidden.shape[1] + 100
    small = codec.compress(log_probs)
    assert (codec.decompress(small) - log_probs).abs().max() < 1e-3
    assert torch.allclose(codec.hidden(small), hidden.double(), atol=1e-3 * hidden.abs().max().item())


@pytest.mark.paper("2506.17090")
def test_outputs_alone_tell_the_width_and_the_space(model, spoken):
    log_probs, hidden = spoken
    width = hidden.shape[1]
    wide = torch.log_softmax(hidden.double() @ model.network.head().weight.double().T, -1)
    assert dimension(wide) == width
    # One more for what normalises them.
    assert int(torch.linalg.matrix_rank(wide, rtol=1e-12)) == width + 1
    codec = LogRatioCodec.from_outputs(wide[:250])
    assert codec.basis.shape[1] == width
    fresh = wide[250:]
    assert (codec.decompress(codec.compress(fresh)) - fresh).abs().max() < 1e-6
    # In the model's own precision, too.
    single = LogRatioCodec.from_outputs(log_probs[:250], width=width)
    assert (single.decompress(single.compress(log_probs[250:])) - log_probs[250:]).abs().max() < 2e-2


@pytest.mark.paper("2506.17090")
def test_fewer_numbers_than_the_width_do_not_do(model, spoken):
    log_probs, hidden = spoken
    whole = LogRatioCodec.of_model(model)
    half = LogRatioCodec(whole.tokens[: hidden.shape[1] // 2], whole.reference, whole.basis, whole.offset)
    assert (half.decompress(half.compress(log_probs)) - log_probs).abs().max() > 0.5


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 6), st.booleans())
def test_any_linear_head_by_brute_force(seed, width, biased):
    """Random heads in double precision, a known bias included."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(30, width, generator=draw, dtype=torch.float64)
    bias = torch.randn(30, generator=draw, dtype=torch.float64) * biased
    h = torch.randn(4, width, generator=draw, dtype=torch.float64)
    log_probs = torch.log_softmax(h @ weight.T + bias, -1)
    codec = LogRatioCodec(tuple(range(1, width + 4)), 0, weight - weight[0], bias - bias[0])
    small = codec.compress(log_probs)
    expected = torch.stack([log_probs[:, v] - log_probs[:, 0] for v in codec.tokens], 1)
    assert torch.equal(small, expected)
    # Logits up to a constant are as good.
    assert torch.allclose(codec.compress(log_probs + 7), small)
    scale = 1e-10 * max(1.0, codec.condition)
    assert (codec.decompress(small) - log_probs).abs().max() < scale
    assert torch.allclose(additive_log_ratios(log_probs, 0), h @ codec.basis.T + codec.offset, atol=1e-9)


def test_soft_capping_is_refused():
    nano = nextoken.load("nano")
    config = Gemma2Config(
        vocab_size=nano.vocab.size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
    )
    capped = HFModel(Gemma2ForCausalLM(config), nano.tokenizer, name="capped")
    with pytest.raises(ValueError, match="caps its logits"):
        LogRatioCodec.of_model(capped)


def test_bad_input(model, spoken):
    log_probs, _ = spoken
    codec = LogRatioCodec.of_model(model)
    cut = log_probs[:2].clone()
    cut[:, codec.tokens[0]] = float("-inf")
    with pytest.raises(ValueError, match="probability 0"):
        codec.compress(cut)
    with pytest.raises(ValueError, match="finite"):
        LogRatioCodec.from_outputs(cut)
    with pytest.raises(ValueError, match="give more"):
        LogRatioCodec.from_outputs(log_probs[:50])
    with pytest.raises(ValueError, match="lower extra"):
        LogRatioCodec.of_model(model, extra=10_000)

"""Packed weights say what the weights say."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.model.test_layers import tokenizer

import nextoken
from nextoken.decode.generate import generate
from nextoken.errors import ModelError
from nextoken.model.hf import HFModel
from nextoken.model.stack import Stack
from nextoken.testing import check_language_model

V = 80


def wide_model(*, bias: bool = False) -> HFModel:
    """Layers large enough to be packed."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=bias,
        mlp_bias=bias,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    network = transformers.LlamaForCausalLM(config).eval()
    if bias:
        for name, weight in network.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight)
    return HFModel(network, tokenizer(), name="wide")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_it_is_the_same_model(bias: bool, n: int) -> None:
    model = wide_model(bias=bias)
    ids = torch.randint(2, V, (2, n), generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(model.packed().predict(ids).log_probs(), model.predict(ids).log_probs())


def test_the_blocks_are_at_work_and_only_during_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model()
    packed = model.packed()
    linear = torch.nn.functional.linear
    seen: list[int] = []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: seen.append(x.numel()) or linear(x, *rest))
    model.predict([[3, 4, 5]])
    assert len(seen) == 14
    packed.predict([[3, 4, 5]])
    assert len(seen) == 14
    packed.predict([[3]])
    assert len(seen) == 28
    assert not any("forward" in vars(part) for part in model.model.modules())


def test_it_keeps_the_contract_and_speaks() -> None:
    check_language_model(wide_model().packed())
    model = nextoken.load("tiny")
    packed = nextoken.load("tiny", packed=True)
    assert packed.digest == model.digest
    text = "It was the best of times"
    made = [generate(each, text, transform="greedy", max_tokens=12).tokens for each in (model, packed)]
    assert made[0] == made[1]


def test_weights_changed_afterwards_are_seen_and_gradients_flow() -> None:
    model = wide_model()
    packed, ids = model.packed(), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        for layer in model.model.model.layers:
            layer.mlp.down_proj.weight *= 2
    torch.testing.assert_close(packed.predict(ids).log_probs(), model.predict(ids).log_probs())
    stack = Stack(packed)
    start = stack.embed(ids).detach().requires_grad_()
    stack.run(start, range(stack.depth), stack.parallel(torch.arange(3)[None])).sum().backward()
    assert start.grad is not None and bool((start.grad != 0).any())


def test_other_precisions_are_refused() -> None:
    model = wide_model()
    model.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match="float32 weights or more on a CPU"):
        HFModel(model.model, model.tokenizer, name="half").packed()
    with pytest.raises(ModelError, match="leave a small model as it is"):
        nextoken.load("nano", packed=True)

"""A decoder run layer by layer says what it says in one pass, whatever the split, the rows and the trees."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.test_layers import tokenizer
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.lora import GatedLora
from nextoken.model.stack import Stack
from nextoken.model.table import TableModel

V, DEPTH = 80, 4
_SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=4),
    "qwen3": lambda: transformers.Qwen3Config(
        **_SIZES, head_dim=8, sliding_window=3, use_sliding_window=True, max_window_layers=2
    ),
    "eager": lambda: transformers.LlamaConfig(**_SIZES, attn_implementation="eager"),
}


def random_model(family: str) -> HFModel:
    torch.manual_seed(0)
    return HFModel(transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval(), tokenizer(), name=family)


STACKS = {family: Stack(random_model(family)) for family in CONFIGS}
LLAMA = STACKS["llama"]


def ids(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(2, V, (batch, n), generator=torch.Generator().manual_seed(seed))


def whole(stack: Stack, tokens: Tensor) -> Tensor:
    return stack.model.predict(tokens).log_probs()


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=12)
@given(split=st.integers(0, DEPTH), cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_any_split_of_layers_and_of_texts_is_the_model(family: str, split: int, cuts: list[int]) -> None:
    stack, tokens = STACKS[family], ids(2, sum(cuts))
    memory, at, said = stack.memory(2), 0, []
    for n in cuts:
        call = stack.call(memory, tokens[:, at : at + n])
        low = stack.run(stack.embed(tokens[:, at : at + n]), range(split), call)
        said.append(stack.next(stack.run(low, range(split, DEPTH), call)).log_probs())
        memory.advance([n, n])
        at += n
    torch.testing.assert_close(torch.cat(said, 1), whole(stack, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_rows_of_different_lengths_and_trees(family: str) -> None:
    stack, tokens = STACKS[family], ids(2, 7)
    memory = stack.memory(2)
    first = tokens[:, :4].clone()
    first[1, 2:] = ABSENT
    stack.run(stack.embed(first), range(DEPTH), stack.call(memory, first))
    memory.advance([4, 2])
    nodes, parents = ids(2, 4, seed=1), torch.tensor([[-1, 0, 0, 2]]).repeat(2, 1)
    hidden = stack.run(stack.embed(nodes), range(DEPTH), stack.call(memory, nodes, parents))
    found = stack.next(hidden).log_probs()
    for row, length in enumerate((4, 2)):
        for path in ([0, 1], [0, 2, 3]):
            text = torch.cat([tokens[row, :length], nodes[row, path]])[None]
            torch.testing.assert_close(found[row, path[-1]], whole(stack, text)[0, -1], rtol=1e-4, atol=1e-4)
    memory.keep([[0, 2, 3], [0, 1]])
    last = ids(2, 1, seed=2)
    found = stack.next(stack.run(stack.embed(last), range(DEPTH), stack.call(memory, last))).log_probs()
    text = torch.cat([tokens[0, :4], nodes[0, [0, 2, 3]], last[0]])[None]
    torch.testing.assert_close(found[0, 0], whole(stack, text)[0, -1], rtol=1e-4, atol=1e-4)


def test_lower_layers_may_run_ahead_of_the_others() -> None:
    tokens, memory = ids(1, 6), LLAMA.memory(1)
    states = []
    for place in range(6):
        one = tokens[:, place : place + 1]
        states.append(LLAMA.run(LLAMA.embed(one), range(2), LLAMA.call(memory, one, lengths=[place])))
    hidden = LLAMA.run(torch.cat(states, 1), range(2, DEPTH), LLAMA.call(memory, tokens))
    torch.testing.assert_close(LLAMA.next(hidden).log_probs(), whole(LLAMA, tokens), rtol=1e-4, atol=1e-4)


def test_memory_survives_layers_that_stopped_growing() -> None:
    """Late tokens leave out layers 1 and 2; forks, moves and joins must not trip over them."""
    tokens, memory = ids(1, 100), LLAMA.memory(1)
    early, late = tokens[:, :2], tokens[:, 2:]
    LLAMA.run(LLAMA.embed(early), range(DEPTH), LLAMA.call(memory, early))
    memory.advance([2])
    parents = torch.arange(-1, 97)[None]
    LLAMA.run(LLAMA.embed(late), [0, 3], LLAMA.call(memory, late, parents))
    memory.keep([[0, *range(1, 96)]])
    memory = memory.fork([0, 0]).join([memory])
    memory.keep([[0], [0], [0]])
    assert memory.lengths == [99, 99, 99]


def test_parallel_calls_pass_gradients_and_obey_their_mask() -> None:
    tokens = ids(1, 5)
    start = LLAMA.embed(tokens).detach().requires_grad_()
    visible = torch.eye(5, dtype=torch.bool)[None] | (torch.arange(5) == 0)
    LLAMA.run(start, range(DEPTH), LLAMA.parallel(torch.arange(5)[None], visible))[0, 3].sum().backward()
    assert start.grad is not None
    assert (start.grad[0].abs().sum(-1) > 0).tolist() == [True, False, False, True, False]
    plain = LLAMA.next(LLAMA.run(start, range(DEPTH), LLAMA.parallel(torch.arange(5)[None]))).log_probs()
    torch.testing.assert_close(plain, whole(LLAMA, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_parallel_calls_see_no_further_than_the_window(family: str) -> None:
    stack, tokens = STACKS[family], ids(1, 9)
    hidden = stack.run(stack.embed(tokens), range(DEPTH), stack.parallel(torch.arange(9)[None]))
    torch.testing.assert_close(stack.next(hidden).log_probs(), whole(stack, tokens), rtol=1e-4, atol=1e-4)


def test_other_families_are_refused() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    model = HFModel(transformers.GPT2LMHeadModel(config).eval(), tokenizer(), name="gpt2")
    with pytest.raises(ModelError, match="built like Llama"):
        Stack(model)
    with pytest.raises(ValueError, match="transformers model is needed"):
        Stack(TableModel.random("abc", order=1, seed=0))  # type: ignore[arg-type]


def test_a_gate_of_zero_is_the_model_and_a_gate_of_one_the_merged_weights() -> None:
    model = random_model("llama")
    stack, tokens = Stack(model), ids(1, 6)
    lora = GatedLora(stack, rank=3, alpha=6.0, targets=["q_proj", "down_proj"])
    before = whole(stack, tokens)
    with lora.at(1.0):
        assert torch.equal(whole(stack, tokens), before)  # B is 0
    with torch.no_grad():
        for up in lora.ups.values():
            up.normal_()
    with lora.at(torch.zeros(1, 6)):
        assert torch.equal(whole(stack, tokens), before)
    with lora.at(torch.tensor([[0.0, 0, 0, 1, 0, 1]])):
        gated = whole(stack, tokens)
    assert torch.equal(gated[:, :3], before[:, :3])
    assert not torch.allclose(gated[:, 3], before[:, 3])
    with lora.at(1.0):
        on = whole(stack, tokens)
    with torch.no_grad():
        for number, layer in enumerate(stack.layers):
            for path, part in layer.named_modules():
                key = f"{number}_{path.replace('.', '_')}"
                if key in lora.ups:
                    part.weight += 2.0 * lora.ups[key] @ lora.downs[key]
    torch.testing.assert_close(whole(stack, tokens), on, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(on, before)


def test_lora_says_what_it_cannot_find() -> None:
    with pytest.raises(ModelError, match="no linear layers named"):
        GatedLora(LLAMA, rank=1, alpha=1.0, targets=["nothing"])
    with pytest.raises(ValueError, match="rank"):
        GatedLora(LLAMA, rank=0, alpha=1.0)

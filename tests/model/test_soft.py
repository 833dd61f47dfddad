"""Mixtures as input: tokens to the last bit, families with their scaling, the contract of what recalls them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from hidden_markov import HiddenMarkov
from nextoken.errors import ModelError
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.next import Next
from nextoken.model.ngram import NgramModel
from nextoken.model.server import ServerModel
from nextoken.model.soft import Mixtures, Recalled, SoftModel, soft_model
from nextoken.model.table import TableModel
from nextoken.testing import check_language_model

V = 80
_SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
_DENSE = {**_SIZES, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 40}
_NARROW = {**_DENSE, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.2}

FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**_NARROW),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "gemma2": lambda: transformers.Gemma2Config(**_NARROW, sliding_window=5),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_NARROW, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**{**_DENSE, "num_key_value_heads": 2}),
    "qwen3": lambda: transformers.Qwen3Config(**_NARROW),
    "granite": lambda: transformers.GraniteConfig(**_DENSE, embedding_multiplier=3.0),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
        max_position_embeddings=40, word_embed_proj_dim=24, init_std=0.2,
    ),
}  # fmt: skip


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, V)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )


def live(config: transformers.PretrainedConfig) -> HFModel:
    torch.manual_seed(0)
    return HFModel(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer())


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HFModel:
    return live(FAMILIES[request.param]())


@pytest.fixture(scope="module")
def llama() -> HFModel:
    return live(FAMILIES["llama"]())


def strings(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_mixtures(rows: int, n: int, k: int, seed: int = 2) -> Mixtures:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, n, k, generator=generator)
    return Mixtures(torch.randint(2, V, (rows, n, k), generator=generator), weights / weights.sum(-1, keepdim=True))


def plain(model: HFModel, vectors: Tensor) -> Tensor:
    """log p [B, n, V] of the transformers model itself on input embeddings."""
    with torch.no_grad():
        return torch.log_softmax(model.model(inputs_embeds=vectors, use_cache=False).logits, -1)


def rows_of(model: HFModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.model.get_input_embeddings()(ids)
    return found


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=2e-4, rtol=0.0)


@pytest.mark.paper("2505.15778")
def test_mixtures_of_one_token_leave_the_memory_of_the_token_to_the_last_bit(model: HFModel) -> None:
    ids = strings(2, 9)
    hard, soft = model.start(2), model.start(2)
    padded = torch.stack([ids, torch.full_like(ids, ABSENT), torch.full_like(ids, 5)], -1)
    weights = torch.tensor([1.0, 0.0, 0.0]).expand(2, 9, 3)
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        expected = model.extend(hard, ids[:, begin:end]).logits()
        mixed = Mixtures(padded[:, begin:end], weights[:, begin:end])
        assert torch.equal(model.extend_soft(soft, mixed).logits(), expected)
    assert soft.tokens == hard.tokens
    for ours, theirs in zip(soft.memory.cache.layers, hard.memory.cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.paper("2505.15778")
def test_mixtures_among_tokens_equal_the_plain_pass_over_embeddings(model: HFModel) -> None:
    ids, mixtures, after = strings(2, 6), random_mixtures(2, 3, 4), strings(2, 4, seed=3)
    assert mixtures.ids is not None
    mean = (rows_of(model, mixtures.ids) * mixtures.weights[..., None]).sum(-2)
    expected = plain(model, torch.cat([rows_of(model, ids), mean, rows_of(model, after)], 1))
    state = model.start(2)
    pieces = [model.extend(state, ids), model.extend_soft(state, mixtures), model.extend(state, after)]
    close(torch.cat([piece.log_probs() for piece in pieces], 1), expected)
    assert state.lengths == (13, 13)
    tokens = mixtures.ids.gather(-1, mixtures.weights.argmax(-1, keepdim=True))[..., 0]
    assert [row[6:9] for row in state.tokens] == [tuple(row) for row in tokens.tolist()]


@pytest.mark.paper("2509.19170")
def test_a_mixture_of_the_whole_vocabulary_is_q_times_e(model: HFModel) -> None:
    q = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0)).softmax(-1)
    noise = torch.randn(2, 3, model.embedding_width)
    table = rows_of(model, torch.arange(V))
    assert model.embedding_width == table.shape[1]
    torch.testing.assert_close(model.embed(Mixtures(None, q)), q @ table)
    torch.testing.assert_close(model.embed(Mixtures(None, q, noise)), q @ table + noise)
    every = Mixtures(torch.arange(V).expand(2, 3, V), q)
    torch.testing.assert_close(model.embed(every), q @ table)
    assert model.embedding_scale() == pytest.approx(float(table.square().mean().sqrt()), rel=1e-5)


def test_scaled_embeddings_are_those_that_enter_the_residual_stream() -> None:
    model = live(FAMILIES["gemma2"]())
    raw = model.model.get_input_embeddings().weight
    torch.testing.assert_close(model.embeddings(torch.tensor([7])), raw[[7]] * 32**0.5)


def test_large_vocabularies_are_mixed_in_blocks(llama: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.rand(1, 2, V).softmax(-1)
    whole, scale = llama.embed(Mixtures(None, q)), llama.embedding_scale()
    monkeypatch.setattr("nextoken.model.soft._BLOCK", 7)
    torch.testing.assert_close(llama.embed(Mixtures(None, q)), whole)
    assert llama.embedding_scale() == pytest.approx(scale)


def test_rows_of_different_lengths_fork_rewind_and_join(model: HFModel) -> None:
    ids, mixtures = strings(2, 6), random_mixtures(2, 3, 4)
    assert mixtures.ids is not None
    whole = [torch.cat([rows_of(model, ids[0, :6]), model.embed(mixtures)[0, :3]]),
             torch.cat([rows_of(model, ids[1, :2]), model.embed(mixtures)[1, :2]])]  # fmt: skip
    ragged = ids.clone()
    ragged[1, 2:] = ABSENT
    short_ids, short_weights = mixtures.ids.clone(), mixtures.weights.clone()
    short_ids[1, 2], short_weights[1, 2] = ABSENT, 0
    state = model.start(2)
    model.extend(state, ragged)
    result = model.extend_soft(state, Mixtures(short_ids, short_weights)).log_probs()
    for row, vectors in enumerate(whole):
        close(result[row, : 3 - row], plain(model, vectors[None])[0, -(3 - row) :])
    assert state.lengths == (9, 4)
    other = state.fork([1, 0, 1])
    state.rewind([1, 1])  # back into the soft positions
    joined = state.join(other)
    after = model.extend(joined, [[7]] * 5).log_probs()[:, 0]
    cut = [whole[0][:-1], whole[1][:-1], whole[1], whole[0], whole[1]]
    for row, vectors in enumerate(cut):
        text = torch.cat([vectors, rows_of(model, torch.tensor([7]))])
        close(after[row], plain(model, text[None])[0, -1])


def test_a_tree_of_mixtures_is_each_path_alone(llama: HFModel) -> None:
    ids, vectors = strings(1, 4), llama.embed(random_mixtures(1, 4, 3))
    parents = [-1, 0, 0, 2]
    state = llama.start()
    llama.extend(state, ids)
    result = llama.extend_embedded(state, vectors, [[3, 4, 5, 6]], parents).log_probs()
    for node, path in enumerate(([0], [0, 1], [0, 2], [0, 2, 3])):
        text = torch.cat([rows_of(llama, ids[0]), vectors[0, path]])
        close(result[0, node], plain(llama, text[None])[0, -1])
    state.keep([0, 2])
    assert state.tokens[0][4:] == (3, 5)


# What recalls them.


def recalled(model: HFModel) -> Recalled:
    return Recalled(model, 3, model.embed(random_mixtures(1, 4, 3))[0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recalling_keeps_the_contract(family: str) -> None:
    check_language_model(recalled(live(FAMILIES[family]())), length=12)


def test_recalling_on_the_hidden_markov_model_and_the_model_itself_keep_the_contract() -> None:
    model = HiddenMarkov.random()
    check_language_model(model)
    mixture = torch.rand(2, 6).softmax(-1).double()
    check_language_model(Recalled(model, 2, mixture))


def test_recalling_reads_vectors_where_they_stand_whatever_tokens_are_given(llama: HFModel) -> None:
    model, ids = recalled(llama), strings(1, 10)
    text = torch.cat([rows_of(llama, ids[0, :3]), model.vectors, rows_of(llama, ids[0, 7:])])
    expected = plain(llama, text[None])
    close(model.predict(ids).log_probs(), expected)
    others = ids.clone()
    others[0, 3:7] = 9
    assert torch.equal(model.predict(others).logits(), model.predict(ids).logits())
    state = model.start()
    pieces = [model.extend(state, piece).log_probs() for piece in ids.split([2, 3, 5], 1)]
    close(torch.cat(pieces, 1), expected)
    assert model.digest not in ("", llama.digest, Recalled(llama, 2, model.vectors).digest)


def test_recalling_nothing_is_the_model_itself(llama: HFModel) -> None:
    ids = strings(2, 6)
    nothing = Recalled(llama, 3, torch.zeros(0, llama.embedding_width))
    assert torch.equal(nothing.predict(ids).logits(), llama.extend(llama.start(2), ids).logits())


# Linearity and misuse.


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=30)
def test_where_the_model_is_linear_a_mixture_gives_the_mixture(prefix: list[int], seed: int) -> None:
    model = HiddenMarkov.random(seed=seed % 7)
    weights = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights /= weights.sum()
    state = model.start()
    model.extend(state, [[model.vocab.bos_id, *prefix]])
    alone = model.extend(state.fork([0] * 5), torch.arange(5)[:, None]).log_probs()[:, 0].exp()
    mixed = model.extend_soft(state, Mixtures(torch.arange(5)[None, None], weights[None, None])).log_probs()[0, 0].exp()
    torch.testing.assert_close(mixed, weights @ alone)


def test_models_that_take_tokens_only_say_so() -> None:
    letters = TableModel.random(3)
    for model in (letters, NgramModel.from_tokens([[0, 1, 2]], letters.vocab, order=2)):
        with pytest.raises(ModelError, match=r"takes tokens only.*input embeddings"):
            soft_model(model)
    assert not issubclass(ServerModel, SoftModel)
    mamba = live(transformers.MambaConfig(**_SIZES, state_size=8))
    with pytest.raises(ModelError, match="remembers keys and values"):
        mamba.extend_soft(mamba.start(), random_mixtures(1, 1, 2))
    with pytest.raises(ModelError, match="remembers keys and values"):
        Recalled(mamba, 0, torch.zeros(1, 32))


def test_a_network_that_says_something_else_of_embeddings_is_found_out() -> None:
    plain = transformers.LlamaModel.forward

    class Deaf(transformers.LlamaModel):
        @functools.wraps(plain)
        def forward(self, *given: Any, **named: Any) -> Any:
            if named.get("inputs_embeds") is not None:
                named["inputs_embeds"] = 2 * named["inputs_embeds"] + 1
            return plain(self, *given, **named)

    causal = transformers.LlamaForCausalLM(FAMILIES["llama"]()).eval()
    causal.model.__class__ = Deaf
    model = HFModel(causal, tokenizer())
    with pytest.raises(ModelError, match="other results for the embeddings"):
        soft_model(model)


def test_malformed_mixtures_are_refused_and_leave_the_state(llama: HFModel) -> None:
    one = torch.ones(1, 1, 1)
    for arguments, message in [
        ((torch.zeros(1, 1, 2, dtype=torch.long), one), "must both be"),
        ((torch.zeros(1, 1, 1, dtype=torch.long), 0.5 * one), "sum to 1"),
        ((torch.tensor([[[3, 4]]]), torch.tensor([[[1.5, -0.5]]])), "at least 0"),
        ((torch.tensor([[[3, -1]]]), torch.tensor([[[0.5, 0.5]]])), "weight 0"),
        ((torch.tensor([[[3]]]), one * float("nan")), "at least 0"),
        ((torch.tensor([[[3]]]), one, torch.zeros(2, 1, 32)), "noise must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mixtures(*arguments)
    state = llama.start()
    llama.extend(state, [[0, 5]])
    for mixtures, message in [
        (Mixtures(torch.tensor([[[V]]]), one), "vocabulary"),
        (Mixtures(None, torch.full((1, 1, 7), 1 / 7)), "7 weights"),
        (Mixtures(torch.tensor([[[3]]]), one, torch.zeros(1, 1, 5)), "5 wide"),
        (Mixtures(torch.tensor([[[3]]]), one, torch.full((1, 1, 32), torch.inf)), "not finite"),
        (Mixtures.of(torch.full((1, 39), 3)), "context"),
        (Mixtures.of(torch.full((2, 1), 3)), "tokens must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            llama.extend_soft(state, mixtures)
    with pytest.raises(ValueError, match="vectors must be"):
        llama.extend_embedded(state, torch.zeros(1, 1, 5), [[3]])
    with pytest.raises(ValueError, match="vectors must be"):
        Recalled(llama, 0, torch.zeros(1, 5))
    assert state.tokens == ((0, 5),)
    seen: Next = llama.extend(state, [[6]])
    close(seen.log_probs()[0, -1], llama.predict([[0, 5, 6]]).log_probs()[0, -1])

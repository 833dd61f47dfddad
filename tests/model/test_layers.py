"""DoLa: the contract, brute force over transformers' own hidden states, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

from nextoken.decode.generate import generate
from nextoken.errors import ModelError
from nextoken.head import Head
from nextoken.model.hf import HFModel
from nextoken.model.layers import DoLa, LayersNext, candidates
from nextoken.model.steered import Edit, Steered
from nextoken.model.table import TableModel
from nextoken.testing import check_language_model

V, LAYERS = 80, 4
_SIZES = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": LAYERS, "initializer_range": 0.2}
_DENSE = {**_SIZES, "intermediate_size": 40, "num_attention_heads": 4, "max_position_embeddings": 40}
_WIDE = {**_DENSE, "num_key_value_heads": 2, "head_dim": 8}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_WIDE),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=24, n_layer=LAYERS, n_head=4, n_positions=40, initializer_range=0.2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_DENSE),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=LAYERS, ffn_dim=40, num_attention_heads=4,
        max_position_embeddings=40, word_embed_proj_dim=16, init_std=0.2,
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_WIDE, sliding_window=5, final_logit_softcapping=3.0),
    "qwen3": lambda: transformers.Qwen3Config(**_WIDE, tie_word_embeddings=True),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=LAYERS, state_size=4, initializer_range=0.05
    ),
}  # fmt: skip

TAILS = {  # by hand, what the code has to find: all that follows the last layer
    "llama": lambda decoder: [decoder.norm],
    "gpt2": lambda decoder: [decoder.ln_f],
    "gpt_neox": lambda decoder: [decoder.final_layer_norm],
    "opt": lambda decoder: [decoder.final_layer_norm, decoder.project_out],
    "gemma2": lambda decoder: [decoder.norm],
    "qwen3": lambda decoder: [decoder.norm],
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, V)}}
    backend = Tokenizer(WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def random_model(family: str) -> HFModel:
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    return HFModel(network, tokenizer(), name=family)


MODELS = {family: random_model(family) for family in CONFIGS}
LLAMA = MODELS["llama"]
IDS = torch.cat(
    [torch.zeros(2, 1, dtype=torch.long), torch.randint(2, V, (2, 8), generator=torch.Generator().manual_seed(0))], 1
)


@pytest.mark.parametrize("family", CONFIGS)
def test_keeps_the_contract(family: str) -> None:
    model = DoLa(MODELS[family], layers=[1, 2, 3], alpha=0.02)
    proofs = check_language_model(model)
    assert model.supports_trees == (family != "mamba")
    assert family == "mamba" or all(proof.skipped is None for proof in proofs)


@torch.no_grad()
def brute(family: str, layers: list[int], alpha: float, *, norm: bool) -> tuple[Tensor, list[list[int]]]:
    """log p [2, n, V] and the chosen layers from transformers' hidden states, distribution by distribution."""
    network = MODELS[family].model
    output = network(IDS, output_hidden_states=True, use_cache=False)
    cap = getattr(network.config, "final_logit_softcapping", None)

    def said(layer: int, row: int, at: int) -> Tensor:
        state = output.hidden_states[layer][row, at]
        for module in TAILS[family](network.get_decoder()) if norm else []:
            state = module(state)
        logits = network.get_output_embeddings()(state)
        return torch.softmax((cap * torch.tanh(logits / cap) if cap else logits).double(), -1)

    result, chosen = torch.full((*IDS.shape, V), -math.inf, dtype=torch.float64), []
    for row in range(IDS.shape[0]):
        chosen.append([])
        for at in range(IDS.shape[1]):
            p = torch.softmax(output.logits[row, at].double(), -1)
            divergences = []
            for layer in layers:
                q = said(layer, row, at)
                m = (p + q) / 2
                divergences.append(float((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
            chosen[-1].append(layers[divergences.index(max(divergences))])
            q = said(chosen[-1][-1], row, at)
            weights = torch.where(p >= alpha * p.max(), p / q, 0.0)
            result[row, at] = (weights / weights.sum()).log()
    return result, chosen


@pytest.mark.paper("2309.03883")
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", TAILS)
def test_is_its_formula_over_the_models_own_hidden_states(family: str, norm: bool) -> None:
    if family == "opt" and not norm:
        with pytest.raises(ModelError, match="early states of OPTForCausalLM are 24 wide, its head takes 16"):
            DoLa(MODELS[family], norm=False)
        return
    layers = [0, 1, 3]
    model = DoLa(MODELS[family], layers=layers, alpha=0.05, norm=norm)
    expected, chosen = brute(family, layers, 0.05, norm=norm)
    said = model.extend(model.start(2), IDS)
    assert isinstance(said, LayersNext)
    assert said.chosen.tolist() == chosen
    assert len({layer for row in chosen for layer in row}) > 1 or family in ("gpt2", "opt", "gemma2", "qwen3")
    torch.testing.assert_close(said.log_probs().double(), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(model.predict(IDS).log_probs().double(), expected, atol=2e-4, rtol=0)


def test_a_recurrent_model_goes_on_from_its_cache() -> None:
    """Where a call takes several passes, too. What transformers calls states[1] here is what the second layer gives."""
    model = MODELS["mamba"]
    with torch.no_grad():
        states = model.model(IDS, output_hidden_states=True).hidden_states
        early = model.model.lm_head(model.model.backbone.norm_f(states[1])).log_softmax(-1)
        final = model.model(IDS).logits.log_softmax(-1)
    expected = torch.log_softmax(final - early, -1)
    dola = DoLa(model, layers=[2], alpha=0.0)
    state = dola.start(2)
    pieces = [dola.extend(state, piece).log_probs() for piece in IDS.split([3, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.paper("2309.03883")
def test_the_last_layer_alone_leaves_the_plausible_set_flat() -> None:
    final = LLAMA.predict(IDS).log_probs()
    for alpha in (0.0, 0.1, 0.5):
        kept = final >= final.amax(-1, keepdim=True) + math.log(alpha) if alpha else final > -math.inf
        said = DoLa(LLAMA, layers=[LAYERS], alpha=alpha).predict(IDS)
        expected = torch.where(kept, -kept.sum(-1, keepdim=True).double().log(), -math.inf)
        torch.testing.assert_close(said.log_probs().double(), expected, atol=1e-5, rtol=0)
        assert isinstance(said, LayersNext) and said.divergence.max() < 1e-6


def test_alpha_of_one_is_greedy() -> None:
    plain = generate(LLAMA, "w5 w9", transform="greedy", max_tokens=8)
    for seed in range(3):
        drawn = generate(DoLa(LLAMA, alpha=1.0), "w5 w9", max_tokens=8, seed=seed)
        assert drawn.tokens == plain.tokens


def test_a_texts_result_does_not_depend_on_its_neighbours() -> None:
    """In the code of transformers the layer is chosen for a batch; here each position has its own."""
    model = DoLa(LLAMA, layers=[0, 1, 2, 3])
    together = model.predict(IDS)
    assert isinstance(together, LayersNext)
    for row in range(2):
        alone = model.predict(IDS[row : row + 1])
        assert isinstance(alone, LayersNext)
        assert torch.equal(alone.chosen[0], together.chosen[row])
    assert not torch.equal(together.chosen[0], together.chosen[1])


def test_one_pass_is_all_it_takes() -> None:
    passes: list[int] = []
    model = DoLa(LLAMA, layers="high")
    handle = LLAMA.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    state = model.start(2)
    model.extend(state, IDS).log_probs()
    model.extend(state, [[3, 4, 5], [6, 7, 8]], [-1, -1, 0]).statistics()
    handle.remove()
    assert len(passes) == 2
    assert not any(part._forward_pre_hooks for part in LLAMA.model.modules())


@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_what_stays_is_plausible_and_gains_by_what_the_early_layer_doubts(seed: int, alpha: float, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = 2 * torch.randn(2, 3, 1 + count, 6, generator=generator)
    head = Head(torch.randn(11, 6, generator=generator))
    said = LayersNext(states, head, range(count), alpha)
    final = torch.log_softmax(head.logits(states[:, :, 0]), -1)
    kept = said.log_probs() > -math.inf
    sure = (final - final.amax(-1, keepdim=True)).exp()
    assert bool(kept[sure > alpha + 1e-6].all()) and not bool(kept[sure < alpha - 1e-6].any())
    torch.testing.assert_close(said.log_probs().exp().sum(-1), torch.ones(2, 3))
    early = torch.log_softmax(head.logits(states[:, :, 1:]), -1)
    chosen = torch.gather(early, 2, said.chosen[..., None, None].expand(-1, -1, 1, 11))[:, :, 0]
    gain = (said.log_probs() - final + chosen)[kept]  # one number for all kept tokens of a distribution
    spread = torch.zeros(2, 3, 11).masked_scatter(kept, gain)
    top, low = spread.masked_fill(~kept, -math.inf).amax(-1), spread.masked_fill(~kept, math.inf).amin(-1)
    torch.testing.assert_close(top, low, atol=1e-4, rtol=0)
    narrowed = said[1, 2]
    torch.testing.assert_close(narrowed.log_probs()[0, 0], said.log_probs()[1, 2])


def test_a_steered_model_has_its_layers_contrasted_too() -> None:
    edit = Edit("layer", torch.randn(LAYERS, 24, generator=torch.Generator().manual_seed(2)), "shift")
    steered = Steered(LLAMA, [edit])
    with torch.no_grad():
        decoder = LLAMA.model.model
        states = LLAMA.model.model.embed_tokens(IDS)
        position = decoder.rotary_emb(states, torch.arange(IDS.shape[1])[None])
        seen = []
        for number, layer in enumerate(decoder.layers):
            states = layer(states, position_embeddings=position, attention_mask=None) + edit.amounts[number]
            seen.append(LLAMA.model.lm_head(decoder.norm(states)).log_softmax(-1))
    torch.testing.assert_close(steered.predict(IDS).log_probs(), seen[-1], atol=1e-4, rtol=0)
    said = DoLa(steered, layers=[2], alpha=0.0).predict(IDS).log_probs()
    torch.testing.assert_close(said, torch.log_softmax(seen[-1] - seen[1], -1), atol=2e-4, rtol=0)
    other_way = Steered(DoLa(LLAMA, layers=[2], alpha=0.0), [edit]).predict(IDS).log_probs()
    torch.testing.assert_close(other_way, said, atol=1e-5, rtol=0)
    assert torch.equal(Steered(LLAMA, []).predict(IDS).logits(), LLAMA.predict(IDS).logits())


@pytest.mark.paper("2309.03883")
def test_buckets_are_those_of_the_authors() -> None:
    assert candidates("low", 32, tied=False) == tuple(range(0, 16, 2))
    assert candidates("high", 32, tied=False) == tuple(range(16, 32, 2))
    assert candidates("low", 32, tied=True) == tuple(range(2, 16, 2))
    assert candidates("low", 48, tied=True) == tuple(range(2, 20, 2))
    assert candidates("high", 48, tied=True) == tuple(range(28, 48, 2))
    assert candidates("low", 2, tied=True) == (1,) and candidates("low", 1, tied=True) == (0,)
    assert candidates("low", 3, tied=True) == (2,)  # where the authors' rule names no layer
    assert candidates([3, 1, 3], 4, tied=True) == (1, 3)
    for depth in range(1, 60):
        for bucket in ("low", "high"):
            for tied in (False, True):
                assert all(0 <= number < depth for number in candidates(bucket, depth, tied=tied))


def test_digests_tell_settings_apart() -> None:
    models = [
        LLAMA,
        DoLa(LLAMA),
        DoLa(LLAMA, layers="high"),
        DoLa(LLAMA, alpha=0.2),
        DoLa(LLAMA, norm=False),
        DoLa(Steered(LLAMA, [Edit("layer", torch.ones(LAYERS, 24))])),
    ]
    assert len({model.digest for model in models}) == len(models)
    assert DoLa(LLAMA, layers=[0]).digest == DoLa(LLAMA, layers="low").digest


class DeepHead(transformers.LlamaForCausalLM):
    """Its output layer is not linear."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, V))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DoLa(LLAMA, alpha=1.5), ValueError, "alpha must be from 0 to 1"),
        (lambda: DoLa(LLAMA, layers=[]), ValueError, "numbers from 0 to 4"),
        (lambda: DoLa(LLAMA, layers=[5]), ValueError, "numbers from 0 to 4"),
        (lambda: DoLa(LLAMA, layers="middle"), ValueError, "'low', 'high'"),
        (lambda: DoLa(TableModel.random(3, seed=0)), ValueError, "transformers model is needed"),
        (lambda: DoLa(DoLa(LLAMA)), ModelError, "no linear head"),
        (lambda: DoLa(HFModel(DeepHead(CONFIGS["llama"]()).eval(), tokenizer())), ModelError, "no linear head"),
    ],
)
def test_misuse_is_refused(make, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        make()

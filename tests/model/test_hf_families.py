"""Every family against its own plain forward pass: tiny random models, weights large enough that attention matters."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from nextoken.head import statistics_from_logits
from nextoken.model.base import ABSENT, TreesNotSupported
from nextoken.model.hf import HFModel
from nextoken.testing import check_language_model

V = 120
WINDOW = 5
LENGTH = 14  # of the strings: well beyond the window

_SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}
_DENSE = {**_SIZES, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 40}
_GROUPED = {**_DENSE, "num_key_value_heads": 2}
_NARROW = {**_GROUPED, "head_dim": 8}
_MIXED = ["sliding_attention", "full_attention"]

SLOTS = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=40),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_DENSE),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "qwen2_mixed": lambda: transformers.Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, layer_types=_MIXED[::-1]
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_NARROW),
    "mistral": lambda: transformers.MistralConfig(**_NARROW, sliding_window=WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(
        **_NARROW, sliding_window=WINDOW, layer_types=_MIXED, final_logit_softcapping=3.0, attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_NARROW, sliding_window=WINDOW, layer_types=_MIXED),
    "opt": lambda: transformers.OPTConfig(
        **_SIZES, ffn_dim=48, num_attention_heads=4, max_position_embeddings=40, word_embed_proj_dim=24
    ),
    "phi": lambda: transformers.PhiConfig(**_DENSE),
    "granite": lambda: transformers.GraniteConfig(**_GROUPED, logits_scaling=4.0),
    "cohere": lambda: transformers.CohereConfig(**_GROUPED, logit_scale=0.25),
    "gptj": lambda: transformers.GPTJConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=40, rotary_dim=4),
    "mixtral": lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=2),
}  # fmt: skip

CHAINS = {
    "mamba": ("steps", lambda: transformers.MambaConfig(**_SIZES, state_size=8)),
    "mamba2": (
        "chunks",
        lambda: transformers.Mamba2Config(**_SIZES, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=4),
    ),
    "bloom": ("chunks", lambda: transformers.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)),
    "falcon_alibi": ("chunks", lambda: transformers.FalconConfig(**_SIZES, num_attention_heads=4, alibi=True)),
    "mpt": ("chunks", lambda: transformers.MptConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4)),
    "gpt_neo": (
        "chunks",
        lambda: transformers.GPTNeoConfig(
            vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=WINDOW, max_position_embeddings=40,
        ),
    ),
    "falcon_h1": (
        "chunks",
        lambda: transformers.FalconH1Config(
            **_GROUPED, mamba_d_state=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_chunk_size=4,
            lm_head_multiplier=0.5,
        ),
    ),
    "recurrent_gemma": (
        "rereads",
        lambda: transformers.RecurrentGemmaConfig(
            **_SIZES, intermediate_size=48, num_attention_heads=4, lru_width=32, attention_window_size=WINDOW,
            block_types=["recurrent", "attention"],
        ),
    ),
    "rwkv": ("rereads", lambda: transformers.RwkvConfig(**_SIZES, attention_hidden_size=32, context_length=64)),
}  # fmt: skip


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words w2, w3, ... as tokens."""
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, V)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )


def live(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose matrices are scaled up, so that a wrong position or mask changes its results."""
    make = SLOTS[family] if family in SLOTS else CHAINS[family][1]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(make())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0 if "embed" in name or "lm_head" in name else 6.0)
            elif "bias" in name:
                parameter.normal_(0.0, 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=[*SLOTS, *CHAINS])
def model(request: pytest.FixtureRequest) -> HFModel:
    return HFModel(live(request.param), tokenizer(), name=request.param)


def strings(rows: int, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain(model: HFModel, ids: Tensor) -> Tensor:
    """log p [B, n, V] by the model's own forward pass over whole strings, in float64."""
    with torch.no_grad():
        return torch.log_softmax(model.model(ids, use_cache=False).logits.double(), -1)


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left.double(), right.double(), atol=2e-4, rtol=0.0)


def test_keeps_the_contract(model: HFModel) -> None:
    check_language_model(model, length=LENGTH)


def test_memory_is_the_one_expected(model: HFModel) -> None:
    expected = "slots" if model.name in SLOTS else CHAINS[model.name][0]
    assert model.remembering == expected
    assert model.supports_trees == (expected == "slots")
    assert model.has_fused_head


def test_whole_text_and_pieces_equal_the_plain_pass(model: HFModel) -> None:
    ids = strings(3)
    expected = plain(model, ids)
    close(model.extend(model.start(3), ids).log_probs(), expected)
    close(model.predict(ids).log_probs(), expected)
    for sizes in ([1] * LENGTH, [6, 1, 4, 3], [1, 12, 1]):
        state = model.start(3)
        pieces = [model.extend(state, piece).log_probs() for piece in ids.split(sizes, 1)]
        close(torch.cat(pieces, 1), expected)


def test_ragged_rows_equal_the_plain_pass_of_each_alone(model: HFModel) -> None:
    ids = strings(4)
    cuts = [(2, 9, LENGTH), (8, 8, 11), (1, 3, 4), (5, 6, LENGTH)]
    state, begin = model.start(4), [0] * 4
    for call in range(3):
        end = [cut[call] for cut in cuts]
        width = max(e - b for b, e in zip(begin, end, strict=True))
        tokens = torch.full((4, width), ABSENT)
        for row, (b, e) in enumerate(zip(begin, end, strict=True)):
            tokens[row, : e - b] = ids[row, b:e]
        result = model.extend(state, tokens).log_probs()
        for row, (b, e) in enumerate(zip(begin, end, strict=True)):
            close(result[row, : e - b], plain(model, ids[row : row + 1, :e])[0, b:])
        begin = end


def test_trees_beyond_the_window_equal_each_path_alone(model: HFModel) -> None:
    if not model.supports_trees:
        with pytest.raises(TreesNotSupported, match="chains"):
            model.extend(model.start(), [[3, 4]], [-1, -1])
        return
    ids, nodes = strings(2), strings(2, 7, seed=2)
    lengths, parents = [LENGTH, LENGTH - 4], torch.tensor([[-1, 0, 1, -1, 3, 1, 5], [-1, -1, 1, 2, 3, 0, 4]])
    state = model.start(2)
    prefix = ids.clone()
    prefix[1, lengths[1] :] = ABSENT
    model.extend(state, prefix)
    result = model.extend(state, nodes, parents).log_probs()
    for row in range(2):
        for node in range(7):
            path, at = [], node
            while at >= 0:
                path.insert(0, at)
                at = int(parents[row, at])
            whole = torch.cat([ids[row, : lengths[row]], nodes[row, path]])
            close(result[row, node], plain(model, whole[None])[0, -1])
    state.keep([[0, 1, 5, 6], [1, 2]])
    kept = [torch.cat([ids[b, : lengths[b]], nodes[b, path]]) for b, path in enumerate([[0, 1, 5, 6], [1, 2]])]
    after = model.extend(state, [[7, 8], [9, 10]]).log_probs()
    for row, more in enumerate(([7, 8], [9, 10])):
        close(after[row], plain(model, torch.cat([kept[row], torch.tensor(more)])[None])[0, -2:])


def test_fork_rewind_join_equal_the_plain_pass(model: HFModel) -> None:
    ids = strings(3)
    state = model.start(2)
    model.extend(state, ids[:2])
    state.rewind([3, 8])
    other = model.start()
    model.extend(other, ids[2:, :4])
    copies = state.fork([1, 0, 1]).join(other)
    model.extend(state, [[5], [6]])  # the original goes on without disturbing its copies
    lengths, sources = [LENGTH - 8, LENGTH - 3, LENGTH - 8, 4], [1, 0, 1, 2]
    result = model.extend(copies, [[11, 12], [13, 14], [15, 16], [17, 18]]).log_probs()
    for row, (length, source) in enumerate(zip(lengths, sources, strict=True)):
        whole = torch.cat([ids[source, :length], torch.tensor([11 + 2 * row, 12 + 2 * row])])
        close(result[row], plain(model, whole[None])[0, -2:])


def test_statistics_equal_brute_force_on_the_models_own_logits(model: HFModel) -> None:
    ids = strings(2)
    with torch.no_grad():
        logits = model.model(ids, use_cache=False).logits.double()
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), ABSENT)], 1)
    brute = statistics_from_logits(logits, targets, top=3)
    lazy = model.predict(ids).statistics(targets, top=3)
    for name in ("logprob", "entropy", "varentropy", "skewness", "collision", "top1_prob", "top_logprobs", "rest_mass"):
        expected = getattr(brute, name).double()
        torch.testing.assert_close(getattr(lazy, name).double(), expected, atol=1e-3, rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_eager_attention_takes_the_same_masks(family: str) -> None:
    network = live(family)
    network.set_attn_implementation("eager")
    model = HFModel(network, tokenizer(), name=family)
    assert model.supports_trees
    check_language_model(model, length=LENGTH)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba"])
def test_half_precision_keeps_the_contract(family: str) -> None:
    network = transformers.AutoModelForCausalLM.from_config((SLOTS | {"mamba": CHAINS["mamba"][1]})[family]())
    model = HFModel(network.to(torch.bfloat16).eval(), tokenizer(), name=family)
    assert model.dtype == "bfloat16" and model.has_fused_head
    assert model.supports_trees == (family != "mamba")
    check_language_model(model)

"""Information capacity: bits of text that a model saves per token, over the logarithm of what a token costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nextoken.methods import method
from nextoken.scores.rows import Rows
from nextoken.signature.signature import Signature

if TYPE_CHECKING:
    from nextoken.model.hf import HFModel

OFFSETS = {"mixed": -24.0, "chinese": -18.7, "english": -27.0, "code": -27.0}
"""The constants b of the paper's data sets, bits. A figure with one b says nothing beside a figure with another."""


@dataclass(frozen=True)
class Capacity:
    """What a model saves and what it costs, per token.

    Args:
        value: (text_bits - model_bits + offset) / log2(flops).
        text_bits: C, bits of UTF-8 text that a token stands for.
        model_bits: NLL, -log2 of its probability.
        flops: N, floating-point operations.
        offset: b, bits.
        tokens: over how many these are means.
    """

    value: float
    text_bits: float
    model_bits: float
    flops: float
    offset: float
    tokens: int

    @property
    def gain(self) -> float:
        """C - NLL, bits saved per token."""
        return self.text_bits - self.model_bits

    def expected_bits(self, flops: float) -> float:
        """C + b - IC log2 N: the NLL of a model of the same series with another N, were capacity the same in it."""
        return self.text_bits + self.offset - self.value * math.log2(flops)


@method(
    name="Information capacity",
    arxiv="2511.08066",
    access="gray",
    summary="bits of text saved per token over log2 of the operations per token: one number for a model",
)
def information_capacity(signature: Signature, *, flops: float, offset: float = 0.0) -> Capacity:
    """IC = (C - NLL + b) / log2(N), with C = 8 bytes / tokens and NLL = -sum log2 p / tokens over the predicted tokens.

    Both are means over the tokens of all texts. (The paper's C is a mean of means per document, which is the same where
    all documents are cut to one length, as it does at 1,024 tokens.) The bytes are those that the predicted tokens
    cover, so a first token that nothing predicts is in neither.

    b belongs to a data set and is the same for all models: it is chosen so that IC is flat in a series of models
    (`fit_offset`). With b = 0 the figure is comparable between models of one size only.

    Args:
        signature: of texts cut to one length, as the paper does, or of any.
        flops: N per token, above 1: `flops_per_token`.
        offset: b in bits.

    Raises:
        ValueError: no token was predicted, a log-probability is unknown, or `flops` is not above 1.

    Source: arXiv:2511.08066 and its released code.
    """
    if not flops > 1:
        raise ValueError(f"flops must be above 1, got {flops}")
    rows = Rows(signature)
    tokens = len(signature)
    nats = -float(rows["logprob"].sum())
    if not tokens or math.isnan(nats):
        raise ValueError("the signature has no predicted token, or tokens of unknown probability: read longer texts")
    text = 8 * float((rows["byte_end"] - rows["byte_start"]).sum()) / tokens
    model = nats / math.log(2) / tokens
    return Capacity((text - model + offset) / math.log2(flops), text, model, flops, offset, tokens)


def fit_offset(series: Sequence[Sequence[Capacity]]) -> float:
    """b of least sum over series of sum_i (IC_i - mean IC of the series)^2, IC_i = (C_i - NLL_i + b) / log2 N_i.

    With one series of two models g, g' and l = log2 N, l' it is (g' l - g l') / (l' - l), which makes them equal. How
    the paper chose its constants is not told; this is the condition it states.

    Args:
        series: models of different size made alike, read on the same texts; series of one model say nothing.

    Raises:
        ValueError: no series has two models of different cost.
    """
    above, below = 0.0, 0.0
    for models in series:
        inverse = np.array([1 / math.log2(model.flops) for model in models])
        fixed = np.array([model.gain for model in models]) * inverse
        x, y = inverse - inverse.mean(), fixed - fixed.mean()
        above, below = above - float(x @ y), below + float(x @ x)
    if below < 1e-18:
        raise ValueError("no series has two models of different cost, so every b leaves it as flat")
    return above / below


def flops_per_token(model: HFModel, *, tokens: int = 1024) -> float:
    """Operations per token, 2 for a multiply-add, averaged over generating T tokens from an empty memory.

    2 * (weights that a token is multiplied by: all matrices but the embeddings, the output layer counted even where it
    is tied) + (layers with attention) * 4 * heads * width of a head * (T - 1) / 2. Of experts only the active ones
    count. For dense models with a gated feed-forward part it is the paper's formula; the weights themselves are
    counted, so that plain feed-forward parts, heads of any width and recurrent layers come out right too. Scans of
    recurrent layers, norms and activations are left out.

    Args:
        model: of transformers.
        tokens: T.

    Raises:
        ValueError: its attention works on compressed keys (MLA), which this does not count: give `flops` yourself.
    """
    network, config = model.model, model.model.config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"{model.name} has attention on compressed keys, which is not counted here: give flops yourself"
        )
    from torch import nn

    looked_up = {id(part.weight) for part in network.modules() if isinstance(part, nn.Embedding)}
    experts, active = _experts(config)
    weights = 0.0
    for name, weight in network.named_parameters():
        if weight.ndim < 2 or id(weight) in looked_up:
            continue
        routed = experts and "expert" in name and "shared" not in name
        weights += weight.numel() * (active / experts if routed else 1.0)
    output = network.get_output_embeddings()
    if output is not None and id(output.weight) in looked_up:
        weights += output.weight.numel()
    heads = getattr(config, "num_attention_heads", None) or 0
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    return 2 * weights + _attention_layers(config) * 4 * heads * width * (tokens - 1) / 2


def _experts(config: Any) -> tuple[int, int]:
    """Routed experts of a layer, and how many of them a token goes through."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    experts = next((int(found) for name in names if (found := getattr(config, name, None))), 0)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_k", None) or 0
    return experts, int(chosen)


def _attention_layers(config: Any) -> int:
    """Layers with attention over all earlier tokens; windows are counted as if they were longer than T."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sum("attention" in kind and "linear" not in kind for kind in kinds)
    return int(config.num_hidden_layers)

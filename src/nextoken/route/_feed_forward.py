"""FeedForward: the gated feed-forward block of a decoder layer, copied at its own width or made anew at another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.model._sites import decoder_layers
from nextoken.model.hf import HFModel

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_TRIED = 3


class FeedForward(nn.Module):
    """W_down (act(W_gate x) * (W_up x)) [..., H] for x [..., H], over m inner units.

    Args:
        gate, up: [m, H] and, where the block has biases, [m].
        down: [H, m] and [H].
        act: the activation function.
    """

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, *, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn = act

    @classmethod
    def of(cls, block: nn.Module) -> FeedForward:
        """A copy of a block of a transformers model.

        Raises:
            ModelError: it is built otherwise.
        """
        parts: list[Any] = [getattr(block, name, None) for name in _PROJECTIONS]
        act = getattr(block, "act_fn", None)
        if not all(isinstance(part, nn.Linear) for part in parts) or not callable(act):
            raise ModelError(
                f"{type(block).__name__} is no gated feed-forward block with {', '.join(_PROJECTIONS)} and act_fn, as "
                "families built like Llama have (Llama, Mistral, Qwen, SmolLM, OLMo): it cannot be given other widths"
            )
        made = cls(*(copy.deepcopy(part) for part in parts), act=act)
        made._prove(block)
        return made

    @property
    def width(self) -> int:
        """m."""
        return self.gate_proj.out_features

    @property
    def hidden(self) -> int:
        """H."""
        return self.gate_proj.in_features

    @property
    def size(self) -> int:
        """Weights."""
        return sum(weight.numel() for weight in self.parameters())

    def new(self, width: int, *, scale: float, generator: torch.Generator) -> FeedForward:
        """A block of another width with weights drawn from N(0, scale^2), and biases of 0 where this one has them."""

        def drawn(like: nn.Linear, out: int, into: int) -> nn.Linear:
            layer = nn.Linear(into, out, bias=like.bias is not None, device="meta").to(like.weight.dtype)
            layer = layer.to_empty(device=like.weight.device)
            with torch.no_grad():
                layer.weight.copy_(scale * torch.randn(out, into, generator=generator))
                if layer.bias is not None:
                    layer.bias.zero_()
            return layer

        return FeedForward(
            drawn(self.gate_proj, width, self.hidden),
            drawn(self.up_proj, width, self.hidden),
            drawn(self.down_proj, self.hidden, width),
            act=self.act_fn,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return made

    @torch.no_grad()
    def _prove(self, block: nn.Module) -> None:
        tried = torch.linspace(-1, 1, _TRIED * self.hidden).view(1, _TRIED, self.hidden).to(self.gate_proj.weight)
        if not torch.equal(self(tried), block(tried)):
            raise ModelError(
                f"{type(block).__name__} does more than its gate_proj, up_proj and down_proj tell; families built like "
                "Llama are needed"
            )


def with_blocks(model: HFModel, make: Callable[[FeedForward, int], nn.Module], *, name: str) -> HFModel:
    """A copy of the model in which make(copy of the feed-forward block, number of the layer) stands for each block.

    Raises:
        ModelError: a layer has no block `mlp` that is built like Llama's.
    """
    changed = HFModel(copy.deepcopy(model.model), model.tokenizer, name=name)
    for number, layer in enumerate(decoder_layers(changed.network)[1]):
        block = getattr(layer, "mlp", None)
        if not isinstance(block, nn.Module):
            raise ModelError(
                f"layer {number} of {model.name} has no feed-forward block named mlp (its parts are "
                f"{', '.join(part for part, _ in layer.named_children())}); families built like Llama are needed"
            )
        layer.mlp = make(FeedForward.of(block), number)
    changed.model.eval()
    return changed


def depth_of(model: HFModel) -> int:
    """L, the number of decoder layers.

    Raises:
        ValueError: it is no transformers model as it was loaded.
    """
    if not isinstance(model, HFModel):
        raise ValueError(f"a transformers model is needed, to change it inside; {model.name} is none")
    return int(model.network.config.num_hidden_layers)


def initial_scale(model: HFModel) -> float:
    """The standard deviation of new weights in this family."""
    return float(getattr(model.network.config, "initializer_range", None) or 0.02)

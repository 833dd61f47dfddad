"""Passes of a network on a CPU with its weights in blocks, as oneDNN multiplies them fastest.

torch multiplies by float32 weights as they lie, and for 2 to 64 tokens at once spends most of its time on putting them
in order, anew in every pass, so that a pass of 8 tokens takes 2 to 4 times as long as one of a single token. With the
weights put in order once it takes about as long, which is what makes a draft worth verifying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.errors import ModelError
from nextoken.model._network import Network

_SMALLEST = 1 << 15  # entries of a weight below which the call itself is what takes time
_TOKENS = 8  # in a pass, for which the blocks are laid out; others are about as fast


class PackedNetwork(Network):
    """A network whose larger linear layers have a second copy of their weights, in blocks.

    Passes of one token use the weights themselves, and so do those that gradients flow through, and layers whose
    weights were changed since. Between passes the module is as it was.

    Raises:
        ModelError: torch was built without oneDNN, or no layer has float32 weights on a CPU.
    """

    def __init__(self, network: Network) -> None:
        vars(self).update(vars(network))
        layers = [part for part in network.decoder.modules() if type(part) is nn.Linear and _fits(part)]
        if not layers:
            raise ModelError(
                f"no linear layer of {type(network.module).__name__} has {_SMALLEST:,} float32 weights or more on a "
                'CPU; load it with device="cpu" and dtype="float32", or leave a small model as it is'
            )
        try:
            self._packed: Sequence[_Packed] = [_Packed(layer) for layer in layers]
        except (AttributeError, RuntimeError) as error:
            raise ModelError("this build of PyTorch cannot pack weights, for it has no oneDNN") from error

    @contextmanager
    def running(self) -> Iterator[None]:
        # Layers that have another forward already are at work in a pass around this one, or are another's.
        idle = [packed for packed in self._packed if "forward" not in vars(packed.layer)]
        with super().running():
            try:
                for packed in idle:
                    vars(packed.layer)["forward"] = packed.forward
                yield
            finally:
                for packed in idle:
                    vars(packed.layer).pop("forward", None)


class _Packed:
    """One linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.weight, self.version = layer, layer.weight, layer.weight._version
        with torch.no_grad():
            self.blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _TOKENS)
            self._multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
            self._multiply(layer.weight.new_zeros(2, layer.in_features), self.blocks, None, "none", [], "")

    def forward(self, inputs: Tensor) -> Tensor:
        """In place of the layer's own."""
        layer = self.layer
        is_single = inputs.numel() == layer.in_features
        is_changed = layer.weight is not self.weight or self.weight._version != self.version
        learns = torch.is_grad_enabled() and (inputs.requires_grad or self.weight.requires_grad)
        if is_single or is_changed or learns or inputs.dtype != torch.float32:
            return F.linear(inputs, layer.weight, layer.bias)
        return self._multiply(inputs.contiguous(), self.blocks, layer.bias, "none", [], "")


def _fits(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _SMALLEST

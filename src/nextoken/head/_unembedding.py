"""The unembedding: hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32: half precision is never accumulated in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@dataclass(frozen=True)
class Head:
    """The last layer of a language model: z = scale * (h W^T + b), then z <- c tanh(z / c) if there is a soft-cap c.

    Args:
        weight: W [V, H], any floating dtype; used as it is, never copied as a whole.
        bias: b [V] or None. An entry of -inf takes that token out of the distribution, soft-cap or not.
        scale: logit scale (Cohere, Granite: 1 / divisor), applied to the bias too.
        softcap: c of Gemma 2, in logits; applied after the scale. None for no cap.

    Raises:
        ValueError: shapes that do not fit, an empty vocabulary, or a soft-cap that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.weight.shape[0] == 0:
            raise ValueError(f"weight must be [V, H] with V >= 1, got shape {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias must be [V] = [{self.weight.shape[0]}], one number per token, got {tuple(self.bias.shape)}"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}; pass None for a head without one")

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the weight."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states it takes."""
        return self.weight.shape[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """z [..., V] in float32 (float64 if hidden or weight is) for hidden [..., H]: all of them, in memory.

        Raises:
            ValueError: the last dimension of hidden is not H.
        """
        self.check(hidden)
        dtype = accumulation_dtype(hidden, self.weight)
        z = hidden.to(dtype) @ self.weight.to(dtype).T
        if self.bias is not None:
            z = z + self.bias.to(dtype)
        return self._finish(z * self.scale if self.scale != 1.0 else z)

    def fill(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Write the logits of a block of tokens to out [n, B]: hidden [n, H], weight [B, H], bias [B], of one dtype."""
        if bias is not None:
            torch.addmm(bias, hidden, weight.T, beta=self.scale, alpha=self.scale, out=out)
        else:
            torch.mm(hidden, weight.T, out=out)
            if self.scale != 1.0:
                out.mul_(self.scale)
        if self.softcap is not None:
            # tanh(x) = 2 sigmoid(2x) - 1: six times faster on a CPU, and a logit needs absolute accuracy only.
            out.mul_(2.0 / self.softcap).sigmoid_().mul_(2.0 * self.softcap).sub_(self.softcap)
            if bias is not None and (absent := bias == -torch.inf).any():
                out.masked_fill_(absent, -torch.inf)
        return out

    def check(self, hidden: Tensor) -> None:
        """Raise ValueError unless hidden is [..., H]."""
        if hidden.ndim == 0 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden must be [..., H] with H = {self.hidden_size} (the head's width), got {tuple(hidden.shape)}"
            )

    def _finish(self, z: Tensor) -> Tensor:
        if self.softcap is None:
            return z
        return (self.softcap * torch.tanh(z / self.softcap)).masked_fill(z == -torch.inf, -torch.inf)

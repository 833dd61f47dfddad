"""ContextEncoder: a decoder layer in which guesses look at the states that the target already has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KeysValues: TypeAlias = tuple[Tensor, Tensor]
Angles: TypeAlias = tuple[Tensor, Tensor]
"""cos and sin [B or 1, n, R] of positions, R of the D entries of a key being turned."""


@dataclass(frozen=True)
class LayerSizes:
    """Of a decoder layer.

    Args:
        width: H of the states.
        heads, groups: of queries, and of keys and values.
        head_width: D.
        inner: width of the feed-forward part.
        epsilon: of the norms.
    """

    width: int
    heads: int
    groups: int
    head_width: int
    inner: int
    epsilon: float

    @classmethod
    def of(cls, config: Any) -> LayerSizes:
        """Those of a transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            width=config.hidden_size,
            heads=heads,
            groups=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            inner=config.intermediate_size,
            epsilon=getattr(config, "rms_norm_eps", 1e-6),
        )


class ContextEncoder(nn.Module):
    """f = y + FF(norm(y)), y = u + O attention(norm(u)), for guesses u [B, n, H].

    A guess attends to the states before it, to those on its own path, and to itself; FF(x) = down(silu(gate x) * up x),
    keys and queries are turned by their positions. No norm comes after. O and down begin at 0, so that f begins as u.

    Args:
        sizes: those of the target's layers.
    """

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        wide, narrow = sizes.heads * sizes.head_width, sizes.groups * sizes.head_width
        self.before_attention = nn.RMSNorm(sizes.width, eps=sizes.epsilon)
        self.query = nn.Linear(sizes.width, wide, bias=False)
        self.key = nn.Linear(sizes.width, narrow, bias=False)
        self.value = nn.Linear(sizes.width, narrow, bias=False)
        self.mixed = nn.Linear(wide, sizes.width, bias=False)
        self.before_feed_forward = nn.RMSNorm(sizes.width, eps=sizes.epsilon)
        self.gate = nn.Linear(sizes.width, sizes.inner, bias=False)
        self.up = nn.Linear(sizes.width, sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.width, bias=False)
        nn.init.zeros_(self.mixed.weight)
        nn.init.zeros_(self.down.weight)

    def remembered(self, states: Tensor, angles: Angles) -> KeysValues:
        """Keys and values [B, G, n, D] of states [B, n, H]."""
        normed = self.before_attention(states)
        return turned(self._split(self.key(normed)), angles), self._split(self.value(normed))

    def forward(
        self, fresh: Tensor, angles: Angles, *, context: KeysValues, visible: Tensor, path: KeysValues | None
    ) -> Tensor:
        """f [B, n, H] of u [B, n, H].

        Args:
            context: keys and values [B, G, S, D] of the states before.
            visible: boolean [B or 1, n or 1, S], which of them each guess sees.
            path: keys and values [B, G, n, j, D] of the states between those and each guess; None for none.
        """
        normed, (batch, n, _), groups = self.before_attention(fresh), fresh.shape, self.sizes.groups
        query = turned(self._split(self.query(normed)), angles) * self.sizes.head_width**-0.5
        own = turned(self._split(self.key(normed)), angles), self._split(self.value(normed))
        near_keys, near_values = (part[:, :, None] for part in joined(path, own))
        # R queries share a key: to the context all of them at once, on the path each of its own.
        query = query.reshape(batch, groups, -1, n, self.sizes.head_width)
        far = (query.flatten(2, 3) @ context[0].transpose(-1, -2)).view(*query.shape[:4], -1)
        near = (query[..., None, :] * near_keys).sum(-1)
        weights = torch.cat([far.masked_fill(~visible[:, None, None], -torch.inf), near], -1).softmax(-1)
        far, near = torch.split(weights, [far.shape[-1], near.shape[-1]], -1)
        mixed = (far.flatten(2, 3) @ context[1]).view(query.shape) + (near[..., None] * near_values).sum(-2)
        after = fresh + self.mixed(mixed.flatten(1, 2).transpose(1, 2).flatten(2))
        normed = self.before_feed_forward(after)
        out: Tensor = after + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return out

    def _split(self, together: Tensor) -> Tensor:
        """[B, n, heads D] as [B, heads, n, D]."""
        return together.view(*together.shape[:2], -1, self.sizes.head_width).transpose(1, 2)


def joined(path: KeysValues | None, last: KeysValues) -> KeysValues:
    """A path [B, G, n, j, D] with one more [B, G, n, D] at its end."""
    if path is None:
        return last[0].unsqueeze(3), last[1].unsqueeze(3)
    keys, values = (torch.cat([before, new.unsqueeze(3)], 3) for before, new in zip(path, last, strict=True))
    return keys, values


def turned(vectors: Tensor, angles: Angles) -> Tensor:
    """Rotary embedding of vectors [B, heads, n, D]: entry i of the first half of R and entry i of the second half turn
    together by the i-th angle; entries from R on stay."""
    cos, sin = (part[:, None].to(vectors.dtype) for part in angles)
    size = cos.shape[-1]
    moving, rest = vectors[..., :size], vectors[..., size:]
    first, second = moving.chunk(2, -1)
    return torch.cat([moving * cos + torch.cat([-second, first], -1) * sin, rest], -1)

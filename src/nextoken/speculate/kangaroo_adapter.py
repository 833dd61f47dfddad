"""KangarooAdapter: what a model is about to say, told from its residual stream after the first few layers."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.errors import ModelError
from nextoken.model import _saved
from nextoken.model._kv import SlotLayer
from nextoken.model.early_exit import EarlyExit
from nextoken.model.next import HeadNext
from nextoken.model.stack import Call

_KIND = "kangaroo adapter"


class KangarooAdapter(nn.Module):
    """A(e)_t = norm(e_t + Attention(rms(e))_t), q = softmax(head(A(e))), e [B, n, H] the exit states of a target.

    Attention is causal, with rotary positions and as many heads as the target's own; there is no feed-forward block:
    4 H^2 + H weights, those of the norm aside. The head is the target's and is not trained. A new adapter adds nothing
    to e and has the target's final norm, so that it says what the exit states say through norm and head; trained, it
    says more (`kangaroo_fit`).

    Args:
        target: whose exit states it reads.
        heads: of its attention; the target's number by default.
        base: of the rotary angles.
        seed: of the weights to begin with.

    Raises:
        ValueError: H is not an even number of units per head.

    Source: Liu et al., arXiv:2404.18911, section 3.2. The weights to begin with are ours.
    """

    def __init__(self, target: EarlyExit, *, heads: int | None = None, base: float = 10_000.0, seed: int = 0) -> None:
        super().__init__()
        stack = target.stack
        self.width, self.exit, self.base = stack.width, target.exit, base
        self.heads = heads or int(stack.network.config.num_attention_heads)
        if self.width % (2 * self.heads):
            raise ValueError(f"{self.heads} heads cannot share {self.width} units evenly, an even number each")
        self.rms = nn.RMSNorm(self.width, eps=1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inward = nn.Linear(self.width, 3 * self.width, bias=False)
            nn.init.normal_(self.inward.weight, std=self.width**-0.5)
        self.outward = nn.Linear(self.width, self.width, bias=False)
        nn.init.zeros_(self.outward.weight)
        self.norm = copy.deepcopy(stack.norm).float().requires_grad_(True)
        self.to(stack.head.weight.device)
        self.eval()

    def forward(self, exits: Tensor, call: Call, layer: SlotLayer | None = None) -> Tensor:
        """A(e) [B, n, H] in float32.

        Args:
            exits: e.
            call: where they stand, and what they see.
            layer: keys and values of those before; None where the call has all there is.
        """
        batch, n, width = exits.shape
        start = exits.to(self.outward.weight.device, torch.float32)
        parts = self.inward(self.rms(start)).view(batch, n, 3, self.heads, width // self.heads).transpose(1, 3)
        queries, keys, values = parts.unbind(2)
        queries, keys = self._turned(queries, call.positions), self._turned(keys, call.positions)
        if layer is not None:
            keys, values = layer.update(keys, values)
        mask = None if call.visible is None else call.visible[:, None].to(keys.device)
        # Without a mask the call stands at the beginning or is of one token.
        seen = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None and n > 1)
        result: Tensor = self.norm(start + self.outward(seen.transpose(1, 2).reshape(batch, n, width)))
        return result

    def next(self, hidden: Tensor, target: EarlyExit) -> HeadNext:
        """q of A(e) [B, n, H], through the target's head."""
        head = target.stack.head
        return HeadNext(hidden.to(head.weight.device, head.weight.dtype), head)

    def check(self, target: EarlyExit) -> None:
        """Raise ValueError if a target has other exit states."""
        if (self.width, self.exit) != (target.stack.width, target.exit):
            raise ValueError(
                f"the adapter reads states of {self.width} units after layer {self.exit}; {target.name} gives "
                f"{target.stack.width} units after layer {target.exit}"
            )

    def save(self, folder: str | Path, *, target: EarlyExit) -> None:
        """Write to a folder.

        Raises:
            OutputError: the folder cannot be written.
        """
        _saved.save(
            folder,
            _KIND,
            settings={"width": self.width, "exit": self.exit, "heads": self.heads, "base": self.base},
            weights=self.state_dict(),
            digests={"target": target.digest, "vocabulary": target.vocab.digest},
        )

    @classmethod
    def load(cls, folder: str | Path, *, target: EarlyExit) -> KangarooAdapter:
        """Read what `save` wrote, for the same target.

        Raises:
            ModelError: there is no whole adapter in the folder, or it is for another model or exit.
        """
        saved = _saved.load(folder, _KIND)
        saved.check(target=target.digest, vocabulary=target.vocab.digest)
        try:
            settings = saved.settings
            if settings["exit"] != target.exit:
                raise ModelError(
                    f"the {_KIND} in {folder} reads the states after layer {settings['exit']}, and {target.name} gives "
                    f"those after layer {target.exit}; make an EarlyExit with exit={settings['exit']}"
                )
            adapter = cls(target, heads=settings["heads"], base=settings["base"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder} holds no whole {_KIND} ({error}); save it again") from error
        saved.fill(adapter)
        return adapter

    def _turned(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Vectors [B, heads, n, D], the first half of each rotated against the second by angles p base^(-2 i / D)."""
        half = vectors.shape[-1] // 2
        rates = self.base ** -(torch.arange(half, device=vectors.device) / half)
        angles = positions.to(vectors.device)[:, None, :, None] * rates
        first, second = vectors[..., :half], vectors[..., half:]
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)

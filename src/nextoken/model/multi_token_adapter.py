"""MultiTokenAdapter: what a frozen decoder is given to guess tokens ahead: masks, gated LoRA, a sampler head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.model._kv import KVMemory, laid_out
from nextoken.model._saved import load, save
from nextoken.model.hf import HFModel
from nextoken.model.lora import GatedLora
from nextoken.model.stack import Call, Stack

_KIND = "multi-token adapter"


class SamplerHead(nn.Module):
    """s [..., H] = f_2(f_1([E(y); z])), f(u) = LayerNorm(silu(W u + b)): the state of a mask once the token before the
    one that it guesses is known; the model's own head over s gives the guess.

    The scale of the last norm begins as that of the model's final norm, at which its head is used to read.

    Args:
        embedding_width, width: d of E(y) and H of z.
        scale: [H], where the last norm's scale begins; None for 1.
        seed: of the weights to begin with.

    Source: arXiv:2507.11851, section 3.
    """

    def __init__(self, embedding_width: int, width: int, *, scale: Tensor | None = None, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(embedding_width + width, width), nn.Linear(width, width)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        if scale is not None:
            with torch.no_grad():
                self.second_norm.weight.copy_(scale)

    def forward(self, previous: Tensor, states: Tensor) -> Tensor:
        """s [..., H] from E(y) [..., d] and z [..., H]."""
        both = torch.cat([previous, states], -1).to(self.first.weight.device, self.first.weight.dtype)
        found: Tensor = self.second_norm(F.silu(self.second(self.first_norm(F.silu(self.first(both))))))
        return found


class MultiTokenAdapter(nn.Module):
    """z_1 .. z_k = h(m_1), .., h(m_k) of a text x_1 .. x_n m_1 .. m_k, in which k masks with embeddings of their own
    stand for the tokens to come: m_j at position n + j is there to tell x_{n + 1 + j}.

    The model's own state at x_n tells x_{n+1} as ever, so k masks reach k tokens further. Low-rank additions to the
    model's linear layers are on at masks only and no token sees a mask; hence the states of tokens are the model's own.
    A mask sees the text before it and the masks before it of its own block, so several blocks, one for each of several
    beginnings of a text, go through in one pass. Masks are embeddings and no tokens: nothing can ever say one.

    Args:
        model: the decoder, built like Llama; its weights are never changed.
        masks: k.
        rank, alpha, targets: of the low-rank additions, see `GatedLora`; alpha is the rank by default.
        seed: of the weights to begin with.

    Raises:
        ModelError: the model cannot be run layer by layer, or has none of the targets.
        ValueError: fewer than no masks, or rank below 1.

    Source: Samragh et al., arXiv:2507.11851, section 3.
    """

    def __init__(
        self,
        model: HFModel,
        *,
        masks: int = 4,
        rank: int = 16,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if masks < 0:
            raise ValueError(f"masks must be at least 0, got {masks}")
        self.stack = stack = Stack(model)
        self.lora = GatedLora(stack, rank=rank, alpha=rank if alpha is None else alpha, targets=targets, seed=seed)
        device, embeddings = stack.network.device, stack.model.embeddings(torch.arange(stack.model.vocab.size)).detach()
        noise = torch.randn(masks, embeddings.shape[-1], generator=torch.Generator().manual_seed(seed)).to(device)
        self.masks = nn.Parameter(embeddings.float().mean(0) + noise * embeddings.float().std())
        scale = getattr(stack.norm, "weight", None)
        self.sampler = SamplerHead(embeddings.shape[-1], stack.width, scale=scale, seed=seed).to(device)

    def call(self, memory: KVMemory, tokens: Tensor, parents: Tensor | None, nodes: Tensor, *, masks: int) -> Call:
        """The call for tokens [B, n], as in `LanguageModel.extend`, and then a block of masks after each of some nodes.

        Args:
            memory: not changed by it; masks lie beyond the slots that its tokens take, and are overwritten later.
            nodes: [B, m], which nodes; a negative one stands for none, and its block for nothing.
            masks: how many there are in a block.
        """
        positions, slots, held, visible = laid_out(memory.lengths, tokens, parents)
        (batch, n), extra = tokens.shape, nodes.shape[1] * masks
        past, node = max(memory.lengths), nodes.clamp(min=0)
        ahead = positions.gather(1, node)[:, :, None] + 1 + torch.arange(masks)
        # A mask beyond the context guesses what has no place there; some rotary embeddings change at such positions.
        ahead = ahead.reshape(batch, extra).clamp(max=(self.stack.model.context_length or 1 << 40) - 1)
        seen = visible.gather(1, node[:, :, None].expand(-1, -1, past + n)).repeat_interleave(masks, 1)
        block = torch.arange(nodes.shape[1]).repeat_interleave(masks)
        own = (block[:, None] == block).tril()
        visible = torch.cat([F.pad(visible, (0, extra)), torch.cat([seen, own.expand(batch, -1, -1)], 2)], 1)
        positions = torch.cat([positions, ahead], 1)
        slots = torch.cat([slots, past + n + torch.arange(extra).expand(batch, extra)], 1)
        held = torch.cat([held.expand(batch, -1), ahead], 1)
        device = self.stack.network.device
        return Call(
            positions.to(device),
            visible.to(device),
            held.to(device),
            memory.cache,
            past,
            past + n + extra,
            slots.to(device),
        )

    def read(
        self, memory: KVMemory, tokens: Tensor, parents: Tensor | None, nodes: Tensor, *, masks: int
    ) -> tuple[Tensor, Tensor]:
        """Normed states [B, n, H] of tokens and [B, m, k, H] of the masks after some nodes, in one pass; see `call`."""
        (batch, n), blocks = tokens.shape, nodes.shape[1]
        inputs = torch.cat([self.stack.embed(tokens), self._inputs(batch, blocks, masks)], 1)
        gate = (torch.arange(inputs.shape[1]) >= n).to(inputs.device)[None]
        with self.lora.at(gate):
            call = self.call(memory, tokens, parents, nodes, masks=masks)
            states = self.stack.finish(self.stack.run(inputs, range(self.stack.depth), call))
        return states[:, :n], states[:, n:].reshape(batch, blocks, masks, states.shape[2])

    def ahead(self, tokens: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """What `read` gives of texts [B, n] from their start and all masks of the blocks, with gradients of the masks.

        Nothing of a token depends on this adapter, so the tokens are read first and without gradients.
        """
        stack, (batch, n), blocks, masks = self.stack, tokens.shape, nodes.shape[1], len(self.masks)
        memory = stack.memory(batch)
        with torch.no_grad():
            plain = stack.call(memory, tokens)
            states = stack.finish(stack.run(stack.embed(tokens), range(stack.depth), plain))
        call = self.call(memory, tokens, None, nodes, masks=masks)
        assert call.visible is not None and call.slots is not None
        rest = Call(
            call.positions[:, n:], call.visible[:, n:], call.held, call.cache, call.past, call.end, call.slots[:, n:]
        )
        with self.lora.at(1.0):
            found = stack.finish(stack.run(self._inputs(batch, blocks, masks), range(stack.depth), rest))
        return states, found.reshape(batch, blocks, masks, found.shape[2])

    def told(self, previous: Tensor, states: Tensor) -> Tensor:
        """s [..., H], to be read by the model's head: the sampler's of tokens [...] and states of masks [..., H]."""
        found: Tensor = self.sampler(self.stack.embed(previous), states)
        return found

    def save(self, folder: str | Path) -> None:
        """Write to a folder: weights as safetensors, settings and the model's digests as JSON.

        Raises:
            OutputError: the folder cannot be written.
        """
        settings = {
            "masks": len(self.masks),
            "rank": self.lora.rank,
            "alpha": self.lora.alpha,
            "targets": self.lora.targets,
        }
        save(folder, _KIND, settings=settings, weights=self.state_dict(), digests=self._digests(self.stack.model))

    @classmethod
    def load(cls, folder: str | Path, model: HFModel) -> MultiTokenAdapter:
        """Read what `save` wrote, for the same model.

        Raises:
            ModelError: there is no whole adapter in the folder, or the model is another.
        """
        saved = load(folder, _KIND)
        saved.check(**cls._digests(model))
        adapter = cls(model, **saved.settings)
        saved.fill(adapter)
        return adapter

    @staticmethod
    def _digests(model: HFModel) -> dict[str, str]:
        return {"model": model.digest, "vocabulary": model.vocab.digest}

    def _inputs(self, batch: int, blocks: int, masks: int) -> Tensor:
        given = self.masks[:masks].repeat(blocks, 1).to(self.stack.network.dtype)
        return given.expand(batch, -1, -1)

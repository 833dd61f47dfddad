"""Thinker: a decoder that some tokens go through more than once, whoever says which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.lora import GatedLora
from nextoken.model.stack import Call, Stack
from nextoken.route._depth_memory import DepthMemory, Passes
from nextoken.route.think_decider import Seen

_ENTRIES = 1 << 24
"""Logits, or numbers of embeddings, made at once."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What a pass left of its nodes [B, k].

    Args:
        depth: number of the pass, from 0.
        nodes: index of the token within the call.
        active: whether there is one.
        tokens, positions: [B, k].
        states: after each of the layers asked for [B, k, H], in this pass.
        total: sum of norm(h) over the passes so far [B, k, H].
    """

    depth: int
    nodes: Tensor
    active: Tensor
    tokens: Tensor
    positions: Tensor
    states: tuple[Tensor, ...]
    total: Tensor


@dataclass(frozen=True, eq=False)
class Thought:
    """What tokens [B, n] came to.

    Args:
        total: sum of norm(h) over the passes of each token [B, n, H], of which the head makes z.
        passes: how many each token made [B, n]; 0 where absent.
        read: tokens in each pass.
    """

    total: Tensor
    passes: Tensor
    read: tuple[int, ...]


class Thinker:
    """Passes 0 .. D - 1 over a stack, the later ones with the adapter on and fed mixtures of what was foreseen.

    Args:
        model: whose head must be linear without bias and soft cap, so that sums of logits are logits of sums.
        adapter: on in later passes.
        iterations: D.
        leading: tokens in a mixture.

    Raises:
        ModelError: the model is built otherwise.
        ValueError: the adapter is of another model, or a number is below 1.
    """

    def __init__(self, model: HFModel, adapter: GatedLora, *, iterations: int, leading: int) -> None:
        if iterations < 1 or leading < 1:
            raise ValueError(f"iterations and leading must be at least 1, got {iterations} and {leading}")
        self.model, self.adapter, self.stack = model, adapter, Stack(model)
        self.iterations, self.leading = iterations, min(leading, model.vocab.size)
        head = self.stack.head
        if head.bias is not None or head.softcap is not None:
            raise ModelError(
                f"the head of {model.name} has a bias or a soft cap, so that sums of its logits are no logits of sums; "
                "take a model with a plain linear head (Llama, Mistral, Qwen, SmolLM, OLMo)"
            )
        own = {id(part) for layer in self.stack.layers for part in layer.modules()}
        if not all(id(part) in own for part in adapter._adapted.values()):
            raise ValueError(f"the adapter was made for another model than {model.name}: make GatedLora(Stack(model))")

    def run(
        self,
        memory: DepthMemory,
        tokens: Tensor,
        parents: Tensor | None,
        more: Callable[[Pass], Tensor],
        *,
        layers: Sequence[int] = (),
    ) -> Thought:
        """Feed tokens [B, n], with gradients where nothing was remembered before.

        Args:
            more: which nodes [B, k] of a pass that is not the last make another.
            layers: after which the states of every pass are told.
        """
        batch, n = tokens.shape
        calls = Passes(self.stack, memory, tokens, parents)
        nodes, active = torch.arange(n).expand(batch, n), tokens != ABSENT
        total, states = self._pass(self.stack.embed(tokens), calls.first(), layers, is_later=False)
        passes, read = active.long(), [int(active.sum())]
        for depth in range(1, self.iterations):
            told = tokens.gather(1, nodes), calls.positions.gather(1, nodes)
            chosen = more(Pass(depth - 1, nodes, active, *told, states, _at(total, nodes))).cpu() & active
            most = int(chosen.sum(1).max())
            if not most:
                break
            order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True)[:, :most]
            nodes, active = nodes.gather(1, order), chosen.gather(1, order)
            foreseen = self.mixture(_at(total, nodes).flatten(0, 1)).view(batch, most, -1)
            call = calls.again(nodes, active, depth)
            said, states = self._pass(foreseen.to(self.model.network.dtype), call, layers, is_later=True)
            # Rows with fewer hard tokens than others are filled up with tokens that must be left as they are.
            added = torch.where(active.to(said.device)[..., None], _wide(said), 0)
            total = _wide(total).scatter_add(1, nodes.to(said.device)[..., None].expand_as(added), added)
            passes = passes.scatter_add(1, nodes, active.long())
            read.append(int(active.sum()))
        calls.done()
        return Thought(total, passes, tuple(read))

    def seen(self, made: Pass, leading: int) -> Seen:
        """What a decider that reads so many logits is told of the active tokens of a pass."""
        active = made.active.to(made.total.device)
        total = made.total[active]
        states = [part[active] for part in made.states]
        return Seen(
            torch.stack(states, 1) if states else total.new_zeros(len(total), 0, total.shape[1]),
            self._leading_logits(total, leading) if leading else total.new_zeros(len(total), 0),
            made.tokens[made.active],
            made.positions[made.active],
            made.depth,
        )

    def logits(self, total: Tensor) -> Tensor:
        """z [..., V] of sums of norm(h) [..., H], in float32 or wider, with gradients to the head as well."""
        z = nn.functional.linear(_wide(total), _wide(self.model.model.get_output_embeddings().weight))
        scale = self.stack.head.scale
        return z if scale == 1.0 else z * scale

    def mixture(self, total: Tensor) -> Tensor:
        """sum_v softmax_K(z)_v E[v] [N, H] over the K largest of z, of N sums of norm(h) [N, H]."""

        def mixed(block: Tensor) -> Tensor:
            z, tokens = self.logits(block).topk(self.leading, -1)
            rows = _wide(self.stack.embed(tokens))
            return (torch.softmax(z, -1)[:, None, :].to(rows.dtype) @ rows)[:, 0]

        size = max(self.model.vocab.size, self.leading * self.stack.width)
        return torch.cat([mixed(block) for block in torch.split(total, max(1, _ENTRIES // size))])

    def _leading_logits(self, total: Tensor, count: int) -> Tensor:
        blocks = torch.split(total, max(1, _ENTRIES // self.model.vocab.size))
        return torch.cat([self.logits(block).topk(count, -1).values for block in blocks])

    def _pass(
        self, inputs: Tensor, call: Call, layers: Sequence[int], *, is_later: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """norm(h_N), and h after each of these layers."""
        hidden, begin, held = inputs, 0, dict[int, Tensor]()
        with self.adapter.at(1.0) if is_later else nullcontext():
            for stop in sorted({*layers, self.stack.depth}):
                hidden = self.stack.run(hidden, range(begin, stop), call)
                held[stop], begin = hidden, stop
        return self.stack.finish(hidden), tuple(held[layer] for layer in layers)


def _at(states: Tensor, nodes: Tensor) -> Tensor:
    """[B, k, H] of [B, n, H] at nodes [B, k]."""
    index = nodes.to(states.device)[..., None].expand(-1, -1, states.shape[2])
    return states.gather(1, index)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

"""Keys and values of tokens that went through a decoder more than once: the first time all, later times only some.

The first pass has a memory of its own, in which the slot of a token is its position, as though there were no later
passes. Those of later passes stand behind it, packed to the left in each row, so that only tokens that went through
again take room. What a slot holds is told by `Slots`, not by its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nextoken.model import tree
from nextoken.model._kv import KVMemory, SlotCache, laid_out
from nextoken.model.base import ABSENT, Memory
from nextoken.model.stack import Call, Stack

_NONE = -1


@dataclass(frozen=True, eq=False)
class Slots:
    """What the slots of later passes hold, [B, U] each.

    Args:
        positions: of the token; -1 for an empty slot, after all others of its row.
        depths: number of the pass, from 1.
        nodes: index of the token within the call under way; -1 for tokens kept before it.
    """

    positions: Tensor
    depths: Tensor
    nodes: Tensor

    @classmethod
    def none(cls, batch: int) -> Slots:
        empty = torch.full((batch, 0), _NONE)
        return cls(empty, empty, empty)

    @property
    def width(self) -> int:
        return self.positions.shape[1]

    @property
    def used(self) -> Tensor:
        """[B]."""
        return (self.positions != _NONE).sum(1)

    def and_these(self, slots: Tensor, positions: Tensor, depth: int, nodes: Tensor) -> Slots:
        """With others at slots [B, k]; positions and nodes are -1 where there is none."""
        wider = torch.full((len(slots), max(0, int(slots.max()) + 1 - self.width)), _NONE)
        depths = torch.where(positions == _NONE, _NONE, depth)
        pairs = ((self.positions, positions), (self.depths, depths), (self.nodes, nodes))
        return Slots(*(torch.cat([old, wider], 1).scatter(1, slots, new) for old, new in pairs))

    def seen(self, nodes: Tensor, depth: int, ancestry: Tensor) -> Tensor:
        """[B, k, U]: which slots the nodes [B, k] of a call see in pass number `depth`.

        Args:
            ancestry: [B, n, n] of the call.
        """
        rows = torch.arange(len(nodes))[:, None]
        others = self.nodes.clamp(min=0)[:, None, :].expand(-1, nodes.shape[1], -1)
        follows = (self.nodes == _NONE)[:, None, :] | ancestry[rows, nodes].gather(2, others)
        return follows & ((self.positions != _NONE) & (self.depths <= depth))[:, None, :]

    def settled(self) -> Slots:
        """With all tokens of the call taken as kept."""
        return Slots(self.positions, self.depths, torch.full_like(self.nodes, _NONE))

    def packed(self, order: Tensor, counts: Tensor) -> Slots:
        """Of each row the first counts[b] of the slots order[b]."""
        kept = torch.arange(order.shape[1]) < counts[:, None]
        parts = (self.positions, self.depths, self.nodes)
        return Slots(*(torch.where(kept, part.gather(1, order), _NONE) for part in parts))

    def rows(self, rows: Sequence[int]) -> Slots:
        chosen = torch.as_tensor(rows)
        return Slots(self.positions[chosen], self.depths[chosen], self.nodes[chosen])

    @staticmethod
    def joined(every: Sequence[Slots]) -> Slots:
        width = max(slots.width for slots in every)

        def below(parts: Sequence[Tensor]) -> Tensor:
            padded = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=_NONE) for part in parts]
            return torch.cat(padded)

        return Slots(
            below([slots.positions for slots in every]),
            below([slots.depths for slots in every]),
            below([slots.nodes for slots in every]),
        )


class DepthMemory(Memory):
    """The first pass in `first`, later ones in `cache`, of which `slots` tells what it holds.

    Args:
        owner: the model; what it remembers is worth nothing to another.
    """

    def __init__(self, owner: object, first: KVMemory, cache: SlotCache, slots: Slots) -> None:
        self.owner, self.first, self.cache, self.slots = owner, first, cache, slots

    @classmethod
    def empty(cls, owner: object, stack: Stack, batch: int) -> DepthMemory:
        return cls(owner, stack.memory(batch), SlotCache(), Slots.none(batch))

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        size = 1 + max(
            [int(self.slots.nodes.max()) if self.slots.width else 0, *(max(path, default=0) for path in nodes)]
        )
        chosen = torch.zeros(len(nodes), size, dtype=torch.bool)
        for row, path in enumerate(nodes):
            chosen[row, list(path)] = True
        self.first.keep(nodes)
        slots = self.slots
        self._only((slots.nodes == _NONE) | chosen.gather(1, slots.nodes.clamp(min=0)))
        self.slots = self.slots.settled()

    def rewind(self, lengths: Sequence[int]) -> None:
        self.first.rewind(lengths)
        self._only(self.slots.positions < torch.tensor(lengths)[:, None])

    def fork(self, rows: Sequence[int]) -> DepthMemory:
        cache = SlotCache.gather([(self.cache, rows, self.slots.width)])
        return DepthMemory(self.owner, self.first.fork(rows), cache, self.slots.rows(rows))

    def join(self, others: Sequence[Memory]) -> DepthMemory:
        every = [self]
        for other in others:
            if not isinstance(other, DepthMemory) or other.owner is not self.owner:
                raise ValueError("only states of the same model can be joined")
            every.append(other)
        parts = [(memory.cache, range(len(memory.first.lengths)), memory.slots.width) for memory in every]
        first = self.first.join([memory.first for memory in every[1:]])
        return DepthMemory(self.owner, first, SlotCache.gather(parts), Slots.joined([memory.slots for memory in every]))

    def _only(self, wanted: Tensor) -> None:
        """Forget the slots [B, U] that are not wanted, and pack the others to the left."""
        wanted = wanted & (self.slots.positions != _NONE)
        counts = wanted.sum(1)
        order = torch.argsort(wanted.int(), dim=1, descending=True, stable=True)[:, : int(counts.max())]
        target = torch.arange(order.shape[1]).expand_as(order)
        if not torch.equal(order, target):
            self.cache.move(order, target)
        self.slots = self.slots.packed(order, counts)


class Behind(SlotCache):
    """The cache of a later pass: it writes to `later`, and gives what `first` holds and then what `later` holds."""

    def __init__(self, first: SlotCache, later: SlotCache) -> None:
        super().__init__()
        self.first, self.later = first, later

    def open(self, past: int, end: int, slots: Tensor | None) -> None:
        self.later.open(past, end, slots)

    def reach(self, depth: int) -> None:
        self.later.reach(depth)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.later.update(key_states, value_states, layer_idx)
        held = self.first.layers[layer_idx]
        return torch.cat([held.keys, keys], 2), torch.cat([held.values, values], 2)


class Passes:
    """The calls of the passes that the tokens [B, n] of one `extend` make: the first for all, later ones for some.

    A token at position p in pass number d sees what was written at p' <= p in passes d' <= d along its own path. The
    memory is unchanged until `done`.
    """

    def __init__(self, stack: Stack, memory: DepthMemory, tokens: Tensor, parents: Tensor | None) -> None:
        self.stack, self.memory, self.tokens, self.parents = stack, memory, tokens, parents
        self.slots = memory.slots

    @cached_property
    def _laid_out(self) -> tuple[Tensor, Tensor, Tensor]:
        positions, _, held, visible = laid_out(self.memory.first.lengths, self.tokens, self.parents)
        return positions, held.expand(len(positions), -1), visible

    @property
    def positions(self) -> Tensor:
        """[B, n]."""
        return self._laid_out[0]

    @cached_property
    def _ancestry(self) -> Tensor:
        batch, n = self.tokens.shape
        if self.parents is not None:
            return tree.ancestry(self.parents)
        return torch.ones(n, n, dtype=torch.bool).tril().expand(batch, n, n)

    def first(self) -> Call:
        """For all tokens."""
        return self.stack.call(self.memory.first, self.tokens, self.parents)

    def again(self, nodes: Tensor, active: Tensor, depth: int) -> Call:
        """For the nodes [B, k] that are active [B, k], the first ones of each row, in pass number `depth`."""
        rows = torch.arange(len(nodes))[:, None]
        positions, held, visible = self._laid_out
        positions, visible = positions[rows, nodes], visible[rows, nodes]
        slots, past = self.slots.used[:, None] + torch.arange(nodes.shape[1]), self.slots.width
        self.slots = self.slots.and_these(
            slots, torch.where(active, positions, _NONE), depth, torch.where(active, nodes, _NONE)
        )
        seen = torch.cat([visible, self.slots.seen(nodes, depth, self._ancestry)], 2)
        places = torch.cat([held, self.slots.positions.clamp(min=0)], 1)
        device = self.stack.model.network.device
        cache = Behind(self.memory.first.cache, self.memory.cache)
        return Call(
            positions.to(device), seen.to(device), places.to(device), cache, past, self.slots.width, slots.to(device)
        )

    def done(self) -> None:
        """Take a chain as kept, a tree as waiting."""
        if self.parents is None:
            self.memory.first.advance((self.tokens != ABSENT).sum(1).tolist())
        self.memory.slots = self.slots if self.parents is not None else self.slots.settled()

"""Calls for some tokens of a call, where layers are run on these only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextoken.model._kv import KVMemory, Place, SlotCache, SlotLayer, laid_out
from nextoken.model.stack import Call


def spelt_out(call: Call, memory: KVMemory, tokens: Tensor, parents: Tensor | None) -> Call:
    """The call that a `Stack` made for these tokens over this memory, with what each token sees written out."""
    device = call.positions.device
    positions, slots, held, visible = (part.to(device) for part in laid_out(memory.lengths, tokens, parents))
    return Call(positions, visible, held, call.cache, call.past, call.end, slots)


def narrowed(call: Call, rows: Tensor, columns: Tensor) -> Call:
    """The call for the tokens at rows [B', 1] and columns [B', n'] of one that is spelt out, in their own slots."""
    assert call.visible is not None and call.held is not None and call.slots is not None and call.cache is not None
    batch, some = len(call.positions), rows[:, 0]
    return Call(
        call.positions[rows, columns],
        call.visible[rows, columns],
        call.held if len(call.held) == 1 else call.held[some],
        call.cache if len(rows) == batch else RowCache(call.cache, some, batch),
        call.past,
        call.end,
        call.slots[rows, columns],
    )


class RowCache(SlotCache):
    """What layers write for chosen rows goes into the whole cache, and they see what it holds of these rows.

    Args:
        whole: the cache of all rows.
        rows: [B'], which of them.
        batch: how many rows there are in all.
    """

    def __init__(self, whole: SlotCache, rows: Tensor, batch: int) -> None:
        super().__init__()
        self.whole, self.rows, self.batch = whole, rows, batch

    def reach(self, depth: int) -> None:
        self.whole.reach(depth)
        for layer in self.whole.layers[len(self.layers) : depth]:
            self.layers.append(_RowLayer(self.place, layer, self.rows, self.batch))


class _RowLayer(SlotLayer):
    def __init__(self, place: Place, whole: SlotLayer, rows: Tensor, batch: int) -> None:
        super().__init__(place)
        self.whole, self.rows, self.batch = whole, rows, batch

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write those [B', heads, n, width] of the call, and return those of all slots of the rows."""
        whole, end = self.whole, self.place.end
        if whole.buffers is None or whole.buffers[0].shape[2] < end:
            like = (states[:1].expand(self.batch, -1, -1, -1) for states in (key_states, value_states))
            whole._grow(*like, end=end)
        assert whole.buffers is not None and self.place.slots is not None
        rows, slots = self.rows.to(key_states.device), self.place.columns(key_states.device)[1]
        for buffer, states in zip(whole.buffers, (key_states, value_states), strict=True):
            buffer[rows[:, None], :, slots] = states.transpose(1, 2)
        self.keys, self.values = (torch.index_select(buffer[:, :, :end], 0, rows) for buffer in whole.buffers)
        return self.keys, self.values

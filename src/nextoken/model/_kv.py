"""Keys and values of attention models: rows of different lengths, trees, keep, rewind, fork, join.

Row b with L_b kept tokens has them in slots 0 .. L_b - 1 of one buffer [B, heads, capacity, width] per layer, so the
slot of a kept token is its position. A call writes its n nodes to slots L_b .. L_b + n - 1, whatever is left there is
overwritten later, and a mask keeps everything else out of sight: forgetting costs nothing, keeping a path of a tree
moves its nodes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from nextoken.model import tree
from nextoken.model._network import Network
from nextoken.model.base import ABSENT, Memory

_FULL, _SLIDING = "full_attention", "sliding_attention"
_SPARE = 64  # slots reserved ahead


@dataclass(frozen=True)
class Visibility:
    """How far the layers of a model see: windows in tokens (None: everything), and how it wants to be told.

    `windows` has one entry where all layers are alike, and is then given as one mask, else a mask per kind of layer.
    """

    windows: dict[str, int | None]

    @classmethod
    def of(cls, config: Any) -> Visibility | None:
        """That of a text configuration, None where layers are of kinds that masks cannot describe to them."""
        if getattr(config, "attention_chunk_size", None) or hasattr(config, "attention_types"):
            return None
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or [_FULL if window is None else _SLIDING])
        if not kinds <= {_FULL, _SLIDING}:
            return None
        return cls({kind: window if kind == _SLIDING else None for kind in sorted(kinds)})

    def mask(self, positions: Tensor, slots: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Additive masks [B, 1, n, S].

        Args:
            positions: [B, n] of the nodes.
            slots: [B or 1, S], positions of what the slots hold.
            visible: [B, n, S], which slots a node sees when there is no window.
        """
        masks: dict[str, Tensor] = {}
        for kind, window in self.windows.items():
            seen = visible if window is None else visible & (slots[:, None, :] > positions[:, :, None] - window)
            blocked = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            masks[kind] = blocked.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


class Place:
    """Where the call under way writes: nodes from slot `start` on, or node (b, i) at `slots[b, i]`; before `end`."""

    def __init__(self) -> None:
        self.start = self.end = 0
        self.slots: Tensor | None = None

    def columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Index pair ([B, 1], [B, n]) of rows and slots on a device."""
        assert self.slots is not None
        if self.slots.device != device:
            self.slots = self.slots.to(device)
        return torch.arange(self.slots.shape[0], device=device)[:, None], self.slots


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in buffers that grow by half."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place, self.filled = place, 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def get_seq_length(self) -> int:
        return self.filled

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values [B, heads, n, width] of the call and return those of all slots in use."""
        place = self.place
        if self.buffers is None or self.buffers[0].shape[2] < place.end:
            self._grow(key_states, value_states)
        assert self.buffers is not None
        keys, values = self.buffers
        if place.slots is None:
            keys[:, :, place.start : place.end] = key_states
            values[:, :, place.start : place.end] = value_states
        else:
            rows, slots = place.columns(keys.device)
            keys[rows, :, slots] = key_states.transpose(1, 2)
            values[rows, :, slots] = value_states.transpose(1, 2)
        self.filled = place.end
        self.keys, self.values = keys[:, :, : place.end], values[:, :, : place.end]
        return self.keys, self.values

    def reserve(self, slots: int) -> None:
        """Have at least so many slots; a layer that the last tokens did not run through has fewer than others."""
        if self.buffers is not None and self.buffers[0].shape[2] < slots:
            self._grow(*self.buffers, end=slots)

    def _grow(self, key_states: Tensor, value_states: Tensor, *, end: int | None = None) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        old = self.buffers
        used = 0 if old is None else old[0].shape[2]
        size = max((self.place.end if end is None else end) + _SPARE, used + used // 2)
        fresh = []
        for which, states in enumerate((key_states, value_states)):
            # Zeros, for what a mask blocks is still multiplied by 0: uninitialised memory may hold nan.
            buffer = states.new_zeros(*states.shape[:2], size, states.shape[3])
            if old is not None:
                buffer[:, :, :used] = old[which]
            fresh.append(buffer)
        self.buffers = (fresh[0], fresh[1])


class SlotCache(Cache):  # type: ignore[misc]
    """The layers of one memory."""

    layers: list[SlotLayer]

    def __init__(self) -> None:
        self.place = Place()
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self.place))

    def open(self, past: int, end: int, slots: Tensor | None) -> None:
        """Before a call: how many slots are in use, how many will be, and where its nodes go if rows differ."""
        self.place.start, self.place.end, self.place.slots = past, end, slots
        for layer in self.layers:
            layer.filled = past

    def reach(self, depth: int) -> None:
        """Have `depth` layers, some of them empty so far: one in the middle may be the first to be run."""
        while len(self.layers) < depth:
            self.layers.append(SlotLayer(self.place))

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots source [B, m] to target [B, m] in every layer."""
        for layer in self.layers:
            if layer.buffers is None:
                continue
            layer.reserve(1 + int(max(source.max(), target.max())))
            device = layer.buffers[0].device
            rows, source, target = (
                torch.arange(len(source), device=device)[:, None],
                source.to(device),
                target.to(device),
            )
            for buffer in layer.buffers:
                buffer[rows, :, target] = buffer[rows, :, source]

    @classmethod
    def gather(cls, parts: Sequence[tuple[SlotCache, Sequence[int], int]]) -> SlotCache:
        """A new cache of chosen rows: for each part a cache, rows of it and how many slots of them are in use."""
        result = cls()
        for index in range(max(len(cache.layers) for cache, _, _ in parts)):
            layer = SlotLayer(result.place)
            result.layers.append(layer)
            given = [cache.layers[index].buffers if index < len(cache.layers) else None for cache, _, _ in parts]
            shape_of = next((buffers for buffers in given if buffers is not None), None)
            if shape_of is None:
                continue
            size = max(used for _, _, used in parts) + _SPARE
            batch = sum(len(rows) for _, rows, _ in parts)
            fresh = []
            for which, like in enumerate(shape_of):
                buffer = like.new_zeros(batch, like.shape[1], size, like.shape[3])
                at = 0
                for buffers, (_, rows, used) in zip(given, parts, strict=True):
                    if buffers is not None and used:
                        chosen = torch.as_tensor(rows, device=buffers[which].device)
                        had = buffers[which][:, :, :used].index_select(0, chosen)
                        buffer[at : at + len(rows), :, : had.shape[2]] = had
                    at += len(rows)
                fresh.append(buffer)
            layer.buffers = (fresh[0], fresh[1])
            layer.dtype, layer.device, layer.is_initialized = fresh[0].dtype, fresh[0].device, True
            layer.keys, layer.values = layer.buffers
        return result


def laid_out(lengths: Sequence[int], tokens: Tensor, parents: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions and slots [B, n] of tokens fed to rows of these lengths, the position that each slot then holds
    [B or 1, S], and which slots each token sees [B, n, S]."""
    n, past = tokens.shape[1], max(lengths)
    present = tokens != ABSENT
    base = torch.tensor(lengths)[:, None]
    slots = base + torch.arange(n)
    held = torch.arange(past + n)[None]
    if parents is None:
        positions = slots * present
        visible = held[:, None, :] <= positions[:, :, None]
    else:
        positions = (base + tree.depths(parents)) * present
        spread = slots[:, None, :].expand(-1, n, -1)
        visible = (held < base)[:, None, :].repeat(1, n, 1).scatter_(2, spread, tree.ancestry(parents))
        held = held.repeat(len(base), 1).scatter_(1, slots, positions)
    return positions, slots, held, visible


class KVMemory(Memory):
    """Rows of kept lengths L_b over one `SlotCache`.

    A call is `arguments` (what the model must be given), the model's forward pass, then `advance`; until then the
    memory is unchanged, so an interrupted call leaves it as it was.
    """

    def __init__(self, lengths: Sequence[int], visibility: Visibility, cache: SlotCache | None = None) -> None:
        self.lengths, self.visibility = list(lengths), visibility
        self.cache = SlotCache() if cache is None else cache

    def arguments(self, tokens: Tensor, parents: Tensor | None, network: Network) -> dict[str, Any]:
        """Arguments of the forward pass of `network` for tokens [B, n] with parents [B, n].

        Chains over rows of equal length are left to the model's own causal mask (fast kernels, no mask at all for
        n = 1), also where some rows have fewer new tokens: absent ones stand to the right of all others.
        """
        n = tokens.shape[1]
        past = max(self.lengths)
        assert network.cache_argument is not None
        arguments: dict[str, Any] = {network.cache_argument: self.cache, "use_cache": True}
        if parents is None and min(self.lengths) == past:
            self.cache.open(past, past + n, None)
            return arguments
        positions, slots, held, visible = laid_out(self.lengths, tokens, parents)
        device = network.device
        self.cache.open(past, past + n, slots.to(device))
        mask = self.visibility.mask(positions.to(device), held.to(device), visible.to(device), network.dtype)
        return {**arguments, "position_ids": positions.to(device), "attention_mask": mask}

    def advance(self, counts: Sequence[int]) -> None:
        """Take the first counts[b] tokens of a chain as kept."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, nodes))
        if any(list(path) != list(range(len(path))) for path in nodes):
            base = torch.tensor(self.lengths)[:, None]
            # Rows with shorter paths copy their surplus slots onto themselves.
            padded = [[*path, *range(len(path), longest)] for path in nodes]
            self.cache.move(base + torch.tensor(padded), base + torch.arange(longest))
        self.lengths = [length + len(path) for length, path in zip(self.lengths, nodes, strict=True)]

    def rewind(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def fork(self, rows: Sequence[int]) -> KVMemory:
        lengths = [self.lengths[row] for row in rows]
        return KVMemory(lengths, self.visibility, SlotCache.gather([(self.cache, rows, max(lengths))]))

    def join(self, others: Sequence[Memory]) -> KVMemory:
        memories = [self, *others]
        parts = []
        for memory in memories:
            if not isinstance(memory, KVMemory):
                raise ValueError("only states of the same model can be joined")
            parts.append((memory.cache, range(len(memory.lengths)), max(memory.lengths)))
        lengths = [length for memory in memories for length in memory.lengths]  # type: ignore[attr-defined]
        return KVMemory(lengths, self.visibility, SlotCache.gather(parts))

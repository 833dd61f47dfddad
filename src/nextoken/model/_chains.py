"""Memory for models that can only go on from where they are: recurrent and hybrid ones, and those that take no masks.

Rows live in blocks of equal length that share a cache of the model's own. Rows that grow differently part into blocks,
so that none is ever padded; forgetting means reading the kept tokens again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from nextoken.model._network import Network
from nextoken.model.base import ABSENT, Memory

Manner = Literal["chunks", "steps", "rereads"]
"""How a model goes on from its cache: by any number of tokens, by one at a time (several are read again from the start
when that is cheaper), or not at all, so that every call reads from the start."""

_STEPS_AT_MOST = 16


@dataclass
class Block:
    """Rows of one length: which rows of the memory they are, their tokens, a cache of the first `cached` of them."""

    members: list[int]
    tokens: list[list[int]]
    cache: Any = None
    cached: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens[0])

    def select(self, chosen: Sequence[int], members: Sequence[int]) -> Block:
        """Copies of some rows, under new row numbers."""
        cache = None
        if self.cache is not None:
            cache = copy.deepcopy(self.cache)
            cache.reorder_cache(torch.tensor(list(chosen)))
        return Block(list(members), [list(self.tokens[row]) for row in chosen], cache, self.cached)

    def part(self, keys: Sequence[int]) -> dict[int, Block]:
        """Blocks of the rows with equal keys; this one is used up."""
        if len(set(keys)) == 1:
            return {keys[0]: self}
        rows = {key: [row for row, own in enumerate(keys) if own == key] for key in sorted(set(keys))}
        return {key: self.select(chosen, [self.members[row] for row in chosen]) for key, chosen in rows.items()}

    def shorten(self, length: int) -> None:
        for row in self.tokens:
            del row[length:]
        if self.cached <= length:
            return
        if length and self.cache is not None and all(type(layer) is DynamicLayer for layer in self.cache.layers):
            self.cache.crop(length - self.cached)
            self.cached = length
        else:
            self.cache, self.cached = None, 0


@dataclass
class ChainMemory(Memory):
    """The blocks of a state's rows."""

    network: Network
    manner: Manner
    blocks: list[Block] = field(default_factory=list)

    @classmethod
    def empty(cls, network: Network, manner: Manner, batch: int) -> ChainMemory:
        return cls(network, manner, [Block(list(range(batch)), [[] for _ in range(batch)])])

    @property
    def batch(self) -> int:
        return sum(len(block.members) for block in self.blocks)

    def feed(self, tokens: Tensor) -> Tensor:
        """raw [B, n, ...] after each token of chains [B, n], which are then kept."""
        rows = tokens.tolist()
        counts = [sum(token != ABSENT for token in row) for row in rows]
        parted = [block.part([counts[member] for member in block.members]) for block in self.blocks]
        self.blocks = [part for parts in parted for part in parts.values()]
        lengths = [block.length for block in self.blocks]
        results = []
        try:
            for block in self.blocks:
                count = counts[block.members[0]]
                if count:
                    for own, member in zip(block.tokens, block.members, strict=True):
                        own.extend(rows[member][:count])
                    results.append((block, self._read(block, count)))
        except BaseException:
            for block, length in zip(self.blocks, lengths, strict=True):
                block.shorten(length)
            raise
        if (
            len(results) == 1
            and results[0][0].members == list(range(len(rows)))
            and results[0][1].shape[1] == len(rows[0])
        ):
            return results[0][1]
        if not results:
            return self.network.blank(*tokens.shape)
        like = results[0][1]
        raw = like.new_zeros(*tokens.shape, like.shape[2])
        for part, seen in results:
            raw[torch.tensor(part.members, device=raw.device), : seen.shape[1]] = seen
        return raw

    def _read(self, block: Block, count: int) -> Tensor:
        """Bring the cache up to the block's tokens; raw after the last `count` of them."""
        unread = block.length - block.cached
        if self.manner == "rereads":
            return self.network.run(torch.tensor(block.tokens), use_cache=False)[:, -count:]
        if block.cached and self.manner == "steps" and unread > _STEPS_AT_MOST:
            block.cache, block.cached, unread = None, 0, block.length
        fresh = torch.tensor([row[block.cached :] for row in block.tokens])
        # Until the pass has gone through the cache is worth nothing: an interrupted call leaves it half updated.
        cache, at = block.cache, block.cached
        block.cache, block.cached = None, 0
        if cache is None:
            cache = DynamicCache(config=self.network.config)
        name = self.network.cache_argument or "past_key_values"
        pieces = torch.split(fresh, 1, 1) if at and self.manner == "steps" else [fresh]
        raw = torch.cat([self.network.run(piece, **{name: cache}, use_cache=True) for piece in pieces], 1)
        block.cache, block.cached = cache, block.length
        return raw[:, -count:]

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        raise TypeError("a memory of chains holds no tree")

    def rewind(self, lengths: Sequence[int]) -> None:
        blocks = []
        for block in self.blocks:
            for length, part in block.part([lengths[member] for member in block.members]).items():
                part.shorten(length)
                blocks.append(part)
        self.blocks = blocks

    def fork(self, rows: Sequence[int]) -> ChainMemory:
        blocks = []
        for block in self.blocks:
            place = {member: row for row, member in enumerate(block.members)}
            members = [new for new, row in enumerate(rows) if row in place]
            if members:
                blocks.append(block.select([place[rows[new]] for new in members], members))
        return ChainMemory(self.network, self.manner, blocks)

    def join(self, others: Sequence[Memory]) -> ChainMemory:
        blocks, offset = [], 0
        for memory in (self, *others):
            if not isinstance(memory, ChainMemory):
                raise ValueError("only states of the same model can be joined")
            for block in memory.blocks:
                members = [member + offset for member in block.members]
                blocks.append(block.select(range(len(members)), members))
            offset += memory.batch
        return ChainMemory(self.network, self.manner, blocks)

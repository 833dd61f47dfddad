"""What a decoder with several exits remembers: keys and values, how deep each token has gone, and states on their way.

Layers between two exits are a segment. Of every row, segment s has run the first `reach[s]` tokens; no segment is ahead
of the one below it. The states at an exit of tokens that have not gone deeper wait there, since the keys and values of
the layers above are wanted once a later token goes that deep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.model._kv import KVMemory
from nextoken.model.base import Memory


@dataclass(frozen=True)
class Ran:
    """What one segment did with the nodes of a call.

    Args:
        nodes: [B, n], which of them went through it; with each all of its ancestors.
        states: [B, n, H] at the exit, of those nodes.
    """

    nodes: Tensor
    states: Tensor


class ExitMemory(Memory):
    """Rows over one `KVMemory`, whose lengths are `reach[0]`.

    Args:
        owner: the model that remembers so.
        kv: keys and values of all layers.
        reach: [segments][B].
        waiting: [segments - 1][B], each of the states [reach[s] - reach[s + 1], H] at the exit of segment s. They are
            replaced and never changed, so that copies of a row share them.
    """

    def __init__(
        self, owner: object, kv: KVMemory, reach: Sequence[Sequence[int]], waiting: Sequence[Sequence[Tensor]]
    ) -> None:
        self.owner, self.kv = owner, kv
        self.reach = [list(level) for level in reach]
        self.waiting = [list(level) for level in waiting]
        self._fresh: Sequence[Ran] = ()

    def settle(
        self, reach: Sequence[list[int]], waiting: Sequence[list[Tensor]], fresh: Sequence[Ran], *, is_tree: bool
    ) -> None:
        """Take over what a call did to the kept tokens; its own nodes count as kept, or wait for `keep`."""
        self.reach, self.waiting, self._fresh = list(reach), list(waiting), fresh
        if not is_tree:
            counts = fresh[0].nodes.sum(1).tolist()
            self.kv.advance(counts)
            self._take([range(count) for count in counts])

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        self.kv.keep(nodes)
        self._take(nodes)

    def rewind(self, lengths: Sequence[int]) -> None:
        self.kv.rewind(lengths)
        for below, above, level in zip(self.reach, self.reach[1:], self.waiting, strict=False):
            for row, (length, low, high) in enumerate(zip(lengths, below, above, strict=True)):
                if length < low:
                    level[row] = level[row][: max(0, length - high)]
        self.reach = [[min(a, b) for a, b in zip(level, lengths, strict=True)] for level in self.reach]

    def fork(self, rows: Sequence[int]) -> ExitMemory:
        return ExitMemory(
            self.owner,
            self.kv.fork(rows),
            [[level[row] for row in rows] for level in self.reach],
            [[level[row] for row in rows] for level in self.waiting],
        )

    def join(self, others: Sequence[Memory]) -> ExitMemory:
        more = [other for other in others if isinstance(other, ExitMemory) and other.owner is self.owner]
        if len(more) < len(others):
            raise ValueError("only states of the same model can be joined")
        every = [self, *more]
        return ExitMemory(
            self.owner,
            self.kv.join([memory.kv for memory in more]),
            [
                [length for level in levels for length in level]
                for levels in zip(*(m.reach for m in every), strict=True)
            ],
            [
                [states for level in levels for states in level]
                for levels in zip(*(m.waiting for m in every), strict=True)
            ],
        )

    def _take(self, nodes: Sequence[Sequence[int]]) -> None:
        """Count these nodes of the last call as kept, a path per row."""
        for row, path in enumerate(nodes):
            chosen = list(path)
            # Ancestors ran wherever a node did, so that what ran of a path is a beginning of it.
            counts = [int(ran.nodes[row, chosen].sum()) for ran in self._fresh]
            counts += [0] * (len(self.reach) - len(counts))
            for reach, count in zip(self.reach, counts, strict=True):
                reach[row] += count
            for waiting, ran, gone, here in zip(self.waiting, self._fresh, counts[1:], counts, strict=False):
                if gone < here:
                    waiting[row] = torch.cat([waiting[row], ran.states[row, chosen[gone:here]]])
        self._fresh = ()

"""One call of a decoder with several exits: what runs how deep, and what is told where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nextoken.head import Head
from nextoken.model import tree
from nextoken.model._exit_memory import ExitMemory, Ran
from nextoken.model._kv import laid_out
from nextoken.model.base import ABSENT
from nextoken.model.exit_next import ExitNext
from nextoken.model.stack import Call, Stack

_ENTRIES = 1 << 22
"""Logits held at once, and at most kept of a call so that they need not be made again."""


@dataclass(frozen=True)
class Stop:
    """An exit that is asked.

    Args:
        depth: layers below it.
        threshold: chance of the best token from which on it speaks; None where it always does, at the last stop.
    """

    depth: int
    threshold: float | None


class ExitPass:
    """One call: segment after segment is run on what still has to go deeper, and what that needs below it.

    What it does to the kept tokens is in `reach` and `waiting`, copies of the memory's; `ran` is of the call's own.
    """

    def __init__(
        self, stack: Stack, stops: Sequence[Stop], memory: ExitMemory, tokens: Tensor, parents: Tensor | None
    ) -> None:
        self.stack, self.stops, self.kv = stack, tuple(stops), memory.kv
        self.tokens, self.parents = tokens, parents
        self._whole = stack.call(memory.kv, tokens, parents)
        self.reach = [list(level) for level in memory.reach]
        self.waiting = [list(level) for level in memory.waiting]
        self.ran: list[Ran] = []
        self.read, self.judged, self.told = ([0] * len(self.stops) for _ in range(3))

    def run(self) -> ExitNext:
        stack = self.stack
        head = stack.head
        hidden = stack.embed(self.tokens)
        unsure = self.tokens != ABSENT
        depth = torch.zeros(unsure.shape, dtype=torch.long)
        known = ~unsure
        told: Tensor | None = None
        said: Tensor | None = None
        for segment, stop in enumerate(self.stops):
            hidden = self._through(segment, hidden, self._closed(unsure))
            normed = stack.finish(hidden).to(head.weight.device)
            there = unsure.to(normed.device)
            told = normed if told is None or bool(unsure.all()) else torch.where(there[..., None], normed, told)
            depth[unsure] = stop.depth
            count = int(unsure.sum())
            self.judged[segment] += count
            if stop.threshold is None:
                self.told[segment] += count
                break
            sure = torch.zeros_like(unsure)
            chances, logits = _sureness(normed[there], head)
            speaks = chances >= stop.threshold
            sure[unsure] = speaks.cpu()
            if logits is not None and bool(speaks.any()) and unsure.numel() * head.vocab_size <= _ENTRIES:
                if bool(speaks.all()) and bool(unsure.all()):
                    said = logits.view(*unsure.shape, -1)
                else:
                    said = logits.new_zeros(*unsure.shape, head.vocab_size) if said is None else said
                    said[sure.to(said.device)] = logits[speaks]
                known = known | sure
            self.told[segment] += int(sure.sum())
            unsure = unsure & ~sure
            if not bool(unsure.any()):
                break
        assert told is not None
        return ExitNext(told, head, depth, said, known)

    def _closed(self, nodes: Tensor) -> Tensor:
        """These nodes [B, n] and their ancestors."""
        if nodes.shape[1] == 1:
            return nodes
        if self.parents is None:
            return nodes.flip(1).cummax(1).values.flip(1)
        return (tree.ancestry(self.parents) & nodes[:, :, None]).any(1)

    def _through(self, segment: int, hidden: Tensor, nodes: Tensor) -> Tensor:
        """States [B, n, H] after a segment of its nodes, given those before it; the waiting ones of their rows are run
        along, ahead of them."""
        layers = range(self.stops[segment - 1].depth if segment else 0, self.stops[segment].depth)
        # Where nothing waits and all go on, the layers above are called as those below were.
        if segment == 0 or (bool(nodes.all()) and not any(map(len, self.waiting[segment - 1]))):
            states = self.stack.run(hidden, layers, self._whole)
            self.read[segment] += int(nodes.sum())
        else:
            chosen = [row.nonzero()[:, 0] for row in nodes]
            late = [w if len(c) else w[:0] for w, c in zip(self.waiting[segment - 1], chosen, strict=True)]
            gaps = [len(states) for states in late]
            fed = pad_sequence(
                [
                    torch.cat([w, hidden[b, c.to(hidden.device)]])
                    for b, (w, c) in enumerate(zip(late, chosen, strict=True))
                ],
                batch_first=True,
            )
            out = self.stack.run(fed, layers, self._call(segment, chosen, gaps))
            states = torch.zeros_like(hidden)
            for row, (some, gap) in enumerate(zip(chosen, gaps, strict=True)):
                if not len(some):
                    continue
                states[row, some.to(hidden.device)] = out[row, gap : gap + len(some)]
                self.waiting[segment - 1][row] = late[row][:0]
                self.reach[segment][row] += gap
                if segment < len(self.waiting):
                    self.waiting[segment][row] = torch.cat([self.waiting[segment][row], out[row, :gap]])
            self.read[segment] += sum(gaps) + sum(map(len, chosen))
        self.ran.append(Ran(nodes, states))
        return states

    def _call(self, segment: int, chosen: Sequence[Tensor], gaps: Sequence[int]) -> Call:
        """Where the late tokens of each row and its chosen nodes stand, padded to the right."""
        sizes = [gap + len(some) for gap, some in zip(gaps, chosen, strict=True)]
        width, reach = max(sizes), self.reach[segment]
        if self.parents is None:
            # Late tokens and nodes are one chain, whose slots are the positions.
            places = torch.tensor([[0] * size + [ABSENT] * (width - size) for size in sizes])
            return self.stack.call(self.kv, places, lengths=reach)
        lengths = self.kv.lengths
        positions, slots, held, visible = laid_out(lengths, self.tokens, self.parents)
        batch, end = len(sizes), visible.shape[2]
        # What pads a row is written to a slot of its own, which nothing sees, and it sees the first, so as to see one.
        at = torch.zeros(batch, width, dtype=torch.long)
        to = torch.full((batch, width), end)
        seen = torch.zeros(batch, width, end + 1, dtype=torch.bool)
        seen[:, :, 0] = True
        for row, (some, gap) in enumerate(zip(chosen, gaps, strict=True)):
            late, size = torch.arange(reach[row], reach[row] + gap), sizes[row]
            at[row, :size] = torch.cat([late, positions[row, some]])
            to[row, :size] = torch.cat([late, slots[row, some]])
            seen[row, :gap, :end] = torch.arange(end) <= late[:, None]
            seen[row, gap:size, :end] = visible[row, some]
        held = torch.cat([held, held.new_zeros(len(held), 1)], 1)
        device = self.stack.network.device
        return Call(
            at.to(device),
            seen.to(device),
            held.to(device),
            self.kv.cache,
            max(lengths),
            end + 1,
            to.to(device),
        )


def _sureness(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """max p [M] of the distributions over normed states [M, H], and their logits [M, V] where they are few enough."""
    step = max(1, _ENTRIES // head.vocab_size)
    if len(hidden) <= step:
        logits = head.logits(hidden)
        return _largest(logits), logits
    blocks = range(0, len(hidden), step)
    return torch.cat([_largest(head.logits(hidden[start : start + step])) for start in blocks]), None


def _largest(logits: Tensor) -> Tensor:
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()

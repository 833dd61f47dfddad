"""EarlyExit: a model whose first layers may run ahead of the others, and are not run again when those follow.

target = EarlyExit(model, exit=2)
state = target.start()
target.extend(state, prompt)                       # what the model itself says
target.ahead(state, [7])                           # layers 1 and 2 on a token that may follow; state.tokens stays
target.ahead(state, [9])
target.extend(state, [7, 9, 4])                    # layers 3 to N on all three, 1 and 2 on the last one only
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from nextoken.model._derived import Derived
from nextoken.model._kv import KVMemory, SlotLayer
from nextoken.model.base import ABSENT, LanguageModel, Memory, State, Tokens
from nextoken.model.hf import HFModel
from nextoken.model.next import Next
from nextoken.model.stack import Call, Stack

Block: TypeAlias = Callable[[Tensor, Call, SlotLayer], Tensor]
"""A causal block over exit states [B, n, H]: where they stand, and the layer of the memory for its keys and values."""


class ExitMemory(Memory):
    """Keys and values of all layers, and beside them the exit states and the keys and values of one block over them.

    Slots of all of these are positions. Row b holds kept tokens, then those of `ahead[b]`, which only the lower layers
    have seen.

    Args:
        owner: whose memory it is.
        kv: of the kept tokens.
        ahead: tokens of each row that were run ahead.
        block, read: which block reads the exit states, and how many of each row it has read.
    """

    def __init__(
        self, owner: EarlyExit, kv: KVMemory, ahead: list[list[int]], block: Block | None, read: list[int]
    ) -> None:
        self.owner, self.kv, self.ahead, self.block, self.read = owner, kv, ahead, block, read
        kv.cache.reach(owner.stack.depth + 2)

    @property
    def exits(self) -> SlotLayer:
        """Exit states stand in it as keys [B, 1, slots, H]; its values have no width."""
        return self.kv.cache.layers[self.owner.stack.depth]

    @property
    def beside(self) -> SlotLayer:
        """Keys and values of the block."""
        return self.kv.cache.layers[self.owner.stack.depth + 1]

    @property
    def reached(self) -> list[int]:
        """Tokens of each row, kept or ahead."""
        return [length + len(ahead) for length, ahead in zip(self.kv.lengths, self.ahead, strict=True)]

    def confirm(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Forget what is ahead from where it differs from these tokens; returns how much is left of each row."""
        for row, (ahead, tokens) in enumerate(zip(self.ahead, rows, strict=True)):
            pairs = enumerate(zip(ahead, tokens, strict=False))
            del ahead[next((i for i, (a, b) in pairs if a != b), min(len(ahead), len(tokens))) :]
            self.read[row] = min(self.read[row], self.kv.lengths[row] + len(ahead))
        return list(map(len, self.ahead))

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        self.kv.keep(nodes)

    def rewind(self, lengths: Sequence[int]) -> None:
        # What is ahead of a row that becomes shorter stood on tokens that are gone.
        shorter = [new < old for new, old in zip(lengths, self.kv.lengths, strict=True)]
        self.kv.rewind(lengths)
        self.confirm([[] if gone else list(ahead) for gone, ahead in zip(shorter, self.ahead, strict=True)])

    def fork(self, rows: Sequence[int]) -> ExitMemory:
        return self._with(self._whole().fork(rows), [(self, row) for row in rows])

    def join(self, others: Sequence[Memory]) -> ExitMemory:
        memories = [self, *(self.owner.own(other) for other in others)]
        kv = self._whole().join([other._whole() for other in memories[1:]])
        return self._with(kv, [(memory, row) for memory in memories for row in range(len(memory.ahead))])

    def _whole(self) -> KVMemory:
        """The memory of keys and values with what is ahead taken as kept, so that copies have it too."""
        return KVMemory(self.reached, self.kv.visibility, self.kv.cache)

    def _with(self, kv: KVMemory, rows: Sequence[tuple[ExitMemory, int]]) -> ExitMemory:
        kv.lengths = [memory.kv.lengths[row] for memory, row in rows]
        ahead = [list(memory.ahead[row]) for memory, row in rows]
        read = [memory.read[row] if memory.block is self.block else 0 for memory, row in rows]
        return ExitMemory(self.owner, kv, ahead, self.block, read)


class EarlyExit(LanguageModel):
    """p = softmax(head(norm(h_N))), the model's own, with h_l of further tokens to be had before h_N.

    `ahead` runs layers 1 .. l on tokens that are not kept yet and gives their exit states e = h_l, the residual stream
    after layer l without the final norm. When `extend` is then given these tokens, layers l + 1 .. N go on from the
    exit states: no layer runs twice on a token. What was ahead and is not what `extend` is given is forgotten.

    States remember the exit states too, H numbers per token beside 2 N keys and values of each, for what drafts from
    them.

    Args:
        model: a transformers model built like Llama (see `Stack`).
        exit: l, from 1 to N.

    Raises:
        ValueError: there is no such layer, or it is no transformers model.
        ModelError: the model is built otherwise.
    """

    def __init__(self, model: HFModel | Derived, *, exit: int) -> None:
        self.stack = Stack(model)
        if not 1 <= exit <= self.stack.depth:
            raise ValueError(f"{model.name} has layers 1 to {self.stack.depth}, and cannot be left after {exit}")
        self.model, self.exit = model, exit
        self.name = f"exit({model.name}, {exit})"
        self.vocab, self.context_length = model.vocab, model.context_length
        self.layers_run = [0] * self.stack.depth
        """Tokens that each layer has been run on."""
        self.exits_read = 0
        """Exit states that blocks have read (`read_exits`)."""

    @property
    def digest(self) -> str:
        return self.model.digest

    @property
    def dtype(self) -> str:
        return self.model.dtype

    def own(self, memory: Memory) -> ExitMemory:
        """The memory, if it is this model's.

        Raises:
            ValueError: another model made it.
        """
        if not isinstance(memory, ExitMemory) or memory.owner is not self:
            raise ValueError(f"this state was started by another model than {self.name}; call start() of this one")
        return memory

    @torch.no_grad()
    def ahead(self, state: State, tokens: Tokens) -> Tensor:
        """Run layers 1 .. l on tokens [B, n] that would follow those kept and those run ahead before.

        The state's tokens stay as they are.

        Args:
            state: of this model.
            tokens: [B, n], or [n] for one row; -1 at the end of rows with fewer, or none.

        Returns:
            Exit states e [B, n, H]; undefined where there is no token.

        Raises:
            ValueError: as `extend`.
        """
        state._settled("run ahead")
        memory = self.own(state.memory)
        ids, _ = self._checked(memory.reached, tokens, None)
        low = self._low(memory, ids, self.stack.call(memory.kv, ids, lengths=memory.reached))
        for ahead, fresh in zip(memory.ahead, _present(ids), strict=True):
            ahead.extend(fresh)
        return low

    def ran_ahead(self, state: State) -> tuple[tuple[int, ...], ...]:
        """The tokens of each row that layers 1 .. l have been run on beyond those kept."""
        return tuple(map(tuple, self.own(state.memory).ahead))

    def forget_ahead(self, state: State) -> None:
        """Forget the tokens that were run ahead."""
        memory = self.own(state.memory)
        memory.confirm([[]] * state.batch)

    def exits(self, state: State) -> Tensor:
        """e [B, S, H] of every token kept or run ahead, S their number in the longest row; undefined beyond a row's."""
        memory = self.own(state.memory)
        if memory.exits.buffers is None:
            return self.stack.network.blank(state.batch, 0)
        return memory.exits.buffers[0][:, 0, : max(memory.reached)]

    @torch.no_grad()
    def read_exits(self, state: State, block: Block) -> Tensor:
        """What a causal block makes of the newest exit state of each row [B, H].

        The block is given the exit states that it has not read yet, of tokens kept or run ahead; its keys and values
        are remembered with the state, and forgotten with its tokens. A state serves one block: another one reads
        everything anew. Undefined for rows that have nothing new.
        """
        memory = self.own(state.memory)
        if memory.block is not block:
            memory.block, memory.read = block, [0] * state.batch
        reached, read = memory.reached, memory.read
        counts = [end - start for start, end in zip(read, reached, strict=True)]
        width = max(counts)
        if width == 0:
            raise ValueError("every exit state of these rows was read already: run a token ahead, or extend")
        steps = torch.arange(width)
        fresh = steps < torch.tensor(counts)[:, None]
        call = self.stack.call(memory.kv, torch.where(fresh, 0, ABSENT), lengths=read)
        memory.kv.cache.open(call.past, call.end, call.slots)
        said = block(self._gathered(memory, read, width), call, memory.beside)
        memory.read = reached
        self.exits_read += sum(counts)
        return said[range(state.batch), [max(count, 1) - 1 for count in counts]]

    def _remember(self, batch: int) -> Memory:
        return ExitMemory(self, self.stack.memory(batch), [[] for _ in range(batch)], None, [0] * batch)

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        memory, network = self.own(state.memory), self.stack.network
        if parents is not None:
            memory.confirm([[]] * state.batch)
            call = self.stack.call(memory.kv, tokens, parents)
            return self.stack.next(self._high(self._low(memory, tokens, call), tokens, call))
        batch, n = tokens.shape
        rows = _present(tokens)
        width = max(map(len, rows))
        if width == 0:
            return network.next(network.blank(batch, n))
        confirmed = memory.confirm(rows)
        rest = _laid([row[done:] for row, done in zip(rows, confirmed, strict=True)])
        if rest.shape[1]:
            self._low(memory, rest, self.stack.call(memory.kv, rest, lengths=memory.reached))
        exits = self._gathered(memory, memory.kv.lengths, width)
        hidden = self._high(exits, tokens[:, :width], self.stack.call(memory.kv, tokens[:, :width]))
        memory.kv.advance(list(map(len, rows)))
        for ahead in memory.ahead:
            ahead.clear()
        return self.stack.next(torch.nn.functional.pad(hidden, (0, 0, 0, n - width)))

    def _predict(self, tokens: Tensor) -> Next:
        self._count(range(self.stack.depth), tokens)
        return self.stack.model.predict(tokens)

    def _low(self, memory: ExitMemory, tokens: Tensor, call: Call) -> Tensor:
        """Layers 1 .. l; their exit states are remembered."""
        low = self.stack.run(self.stack.embed(tokens), range(self.exit), call)
        memory.exits.update(low[:, None], low[:, None, :, :0])
        self._count(range(self.exit), tokens)
        return low

    def _high(self, exits: Tensor, tokens: Tensor, call: Call) -> Tensor:
        """Layers l + 1 .. N."""
        self._count(range(self.exit, self.stack.depth), tokens)
        return self.stack.run(exits, range(self.exit, self.stack.depth), call)

    def _gathered(self, memory: ExitMemory, first: Sequence[int], width: int) -> Tensor:
        """Exit states [B, width, H] from position first[b] on."""
        memory.exits.reserve(max(first) + width)
        assert memory.exits.buffers is not None
        states = memory.exits.buffers[0]
        if min(first) == max(first):
            return states[:, 0, first[0] : first[0] + width]
        slots = torch.tensor(first)[:, None] + torch.arange(width)
        return states[torch.arange(len(first))[:, None], 0, slots]

    def _count(self, layers: range, tokens: Tensor) -> None:
        present = int((tokens != ABSENT).sum())
        for number in layers:
            self.layers_run[number] += present


def _present(tokens: Tensor) -> list[list[int]]:
    """The tokens of each row of a chain [B, n]."""
    return [[token for token in row if token != ABSENT] for row in tokens.tolist()]


def _laid(rows: Sequence[Sequence[int]]) -> Tensor:
    """Chains of different lengths as one tensor."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows], dtype=torch.long)

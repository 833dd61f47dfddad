"""HiddenMarkov: a model in which feeding the mean of tokens gives the mean of what follows them, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextoken.model import tree
from nextoken.model.base import ABSENT, Memory, State
from nextoken.model.next import DenseNext, Next
from nextoken.model.soft import SoftModel
from nextoken.model.vocab import Vocab


class Beliefs(Memory):
    """p(hidden state | tokens so far) before and after each kept token."""

    def __init__(self, rows: Sequence[list[Tensor]]) -> None:
        self.rows = [list(row) for row in rows]
        self.fed: list[list[Tensor]] = []

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        for row, fed, path in zip(self.rows, self.fed, nodes, strict=True):
            row.extend(fed[node] for node in path)

    def rewind(self, lengths: Sequence[int]) -> None:
        for row, length in zip(self.rows, lengths, strict=True):
            del row[length + 1 :]

    def fork(self, rows: Sequence[int]) -> Beliefs:
        return Beliefs([self.rows[row] for row in rows])

    def join(self, others: Sequence[Memory]) -> Beliefs:
        return Beliefs([*self.rows, *(row for other in others for row in other.rows)])  # type: ignore[attr-defined]


class HiddenMarkov(SoftModel):
    """b' = sum_v x[v] (b * O[:, v]) A / (b O)[v];  p(. | b) = b O.

    x is the one-hot vector of a token, or any mixture, so that b' is linear in what is fed, given b. Fed with p itself,
    b' = b A: the belief when nothing is seen. After a token of probability 0, b is as if all states had been as likely
    before it; the begin token leaves b as it is.

    Args:
        transition: A [S, S].
        emission: O [S, V], without the begin token.
        start: b_0 [S].
        eos: whether the last symbol is an end token.
    """

    def __init__(self, transition: Tensor, emission: Tensor, start: Tensor, *, eos: bool = False) -> None:
        self.transition, self.initial = transition.double(), start.double()
        self.emission = torch.cat([emission.double(), torch.zeros(len(emission), 1, dtype=torch.float64)], 1)
        size = emission.shape[1]
        spelled = [chr(97 + i).encode() if size <= 26 else b"%d," % i for i in range(size)]
        if eos:
            spelled[-1] = b""
        self.vocab = Vocab([*spelled, b""], labels={size: "<bos>"}, bos_id=size, eos_ids=[size - 1] if eos else [])
        self.name = "hidden markov"

    @classmethod
    def random(cls, states: int = 4, symbols: int = 5, *, seed: int = 0, eos: bool = False) -> HiddenMarkov:
        generator = torch.Generator().manual_seed(seed)

        def rows(count: int, width: int) -> Tensor:
            return (2 * torch.randn(count, width, dtype=torch.float64, generator=generator)).softmax(-1)

        return cls(rows(states, states), rows(states, symbols), rows(1, states)[0], eos=eos)

    @classmethod
    def chain(cls, rows: Sequence[Sequence[float]], *, eos: bool = False) -> HiddenMarkov:
        """A Markov chain over the symbols, which begins as after symbol 0."""
        table = torch.tensor(rows, dtype=torch.float64)
        return cls(table, torch.eye(len(rows)), table[0], eos=eos)

    @property
    def dtype(self) -> str:
        return "float64"

    @property
    def embedding_width(self) -> int:
        return self.vocab.size

    def embeddings(self, ids: Tensor) -> Tensor:
        return torch.eye(self.vocab.size, dtype=torch.float64)[ids]

    def _remember(self, batch: int) -> Beliefs:
        return Beliefs([[self.initial] for _ in range(batch)])

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        return self._feed_embedded(state, self.embeddings(tokens.clamp(min=0)), tokens, parents)

    def _feed_embedded(self, state: State, embedded: Tensor, tokens: Tensor, parents: Tensor | None) -> Next:
        memory = state.memory
        assert isinstance(memory, Beliefs)
        above = (tree.chain(*tokens.shape) if parents is None else parents).tolist()
        memory.fed = [[] for _ in memory.rows]
        for row, (fed, before) in enumerate(zip(memory.fed, memory.rows, strict=True)):
            for node, parent in enumerate(above[row]):
                fed.append(self._after(before[-1] if parent < 0 else fed[parent], embedded[row, node].double()))
        after = torch.stack([torch.stack(fed) for fed in memory.fed])
        if parents is None:
            memory.keep([range(int((row != ABSENT).sum())) for row in tokens])
        return DenseNext((after @ self.emission).log())

    def _after(self, belief: Tensor, fed: Tensor) -> Tensor:
        p = belief @ self.emission
        even = self.emission / self.emission.sum(0).clamp(min=1e-300)
        posterior = torch.where(p > 0, belief[:, None] * self.emission / p, even)
        return belief * fed[-1] + (posterior[:, :-1] @ fed[:-1]) @ self.transition

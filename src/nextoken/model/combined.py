"""Combined: one distribution made from those of several branches that follow the same tokens."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.head import Statistics
from nextoken.model.base import ABSENT, LanguageModel, Memory, State
from nextoken.model.next import DenseNext, Next

_ENTRIES = 1 << 22
"""Log-probabilities of each branch held at once for statistics."""


@dataclass(frozen=True)
class Branch:
    """A model and what it has read before the text.

    Args:
        model: any language model that gives whole distributions.
        prefix: token ids, begin token included, that stand in place of the text's begin token; None for just that.
    """

    model: LanguageModel
    prefix: tuple[int, ...] | None = None

    @property
    def surplus(self) -> int:
        """Tokens the branch holds more than the text does, once the text has begun."""
        return 0 if self.prefix is None else len(self.prefix) - 1


class InStep(Memory):
    """The states of several models that are fed the same tokens."""

    def __init__(self, states: Sequence[State]) -> None:
        self.states = list(states)

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        for state in self.states:
            state.keep(nodes)

    def rewind(self, lengths: Sequence[int]) -> None:
        for state in self.states:
            state.rewind([have - want for have, want in zip(state.lengths, lengths, strict=True)])

    def fork(self, rows: Sequence[int]) -> InStep:
        return self._with([state.fork(rows) for state in self.states])

    def join(self, others: Sequence[Memory]) -> InStep:
        columns = zip(*(other.states for other in others if isinstance(other, InStep)), strict=True)
        return self._with([state.join(*column) for state, column in zip(self.states, columns, strict=True)])

    def _with(self, states: Sequence[State]) -> InStep:
        return InStep(states)


class Branches(InStep):
    """The states of branches, each of which may hold more than the text does."""

    def __init__(self, branches: Sequence[Branch], states: Sequence[State]) -> None:
        super().__init__(states)
        self.branches = branches

    def rewind(self, lengths: Sequence[int]) -> None:
        for branch, state in zip(self.branches, self.states, strict=True):
            wanted = [length + branch.surplus if length else 0 for length in lengths]
            state.rewind([have - want for have, want in zip(state.lengths, wanted, strict=True)])

    def _with(self, states: Sequence[State]) -> Branches:
        return Branches(self.branches, states)


class Combined(LanguageModel):
    """p = softmax(combine(log p_1, ..., log p_m)), where branch i has read its own prefix and then the same text.

    The first branch is the main one: it lends name, vocabulary and precision. A subclass gives `combine`.

    Args:
        branches: at least one, all over one vocabulary. Branches with a prefix need texts that begin with the begin
            token, which the prefix replaces.

    Raises:
        ValueError: the vocabularies differ, a branch tells only its top tokens, or a prefix has no begin token to
            replace.
    """

    def __init__(self, branches: Sequence[Branch], *, name: str) -> None:
        if not branches:
            raise ValueError("a combined model needs at least one branch")
        main = branches[0].model
        for branch in branches:
            if branch.model.vocab.digest != main.vocab.digest:
                raise ValueError(
                    f"{branch.model.name} and {main.name} have different vocabularies; "
                    "see them as models over bytes, or align their vocabularies, first"
                )
            if branch.model.is_partial:
                raise ValueError(f"{branch.model.name} tells only its most probable tokens; whole ones are needed")
            if branch.prefix is not None and (not branch.prefix or main.vocab.bos_id is None):
                raise ValueError(
                    f"a branch with a prefix replaces the begin token by it: the prefix must have a token, and "
                    f"{main.name} a begin token"
                )
        self.branches = tuple(branches)
        self.name, self.vocab = name, main.vocab
        limits = [b.model.context_length - b.surplus for b in branches if b.model.context_length is not None]
        self.context_length = min(limits, default=None)
        if self.context_length is not None and self.context_length < 1:
            longest = max(len(branch.prefix or ()) for branch in branches)
            raise ValueError(f"a prefix of {longest} tokens fills the context of {main.name}: shorten it")
        self.supports_trees = all(branch.model.supports_trees for branch in branches)

    @property
    def dtype(self) -> str:
        return self.branches[0].model.dtype

    @property
    def digest(self) -> str:
        if not all(branch.model.digest for branch in self.branches):
            return ""
        parts = [(branch.model.digest, branch.prefix) for branch in self.branches]
        return hashlib.sha256(repr((type(self).__name__, parts, self._settings())).encode()).hexdigest()[:16]

    @abstractmethod
    def combine(self, log_probs: Sequence[Tensor]) -> Tensor:
        """Scores [B, n, V] from the log-probabilities [B, n, V] of each branch; they are normalised afterwards."""

    def _settings(self) -> object:
        """What else the distribution depends on, for the digest."""
        return None

    def _remember(self, batch: int) -> Branches:
        return Branches(self.branches, [branch.model.start(batch) for branch in self.branches])

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        memory = state.memory
        assert isinstance(memory, Branches)
        begun = [row for row, length in enumerate(state.lengths) if not length and int(tokens[row, 0]) != ABSENT]
        if any(branch.prefix is not None for branch in self.branches) and (
            (parents is not None and begun) or any(int(tokens[row, 0]) != self.vocab.bos_id for row in begun)
        ):
            raise ValueError(
                f"{self.name} reads texts from their begin token, fed as a chain: feed it first (a text longer than "
                "the context cannot be read in windows, for later ones begin in its middle)"
            )
        said = [
            self._branch(branch, inner, begun, tokens, parents)
            for branch, inner in zip(self.branches, memory.states, strict=True)
        ]
        return CombinedNext(said, self.combine)

    def _branch(
        self, branch: Branch, inner: State, begun: Sequence[int], tokens: Tensor, parents: Tensor | None
    ) -> Next:
        """Feed one branch and return what it says at the given tokens; the texts of rows `begun` begin now."""
        if branch.prefix is None or not begun:
            return branch.model.extend(inner, tokens, parents)
        rows = [[*branch.prefix, *row[1:]] if number in begun else row for number, row in enumerate(tokens.tolist())]
        width = max(map(len, rows))
        padded = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows])
        said = branch.model.extend(inner, padded)
        shift = torch.tensor([branch.surplus if number in begun else 0 for number in range(len(rows))])
        columns = shift[:, None] + torch.arange(tokens.shape[1])
        return said._take(torch.arange(len(rows))[:, None].expand_as(columns), columns)


class CombinedNext(Next):
    """softmax(combine(log p_1, ..., log p_m)), computed when asked for and only for what is asked.

    Args:
        parts: the Next of each branch, all of one shape.
        combine: scores [B, n, V] from the log-probabilities of each.
    """

    def __init__(self, parts: Sequence[Next], combine: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.parts, self._combine = tuple(parts), combine
        self.shape, self.vocab_size = parts[0].shape, parts[0].vocab_size

    def logits(self) -> Tensor:
        return self._combine([part.log_probs() for part in self.parts])

    def log_probs(self) -> Tensor:
        return DenseNext(self.logits()).log_probs()

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        batch, n = self.shape
        rows, columns = torch.meshgrid(torch.arange(batch), torch.arange(n), indexing="ij")
        flat = self._take(rows.reshape(-1, 1), columns.reshape(-1, 1))
        wanted = None if targets is None else targets.reshape(-1, 1)
        # Some distributions at a time: all of a long text over a large vocabulary would not fit into memory.
        size = max(1, _ENTRIES // self.vocab_size)
        parts = [
            DenseNext(flat[begin : begin + size].logits()).statistics(
                None if wanted is None else wanted[begin : begin + size], top=top
            )
            for begin in range(0, batch * n, size)
        ]
        return Statistics.concat(parts).reshape(batch, n)

    def _take(self, rows: Tensor, columns: Tensor) -> CombinedNext:
        return CombinedNext([part._take(rows, columns) for part in self.parts], self._combine)

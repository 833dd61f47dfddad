"""The contract all else stands on: LanguageModel, a conditional distribution with memory.

    state = model.start(batch=B)                # no tokens seen yet
    next  = model.extend(state, tokens)         # feed n tokens to each row: [B, n] -> Next of shape [B, n]
    next  = model.extend(state, tokens, parents)  # the same for a tree of n nodes; then state.keep(path)

A chain is a tree whose every node continues the one before; reading a text is one `extend`, ordinary decoding is
`extend` with n = 1, verifying a draft is `extend` with a tree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from nextoken.model import tree
from nextoken.model.next import Next
from nextoken.model.vocab import Vocab

ABSENT = -1
"""Token id meaning "no token here", for rows of different lengths: `[[5, 6, 7], [5, -1, -1]]`."""

Tokens: TypeAlias = Tensor | Sequence[Sequence[int]] | Sequence[int]
Path: TypeAlias = Sequence[int] | Sequence[Sequence[int]]


class TreesNotSupported(TypeError):
    """The model cannot look at several continuations at once (a recurrent model, for one)."""


class Memory(ABC):
    """What a model remembers of the tokens fed so far; `State` drives it and does all checking.

    The nodes of a chain count as kept as soon as they are fed; those of a tree wait for `keep`.
    """

    @abstractmethod
    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Of the tree just fed keep these nodes per row, a path each, and forget the other nodes."""

    @abstractmethod
    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[b]` tokens of each row."""

    @abstractmethod
    def fork(self, rows: Sequence[int]) -> Memory:
        """A new memory whose rows are copies of these; this one stays usable."""

    @abstractmethod
    def join(self, others: Sequence[Memory]) -> Memory:
        """A new memory with this one's rows, then those of the others."""


class NoMemory(Memory):
    """For models that look at the kept tokens themselves (`state.tokens`)."""

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        pass

    def rewind(self, lengths: Sequence[int]) -> None:
        pass

    def fork(self, rows: Sequence[int]) -> NoMemory:
        return self

    def join(self, others: Sequence[Memory]) -> NoMemory:
        return self


@dataclass(frozen=True)
class Fed:
    """The last call: tokens [B, n] (ABSENT where none) and parents [B, n]."""

    tokens: Tensor
    parents: Tensor
    is_tree: bool


class State:
    """The rows a model is at work on: their kept tokens and the model's memory of them."""

    def __init__(self, tokens: Iterable[Sequence[int]], memory: Memory) -> None:
        self._tokens = [list(row) for row in tokens]
        self.memory = memory
        self._fed: Fed | None = None

    @property
    def batch(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """The kept tokens of each row."""
        return tuple(tuple(row) for row in self._tokens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of kept tokens of each row."""
        return tuple(len(row) for row in self._tokens)

    @property
    def is_pending(self) -> bool:
        """Whether a tree was fed of which `keep` has not yet chosen a path."""
        return self._fed is not None and self._fed.is_tree

    def tail(self, size: int) -> Tensor:
        """The last `size` kept tokens of each row [B, size], ABSENT on the left where a row is shorter."""
        rows = [[ABSENT] * (size - len(row)) + row[max(0, len(row) - size) :] for row in self._tokens]
        return torch.tensor(rows, dtype=torch.long).reshape(self.batch, size)

    def keep(self, path: Path) -> None:
        """Keep the nodes of one path of the last call and forget its others.

        Args:
            path: node indices within the last `extend`, from a child of the last kept token downwards; one list for all
                rows or one per row. An empty path keeps nothing of the call. Of a chain, a path keeps a beginning.

        Raises:
            ValueError: there is no last call, or the path is not one of its paths.
        """
        fed = self._fed
        if fed is None:
            raise ValueError("nothing to keep: the last call was already kept, rewound or never made")
        nodes = _per_row(path, self.batch, "path")
        tokens, parents = fed.tokens.tolist(), fed.parents.tolist()
        for row, chosen in enumerate(nodes):
            if not tree.is_path(chosen, parents[row]) or any(tokens[row][node] == ABSENT for node in chosen):
                raise ValueError(f"{list(chosen)} is not a path from the last kept token of row {row}")
        if fed.is_tree:
            self.memory.keep(nodes)
            for row, chosen in enumerate(nodes):
                self._tokens[row].extend(tokens[row][node] for node in chosen)
        else:
            counts = (fed.tokens != ABSENT).sum(1).tolist()
            self._shorten([len(self._tokens[b]) - counts[b] + len(nodes[b]) for b in range(self.batch)])
        self._fed = None

    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens of every row, or n[b] of row b.

        Raises:
            ValueError: n is negative or more than a row has, or a tree waits for `keep`.
        """
        self._settled("rewind")
        drop = [n] * self.batch if isinstance(n, int) else list(n)
        lengths = [length - d for length, d in zip(self.lengths, drop, strict=True)]
        if any(d < 0 for d in drop) or any(length < 0 for length in lengths):
            raise ValueError(f"cannot forget {drop} tokens of rows with {list(self.lengths)}")
        self._shorten(lengths)
        self._fed = None

    def fork(self, rows: Sequence[int]) -> State:
        """A new state with copies of these rows, in this order, repeated if named twice; this one stays usable."""
        self._settled("fork")
        chosen = [int(row) for row in rows]
        if not chosen:
            raise ValueError("a state has at least one row: fork() got none")
        if any(not 0 <= row < self.batch for row in chosen):
            raise ValueError(f"rows {chosen} of a state with {self.batch}")
        return State([self._tokens[row] for row in chosen], self.memory.fork(chosen))

    def join(self, *others: State) -> State:
        """A new state with the rows of this one and then those of `others`, all of the same model."""
        for state in (self, *others):
            state._settled("join")
        rows = [row for state in (self, *others) for row in state._tokens]
        return State(rows, self.memory.join([state.memory for state in others]))

    def _settled(self, action: str) -> None:
        if self.is_pending:
            raise ValueError(f"cannot {action}: the last call fed a tree; choose a path of it with keep() first")

    def _shorten(self, lengths: Sequence[int]) -> None:
        if tuple(lengths) != self.lengths:
            self.memory.rewind(lengths)
            for row, length in zip(self._tokens, lengths, strict=True):
                del row[length:]

    def _record(self, fed: Fed) -> None:
        self._fed = fed
        if not fed.is_tree:
            for row, fresh in zip(self._tokens, fed.tokens.tolist(), strict=True):
                row.extend(token for token in fresh if token != ABSENT)


class LanguageModel(ABC):
    """A distribution over the next token given the tokens so far.

    A subclass gives `vocab`, `name`, `_remember` and `_feed`; everything built on the contract then works with it, and
    `nextoken.testing.check_language_model` proves that it keeps the contract.
    """

    name: str
    vocab: Vocab
    context_length: int | None = None
    """The most tokens a row may hold, None for no limit."""
    supports_trees: bool = True
    is_partial: bool = False
    """True where only the most probable tokens are to be had (a remote server)."""

    @property
    def digest(self) -> str:
        """A short fingerprint of the weights: equal digests give equal distributions. Empty where unknown."""
        return ""

    @property
    def dtype(self) -> str:
        """Precision the model computes in."""
        return "float32"

    @abstractmethod
    def _remember(self, batch: int) -> Memory:
        """An empty memory for `batch` rows."""

    @abstractmethod
    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        """Feed checked tokens [B, n] (ABSENT where a row has none) and return the Next after each.

        `parents` [B, n] is None for a chain. `state.tokens` are the tokens kept before this call. The memory takes a
        chain as kept and a tree as waiting.
        """

    def start(self, batch: int = 1) -> State:
        """A state of `batch` rows that have seen no token."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        return State([[] for _ in range(batch)], self._remember(batch))

    @torch.no_grad()
    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Next:
        """Feed n tokens to each row and return what follows each of them.

        Args:
            state: from `start`; it is changed in place.
            tokens: [B, n] ids, `[n]` for one row. -1 stands for no token: at the end of a row's chain, or at tree nodes
                this row lacks. What the result holds at such places is undefined.
            parents: [n] or [B, n] for a tree: the index within this call of the node each one continues, -1 for the
                last kept token. A node sees the kept tokens and its own ancestors only, at the position of its depth.
                The tree then waits for `state.keep(path)`.

        Returns:
            Next of shape [B, n]; entry (b, i) is p(. | kept tokens of b, ancestors of i, tokens[b, i]).

        Raises:
            ValueError: ids outside the vocabulary, a gap in a chain, a malformed tree, a tree waiting for `keep`, or
                more tokens than the context holds.
            TreesNotSupported: `parents` given to a model that takes chains only.
        """
        state._settled("extend")
        ids, nodes = self._checked(state.lengths, tokens, parents)
        result = self._feed(state, ids, nodes)
        state._record(Fed(ids, tree.chain(*ids.shape) if nodes is None else nodes, is_tree=nodes is not None))
        return result

    @torch.no_grad()
    def predict(self, tokens: Tokens) -> Next:
        """What follows each token of rows [B, n] read from their start, remembering nothing.

        Equal to `extend` on a new state; errors as there.
        """
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
        ids, _ = self._checked((0,) * (ids.shape[0] if ids.ndim == 2 else 1), ids, None)
        return self._predict(ids)

    def _predict(self, tokens: Tensor) -> Next:
        """`predict` on checked tokens; models that can spare the cost of remembering override it."""
        return self._feed(self.start(tokens.shape[0]), tokens, None)

    def _checked(self, lengths: Sequence[int], tokens: Tokens, parents: Tokens | None) -> tuple[Tensor, Tensor | None]:
        batch = len(lengths)
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
        if ids.ndim == 1 and batch == 1:
            ids = ids[None]
        if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] == 0:
            raise ValueError(f"tokens must be [{batch}, n] with n > 0, got {tuple(ids.shape)}")
        lowest, highest = (int(edge) for edge in torch.aminmax(ids))
        if lowest < ABSENT or highest >= self.vocab.size:
            worst = highest if highest >= self.vocab.size else lowest
            raise ValueError(f"token id {worst} is outside the vocabulary of {self.vocab.size}")
        nodes = None
        if parents is None and lowest != ABSENT:
            longest = [ids.shape[1]] * batch
        elif parents is None:
            present = ids != ABSENT
            if bool((present[:, 1:] & ~present[:, :-1]).any()):
                raise ValueError("tokens of -1 may stand only at the end of a chain")
            longest = present.sum(1).tolist()
        else:
            if not self.supports_trees:
                raise TreesNotSupported(
                    f"{self.name} is recurrent: it takes chains of tokens only, so call extend() without parents"
                )
            present = ids != ABSENT
            nodes = torch.as_tensor(parents, dtype=torch.long, device="cpu").expand(ids.shape).contiguous()
            tree.check_parents(nodes, present)
            longest = ((tree.depths(nodes) + 1) * present).amax(1).tolist()
        if self.context_length is not None:
            needed = max(length + more for length, more in zip(lengths, longest, strict=True))
            if needed > self.context_length:
                raise ValueError(f"{needed} tokens do not fit the context of {self.name}, {self.context_length}")
        return ids, nodes


def _per_row(path: Path, batch: int, what: str) -> list[list[int]]:
    flat = [node for node in path if isinstance(node, int)]
    if len(flat) == len(path):
        return [list(flat) for _ in range(batch)]
    nested = [[int(node) for node in row] for row in path if not isinstance(row, int)]
    if len(nested) != batch:
        raise ValueError(f"{what} must be one list, or one per row ({batch}), got {len(path)}")
    return nested

"""Next: a lazy batch of next-token distributions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from nextoken.head import Head, Statistics, statistics, statistics_from_logits

Index: TypeAlias = int | slice | Tensor | Sequence[int]
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


class Next(ABC):
    """Next-token distributions p(. | prefix) for B rows of n prefixes each, computed when asked for.

    `next[b, i]` is what follows the i-th token of the call in row b. Nothing of size V exists before `log_probs` or
    `sample` is called; `statistics` never makes it.
    """

    shape: tuple[int, int]
    """(B, n)."""
    vocab_size: int
    is_partial: bool = False
    """True where only the k most probable tokens are known (a remote server)."""

    @property
    def hidden(self) -> Tensor | None:
        """Final hidden states [B, n, H] from which the distributions are computed, where the model has them."""
        return None

    @abstractmethod
    def log_probs(self) -> Tensor:
        """log p [B, n, V] in nats, float32 or wider, normalised; -inf where a token is impossible."""

    def logits(self) -> Tensor:
        """log p [B, n, V] up to a constant per distribution: the model's raw logits where it has them."""
        return self.log_probs()

    @abstractmethod
    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        """Statistics over the whole vocabulary, each of shape [B, n]; see `nextoken.head.Statistics`.

        Args:
            targets: [B, n] ids whose log-probability, rank and mass above are wanted; -1 for none.
            top: how many of the most probable tokens to return.
        """

    @abstractmethod
    def _take(self, rows: Tensor, columns: Tensor) -> Next:
        """The distributions at (rows, columns), two index tensors of one shape [B', n']."""

    def __getitem__(self, key: Index | tuple[Index, Index]) -> Next:
        """Narrow to rows, or to rows and positions; always two-dimensional again.

        `next[b]`, `next[b, i]`, `next[:, -1]`, `next[[0, 2]]`; a boolean [B, n] tensor selects N distributions as a
        `Next` of shape [N, 1].
        """
        batch, n = self.shape
        if isinstance(key, Tensor) and key.dtype == torch.bool and key.ndim == 2:
            rows, columns = key.nonzero(as_tuple=True)
            return self._take(rows[:, None], columns[:, None])
        row_key, column_key = key if isinstance(key, tuple) else (key, slice(None))
        rows, columns = _positions(row_key, batch, "row"), _positions(column_key, n, "position")
        return self._take(*torch.meshgrid(rows, columns, indexing="ij"))

    def sample(self, generator: Generators | None = None) -> Tensor:
        """Draw one token per distribution [B, n] by inverting the cumulative distribution.

        Each draw spends exactly one uniform number, so that a sequence of one generator per row gives a row the same
        tokens whatever batch it is in.

        Args:
            generator: one CPU generator for all draws, or one per row; None uses torch's own.
        """
        batch, n = self.shape
        if generator is None or isinstance(generator, torch.Generator):
            uniform = torch.rand(batch, n, dtype=torch.float64, generator=generator)
        else:
            if len(generator) != batch:
                raise ValueError(f"got {len(generator)} generators for {batch} rows: pass one, or one per row")
            uniform = torch.stack([torch.rand(n, dtype=torch.float64, generator=g) for g in generator])
        return invert_cdf(self.log_probs(), uniform)


def invert_cdf(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """The token [...] at which the cumulative of p [..., V] passes `uniform` [...]; never one of probability 0."""
    return invert_probs(log_probs.exp(), uniform)


def invert_probs(probs: Tensor, uniform: Tensor) -> Tensor:
    """`invert_cdf` of probabilities [..., V], which need not sum to 1."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    # Strictly below the total; the first index with cumulative > threshold has p > 0, for the cumulative rises there.
    threshold = torch.minimum(
        uniform.to(total.device)[..., None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]


def _positions(key: Index, size: int, what: str) -> Tensor:
    if isinstance(key, int):
        if not -size <= key < size:
            raise IndexError(f"{what} {key} of a Next with {size}")
        return torch.tensor([key % size])
    if isinstance(key, slice):
        return torch.arange(size)[key]
    index = torch.as_tensor(key)
    return index.nonzero()[:, 0] if index.dtype == torch.bool else index % size


class DenseNext(Next):
    """Distributions given by a tensor of logits [B, n, V]; they need not be normalised."""

    def __init__(self, logits: Tensor) -> None:
        if logits.ndim != 3:
            raise ValueError(f"logits must be [B, n, V], got {tuple(logits.shape)}")
        self._logits = logits
        self.shape = (logits.shape[0], logits.shape[1])
        self.vocab_size = logits.shape[2]

    def logits(self) -> Tensor:
        return self._logits

    def log_probs(self) -> Tensor:
        wide = torch.promote_types(self._logits.dtype, torch.float32)
        return torch.log_softmax(self._logits.to(wide), dim=-1)

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        return statistics_from_logits(self._logits, targets, top=top)

    def _take(self, rows: Tensor, columns: Tensor) -> DenseNext:
        return DenseNext(self._logits[rows.to(self._logits.device), columns.to(self._logits.device)])


class HeadNext(Next):
    """Distributions softmax(head(hidden)) kept as hidden states [B, n, H] and the unembedding."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        if hidden.ndim != 3:
            raise ValueError(f"hidden must be [B, n, H], got {tuple(hidden.shape)}")
        self._hidden, self.head = hidden, head
        self.shape = (hidden.shape[0], hidden.shape[1])
        self.vocab_size = head.vocab_size

    @property
    def hidden(self) -> Tensor:
        return self._hidden

    def logits(self) -> Tensor:
        return self.head.logits(self._hidden)

    def log_probs(self) -> Tensor:
        return torch.log_softmax(self.head.logits(self._hidden), dim=-1)

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        return statistics(self._hidden, self.head, targets, top=top)

    def _take(self, rows: Tensor, columns: Tensor) -> HeadNext:
        return HeadNext(self._hidden[rows.to(self._hidden.device), columns.to(self._hidden.device)], self.head)

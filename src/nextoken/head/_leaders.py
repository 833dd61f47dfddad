"""The running top-k of a sweep, exact under ties, touching only the entries that can change it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRIDE = 32  # entries per chunk; a chunk is every (width / STRIDE)-th column, so that its maximum vectorises


@dataclass(frozen=True)
class Peaks:
    """Maxima of one block of logits [n, B]: of its chunks [n, C] and of the whole rows [n].

    Chunk j holds the columns j, j + C, j + 2C, ...; where STRIDE does not divide B, every entry is its own chunk.
    """

    chunks: Tensor
    row: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Peaks:
        chunks = z if z.shape[1] % STRIDE else z.view(z.shape[0], STRIDE, -1).amax(1)
        return cls(chunks, chunks.amax(1))


class Leaders:
    """The k largest logits of each row so far, largest first, equal ones by lower id: values [n, k], ids [n, k].

    Slots not yet filled hold -inf and id -1.
    """

    def __init__(self, rows: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.k = k
        self.values = torch.full((rows, k), -torch.inf, dtype=dtype, device=device)
        self.ids = torch.full((rows, k), -1, dtype=torch.int64, device=device)

    def update(self, z: Tensor, peaks: Peaks, first: int) -> tuple[Tensor, Tensor]:
        """Take in the block z [n, B] of the tokens first, first + 1, ...

        Returns (rows, columns) of the entries of this block that are among the leaders now.

        An entry gets in only if it is strictly larger than the k-th leader, since all earlier ids are lower, so only
        chunks whose maximum is larger are looked into. Where more than k chunks of a row are, the k-th largest of their
        maxima is a second bound: k entries are at least that large.
        """
        threshold = self.values[:, -1:]
        over = peaks.chunks > threshold
        most = int(over.sum(1).amax())
        if most == 0:
            nothing = torch.empty(0, dtype=torch.int64, device=z.device)
            return nothing, nothing
        bound = None
        if most > self.k:
            bound = peaks.chunks.topk(self.k, dim=1).values[:, -1:]
            over &= peaks.chunks >= bound
        rows, columns, values = self._candidates(z, over, threshold, bound)
        count = torch.bincount(rows, minlength=z.shape[0])
        place = torch.arange(rows.numel(), device=z.device) - (count.cumsum(0) - count)[rows]
        wide = (z.shape[0], int(count.amax()))
        all_values = torch.cat([self.values, z.new_full(wide, -torch.inf)], 1)
        all_ids = torch.cat([self.ids, torch.full(wide, -1, dtype=torch.int64, device=z.device)], 1)
        all_values[rows, self.k + place] = values
        all_ids[rows, self.k + place] = columns + first
        best, chosen = all_values.topk(self.k + 1, dim=1)
        tied = ((best[:, 1:] == best[:, :-1]) & (best[:, 1:] > -torch.inf)).any(1).nonzero().squeeze(1)
        self.values, self.ids = best[:, : self.k].contiguous(), all_ids.gather(1, chosen[:, : self.k])
        for some in torch.split(tied, 16):
            ids, order = all_ids[some].sort(dim=1)
            ordered, by_value = all_values[some].gather(1, order).sort(dim=1, descending=True, stable=True)
            self.values[some] = ordered[:, : self.k]
            self.ids[some] = ids.gather(1, by_value[:, : self.k])
        self.ids.masked_fill_(self.values == -torch.inf, -1)
        entered = (self.ids >= first).nonzero()
        return entered[:, 0], self.ids[entered[:, 0], entered[:, 1]] - first

    @staticmethod
    def _candidates(z: Tensor, over: Tensor, threshold: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (ascending), columns and values of the entries of the marked chunks that pass both bounds."""
        rows, chunks = over.nonzero().unbind(1)
        count = over.shape[1]
        inside = chunks[:, None] + torch.arange(0, z.shape[1], count, device=z.device)
        values = z.reshape(-1).index_select(0, (rows[:, None] * z.shape[1] + inside).flatten()).view_as(inside)
        passing = values > threshold[rows]
        if bound is not None:
            passing &= values >= bound[rows]
        chunk, offset = passing.nonzero().unbind(1)
        return rows[chunk], inside[chunk, offset], values[chunk, offset]

    def complete(self, vocab_size: int) -> None:
        """Fill empty slots (fewer than k finite logits) with the lowest ids of probability zero."""
        for row in (self.ids < 0).any(1).nonzero().squeeze(1).tolist():
            taken = self.ids[row][self.ids[row] >= 0]
            free = torch.arange(min(vocab_size, 2 * self.k), device=self.ids.device)
            free = free[~torch.isin(free, taken)]
            self.ids[row] = torch.cat([taken, free])[: self.k]

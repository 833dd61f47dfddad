"""The running top-k of a sweep, exact under ties, touching only rows whose block can change it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRIDE = 32  # entries per chunk; a chunk is every (width // STRIDE)-th column, so its maximum vectorises


@dataclass(frozen=True)
class Peaks:
    """Maxima of one block of logits [n, B]: of its chunks [n, C], of the columns left over, and of the whole row [n]."""

    chunks: Tensor
    row: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Peaks:
        n, width = z.shape
        count = width // STRIDE
        body = count * STRIDE
        chunks = z[:, :body].unflatten(1, (STRIDE, count)).amax(1) if count else z.new_empty(n, 0)
        row = chunks.amax(1) if count else z.amax(1)
        if count and body < width:
            row = torch.maximum(row, z[:, body:].amax(1))
        return cls(chunks, row)


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

        An entry beats the k-th leader only if it is strictly larger: all earlier ids are lower. So a row whose maximum
        does not exceed its k-th leader is left alone, and of the others only the chunks whose maximum exceeds it are
        looked into.
        """
        rows = (peaks.row > self.values[:, -1]).nonzero().squeeze(1)
        if rows.numel() == 0:
            return rows, rows
        whole = rows.numel() == z.shape[0]
        old_values = self.values if whole else self.values[rows]
        old_ids = self.ids if whole else self.ids[rows]
        columns, tied = self._columns(z, peaks.chunks if whole else peaks.chunks[rows], old_values[:, -1:])
        values = torch.cat([old_values, z[rows[:, None], columns]], 1)
        ids = torch.cat([old_ids, columns + first], 1)
        if values.shape[1] > self.k:
            best, chosen = values.topk(self.k + 1, dim=1)
            tied = tied | ((best[:, self.k - 1] == best[:, self.k]) & (best[:, self.k] > -torch.inf))
            best, chosen = best[:, : self.k], chosen[:, : self.k]
        else:
            best, chosen = values.topk(self.k, dim=1)
        ids = ids.gather(1, chosen)
        if tied.any():
            best, ids = self._settle(z, first, rows, tied, old_values, old_ids, best, ids)
        elif self.k > 1 and ((best[:, 1:] == best[:, :-1]) & (best[:, 1:] > -torch.inf)).any():
            ids, order = ids.sort(dim=1)
            best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
            ids = ids.gather(1, order)
        ids = ids.masked_fill(best == -torch.inf, -1)
        if whole:
            self.values, self.ids = best, ids
        else:
            self.values[rows], self.ids[rows] = best, ids
        entered = (ids >= first).nonzero()
        return rows[entered[:, 0]], ids[entered[:, 0], entered[:, 1]] - first

    def _columns(self, z: Tensor, chunks: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [r, m] of the block that may lead, and the rows [r] where a tie between chunks leaves it open."""
        width, count = z.shape[1], chunks.shape[1]
        open_rows = torch.zeros(chunks.shape[0], dtype=torch.bool, device=z.device)
        tail = torch.arange(count * STRIDE, width, device=z.device).expand(chunks.shape[0], -1)
        if count == 0:
            return tail, open_rows
        needed = int((chunks > threshold).sum(1).amax())
        if needed == 0:
            return tail, open_rows
        kept = min(needed, self.k)
        best, chosen = chunks.topk(min(kept + 1, count), dim=1)
        if needed > self.k:
            # The k-th and the next chunk tie: a lower id may sit in the one not taken.
            open_rows = (best[:, kept - 1] == best[:, kept]) & (best[:, kept] > threshold[:, 0])
        offsets = torch.arange(0, count * STRIDE, count, device=z.device)
        inside = (chosen[:, :kept, None] + offsets).flatten(1)
        return torch.cat([inside, tail], 1), open_rows

    def _settle(
        self,
        z: Tensor,
        first: int,
        rows: Tensor,
        tied: Tensor,
        old_values: Tensor,
        old_ids: Tensor,
        best: Tensor,
        ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Redo every row by a stable sort of all its entries, a few rows at a time; ties are rare but must be exact."""
        block_ids = torch.arange(first, first + z.shape[1], device=z.device)
        for some in torch.arange(rows.numel(), device=z.device).split(16):
            if not tied[some].any():
                some_best, some_ids = best[some], ids[some]
                some_ids, order = some_ids.sort(dim=1)
                some_best, order = some_best.gather(1, order).sort(dim=1, descending=True, stable=True)
                best[some], ids[some] = some_best, some_ids.gather(1, order)
                continue
            values = torch.cat([old_values[some], z[rows[some]]], 1)
            names = torch.cat([old_ids[some], block_ids.expand(some.numel(), -1)], 1)
            ordered, order = values.sort(dim=1, descending=True, stable=True)
            best[some], ids[some] = ordered[:, : self.k], names.gather(1, order[:, : self.k])
        return best, ids

    def complete(self, vocab_size: int) -> None:
        """Fill empty slots (fewer than k finite logits) with the lowest ids of probability zero."""
        for row in (self.ids < 0).any(1).nonzero().squeeze(1).tolist():
            taken = self.ids[row][self.ids[row] >= 0]
            free = torch.arange(min(vocab_size, 2 * self.k), device=self.ids.device)
            free = free[~torch.isin(free, taken)]
            self.ids[row] = torch.cat([taken, free])[: self.k]

"""SwitchedNext: a batch of distributions, each taken from one of several batches of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nextoken.head import Statistics
from nextoken.model.next import Next


class SwitchedNext(Next):
    """next[b, i] = parts[choice[b, i]][b, i], computed when asked for and only for what is chosen.

    Args:
        parts: of one shape and vocabulary.
        choice: [B, n], which of them.
        is_large: [B, n], whether the large model answered; False at absent tokens.
    """

    def __init__(self, parts: Sequence[Next], choice: Tensor, is_large: Tensor) -> None:
        self.parts, self.choice, self.is_large = tuple(parts), choice, is_large
        self.shape, self.vocab_size = (choice.shape[0], choice.shape[1]), parts[0].vocab_size

    def log_probs(self) -> Tensor:
        return self._gathered(lambda part: part.log_probs())

    def logits(self) -> Tensor:
        return self._gathered(lambda part: part.logits())

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        found, places = [], []
        for chosen, part in self._chosen():
            wanted = None if targets is None else targets[chosen.to(targets.device)][:, None]
            found.append(part[chosen].statistics(wanted, top=top))
            places.append(chosen.flatten().nonzero()[:, 0])
        if not found:
            return self.parts[0].statistics(targets, top=top)
        every = Statistics.concat([part.to(found[0].entropy.device) for part in found])
        return every[torch.argsort(torch.cat(places))].reshape(*self.shape)

    def _gathered(self, of: Callable[[Next], Tensor]) -> Tensor:
        """[B, n, V] from what `of` tells of each part where it was chosen."""
        pieces = [(chosen, of(part[chosen])[:, 0]) for chosen, part in self._chosen()]
        if not pieces:
            return of(self.parts[0])
        wide = pieces[0][1].dtype
        for _, piece in pieces[1:]:
            wide = torch.promote_types(wide, piece.dtype)
        whole = torch.empty(*self.shape, self.vocab_size, dtype=wide, device=pieces[0][1].device)
        for chosen, piece in pieces:
            whole[chosen.to(whole.device)] = piece.to(whole)
        return whole

    def _chosen(self) -> list[tuple[Tensor, Next]]:
        masks = [(self.choice == number, part) for number, part in enumerate(self.parts)]
        return [(mask, part) for mask, part in masks if bool(mask.any())]

    def _take(self, rows: Tensor, columns: Tensor) -> SwitchedNext:
        parts = [part._take(rows, columns) for part in self.parts]
        return SwitchedNext(parts, self.choice[rows, columns], self.is_large[rows, columns])

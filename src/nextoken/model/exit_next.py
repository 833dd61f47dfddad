"""ExitNext: distributions told at different depths of one decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from nextoken.head import Head
from nextoken.model.next import HeadNext


class ExitNext(HeadNext):
    """Distributions of the exits that told them; those judged to choose the exit are kept, where there is room.

    Args:
        hidden: [B, n, H], normed, at each token's exit.
        depth: [B, n], the layers below that exit.
        said: logits [B, n, V] of what was judged, None where nothing was kept.
        known: [B, n], where they hold.
    """

    def __init__(self, hidden: Tensor, head: Head, depth: Tensor, said: Tensor | None, known: Tensor) -> None:
        super().__init__(hidden, head)
        self.depth, self._said, self._known = depth, said, known

    def logits(self) -> Tensor:
        if self._said is None or not bool(self._known.any()):
            return super().logits()
        if not bool(self._known.all()):
            asked = (~self._known).to(self._said.device)
            self._said = self._said.masked_scatter(asked[..., None], self.head.logits(self._hidden[asked]))
            self._known = torch.ones_like(self._known)
        return self._said

    def log_probs(self) -> Tensor:
        return torch.log_softmax(self.logits(), dim=-1)

    def _take(self, rows: Tensor, columns: Tensor) -> ExitNext:
        device = self._hidden.device
        there = rows.to(device), columns.to(device)
        said = None if self._said is None else self._said[there]
        here = rows.to("cpu"), columns.to("cpu")
        return ExitNext(self._hidden[there], self.head, self.depth[here], said, self._known[here])

"""Stride: S token sequences predicted side by side, one token each per step, the same way in coding and in decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextoken.errors import ModelError
from nextoken.signature.window import windows

if TYPE_CHECKING:
    from torch import Tensor

    from nextoken.model.base import LanguageModel

BITS = 32
"""Shares of tokens are counts out of 2^32."""


class Stride:
    """The distributions of S sequences, step by step, as integer counts.

    Floating-point results depend on the shapes of the calls that made them. So every number here comes from calls whose
    shapes the lengths alone determine: a row that has ended is fed token 0, and all rows begin new windows together.

    Args:
        model: that predicts.
        rows: S.
        length: tokens of the longest sequence.
        overlap: of windows, as of `nextoken.read`.
    """

    def __init__(self, model: LanguageModel, rows: int, length: int, *, overlap: int | None) -> None:
        import torch

        self.model, self.rows = model, rows
        begin = [] if model.vocab.bos_id is None else [model.vocab.bos_id]
        self.tokens = torch.zeros(rows, len(begin) + length, dtype=torch.long)
        self.tokens[:, : len(begin)] = torch.tensor(begin, dtype=torch.long)
        self.at = len(begin)
        """Where the next token stands, the begin token counted."""
        plan = windows(len(begin) + length, model.context_length, overlap)
        self._starts = {window.first: window.begin for window in plan}
        self._state = model.start(rows)

    def bounds(self) -> Tensor:
        """Cumulative counts [S, V + 1] of the next tokens, from 0 to 2^32: token v has the stretch from v to v + 1.

        counts = 1 + floor(p (2^32 - V)), and what is left over goes to the most probable token: so every token can be
        coded, at a cost above -log2 p of less than V / 2^32 / log 2 bits on average. The first token of a sequence that
        has no begin token is predicted by nothing: all are alike.
        """
        import torch

        size, total = self.model.vocab.size, 1 << BITS
        if self.at == 0:
            even = torch.arange(size + 1, dtype=torch.float64) * (total / size)
            return even.floor().long().repeat(self.rows, 1)
        begin = self._starts.get(self.at)
        if begin is None:
            begin = self.at - 1
        else:
            self._state = self.model.start(self.rows)
        said = self.model.extend(self._state, self.tokens[:, begin : self.at])[:, -1].log_probs()[:, 0]
        # Not every device has float64.
        p = (said.cpu() if said.device.type == "mps" else said).double().exp()
        whole = p.sum(-1, keepdim=True)
        if not bool(whole.isfinite().all()):
            raise ModelError(f"{self.model.name} gave NaN for a distribution, which cannot be coded with")
        counts = (p / whole * (total - size)).floor().long() + 1
        counts.scatter_add_(-1, p.argmax(-1, keepdim=True), total - counts.sum(-1, keepdim=True))
        return torch.nn.functional.pad(counts.cumsum(-1), (1, 0))

    def take(self, chosen: Tensor) -> None:
        """Go on: the tokens that came [S]."""
        self.tokens[:, self.at] = chosen
        self.at += 1

"""Kangaroo: guesses drawn from the target's own first layers, which the verification does not run again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nextoken.methods import method
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.early_exit import EarlyExit
from nextoken.model.next import Next
from nextoken.speculate.draft import Row
from nextoken.speculate.draft_model import DraftModel
from nextoken.speculate.kangaroo_adapter import KangarooAdapter
from nextoken.speculate.shapes import Chain, Growth


@method(
    name="Kangaroo",
    arxiv="2404.18911",
    access="white",
    trained=True,
    summary="the target's own first layers and a small adapter draft, until a guess is unsure",
)
class Kangaroo(DraftModel):
    """A chain drawn from q = softmax(head(A(h_l))), h_l the target's residual stream after layer l, under the row's own
    transform, that goes no further than a token of q below a threshold.

        target = EarlyExit(model, exit=2)
        adapter = KangarooAdapter(target)
        fit_kangaroo(adapter, target, texts)
        generate(target, prompt, speculate=Speculation(Kangaroo(target, adapter)))

    A pass of k guesses costs k + 1 tokens in layers 1 .. l, k in the adapter and k + 1 in layers l + 1 .. N at once:
    exit states of guesses are kept in the target's memory, and the verification goes on from them. The unsure token is
    kept and verified with the others, so that whether to go on depends on what stays in the draft, and every lossless
    rule keeps the law, whatever the adapter says.

    Args:
        target: the model that will be decoded; the drafter works in its states.
        adapter: A, for this exit of the target.
        length: gamma, most guesses per pass.
        confidence: eta; 0 drafts `length` guesses, 1 a single one.

    Raises:
        ValueError: the adapter is for other exit states; length or confidence is out of range.

    Source: Liu et al., arXiv:2404.18911, sections 3.1 to 3.3, and the released code (evaluation/inference_kangaroo.py),
    which decodes single sequences greedily. Where tokens are drawn, the confidence is q of the token drawn.
    """

    def __init__(
        self, target: EarlyExit, adapter: KangarooAdapter, *, length: int = 6, confidence: float = 0.6
    ) -> None:
        adapter.check(target)
        super().__init__(target, Chain(length, confidence))
        self.target, self.adapter = target, adapter

    def check(self, target: LanguageModel) -> None:
        if target is not self.target:
            raise ValueError(
                f"it drafts with the first layers of {self.target.name}: generate from that EarlyExit itself, and not "
                f"from {target.name}"
            )

    def _read(self, rows: Sequence[Row]) -> Next:
        assert rows[0].state is not None
        # A draft that was never verified, if its loop was interrupted.
        self.target.forget_ahead(rows[0].state)
        return self._said(rows, [row.context[-1] for row in rows])

    def _look(
        self, rows: Sequence[Row], able: Sequence[int], growths: Sequence[Growth], wanted: Sequence[tuple[int, int]]
    ) -> Next:
        chosen = [rows[able.index(index)] for index, _ in wanted]
        return self._said(chosen, [growths[index].tokens[node] for index, node in wanted])

    def _said(self, rows: Sequence[Row], tokens: Sequence[int]) -> Next:
        """q [M, 1] after one more token of each of these rows."""
        state = rows[0].state
        assert state is not None
        places = [row.place for row in rows]
        fed = torch.full((state.batch, 1), ABSENT)
        fed[places, 0] = torch.tensor(tokens)
        self.target.ahead(state, fed)
        # The adapter catches up by itself: with the prompt, and with the last guess of a draft that stood as a whole.
        hidden = self.target.read_exits(state, self.adapter)
        return self.adapter.next(hidden[places][:, None], self.target)

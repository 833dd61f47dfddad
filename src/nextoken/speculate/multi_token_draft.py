"""MultiTokenDraft: guesses that the target itself made at masks, in the pass that verified those before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.multi_token import AheadNext, MultiToken
from nextoken.model.next import HeadNext, Next
from nextoken.speculate.draft import Draft, Row
from nextoken.speculate.draft_model import DraftModel
from nextoken.speculate.shapes import Chain, Growth, Shape


@method(
    name="Multi-token prediction with gated LoRA",
    arxiv="2507.11851",
    access="white",
    trained=True,
    summary="the target reads masks after its tokens, and their states are guesses at what comes after the next token",
)
class MultiTokenDraft(DraftModel):
    """Guesses s_j ~ q_j = softmax(head(sampler([E(s_{j-1}); z_j]))) for j = 1 .. k under the row's own transform, s_0
    being the token just drawn from the target.

    z_1 .. z_k are the states of the masks that the target read after the last token that stood, in the very pass that
    verified it; guessing costs the sampler alone. Where it read none there (expansion "linear", and not all guesses
    stood) there are no guesses for one pass. Where the target is decoded greedily the most probable tokens are chosen.

    Args:
        model: the target itself, or another over the same adapter.
        shape: of the tree of guesses; a chain of k by default, as in the paper. Trees want the expansion "quadratic".

    Source: Samragh et al., arXiv:2507.11851, section 3.
    """

    def __init__(self, model: MultiToken, shape: Shape | None = None) -> None:
        super().__init__(model, shape or Chain(max(1, model.masks)))
        self.adapter = model.adapter
        self._ahead: dict[int, Tensor] = {}

    def check(self, target: LanguageModel) -> None:
        if not isinstance(target, MultiToken) or target.adapter is not self.adapter:
            raise ValueError(
                f"its guesses come out of passes of a target over its own adapter, and {target.name} is no such; "
                "decode with the MultiToken that it was given"
            )

    def prompted(self, rows: Sequence[Row], said: Next) -> None:
        self._hear(rows, said, [len(row.context) - 1 for row in rows])

    def observe(self, rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        self._hear(rows, said, [nodes[-1] + 1 if nodes else 0 for nodes in accepted])

    def leave(self, ticket: int) -> None:
        self._ahead.pop(ticket, None)

    def told(self, previous: Tensor, states: Tensor) -> Tensor:
        """What the head reads [N, H] for a guess after tokens [N], from states z [N, H]."""
        return self.adapter.told(previous, states)

    def _hear(self, rows: Sequence[Row], said: Next, last: Sequence[int]) -> None:
        """Remember what the target's masks held after the last token of each row that stood."""
        if not isinstance(said, AheadNext):
            raise ValueError("the target's distributions came without the states of masks")
        here = said._take(torch.arange(len(rows))[:, None], torch.tensor(last)[:, None])
        for row, states, known in zip(rows, here.ahead[:, 0], here.is_ahead[:, 0].tolist(), strict=True):
            self._ahead.pop(row.running.ticket, None)
            if known:
                self._ahead[row.running.ticket] = states

    def _room(self, row: Row) -> int:
        return min(row.room, len(self._ahead.get(row.running.ticket, ())))

    def _read(self, rows: Sequence[Row]) -> Next:
        return self._guessed([(row, row.context[-1], 0) for row in rows])

    def _look(
        self, rows: Sequence[Row], able: Sequence[int], growths: Sequence[Growth], wanted: Sequence[tuple[int, int]]
    ) -> Next:
        place = {index: number for number, index in enumerate(able)}
        return self._guessed(
            [(rows[place[index]], growths[index].tokens[node], growths[index].depth(node)) for index, node in wanted]
        )

    def _guessed(self, places: Sequence[tuple[Row, int, int]]) -> Next:
        """What follows [N, 1] a token of a row, given the state of its mask of this number."""
        states = torch.stack([self._ahead[row.running.ticket][number] for row, _, number in places])
        told = self.told(torch.tensor([token for _, token, _ in places]), states)
        head = self.adapter.stack.head
        return HeadNext(told[:, None].to(head.weight.device), head)

"""How a Chimera head is learnt: all places of texts at once, from the states that the target has there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from nextoken.head import cross_entropy
from nextoken.model._descent import TextRecipe, check_rows, walk
from nextoken.model.base import ABSENT
from nextoken.model.sarsa import FitStep
from nextoken.speculate.chimera_head import ChimeraHead, Feed

_NONE = -100


@dataclass(frozen=True)
class ChimeraRecipe(TextRecipe):
    """How to train; further than `TextRecipe`:

    Args:
        distillation: weight of KL(target || step) beside the cross-entropy of the text.
        feed: what later steps read, see `ChimeraHead.forward`. "guess", as in the released code, also trains them after
            guesses that did not stand.
    """

    distillation: float = 4.0
    feed: Feed = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation < 0:
            raise ValueError(f"distillation must be at least 0, got {self.distillation}")
        if self.feed not in get_args(Feed):
            raise ValueError(f"feed must be 'text' or 'guess', got {self.feed!r}")


def fit_chimera(
    head: ChimeraHead,
    rows: Sequence[Sequence[int]],
    *,
    recipe: ChimeraRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> tuple[float, ...]:
    """Minimise sum_j mean_i (-log q_j(x_i+j+1) + w KL(p(. | x_<=i+j) || q_j)), in nats, q_j what step j says at i and p
    the target.

    The target reads the rows and is not changed; the head is trained in place. Equal seeds give equal weights on one
    machine.

    Args:
        head: see `ChimeraHead`.
        rows: token ids, each row long enough for the first step: at least three. The target's own texts suit best.
        recipe: how to train.
        seed: of the order of the rows.
        on_step: called after each step.

    Returns:
        The loss of every step, summed over the steps of the head.

    Raises:
        ValueError: there are no rows, or one does not fit.

    Source: Zeng et al., arXiv:2402.15758, section 3.4. The released code has no distillation, feeds guesses, hides
    every earlier step of a place where it should show its own, and lets gradients into the trigrams from the first step
    only; here they flow through all.
    """
    how = recipe or ChimeraRecipe()
    check_rows(head.model, rows, least=3)

    def loss_at(chosen: Sequence[int]) -> Tensor:
        return _loss(head, [rows[index] for index in chosen], how)

    head.train()
    try:
        return walk(list(head.parameters()), loss_at, len(rows), recipe=how, seed=seed, on_step=on_step)
    finally:
        head.eval()


def _loss(head: ChimeraHead, rows: Sequence[Sequence[int]], how: ChimeraRecipe) -> Tensor:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows])
    hidden = head.model.predict(ids).hidden
    assert hidden is not None
    losses = []
    for step, said in enumerate(head(hidden, ids.clamp(min=0), feed=how.feed), 1):
        after = torch.arange(step, step + width - 1).clamp(max=width - 1)
        targets = torch.full((len(rows), width - 1), _NONE)
        targets[:, : width - 1 - step] = ids[:, step + 1 :]
        targets[targets == ABSENT] = _NONE
        teacher = (hidden[:, after], head.stack.head) if how.distillation else None
        losses.append(
            cross_entropy(
                said.hidden, said.head, targets.to(hidden.device), teacher=teacher, teacher_weight=how.distillation
            )
        )
    return torch.stack(losses).sum()

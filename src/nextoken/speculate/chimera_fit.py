"""How a Chimera head is learnt: all places of texts at once, from the states that the target has there."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from nextoken.head import cross_entropy
from nextoken.model.base import ABSENT
from nextoken.model.sarsa import FitStep
from nextoken.speculate.chimera_head import ChimeraHead, Feed

_NONE = -100


@dataclass(frozen=True)
class ChimeraRecipe:
    """How to train.

    Args:
        steps, batch: updates, and rows in each.
        rate: AdamW's; it rises over the first 5 % of the steps and falls to 0 as a cosine.
        weight_decay: AdamW's.
        clip: the longest a gradient may be; it is shortened to this.
        distillation: weight of KL(target || step) beside the cross-entropy of the text.
        feed: what later steps read, see `ChimeraHead.forward`. "guess", as in the released code, also trains them after
            guesses that did not stand.
    """

    steps: int = 400
    batch: int = 16
    rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    distillation: float = 4.0
    feed: Feed = "text"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")
        if self.rate <= 0 or self.clip <= 0 or self.weight_decay < 0 or self.distillation < 0:
            raise ValueError(
                "rate and clip must be above 0, weight_decay and distillation at least 0; got "
                f"{self.rate}, {self.clip}, {self.weight_decay} and {self.distillation}"
            )
        if self.feed not in get_args(Feed):
            raise ValueError(f"feed must be 'text' or 'guess', got {self.feed!r}")

    def rate_at(self, step: int) -> float:
        """The rate of step number `step`, from 0."""
        rising = (step + 1) / max(1.0, 0.05 * self.steps)
        return self.rate * min(1.0, rising) * (1 + math.cos(math.pi * step / self.steps)) / 2


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
    _check(head, rows)
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=how.rate, weight_decay=how.weight_decay, betas=(0.9, 0.98))
    per_epoch, losses = math.ceil(len(rows) / how.batch), list[float]()
    order = torch.arange(0)
    for step in range(how.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(len(rows), generator=_generator(seed, epoch))
        chosen = order[place * how.batch : (place + 1) * how.batch].tolist()
        loss = _loss(head, [rows[index] for index in chosen], how)
        optimizer.param_groups[0]["lr"] = how.rate_at(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(head.parameters(), how.clip)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(FitStep(step + 1, how.steps, losses[-1]))
    head.eval()
    return tuple(losses)


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


def _generator(seed: int, epoch: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/epoch {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _check(head: ChimeraHead, rows: Sequence[Sequence[int]]) -> None:
    model = head.model
    if not rows:
        raise ValueError("there are no rows of tokens")
    for number, row in enumerate(rows):
        if len(row) < 3:
            raise ValueError(f"row {number} has {len(row)} tokens; at least three are needed, the last to be guessed")
        if not 0 <= min(row) <= max(row) < model.vocab.size:
            raise ValueError(f"row {number} has token ids outside the vocabulary of {model.vocab.size}")
        if model.context_length is not None and len(row) > model.context_length:
            raise ValueError(f"row {number} has {len(row)} tokens and {model.name} holds {model.context_length}")

"""Training on rows of tokens that come with a number of passes for each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.sarsa import FitStep

NONE = -100


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How to step down.

    Args:
        steps, batch: updates, and rows in each.
        rate: AdamW's; it rises over the first `warm_up` of the steps and falls as a cosine to `floor` of it.
        weight_decay: AdamW's.
        warm_up, floor: shares.
        clip: the longest a gradient may be; it is shortened to this.
    """

    steps: int = 400
    batch: int = 16
    rate: float
    weight_decay: float = 0.01
    warm_up: float = 0.03
    floor: float = 0.1
    clip: float = 0.2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.rate <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise ValueError(
                "steps and batch must be at least 1, rate and clip above 0 and weight_decay at least 0; got "
                f"{self.steps}, {self.batch}, {self.rate}, {self.clip} and {self.weight_decay}"
            )
        if not 0 <= self.warm_up <= 1 or not 0 <= self.floor <= 1:
            raise ValueError(f"warm_up and floor are shares from 0 to 1, got {self.warm_up} and {self.floor}")

    def rate_at(self, step: int) -> float:
        """The rate of step number `step`, from 0."""
        rising = min(1.0, (step + 1) / max(1.0, self.warm_up * self.steps))
        fallen = self.floor + (1 - self.floor) * (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.rate * rising * fallen


def descend(
    learnt: Sequence[nn.Parameter],
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Sequence[Sequence[int]],
    passes: Sequence[Sequence[int]],
    *,
    given: Sequence[int] | int,
    how: Descent,
    seed: int,
    on_step: Callable[[FitStep], object] | None,
) -> tuple[float, ...]:
    """Minimise loss_of(ids, tokens that follow or -100, passes), all [B, n]; every epoch has an order of its own.

    Args:
        given: tokens at the beginning of each row that are not to be learnt.
    """
    before = [given] * len(rows) if isinstance(given, int) else given
    learnt_rows = [[*[NONE] * first, *row[first:]] for row, first in zip(rows, before, strict=True)]
    optimizer = torch.optim.AdamW(learnt, lr=how.rate, weight_decay=how.weight_decay)
    per_epoch, losses = math.ceil(len(rows) / how.batch), list[float]()
    order: list[int] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "dropout"))
        for step in range(how.steps):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                generator = torch.Generator().manual_seed(seed_of(seed, f"epoch {epoch}"))
                order = torch.randperm(len(rows), generator=generator).tolist()
            chosen = order[place * how.batch : (place + 1) * how.batch]
            ids, following, wanted = (
                _padded([some[index] for index in chosen], filler)
                for some, filler in ((rows, ABSENT), (learnt_rows, NONE), (passes, 1))
            )
            optimizer.param_groups[0]["lr"] = how.rate_at(step)
            loss = loss_of(ids[:, :-1], following[:, 1:], wanted[:, :-1])
            if loss.requires_grad:  # else no token makes a second pass, and only what is learnt there has gradients
                # Of these weights only: others that the loss depends on are not to gather gradients.
                for weight, gradient in zip(learnt, torch.autograd.grad(loss, learnt, allow_unused=True), strict=True):
                    weight.grad = gradient
                nn.utils.clip_grad_norm_(learnt, how.clip)
                optimizer.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(FitStep(step + 1, how.steps, losses[-1]))
    return tuple(losses)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def seed_of(seed: int, what: str) -> int:
    """A seed for one purpose of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}".encode()).digest()[:7], "big")


def check(
    model: LanguageModel,
    rows: Sequence[Sequence[int]],
    passes: Sequence[Sequence[int]],
    *,
    given: Sequence[int] | int,
    most: int,
) -> None:
    """Raise a ValueError unless there are rows that the model can read, with 1 to `most` passes for each token."""
    if not isinstance(given, int) and len(given) != len(rows):
        raise ValueError(f"there are {len(rows)} rows, and numbers in `given` for {len(given)}")
    if not rows or len(rows) != len(passes):
        raise ValueError(f"there must be rows, and as many of passes; got {len(rows)} and {len(passes)}")
    for number, (row, labels) in enumerate(zip(rows, passes, strict=True)):
        if len(row) < 2 or len(labels) != len(row):
            raise ValueError(
                f"row {number} has {len(row)} tokens and {len(labels)} numbers of passes; it needs 2 or more of both"
            )
        if not 0 <= min(row) <= max(row) < model.vocab.size:
            raise ValueError(f"row {number} has token ids outside the vocabulary of {model.vocab.size}")
        if not 1 <= min(labels) <= max(labels) <= most:
            raise ValueError(f"row {number} asks for {min(labels)} to {max(labels)} passes of 1 to {most}")
        if model.context_length is not None and len(row) > model.context_length:
            raise ValueError(f"row {number} has {len(row)} tokens and {model.name} holds {model.context_length}")

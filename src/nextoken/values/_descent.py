"""Descent: steps of AdamW on batches of examples, every epoch in an order of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nextoken.model.sarsa import FitStep


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        epochs, batch: passes over the examples, and examples per step.
        rate: AdamW's, after it has risen over `warm_up` steps; it then falls linearly to 0 at the last step.
        warm_up: steps; fewer where there are fewer in all.
        weight_decay: AdamW's.
        clip: the longest a gradient may be; it is shortened to this.
    """

    epochs: int = 2
    batch: int = 32
    rate: float = 1e-4
    warm_up: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.warm_up < 0:
            raise ValueError(
                f"epochs and batch must be at least 1 and warm_up at least 0, got {self.epochs}, {self.batch} and "
                f"{self.warm_up}"
            )
        if self.rate <= 0 or self.weight_decay < 0 or self.clip <= 0:
            raise ValueError(
                f"rate and clip must be above 0 and weight_decay at least 0, got {self.rate}, {self.clip} and "
                f"{self.weight_decay}"
            )

    def rate_at(self, step: int, steps: int) -> float:
        """The rate of step number `step` (from 0) of `steps`."""
        rising = (step + 1) / max(1, self.warm_up)
        falling = (steps - step) / max(1, steps - min(self.warm_up, steps))
        return self.rate * min(1.0, rising, falling)


def descend(
    weights: Sequence[nn.Parameter],
    loss_of: Callable[[list[int]], Tensor],
    count: int,
    *,
    schedule: Schedule,
    seed: int,
    on_step: Callable[[FitStep], object] | None,
) -> tuple[float, ...]:
    """Minimise loss_of(indices) over batches of `count` examples; the loss of every step is returned.

    Args:
        weights: changed in place.
        loss_of: the mean loss of the examples with these indices.
        schedule, seed: equal ones give equal weights on one machine.
        on_step: called after each step.
    """
    optimizer = torch.optim.AdamW(weights, lr=schedule.rate, weight_decay=schedule.weight_decay)
    per_epoch = math.ceil(count / schedule.batch)
    steps, losses = schedule.epochs * per_epoch, list[float]()
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        derived = int.from_bytes(hashlib.sha256(f"{seed}/epoch {epoch}".encode()).digest()[:7], "big")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derived))
        loss = loss_of(order[place * schedule.batch : (place + 1) * schedule.batch].tolist())
        optimizer.param_groups[0]["lr"] = schedule.rate_at(step, steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, schedule.clip)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(FitStep(step + 1, steps, losses[-1]))
    return tuple(losses)

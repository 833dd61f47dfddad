"""Training on rows of tokens: steps of AdamW, every epoch in an order of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.model._network import Network
from nextoken.model.base import LanguageModel
from nextoken.model.sarsa import FitStep

_NONE = -100


@dataclass(frozen=True)
class TextRecipe:
    """How to train on rows.

    Args:
        steps, batch: updates, and rows in each.
        rate: AdamW's; it rises at first and then falls as a cosine.
        weight_decay: AdamW's.
        clip: the longest a gradient may be; it is shortened to this.
        warm_up: the share of the steps over which the rate rises.
        floor: the share of the rate that is left in the end.
        betas: AdamW's.
    """

    steps: int = 400
    batch: int = 16
    rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    warm_up: float = 0.05
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")
        if not 0 <= self.warm_up <= 1 or not 0 <= self.floor <= 1:
            raise ValueError(f"warm_up and floor are shares from 0 to 1, got {self.warm_up} and {self.floor}")
        if self.rate <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"rate and clip must be above 0 and weight_decay at least 0, got {self.rate}, {self.clip} and "
                f"{self.weight_decay}"
            )

    def rate_at(self, step: int) -> float:
        """The rate of step number `step`, from 0."""
        rising = min(1.0, (step + 1) / max(1.0, self.warm_up * self.steps))
        falling = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.rate * rising * (self.floor + (1 - self.floor) * falling)


def descend(
    weights: Sequence[nn.Parameter],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[Sequence[int]],
    *,
    recipe: TextRecipe,
    seed: int,
    on_step: Callable[[FitStep], object] | None,
) -> tuple[float, ...]:
    """Minimise loss_of(ids [B, n], targets [B, n]) over batches of rows; the loss of every step is returned.

    Args:
        weights: changed in place.
        loss_of: targets are the tokens that follow the ids, negative where none does.
        rows: of at least two tokens each.
        recipe, seed: equal ones give equal weights on one machine.
        on_step: called after each step.
    """

    def loss_at(chosen: Sequence[int]) -> Tensor:
        return loss_of(*batch_of([rows[index] for index in chosen]))

    return walk(weights, loss_at, len(rows), recipe=recipe, seed=seed, on_step=on_step)


def walk(
    weights: Sequence[nn.Parameter],
    loss_at: Callable[[Sequence[int]], Tensor],
    count: int,
    *,
    recipe: TextRecipe,
    seed: int,
    on_step: Callable[[FitStep], object] | None,
) -> tuple[float, ...]:
    """Minimise loss_at(indices) over batches of indices below `count`; else as `descend`."""
    learnt = [weight for weight in weights if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=recipe.rate, weight_decay=recipe.weight_decay, betas=recipe.betas)
    per_epoch, losses = math.ceil(count / recipe.batch), list[float]()
    order = torch.arange(0)
    for step in range(recipe.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(count, generator=generator_of(seed, f"epoch {epoch}"))
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        loss = loss_at(order[place * recipe.batch : (place + 1) * recipe.batch].tolist())
        if loss.requires_grad:  # else nothing in this batch goes through what is learnt
            # Of these weights only: others that the loss depends on are not to gather gradients. Idle ones have none.
            for weight, gradient in zip(learnt, torch.autograd.grad(loss, learnt, allow_unused=True), strict=True):
                weight.grad = gradient
            nn.utils.clip_grad_norm_(learnt, recipe.clip)
            optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(FitStep(step + 1, recipe.steps, losses[-1]))
    return tuple(losses)


def batch_of(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """ids [B, n] and the tokens that follow them [B, n], to the right of which a causal model does not look."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    targets = torch.tensor([[*row, *[_NONE] * (width - len(row))] for row in rows])
    return ids[:, :-1], targets[:, 1:]


def next_token_loss(network: Network, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log p(target) in nats, without dropout."""
    logits = network.logits(ids, use_cache=False)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device).flatten(), ignore_index=_NONE)


def generator_of(seed: int, what: str) -> torch.Generator:
    """A generator for one purpose of a run."""
    return torch.Generator().manual_seed(seed_of(seed, what))


def seed_of(seed: int, what: str) -> int:
    """A seed for one purpose of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}".encode()).digest()[:7], "big")


_NUMBERS = {2: "two", 3: "three"}


def check_rows(model: LanguageModel, rows: Sequence[Sequence[int]], *, least: int = 2) -> None:
    """Raise a ValueError unless there are rows of at least two or three tokens that the model can read."""
    if not rows:
        raise ValueError("there are no rows of tokens")
    for number, row in enumerate(rows):
        if len(row) < least:
            raise ValueError(
                f"row {number} has {len(row)} tokens; at least {_NUMBERS[least]} are needed, the last to be predicted"
            )
        if not 0 <= min(row) <= max(row) < model.vocab.size:
            raise ValueError(f"row {number} has token ids outside the vocabulary of {model.vocab.size}")
        if model.context_length is not None and len(row) > model.context_length:
            raise ValueError(f"row {number} has {len(row)} tokens and {model.name} holds {model.context_length}")

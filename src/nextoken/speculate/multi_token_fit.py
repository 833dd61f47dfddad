"""How a multi-token adapter is learnt: every chosen position of a text has masks of its own, all in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nextoken.head import cross_entropy
from nextoken.model.base import ABSENT
from nextoken.model.multi_token_adapter import MultiTokenAdapter
from nextoken.model.sarsa import FitStep


@dataclass(frozen=True)
class MultiTokenRecipe:
    """How to train an adapter.

    Args:
        steps, batch: updates, and texts in each.
        blocks: of how many positions of each text a step learns, drawn anew each time; None for all.
        rate: AdamW's; it rises over the first 5 % of the steps and falls to 0 as a cosine.
        base, sampler, consistency: weights of the three parts of the loss.
        weight_decay: AdamW's.
        clip: the longest a gradient may be; it is shortened to this.
    """

    steps: int = 400
    batch: int = 8
    blocks: int | None = 32
    rate: float = 2e-3
    base: float = 1.0
    sampler: float = 1.0
    consistency: float = 1.0
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or (self.blocks is not None and self.blocks < 1):
            raise ValueError(
                f"steps, batch and blocks must be at least 1, got {self.steps}, {self.batch} and {self.blocks}"
            )
        parts = (self.base, self.sampler, self.consistency)
        if min(parts) < 0 or not any(parts):
            raise ValueError(f"base, sampler and consistency must be at least 0 and not all of them 0, got {parts}")
        if self.rate <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"rate and clip must be above 0 and weight_decay at least 0, got {self.rate}, {self.clip} and "
                f"{self.weight_decay}"
            )

    def rate_at(self, step: int) -> float:
        """The rate of step number `step`, from 0."""
        rising = (step + 1) / max(1.0, 0.05 * self.steps)
        return self.rate * min(1.0, rising) * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True)
class MultiTokenLosses:
    """The three parts of the loss; means over what there is to learn, with gradients.

    Args:
        base, sampler: -log p of the right token in nats, by the head over z and by the head over the sampler's s.
        consistency: mean square between z and the model's own state for the same token.
    """

    base: Tensor
    sampler: Tensor
    consistency: Tensor


def multi_token_losses(adapter: MultiTokenAdapter, tokens: Tensor, nodes: Tensor) -> MultiTokenLosses:
    """The losses of blocks after nodes i of texts x: mask j of a block is to tell x_{i+1+j}, in

    * base: -log softmax(head(z_ij))[x_{i+1+j}];
    * sampler: -log softmax(head(sampler([E(x_{i+j}); z_ij])))[x_{i+1+j}], the true token before it being known;
    * consistency: the mean over tokens t of the mean over masks (i, j), i + 1 + j = t, of ||z_ij - h_{t-1}||^2 / H, h
      the model's own states, which are constants here.

    What lies beyond the end of a text is left out.

    Args:
        adapter: with k masks.
        tokens: x [B, n], ABSENT at the end of shorter texts.
        nodes: i [B, m], negative for none.

    Source: Samragh et al., arXiv:2507.11851, section 3.
    """
    hidden, states = adapter.ahead(tokens, nodes)
    stack, batch, n = adapter.stack, tokens.shape[0], tokens.shape[1]
    at = nodes[:, :, None] + 1 + torch.arange(len(adapter.masks))  # [B, m, k], where x_{i+j} stands
    inside = (nodes[:, :, None] >= 0) & (at + 1 < (tokens != ABSENT).sum(1)[:, None, None])
    rows, _, _ = torch.where(inside)
    at = at[inside]
    states, device = states[inside.to(states.device)], states.device
    previous, targets = tokens[rows, at], tokens[rows, at + 1].to(device)
    base = cross_entropy(states, stack.head, targets)
    sampler = cross_entropy(adapter.told(previous, states), stack.head, targets)
    gaps = (states.float() - hidden[rows.to(device), at.to(device)].float()).pow(2).mean(-1)
    told = rows * n + at  # a number for each token to be told
    counts = torch.bincount(told, minlength=batch * n).to(device)
    weights = 1 / counts[told.to(device)]
    return MultiTokenLosses(base, sampler, (weights * gaps).sum() / (counts > 0).sum().clamp(min=1))


def fit_multi_token(
    adapter: MultiTokenAdapter,
    texts: Sequence[Sequence[int]],
    *,
    recipe: MultiTokenRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> tuple[float, ...]:
    """Minimise the weighted sum of `multi_token_losses` over random positions of random texts.

    The adapter is trained in place, the model is not changed. Equal seeds give equal weights on one machine.

    Args:
        adapter: with at least one mask.
        texts: rows of token ids, of at least three tokens each; best in the manner of what will be generated.
        recipe: how to train.
        seed: of the order of the texts and of the positions.
        on_step: called after each step.

    Returns:
        The loss of every step.

    Raises:
        ValueError: no masks, no texts, or texts that are too short or not the model's.

    Source: Samragh et al., arXiv:2507.11851, section 3. There every position of a text has its masks; here, by default,
    some, for the cost of a step grows with their number.
    """
    how = recipe or MultiTokenRecipe()
    _check(adapter, texts)
    weights = list(adapter.parameters())
    optimizer = torch.optim.AdamW(weights, lr=how.rate, weight_decay=how.weight_decay, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    order, losses = list[int](), list[float]()
    adapter.train()
    for step in range(how.steps):
        while len(order) < how.batch:
            order += torch.randperm(len(texts), generator=generator).tolist()
        chosen, order = order[: how.batch], order[how.batch :]
        tokens = _padded([texts[index] for index in chosen])
        nodes = _positions([len(texts[index]) for index in chosen], how.blocks, generator)
        optimizer.param_groups[0]["lr"] = how.rate_at(step)
        parts = multi_token_losses(adapter, tokens, nodes)
        loss = how.base * parts.base + how.sampler * parts.sampler + how.consistency * parts.consistency
        # Of the adapter only: the model's own weights are not to gather gradients.
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            weight.grad = gradient
        nn.utils.clip_grad_norm_(weights, how.clip)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(FitStep(len(losses), how.steps, losses[-1]))
    adapter.eval()
    return tuple(losses)


def _positions(lengths: Sequence[int], blocks: int | None, generator: torch.Generator) -> Tensor:
    """[B, m], places of each text after which two tokens come at least, in order; ABSENT where a text has fewer."""
    rows = [torch.randperm(length - 2, generator=generator)[:blocks].sort().values.tolist() for length in lengths]
    return _padded(rows)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows])


def _check(adapter: MultiTokenAdapter, texts: Sequence[Sequence[int]]) -> None:
    model = adapter.stack.model
    if not len(adapter.masks):
        raise ValueError("the adapter has no masks, so there is nothing to learn: make one with masks=1 or more")
    if not texts:
        raise ValueError("there are no texts to learn from")
    for number, row in enumerate(texts):
        if len(row) < 3:
            raise ValueError(f"text {number} has {len(row)} tokens; at least three are needed, one to guess two ahead")
        if not 0 <= min(row) <= max(row) < model.vocab.size:
            raise ValueError(f"text {number} has token ids outside the vocabulary of {model.vocab.size}")
        if model.context_length is not None and len(row) > model.context_length:
            raise ValueError(f"text {number} has {len(row)} tokens and {model.name} holds {model.context_length}")

"""How a multi-token adapter is learnt: every chosen position of a text has masks of its own, all in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nextoken.head import cross_entropy
from nextoken.model._descent import TextRecipe, check_rows
from nextoken.model.base import ABSENT
from nextoken.model.multi_token_adapter import MultiTokenAdapter
from nextoken.model.sarsa import FitStep


@dataclass(frozen=True, kw_only=True)
class MultiTokenRecipe(TextRecipe):
    """How to train an adapter; further than `TextRecipe`:

    Args:
        blocks: of how many positions of each text a step learns, drawn anew each time; None for all.
        base, sampler, consistency: weights of the three parts of the loss.
    """

    batch: int = 8
    rate: float = 2e-3
    weight_decay: float = 0.0
    blocks: int | None = 32
    base: float = 1.0
    sampler: float = 1.0
    consistency: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        parts = (self.base, self.sampler, self.consistency)
        if min(parts) < 0 or not any(parts):
            raise ValueError(f"base, sampler and consistency must be at least 0 and not all of them 0, got {parts}")


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
    optimizer = torch.optim.AdamW(weights, lr=how.rate, weight_decay=how.weight_decay, betas=how.betas)
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
    if not len(adapter.masks):
        raise ValueError("the adapter has no masks, so there is nothing to learn: make one with masks=1 or more")
    check_rows(adapter.stack.model, texts, least=3)

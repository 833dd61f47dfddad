"""How Duo-LLM is learnt: all routes at once by random routing, then routers that keep to a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.model._descent import TextRecipe, check_rows, descend, generator_of, next_token_loss
from nextoken.model.base import ABSENT
from nextoken.model.sarsa import FitStep
from nextoken.route.duo import DuoLLM
from nextoken.route.duo_route import Decide, Width, given_widths
from nextoken.route.duo_routers import DuoRouters

_BATCH, _SETTLING = 32, 256
"""Rows read at once, and rows by which the budget is settled."""
_FURTHEST, _HALVINGS = 64.0, 20


@dataclass(frozen=True)
class DuoRecipe(TextRecipe):
    """How to train with random routing; as `TextRecipe`."""


@dataclass(frozen=True)
class RouterRecipe(TextRecipe):
    """How to train routers; further than `TextRecipe`:

    Args:
        weight: of the budget's term, in nats per squared share.
        temperature: of the Gumbel softmax through which gradients flow.
    """

    rate: float = 1e-2
    weight_decay: float = 0.0
    weight: float = 20.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0 or self.temperature <= 0:
            raise ValueError(
                f"weight must be at least 0 and temperature above 0, got {self.weight} and {self.temperature}"
            )


def fit_duo(
    duo: DuoLLM,
    rows: Sequence[Sequence[int]],
    *,
    widths: Iterable[Width] = (Width.SMALL, Width.BIG),
    recipe: DuoRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> tuple[float, ...]:
    """Minimise E_r[-log p_r(next token)], r drawn anew for every token and layer of every step, all widths alike.

    So every route becomes a model of its own, and the two blocks of a layer can stand for each other. Each block
    learns from its share of the tokens only: a dense model trained for as many steps has seen more.

    Args:
        duo: trained in place, all its weights.
        rows: token ids, at least two in each.
        widths: those to draw from.
        recipe: how to train.
        seed: of the order of the rows, and of the routes.
        on_step: called after each step.

    Returns:
        The loss of every step.

    Raises:
        ValueError: there are no rows or widths, or a row does not fit.

    Source: Duo-LLM, arXiv:2410.10846, stage 1.
    """
    how, offered = recipe or DuoRecipe(), torch.tensor([int(width) for width in widths])
    if not len(offered):
        raise ValueError("there are no widths to draw from")
    check_rows(duo, rows)
    generator, network = generator_of(seed, "routes"), duo.inner.network

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        drawn = offered[torch.randint(len(offered), (duo.depth, *ids.shape), generator=generator)]
        with duo.deciding([given_widths(widths) for widths in drawn]):
            return next_token_loss(network, ids, targets)

    weights = list(duo.inner.model.parameters())
    return descend(weights, loss_of, rows, recipe=how, seed=seed, on_step=on_step)


def fit_routers(
    duo: DuoLLM,
    rows: Sequence[Sequence[int]],
    *,
    budget: float,
    widths: Iterable[Width] = (Width.SMALL, Width.BIG),
    recipe: RouterRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> tuple[DuoRouters, tuple[float, ...]]:
    """Minimise -log p(next token) + weight (u - budget)^2 over routers, the duo as it is.

    u is the mean over tokens and layers of the activated share of the big block's weights. In training the width is
    that of the largest of logits + Gumbel noise, and gradients pass through the softmax of the same (straight through).
    The noise falls to nothing by the last step. What is then chosen without noise may still miss the budget, so that at
    last one number c is found by bisection on the rows: all logits are moved by c times what their width costs. On
    another text u may lie beside the budget: compare at the share that was measured.

    Args:
        duo: trained with random routing.
        rows: token ids, at least two in each; not the text to be tested on.
        budget: target of u, from the share of the cheapest width to that of the dearest.
        widths: those offered to the routers.
        recipe: how to train.
        seed: of the order of the rows, and of the noise.
        on_step: called after each step.

    Returns:
        The routers, and the loss of every step.

    Raises:
        ValueError: there are no rows, one does not fit, or the budget cannot be met.

    Source: Duo-LLM, arXiv:2410.10846, stage 3; loss and estimator are reconstructed.
    """
    how = recipe or RouterRecipe()
    check_rows(duo, rows)
    routers = DuoRouters(duo, widths=widths)
    table = torch.tensor([block.costs for block in duo.blocks])
    low, high = (float(table[:, int(routers.widths[end])].mean()) for end in (0, -1))
    if not low <= budget <= high:
        raise ValueError(f"with these widths the budget lies from {low:.3f} to {high:.3f}, got {budget}")
    generator, network = generator_of(seed, "noise"), duo.inner.network
    noises = iter(torch.linspace(1, 0, how.steps).tolist())

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        noise = next(noises)
        decides = [_straight_through(routers, layer, how.temperature, noise, generator) for layer in range(duo.depth)]
        with duo.deciding(decides):
            loss = next_token_loss(network, ids, targets)
        used = []
        for block, costs in zip(duo.blocks, table, strict=True):
            assert block.last is not None
            used.append((block.last[(targets >= 0).to(block.last.device)] @ costs.to(block.last)).mean())
        return loss + how.weight * (torch.stack(used).mean() - budget).square()

    losses = descend(list(routers.parameters()), loss_of, rows, recipe=how, seed=seed, on_step=on_step)
    _settle(routers, duo, rows[:_SETTLING], budget)
    return routers, losses


@torch.no_grad()
def _settle(routers: DuoRouters, duo: DuoLLM, rows: Sequence[Sequence[int]], budget: float) -> None:
    """Move the logits by what their widths cost, to the budget."""
    costs = torch.tensor([[block.costs[width] for width in routers.widths] for block in duo.blocks])
    model, bias = duo.along(routers), routers.bias.detach().clone()
    table = torch.tensor([block.costs for block in duo.blocks], dtype=torch.float64)

    def used(c: float) -> float:
        routers.bias.copy_(bias + c * costs.to(bias.device))
        shares = torch.tensor(activated_share(model, rows), dtype=torch.float64)
        return float((shares * table).sum(-1).mean())

    low, high = -_FURTHEST, _FURTHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if used(middle) >= budget else (middle, high)
    used(min((low, high), key=lambda c: abs(used(c) - budget)))


def _straight_through(
    routers: DuoRouters, layer: int, temperature: float, noise: float, generator: torch.Generator
) -> Decide:
    places = [int(width) for width in routers.widths]

    def decide(hidden: Tensor) -> Tensor:
        logits = routers.logits(layer, hidden)
        uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7).to(logits.device)
        soft = torch.softmax((logits - noise * torch.log(-torch.log(uniform))) / temperature, -1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        chosen = hard + soft - soft.detach()
        weights = chosen.new_zeros(*chosen.shape[:-1], len(Width))
        return weights.index_copy(-1, torch.tensor(places, device=weights.device), chosen).to(hidden.dtype)

    return decide


def activated_share(duo: DuoLLM, rows: Sequence[Sequence[int]]) -> tuple[tuple[float, float, float], ...]:
    """Per layer the shares of skip, small and big over the tokens of the rows, along the duo's rule.

    `RandomRoute` takes them as they are: the control of a trained rule at the very budget of every layer.

    Raises:
        ValueError: there are no rows, or one does not fit.
    """
    check_rows(duo, rows)
    counts = torch.zeros(duo.depth, len(Width), dtype=torch.float64)
    for begin in range(0, len(rows), _BATCH):
        some = rows[begin : begin + _BATCH]
        width = max(map(len, some))
        ids = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in some])
        duo.predict(ids)
        for layer, block in enumerate(duo.blocks):
            assert block.last is not None
            counts[layer] += torch.bincount(block.last.cpu()[ids != ABSENT], minlength=len(Width))
    return tuple((skip, small, big) for skip, small, big in (counts / counts.sum(-1, keepdim=True)).tolist())

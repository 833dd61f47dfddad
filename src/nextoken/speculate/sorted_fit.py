"""Sorted fine-tuning: one set of weights that speaks well at several depths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nextoken.head import Head, cross_entropy
from nextoken.methods import method
from nextoken.model._descent import TextRecipe, batch_of, check_rows, walk
from nextoken.model._network import Network
from nextoken.model._sites import decoder_layers
from nextoken.model.hf import HFModel
from nextoken.model.sarsa import FitStep
from nextoken.model.sorted_exits import SortedExits
from nextoken.model.stack import Stack


@dataclass(frozen=True)
class SortedRecipe(TextRecipe):
    """How to train on rows; see `TextRecipe`."""

    rate: float = 5e-4
    weight_decay: float = 0.0


@dataclass(frozen=True)
class SortedFit:
    """What training made.

    Args:
        draft: a new model with these exits, at thresholds of 1: set others with `SortedExits.at`.
        losses: of every step, nats per token at each exit.
    """

    draft: SortedExits
    losses: tuple[tuple[float, ...], ...]


@method(
    name="Sorted fine-tuning",
    arxiv="2309.08968",
    access="white",
    trained=True,
    summary="the first layers of a model trained as models of their own, all at once: the mean loss over exits",
)
def fit_sorted(
    model: HFModel,
    rows: Sequence[Sequence[int]],
    *,
    exits: Sequence[int],
    recipe: SortedRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> SortedFit:
    """Minimise (1 / k) sum_j mean_t -log p_j(x_t | x_<t) in nats, p_j = softmax(head(norm(h_{e_j}))), over all weights.

    It is done on a copy in float32 of the layers up to the last exit, without dropout; the model stays as it is. No
    target is needed: a draft serves every target with its vocabulary. With one exit this is ordinary fine-tuning.
    Equal seeds give equal weights on one machine.

    Args:
        model: of the families that `Stack` takes.
        rows: of at least two tokens each, begin token included where the model wants one.
        exits: numbers of layers, rising.
        recipe: how to train.
        seed: of the order of the rows.
        on_step: called after each step, with the mean over exits.

    Raises:
        ValueError: exits out of order or range, no rows, or rows that the model cannot read.
        ModelError: the model cannot be run layer by layer.

    Source: Sorted LLaMA, arXiv:2309.08968, section 3; the sum there is the mean here. As a draft: arXiv:2407.01955.
    """
    how = recipe or SortedRecipe()
    check_rows(model, rows)
    draft = SortedExits(
        _first_layers(model, exits), exits, thresholds=(1.0,) * (len(exits) - 1), name=f"sorted({model.name})"
    )
    losses: list[tuple[float, ...]] = []

    def mean_loss(chosen: Sequence[int]) -> Tensor:
        by_exit = _losses(draft, [rows[index] for index in chosen])
        losses.append(tuple(by_exit.tolist()))
        return by_exit.mean()

    walk(list(draft.model.model.parameters()), mean_loss, len(rows), recipe=how, seed=seed, on_step=on_step)
    return SortedFit(draft, tuple(losses))


@torch.no_grad()
def exit_losses(draft: SortedExits, rows: Sequence[Sequence[int]], *, batch: int = 16) -> tuple[float, ...]:
    """Mean over all tokens but the first of each row of -log p_j in nats, at each exit.

    Raises:
        ValueError: no rows, or rows that the model cannot read.
    """
    check_rows(draft.model, rows)
    total, tokens = torch.zeros(len(draft.exits)), 0
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        count = sum(len(row) - 1 for row in some)
        total, tokens = total + _losses(draft, some).cpu() * count, tokens + count
    return tuple((total / tokens).tolist())


def _losses(draft: SortedExits, rows: Sequence[Sequence[int]]) -> Tensor:
    """Nats per token [k] at each exit, with gradients."""
    ids, targets = batch_of(rows)
    stack = draft.stack
    head = _live(stack)
    targets = targets.to(head.weight.device)
    states = draft.states(ids)
    return torch.stack([cross_entropy(stack.finish(hidden).to(head.weight.device), head, targets) for hidden in states])


def _live(stack: Stack) -> Head:
    """The head over weights that gather gradients."""
    layer = stack.model.model.get_output_embeddings()
    return replace(stack.head, weight=layer.weight, bias=layer.bias)


def _first_layers(model: HFModel, exits: Sequence[int]) -> HFModel:
    """A copy in float32 of the layers up to the last exit."""
    last = max(exits, default=0)
    depth = int(model.network.config.num_hidden_layers)
    if not 1 <= last <= depth:
        raise ValueError(f"exits must be rising numbers of layers from 1 to {depth}, got {tuple(exits)}")
    network = copy.deepcopy(model.model).to(torch.float32)
    if last < depth:
        owner = Network(network)
        _, layers = decoder_layers(owner)
        del layers[last:]
        owner.config.num_hidden_layers = last
        if getattr(owner.config, "layer_types", None):
            owner.config.layer_types = list(owner.config.layer_types)[:last]
    return HFModel(network, model.tokenizer, name=model.name)

"""Sorted fine-tuning: one set of weights that speaks well at several depths."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nextoken.head import Head, cross_entropy
from nextoken.methods import method
from nextoken.model._network import Network
from nextoken.model._sites import decoder_layers
from nextoken.model.hf import HFModel
from nextoken.model.sarsa import FitStep
from nextoken.model.sorted_exits import SortedExits
from nextoken.model.stack import Stack

_NONE = -100


@dataclass(frozen=True)
class SortedRecipe:
    """How to train on rows.

    Args:
        steps, batch: updates, and rows in each.
        rate: AdamW's; it rises over the first 5 % of the steps and falls to 0 as a cosine.
        weight_decay: AdamW's.
        clip: the longest a gradient may be; it is shortened to this.
    """

    steps: int = 400
    batch: int = 16
    rate: float = 5e-4
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")
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
    _check_rows(model, rows)
    draft = SortedExits(
        _first_layers(model, exits), exits, thresholds=(1.0,) * (len(exits) - 1), name=f"sorted({model.name})"
    )
    weights = [weight for weight in draft.model.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=how.rate, weight_decay=how.weight_decay, betas=(0.9, 0.98))
    per_epoch, losses = math.ceil(len(rows) / how.batch), list[tuple[float, ...]]()
    order = torch.arange(0)
    for step in range(how.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(len(rows), generator=_generator(seed, epoch))
        chosen = order[place * how.batch : (place + 1) * how.batch].tolist()
        by_exit = _losses(draft, [rows[index] for index in chosen])
        optimizer.param_groups[0]["lr"] = how.rate_at(step)
        optimizer.zero_grad()
        loss = by_exit.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, how.clip)
        optimizer.step()
        losses.append(tuple(by_exit.tolist()))
        if on_step is not None:
            on_step(FitStep(step + 1, how.steps, loss.item()))
    return SortedFit(draft, tuple(losses))


@torch.no_grad()
def exit_losses(draft: SortedExits, rows: Sequence[Sequence[int]], *, batch: int = 16) -> tuple[float, ...]:
    """Mean over all tokens but the first of each row of -log p_j in nats, at each exit.

    Raises:
        ValueError: no rows, or rows that the model cannot read.
    """
    _check_rows(draft.model, rows)
    total, tokens = torch.zeros(len(draft.exits)), 0
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        count = sum(len(row) - 1 for row in some)
        total, tokens = total + _losses(draft, some).cpu() * count, tokens + count
    return tuple((total / tokens).tolist())


def _losses(draft: SortedExits, rows: Sequence[Sequence[int]]) -> Tensor:
    """Nats per token [k] at each exit, with gradients."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    targets = torch.tensor([[*row, *[_NONE] * (width - len(row))] for row in rows])[:, 1:]
    stack = draft.stack
    head = _live(stack)
    targets = targets.to(head.weight.device)
    states = draft.states(ids[:, :-1])
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


def _check_rows(model: HFModel, rows: Sequence[Sequence[int]]) -> None:
    if not rows:
        raise ValueError("there are no rows of tokens")
    for number, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"row {number} has {len(row)} tokens; at least two are needed, one to predict the other")
        if not 0 <= min(row) <= max(row) < model.vocab.size:
            raise ValueError(f"row {number} has token ids outside the vocabulary of {model.vocab.size}")
        if model.context_length is not None and len(row) > model.context_length:
            raise ValueError(f"row {number} has {len(row)} tokens and {model.name} holds {model.context_length}")


def _generator(seed: int, epoch: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/epoch {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

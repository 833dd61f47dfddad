"""Training of the learned scores: batches of ragged features, AdamW, and the weights that are kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from nextoken.scores.feature_cache import Features
from nextoken.scores.learned import Course, Recipe
from nextoken.scores.quality import auroc

Labelled = tuple[Features, np.ndarray]
_BATCH = 64
"""Texts judged at once."""


def begun(make: Callable[[], nn.Module], *, seed: int) -> nn.Module:
    """A network whose weights are drawn from the seed; torch's own random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def restored(network: nn.Module, weights: bytes) -> nn.Module:
    """The network with weights from a safetensors file, ready to judge.

    Raises:
        ValueError: the file is none, or its weights are not those of the network.
    """
    try:
        network.load_state_dict(load(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return network.eval()


def batch(features: Features, chosen: np.ndarray, *, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """The first `length` rows of the chosen texts, filled up with 0 to the longest, [B, n, ...]; rows of each [B]."""
    counts = np.minimum(features.counts[chosen], length)
    steps = np.arange(counts.max())
    there = steps < counts[:, None]
    rows = np.where(there, features.offsets[:-1][chosen, None] + steps, 0)
    values = {}
    for name, array in features.values.items():
        kept = there.reshape(*there.shape, *(1,) * (array.ndim - 1))
        values[name] = torch.from_numpy(np.where(kept, array[rows], array.dtype.type(0)))
    return values, torch.from_numpy(counts)


@torch.no_grad()
def said(network: nn.Module, features: Features, chosen: np.ndarray, *, length: int) -> np.ndarray:
    """Log-odds of the chosen texts, in evaluation mode [len(chosen)]."""
    network.eval()
    odds = np.zeros(len(chosen))
    # Those of like length go together, for padding is work too.
    order = np.argsort(features.counts[chosen], kind="stable")
    for start in range(0, len(chosen), _BATCH):
        some = order[start : start + _BATCH]
        odds[some] = network(*batch(features, chosen[some], length=length)).double().numpy()
    return odds


def trained(
    network: nn.Module,
    features: Features,
    labels: np.ndarray,
    recipe: Recipe,
    *,
    length: int,
    validation: Labelled | None,
    progress: Callable[[int, float], None] | None,
) -> Course:
    """Train the network in place by the recipe, and leave it in evaluation mode with the weights to be kept."""
    count, truth = len(features), torch.from_numpy(labels).float()
    steps = recipe.epochs * -(-count // recipe.batch)
    rises = math.ceil(recipe.warm_up * steps)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: (step + 1) / rises if step < rises else (steps - step) / max(1, steps - rises)
    )
    loss = nn.functional.binary_cross_entropy_with_logits
    losses: list[float] = []
    aurocs = [] if validation is None else [_auroc(network, validation, length)]
    best, kept = 0, copy.deepcopy(network.state_dict())
    order = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for epoch in range(recipe.epochs):
            network.train()
            total = 0.0
            for chosen in torch.split(torch.randperm(count, generator=order), recipe.batch):
                optimiser.zero_grad()
                found = loss(network(*batch(features, chosen.numpy(), length=length)), truth[chosen])
                torch.autograd.backward(found)
                nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
                optimiser.step()
                schedule.step()
                total += found.item() * len(chosen)
            losses.append(total / count)
            if progress is not None:
                progress(epoch, losses[-1])
            if validation is None:
                continue
            aurocs.append(_auroc(network, validation, length))
            if aurocs[-1] > aurocs[best]:
                best, kept = epoch + 1, copy.deepcopy(network.state_dict())
            if recipe.patience is not None and epoch + 1 - best >= recipe.patience:
                break
    if validation is None:
        best = len(losses)
    else:
        network.load_state_dict(kept)
    network.eval()
    return Course(tuple(losses), tuple(aurocs), best)


def _auroc(network: nn.Module, validation: Labelled, length: int) -> float:
    features, labels = validation
    return float(auroc(said(network, features, np.arange(len(features)), length=length), labels))

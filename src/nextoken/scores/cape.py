"""CaPE: a network for the probability of an event, taught by frequencies among like predictions beside labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nextoken.methods import method

if TYPE_CHECKING:
    from torch import Tensor, nn

Targets = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(predicted [n], outcome [n]) -> what the prediction of each item should be [n]."""

_ENTRIES = 1 << 22


def binned_targets(predicted: np.ndarray, outcome: np.ndarray, *, bins: int = 10) -> np.ndarray:
    """The mean outcome of each item's bin [n]: items in order of prediction, cut at floor(j n / B).

    With one bin it is the base rate, with n the outcome itself. The order of equal predictions is that of the items.

    Args:
        predicted: probabilities [n].
        outcome: 0 or 1 [n].
        bins: B.
    """
    p, y = _arrays(predicted, outcome)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    edges = np.unique(np.arange(bins + 1) * len(p) // bins)
    order = np.argsort(p, kind="stable")
    sizes = np.diff(edges)
    means = np.add.reduceat(y[order], edges[:-1]) / sizes
    targets = np.empty_like(p)
    targets[order] = np.repeat(means, sizes)
    return targets


def kernel_targets(predicted: np.ndarray, outcome: np.ndarray, *, sigma: float = 0.05, window: int = 100) -> np.ndarray:
    """sum_j w_ij y_j / sum_j w_ij [n] over items within `window` ranks of i, w_ij = exp(-(p_j - p_i)^2 / (2 sigma^2)).

    The window is symmetric and holds i; the official code leaves out its last item.

    Args:
        predicted, outcome: as of `binned_targets`.
        sigma: above 0; inf weighs all alike.
        window: at least 0.
    """
    p, y = _arrays(predicted, outcome)
    if not sigma > 0 or window < 0:
        raise ValueError(f"sigma must be above 0 and window at least 0, got {sigma} and {window}")
    n, reach = len(p), min(window, len(p) - 1)
    order = np.argsort(p, kind="stable")
    padded = np.pad(p[order], reach, constant_values=np.inf)
    labels = np.pad(y[order], reach)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    truth = np.lib.stride_tricks.sliding_window_view(labels, 2 * reach + 1)
    targets = np.empty(n)
    step = max(1, _ENTRIES // (2 * reach + 1))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        there = np.isfinite(around[rows])
        distance = np.where(there, around[rows] - p[order][rows, None], 0.0) / sigma
        weights = np.where(there, np.exp(-(distance**2) / 2), 0.0)
        targets[order[rows]] = (weights * truth[rows]).sum(1) / weights.sum(1)
    return targets


@dataclass(frozen=True)
class Course:
    """How a training went.

    Args:
        losses: log-loss on the validation items, before training and after each epoch, nats.
        best: the index of the least, whose weights the network was given.
    """

    losses: tuple[float, ...]
    best: int


@dataclass(frozen=True)
class Schedule:
    """How a network is trained: SGD, its rate halved after `patience` epochs without a better validation loss.

    Args:
        epochs: passes over the items.
        rate: of learning, at first.
        momentum, decay: of SGD.
        batch: items per step.
        patience: epochs.
        floor: least rate.
        seed: of the order of the items.
    """

    epochs: int = 100
    rate: float = 1e-4
    momentum: float = 0.9
    decay: float = 5e-4
    batch: int = 256
    patience: int = 5
    floor: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or self.rate <= 0:
            raise ValueError(
                f"a schedule needs epochs >= 0, batch >= 1 and rate > 0, got {self.epochs}, {self.batch}, {self.rate}"
            )


def early_stopping(
    network: nn.Module,
    features: Tensor,
    outcome: Tensor,
    *,
    validation: tuple[Tensor, Tensor],
    schedule: Schedule | None = None,
) -> Course:
    """Train on the 0/1 labels and keep the weights of least validation log-loss: where CaPE begins, and its control.

    Args:
        network: features [n, ...] -> log-odds of the event [n] or [n, 1]; changed in place.
        features, outcome: of the training items; outcomes are 0 or 1 [n].
        validation: features and outcomes of other items.
        schedule: of training; by default 100 epochs at a rate of 0.1.
    """
    chosen = schedule or Schedule(rate=0.1)
    return _trained(network, features, outcome, validation, chosen, lambda epoch, labels: labels)


@method(
    name="CaPE",
    arxiv="2111.10734",
    access="gray",
    trained=True,
    summary="epochs towards frequencies among like predictions between epochs on labels",
)
def cape(
    network: nn.Module,
    features: Tensor,
    outcome: Tensor,
    *,
    validation: tuple[Tensor, Tensor],
    targets: Targets | None = None,
    ordinary: int = 2,
    schedule: Schedule | None = None,
) -> Course:
    """Fine-tune a probability network; every (ordinary + 1)-th epoch its targets are frequencies, else the labels.

    In epochs 0, m + 1, 2 (m + 1), ... the network first predicts all training items (in evaluation mode), `targets`
    makes frequencies pe_i of these predictions and the labels, and the epoch minimises -[pe log p + (1 - pe) log(1 -
    p)]. The weights of least validation log-loss are kept, those it came with among them.

    Begin with a network that stopped early (`early_stopping`): one that has memorised its labels predicts them, and
    then the frequencies are the labels too. Use it for events (an answer is right, a token is in a set), not for the
    whole vocabulary at once. With tokens as items, take the validation items from other documents.

    Args:
        network, features, outcome, validation: as of `early_stopping`.
        targets: `binned_targets` with 10 bins by default, or `partial(kernel_targets, sigma=..., window=...)`.
        ordinary: m, epochs on labels after each on frequencies.
        schedule: of training; by default 100 epochs at a rate of 1e-4.

    Raises:
        ValueError: shapes differ, there are no items, or an argument is out of range.

    Source: Liu et al., arXiv:2111.10734, and its released training script.
    """
    import torch

    if ordinary < 0:
        raise ValueError(f"ordinary must be at least 0, got {ordinary}")
    rule = targets or partial(binned_targets, bins=10)

    def goal(epoch: int, labels: Tensor) -> Tensor:
        if epoch % (ordinary + 1):
            return labels
        predicted = torch.sigmoid(_log_odds(network, features).double())
        made = rule(predicted.cpu().numpy(), labels.cpu().double().numpy())
        return torch.as_tensor(made).to(labels)

    return _trained(network, features, outcome, validation, schedule or Schedule(), goal)


def _trained(
    network: nn.Module,
    features: Tensor,
    outcome: Tensor,
    validation: tuple[Tensor, Tensor],
    schedule: Schedule,
    goal: Callable[[int, Tensor], Tensor],
) -> Course:
    import torch

    labels, held = outcome.float(), validation[1].float()
    for given, truth in ((features, labels), (validation[0], held)):
        if truth.ndim != 1 or len(given) != len(truth) or not len(truth):
            raise ValueError(f"outcomes must be [n] for features [n, ...], n > 0; got {truth.shape} and {given.shape}")
        if not bool(((truth == 0) | (truth == 1)).all()):
            raise ValueError("outcomes must be 0 or 1")
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def validated() -> float:
        return float(loss(_log_odds(network, validation[0]).double(), held.double()))

    optimiser = torch.optim.SGD(
        network.parameters(), lr=schedule.rate, momentum=schedule.momentum, weight_decay=schedule.decay
    )
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=schedule.patience, min_lr=schedule.floor
    )
    generator = torch.Generator().manual_seed(schedule.seed)
    mode, losses = network.training, [validated()]
    best, kept = 0, copy.deepcopy(network.state_dict())
    for epoch in range(schedule.epochs):
        wanted = goal(epoch, labels)
        network.train()
        for chosen in torch.split(torch.randperm(len(labels), generator=generator), schedule.batch):
            optimiser.zero_grad()
            # Targets are taken by the numbers of the items, so that shuffling cannot part the two.
            torch.autograd.backward(loss(network(features[chosen]).reshape(len(chosen)), wanted[chosen]))
            optimiser.step()
        losses.append(validated())
        plateau.step(losses[-1])
        if math.isfinite(losses[-1]) and losses[-1] < losses[best]:
            best, kept = len(losses) - 1, copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)
    network.train(mode)
    return Course(tuple(losses), best)


def _log_odds(network: nn.Module, features: Tensor) -> Tensor:
    """Log-odds [n] in evaluation mode, without gradients."""
    import torch

    mode = network.training
    network.eval()
    with torch.no_grad():
        said: Tensor = network(features).reshape(len(features))
    network.train(mode)
    return said


def _arrays(predicted: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape or not len(p) or np.isnan(p).any():
        raise ValueError(f"predictions and outcomes must be [n], n > 0, without NaN; got {p.shape} and {y.shape}")
    return p, y

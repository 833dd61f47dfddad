"""Learning a deferral rule from answers of both models and their quality."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nextoken.model.base import LanguageModel
from nextoken.model.sarsa import FitStep
from nextoken.route.confidence import Answer, Floats
from nextoken.route.post_hoc import DeferralNetwork, Features, PostHoc


def fit_post_hoc(
    answers: Sequence[Answer],
    *,
    small: Sequence[float] | Floats,
    large: Sequence[float] | Floats,
    model: LanguageModel,
    features: Features | None = None,
    width: int = 64,
    steps: int = 600,
    batch: int = 128,
    rate: float = 1e-3,
    weight_decay: float = 1e-2,
    held_out: float = 0.2,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> PostHoc:
    """Minimise the mean of (g(phi) - (q_L - q_S))^2, whose minimum is E[q_L - q_S | phi], and keep the best weights.

    The squared error serves qualities of 0 and 1 as well as others. A share of the answers is held out, and the weights
    that do best on it, looked at 40 times, are kept; so the same data may not also test the rule.

    Args:
        answers: of the small model, some dozens at least.
        small, large: quality [N] of the small and of the large model's answer to the same, from 0 to 1.
        model: the small one; the rule is bound to it.
        features: see `Features`; quantiles at 11 levels by default.
        width, steps, batch, rate, weight_decay: of the network, and of AdamW, whose rate falls to 0 as a cosine. The
            paper tells the five layers only.
        held_out: the share of the answers by which the weights are chosen.
        seed: of the first weights, of the answers held out and of the batches.
        on_step: called after each step.

    Raises:
        ValueError: lengths differ, there are too few answers, or a setting is out of range.
    """
    phi = features or Features()
    own, other = (np.asarray(values, dtype=np.float64) for values in (small, large))
    if own.shape != (len(answers),) or other.shape != (len(answers),):
        raise ValueError(f"{len(answers)} answers need as many qualities, got {own.shape} and {other.shape}")
    if not np.isfinite(own).all() or not np.isfinite(other).all():
        raise ValueError("qualities must be finite numbers")
    if not 0 < held_out < 1 or steps < 1 or batch < 1 or width < 1 or rate <= 0:
        raise ValueError("held_out must be between 0 and 1, rate above 0 and steps, batch and width at least 1")
    kept_apart = round(held_out * len(answers))
    if min(kept_apart, len(answers) - kept_apart) < 2:
        raise ValueError(f"{len(answers)} answers are too few to learn from and to hold {held_out:.0%} out; give more")
    inputs = torch.from_numpy(phi.of(answers))
    targets = torch.from_numpy(other - own).float()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(answers), generator=generator)
    apart, learnt = order[:kept_apart], order[kept_apart:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DeferralNetwork(inputs.shape[1], width=width)
    network.shift.copy_(inputs[learnt].mean(0))
    network.scale.copy_(inputs[learnt].std(0, correction=0).clamp(min=1e-6))
    _descend(network, inputs, targets, learnt, apart, steps, batch, rate, weight_decay, generator, on_step)
    return PostHoc(network, phi, model_digest=model.digest, vocab_digest=model.vocab.digest)


def _descend(
    network: DeferralNetwork,
    inputs: Tensor,
    targets: Tensor,
    learnt: Tensor,
    apart: Tensor,
    steps: int,
    batch: int,
    rate: float,
    weight_decay: float,
    generator: torch.Generator,
    on_step: Callable[[FitStep], object] | None,
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    least, best = float("inf"), copy.deepcopy(network.state_dict())
    every = max(1, steps // 40)
    for step in range(1, steps + 1):
        chosen = learnt[torch.randint(len(learnt), (batch,), generator=generator)]
        loss = F.mse_loss(network(inputs[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            with torch.no_grad():
                missed = float(F.mse_loss(network(inputs[apart]), targets[apart]))
            if missed < least:
                least, best = missed, copy.deepcopy(network.state_dict())
        if on_step is not None:
            on_step(FitStep(step, steps, loss.item()))
    network.load_state_dict(best)

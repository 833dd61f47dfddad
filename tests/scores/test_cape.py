"""CaPE: its targets by hand, its limits, and that it helps where labels are noisy."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nextoken.scores.cape import Schedule, binned_targets, cape, early_stopping, kernel_targets

ITEMS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=1, max_size=14)


def columns(items: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    predicted, outcome = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    return predicted / 10, outcome


@pytest.mark.paper("2111.10734")
@given(ITEMS, st.integers(1, 20))
def test_binned_targets_are_means_of_bins(items: list[tuple[int, int]], bins: int) -> None:
    predicted, outcome = columns(items)
    order = sorted(range(len(items)), key=lambda i: predicted[i])
    expected = np.empty(len(items))
    for b in range(bins):
        own = order[b * len(items) // bins : (b + 1) * len(items) // bins]
        if own:
            expected[own] = np.mean(outcome[own])
    found = binned_targets(predicted, outcome, bins=bins)
    assert found == pytest.approx(expected) and found.mean() == pytest.approx(outcome.mean())


@pytest.mark.paper("2111.10734")
@given(ITEMS, st.floats(0.01, 2), st.integers(0, 20))
def test_kernel_targets_are_weighted_means_of_neighbours(
    items: list[tuple[int, int]], sigma: float, window: int
) -> None:
    predicted, outcome = columns(items)
    order = sorted(range(len(items)), key=lambda i: predicted[i])
    expected = np.empty(len(items))
    for rank, i in enumerate(order):
        near = order[max(0, rank - window) : rank + window + 1]
        weights = np.exp(-((predicted[near] - predicted[i]) ** 2) / (2 * sigma**2))
        expected[i] = weights @ outcome[near] / weights.sum()
    assert kernel_targets(predicted, outcome, sigma=sigma, window=window) == pytest.approx(expected)


@given(ITEMS)
def test_targets_at_their_ends(items: list[tuple[int, int]]) -> None:
    predicted, outcome = columns(items)
    n, base = len(items), np.full(len(items), outcome.mean())
    assert binned_targets(predicted, outcome, bins=1) == pytest.approx(base)
    assert (binned_targets(predicted, outcome, bins=n) == outcome).all()
    assert kernel_targets(predicted, outcome, sigma=np.inf, window=n) == pytest.approx(base)
    assert kernel_targets(predicted, outcome, window=0) == pytest.approx(outcome)


def test_targets_of_a_perfect_model_are_its_predictions() -> None:
    """Within 4 standard errors of bins of 1,000 in each of 20: a false alarm has probability 1.3e-3."""
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    gap = binned_targets(p, (rng.random(20_000) < p).astype(float), bins=20)
    means = binned_targets(p, p, bins=20)
    assert (np.abs(gap - means) < 4 * np.sqrt(np.maximum(means * (1 - means), 1e-3) / 1000)).all()


def network(seed: int, width: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 1))


def noisy(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, 20], outcomes, and their true probabilities, in five steps along a direction."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 20, generator=generator)
    z = torch.special.ndtr(x[:, :4].sum(1) / 2)
    p = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])[(z * 5).long().clamp(max=4)]
    return x, (torch.rand(n, generator=generator) < p).float(), p


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_with_a_bin_for_each_item_it_is_ordinary_training() -> None:
    x, y, _ = noisy(64, 1)
    held = noisy(64, 2)[:2]
    schedule = Schedule(epochs=6, rate=0.05, batch=16)
    one, other = network(0), network(0)
    first = early_stopping(one, x, y, validation=held, schedule=schedule)
    second = cape(other, x, y, validation=held, targets=partial(binned_targets, bins=64), schedule=schedule)
    assert first == second and torch.equal(weights_of(one), weights_of(other))
    third = cape(network(0), x, y, validation=held, targets=partial(binned_targets, bins=1), schedule=schedule)
    assert third.losses[1] != first.losses[1]


def test_every_third_epoch_asks_for_targets_of_what_the_network_says_then() -> None:
    x, y, _ = noisy(50, 3)
    asked: list[np.ndarray] = []

    def targets(predicted: np.ndarray, outcome: np.ndarray) -> np.ndarray:
        assert (outcome == y.numpy()).all()
        asked.append(predicted)
        return binned_targets(predicted, outcome)

    model = nn.Sequential(nn.Dropout(0.5), network(4))
    start = torch.sigmoid(model.eval()(x))[:, 0].detach().numpy()
    model.train()
    cape(model, x, y, validation=noisy(50, 5)[:2], targets=targets, ordinary=2, schedule=Schedule(epochs=7, rate=0.1))
    assert len(asked) == 3 and model.training
    assert asked[0] == pytest.approx(start) and np.abs(asked[1] - start).max() > 1e-3


def test_the_weights_of_least_validation_loss_are_kept() -> None:
    x, y, _ = noisy(100, 6)
    held = noisy(400, 7)[:2]
    model = network(1)
    course = early_stopping(model, x, y, validation=held, schedule=Schedule(epochs=40, rate=0.2))
    loss = nn.functional.binary_cross_entropy_with_logits(model(held[0])[:, 0], held[1]).item()
    assert loss == pytest.approx(min(course.losses)) and course.losses[course.best] == min(course.losses)
    assert 0 < course.best < 40 and course.losses[-1] > loss + 0.05
    before = weights_of(model)
    worse = cape(model, x, 1 - y, validation=held, schedule=Schedule(epochs=3, rate=0.5))
    assert worse.best == 0 and torch.equal(weights_of(model), before)


@pytest.mark.paper("2111.10734")
def test_it_memorises_labels_less_than_ordinary_training() -> None:
    """From one early-stopped network, at one rate: in each of 3 runs the loss on fresh items ends a good deal lower."""
    for seed in range(3):
        x, y, _ = noisy(400, 10 + seed)
        held = noisy(400, 30 + seed)[:2]
        start = network(seed, 128)
        early_stopping(start, x, y, validation=held, schedule=Schedule(epochs=12, rate=0.05, seed=seed))
        schedule = Schedule(epochs=40, rate=0.1, batch=128, patience=1000, seed=seed)
        ordinary = early_stopping(copy.deepcopy(start), x, y, validation=held, schedule=schedule)
        taught = cape(copy.deepcopy(start), x, y, validation=held, ordinary=1, schedule=schedule)
        assert taught.losses[0] == ordinary.losses[0] == min(ordinary.losses[0], *ordinary.losses[-5:])
        assert taught.losses[-1] - taught.losses[0] < 0.8 * (ordinary.losses[-1] - ordinary.losses[0])


def test_misuse_is_refused() -> None:
    x, y, _ = noisy(10, 8)
    with pytest.raises(ValueError, match="bins"):
        binned_targets(np.array([0.5]), np.array([1.0]), bins=0)
    with pytest.raises(ValueError, match="sigma"):
        kernel_targets(np.array([0.5]), np.array([1.0]), sigma=0.0)
    with pytest.raises(ValueError, match="NaN"):
        binned_targets(np.array([np.nan]), np.array([1.0]))
    with pytest.raises(ValueError, match="ordinary"):
        cape(network(0), x, y, validation=(x, y), ordinary=-1)
    with pytest.raises(ValueError, match="0 or 1"):
        cape(network(0), x, y + 1, validation=(x, y))
    with pytest.raises(ValueError, match="features"):
        cape(network(0), x, y[:5], validation=(x, y))
    with pytest.raises(ValueError, match="schedule"):
        Schedule(rate=0.0)

"""Learned temperatures: the loss and its dual, the exact optimum, the network's formula and blind spots, training."""

from __future__ import annotations

import itertools
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.nn import functional as F

import nextoken
from nextoken.decode.generate import generate
from nextoken.decode.scaling import LogitBias, Temperature
from nextoken.decode.transform import Context
from nextoken.decode.truncation import TopK
from nextoken.errors import ModelError
from nextoken.model.table import TableModel
from nextoken.values._descent import Schedule
from nextoken.values.robust import entropy_at, equalising_temperature, robust_loss
from nextoken.values.temperature_fit import fit_temperature, neutral_radius
from nextoken.values.temperature_network import LearnedTemperature, TemperatureNetwork

LOW, HIGH = 0.2, 5.0
logit_lists = st.lists(st.floats(-6, 6), min_size=3, max_size=6)


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The loss


@given(values=logit_lists, tau=st.floats(0.2, 5.0), rho=st.floats(0.0, 3.0))
def test_the_loss_is_its_formula_and_scaled_cross_entropy(values: list[float], tau: float, rho: float) -> None:
    logits, size = tensor(values), len(values)
    for label in range(size):
        mean = math.fsum(math.exp((s - values[label]) / tau) for s in values) / size
        found = float(robust_loss(logits, torch.tensor(label), torch.tensor(tau, dtype=torch.float64), rho=rho))
        assert found == pytest.approx(tau * math.log(mean) + tau * rho, abs=1e-9)
        nats = float(F.cross_entropy(logits / tau, torch.tensor(label)))
        assert found == pytest.approx(tau * nats + tau * (rho - math.log(size)), abs=1e-9)
    # With tau held at 1 it is cross-entropy, but for a constant.
    at_one = robust_loss(logits.expand(size, -1), torch.arange(size), torch.ones(size), rho=rho)
    constant = at_one - F.cross_entropy(logits.expand(size, -1), torch.arange(size), reduction="none")
    assert constant.tolist() == pytest.approx([rho - math.log(size)] * size, abs=1e-9)


@pytest.mark.paper("2404.04575")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rho", [0.1, 0.5, 1.5])
def test_its_minimum_is_the_worst_case_within_the_radius(seed: int, rho: float) -> None:
    """min over tau >= tau_0 of F, less tau_0 rho, against a solver for the primal over the simplex."""
    rng, size, least = np.random.default_rng(seed), 3 + seed, 0.3
    s = rng.normal(size=size) * 2
    label = int(rng.integers(size))
    contrast = s - s[label]

    def divergence(q: np.ndarray) -> float:
        return float(np.sum(q * np.log(np.clip(q, 1e-300, None) * size)))

    best = minimize(
        lambda q: -(q @ contrast - least * divergence(q)),
        np.full(size, 1 / size),
        bounds=[(1e-12, 1)] * size,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: rho - divergence(q)},
        ],
        options={"maxiter": 1000, "ftol": 1e-13},
    )
    tau = equalising_temperature(torch.tensor(s), rho=rho, low=least, high=1e3)
    dual = float(robust_loss(torch.tensor(s), torch.tensor(label), tau, rho=rho)) - least * rho
    assert dual == pytest.approx(-best.fun, abs=1e-5)


@pytest.mark.paper("2404.04575")
@given(values=logit_lists, rho=st.floats(0.0, 2.0))
def test_the_optimum_equalises_entropy_and_knows_no_label(values: list[float], rho: float) -> None:
    logits = tensor(values)
    tau = equalising_temperature(logits, rho=rho, low=LOW, high=HIGH)
    grid = torch.linspace(math.log(LOW), math.log(HIGH), 400, dtype=torch.float64).exp()
    for label in range(len(values)):
        at = robust_loss(logits.expand(400, -1), torch.full((400,), label), grid, rho=rho)
        assert float(robust_loss(logits, torch.tensor(label), tau, rho=rho)) <= float(at.min()) + 1e-9
    wanted, reached = math.log(len(values)) - rho, float(entropy_at(logits, tau))
    low, high = (float(entropy_at(logits, torch.tensor(t, dtype=torch.float64))) for t in (LOW, HIGH))
    assert reached == pytest.approx(min(max(wanted, low), high), abs=1e-6)


@given(values=logit_lists, scale=st.floats(0.5, 2.0))
def test_the_surer_a_distribution_the_warmer_its_optimum(values: list[float], scale: float) -> None:
    """SIGN: logits twice as far apart are divided by twice as much, so that entropy and tau fall together, not rise."""
    logits = tensor(values)
    if float(logits.max() - logits.min()) < 0.5:
        return
    one = equalising_temperature(logits, rho=0.3, low=1e-3, high=1e3)
    other = equalising_temperature(logits * scale, rho=0.3, low=1e-3, high=1e3)
    if 2e-3 < float(one) < 400:
        assert float(other / one) == pytest.approx(scale, rel=1e-5)


def test_the_radius_moves_temperatures_from_end_to_end() -> None:
    logits = torch.randn(20, 8, dtype=torch.float64)
    taus = [equalising_temperature(logits, rho=rho, low=LOW, high=HIGH) for rho in (0.0, 0.1, 0.5, 1.0, 2.0, 3.0)]
    assert all(bool((a >= b - 1e-9).all()) for a, b in itertools.pairwise(taus))
    # No radius: as flat as may be. One of log V or more: as sharp as may be.
    assert bool((taus[0] == HIGH).all()) and bool((taus[-1] == LOW).all())
    neutral = math.log(8) - float(entropy_at(logits[0], torch.tensor(1.0, dtype=torch.float64)))
    assert float(equalising_temperature(logits[0], rho=neutral, low=LOW, high=HIGH)) == pytest.approx(1, abs=1e-6)


def test_a_free_temperature_descends_to_the_optimum() -> None:
    logits = torch.randn(30, 9, dtype=torch.float64) * 2
    labels, raw = torch.randint(9, (30,)), torch.zeros(30, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(800):
        loss = robust_loss(logits, labels, LOW + (HIGH - LOW) * torch.sigmoid(raw), rho=0.6).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reached = (LOW + (HIGH - LOW) * torch.sigmoid(raw)).detach()
    wanted = equalising_temperature(logits, rho=0.6, low=LOW, high=HIGH)
    inside = (wanted > LOW) & (wanted < HIGH)
    assert int(inside.sum()) > 20 and reached[inside].tolist() == pytest.approx(wanted[inside].tolist(), rel=1e-3)


# The network


def network(seed: int = 0, **settings: object) -> TemperatureNetwork:
    torch.manual_seed(seed)
    made = TemperatureNetwork(12, **({"width": 6, "low": 0.3, "high": 3.0} | settings))  # type: ignore[arg-type]
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    return made.eval()


@pytest.mark.parametrize("shift", ["max", "mean"])
def test_the_network_is_its_formula(shift: str) -> None:
    net, logits = network(shift=shift), torch.randn(5, 12) * 3
    w = {key: value.detach().numpy().astype(float) for key, value in net.state_dict().items()}
    for row, said in zip(logits.numpy().astype(float), net(logits).tolist(), strict=True):
        x = row - (row.max() if shift == "max" else row.mean())
        x = x / np.sqrt((x**2).sum())
        h = w["outer.weight"] @ (1 / (1 + np.exp(-(w["inner.weight"] @ x + w["inner.bias"])))) + w["outer.bias"]
        scaled = h / np.exp(w["log_scale"])
        a = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
        g = (w["weights"] * (a - 1 / 6) * h).sum() + w["bias"]
        assert said == pytest.approx(0.3 + 2.7 / (1 + math.exp(-g)), abs=1e-5)


def test_it_begins_as_the_paper_says() -> None:
    net = TemperatureNetwork(12)
    assert net.width == 256 and bool((net.weights == 1).all())
    assert (net.bias.item(), net.log_scale.item(), net.dropout) == (0, 0, 0.5)


@given(shift=st.sampled_from(["max", "mean"]), constant=st.floats(-20, 20), scale=st.floats(0.2, 4.0))
def test_it_knows_neither_constant_nor_scale(shift: str, constant: float, scale: float) -> None:
    net, logits = network(shift=shift), torch.linspace(-3, 2, 24).reshape(2, 12).sin() * 4
    assert net(logits * scale + constant).tolist() == pytest.approx(net(logits).tolist(), abs=1e-4)


def test_rows_that_fill_up_are_left_out() -> None:
    net = network(true_size=9)
    one = torch.randn(3, 12)
    other = torch.cat([one[:, :9], torch.full((3, 3), -math.inf)], 1)
    assert torch.equal(net(one), net(other))
    scores = LearnedTemperature(net, 1.0)(other, Context())
    assert torch.equal(scores[:, 9:], other[:, 9:]) and not torch.equal(scores[:, :9], one[:, :9])


def test_one_bound_is_plain_temperature_whatever_the_mode() -> None:
    logits = torch.randn(4, 12)
    for t in (0.7, 1.0):
        learned = LearnedTemperature(network(low=t, high=t), 1.0)
        assert torch.allclose(learned(logits, Context()), Temperature(t)(logits, Context()))
    net = network(dropout=0.9).train()
    learned = LearnedTemperature(net, 1.0)
    assert torch.equal(learned.temperatures(logits), learned.temperatures(logits)) and net.training


def test_it_comes_first_in_a_chain() -> None:
    learned, logits = LearnedTemperature(network(), 1.0), torch.randn(2, 12)
    after = (learned | TopK(3))(logits, Context())
    assert after.isfinite().sum(-1).tolist() == [3, 3]
    for before in (TopK(3), LogitBias({3: -math.inf})):
        with pytest.raises(ValueError, match="put it first in the chain"):
            (before | learned)(logits, Context())
    with pytest.raises(ValueError, match="12 tokens, got 13"):
        learned(torch.randn(2, 13), Context())


# Training


@cache
def table() -> TableModel:
    """Contexts of very different certainty; its begin token, the last id, is never drawn and left out of V."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 9, dtype=torch.float64, generator=generator) * torch.linspace(0.2, 5, 9)[:, None]
    logits[:, 8] = -math.inf
    return TableModel(logits.softmax(-1), list("abcdefgh"))


@cache
def texts() -> list[str]:
    made = generate(table(), [""], n=60, max_tokens=40, seed=1)
    assert isinstance(made, list)
    return [one.text for one in made]


QUICK = Schedule(epochs=300, batch=60, rate=3e-2, weight_decay=0.0)


@pytest.mark.paper("2404.04575")
def test_training_beats_the_best_constant_and_comes_near_to_the_optimum() -> None:
    """Few contexts and room enough: most of what can be gained on the best constant is."""
    model = table()
    learned = fit_temperature(
        model, texts(), true_size=8, low=LOW, high=HIGH, width=32, dropout=0.0, schedule=QUICK, seed=0
    )
    fresh = generate(table(), [""], n=20, max_tokens=40, seed=9)
    rows = torch.cat([model.predict([[8, *one.tokens[:-1]]]).logits()[0, :, :8] for one in fresh])  # type: ignore[union-attr]
    labels = torch.tensor([token for one in fresh for token in one.tokens])  # type: ignore[union-attr]
    tau = learned.temperatures(torch.cat([rows, rows[:, :1]], 1)).double()

    def loss(temperatures: torch.Tensor) -> float:
        return float(robust_loss(rows, labels, temperatures.expand(len(rows)), rho=learned.rho).mean())

    constants = [loss(torch.tensor(t, dtype=torch.float64)) for t in np.geomspace(LOW, HIGH, 60)]
    best = equalising_temperature(rows, rho=learned.rho, low=LOW, high=HIGH)
    assert loss(best) < loss(tau) < min(constants)
    assert min(constants) - loss(tau) > 0.75 * (min(constants) - loss(best))
    # Cheat: a constant. And the sign, as it comes out where the network can tell contexts apart.
    assert float(tau.std()) > 0.2
    entropy = entropy_at(rows, torch.ones(len(rows), dtype=torch.float64))
    assert np.corrcoef(tau, entropy)[0, 1] < -0.5
    # Entropies after it lie closer together, around log V - rho.
    after = entropy_at(rows, tau)
    assert float(after.std()) < 0.5 * float(entropy.std())
    assert float(after.mean()) == pytest.approx(math.log(8) - learned.rho, abs=0.25)


def test_the_neutral_radius_makes_1_the_best_constant() -> None:
    model = table()
    rho = neutral_radius(model, texts(), true_size=8)
    rows = [[8, *model.vocab.encode(text).ids] for text in texts()]
    logits = torch.cat([model.predict([row[:-1]]).logits()[0, :, :8] for row in rows])
    labels = torch.tensor([token for row in rows for token in row[1:]])
    grid = torch.linspace(0.7, 1.4, 141, dtype=torch.float64)
    losses = [float(robust_loss(logits, labels, t.expand(len(labels)), rho=rho).mean()) for t in grid]
    assert float(grid[int(np.argmin(losses))]) == pytest.approx(1.0, abs=0.006)


@pytest.mark.parametrize(("rho", "end"), [(4.0, LOW), (0.0, HIGH)])
def test_a_radius_out_of_range_collapses_to_a_bound(rho: float, end: float) -> None:
    learned = fit_temperature(
        table(), texts(), rho=rho, true_size=8, low=LOW, high=HIGH, width=8, dropout=0.0, schedule=QUICK, seed=0
    )
    assert learned.temperatures(table().predict([[8, 0, 1]]).logits()[0]).tolist() == pytest.approx([end] * 3, abs=0.35)


def test_equal_seeds_give_equal_networks_and_the_model_is_untouched() -> None:
    model, steps = nextoken.load("nano"), []
    before, some = model.digest, ["It was the best of times.", "Call me Ishmael, some years ago."]
    schedule = Schedule(epochs=2, batch=1)
    one = fit_temperature(model, some, width=8, schedule=schedule, seed=3, on_step=steps.append)
    other = fit_temperature(model, some, width=8, schedule=schedule, seed=3)
    third = fit_temperature(model, some, width=8, schedule=schedule, seed=4)
    assert one.network.digest == other.network.digest != third.network.digest
    assert model.digest == before == one.model and [step.step for step in steps] == [1, 2, 3, 4]
    drawn = [generate(model, "It was", transform=one | TopK(9), max_tokens=6, seed=1).tokens for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = table()
    learned = LearnedTemperature(TemperatureNetwork(9, width=4, shift="mean", true_size=8), 0.7, model.digest)
    learned.save(tmp_path)
    again, logits = LearnedTemperature.load(tmp_path, model), torch.randn(3, 9)
    assert torch.equal(again.temperatures(logits), learned.temperatures(logits))
    assert (again.network.settings, again.rho) == (learned.network.settings, 0.7) and again.network.shift == "mean"
    with pytest.raises(ModelError, match="trained with another model"):
        LearnedTemperature.load(tmp_path, TableModel.random(8))
    with pytest.raises(ModelError, match=r"holds no temperature_network\.json"):
        LearnedTemperature.load(tmp_path / "nowhere", model)
    path = tmp_path / "temperature_network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "x"}))
    with pytest.raises(ModelError, match="not those it was saved with"):
        LearnedTemperature.load(tmp_path, model)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="0 < low <= high"):
        TemperatureNetwork(9, low=2.0, high=1.0)
    with pytest.raises(ValueError, match="true_size"):
        TemperatureNetwork(9, true_size=10)
    with pytest.raises(ValueError, match="has a token to predict"):
        fit_temperature(table(), [], true_size=8)
    with pytest.raises(ValueError, match="makes some tokens impossible"):
        fit_temperature(table(), texts())
    with pytest.raises(ValueError, match="rho must be"):
        fit_temperature(table(), texts(), true_size=8, rho=-1.0)

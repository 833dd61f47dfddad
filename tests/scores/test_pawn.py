"""PAWN: its metrics against whole distributions, its network against a loop in numpy, and what decides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.model.table import TableModel
from nextoken.scores._networks.pawn import PawnNetwork
from nextoken.scores.feature_cache import Features, Source
from nextoken.scores.learned import Recipe
from nextoken.scores.pawn import Pawn, pawn_features
from nextoken.scores.quality import auroc

TEXTS = ["It was the best of times, it was the worst of times.", "Call me Ishmael.", "", "I"]
SMALL: dict[str, Any] = {"width": 16, "channels": 8, "gates": 8, "blocks": 1}


@pytest.fixture(scope="module")
def nano() -> Any:
    return nextoken.load("nano")


def test_metrics_are_those_of_the_whole_distribution(nano: Any) -> None:
    signature = nextoken.read(nano, TEXTS, hidden=True, top=0)
    found = pawn_features(signature)
    row = 0
    for text in TEXTS:
        ids = [nano.vocab.bos_id, *nano.vocab.encode(text).ids]
        following = nano.predict([ids])
        logs = following.log_probs()[0].double()
        for place, token in enumerate(ids[1:]):
            p = logs[place].exp()
            at_least = logs[place] >= logs[place, token]
            expected = [
                -(p * logs[place]).sum().item(),
                logs[place].max().item(),
                logs[place, token].item(),
                at_least.sum().item() / nano.vocab.size,
                p[at_least].sum().item(),
            ]
            metrics = found.values["metrics"][row]
            assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert metrics[1] >= metrics[2] - 1e-6 and metrics[4] >= math.exp(metrics[2]) - 1e-6
            assert (metrics[3] * nano.vocab.size == pytest.approx(1)) == (logs[place].argmax().item() == token)
            assert found.values["hidden"][row] == pytest.approx(following.hidden[0, place].numpy(), abs=1e-4)
            row += 1
    assert row == len(signature) == found.offsets[-1]


def test_impossible_tokens_are_finite() -> None:
    holes = TableModel.given({(): [0.5, 0.5, 0.0]}, "abc")
    signature = nextoken.read(holes, ["cab"], top=2)
    with pytest.raises(ValueError, match="hidden=True"):
        pawn_features(signature)
    import pyarrow as pa

    hidden = pa.FixedSizeListArray.from_arrays(pa.array([0.0] * 6, pa.float32()), 2)
    table = signature.table.append_column(pa.field("hidden", hidden.type), hidden)
    from nextoken.signature.signature import Signature

    found = pawn_features(Signature(table, signature.metadata, signature.texts, signature.vocab_labels))
    assert np.isfinite(found.values["metrics"]).all()
    assert found.values["metrics"][0, 3:] == pytest.approx([3 / 4, 1.0])


def features(rows: list[int], *, size: int = 3, seed: int = 0) -> Features:
    """Random features of texts of these many rows."""
    rng = np.random.default_rng(seed)
    count = sum(rows)
    values = {
        "metrics": rng.normal(size=(count, 5)).astype(np.float32),
        "hidden": rng.normal(size=(count, size)).astype(np.float32),
    }
    return Features(values, np.cumsum([0, *rows]), Source("pawn", "made up", "d", "t", 9, "float32"), 513)


def fitted(texts: Features, **options: Any) -> tuple[Pawn, PawnNetwork]:
    """With random weights, those that begin as constants included: trained for no epoch."""
    labels = np.arange(len(texts)) % 2
    probe = Pawn(**SMALL | {"recipe": Recipe(0, 1.0, 0.0, 1, seed=4)} | options).fit(texts, labels)
    assert isinstance(probe.network, PawnNetwork)
    with torch.no_grad():
        for weight in probe.network.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return probe, probe.network


def perceptron(x: np.ndarray, w: dict[str, np.ndarray], name: str, blocks: int) -> np.ndarray:
    for block in range(blocks):
        at = f"{name}.{block}."
        y = w[at + "linear.weight"] @ x + w[at + "linear.bias"]
        y = (y - y.mean()) / math.sqrt(y.var() + 1e-5) * w[at + "norm.weight"] + w[at + "norm.bias"]
        y = np.array([0.5 * one * (1 + math.erf(one / math.sqrt(2))) for one in y])
        x = x + y if len(x) == len(y) else y
    return w[f"{name}.{blocks}.weight"] @ x + w[f"{name}.{blocks}.bias"]


def by_hand(probe: Pawn, texts: Features, number: int) -> float:
    """The log-odds of one text in float64, place by place and gate by gate."""
    assert probe.network is not None
    w = {name: tensor.double().numpy() for name, tensor in probe.network.state_dict().items()}
    begin, end = texts.offsets[number : number + 2]
    metrics, hidden = (texts.values[name][begin:end].astype(np.float64) for name in ("metrics", "hidden"))
    pairs = min(len(metrics) - 1, probe.length)
    gates, said = [], []
    for i in range(pairs):
        around = np.concatenate([hidden[i], hidden[i + 1], [i / probe.length]])
        gates.append(perceptron(around, w, "gate", probe.blocks))
        said.append(perceptron(metrics[i], w, "metric", probe.blocks))
    pooled = np.zeros(probe.channels)
    for channel in range(probe.channels):
        gate = channel // (probe.channels // probe.gates)
        total = sum(math.exp(gates[i][gate]) for i in range(pairs))
        pooled[channel] = sum(math.exp(gates[i][gate]) / total * said[i][channel] for i in range(pairs))
    return float(perceptron(pooled, w, "outer", probe.blocks)[0])


@pytest.mark.paper("2501.03940")
@pytest.mark.parametrize("options", [{}, {"blocks": 3, "length": 4}, {"gates": 2}, {"blocks": 0, "gates": 4}])
def test_network_is_its_formula(options: dict[str, Any]) -> None:
    texts = features([3, 2, 7, 12, 5])
    probe, _ = fitted(texts, **options)
    expected = [by_hand(probe, texts, number) for number in range(5)]
    assert len({round(value, 6) for value in expected}) == 5
    np.testing.assert_allclose(probe.decision_function(texts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.paper("2501.03940")
@pytest.mark.parametrize("size, parameters", [(768, 992_257), (2048, 1_647_617)])
def test_it_is_as_large_as_the_paper_says(size: int, parameters: int) -> None:
    probe = Pawn(recipe=Recipe(0, 1.0, 0.0, 1)).fit(features([2, 2], size=size), np.array([0, 1]))
    assert probe.network is not None
    assert sum(weight.numel() for weight in probe.network.parameters()) == parameters


@pytest.mark.paper("2501.03940")
def test_constant_gates_give_the_mean_log_likelihood() -> None:
    """One channel that is the third metric, one gate that says nothing: the mean over all rows but the last."""
    texts = features([2, 5, 9])
    probe, network = fitted(texts, blocks=0, channels=1, gates=1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
        network.metric[0].weight[0, 2] = 1
        network.outer[0].weight[0, 0] = 1
    rows = np.split(texts.values["metrics"][:, 2], texts.offsets[1:-1])
    np.testing.assert_allclose(probe.decision_function(texts), [row[:-1].mean() for row in rows], rtol=1e-5)


@pytest.mark.paper("2501.03940")
def test_states_weigh_and_say_nothing() -> None:
    """Where all metrics are equal, no hidden state moves the score: it is no classifier of topics."""
    texts = features([2, 5, 9, 4])
    texts.values["metrics"][:] = texts.values["metrics"][0]
    probe, _ = fitted(texts)
    assert np.ptp(probe.decision_function(texts)) < 1e-5
    moved = features([2, 5, 9, 4])
    assert np.ptp(probe.decision_function(moved)) > 1e-2


@given(st.lists(st.integers(0, 12), min_size=2, max_size=9))
@settings(max_examples=25)
def test_neighbours_change_nothing_and_weights_sum_to_one(rows: list[int]) -> None:
    texts = features(rows, seed=len(rows))
    probe, _ = fitted(features([4, 4]), length=10, gates=4)
    together = probe.decision_function(texts)
    alone = [probe.decision_function(texts[[number]])[0] for number in range(len(rows))]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.isnan(together), np.array(rows) < 2)
    for count, weights in zip(rows, probe.weights(texts), strict=True):
        assert weights.shape == (min(max(0, count - 1), 10), 8)
        if count > 1:
            np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-5)
            np.testing.assert_array_equal(weights[:, 0], weights[:, 1])


def test_token_dropout_is_of_training_only_and_leaves_a_place() -> None:
    texts = features([2, 3, 9])
    probe, network = fitted(texts, token_dropout=0.6)
    np.testing.assert_array_equal(probe.decision_function(texts), probe.decision_function(texts))
    there = torch.tensor([[True] * 4, [True, False, False, False]]).repeat(3000, 1)
    kept = network._thinned(there)
    assert bool(kept.any(1).all()) and not bool((kept & ~there).any())
    # Of four places, each kept with 0.4 given that one is: 0.4 / (1 - 0.6^4) = 0.4596; five deviations of 12,000.
    assert abs(kept[::2].double().mean().item() - 0.4 / (1 - 0.6**4)) < 5 * math.sqrt(0.25 / 12_000)
    network.train()
    values = {name: torch.from_numpy(array[None]) for name, array in texts[[2]].values.items()}
    assert bool((network.weights(values, torch.tensor([9])) == 0).any())


def flagged(count: int, seed: int) -> tuple[Features, np.ndarray]:
    """Of 12 places some are flagged in the state after them; there the log-probability tells the label, else noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    texts = features([13] * count, seed=seed)
    flag = (np.argsort(rng.random((count, 13)), axis=1) < 3).astype(np.float32)
    told = rng.normal(size=(count, 13)) * np.where(flag > 0, 0.5, 3.0) + flag * labels[:, None]
    texts.values["metrics"][:, 2] = told.ravel()
    texts.values["hidden"][:, 0] = np.roll(flag, 1, axis=1).ravel()
    return texts, labels


@pytest.mark.paper("2501.03940")
def test_it_finds_the_places_that_tell() -> None:
    recipe = Recipe(epochs=12, rate=5e-3, decay=1e-2, batch=16, clip=1.0)
    train, test = flagged(400, 1), flagged(400, 2)
    probe = Pawn(recipe=recipe, **SMALL).fit(*train)
    found = auroc(probe.decision_function(test[0]), test[1])
    means = test[0].values["metrics"].reshape(400, 13, 5)[:, :12].mean(1)
    best = max(abs(auroc(means[:, metric], test[1]) - 0.5) + 0.5 for metric in range(5))
    assert found > 0.85 > best + 0.15
    flags = test[0].values["hidden"].reshape(400, 13, 3)[:, 1:, 0] > 0
    weights = np.stack(probe.weights(test[0])).mean(2)
    assert weights[flags].mean() > 3 * weights[~flags].mean()


def test_misuse_is_refused() -> None:
    for wrong in ({"gates": 3}, {"gates": 0}, {"length": 0}, {"token_dropout": 1.0}, {"blocks": -1}):
        with pytest.raises(ValueError):
            Pawn(**wrong)
    with pytest.raises(ValueError, match="kind 'pawn', not 'los'"):
        other = features([3, 3])
        source = Source("los", *list(vars(other.source).values())[1:])
        Pawn(**SMALL).fit(Features(other.values, other.offsets, source, 9), np.array([0, 1]))

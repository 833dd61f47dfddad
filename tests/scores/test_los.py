"""LOS-Net: its features against loops over tables, its network against a loop in numpy, what it can and cannot see."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.decode.generate import generate
from nextoken.model.table import TableModel
from nextoken.scores.feature_cache import Features, Source
from nextoken.scores.learned import Recipe
from nextoken.scores.los import LosNet, los_features
from nextoken.scores.quality import auroc

P = TableModel.random(6, order=2, seed=1)
SYMBOLS = "abcdef"
SHORT = Recipe(epochs=30, rate=3e-3, decay=1e-3, batch=32, warm_up=0.1)
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "dropout": 0.0, "recipe": SHORT}


def table(rows: torch.Tensor) -> TableModel:
    return TableModel(rows, SYMBOLS)


def tempered(model: TableModel, power: float) -> TableModel:
    rows = (model._log_table * power).softmax(-1)
    return table(rows.reshape([model.vocab.size] * (model.order + 1)))


@pytest.mark.paper("2503.14043")
@given(st.lists(st.text(SYMBOLS, max_size=9), min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=25)
def test_features_are_counted_by_a_loop(texts: list[str], length: int) -> None:
    found = los_features(nextoken.read(P, texts, top=4), length=length)
    row = 0
    for text in texts:
        ids = P.vocab.encode(text).ids
        for place, token in enumerate(ids[:length]):
            logs = [value for value in P.row(ids[:place]).tolist() if value > -math.inf]
            mean = sum(logs) / len(logs)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in logs) / len(logs))
            z = sorted(((value - mean) / deviation for value in logs), reverse=True)
            rank = sum(value > logs[token] for value in logs)
            assert found.values["sorted"][row] == pytest.approx(z[:4], rel=1e-4, abs=1e-4)
            assert found.values["token"][row] == pytest.approx((logs[token] - mean) / deviation, rel=1e-4, abs=1e-4)
            assert found.values["rank"][row] == rank
            if rank < 4:
                assert found.values["sorted"][row, rank] == pytest.approx(found.values["token"][row], abs=1e-5)
            assert found.values["moments"][row] == pytest.approx([mean, deviation], rel=1e-4)
            row += 1
    assert row == found.offsets[-1]
    assert found.counts.tolist() == [min(len(text), length) for text in texts]


@pytest.mark.paper("2503.14043")
def test_names_of_tokens_do_not_matter() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2, 6])
    rows = P._log_table.exp().reshape(7, 7, 7)
    renamed = TableModel(rows[order][:, order][:, :, order], [SYMBOLS[i] for i in order[:6]])
    mine, others = (los_features(nextoken.read(model, ["abcfed", "ddde"], top=6)) for model in (P, renamed))
    for name, array in mine.values.items():
        np.testing.assert_allclose(array, others.values[name], rtol=1e-5, atol=1e-5)


def test_temperature_cannot_be_seen_without_moments() -> None:
    """All classifiers give AUROC 1/2 where the label is the temperature of the judge, and 1 with mu and sd."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(SYMBOLS), 8)) for _ in range(40)]
    cold = tempered(P, 3.0)
    plain, sharp = (los_features(nextoken.read(model, texts, top=6)) for model in (P, cold))
    for name in ("sorted", "token", "rank"):
        np.testing.assert_allclose(plain.values[name], sharp.values[name], rtol=1e-4, atol=1e-4)
    both = Features.concat([plain, Features(sharp.values, sharp.offsets, plain.source, sharp.length)])
    labels = np.repeat([0, 1], 40)
    blind = LosNet(**SMALL).fit(both, labels).decision_function(both)
    np.testing.assert_allclose(blind[:40], blind[40:], atol=1e-2)
    seeing = LosNet(moments=True, **SMALL).fit(both, labels).decision_function(both)
    assert auroc(seeing, labels) == 1


def test_impossible_tokens_and_uniform_rows_are_finite() -> None:
    holes = TableModel.given({(): [0.5, 0.5, 0, 0], (0,): [0.25] * 4, (1,): [0.1, 0.2, 0.3, 0.4]}, "abcd")
    found = los_features(nextoken.read(holes, ["cab"], top=5))
    assert all(np.isfinite(array).all() for array in found.values.values())
    assert found.values["token"][0] == -2  # impossible: -sqrt(5 - 1)
    uniform = found.values["sorted"][2]
    assert uniform[:4].tolist() == [0, 0, 0, 0] and uniform[4] == -2 and found.values["token"][2] == 0


def features(rows: list[int], *, top: int = 5, size: int = 9, seed: int = 0) -> Features:
    """Random features of texts of these many rows."""
    rng = np.random.default_rng(seed)
    count = sum(rows)
    values = {
        "sorted": -np.sort(-rng.normal(size=(count, top))).astype(np.float32),
        "token": rng.normal(size=count).astype(np.float32),
        "rank": rng.integers(0, size, count).astype(np.int32),
        "moments": rng.normal(size=(count, 2)).astype(np.float32),
    }
    return Features(values, np.cumsum([0, *rows]), Source("los", "made up", "d", "t", size, "float32"), 100)


def fitted(given_: Features, **options: Any) -> LosNet:
    """With random weights: trained for no epoch."""
    labels = np.arange(len(given_)) % 2
    return LosNet(**{"width": 8, "heads": 2, "recipe": Recipe(0, 1.0, 0.0, 1, seed=4)} | options).fit(given_, labels)


def normal(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * weight + bias


def by_hand(probe: LosNet, texts: Features, number: int) -> float:
    """The log-odds of one text in float64, place by place and head by head."""
    assert probe.network is not None
    w = {name: tensor.double().numpy() for name, tensor in probe.network.state_dict().items()}
    begin, end = texts.offsets[number : number + 2]
    steps = [*range(begin, min(end, begin + probe.length))]
    top = probe._sizes["top"]
    tokens = []
    for row in steps + [None] * (0 if probe.masked else probe.length - len(steps)):
        a = 0.0 if row is None else float(texts.values["token"][row])
        r = 0 if row is None else int(texts.values["rank"][row])
        ranked = a * w["rank.weight"][r] if probe.ranks == "embedding" else a * 2 * (0.5 - r / 9) * w["rank"]
        channels = np.zeros(top) if row is None else texts.values["sorted"][row, :top]
        if probe.moments:
            channels = np.append(channels, np.zeros(2) if row is None else texts.values["moments"][row])
        inner = w["inner.weight"] @ channels + w["inner.bias"] if len(channels) else np.zeros(0)
        tokens.append(np.concatenate([inner, ranked + a * w["token"]]))
    x = [x + w["position.weight"][place] for place, x in enumerate([w["first"], *tokens])]
    for layer in range(probe.layers):
        v = {k.removeprefix(f"layers.{layer}."): t for k, t in w.items() if k.startswith(f"layers.{layer}.")}
        projected = [v["self_attn.in_proj_weight"] @ one + v["self_attn.in_proj_bias"] for one in x]
        size, width = probe.width // probe.heads, probe.width
        after = []
        for mine, own in zip(projected, x, strict=True):
            heads = []
            for head in range(probe.heads):
                part = slice(head * size, (head + 1) * size)
                logits = [mine[:width][part] @ other[width : 2 * width][part] / math.sqrt(size) for other in projected]
                share = np.exp(np.array(logits) - max(logits))
                heads.append(sum(s * o[2 * width :][part] for s, o in zip(share / share.sum(), projected, strict=True)))
            attended = v["self_attn.out_proj.weight"] @ np.concatenate(heads) + v["self_attn.out_proj.bias"]
            one = normal(own + attended, v["norm1.weight"], v["norm1.bias"])
            inside = np.maximum(v["linear1.weight"] @ one + v["linear1.bias"], 0)
            fed = v["linear2.weight"] @ inside + v["linear2.bias"]
            after.append(normal(one + fed, v["norm2.weight"], v["norm2.bias"]))
        x = after
    pooled = x[0] if probe.pool == "cls" else np.mean(x, axis=0)
    return float(w["outer.weight"][0] @ pooled + w["outer.bias"][0])


@pytest.mark.paper("2503.14043")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": 2, "masked": False},
        {"pool": "mean", "top": 3},
        {"pool": "mean", "masked": False},
        {"ranks": "embedding", "moments": True},
        {"top": 0},
        {"layers": 0, "pool": "mean"},
    ],
)
def test_network_is_its_formula(options: dict[str, Any]) -> None:
    texts = features([3, 1, 7, 12, 5])
    probe = fitted(texts, length=8, **options)
    expected = [by_hand(probe, texts, number) for number in range(5)]
    assert len({round(value, 6) for value in expected}) == 5
    np.testing.assert_allclose(probe.decision_function(texts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.paper("2503.14043")
def test_one_row_without_layers_is_logistic_regression() -> None:
    """On (S_1, a, a e), the constants of place and CLS set to 0, and half of it because CLS is one of two places."""
    texts = features([1, 1, 1], top=1)
    probe = fitted(texts, layers=0, pool="mean", length=1)
    assert probe.network is not None
    with torch.no_grad():
        probe.network.first.zero_()
        probe.network.position.weight.zero_()
    w = {name: tensor.double().numpy() for name, tensor in probe.network.state_dict().items()}
    u = w["outer.weight"][0] / 2
    slopes = [u[:4] @ w["inner.weight"][:, 0], u[4:] @ w["token"], u[4:] @ w["rank"]]
    a, e = texts.values["token"], 1 - 2 * texts.values["rank"] / 9
    seen = np.stack([texts.values["sorted"][:, 0], a, a * e], 1)
    expected = seen @ slopes + u[:4] @ w["inner.bias"] + w["outer.bias"][0]
    np.testing.assert_allclose(probe.decision_function(texts), expected, rtol=1e-5, atol=1e-6)


def test_without_layers_the_first_place_sees_nothing() -> None:
    texts = features([2, 5, 9])
    assert len({*fitted(texts, layers=0).decision_function(texts).tolist()}) == 1


@given(st.lists(st.integers(0, 12), min_size=2, max_size=9))
@settings(max_examples=25)
def test_neighbours_and_padding_change_nothing(rows: list[int]) -> None:
    texts = features(rows, seed=len(rows))
    whole = features([4, 4])
    for masked in (True, False):
        probe = fitted(whole, masked=masked, length=15)
        together = probe.decision_function(texts)
        alone = [probe.decision_function(texts[[number]])[0] for number in range(len(rows))]
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.isnan(together), np.array(rows) == 0)


def test_unmasked_padding_tells_the_length_and_masked_does_not() -> None:
    """Of rows that are all alike, one or many, attention without places sees the same thing if padding is hidden."""
    texts = features([1, 6, 20])
    for name, array in texts.values.items():
        texts.values[name][:] = array[0]
    for masked in (True, False):
        probe = fitted(features([4, 4]), masked=masked, length=25)
        assert probe.network is not None
        with torch.no_grad():
            probe.network.position.weight.zero_()
            probe.network.first.copy_(torch.cat([*probe.network._tokens(_tensors(texts))[:, :1]])[0])
        spread = np.ptp(probe.decision_function(texts))
        assert (spread < 1e-5) == masked


def _tensors(texts: Features) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array[None]) for name, array in texts.values.items()}


@pytest.mark.paper("2503.14043")
def test_runner_up_is_seen_by_the_whole_and_not_by_what_came() -> None:
    """The label moves the second log-probability only: the ablation without S has AUROC 1/2 (alarm of 1e-4: 0.11)."""
    rng = np.random.default_rng(3)

    def drawn(count: int, seed: int) -> tuple[Features, np.ndarray]:
        labels = np.arange(count) % 2
        texts = features([6] * count, seed=seed)
        texts.values["sorted"][:, 1] = rng.normal(0.8 * np.repeat(labels, 6), 1.0)
        return texts, labels

    train, test = drawn(200, 1), drawn(400, 2)
    whole = LosNet(**SMALL).fit(*train).decision_function(test[0])
    blind = LosNet(top=0, **SMALL).fit(*train).decision_function(test[0])
    assert auroc(whole, test[1]) > 0.78
    assert abs(auroc(blind, test[1]) - 0.5) < 0.11


def texts_of(model: TableModel, count: int, seed: int) -> list[str]:
    made = generate(model, [""], n=count, max_tokens=14, seed=seed, ignore_eos=True)
    assert isinstance(made, list)
    return [one.text for one in made]


@pytest.mark.paper("2503.14043")
def test_it_learns_who_wrote_a_text() -> None:
    """Texts of the judge itself and of another table; chance has a deviation of 0.04 over 240 texts."""
    other = TableModel.random(6, order=2, seed=2, concentration=2.0)
    labels = np.repeat([0, 1], 120)
    sides = [texts_of(P, 120, seed) + texts_of(other, 120, seed) for seed in (1, 2)]
    train, test = (nextoken.read(P, texts, top=6) for texts in sides)
    probe = LosNet(**SMALL).fit(train, labels)
    found = probe.decision_function(test)
    assert auroc(found, labels) > 0.8
    assert auroc(found, labels) > auroc(-nextoken.score(test, "mean_logprob"), labels) - 0.05
    shuffled = LosNet(**SMALL).fit(train, np.random.default_rng(0).permutation(labels)).decision_function(test)
    assert auroc(shuffled, labels) < 0.7


def test_transfer_is_by_name_only() -> None:
    other = TableModel.random(9, order=1, seed=5)
    texts = nextoken.read(P, ["abcabc", "fedfed"], top=6)
    foreign = nextoken.read(other, ["abcabci", "ihgfed"], top=6)
    probe = LosNet(**SMALL).fit(texts, np.array([0, 1]))
    with pytest.raises(ValueError, match="trained on signatures of table"):
        probe.decision_function(foreign)
    moved = probe.transferred(foreign)
    assert np.isfinite(moved.decision_function(foreign)).all()
    assert moved.network is not None and moved.network.vocab_size == 10
    own = probe.transferred(texts)
    np.testing.assert_array_equal(own.decision_function(texts), probe.decision_function(texts))
    with pytest.raises(ValueError, match="mean nothing in another"):
        LosNet(ranks="embedding", **SMALL).fit(texts, np.array([0, 1])).transferred(foreign)


def test_misuse_is_refused() -> None:
    texts = nextoken.read(P, ["abc", "def"], top=3)
    with pytest.raises(ValueError, match="read with top=5"):
        LosNet(top=5, **SMALL).fit(texts, np.array([0, 1]))
    for wrong in ({"width": 7}, {"heads": 3}, {"pool": "max"}, {"ranks": "sin"}, {"layers": -1}, {"length": 0}):
        with pytest.raises(ValueError):
            LosNet(**wrong)
    with pytest.raises(ValueError, match="length"):
        los_features(texts, length=0)


def test_partial_signatures_are_refused() -> None:
    from dataclasses import replace

    texts = nextoken.read(P, ["abc"], top=3)
    texts.metadata = replace(texts.metadata, is_partial=True)
    with pytest.raises(ValueError, match="whole distributions"):
        los_features(texts)

"""What all learned scores share: fitting, refusing, keeping, and the cache of features."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

import nextoken
from nextoken.errors import InputError, OutputError
from nextoken.model.table import TableModel
from nextoken.scores.feature_cache import Features, Source, first_rows
from nextoken.scores.learned import Learned, Recipe
from nextoken.scores.los import LosNet, los_features
from nextoken.scores.pawn import Pawn
from nextoken.scores.quality import auroc
from nextoken.signature import Signature

RECIPE = Recipe(epochs=4, rate=1e-2, decay=1e-3, batch=4, clip=1.0)
LABELS = np.array([0, 1, 0, 1, 1, 0])
TEXTS = ["abcabc", "ba", "ccab", "aaaaaaa", "bcbcb", "cab"]
P = TableModel.random(3, order=1, seed=1)


def probes() -> list[Learned]:
    return [
        LosNet(width=8, heads=2, dropout=0.3, recipe=RECIPE),
        Pawn(width=8, channels=4, gates=4, blocks=1, dropout=0.1, recipe=RECIPE),
    ]


def features(kind: str, rows: list[int] | None = None, *, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    counts = rows or [3, 5, 2, 7, 4, 6]
    count = sum(counts)
    values: dict[str, np.ndarray] = {
        "sorted": rng.normal(size=(count, 4)),
        "token": rng.normal(size=count),
        "rank": rng.integers(0, 9, count).astype(np.int32),
        "moments": rng.normal(size=(count, 2)),
        "metrics": rng.normal(size=(count, 5)),
        "hidden": rng.normal(size=(count, 3)),
    }
    wanted = ("sorted", "token", "rank", "moments") if kind == "los" else ("metrics", "hidden")
    kept = {name: values[name] if name == "rank" else values[name].astype(np.float32) for name in wanted}
    return Features(kept, np.cumsum([0, *counts]), Source(kind, "m", "digest", "tokens", 9, "float32"), 600)


@pytest.mark.parametrize("probe", probes())
def test_round_trip_is_bit_for_bit(probe: Learned, tmp_path: Path) -> None:
    texts = features(probe.kind)
    probe.fit(texts, LABELS, validation=(features(probe.kind, seed=1), LABELS))
    probe.save(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["learned.json", "learned.safetensors"]
    for again in (Learned.load(tmp_path / "a" / "b"), type(probe).load(tmp_path / "a" / "b")):
        assert type(again) is type(probe)
        np.testing.assert_array_equal(again.decision_function(texts), probe.decision_function(texts))
        assert again.get_params() == probe.get_params()
        assert (again.source, again.course) == (probe.source, probe.course)


def test_broken_files_are_told(tmp_path: Path) -> None:
    los, pawn = probes()
    with pytest.raises(InputError, match="nothing learned"):
        Learned.load(tmp_path)
    los.fit(features("los"), LABELS).save(tmp_path)
    with pytest.raises(InputError, match="holds a LosNet, not a Pawn"):
        Pawn.load(tmp_path)
    with pytest.raises(ValueError, match="call fit"):
        pawn.save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        los.save(tmp_path / "file" / "below")
    (tmp_path / "learned.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError):
        Learned.load(tmp_path)
    about = json.loads((tmp_path / "learned.json").read_text())
    los.save(tmp_path)
    (tmp_path / "learned.json").write_text(json.dumps(about | {"sizes": {"top": 2, "vocab_size": 9}}))
    with pytest.raises(InputError, match="loading state_dict"):
        Learned.load(tmp_path)


@pytest.mark.parametrize("kind", ["los", "pawn"])
def test_other_models_are_refused(kind: str) -> None:
    probe = next(probe for probe in probes() if probe.kind == kind).fit(features(kind), LABELS)
    texts = features(kind)
    for change, word in (
        ({"model_digest": "other"}, "model_digest"),
        ({"tokenizer_digest": "other"}, "tokenizer_digest"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"vocab_size": 10}, "vocab_size"),
        ({"model_digest": "", "model": "other"}, "model is"),
    ):
        odd = replace(texts, source=replace(texts.source, **change))
        for refused in (probe.decision_function, probe.predict_proba, probe.predict):
            with pytest.raises(ValueError, match=word):
                refused(odd)
        with pytest.raises(ValueError, match=word):
            probe.fit(texts, LABELS, validation=(odd, LABELS))
    renamed = replace(texts, source=replace(texts.source, model="the same under another name"))
    np.testing.assert_array_equal(probe.decision_function(renamed), probe.decision_function(texts))


def test_signatures_of_other_models_are_refused() -> None:
    probe = probes()[0].fit(nextoken.read(P, TEXTS, top=3), LABELS)
    other = TableModel.random(3, order=1, seed=2)
    with pytest.raises(ValueError, match="model_digest"):
        probe.decision_function(nextoken.read(other, TEXTS, top=3))
    with pytest.raises(ValueError, match="top 2 where it needs 3"):
        probe.decision_function(nextoken.read(P, TEXTS, top=2))
    wider = probe.decision_function(nextoken.read(P, TEXTS, top=4))
    np.testing.assert_array_equal(wider, probe.decision_function(nextoken.read(P, TEXTS, top=3)))


def test_shorter_cuts_are_refused() -> None:
    whole = nextoken.read(P, TEXTS, top=3)
    probe = LosNet(length=6, width=8, heads=2, recipe=RECIPE).fit(whole, LABELS)
    with pytest.raises(ValueError, match="cut at 4 rows"):
        probe.decision_function(los_features(whole, length=4))
    longer = los_features(whole, length=50)
    np.testing.assert_allclose(probe.decision_function(longer), probe.decision_function(whole), rtol=1e-5)


@pytest.mark.parametrize("probe", probes())
def test_nothing_to_judge_is_nan(probe: Learned) -> None:
    probe.fit(features(probe.kind), LABELS)
    texts = features(probe.kind, [0, 1, 2, 0, 5, 0])
    mute = np.array([0, 1, 2, 0, 5, 0]) < (2 if probe.kind == "pawn" else 1)
    odds, share, label = probe.decision_function(texts), probe.predict_proba(texts), probe.predict(texts)
    np.testing.assert_array_equal(np.isnan(odds), mute)
    np.testing.assert_array_equal(np.isnan(share), np.stack([mute, mute], 1))
    np.testing.assert_array_equal(np.isnan(label), mute)
    np.testing.assert_allclose(share[~mute], np.stack([expit(-odds), expit(odds)], 1)[~mute])
    np.testing.assert_array_equal(label[~mute], odds[~mute] > 0)
    with pytest.raises(ValueError, match="the first of them text 0"):
        probe.fit(texts, LABELS)
    assert np.isnan(probe.decision_function(texts[[0, 3]])).all()
    assert len(probe.decision_function(texts[[]])) == 0


def test_signatures_without_tokens_are_nan() -> None:
    probe = probes()[0].fit(nextoken.read(P, TEXTS, top=3), LABELS)
    assert np.isnan(probe.decision_function(nextoken.read(P, ["", ""], top=3))).all()
    np.testing.assert_array_equal(np.isnan(probe.decision_function(nextoken.read(P, ["", "a"], top=3))), [True, False])
    nano = nextoken.load("nano")
    pawn = probes()[1].fit(nextoken.read(nano, TEXTS, top=0, hidden=True), LABELS)
    found = pawn.decision_function(nextoken.read(nano, ["", "I", "It was the best of times"], top=0, hidden=True))
    np.testing.assert_array_equal(np.isnan(found), [True, True, False])
    assert np.isnan(pawn.decision_function(nextoken.read(nano, [""], top=0, hidden=True))).all()


@pytest.mark.parametrize("probe", probes())
def test_seeds_decide_everything(probe: Learned) -> None:
    texts = features(probe.kind)
    before = torch.get_rng_state()
    first = probe.fit(texts, LABELS).decision_function(texts)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    np.testing.assert_array_equal(probe.fit(texts, LABELS).decision_function(texts), first)
    other = probe.set_params(recipe=replace(RECIPE, seed=1)).fit(texts, LABELS)
    assert (other.decision_function(texts) != first).all()
    probe.set_params(recipe=RECIPE)


@pytest.mark.parametrize("probe", probes())
def test_validation_keeps_the_best_weights_and_patience_ends_it(probe: Learned) -> None:
    texts, held = features(probe.kind), features(probe.kind, seed=5)
    probe.set_params(recipe=replace(RECIPE, epochs=30, patience=3)).fit(texts, LABELS, validation=(held, LABELS))
    course = probe.course
    assert course is not None and len(course.aurocs) == len(course.losses) + 1
    assert course.kept == int(np.argmax(course.aurocs))
    assert auroc(probe.decision_function(held), LABELS) == max(course.aurocs)
    assert len(course.losses) == min(30, course.kept + 3)
    told: list[tuple[int, float]] = []
    probe.set_params(recipe=RECIPE).fit(texts, LABELS, progress=lambda epoch, loss: told.append((epoch, loss)))
    assert probe.course is not None and probe.course.kept == 4
    assert [loss for _, loss in told] == list(probe.course.losses) and [epoch for epoch, _ in told] == [0, 1, 2, 3]


@pytest.mark.parametrize("probe", probes())
def test_training_fits_what_it_is_shown(probe: Learned) -> None:
    texts = features(probe.kind)
    probe.set_params(recipe=replace(RECIPE, epochs=80), dropout=0.0).fit(texts, LABELS)
    assert probe.course is not None and probe.course.losses[-1] < 0.5 * probe.course.losses[0]
    np.testing.assert_array_equal(probe.predict(texts), LABELS)
    probe.set_params(recipe=RECIPE)


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 0, 0, 0, 0], [0, 1, 2, 0, 1, 2], [0, 1, np.nan, 0, 1, 0]])
def test_labels_must_fit(labels: list[float]) -> None:
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        probes()[0].fit(features("los"), np.array(labels))


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": -1}, {"rate": 0.0}, {"batch": 0}, {"warm_up": 1.1}, {"patience": 0}, {"clip": 0}, {"decay": -1}],
)
def test_recipes_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a recipe needs"):
        replace(RECIPE, **wrong)


def test_it_goes_through_scikit_learn() -> None:
    base = pytest.importorskip("sklearn.base")
    selection = pytest.importorskip("sklearn.model_selection")
    for probe in probes():
        texts = features(probe.kind)
        again = base.clone(probe.fit(texts, LABELS))
        assert again.get_params() == probe.get_params() and again.network is None
        for train, test in selection.GroupKFold(3).split(texts, LABELS, groups=[0, 0, 1, 1, 2, 2]):
            assert again.fit(texts[train], LABELS[train]).decision_function(texts[test]).shape == (2,)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.data())
def test_features_are_chosen_and_joined_like_lists(rows: list[int], data: st.DataObject) -> None:
    texts = features("pawn", rows)
    parts = np.split(texts.values["metrics"], texts.offsets[1:-1])
    chosen = data.draw(st.lists(st.integers(-len(rows), len(rows) - 1), max_size=8))
    some = texts[chosen]
    assert len(some) == len(chosen) and some.shape == (len(chosen),)
    expected = np.concatenate([parts[i] for i in chosen]) if chosen else np.zeros((0, 5))
    np.testing.assert_array_equal(some.values["metrics"], expected)
    assert some.counts.tolist() == [rows[i] for i in chosen]
    mask = np.array([row > 1 for row in rows])
    np.testing.assert_array_equal(texts[mask].counts, texts.counts[mask])
    joined = Features.concat([texts[:1], texts[1:]])
    np.testing.assert_array_equal(joined.values["hidden"], texts.values["hidden"])
    np.testing.assert_array_equal(joined.offsets, texts.offsets)


def test_features_are_kept_on_disk(tmp_path: Path) -> None:
    for kind in ("los", "pawn"):
        texts = features(kind, [0, 3, 1])
        texts.save(tmp_path / kind)
        again = Features.load(tmp_path / kind)
        assert (again.source, again.length, again.values.keys()) == (texts.source, 600, texts.values.keys())
        for name, array in texts.values.items():
            np.testing.assert_array_equal(again.values[name], array)
            assert again.values[name].dtype == array.dtype
        np.testing.assert_array_equal(again.offsets, texts.offsets)
    (tmp_path / "broken").write_bytes(b"0" * 40)
    for name in ("none", "broken"):
        with pytest.raises(InputError, match="no features"):
            Features.load(tmp_path / name)
    with pytest.raises(ValueError, match="kind"):
        Features.concat([features("los"), features("pawn")])
    with pytest.raises(ValueError, match="nothing to concatenate"):
        Features.concat([])
    with pytest.raises(ValueError, match="arrays of 4 rows"):
        Features({"a": np.zeros(3)}, np.array([0, 4]), features("los").source, 9)


def test_cached_features_give_the_scores_of_the_signature(tmp_path: Path) -> None:
    whole = nextoken.read(P, TEXTS, top=3)
    probe = probes()[0].fit(whole, LABELS)
    probe.features(whole).save(tmp_path / "cache")
    cached = Features.load(tmp_path / "cache")
    np.testing.assert_array_equal(probe.decision_function(cached), probe.decision_function(whole))
    whole.to_parquet(tmp_path / "whole.parquet")
    again = Signature.from_parquet(tmp_path / "whole.parquet")
    np.testing.assert_array_equal(probe.decision_function(again), probe.decision_function(whole))


def test_first_rows_of_every_text() -> None:
    rows, offsets = first_rows(nextoken.read(P, ["abc", "", "abcab", "c"]), 2)
    assert rows.tolist() == [0, 1, 3, 4, 8] and offsets.tolist() == [0, 2, 2, 4, 5]

"""Learned deferral: features by hand, what is learnt on data of a known law, keeping, misuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextoken.decode.generate import generate
from nextoken.errors import ModelError, OutputError
from nextoken.model.loading import load
from nextoken.model.table import TableModel
from nextoken.route.cascade import Cascade
from nextoken.route.confidence import Answer, ChowAverage, ChowQuantile, ChowSum
from nextoken.route.deferral import deferral_curve, threshold_for
from nextoken.route.post_hoc import DeferralNetwork, Features, PostHoc
from nextoken.route.post_hoc_fit import fit_post_hoc

SMALLER = TableModel.random(4, order=1, seed=1, name="smaller", eos=True)
LARGER = TableModel.random(4, order=2, seed=2, name="larger", eos=True)


def world(count: int, seed: int) -> tuple[list[Answer], np.ndarray, np.ndarray]:
    """Answers of 3 to 30 tokens that are right the more often, the higher the lower quartile; the large model always.

    A few tokens are unlikely and mean nothing, so that sum, mean and minimum are led astray.
    """
    rng = np.random.default_rng(seed)
    answers, right = [], []
    for _ in range(count):
        size = int(rng.integers(3, 31))
        logprobs = -rng.exponential(rng.uniform(0.2, 1.5), size)
        quartile = float(np.quantile(logprobs, 0.25))
        logprobs[np.argmin(logprobs)] -= rng.exponential(6.0)
        answers.append(Answer(logprobs))
        right.append(rng.random() < 1 / (1 + np.exp(-4 * (quartile + 1.0))))
    return answers, np.array(right, dtype=float), np.ones(count)


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=20), st.integers(2, 21))
def test_features_are_quantiles_whatever_the_length(logprobs: list[float], levels: int) -> None:
    answer = Answer(np.array(logprobs), embedding=np.array([1.0, 2.0]))
    said = Features(levels=levels, totals=True, embedding=True).of([answer])[0]
    expected = np.quantile(logprobs, np.linspace(0, 1, levels))
    assert said == pytest.approx([*expected, sum(logprobs), sum(logprobs) / len(logprobs), 1.0, 2.0], abs=1e-9)


def test_features_are_finite_where_a_token_was_impossible() -> None:
    said = Features(totals=True).of([Answer(np.array([-np.inf, -1.0, -2.0]))])
    assert bool(np.isfinite(said).all())


@pytest.mark.paper("2404.10136")
def test_where_a_quartile_decides_the_learned_rule_beats_sum_mean_and_minimum() -> None:
    """On a fresh split, by more than 3 standard errors of a paired bootstrap (false alarm 0.2 %)."""
    answers, small, large = world(1500, seed=1)
    rule = fit_post_hoc(answers, small=small, large=large, model=SMALLER, steps=300, seed=0)
    fresh, right, other = world(2000, seed=2)
    confidences = [r.confidence(fresh) for r in (rule, ChowSum(), ChowAverage(), ChowQuantile(0.0))]
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(100):
        drawn = rng.integers(0, len(fresh), len(fresh))
        areas.append([deferral_curve(c[drawn], small=right[drawn], large=other[drawn]).area for c in confidences])
    gains = np.array(areas)[:, :1] - np.array(areas)[:, 1:]
    assert bool((gains.mean(0) > 3 * gains.std(0)).all()), gains.mean(0)


@pytest.mark.paper("2404.10136")
def test_the_rule_tells_what_deferring_gains() -> None:
    """Where quality takes two values and one feature decides, -confidence is E[q_L - q_S] of either kind."""
    rng = np.random.default_rng(4)
    weak = rng.random(2000) < 0.5
    answers = [Answer(np.full(4, -2.0 if low else -0.1)) for low in weak]
    small = (rng.random(2000) < np.where(weak, 0.3, 0.9)).astype(float)
    large = (rng.random(2000) < 0.7).astype(float)
    rule = fit_post_hoc(answers, small=small, large=large, model=SMALLER, steps=200)
    said = -rule.confidence([Answer(np.full(9, -2.0)), Answer(np.full(2, -0.1))])
    # Means of some 1,000 differences with a standard error of 0.02 each.
    assert said == pytest.approx([0.4, -0.2], abs=0.1)


def test_equal_seeds_give_equal_rules_and_steps_are_told() -> None:
    answers, small, large = world(60, seed=1)
    told = []
    args = {"small": small, "large": large, "model": SMALLER, "steps": 20}
    one = fit_post_hoc(answers, **args, on_step=told.append)  # type: ignore[arg-type]
    state = torch.random.get_rng_state()
    again, other = (fit_post_hoc(answers, **args, seed=seed) for seed in (0, 1))  # type: ignore[arg-type]
    assert bool((torch.random.get_rng_state() == state).all())
    assert one.network.digest == again.network.digest != other.network.digest
    assert [step.step for step in told] == list(range(1, 21)) and told[0].steps == 20


def test_a_confidence_does_not_depend_on_the_other_answers() -> None:
    answers, small, large = world(60, seed=1)
    rule = fit_post_hoc(answers, small=small, large=large, model=SMALLER, steps=10)
    alone = [rule.confidence([answer])[0] for answer in answers[:5]]
    assert rule.confidence(answers[:5]) == pytest.approx(alone, abs=1e-5)


def test_a_rule_is_kept_and_bound_to_its_model(tmp_path: Path) -> None:
    answers, small, large = world(60, seed=1)
    features = Features(levels=5, totals=True)
    rule = fit_post_hoc(answers, small=small, large=large, model=SMALLER, features=features, steps=10)
    rule.save(tmp_path)
    loaded = PostHoc.load(tmp_path, model=SMALLER)
    assert bool((loaded.confidence(answers) == rule.confidence(answers)).all())
    assert loaded.features == features
    with pytest.raises(ModelError, match="fitted for another model"):
        PostHoc.load(tmp_path, model=LARGER)
    with pytest.raises(ModelError, match="another model and vocabulary"):
        PostHoc.load(tmp_path, model=TableModel.random(3, order=1, seed=1))
    with pytest.raises(ModelError, match="fitted for another model"):
        Cascade(LARGER, SMALLER, rule=rule, threshold=0.0)
    threshold = threshold_for(rule.confidence(answers), 0.5)
    said = Cascade(SMALLER, LARGER, rule=loaded, threshold=threshold).generate(["a", "b"], max_tokens=5)
    assert said.deferred == tuple(sure < threshold for sure in said.confidences)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    rule = PostHoc(DeferralNetwork(3), Features(levels=3))
    with pytest.raises(ModelError, match=r"deferral_rule\.json"):
        PostHoc.load(tmp_path, model=SMALLER)
    rule.save(tmp_path)
    settings = json.loads((tmp_path / "deferral_rule.json").read_text())
    for broken, message in (
        (settings | {"format": 9}, "another format"),
        (settings | {"settings": settings["settings"] | {"network": {"inputs": 4}}}, "no whole"),
        (settings | {"weights": "0" * 16}, "not those it was saved with"),
    ):
        (tmp_path / "deferral_rule.json").write_text(json.dumps(broken))
        with pytest.raises(ModelError, match=message):
            PostHoc.load(tmp_path, model=SMALLER)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        rule.save(tmp_path / "file")


def test_embeddings_are_the_mean_of_what_the_head_read() -> None:
    nano = load("nano")
    made = generate(nano, ["Once upon a", "The ship"], transform="greedy", max_tokens=6)
    answers = [Answer.of(one, embedding=True) for one in made]
    for one, answer in zip(made, answers, strict=True):
        row, begin = [*one.request.prompt, *one.tokens], len(one.request.prompt)
        hidden = nano.predict([row]).hidden
        assert hidden is not None and answer.embedding is not None
        assert answer.embedding == pytest.approx(hidden[0, begin - 1 : -1].mean(0).numpy(), abs=1e-5)
    features = Features(levels=3, embedding=True)
    rule = fit_post_hoc(answers * 5, small=[0, 1] * 5, large=[1, 0] * 5, model=nano, features=features, steps=5)
    cascade = Cascade(nano, nano, rule=rule, threshold=0.0)
    assert cascade.generate(["Once upon a"], max_tokens=3).confidences[0] < float("inf")
    with pytest.raises(ValueError, match="embedding=True"):
        rule.confidence([Answer(np.array([-1.0]))])
    with pytest.raises(ValueError, match="of another model"):
        rule.confidence([Answer(np.array([-1.0]), embedding=np.zeros(3))])
    with pytest.raises(ValueError, match="no hidden states"):
        Answer.of(generate(SMALLER, "a", max_tokens=3, seed=0), embedding=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"small": [0.0]}, "qualities"),
        ({"small": [np.nan] * 10}, "finite"),
        ({"held_out": 1.0}, "held_out"),
        ({"steps": 0}, "steps"),
        ({"held_out": 0.05}, "too few"),
    ],
)
def test_misuse_is_refused(change: dict[str, object], message: str) -> None:
    answers, small, large = world(10, seed=1)
    with pytest.raises(ValueError, match=message):
        fit_post_hoc(answers, **{"small": small, "large": large, "model": SMALLER, **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="levels"):
        Features(levels=1)

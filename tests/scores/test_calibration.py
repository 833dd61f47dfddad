"""Calibrators: least log-loss by brute force, limits, monotony, and files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logsumexp, softmax

from nextoken.errors import InputError, OutputError
from nextoken.scores.calibration import Calibrator, Isotonic, Platt, Temperature
from nextoken.scores.quality import auroc
from nextoken.scores.reliability import ece, log_loss


def sample(n: int, seed: int, *, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds that are `scale` times too sure, and outcomes."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=n)
    return scale * true, (rng.random(n) < expit(true)).astype(int)


@pytest.mark.paper("1706.04599")
def test_temperature_is_the_one_of_least_loss() -> None:
    scores, outcome = sample(400, 0)
    fitted = Temperature().fit(scores, outcome)
    assert fitted.temperature is not None
    grid = np.exp(np.linspace(-1, 3, 801))
    losses = [log_loss(expit(scores / t), outcome) for t in grid]
    assert fitted.temperature == pytest.approx(grid[int(np.argmin(losses))], rel=6e-3)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(300, 5)) * 4
    classes = np.array([rng.choice(5, p=row) for row in softmax(logits / 2.5, axis=1)])
    several = Temperature().fit(logits, classes)
    losses = [
        -(logits / t - logsumexp(logits / t, axis=1, keepdims=True))[np.arange(300), classes].mean() for t in grid
    ]
    assert several.temperature == pytest.approx(grid[int(np.argmin(losses))], rel=6e-3)


@pytest.mark.paper("1706.04599")
def test_temperature_calibrates_and_keeps_the_order() -> None:
    scores, outcome = sample(2000, 2)
    fresh, truth = sample(2000, 3)
    said = Temperature().fit(scores, outcome).predict(fresh)
    assert ece(said, truth) < 0.5 * ece(expit(fresh), truth)
    assert auroc(said, truth) == auroc(fresh, truth)


def test_temperature_of_two_classes_is_that_of_their_log_odds() -> None:
    scores, outcome = sample(200, 4)
    logits = np.stack([np.zeros(200), scores], 1) + np.arange(200)[:, None]
    one, two = Temperature().fit(scores, outcome), Temperature().fit(logits, outcome)
    assert one.temperature == pytest.approx(two.temperature)
    assert two.predict(logits)[:, 1] == pytest.approx(one.predict(scores))


def test_temperature_takes_impossible_classes_and_is_held() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(100, 3)) * 3
    truth = logits.argmax(1) * (rng.random(100) < 0.7)
    open_ = np.concatenate([logits, np.full((100, 1), -math.inf)], 1)
    assert Temperature().fit(open_, truth).temperature == pytest.approx(Temperature().fit(logits, truth).temperature)
    assert Temperature().fit(np.array([-1.0, 1.0]), np.array([0, 1])).temperature == 1e-4
    assert Temperature().fit(np.array([-1.0, 1.0]), np.array([1, 0])).temperature == 1e4
    with pytest.raises(ValueError, match="-inf"):
        Temperature().fit(open_, np.full(100, 3))


def test_platt_is_a_stationary_point_of_its_loss() -> None:
    scores, outcome = sample(300, 6)
    scores = 50 - 0.01 * scores  # of small scale, far from 0, and pointing the other way
    fitted = Platt().fit(scores, outcome)
    assert fitted.slope is not None and fitted.slope < 0
    positives = outcome.sum()
    goal = np.where(outcome == 1, (positives + 1) / (positives + 2), 1 / (300 - positives + 2))
    error = fitted.predict(scores) - goal
    assert error.sum() == pytest.approx(0, abs=1e-5)
    assert error @ (scores - scores.mean()) / scores.std() == pytest.approx(0, abs=1e-5)


def test_platt_of_separated_scores_is_finite_and_of_constant_ones_the_softened_rate() -> None:
    fitted = Platt().fit(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 0, 1, 1]))
    assert fitted.slope is not None and math.isfinite(fitted.slope)
    assert fitted.predict(np.array([0.0]))[0] > 0.05
    flat = Platt().fit(np.full(4, 2.0), np.array([0, 1, 1, 1]))
    assert flat.predict(np.array([2.0]))[0] == pytest.approx((3 * 4 / 5 + 1 / 3) / 4)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), min_size=1, max_size=15))
def test_isotonic_is_the_min_max_formula(items: list[tuple[int, int]]) -> None:
    """max over i <= k of min over j >= k of the mean of the outcomes of scores from the i-th to the j-th."""
    scores, outcome = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    values = np.unique(scores)
    fitted = Isotonic().fit(scores, outcome)
    for value in values:
        expected = max(
            min(outcome[(scores >= low) & (scores <= high)].mean() for high in values[values >= value])
            for low in values[values <= value]
        )
        assert fitted.predict(np.array([value]))[0] == pytest.approx(expected)
    falling = Isotonic(increasing=False).fit(-scores, outcome)
    assert falling.predict(-scores) == pytest.approx(fitted.predict(scores))


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 1)), min_size=1, max_size=15), st.floats(-9, 9))
def test_isotonic_is_monotone_and_a_probability(items: list[tuple[float, int]], at: float) -> None:
    scores, outcome = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    said = Isotonic().fit(scores, outcome).predict(np.array([at, at + 1, math.nan, -math.inf, math.inf]))
    assert 0 <= said[3] <= said[0] <= said[1] <= said[4] <= 1 and math.isnan(said[2])


def test_isotonic_on_enough_data_is_the_truth() -> None:
    rng = np.random.default_rng(7)
    p = rng.random(20_000)
    fitted = Isotonic().fit(p**3, (rng.random(20_000) < p).astype(int))
    assert np.abs(fitted.predict(p**3) - p).mean() < 0.03


@pytest.mark.parametrize("kind", [Temperature, Platt, Isotonic])
def test_a_saved_calibrator_is_the_same(kind: type[Calibrator], tmp_path: Path) -> None:
    scores, outcome = sample(100, 8)
    fitted = kind().fit(scores, outcome)
    fitted.save(tmp_path / "made")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"calibrator.json", "calibrator.safetensors"}
    again = Calibrator.load(tmp_path / "made")
    assert type(again) is kind
    assert (again.predict(scores) == fitted.predict(scores)).all()
    assert math.isnan(again.predict(np.array([math.nan]))[0])
    other = Platt if kind is not Platt else Temperature
    with pytest.raises(InputError, match=f"not {other.__name__}"):
        other.load(tmp_path / "made")


def test_settings_are_saved(tmp_path: Path) -> None:
    Isotonic(increasing=False).fit(np.array([0.0, 1.0]), np.array([1, 0])).save(tmp_path)
    assert Isotonic.load(tmp_path).increasing is False


def test_misuse_is_refused(tmp_path: Path) -> None:
    for kind in (Temperature, Platt, Isotonic):
        with pytest.raises(ValueError, match="call fit"):
            kind().predict(np.array([0.0]))
        with pytest.raises(ValueError, match="call fit"):
            kind().save(tmp_path)
        with pytest.raises(ValueError, match="NaN"):
            kind().fit(np.array([0.0, math.nan]), np.array([0, 1]))
        with pytest.raises(ValueError):
            kind().fit(np.array([0.0, 1.0]), np.array([0, 2]))
    with pytest.raises(ValueError, match="infinities"):
        Platt().fit(np.array([0.0, math.inf]), np.array([0, 1]))
    with pytest.raises(InputError, match="no calibrator"):
        Calibrator.load(tmp_path / "nowhere")
    (tmp_path / "calibrator.json").write_text(json.dumps({"kind": "Magic"}))
    with pytest.raises(InputError, match="no calibrator"):
        Calibrator.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Platt().fit(np.array([0.0, 1.0]), np.array([0, 1])).save(tmp_path / "file")

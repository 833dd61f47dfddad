"""Calibration: maps from scores to probabilities, learnt where the outcome is known.

    calibrator = Platt().fit(scores, correct)
    calibrator.predict(new_scores)
    calibrator.save("calibrator")
    Calibrator.load("calibrator")

Fit on other items than those it is judged on.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import numpy as np
from scipy.optimize import brentq, isotonic_regression, minimize
from scipy.special import expit, log_expit, logsumexp, softmax

from nextoken.errors import InputError
from nextoken.methods import method
from nextoken.signature.output import writing, written

_KINDS: dict[str, type[Calibrator]] = {}


class Calibrator(ABC):
    """scores -> probability that the event comes true. A NaN score gives NaN."""

    def __init_subclass__(cls) -> None:
        _KINDS[cls.__name__] = cls

    @abstractmethod
    def fit(self, scores: np.ndarray, outcome: np.ndarray) -> Self:
        """Learn from scores [n] and what turned out [n]; returns itself.

        Raises:
            ValueError: shapes differ, there are no items, a score is NaN or an outcome is not 0 or 1.
        """

    @abstractmethod
    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities of the shape of the scores.

        Raises:
            ValueError: `fit` was not called.
        """

    @abstractmethod
    def _arrays(self) -> dict[str, np.ndarray]:
        """What was learnt; empty before `fit`."""

    @abstractmethod
    def _restore(self, arrays: dict[str, np.ndarray], settings: dict[str, object]) -> None:
        """The inverse of `_arrays` and `_settings`."""

    def _settings(self) -> dict[str, object]:
        return {}

    def save(self, folder: str | Path) -> None:
        """Write `calibrator.safetensors` (what was learnt) and `calibrator.json` (its kind and settings).

        Raises:
            OutputError: the folder cannot be written to.
            ValueError: `fit` was not called.
        """
        from safetensors.numpy import save

        arrays = {name: np.array(values, dtype=np.float64, order="C") for name, values in self._learnt().items()}
        about = {"kind": type(self).__name__, "version": 1, "settings": self._settings()}
        target = Path(folder)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        for name, data in (("safetensors", save(arrays)), ("json", (json.dumps(about, indent=2) + "\n").encode())):
            with written(target / f"calibrator.{name}") as out:
                out.write(data)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The calibrator that `save` wrote; called on a kind, only that kind.

        Raises:
            InputError: there is none, or it is of another kind.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        source = Path(folder)
        try:
            about = json.loads((source / "calibrator.json").read_text(encoding="utf-8"))
            arrays = load((source / "calibrator.safetensors").read_bytes())
            kind = _KINDS[about["kind"]]
            made = kind()
            made._restore(arrays, about["settings"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"no calibrator in {source}: {error}; give a folder that save() wrote") from error
        if not isinstance(made, cls):
            raise InputError(f"{source} holds a calibrator of kind {about['kind']}, not {cls.__name__}")
        return made

    def _learnt(self) -> dict[str, np.ndarray]:
        arrays = self._arrays()
        if not arrays:
            raise ValueError(f"this {type(self).__name__} has learnt nothing yet: call fit(scores, outcome) first")
        return arrays


@method(
    name="Temperature scaling",
    arxiv="1706.04599",
    access="gray",
    trained=True,
    summary="logits divided by one number, chosen by the log-loss of known outcomes",
)
class Temperature(Calibrator):
    """p = softmax(z / T), or sigmoid(z / T) for log-odds z of one event, with T of least log-loss.

    The order of the classes, and of items by log-odds, stays. T is held between 1e-4 and 1e4: outcomes that the logits
    separate perfectly, or that go against them, have no best one.

    Scores are logits or log-probabilities [n, K] with outcomes 0 ... K - 1, or log-odds [n] with outcomes 0 or 1; -inf
    is an impossible class.

    Source: Guo et al., arXiv:1706.04599.
    """

    def __init__(self) -> None:
        self.temperature: float | None = None

    def fit(self, scores: np.ndarray, outcome: np.ndarray) -> Self:
        logits, truth = _logits(scores), np.asarray(outcome)
        classes = logits.shape[1]
        if truth.shape != (len(logits),) or not len(logits) or not np.isin(truth, np.arange(classes)).all():
            raise ValueError(
                f"outcomes must be {len(logits)} class numbers below {classes}, and at least one; got {truth.shape}"
            )
        if np.isnan(logits).any() or (logits == np.inf).any():
            raise ValueError("scores have NaN or infinity: leave those items out")
        own = np.take_along_axis(logits, truth.astype(np.int64)[:, None], 1)[:, 0]
        if (own == -np.inf).any():
            raise ValueError("an outcome that came has score -inf: no temperature makes it possible")
        finite = np.where(np.isfinite(logits), logits, 0.0)

        def slope(log_beta: float) -> float:
            """d(log-loss) / d beta at beta = 1 / T; it grows with beta."""
            p = softmax(np.exp(log_beta) * logits, axis=1)
            return float(((p * finite).sum(1) - own).mean())

        low, high = np.log(1e-4), np.log(1e4)
        if slope(low) >= 0:
            self.temperature = 1e4
        elif slope(high) <= 0:
            self.temperature = 1e-4
        else:
            self.temperature = float(np.exp(-brentq(slope, low, high, xtol=1e-12)))
        return self

    def predict(self, scores: np.ndarray) -> np.ndarray:
        temperature = float(self._learnt()["temperature"])
        values = np.asarray(scores, dtype=np.float64)
        scaled = values / temperature
        return np.asarray(expit(scaled) if values.ndim == 1 else softmax(scaled, axis=-1))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {} if self.temperature is None else {"temperature": np.array(self.temperature)}

    def _restore(self, arrays: dict[str, np.ndarray], settings: dict[str, object]) -> None:
        self.temperature = float(arrays["temperature"])


@method(
    name="Platt scaling",
    access="black",
    trained=True,
    summary="a logistic curve from a score to a probability of truth",
)
class Platt(Calibrator):
    """p = sigmoid(slope * s + intercept) of least log-loss against Platt's softened outcomes.

    Positives count as (N+ + 1) / (N+ + 2) and negatives as 1 / (N- + 2), so that separated scores have a finite slope.
    The slope may be negative: uncertainties are as welcome as confidences. Scores must be finite where it learns.

    Source: Platt, Probabilistic outputs for support vector machines, 1999.
    """

    def __init__(self) -> None:
        self.slope: float | None = None
        self.intercept = 0.0

    def fit(self, scores: np.ndarray, outcome: np.ndarray) -> Self:
        s, y = _binary(scores, outcome)
        if not np.isfinite(s).all():
            raise ValueError("scores have infinities, which no logistic curve reaches: clip them or leave them out")
        positives = y.sum()
        goal = np.where(y > 0, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))
        centre, scale = s.mean(), s.std() or 1.0
        design = np.stack([(s - centre) / scale, np.ones_like(s)], 1)

        def loss(w: np.ndarray) -> float:
            z = design @ w
            return float(-(goal * log_expit(z) + (1 - goal) * log_expit(-z)).mean())

        def gradient(w: np.ndarray) -> np.ndarray:
            return np.asarray(design.T @ (expit(design @ w) - goal) / len(goal))

        def curvature(w: np.ndarray) -> np.ndarray:
            p = expit(design @ w)
            return np.asarray((design * (p * (1 - p))[:, None]).T @ design / len(goal))

        found = minimize(loss, np.zeros(2), jac=gradient, hess=curvature, method="trust-exact", options={"gtol": 1e-10})
        self.slope = float(found.x[0] / scale)
        self.intercept = float(found.x[1] - found.x[0] * centre / scale)
        return self

    def predict(self, scores: np.ndarray) -> np.ndarray:
        learnt = self._learnt()
        slope, intercept = float(learnt["slope"]), float(learnt["intercept"])
        values = np.asarray(scores, dtype=np.float64)
        # A slope of 0 says that the score tells nothing, an infinite one neither.
        return np.asarray(expit(intercept + (slope * values if slope else np.where(np.isnan(values), np.nan, 0.0))))

    def _arrays(self) -> dict[str, np.ndarray]:
        if self.slope is None:
            return {}
        return {"slope": np.array(self.slope), "intercept": np.array(self.intercept)}

    def _restore(self, arrays: dict[str, np.ndarray], settings: dict[str, object]) -> None:
        self.slope, self.intercept = float(arrays["slope"]), float(arrays["intercept"])


@method(
    name="Isotonic calibration",
    access="black",
    trained=True,
    summary="the monotone map from a score to a probability that fits known outcomes best",
)
class Isotonic(Calibrator):
    """p = the non-decreasing function of the score that is nearest to the outcomes in squares.

    Between the scores seen it is linear, outside them constant, as scikit-learn's; equal scores are one point.

    Args:
        increasing: False for scores of which high speaks against the event, such as uncertainties.

    Source: Zadrozny and Elkan, Transforming classifier scores into accurate multiclass probability estimates, 2002.
    """

    def __init__(self, *, increasing: bool = True) -> None:
        self.increasing = increasing
        self.points: np.ndarray | None = None
        """Scores [m], ascending, at which `values` [m] hold."""
        self.values: np.ndarray | None = None

    def fit(self, scores: np.ndarray, outcome: np.ndarray) -> Self:
        s, y = _binary(scores, outcome)
        points, place = np.unique(s, return_inverse=True)
        count = np.bincount(place).astype(np.float64)
        mean = np.bincount(place, weights=y) / count
        fitted = isotonic_regression(mean, weights=count, increasing=self.increasing).x
        # Of a run of equal values its two ends say all.
        same = np.concatenate([[False], fitted[1:] == fitted[:-1]])
        kept = ~(same & np.append(same[1:], False))
        self.points, self.values = points[kept], np.clip(fitted[kept], 0.0, 1.0)
        return self

    def predict(self, scores: np.ndarray) -> np.ndarray:
        learnt = self._learnt()
        return np.asarray(_line(np.asarray(scores, dtype=np.float64), learnt["points"], learnt["values"]))

    def _settings(self) -> dict[str, object]:
        return {"increasing": self.increasing}

    def _arrays(self) -> dict[str, np.ndarray]:
        return {} if self.points is None or self.values is None else {"points": self.points, "values": self.values}

    def _restore(self, arrays: dict[str, np.ndarray], settings: dict[str, object]) -> None:
        self.points, self.values = arrays["points"], arrays["values"]
        self.increasing = bool(settings["increasing"])


def _line(values: np.ndarray, points: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Linear interpolation in which infinite points are reached only at infinity."""
    finite = np.isfinite(points)
    result = np.interp(values, points[finite], heights[finite]) if finite.any() else np.full(values.shape, heights[0])
    for point, height in zip(points[~finite], heights[~finite], strict=True):
        result = np.where(values == point, height, result)
    return np.where(np.isnan(values), np.nan, result)


def _logits(scores: np.ndarray) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim == 1:
        return np.stack([np.zeros_like(values), values], 1)
    if values.ndim != 2:
        raise ValueError(f"scores must be log-odds [n] or logits [n, K], got {values.shape}")
    return np.asarray(values - logsumexp(values, axis=1, keepdims=True))


def _binary(scores: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    if s.ndim != 1 or s.shape != y.shape or not len(s):
        raise ValueError(f"scores and outcomes must be two arrays [n] with n > 0, got {s.shape} and {y.shape}")
    if np.isnan(s).any() or not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("scores must not be NaN, and outcomes must be 0 or 1: leave other items out")
    return s, y

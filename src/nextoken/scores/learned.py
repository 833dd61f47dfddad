"""Learned: classifiers of texts, trained on what signatures hold, with one manner of fitting, judging and keeping.

    probe = LosNet().fit(signature, labels)
    probe.decision_function(other)              # log-odds [T]
    probe.save("probe")
    Learned.load("probe")

Whatever belongs together (a person's text and its machine twin, pieces of one book) belongs on one side of a split.
"""

from __future__ import annotations

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np
from scipy.special import expit

from nextoken.errors import InputError
from nextoken.scores.feature_cache import Features, Source
from nextoken.signature.output import writing, written
from nextoken.signature.signature import Signature

if TYPE_CHECKING:
    from torch import nn

Judged: TypeAlias = Signature | Features
"""Texts: their signature, or the features of it."""
_KINDS: dict[str, type[Learned]] = {}
_FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: AdamW on the binary cross-entropy, the rate rising, then falling linearly to 0.

    Args:
        epochs: passes over the texts.
        rate: of learning, at its highest.
        decay: of the weights.
        batch: texts per step.
        warm_up: share of the steps in which the rate rises.
        patience: epochs without a better validation AUROC after which training ends; None for never.
        clip: largest norm of a gradient.
        seed: of first weights, order and dropout.
    """

    epochs: int
    rate: float
    decay: float
    batch: int
    warm_up: float = 0.0
    patience: int | None = None
    clip: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or not self.rate > 0 or self.decay < 0 or not self.clip > 0:
            raise ValueError(f"a recipe needs epochs, decay >= 0, batch >= 1 and rate, clip > 0, got {self}")
        if not 0 <= self.warm_up <= 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"a recipe needs a warm-up of 0 to 1 and a patience of at least 1, got {self}")


@dataclass(frozen=True)
class Course:
    """How a training went.

    Args:
        losses: mean cross-entropy of the training texts in each epoch, nats, dropout and all.
        aurocs: on the validation texts, before training and after each epoch; empty without any.
        kept: after how many epochs the weights were taken that were kept.
    """

    losses: tuple[float, ...]
    aurocs: tuple[float, ...]
    kept: int


class Learned(ABC):
    """Texts -> log-odds that the label is 1, by a network over features of their tokens.

    It keeps the manners of scikit-learn: settings are given at construction and told by `get_params`, `fit` returns
    itself, and features can be split like arrays. A text without anything to judge is NaN. It computes on the CPU.
    """

    kind: ClassVar[str]
    """Of its features and of its files."""
    recipe: Recipe

    def __init_subclass__(cls) -> None:
        _KINDS[cls.kind] = cls

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self.source: Source | None = None
        """The model whose signatures it was trained on."""
        self.course: Course | None = None
        self._sizes: dict[str, int] = {}

    @abstractmethod
    def features(self, signature: Signature) -> Features:
        """What it looks at, to be kept where the same texts are used more than once.

        Raises:
            ValueError: the signature lacks a column; the message says how to read it.
        """

    @property
    @abstractmethod
    def rows(self) -> int:
        """Most rows of a text that it looks at."""

    @abstractmethod
    def _sized(self, features: Features) -> dict[str, int]:
        """The sizes of the network's inputs, as these features have them.

        Raises:
            ValueError: they have less than the settings ask for.
        """

    @abstractmethod
    def _made(self, sizes: dict[str, int]) -> nn.Module:
        """A network with new weights: (values [B, n, ...] by name, rows [B]) -> log-odds [B]."""

    @abstractmethod
    def _judged(self, counts: np.ndarray) -> np.ndarray:
        """Which texts have enough rows [T]."""

    def fit(
        self,
        texts: Judged,
        labels: np.ndarray,
        *,
        validation: tuple[Judged, np.ndarray] | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> Self:
        """Train new weights to minimise -(1/T) sum_i log p(label_i | text_i); returns itself.

        The same texts, recipe and number of threads give the same weights on one machine.

        Args:
            texts: T of them.
            labels: 0 or 1 [T], some of either.
            validation: other texts and labels: the weights of highest AUROC there are kept (of equals the first), the
                untrained ones among them. Without, the last are.
            progress: called after each epoch with its number from 0 and its loss.

        Raises:
            ValueError: labels do not fit the texts, a text has no row to judge, or a column is missing.
        """
        from nextoken.scores._networks.training import begun, trained

        features, truth = self._labelled(texts, labels)
        sizes = self._sized(features)
        held = None
        if validation is not None:
            held = self._labelled(*validation)
            self._fitting(held[0], features.source, sizes)
        network = begun(lambda: self._made(sizes), seed=self.recipe.seed)
        self.course = trained(
            network, features, truth, self.recipe, length=self.rows, validation=held, progress=progress
        )
        self.network, self.source, self._sizes = network, features.source, sizes
        return self

    def decision_function(self, texts: Judged) -> np.ndarray:
        """Log-odds that the label is 1 [T], nats; NaN where there is nothing to judge.

        Raises:
            ValueError: it was not fitted, or the texts were read by another model than that of the training.
        """
        from nextoken.scores._networks.training import said

        network, source = self._fitted()
        features = self._features(texts)
        self._fitting(features, source, self._sizes)
        found = np.full(len(features), np.nan)
        able = np.flatnonzero(self._judged(features.counts))
        found[able] = said(network, features, able, length=self.rows)
        return found

    def predict_proba(self, texts: Judged) -> np.ndarray:
        """Probabilities of the labels 0 and 1 [T, 2]."""
        odds = self.decision_function(texts)
        return np.stack([expit(-odds), expit(odds)], axis=1)

    def predict(self, texts: Judged) -> np.ndarray:
        """The likelier label, 0.0 or 1.0 [T]; NaN where there is nothing to judge."""
        odds = self.decision_function(texts)
        return np.where(np.isnan(odds), np.nan, odds > 0)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **settings: Any) -> Self:
        """Change settings, which drops what was learnt; returns itself.

        Raises:
            TypeError: there is no such setting.
        """
        type(self).__init__(self, **(self.get_params() | settings))
        return self

    def save(self, folder: str | Path) -> None:
        """Write `learned.safetensors` (weights) and `learned.json` (settings, and the model it belongs to).

        Raises:
            OutputError: the folder cannot be written to.
            ValueError: `fit` was not called.
        """
        from safetensors.torch import save

        network, source = self._fitted()
        weights = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
        settings = self.get_params() | {"recipe": asdict(self.recipe) | {"clip": str(self.recipe.clip)}}
        about = {
            "kind": self.kind,
            "format": _FORMAT,
            "settings": settings,
            "sizes": self._sizes,
            "source": asdict(source),
            "course": None if self.course is None else asdict(self.course),
        }
        target = Path(folder)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            # The settings come last: a folder without them is not whole.
            (target / "learned.json").unlink(missing_ok=True)
        for name, data in (("safetensors", save(weights)), ("json", (json.dumps(about, indent=2) + "\n").encode())):
            with written(target / f"learned.{name}") as out:
                out.write(data)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote; called on a kind, only that kind.

        Raises:
            InputError: there is none, or it is of another kind.
        """
        import nextoken.scores.los
        import nextoken.scores.pawn  # noqa: F401 (each enters its kind)
        from nextoken.scores._networks.training import restored

        source = Path(folder)
        try:
            about = json.loads((source / "learned.json").read_text(encoding="utf-8"))
            kind, settings, course = _KINDS[about["kind"]], about["settings"], about["course"]
            recipe = settings["recipe"]
            made = kind(**(settings | {"recipe": Recipe(**(recipe | {"clip": float(recipe["clip"])}))}))
            made._sizes, made.source = about["sizes"], Source(**about["source"])
            made.network = restored(made._made(made._sizes), (source / "learned.safetensors").read_bytes())
            if course is not None:
                made.course = Course(tuple(course["losses"]), tuple(course["aurocs"]), course["kept"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"nothing learned in {source}: {error}; give a folder that save() wrote") from error
        if not isinstance(made, cls):
            raise InputError(f"{source} holds a {type(made).__name__}, not a {cls.__name__}")
        return made

    def _fitted(self) -> tuple[nn.Module, Source]:
        if self.network is None or self.source is None:
            raise ValueError(f"this {type(self).__name__} has learnt nothing yet: call fit(texts, labels) first")
        return self.network, self.source

    def _features(self, texts: Judged) -> Features:
        if isinstance(texts, Signature):
            return self.features(texts)
        if texts.source.kind != self.kind:
            raise ValueError(
                f"{type(self).__name__} looks at features of kind {self.kind!r}, not {texts.source.kind!r}"
            )
        return texts

    def _labelled(self, texts: Judged, labels: np.ndarray) -> tuple[Features, np.ndarray]:
        features, truth = self._features(texts), np.asarray(labels)
        if truth.shape != (len(features),) or {*np.unique(truth).tolist()} != {0, 1}:
            raise ValueError(f"labels must be 0 or 1, some of either, for {len(features)} texts; got {truth.shape}")
        mute = np.flatnonzero(~self._judged(features.counts))
        if len(mute):
            raise ValueError(
                f"{len(mute)} texts have nothing to judge, the first of them text {mute[0]}: leave them out"
            )
        return features, truth.astype(np.int64)

    def _fitting(self, features: Features, source: Source, sizes: dict[str, int]) -> None:
        """Refuse features of another model, or with less than the network takes in."""
        difference = source.disagreement(features.source)
        if difference is not None:
            raise ValueError(
                f"this {type(self).__name__} was trained on signatures of {source.model}, these are of "
                f"{features.source.model}: {difference}; read the texts with the model it was trained on, or train anew"
            )
        if not features.offsets[-1]:
            return  # of a reading without tokens the widths are unknown
        found = self._sized(features)
        less = [f"{name} {found[name]} where it needs {size}" for name, size in sizes.items() if found[name] < size]
        if less:
            raise ValueError(f"features are narrower than those of the training: {', '.join(less)}")
        if features.length < self.rows and bool((features.counts == features.length).any()):
            raise ValueError(
                f"features were cut at {features.length} rows, and it looks at {self.rows}: make them anew"
            )

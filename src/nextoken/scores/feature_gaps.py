"""Feature gaps: how far the states behind an answer lack reliance on the context, comprehension of it, and honesty.

gaps = FeatureGaps.fit(model, training, validation)
gaps.predict(model, questions)          # probability that each answer is correct
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from nextoken.errors import InputError, ModelError
from nextoken.methods import method
from nextoken.scores.quality import auroc, prr
from nextoken.signature.output import writing, written

if TYPE_CHECKING:
    from torch import Tensor

    from nextoken.model._derived import Derived
    from nextoken.model._sites import Act, Spot
    from nextoken.model.hf import HFModel

How = Literal["random-sign", "mean", "centred"]
Model: TypeAlias = "HFModel | Derived"
_SKIPPED = 7 / 33
"""Share of the layers left out of the choice: the paper's 7 of the 33 states of a model of 32 layers."""
_ROWS = 16


@dataclass(frozen=True)
class Question:
    """A question about a context, and the model's answer to it.

    Args:
        question, context: as the prompt shows them.
        answer: what the model said, word for word.
        correct: whether that is right; None where nobody could tell, which leaves it out of every fit.
        easy: a sentence that gives the right answer away, for the training of comprehension.
    """

    question: str
    context: str
    answer: str
    correct: bool | None = None
    easy: str = ""


@dataclass(frozen=True)
class Feature:
    """Two prompts that differ in one feature; {context}, {question} and {easy} stand for those of the question."""

    name: str
    more: str
    less: str


REGULAR = "Context: {context}\nAnswer the question briefly, using the context.\nQuestion: {question}\nAnswer:"
FEATURES = (
    Feature(
        "context reliance",
        "Use the context and no knowledge of your own.\n" + REGULAR,
        "Context: {context}\nDo not use the context, use your own knowledge.\nQuestion: {question}\nAnswer:",
    ),
    Feature("comprehension", REGULAR.replace("{context}", "{context} {easy}"), REGULAR),
    Feature("honesty", "Be honest and do not lie.\n" + REGULAR, "Be a liar and say what is not true.\n" + REGULAR),
)


@dataclass(frozen=True, eq=False)
class Reading:
    """A feature as it is read at the chosen layer: s = sign (h - offset) . direction, direction of length 1 [D]."""

    feature: Feature
    layer: int
    direction: np.ndarray
    offset: np.ndarray
    sign: float
    prr: float
    """On the validation items, on which the layer was chosen: no measure of how good it is."""


@method(
    name="Feature gaps",
    arxiv="2510.02671",
    access="white",
    trained=True,
    summary="three linear directions of hidden states, combined into the probability that an answer is correct",
)
@dataclass(frozen=True, eq=False)
class FeatureGaps:
    """P(correct) = sigmoid(b + sum_k w_k z_k), z_k the standardised score s_k of feature k.

    An answer's state h [D] at a layer is the mean over the positions that predict its tokens, under the regular prompt.
    The idea: were the model perfectly prompted, its states would differ from these by gaps along a few directions, and
    the KL divergence of the two next-token distributions is at most 2 max_v |w_v . (h* - h)|.

    Source: arXiv:2510.02671, sections 3 and 4, and its released code, but for three things: directions are found by
        the difference of prompts with random signs (`how`), scores are standardised before the regression, and items
        on which layers are chosen are never those that directions come from.
    """

    digest: str
    readings: tuple[Reading, ...]
    weights: np.ndarray
    """b, then w [1 + K]."""
    centre: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(
        cls,
        model: Model,
        training: Sequence[Question],
        validation: Sequence[Question],
        *,
        features: Sequence[Feature] = FEATURES,
        how: How = "random-sign",
        seed: int = 0,
    ) -> FeatureGaps:
        """Find a direction per feature and layer in `training`, and choose layers, signs and weights on `validation`.

        With d_i the difference of an answer's states under a feature's two prompts, the direction is the first
        principal component of d_i with random signs ("random-sign"), of d_i - mean d ("centred"), or mean d itself.
        Centring takes out what all pairs share, which is the feature: it finds the greatest variance of the rest. The
        released code centres; it is there to compare.

        Args:
            model: a transformers model, or one derived from it.
            training: questions; `correct` does not matter, `easy` does for comprehension.
            validation: others, with `correct`; each layer is one more chance to fit their noise, so keep test items
                apart from both.
            features: what is read.
            seed: of the signs.

        Raises:
            ValueError: fewer than two training answers, validation answers all of one kind, or a feature whose two
                prompts never differ.
            ModelError: the layers are not found in a model of this family.
        """
        if how not in get_args(How):
            raise ValueError(f"how must be one of {', '.join(get_args(How))}; got {how!r}")
        training = [one for one in training if one.answer]
        known = [one for one in validation if one.answer and one.correct is not None]
        if len(training) < 2:
            raise ValueError(f"directions need at least two answers in training, got {len(training)}")
        correct = np.array([one.correct for one in known], dtype=np.float64)
        if len(set(correct.tolist())) < 2:
            raise ValueError("validation needs answers that are right and answers that are wrong, to choose layers by")
        states = _states(model, REGULAR, known)
        rng = np.random.default_rng(seed)
        readings = []
        for feature in features:
            differences = _states(model, feature.more, training) - _states(model, feature.less, training)
            if not np.abs(differences).max() > 0:
                raise ValueError(f"the two prompts of {feature.name!r} never differ on these questions")
            signs = rng.choice([-1.0, 1.0], size=len(training))
            readings.append(_best_layer(feature, differences, states, correct, how, signs))
        scores = np.stack([_score(states, reading) for reading in readings], axis=1)
        centre, spread = scores.mean(0), np.maximum(scores.std(0), 1e-12)
        return cls(
            _digest(model),
            tuple(readings),
            _logistic((scores - centre) / spread, correct),
            centre,
            spread,
        )

    def scores(self, model: Model, questions: Sequence[Question]) -> np.ndarray:
        """s [N, K], high where right answers of the validation were high; NaN for an empty answer. One pass.

        Raises:
            ValueError: the model is not the one that this was fitted on.
        """
        if _digest(model) != self.digest:
            raise ValueError(
                f"these directions are of a model with digest {self.digest}, and {model.name} has "
                f"{_digest(model)}: fit them anew"
            )
        answered = [number for number, one in enumerate(questions) if one.answer]
        found = np.full((len(questions), len(self.readings)), np.nan)
        if answered:
            states = _states(model, REGULAR, [questions[number] for number in answered])
            found[answered] = np.stack([_score(states, reading) for reading in self.readings], axis=1)
        return found

    def predict(self, model: Model, questions: Sequence[Question]) -> np.ndarray:
        """P(correct) [N]; NaN for an empty answer. Errors as of `scores`."""
        z = (self.scores(model, questions) - self.centre) / self.spread
        found: np.ndarray = expit(self.weights[0] + z @ self.weights[1:])
        return found

    def save(self, folder: str | Path) -> None:
        """Write `gaps.safetensors` and `gaps.json`.

        Raises:
            OutputError: the folder cannot be written to.
        """
        from safetensors.numpy import save

        arrays = {"weights": self.weights, "centre": self.centre, "spread": self.spread}
        for number, reading in enumerate(self.readings):
            arrays |= {f"direction {number}": reading.direction, f"offset {number}": reading.offset}
        about = {
            "version": 1,
            "digest": self.digest,
            "readings": [
                {**vars(reading.feature), "layer": reading.layer, "sign": reading.sign, "prr": reading.prr}
                for reading in self.readings
            ],
        }
        target = Path(folder)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        for name, data in (("safetensors", save(arrays)), ("json", (json.dumps(about, indent=2) + "\n").encode())):
            with written(target / f"gaps.{name}") as out:
                out.write(data)

    @classmethod
    def load(cls, folder: str | Path) -> FeatureGaps:
        """What `save` wrote.

        Raises:
            InputError: there is nothing of the kind.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        source = Path(folder)
        try:
            about = json.loads((source / "gaps.json").read_text(encoding="utf-8"))
            arrays = load((source / "gaps.safetensors").read_bytes())
            readings = tuple(
                Reading(
                    Feature(told["name"], told["more"], told["less"]),
                    told["layer"],
                    arrays[f"direction {number}"],
                    arrays[f"offset {number}"],
                    told["sign"],
                    told["prr"],
                )
                for number, told in enumerate(about["readings"])
            )
            return cls(about["digest"], readings, arrays["weights"], arrays["centre"], arrays["spread"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"no feature gaps in {source}: {error}; give a folder that save() wrote") from error


def direction(differences: np.ndarray, how: How, signs: np.ndarray) -> np.ndarray:
    """The direction of length 1 [D] that differences [N, D] share, turned towards their mean; see `FeatureGaps.fit`."""
    mean = differences.mean(0)
    if how == "mean":
        found = mean
    else:
        table = differences - mean if how == "centred" else differences * signs[:, None]
        # Random signs put the mean near 0, so that the component is that of the second moment.
        found = np.linalg.svd(table if how == "random-sign" else table - table.mean(0), full_matrices=False)[2][0]
    size = np.linalg.norm(found)
    unit: np.ndarray = found / size if size > 0 else found
    return -unit if unit @ mean < 0 else unit


def _best_layer(
    feature: Feature, differences: np.ndarray, states: np.ndarray, correct: np.ndarray, how: How, signs: np.ndarray
) -> Reading:
    """The layer whose score orders the validation answers best, by PRR."""
    depth = differences.shape[1]
    tried = []
    for layer in range(min(depth - 1, round(_SKIPPED * depth)), depth):
        offset = differences[:, layer].mean(0)
        reading = Reading(feature, layer, direction(differences[:, layer], how, signs), offset, 1.0, np.nan)
        scores = _score(states, reading)
        sign = 1.0 if auroc(scores, correct) >= 0.5 else -1.0
        tried.append(replace(reading, sign=sign, prr=float(prr(-sign * scores, correct))))
    return max(tried, key=lambda reading: reading.prr)


def _score(states: np.ndarray, reading: Reading) -> np.ndarray:
    """s [N] of states [N, L, D]."""
    found: np.ndarray = reading.sign * ((states[:, reading.layer] - reading.offset) @ reading.direction)
    return found


def _logistic(z: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """argmin of |w|^2 / 2 + sum of log-losses, b unpenalised [1 + K]."""

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = weights[0] + z @ weights[1:]
        error = expit(logits) - correct
        gradient = np.concatenate([[error.sum()], z.T @ error + weights[1:]])
        value = -(correct * log_expit(logits) + (1 - correct) * log_expit(-logits)).sum()
        return float(value + weights[1:] @ weights[1:] / 2), gradient

    return np.asarray(minimize(loss, np.zeros(1 + z.shape[1]), jac=True, method="L-BFGS-B").x, dtype=np.float64)


def _digest(model: Model) -> str:
    from nextoken.model._derived import transformers_model

    return transformers_model(model).digest


def _states(model: Model, prompt: str, questions: Sequence[Question]) -> np.ndarray:
    """Mean states over the positions that predict the answers' tokens [N, L, D], float64."""
    import torch

    from nextoken.model._derived import transformers_model
    from nextoken.model._sites import Sites, watching

    network = transformers_model(model).network
    spots = Sites.find(network, "layer").spots
    begin = [] if model.vocab.bos_id is None else [model.vocab.bos_id]
    rows, spans = [], []
    for one in questions:
        # The answer's own tokens follow the prompt's: joined text might be cut otherwise.
        shown = begin + list(model.vocab.encode(_filled(prompt, one)).ids)
        answer = list(model.vocab.encode(one.answer).ids)
        rows.append(shown + answer)
        spans.append((len(shown) - 1, len(shown) + len(answer) - 1))
    longest = max(map(len, rows))
    if model.context_length is not None and longest > model.context_length:
        raise ValueError(
            f"a prompt with its answer has {longest} tokens, and {model.name} holds {model.context_length}"
        )
    found: list[Tensor] = []
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(order), _ROWS):
        chosen = order[start : start + _ROWS]
        width = max(len(rows[number]) for number in chosen)
        # Padded to the right, where a causal model does not look.
        ids = torch.tensor([rows[number] + [0] * (width - len(rows[number])) for number in chosen])
        inside = torch.zeros(len(chosen), width, dtype=torch.float64)
        for row, number in enumerate(chosen):
            inside[row, slice(*spans[number])] = 1 / (spans[number][1] - spans[number][0])
        seen: list[Tensor] = []

        def note(states: Tensor, inside: Tensor = inside, seen: list[Tensor] = seen) -> None:
            table = states.reshape(*inside.shape, -1).double().cpu()
            seen.append((inside[..., None] * table).sum(1))

        acts: list[tuple[Spot, Act]] = [(spot, note) for spot in spots]
        with torch.no_grad(), watching(acts):
            network.run(ids, use_cache=False)
        found += list(torch.stack(seen, 1))
    states: np.ndarray = torch.stack(found)[torch.argsort(torch.tensor(order))].numpy()
    if not np.isfinite(states).all():
        raise ModelError(f"states of {model.name} are not finite in {model.dtype}; load it with dtype='float32'")
    return states


def _filled(prompt: str, one: Question) -> str:
    """The prompt with the question's parts; replaced at once, for they may hold braces themselves."""
    parts = {"{context}": one.context, "{question}": one.question, "{easy}": one.easy}
    pieces, rest = [], prompt
    while rest:
        at, name = min(((rest.find(name), name) for name in parts if name in rest), default=(len(rest), ""))
        pieces += [rest[:at], parts.get(name, "")]
        rest = rest[at + len(name) :]
    return "".join(pieces)

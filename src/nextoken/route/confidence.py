"""Confidence: how sure a model was of its answer, from what it says of the answer's tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nextoken.decode.generation import Generation
from nextoken.methods import method

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of its own answer.

    Args:
        logprobs: log p(y_t | x, y_<t) [T] in nats, before any transform.
        embedding: mean over t of the final hidden states from which they are computed [H], where it was wanted.
    """

    logprobs: Floats
    embedding: Floats | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        logprobs: Any = np.asarray(self.logprobs, dtype=np.float64)
        if logprobs.ndim != 1 or not len(logprobs):
            raise ValueError(f"an answer needs the log-probabilities of at least one token, got {logprobs.shape}")
        if np.isnan(logprobs).any() or (logprobs > 1e-6).any():
            raise ValueError("log-probabilities must be at most 0 and none NaN; negate surprisals")
        object.__setattr__(self, "logprobs", logprobs)

    @classmethod
    def of(cls, generation: Generation, *, end_token: bool = True, embedding: bool = False) -> Answer:
        """Of a generated text, by the signature of the model that generated it: one pass over prompt and output.

        Args:
            generation: with at least one token.
            end_token: whether a last token that ended the text counts. To answers of one token it makes much of a
                difference; do alike when a threshold is chosen and when it is used.
            embedding: whether to keep the hidden states' mean too, which takes a second pass.

        Raises:
            ValueError: no token is left, or the model gives no hidden states.
        """
        kept = len(generation.tokens) - (generation.finish == "eos" and not end_token)
        logprobs = generation.signature.table["logprob"].to_numpy()[:kept].astype(np.float64)
        return cls(logprobs, _mean_hidden(generation, kept) if embedding else None)


def _mean_hidden(generation: Generation, kept: int) -> Floats:
    prompt = generation.request.prompt
    following = generation.model.predict([[*prompt, *generation.tokens[: kept - 1]]])[:, len(prompt) - 1 :]
    if following.hidden is None:
        raise ValueError(f"{generation.model.name} gives no hidden states; leave the embedding out")
    mean: Floats = following.hidden[0].double().mean(0).cpu().numpy()
    return mean


class DeferralRule(ABC):
    """confidence(answers) [N]: the higher, the better the answer is trusted; it is deferred where below a threshold."""

    wants_embedding: bool = False
    """Whether answers need the embedding."""

    @abstractmethod
    def confidence(self, answers: Sequence[Answer]) -> Floats:
        """One number per answer; nothing else depends on the other answers."""

    def check(self, model_digest: str, vocab_digest: str) -> None:
        """Raise a ModelError if the rule was learnt on another model than this; by default it was learnt on none."""
        return None


def _each(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)


@dataclass(frozen=True)
class ChowSum(DeferralRule):
    """sum_t log p(y_t), nats: the answer's log-probability. It falls with every token, so long answers are deferred."""

    def confidence(self, answers: Sequence[Answer]) -> Floats:
        return _each(answer.logprobs.sum() for answer in answers)


@dataclass(frozen=True)
class ChowAverage(DeferralRule):
    """mean_t log p(y_t), nats per token. Short answers scatter more, so that they come first and last."""

    def confidence(self, answers: Sequence[Answer]) -> Floats:
        return _each(answer.logprobs.mean() for answer in answers)


@method(
    name="Chow-Quantile",
    arxiv="2404.10136",
    access="gray",
    summary="defers an answer by a quantile of its tokens' log-probabilities",
)
@dataclass(frozen=True)
class ChowQuantile(DeferralRule):
    """The alpha-quantile of {log p(y_t)}, nats, linear between neighbours; alpha 0 is the weakest token, 1 the surest.

    The minimum of more tokens is lower and their maximum higher, so that only quantiles near the middle are neutral
    towards length. Of an answer of one token all are its log-probability.

    Args:
        alpha: the best depends on the task; choose it on answers that are not the test's. 0 is a strong default.

    Raises:
        ValueError: alpha is not from 0 to 1.

    Source: Language Model Cascades, arXiv:2404.10136, section 3.
    """

    alpha: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")

    def confidence(self, answers: Sequence[Answer]) -> Floats:
        return _each(quantiles(answer.logprobs, [self.alpha])[0] for answer in answers)


def quantiles(logprobs: Floats, levels: Sequence[float] | Floats) -> Floats:
    """Quantiles [A] at the levels [A] of log-probabilities [T], linear between neighbours; some may be -inf."""
    ordered = np.sort(logprobs)
    place = np.asarray(levels, dtype=np.float64) * (len(ordered) - 1)
    below = np.floor(place).astype(int)
    above, share = np.minimum(below + 1, len(ordered) - 1), place - below
    # Where the share is 0 the upper neighbour has no say, though 0 times -inf is NaN.
    with np.errstate(invalid="ignore"):
        mixed = (1 - share) * ordered[below] + share * ordered[above]
    # Rounding must not lead out from between the neighbours, which may be equal.
    result: Floats = np.where(share == 0, ordered[below], np.clip(mixed, ordered[below], ordered[above]))
    return result

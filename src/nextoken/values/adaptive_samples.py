"""Adaptive samples: another one only while it is likely to be better, and no more of those that have begun badly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.generate import Prompt, derived_seed, prompt_tokens
from nextoken.decode.generation import Generation
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.request import Request
from nextoken.decode.scaling import Temperature
from nextoken.decode.transform import Chain, Transform
from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.values._continuations import Continuations, Opening
from nextoken.values.restart import Restart, RestartPredictor


@dataclass(frozen=True)
class Samples:
    """The finished samples of a prompt, what the predictor says of each, and what was spent.

    Args:
        generations: in the order drawn.
        probabilities: r of each, whole: that it is at least as good as a fresh one.
        tokens: drawn in all, those of samples given up midway included.
        evaluation_tokens: fed to a model for the predictions: the question's alone where the predictor's model draws
            the samples and its memory is gone on from, else prompt, response and question.
        given_up: samples that were begun and not finished.
    """

    generations: tuple[Generation, ...]
    probabilities: tuple[float, ...]
    tokens: int
    evaluation_tokens: int
    given_up: int = 0

    @property
    def chosen(self) -> int:
        """Which sample has the highest r, of equals the first."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    @property
    def best(self) -> Generation:
        """The sample of highest r."""
        return self.generations[self.chosen]


def annealed(sample: int) -> float:
    """T = 1 - 2^(1 - k) for sample k = 1, 2, ..: 0 (greedy), 0.5, 0.75, .. The best guess first, then wider.

    Source: Manvi et al., arXiv:2410.02725, section 4; the schedule as it is told there in words.
    """
    return 1.0 - 2.0 ** (1 - sample)


def constant(temperature: float = 1.0) -> Callable[[int], float]:
    """The same temperature for every sample."""
    return lambda sample: temperature


@method(
    name="Adaptive sampling",
    arxiv="2410.02725",
    access="gray",
    summary="samples until one is likely enough to be as good as a fresh one; temperatures that rise from greedy",
)
@torch.no_grad()
def adaptive_samples(
    model: LanguageModel,
    prompt: Prompt,
    predictor: Restart,
    *,
    threshold: float = 0.95,
    most: int = 16,
    temperatures: Callable[[int], float] = annealed,
    transform: Transform | str | None = None,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    seed: int = 0,
) -> Samples:
    """Draw y_1, y_2, .. until max_k r(y_k) >= threshold or k = most; the best is argmax_k r(y_k).

    At a constant temperature the number of samples is geometric with success s = P(r >= threshold), cut off at `most`:
    (1 - (1 - s)^most) / s on average. A threshold of 0 takes one sample, one above 1 takes `most`.

    Samples are drawn one after another: what is saved is tokens, and what is paid is time. With a prompt's first sample
    at temperature 0 a second greedy one would be the same, so do not set all temperatures to 0.

    Args:
        model: draws the samples. If it is the predictor's own, a question goes on from the memory of the sample.
        predictor: of the same vocabulary.
        threshold: between 0 and 1; the prediction hardly ever is 1.
        most: samples at the most.
        temperatures: of the k-th sample, k from 1.
        transform: applied after the temperature, "top_p(0.95)" say.
        prompt, max_tokens, stop: as of `nextoken.generate`.
        seed: sample k draws as the k-th of `generate(n=..)` with this seed does.

    Raises:
        ValueError: a number is out of range, vocabularies differ, or a sample and the question do not fit the context.

    Source: Manvi et al., arXiv:2410.02725, section 4.
    """
    if most < 1 or math.isnan(threshold):
        raise ValueError(f"most must be at least 1 and threshold a number, got {most} and {threshold}")
    spending = _Spending(model, prompt, predictor)
    after = parsed(transform) if isinstance(transform, str) else transform or Chain()
    made: list[Generation] = []
    said: list[float] = []
    while len(made) < most and not (said and max(said) >= threshold):
        request = Request(
            spending.opening.prompt,
            Temperature(temperatures(len(made) + 1)) | after,
            max_tokens,
            _stops(stop),
            derived_seed(seed, len(made)),
        )
        texts = Continuations(spending.opening, [request])
        texts.advance()
        spending.tokens += texts.drawn
        said += spending.asked(texts).tolist()
        made.append(texts.generation(0))
    return spending.samples(made, said)


@method(
    name="Early pruning",
    arxiv="2410.02725",
    access="gray",
    summary="samples begun side by side, of which the likely bad ones are given up after a few tokens",
)
@torch.no_grad()
def pruned_samples(
    model: LanguageModel,
    prompt: Prompt,
    predictor: Restart,
    *,
    n: int = 16,
    at: int = 64,
    share: float = 0.5,
    transform: Transform | str | None = None,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    seed: int = 0,
) -> Samples:
    """Begin n samples, after `at` tokens give up the floor(share n) of lowest r, finish the rest; best is their argmax.

    With a share of 0 nothing is asked midway and it is best of n, on the samples of `generate(n=n)` with this seed.
    Samples that have ended by then are judged as they are, whole.

    Args:
        model, prompt, predictor, max_tokens, stop, seed: as of `adaptive_samples`.
        n: samples begun.
        at: tokens after which to judge.
        share: of the samples to give up, below 1; at least one is left.
        transform: as of `nextoken.generate`.

    Raises:
        ValueError: as of `adaptive_samples`.

    Source: Manvi et al., arXiv:2410.02725, section 4.
    """
    if n < 1 or at < 1 or not 0 <= share < 1:
        raise ValueError(f"n and at must be at least 1 and share from 0 to below 1, got {n}, {at} and {share}")
    spending = _Spending(model, prompt, predictor)
    rule = parsed(transform) if isinstance(transform, str) else transform or Chain()
    requests = [
        Request(spending.opening.prompt, rule, max_tokens, _stops(stop), derived_seed(seed, i)) for i in range(n)
    ]
    texts, dropped = Continuations(spending.opening, requests), math.floor(share * n + 1e-9)
    if dropped:
        texts.advance(most=at)
        midway = spending.asked(texts)
        kept = sorted(midway.argsort(descending=True, stable=True)[: n - dropped].tolist())
        texts.choose(kept, [0] * len(kept))  # none is named twice, so that no seed is needed
    texts.advance()
    spending.tokens += texts.drawn
    said = spending.asked(texts).tolist()
    return spending.samples([texts.generation(i) for i in range(n - dropped)], said, dropped)


class _Spending:
    """The prompt as read by the model, the predictor, and the tokens that both have cost."""

    def __init__(self, model: LanguageModel, prompt: Prompt, predictor: Restart) -> None:
        if predictor.vocab is not model.vocab and predictor.vocab.digest != model.vocab.digest:
            raise ValueError(
                f"the predictor and {model.name} have different vocabularies: train one on a model with the same "
                "tokenizer"
            )
        self.predictor, self.opening = predictor, Opening(model, prompt_tokens(model, prompt))
        self.tokens = self.evaluation_tokens = 0

    def asked(self, texts: Continuations) -> Tensor:
        """r of all rows as they stand."""
        responses = [tuple(row.tokens) for row in texts.rows]
        if isinstance(self.predictor, RestartPredictor) and self.predictor.model is texts.model:
            self._check_room(texts.state.lengths, self.predictor)
            self.evaluation_tokens += len(responses) * len(self.predictor.question.tokens)
            return self.predictor.ask(texts.state).stay
        if isinstance(self.predictor, RestartPredictor):
            self._check_room([len(self.opening.prompt) + len(response) for response in responses], self.predictor)
        self.evaluation_tokens += self.predictor.cost(self.opening.prompt, responses)
        return self.predictor.probabilities(self.opening.prompt, responses)

    def _check_room(self, lengths: Sequence[int], predictor: RestartPredictor) -> None:
        limit, needed = predictor.model.context_length, max(lengths) + len(predictor.question.tokens)
        if limit is not None and needed > limit:
            raise ValueError(
                f"prompt, sample and question have {needed} tokens and the context of {predictor.model.name} holds "
                f"{limit}: lower max_tokens"
            )

    def samples(self, made: Sequence[Generation], said: Sequence[float], given_up: int = 0) -> Samples:
        return Samples(tuple(made), tuple(said), self.tokens, self.evaluation_tokens, given_up)


def _stops(stop: str | Sequence[str]) -> tuple[bytes, ...]:
    return tuple(text.encode() for text in ([stop] if isinstance(stop, str) else stop))

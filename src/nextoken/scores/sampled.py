"""Uncertainty from several answers to one prompt: how probable they are, and what they mean.

    answers = nextoken.generate(model, prompts, n=10, seed=1)
    samples = Samples(Signature.concat(a.signature for a in answers), [10] * len(prompts))
    nextoken.score(signature, "semantic_entropy", samples=samples, equivalence=entailing(nli))

The scores judge a prompt by its samples and take no notice of the text beside which they are given. What means the same
is pluggable, by default equal words; with `prompted=True` answers are compared with the prompt before each. Entropies
are unbiased only for samples drawn from the model's own distribution, neither cut nor heated, and with their end tokens
scored (`Generation.signature` does so). Every answer counts, empty ones too; where one has no token that was scored,
not even its end, its probability is unknown and so is the entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from nextoken.scores.meaning import Relation, components, same_words, sets
from nextoken.scores.samples import Samples
from nextoken.scores.score import Given, register

_SAMPLES = ("samples",)


@register(
    "sequence_entropy",
    needs=_SAMPLES,
    high="uncertain",
    summary="mean surprisal of sampled answers",
    arxiv="2002.07650",
)
def sequence_entropy(given: Given) -> np.ndarray:
    """-(1/M) sum_j log p(s_j) [T], nats: a Monte-Carlo estimate of the entropy of the answers.

    MonteCarloSequenceEntropy of lm-polygraph, predictive entropy elsewhere.

    Source: Uncertainty Estimation in Autoregressive Structured Prediction, arXiv:2002.07650, section 3.
    """
    samples = _samples(given)
    return -samples.mean(samples.logprobs)


@register(
    "sequence_entropy_per_token",
    needs=_SAMPLES,
    high="uncertain",
    summary="mean surprisal per token of sampled answers",
    arxiv="2002.07650",
)
def sequence_entropy_per_token(given: Given) -> np.ndarray:
    """-(1/M) sum_j log p(s_j) / n_j [T], nats per token; n_j counts what log p(s_j) sums over, an end token included.

    MonteCarloNormalizedSequenceEntropy of lm-polygraph, whose lengths leave out the end token and its log p does not.

    Source: Uncertainty Estimation in Autoregressive Structured Prediction, arXiv:2002.07650, section 3.
    """
    samples = _samples(given)
    rows = samples.rows
    return -samples.mean(rows.mean(rows["logprob"]))


@register(
    "semantic_entropy",
    needs=_SAMPLES,
    high="uncertain",
    summary="mean surprisal of the meanings of sampled answers",
    arxiv="2302.09664",
)
def semantic_entropy(
    given: Given, *, equivalence: Relation = same_words, prompted: bool = False, distinct: bool = True
) -> np.ndarray:
    """-(1/M) sum_j log P(C(s_j)) [T], nats, P(C) = sum of p(s) over the different answers of set C.

    Answers of equal tokens are one event, however often drawn, so that P(C) never exceeds the meaning's probability.

    Args:
        equivalence: which answers mean the same; sets are formed by `meaning.sets`.
        prompted: compare the answers with their prompts before them.
        distinct: False adds the probability of an answer each time it was drawn, as lm-polygraph's default does.

    Source: Semantic Uncertainty, arXiv:2302.09664, section 4 (there the mean is over sets, here over answers).
    """

    def measure(related: np.ndarray, logprobs: np.ndarray, tokens: list[tuple[int, ...]]) -> float:
        total = 0.0
        for members in sets(related):
            kept = {tokens[j]: j for j in members}.values() if distinct else members
            total += len(members) * float(log_sum(logprobs[[*kept]]))
        return -total / len(logprobs)

    return _by_meaning(_samples(given), equivalence, prompted, measure, least=1)


@register(
    "normalised_semantic_entropy",
    needs=_SAMPLES,
    high="uncertain",
    summary="entropy of the meanings of sampled answers, by their share of the probability seen",
    arxiv="2302.09664",
)
def normalised_semantic_entropy(
    given: Given, *, equivalence: Relation = same_words, prompted: bool = False
) -> np.ndarray:
    """-sum_C P(C) log P(C) [T], nats, P(C) = sum of p(s) over its different answers / the same over all sets.

    From 0 to the log of the number of sets, and the exact entropy of the meaning once every possible answer was drawn.
    NaN with fewer than two answers, and where all are impossible.

    Source: Semantic Uncertainty, arXiv:2302.09664; normalised as in Farquhar et al., Nature 630 (2024), without its
    division by lengths.
    """

    def measure(related: np.ndarray, logprobs: np.ndarray, tokens: list[tuple[int, ...]]) -> float:
        mass = np.array([log_sum(logprobs[[*{tokens[j]: j for j in members}.values()]]) for members in sets(related)])
        with np.errstate(invalid="ignore"):
            return entropy_of(np.exp(mass - log_sum(mass)))

    return _by_meaning(_samples(given), equivalence, prompted, measure)


@register(
    "discrete_semantic_entropy",
    needs=_SAMPLES,
    high="uncertain",
    summary="entropy of the meanings of sampled answers, by how often each was drawn",
    access="black",
)
def discrete_semantic_entropy(
    given: Given, *, equivalence: Relation = same_words, prompted: bool = False
) -> np.ndarray:
    """-sum_C (|C|/M) log(|C|/M) [T], nats: what can be said without probabilities. NaN with fewer than two answers.

    Source: Farquhar et al., Detecting hallucinations using semantic entropy, Nature 630 (2024).
    """

    def measure(related: np.ndarray, logprobs: np.ndarray, tokens: list[tuple[int, ...]]) -> float:
        return entropy_of(np.array([len(members) for members in sets(related)]) / len(related))

    return _by_meaning(_samples(given), equivalence, prompted, measure)


@register(
    "semantic_sets",
    needs=_SAMPLES,
    high="uncertain",
    summary="how many meanings sampled answers have",
    arxiv="2305.19187",
    access="black",
)
def semantic_sets(given: Given, *, equivalence: Relation = same_words, prompted: bool = False) -> np.ndarray:
    """Connected parts of the graph of answers that mean the same [T], from 1 to M; NaN with fewer than two answers.

    Args:
        equivalence: of which both directions must hold; the paper's is `consistent(nli)`.

    Source: Generating with Confidence, arXiv:2305.19187, section 4.
    """
    return _by_meaning(_samples(given), equivalence, prompted, lambda related, *_: components(related))


@register(
    "label_prob", needs=_SAMPLES, high="certain", summary="share of sampled answers in the largest set", access="black"
)
def label_prob(given: Given, *, equivalence: Relation = same_words, prompted: bool = False) -> np.ndarray:
    """max_C |C| / M [T], the share of the commonest meaning; NaN with fewer than two answers.

    LabelProb of lm-polygraph is 1 less this.
    """
    return _by_meaning(
        _samples(given), equivalence, prompted, lambda related, *_: max(map(len, sets(related))) / len(related)
    )


def _samples(given: Given) -> Samples:
    assert given.samples is not None
    return given.samples


def _by_meaning(
    samples: Samples,
    equivalence: Relation,
    prompted: bool,
    measure: Callable[[np.ndarray, np.ndarray, list[tuple[int, ...]]], float],
    *,
    least: int = 2,
) -> np.ndarray:
    """A measure (relation, log p, tokens) of the answers of each prompt [T]; NaN with fewer than `least` of them."""
    relations = samples.compared(equivalence, prompted=prompted)
    logprobs = samples.grouped(samples.logprobs.tolist())
    each = zip(relations, logprobs, samples.tokens, strict=True)
    return np.array([measure(r.astype(bool), np.array(p), t) if len(r) >= least else math.nan for r, p, t in each])


def log_sum(values: np.ndarray) -> np.ndarray:
    """log sum exp over the last axis, NaN where one is NaN."""
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.logaddexp.reduce(values, axis=-1)
        return found


def entropy_of(shares: np.ndarray) -> float:
    """-sum p log p over the positive ones, NaN if one is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(-np.where(shares == 0, 0.0, shares * np.log(shares)).sum()) + 0.0

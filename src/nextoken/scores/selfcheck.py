"""SelfCheckGPT: how little the sentences of a text are borne out by other answers to its prompt. Needs text only.

Each variant gives numbers per sentence, high where a sentence is likely made up; the registered scores are the mean
over the sentences of each text. It measures agreement, not truth: what a model errs in every time is not seen. The text
itself must not be among the samples.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from nextoken.scores.meaning import Nli, supported
from nextoken.scores.score import Given, register
from nextoken.scores.similarity import Similarity, rouge_1, words

if TYPE_CHECKING:
    from nextoken.model.base import LanguageModel

Split: TypeAlias = Callable[[str], list[str]]
"""A text -> its sentences."""
Ask: TypeAlias = Callable[[list[str]], Sequence[str]]
"""Prompts -> an answer to each."""

PROMPT = (
    "Context: {context}\n\nSentence: {sentence}\n\n"
    "Is the sentence supported by the context above? Answer Yes or No.\n\nAnswer: "
)
"""The question of the prompt variant, as in the paper."""

_END = re.compile(r"""(?<=[.!?])\s+|(?<=[.!?]["')\]])\s+|\n+""")
_EMPTY = "\0"
"""In place of the words before a sentence."""


def sentences(text: str) -> list[str]:
    """Sentences end at . ! ? before white space, and at line ends; abbreviations are not known."""
    return [found for part in _END.split(text) if (found := part.strip())]


def ngram_surprisals(
    parts: Sequence[str], samples: Sequence[str], *, n: int = 1, split: Split = sentences
) -> list[np.ndarray]:
    """-log p(w) of the words of each sentence, nats: p(w) = count(n-gram ending in w) / count(all n-grams).

    Counted over the sentences of the samples and, once, of the text itself, so that nothing is impossible; words of
    `similarity.words`. Before a sentence stand n - 1 signs for its beginning. For n > 1 p is the joint frequency, as in
    the official code, not a conditional.

    Args:
        parts: sentences of the text.
        samples: other answers.
        n: length of the n-grams.
        split: what cuts the samples into sentences.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")

    def grams(sentence: str) -> list[tuple[str, ...]]:
        line = [_EMPTY] * (n - 1) + words(sentence)
        return [tuple(line[i : i + n]) for i in range(len(line) - n + 1)]

    own = [grams(part) for part in parts]
    counts = Counter(gram for sample in samples for part in split(sample) for gram in grams(part))
    counts.update(gram for part in own for gram in part)
    total = counts.total()
    return [np.array([math.log(total / counts[gram]) for gram in part]) for part in own]


def similarity_inconsistency(
    parts: Sequence[str],
    samples: Sequence[str],
    *,
    similarity: Similarity,
    split: Split = sentences,
    least_words: int = 4,
) -> np.ndarray:
    """1 - (1/N) sum_n max_k g(r_i, s^n_k) [m] of sentences r, s^n_k the k-th sentence of sample n; NaN without samples.

    Args:
        similarity: g; the paper's is BERTScore (`similarity.token_matched`).
        least_words: shorter sentences of the samples are left out; a sample with no other bears out nothing.
    """
    best = []
    for sample in samples:
        others = [other for other in split(sample) if len(words(other)) >= least_words]
        best.append(similarity(parts, others).max(1) if others and parts else np.zeros(len(parts)))
    return 1 - np.mean(best, axis=0) if best else np.full(len(parts), math.nan)


def nli_inconsistency(
    parts: Sequence[str], samples: Sequence[str], *, nli: Nli, sentence_first: bool = False
) -> np.ndarray:
    """(1/N) sum_n P(contradiction) / (P(entailment) + P(contradiction)) [m]; NaN without samples.

    Args:
        nli: judge of pairs.
        sentence_first: the sentence is the premise, as in the official code; by default the sample is, as in the paper.
    """
    if not samples:
        return np.full(len(parts), math.nan)
    judge = supported(nli)
    agreement = judge(parts, samples) if sentence_first else judge(samples, parts).T
    found: np.ndarray = 1 - agreement.mean(1)
    return found


def prompt_inconsistency(
    parts: Sequence[str], samples: Sequence[str], *, ask: Ask, template: str = PROMPT
) -> np.ndarray:
    """(1/N) sum_n a(r_i, s^n) [m], a = 0 for an answer that begins with yes, 1 with no, else 1/2; NaN without samples.

    Args:
        ask: a model, or a service, that answers prompts: `asking(model)`.
        template: with {context} and {sentence}.

    Raises:
        ValueError: `ask` gives more or fewer answers than it was asked for.
    """
    if not samples:
        return np.full(len(parts), math.nan)
    questions = [
        template.format(context=sample.replace("\n", " "), sentence=part) for part in parts for sample in samples
    ]
    answers = [answer.strip().casefold() for answer in ask(questions)] if questions else []
    if len(answers) != len(questions):
        raise ValueError(f"{len(questions)} prompts were asked and {len(answers)} answers came: give one per prompt")
    said = [0.0 if answer.startswith("yes") else 1.0 if answer.startswith("no") else 0.5 for answer in answers]
    found: np.ndarray = np.array(said).reshape(len(parts), len(samples)).mean(1)
    return found


def asking(model: LanguageModel | str | Path, *, max_tokens: int = 5, chat: bool = False) -> Ask:
    """Greedy answers of a model.

    Args:
        model: a model, or what `nextoken.load` takes.
        max_tokens: most tokens of an answer.
        chat: lay prompts out by the tokenizer's chat template.
    """

    def ask(prompts: list[str]) -> list[str]:
        from nextoken.decode.generate import Prompt, generate

        laid: list[Prompt] = [[{"role": "user", "content": prompt}] if chat else prompt for prompt in prompts]
        made = generate(model, laid, transform="greedy", max_tokens=max_tokens, seed=0)
        return [answer.text for answer in (made if isinstance(made, list) else [made])]

    return ask


@register(
    "selfcheck_ngram",
    needs=("samples",),
    high="uncertain",
    summary="mean surprisal of the words under the n-grams of other answers",
    arxiv="2303.08896",
    access="black",
)
def selfcheck_ngram(given: Given, *, n: int = 1, split: Split = sentences) -> np.ndarray:
    """Mean of -log p(w) over the words of the text [T], nats, p of `ngram_surprisals`; NaN without samples or words.

    Source: SelfCheckGPT, arXiv:2303.08896, section 5.3.
    """
    return _per_text(given, split, lambda parts, samples: _joined(ngram_surprisals(parts, samples, n=n, split=split)))


@register(
    "selfcheck_ngram_max",
    needs=("samples",),
    high="uncertain",
    summary="surprisal of each sentence's least likely word under the n-grams of other answers",
    arxiv="2303.08896",
    access="black",
)
def selfcheck_ngram_max(given: Given, *, n: int = 1, split: Split = sentences) -> np.ndarray:
    """Mean over the sentences of max_w -log p(w) [T], nats, p of `ngram_surprisals`; NaN without samples or words.

    Source: SelfCheckGPT, arXiv:2303.08896, section 5.3.
    """
    return _per_text(
        given,
        split,
        lambda parts, samples: np.array(
            [part.max() for part in ngram_surprisals(parts, samples, n=n, split=split) if len(part)]
        ),
    )


@register(
    "selfcheck_similarity",
    needs=("samples",),
    high="uncertain",
    summary="how unlike the sentences are to the likest sentences of other answers",
    arxiv="2303.08896",
    access="black",
)
def selfcheck_similarity(given: Given, *, similarity: Similarity = rouge_1, split: Split = sentences) -> np.ndarray:
    """Mean over the sentences of `similarity_inconsistency` [T]; with `token_matched(encoder)` SelfCheck-BERTScore.

    Source: SelfCheckGPT, arXiv:2303.08896, section 5.1.
    """
    return _per_text(
        given,
        split,
        lambda parts, samples: similarity_inconsistency(parts, samples, similarity=similarity, split=split),
    )


@register(
    "selfcheck_nli",
    needs=("samples",),
    high="uncertain",
    summary="how far other answers contradict the sentences",
    arxiv="2303.08896",
    access="black",
)
def selfcheck_nli(given: Given, *, nli: Nli, sentence_first: bool = False, split: Split = sentences) -> np.ndarray:
    """Mean over the sentences of `nli_inconsistency` [T].

    Source: SelfCheckGPT, arXiv:2303.08896, section 5.4.
    """
    return _per_text(
        given, split, lambda parts, samples: nli_inconsistency(parts, samples, nli=nli, sentence_first=sentence_first)
    )


@register(
    "selfcheck_prompt",
    needs=("samples",),
    high="uncertain",
    summary="how often a model says that other answers do not support the sentences",
    arxiv="2303.08896",
    access="black",
)
def selfcheck_prompt(given: Given, *, ask: Ask, template: str = PROMPT, split: Split = sentences) -> np.ndarray:
    """Mean over the sentences of `prompt_inconsistency` [T].

    Source: SelfCheckGPT, arXiv:2303.08896, section 5.5.
    """
    return _per_text(
        given, split, lambda parts, samples: prompt_inconsistency(parts, samples, ask=ask, template=template)
    )


def _per_text(given: Given, split: Split, measure: Callable[[list[str], list[str]], np.ndarray]) -> np.ndarray:
    """Means of a measure (sentences, samples) -> numbers [T]; NaN for a text without sentences or samples."""
    assert given.samples is not None
    found = []
    for number, samples in enumerate(given.samples.texts):
        parts = split(given.signature.text(number))
        values = measure(parts, samples) if parts and samples else np.zeros(0)
        found.append(float(values.mean()) if len(values) else math.nan)
    return np.array(found)


def _joined(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *values])

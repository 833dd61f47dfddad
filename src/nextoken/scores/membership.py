"""Membership inference: was this text in the training data? Every score here is high for a member.

l_t is the log-probability of the token that came, L(x) = (1/n) sum_t l_t, nats. The plainest attack, the loss, is the
score `mean_logprob`. Some published code reports the negatives of these. On members and non-members of one distribution
all of them are weak (areas under the curve of 0.5 to 0.6 on models of the usual training); sets that differ in date,
topic or author are told apart without any model, so put a model-free score beside each result.
"""

from __future__ import annotations

import zlib as compression

import numpy as np

from nextoken.scores.perturbation import check_variants
from nextoken.scores.rows import Rows
from nextoken.scores.samples import Samples
from nextoken.scores.score import Given, register
from nextoken.signature.signature import Signature

_FLOOR = 1e-3
"""Least deviation of l_t, nats, by which Min-K%++ divides: below it a distribution is a point mass up to rounding."""


@register(
    "zlib",
    columns=("logprob",),
    high="member",
    summary="mean log-probability over the size of the compressed text",
    arxiv="2012.07805",
)
def zlib(given: Given) -> np.ndarray:
    """L(x) / len(zlib(x)) [T], nats per byte; x in UTF-8, zlib at its default level.

    Source: Carlini et al., arXiv:2012.07805, section 6.1.
    """
    signature = given.signature
    size = [len(compression.compress(signature.text_bytes(number))) for number in range(signature.n_texts)]
    return _mean(signature) / np.array(size, dtype=np.float64)


@register(
    "lowercase",
    columns=("logprob",),
    high="member",
    summary="log-perplexity of the text in lower case over that of the text",
    arxiv="2012.07805",
)
def lowercase(given: Given, *, lowered: Signature) -> np.ndarray:
    """L(lower(x)) / L(x) [T]: how much more surprising the text is once its capitals are gone.

    Args:
        lowered: `read(model, [text.lower() for text in texts])`.

    Source: Carlini et al., arXiv:2012.07805, section 6.1.
    """
    return _ratio(_beside(given, lowered), _mean(given.signature))


@register(
    "reference",
    columns=("logprob",),
    needs=("reference",),
    reference_columns=("logprob",),
    high="member",
    summary="mean log-probability beyond that under a reference model",
    arxiv="2012.07805",
)
def reference(given: Given) -> np.ndarray:
    """L(x) - L_ref(x) [T], each per token of its own model.

    The reference should be trained on like data, without the text. Some code divides the two log-perplexities instead.

    Source: Carlini et al., arXiv:2012.07805, section 6.1, as a difference (MIMIR and Min-K% code).
    """
    assert given.reference is not None
    gap: np.ndarray = _mean(given.signature) - _mean(given.reference)
    return gap


@register(
    "min_k",
    columns=("logprob",),
    high="member",
    summary="mean of the smallest log-probabilities of the text",
    arxiv="2310.16789",
)
def min_k(given: Given, *, share: float = 0.2) -> np.ndarray:
    """Mean of the max(1, floor(share n)) smallest l_t of each text [T], nats.

    Published code takes int(share n) tokens, which is none of a short text, and so no number.

    Raises:
        ValueError: share is not above 0 and at most 1.

    Source: Min-K% Prob, arXiv:2310.16789, section 3.
    """
    return given.rows.lowest(given.rows["logprob"], share)


@register(
    "min_k_plus_plus",
    columns=("logprob", "entropy", "varentropy"),
    high="member",
    summary="mean of the smallest standardised log-probabilities",
    arxiv="2404.02936",
)
def min_k_plus_plus(given: Given, *, share: float = 0.2) -> np.ndarray:
    """Mean of the max(1, floor(share n)) smallest (l_t + H_t) / sqrt(Var_t) of each text [T].

    -H_t and Var_t are mean and variance of log p under p. The deviation is taken to be at least 0.001 nats: at places
    of less, where the model leaves no choice, l_t + H_t is rounding if the expected token came, and the division would
    blow it up.

    Raises:
        ValueError: share is not above 0 and at most 1.

    Source: Min-K%++, arXiv:2404.02936, section 4.
    """
    rows = given.rows
    deviation = np.maximum(np.sqrt(np.maximum(rows["varentropy"], 0.0)), _FLOOR)
    return rows.lowest((rows["logprob"] + rows["entropy"]) / deviation, share)


@register(
    "neighbourhood",
    columns=("logprob",),
    high="member",
    summary="mean log-probability beyond that of the text's variants",
    arxiv="2305.18462",
)
def neighbourhood(given: Given, *, variants: Samples) -> np.ndarray:
    """L(x) - mean_k L(x_k) [T], x_k the variants.

    Of a text that a machine wrote, the same number is DetectGPT's unnormalised statistic.

    Args:
        variants: from `nextoken.scores.perturbation.read_variants`, by the same model.

    Source: Mattern et al., arXiv:2305.18462, section 3.
    """
    check_variants(given, variants)
    gap: np.ndarray = _mean(given.signature) - variants.mean(_mean(variants.signature))
    return gap


@register(
    "recall",
    columns=("logprob",),
    high="member",
    summary="log-probability after a prefix of non-members over that without",
    arxiv="2406.15968",
)
def recall(given: Given, *, prefixed: Signature) -> np.ndarray:
    """L(x | prefix) / L(x) [T].

    A prefix of texts that were certainly not trained on helps with texts of their kind and disturbs those known by
    heart. It must not resemble the non-members under test more than the members: then it measures the resemblance.

    Args:
        prefixed: `read(model, texts, prompts=[prefix] * len(texts))`.

    Source: ReCaLL, arXiv:2406.15968, section 3.
    """
    return _ratio(_beside(given, prefixed), _mean(given.signature))


def _mean(signature: Signature) -> np.ndarray:
    """L(x) [T]."""
    rows = Rows(signature)
    return rows.mean(rows["logprob"])


def _beside(given: Given, other: Signature) -> np.ndarray:
    """L of the same texts read in another way [T]."""
    if other.n_texts != given.signature.n_texts:
        raise ValueError(
            f"{other.n_texts} texts beside {given.signature.n_texts}: read the same texts, in the same order"
        )
    return _mean(other)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotient [T]; NaN for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: np.ndarray = above / below
    return quotient

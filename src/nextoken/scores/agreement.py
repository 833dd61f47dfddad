"""Agreement: uncertainty from how far several answers to one prompt are alike, two by two.

What compares answers is pluggable: by default a similarity of words or characters, better one of a model
(`similarity.paired`, `meaning.graded(nli)`), with `prompted=True` with the prompt before each answer. `cocoa` compares
them with the text beside which they are given; of that the other scores take no notice. One answer alone agrees with
nothing and gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from nextoken.scores.meaning import Nli, supported
from nextoken.scores.sampled import entropy_of
from nextoken.scores.samples import Samples
from nextoken.scores.score import Given, find, register
from nextoken.scores.similarity import Similarity, character_ngrams, rouge_l

_SAMPLES = ("samples",)


@register(
    "lexical_similarity",
    needs=_SAMPLES,
    high="certain",
    summary="mean similarity of pairs of sampled answers",
    arxiv="2005.10608",
    access="black",
)
def lexical_similarity(given: Given, *, similarity: Similarity = rouge_l, prompted: bool = False) -> np.ndarray:
    """(1 / (M (M - 1))) sum_{i != j} g(s_i, s_j) [T]; NaN with fewer than two answers.

    LexicalSimilarity of lm-polygraph is its negative, with stemmed words.

    Source: Unsupervised Quality Estimation for NMT, arXiv:2005.10608, section 3 (there by METEOR).
    """
    return _by_agreement(_samples(given), similarity, prompted, _mean_off_diagonal)


@register(
    "degree_matrix",
    needs=_SAMPLES,
    high="uncertain",
    summary="mean distance of sampled answers, each from itself included",
    arxiv="2305.19187",
    access="black",
)
def degree_matrix(given: Given, *, similarity: Similarity = character_ngrams, prompted: bool = False) -> np.ndarray:
    """trace(M I - D) / M^2 = 1 - (1/M^2) sum_ij W_ij [T], W = (g + g^T) / 2, D its row sums: DegMat of lm-polygraph.

    Source: Generating with Confidence, arXiv:2305.19187, section 4.
    """
    return _by_agreement(_samples(given), similarity, prompted, lambda graph: 1 - float(graph.mean()))


@register(
    "laplacian_eigenvalues",
    needs=_SAMPLES,
    high="uncertain",
    summary="how many meanings sampled answers have, by degrees",
    arxiv="2305.19187",
    access="black",
)
def laplacian_eigenvalues(
    given: Given, *, similarity: Similarity = character_ngrams, prompted: bool = False
) -> np.ndarray:
    """sum_k max(0, 1 - lambda_k) [T], lambda the eigenvalues of L = I - D^(-1/2) W D^(-1/2), W = (g + g^T) / 2.

    The number of sets where similarities are 0 and 1. EigValLaplacian of lm-polygraph.

    Source: Generating with Confidence, arXiv:2305.19187, section 4.
    """

    def measure(graph: np.ndarray) -> float:
        values, _ = _spectrum(graph)
        return float(np.maximum(0, 1 - values).sum())

    return _by_agreement(_samples(given), similarity, prompted, measure)


@register(
    "eccentricity",
    needs=_SAMPLES,
    high="uncertain",
    summary="spread of sampled answers about their centre",
    arxiv="2305.19187",
    access="black",
)
def eccentricity(
    given: Given, *, similarity: Similarity = character_ngrams, threshold: float = 0.9, prompted: bool = False
) -> np.ndarray:
    """(sum_j |v_j - mean v|^2)^(1/2) [T], v_j the entries at answer j of the eigenvectors of L with lambda < threshold.

    L as in `laplacian_eigenvalues`. It equals (k - |P 1|^2 / M)^(1/2), P the projection on those k eigenvectors, so
    that the choice of a basis among equal eigenvalues does not show. From 0 to (M - 1)^(1/2).

    Source: Generating with Confidence, arXiv:2305.19187, section 4; threshold as in lm-polygraph.
    """

    def measure(graph: np.ndarray) -> float:
        values, vectors = _spectrum(graph)
        chosen = vectors[:, values < threshold]
        return math.sqrt(max(0.0, chosen.shape[1] - float(np.square(chosen.sum(0)).sum()) / len(graph)))

    return _by_agreement(_samples(given), similarity, prompted, measure)


@register(
    "kernel_language_entropy",
    needs=_SAMPLES,
    high="uncertain",
    summary="von Neumann entropy of a heat kernel over sampled answers",
    arxiv="2405.20003",
    access="black",
)
def kernel_language_entropy(
    given: Given, *, similarity: Similarity = character_ngrams, time: float = 0.3, prompted: bool = False
) -> np.ndarray:
    """-tr(K log K) / log M [T], from 0 to 1, K_ij = E_ij / (E_ii E_jj)^(1/2) / M, E = exp(-time L), L = D - W.

    W = g + g^T, the weights of both directions. With `graded(nli)` as g they are the paper's: 1, 1/2 and 0 for
    entailment, neutral and contradiction.

    Args:
        time: how far heat spreads; with 0 every answer stands alone and the entropy is 1.

    Source: Kernel Language Entropy, arXiv:2405.20003, section 4; divided by log M as in lm-polygraph.
    """
    if time < 0:
        raise ValueError(f"time must be 0 or more, got {time}")

    def measure(graph: np.ndarray) -> float:
        weights = 2 * graph
        values, vectors = np.linalg.eigh(np.diag(weights.sum(1)) - weights)
        heat = (vectors * np.exp(-time * values)) @ vectors.T
        scale = np.sqrt(np.diag(heat))
        kernel = heat / np.outer(scale, scale) / len(graph)
        return entropy_of(np.maximum(np.linalg.eigvalsh(kernel), 0.0)) / math.log(len(graph))

    return _by_agreement(_samples(given), similarity, prompted, measure)


@register(
    "luq",
    needs=_SAMPLES,
    high="uncertain",
    summary="how little sampled answers support each other, by entailment",
    arxiv="2403.20279",
    access="black",
)
def luq(given: Given, *, nli: Nli, prompted: bool = False) -> np.ndarray:
    """1 - (1 / (M (M - 1))) sum_{i != j} P(entailment) / (P(entailment) + P(contradiction)) [T] of s_i and s_j.

    Of whole answers, as in lm-polygraph; the paper splits one of each pair into sentences.

    Args:
        nli: judge of pairs, such as `meaning.classifier(model, tokenizer)`.

    Source: LUQ, arXiv:2403.20279, section 3.
    """
    return 1 - _by_agreement(_samples(given), supported(nli), prompted, _mean_off_diagonal)


@register(
    "cocoa",
    needs=_SAMPLES,
    high="uncertain",
    summary="uncertainty of the text times its distance from sampled answers",
    arxiv="2502.04964",
)
def cocoa(given: Given, *, similarity: Similarity = character_ngrams, of: str = "sequence_surprisal") -> np.ndarray:
    """u(x) * (1/M) sum_j (1 - g(x, s_j)) [T], u an uncertainty of the text x itself; NaN without answers.

    Args:
        of: name of u: `sequence_surprisal` for CoCoA-MSP, `mean_entropy` for CoCoA-MTE.

    Raises:
        ValueError: `of` is no score per text of which a high value is uncertain.

    Source: CoCoA, arXiv:2502.04964, section 3.
    """
    own = find(of)
    if own.high != "uncertain" or own.per != "text":
        raise ValueError(f"of must be a score per text that is high where it is uncertain, and {of!r} is not")
    distances = [
        1 - float(np.mean(similarity([given.signature.text(i)], texts))) if texts else math.nan
        for i, texts in enumerate(_samples(given).texts)
    ]
    found: np.ndarray = own(given) * np.array(distances)
    return found


def _samples(given: Given) -> Samples:
    assert given.samples is not None
    return given.samples


def _by_agreement(
    samples: Samples, similarity: Similarity, prompted: bool, measure: Callable[[np.ndarray], float]
) -> np.ndarray:
    """A measure of the symmetric graph [M, M] of the answers of each prompt [T].

    NaN with fewer than two answers, of which nothing can be compared, and where a similarity is not a finite number.
    """
    graphs = [(found + found.T) / 2 for found in samples.compared(similarity, prompted=prompted)]
    return np.array([measure(g) if len(g) >= 2 and np.isfinite(g).all() else math.nan for g in graphs])


def _mean_off_diagonal(graph: np.ndarray) -> float:
    return float((graph.sum() - np.trace(graph)) / (len(graph) * (len(graph) - 1)))


def _spectrum(graph: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of I - D^(-1/2) W D^(-1/2); an answer unlike all, even itself, stands alone."""
    degrees = graph.sum(1)
    alone = degrees <= 0
    scale = 1 / np.sqrt(np.where(alone, 1.0, degrees))
    values, vectors = np.linalg.eigh(np.diag(1.0 - alone) - scale[:, None] * graph * scale)
    return values, vectors

"""Graphs of sampled answers: formulas by independent means, their limits, CoCoA."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import expm, logm

import nextoken
from answers import DIGITS, blank, matrix_similarity, samples_of
from nextoken.scores import Samples
from nextoken.scores.similarity import exact, jaccard

SIZES = st.integers(2, 6)
SEEDS = st.integers(0, 10_000)


def graph_score(name: str, values: np.ndarray, **options: object) -> float:
    """A score of answers of which everything known is how alike they are."""
    similarity = matrix_similarity(values)
    return float(nextoken.score(ONE, name, samples=digits(len(values)), similarity=similarity, **options)[0])


@cache
def digits(size: int) -> Samples:
    return samples_of(DIGITS, [[str(i) for i in range(size)]])


ONE = blank(DIGITS, 1)


def likeness(size: int, seed: int) -> np.ndarray:
    """Any similarities, not symmetric, 1 on the diagonal."""
    values = np.random.default_rng(seed).random((size, size))
    np.fill_diagonal(values, 1.0)
    return values


def blocks(sizes: list[int]) -> np.ndarray:
    label = np.repeat(np.arange(len(sizes)), sizes)
    return (label[:, None] == label[None]).astype(float)


@pytest.mark.paper("2005.10608")
@pytest.mark.paper("2305.19187")
@given(SIZES, SEEDS)
def test_means_over_pairs_are_loops(size: int, seed: int) -> None:
    g = likeness(size, seed)
    pairs = [g[i, j] for i in range(size) for j in range(size) if i != j]
    assert graph_score("lexical_similarity", g) == pytest.approx(sum(pairs) / len(pairs))
    assert graph_score("degree_matrix", g) == pytest.approx(1 - sum(map(sum, g)) / size**2)


@pytest.mark.paper("2305.19187")
@given(SIZES, SEEDS)
def test_spectral_scores_are_their_formulas(size: int, seed: int) -> None:
    w = (likeness(size, seed) + likeness(size, seed).T) / 2
    root = np.diag([1 / math.sqrt(sum(row)) for row in w])
    values, vectors = np.linalg.eig(np.eye(size) - root @ w @ root)
    values, vectors = values.real, vectors.real
    assert graph_score("laplacian_eigenvalues", likeness(size, seed)) == pytest.approx(
        sum(max(0.0, 1 - x) for x in values), abs=1e-9
    )
    if min(abs(values - 0.9)) > 1e-6:
        rows = [vectors[j][values < 0.9] for j in range(size)]
        centre = sum(rows) / size
        expected = math.sqrt(sum(float((row - centre) @ (row - centre)) for row in rows))
        assert graph_score("eccentricity", likeness(size, seed)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.paper("2305.19187")
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) > 1))
def test_of_answers_alike_or_not_the_eigenvalues_count_the_sets(sizes: list[int]) -> None:
    g = blocks(sizes)
    assert graph_score("laplacian_eigenvalues", g) == pytest.approx(len(sizes), abs=1e-9)
    assert graph_score("eccentricity", g) == pytest.approx(math.sqrt(len(sizes) - 1), abs=1e-7)


def test_an_answer_like_nothing_stands_alone() -> None:
    """Even a similarity that finds an answer unlike itself does not divide by 0."""
    g = blocks([1, 2])
    g[0, 0] = 0.0
    assert graph_score("laplacian_eigenvalues", g) == pytest.approx(2.0)
    assert math.isfinite(graph_score("eccentricity", g)) and math.isfinite(graph_score("kernel_language_entropy", g))


def test_a_similarity_that_is_unknown_makes_the_score_unknown() -> None:
    g = blocks([1, 2])
    g[0, 1] = math.nan
    for name in (
        "lexical_similarity",
        "degree_matrix",
        "laplacian_eigenvalues",
        "eccentricity",
        "kernel_language_entropy",
    ):
        assert math.isnan(graph_score(name, g))


@pytest.mark.paper("2405.20003")
@given(SIZES, SEEDS, st.floats(0.01, 2))
def test_kernel_language_entropy_is_its_formula(size: int, seed: int, time: float) -> None:
    g = likeness(size, seed)
    w = g + g.T
    heat = expm(-time * (np.diag(w.sum(0)) - w))
    kernel = (
        np.array([[heat[i, j] / math.sqrt(heat[i, i] * heat[j, j]) for j in range(size)] for i in range(size)]) / size
    )
    expected = -np.trace(kernel @ logm(kernel)).real / math.log(size)
    assert graph_score("kernel_language_entropy", g, time=time) == pytest.approx(expected, abs=1e-6)


@pytest.mark.paper("2405.20003")
def test_kernel_language_entropy_at_its_ends() -> None:
    """No heat, or nothing alike: 1. Much heat among like answers: 0; among k equal sets: log k / log M."""
    assert graph_score("kernel_language_entropy", likeness(4, 1), time=0.0) == pytest.approx(1.0)
    assert graph_score("kernel_language_entropy", np.eye(4)) == pytest.approx(1.0)
    assert graph_score("kernel_language_entropy", np.ones((4, 4)), time=50.0) == pytest.approx(0.0, abs=1e-9)
    assert graph_score("kernel_language_entropy", blocks([2, 2]), time=50.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="time"):
        graph_score("kernel_language_entropy", np.eye(3), time=-1.0)


@pytest.mark.paper("2403.20279")
@given(SIZES, SEEDS)
def test_luq_is_a_loop(size: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(size, size, 3))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    def nli(pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.array([chances[int(x), int(y)] for x, y in pairs])

    total = 0.0
    for i in range(size):
        for j in range(size):
            if i != j:
                e, c = math.exp(logits[i, j, 0]), math.exp(logits[i, j, 2])
                total += e / (e + c)
    found = nextoken.score(ONE, "luq", samples=digits(size), nli=nli)
    assert found[0] == pytest.approx(1 - total / (size * (size - 1)))


@pytest.mark.paper("2502.04964")
def test_cocoa_is_the_product_of_its_parts() -> None:
    signature = nextoken.read(DIGITS, ["01", "2"], top=0)
    samples = samples_of(DIGITS, [["01", "10", "3"], []])
    for of in ("sequence_surprisal", "mean_entropy", "perplexity"):
        found = nextoken.score(signature, "cocoa", samples=samples, similarity=exact, of=of)
        assert found[0] == pytest.approx(nextoken.score(signature, of)[0] * 2 / 3)
        assert math.isnan(found[1])
    for of in ("mean_logprob", "token_entropy"):
        with pytest.raises(ValueError, match="per text"):
            nextoken.score(signature, "cocoa", samples=samples, of=of)


def test_the_order_of_answers_does_not_matter() -> None:
    from nextoken.model.table import TableModel

    model = TableModel.random(["a", "b", " "], order=1, seed=3)
    texts = ["a b", "b", "a", "a a b", "bb"]
    there, back = samples_of(model, [texts]), samples_of(model, [texts[::-1]])
    for name in (
        "lexical_similarity",
        "degree_matrix",
        "laplacian_eigenvalues",
        "eccentricity",
        "kernel_language_entropy",
    ):
        one, other = (
            nextoken.score(blank(model, 1), name, samples=samples, similarity=jaccard)[0] for samples in (there, back)
        )
        assert one == pytest.approx(other, abs=1e-9), name

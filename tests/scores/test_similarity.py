"""Similarities of texts against loops, and what every one of them keeps."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nextoken.scores import similarity as sim

BUILT_IN = [sim.exact, sim.character_ngrams, sim.jaccard, sim.rouge_1, sim.rouge_2, sim.rouge_l]
PHRASE = st.lists(st.sampled_from(["the", "The", "cat", "sat", "on", "mat", "é", "-", "?!"]), max_size=7).map(" ".join)
TEXTS = st.lists(st.one_of(PHRASE, st.text("ab \n", max_size=6)), min_size=1, max_size=5)


def by_pairs(a: list[str], b: list[str], measure) -> np.ndarray:  # type: ignore[no-untyped-def]
    return np.array([[measure(x, y) for y in b] for x in a]).reshape(len(a), len(b))


def cosine(x: str, y: str) -> float:
    def features(text: str) -> dict[str, float]:
        line = " ".join(text.casefold().split())
        line = f" {line} " if line else ""
        counts = Counter(line[i : i + n] for n in (2, 3, 4) for i in range(len(line) - n + 1))
        return {gram: 1 + math.log(count) for gram, count in counts.items()}

    f, g = features(x), features(y)
    if not f or not g:
        return float(not f and not g)
    dot = sum(value * g.get(gram, 0.0) for gram, value in f.items())
    return dot / math.sqrt(sum(v * v for v in f.values()) * sum(v * v for v in g.values()))


def subsequence(x: str, y: str) -> float:
    """ROUGE-L by the table of longest common subsequences."""
    a, b = sim.words(x), sim.words(y)
    if not a and not b:
        return 1.0
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in product(range(len(a)), range(len(b))):
        table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / (len(a) + len(b))


def overlap(n: int, x: str, y: str) -> float:
    a, b = ([tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in (sim.words(x), sim.words(y)))
    if not a and not b:
        return 1.0
    return 2 * sum(min(a.count(gram), b.count(gram)) for gram in {*a}) / (len(a) + len(b))


def union(x: str, y: str) -> float:
    a, b = {*sim.words(x)}, {*sim.words(y)}
    return len(a & b) / len(a | b) if a | b else 1.0


@given(TEXTS, TEXTS)
@example(["", " "], ["?!", ""])
@example(["ab", "a" * 80], ["ba", "a" * 3])
def test_built_in_similarities_are_loops(a: list[str], b: list[str]) -> None:
    np.testing.assert_allclose(sim.character_ngrams(a, b), by_pairs(a, b, cosine), atol=1e-12)
    np.testing.assert_allclose(sim.jaccard(a, b), by_pairs(a, b, union))
    np.testing.assert_allclose(sim.rouge_1(a, b), by_pairs(a, b, lambda x, y: overlap(1, x, y)))
    np.testing.assert_allclose(sim.rouge_l(a, b), by_pairs(a, b, subsequence))
    np.testing.assert_allclose(sim.exact(a, b), by_pairs(a, b, lambda x, y: float(x.strip() == y.strip())))


@given(PHRASE, PHRASE)
def test_rouge_2_is_a_loop(x: str, y: str) -> None:
    expected = 1.0 if x == y else overlap(2, x, y)
    assert sim.rouge_2([x], [y])[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize("similarity", BUILT_IN)
@given(texts=TEXTS)
def test_what_every_similarity_keeps(similarity, texts: list[str]) -> None:  # type: ignore[no-untyped-def]
    """1 for a text and itself, exactly; symmetric; from 0 to 1; a pair's number is the same in any company."""
    matrix = similarity(texts, texts)
    assert matrix.shape == (len(texts), len(texts))
    assert (np.diag(matrix) == 1).all() and (matrix >= 0).all() and (matrix <= 1).all()
    np.testing.assert_array_equal(matrix, matrix.T)
    assert similarity([texts[0]], [texts[-1]])[0, 0] == pytest.approx(matrix[0, -1], abs=1e-12)
    assert similarity([], texts).shape == (0, len(texts)) and similarity(texts, []).shape == (len(texts), 0)


def test_texts_beyond_ascii_and_broken_ones() -> None:
    matrix = sim.character_ngrams(["Straße 🙂", "STRASSE 🙂", "x\ud800"], ["strasse 🙂", "x\ud800"])
    np.testing.assert_allclose(matrix[:, 0], [1, 1, 0], atol=1e-12)
    assert matrix[2, 1] == 1


def test_an_encoder_makes_a_similarity_of_cosines() -> None:
    asked: list[list[str]] = []
    vectors = {"x": [1.0, 0.0], "y": [3.0, 4.0], "-x": [-1.0, 0.0], "0": [0.0, 0.0]}

    def encode(texts: list[str]) -> np.ndarray:
        asked.append(texts)
        return np.array([vectors[text] for text in texts])

    found = sim.embedded(encode)(["x", "y", "0"], ["x", "y", "-x"])
    np.testing.assert_allclose(found, [[1, 0.6, 0], [0.6, 1, 0], [0, 0, 0]], atol=1e-12)
    assert asked == [["x", "y", "0", "-x"]]


@pytest.mark.paper("1904.09675")
@given(st.integers(0, 10_000))
def test_bertscore_is_its_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = {name: rng.normal(size=(rng.integers(0, 4), 3)) for name in "abcd"}
    found = sim.token_matched(lambda texts: [vectors[text] for text in texts])(["a", "b"], ["b", "c", "d"])
    for i, j in product(range(2), range(3)):
        x, y = vectors["ab"[i]], vectors["bcd"[j]]
        expected = 0.0
        if len(x) and len(y):
            cos = [[float(u @ v / math.sqrt((u @ u) * (v @ v))) for v in y] for u in x]
            recall = sum(max(row) for row in cos) / len(x)
            precision = sum(max(row[k] for row in cos) for k in range(len(y))) / len(y)
            both = precision + recall
            expected = min(1.0, max(0.0, 2 * precision * recall / both)) if both > 0 else 0.0
        assert found[i, j] == pytest.approx(expected, abs=1e-9)


def test_a_judge_is_asked_once_about_each_pair_and_in_its_order() -> None:
    asked: list[tuple[str, str]] = []

    def judge(pairs: list[tuple[str, str]]) -> np.ndarray:
        asked.extend(pairs)
        return np.array([len(x) / 10 + len(y) for x, y in pairs])

    similarity = sim.paired(judge)
    found = similarity(["a", "bb", "a"], ["bb", "a"])
    np.testing.assert_allclose(found, [[2.1, 1.1], [2.2, 1.2], [2.1, 1.1]])
    assert asked == [("a", "bb"), ("a", "a"), ("bb", "bb"), ("bb", "a")]
    assert similarity([], ["a"]).shape == (0, 1) and len(asked) == 4
    with pytest.raises(ValueError, match="one number per pair"):
        sim.paired(lambda pairs: np.zeros((len(pairs), 2)))(["a"], ["b"])

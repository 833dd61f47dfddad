"""Zero-shot detectors: each against a loop over exact tables, their limits, and which way they point."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.errors import ModelError
from nextoken.model.ngram import NgramModel
from nextoken.model.table import TableModel
from nextoken.scores.detection import conditional_curvature, cross_moments, gltr_bins

P = TableModel.random(5, order=2, seed=1, name="p")
Q = TableModel.random(5, order=1, seed=2, concentration=0.5, name="q")
SYMBOLS = "abcde"
DETECTORS = ("mean_logprob", "rank", "log_rank", "lrr", "low_entropy", "gltr", "fast_detectgpt")


def steps(model: TableModel, text: str) -> list[tuple[int, np.ndarray]]:
    """Each token with the probabilities [V] it was predicted by."""
    ids = model.vocab.encode(text).ids
    return [(token, model.row(ids[:place]).exp().numpy()) for place, token in enumerate(ids)]


def ranks(model: TableModel, text: str) -> list[int]:
    return [1 + sum(other > p[token] for other in p) for token, p in steps(model, text)]


def expectation(weight: np.ndarray, p: np.ndarray, power: int) -> float:
    """sum_v weight_v log(p_v)^power over what has weight."""
    return sum(w * math.log(x) ** power for w, x in zip(weight, p, strict=True) if w > 0)


def curvature(scoring: TableModel, sampling: TableModel, text: str) -> float:
    above = below = 0.0
    for (token, p), (_, q) in zip(steps(scoring, text), steps(sampling, text), strict=True):
        mean = expectation(q, p, 1)
        above += math.log(p[token]) - mean
        below += expectation(q, p, 2) - mean**2
    return above / math.sqrt(below)


@pytest.mark.paper("1906.04043")
@given(st.lists(st.text(SYMBOLS, min_size=1, max_size=8), min_size=1, max_size=4))
@settings(max_examples=30)
def test_ranks_are_counted_by_a_loop(texts: list[str]) -> None:
    signature = nextoken.read(P, texts)
    for number, text in enumerate(texts):
        r = ranks(P, text)
        assert nextoken.score(signature, "rank")[number] == pytest.approx(-sum(r) / len(r))
        assert nextoken.score(signature, "log_rank")[number] == pytest.approx(-sum(map(math.log, r)) / len(r))
        counts = [sum(x <= 1 for x in r), sum(1 < x <= 3 for x in r), sum(x > 3 for x in r)]
        assert gltr_bins(signature, edges=(1, 3))[number] * len(r) == pytest.approx(counts)


@pytest.mark.paper("1906.04043")
def test_gltr_cuts_at_10_100_and_1000() -> None:
    weights = np.arange(2000, 0, -1.0)
    model = TableModel(np.append(weights / weights.sum(), 0.0), [f"<{i}>" for i in range(2000)])
    order = [0, 9, 10, 99, 100, 101, 999, 1000, 1999]
    signature = nextoken.read(model, "".join(f"<{i}>" for i in order), top=0)
    assert signature.column("rank").tolist() == order
    np.testing.assert_allclose(gltr_bins(signature)[0] * 9, [2, 2, 3, 2])
    assert nextoken.score(signature, "gltr")[0] == pytest.approx(2 / 9)
    with pytest.raises(ValueError, match="ascend"):
        gltr_bins(signature, edges=(10, 10))


@pytest.mark.paper("2306.05540")
@given(st.text(SYMBOLS, min_size=1, max_size=10))
@settings(max_examples=30)
def test_lrr_is_its_quotient(text: str) -> None:
    found = nextoken.score(nextoken.read(P, text), "lrr")[0]
    above = -sum(math.log(p[token]) for token, p in steps(P, text))
    below = sum(map(math.log, ranks(P, text)))
    assert found == (pytest.approx(above / below, rel=1e-5) if below else math.inf)


def test_lrr_of_a_certain_text_is_unknown() -> None:
    model = TableModel.given({(): [1.0, 0.0]}, ["a", "b"])
    assert np.isnan(nextoken.score(nextoken.read(model, "aaa"), "lrr")[0])


@pytest.mark.paper("2310.05130")
@given(st.lists(st.text(SYMBOLS, min_size=1, max_size=8), min_size=1, max_size=4))
@settings(max_examples=30)
def test_curvature_is_its_formula(texts: list[str]) -> None:
    own = nextoken.score(nextoken.read(P, texts), "fast_detectgpt")
    crossed = conditional_curvature(P, texts, sampling=Q)
    for number, text in enumerate(texts):
        assert own[number] == pytest.approx(curvature(P, P, text), rel=1e-4, abs=1e-5)
        assert crossed[number] == pytest.approx(curvature(P, Q, text), rel=1e-9)


@pytest.mark.paper("2310.05130")
def test_curvature_with_one_model_twice_is_the_score() -> None:
    texts = ["abcde", "ddd", "", "a", "edcbaabc"]
    both = conditional_curvature(P, texts, sampling=P)
    np.testing.assert_allclose(both, nextoken.score(nextoken.read(P, texts), "fast_detectgpt"), rtol=1e-4)


@pytest.mark.paper("2310.05130")
def test_curvature_is_what_sampling_estimates() -> None:
    """The paper's sampled form with 40,000 draws per place; its error, five standard ones, fails once in 2 million."""
    text, draws, random = "abacdeebd", 40_000, np.random.default_rng(0)
    total = np.zeros(draws)
    for (_, p), (_, q) in zip(steps(P, text), steps(Q, text), strict=True):
        total += np.log(np.maximum(p, 1e-300))[random.choice(len(q), size=draws, p=q / q.sum())]
    said = sum(math.log(p[token]) for token, p in steps(P, text))
    sampled = (said - total.mean()) / total.std()
    error = math.sqrt(1 / draws + sampled**2 / draws)
    assert abs(conditional_curvature(P, text, sampling=Q)[0] - sampled) < 5 * error


@pytest.mark.paper("2310.05130")
def test_curvature_of_text_drawn_from_the_model_has_mean_0() -> None:
    """Exactly, numerator and squared denominator over every string of 4 tokens."""
    law = P.enumerate(4)
    texts = [P.vocab.decode_text(ids) for ids in law]
    rows = nextoken.scores.Rows(nextoken.read(P, texts, top=0))
    gap = rows.sum(rows["logprob"]) + rows.sum(rows["entropy"])
    weight = np.array([*law.values()])
    assert weight @ gap == pytest.approx(0, abs=1e-6)
    assert weight @ gap**2 == pytest.approx(weight @ rows.sum(rows["varentropy"]), rel=1e-5)


@pytest.mark.paper("2310.05130")
def test_moments_are_those_of_a_reading_in_windows() -> None:
    """log p(x) and E_q[-log p] stand in the signatures of `read`, however the text is cut."""
    nano = nextoken.load("nano")
    texts = ["", "The ship lay in the harbour, and nobody spoke. " * 4, "Nobody", "It was late. " * 5]
    counts = NgramModel.from_text(texts, nano.vocab, order=3)
    counts.context_length = 40
    moments = cross_moments(nano, texts, sampling=counts, batch_tokens=64)
    signature = nextoken.read(counts, texts, against=nano, progress=False)
    np.testing.assert_allclose(moments.logprob, signature.column("against_logprob"), atol=2e-4)
    np.testing.assert_allclose(moments.mean, signature.column("cross_entropy"), atol=2e-4)
    assert moments.offsets.tolist() == signature.row_offsets.tolist()
    assert (moments.square >= moments.mean**2 - 1e-6).all()
    assert moments.sum(moments.mean)[0] == 0


def test_impossible_tokens_are_kept_apart() -> None:
    """What q never draws does not count; what it may draw and p forbids leaves no number."""
    p = TableModel.given({(): [0.5, 0.5, 0.0]}, ["a", "b", "c"])
    q = TableModel.given({(): [0.2, 0.3, 0.5]}, ["a", "b", "c"])
    assert np.isfinite(cross_moments(q, "ab", sampling=p).square).all()
    assert np.isinf(cross_moments(p, "ab", sampling=q).mean).all()
    assert np.isnan(conditional_curvature(p, "ab", sampling=q)[0])
    one = TableModel.given({(): [0.5, 0.5, 0.0], (0,): [0.1, 0.2, 0.7]}, ["a", "b", "c"])
    found = conditional_curvature(q, ["ac", "", "ba"], sampling=one)
    assert np.isnan(found).tolist() == [False, True, False]
    moments = cross_moments(p, ["ac", "b", "bb"], sampling=one)
    assert np.isinf(moments.sum(moments.logprob)).tolist() == [True, False, False]


def test_models_of_two_vocabularies_are_refused() -> None:
    with pytest.raises(ModelError, match="different vocabularies"):
        conditional_curvature(P, "ab", sampling=TableModel.random(4))


@pytest.mark.paper("2401.12070")
@given(st.lists(st.text(SYMBOLS, min_size=1, max_size=8), min_size=1, max_size=4))
@settings(max_examples=30)
def test_binoculars_take_surprise_from_the_performer_and_expectation_from_the_observer(texts: list[str]) -> None:
    found = nextoken.score(nextoken.read(P, texts, against=Q), "binoculars")
    for number, text in enumerate(texts):
        surprise = cross = 0.0
        for (token, observed), (_, performed) in zip(steps(P, text), steps(Q, text), strict=True):
            surprise -= math.log(performed[token])
            cross -= expectation(observed, performed, 1)
        assert found[number] == pytest.approx(-surprise / cross, rel=1e-5)


@pytest.mark.paper("2401.12070")
def test_binoculars_of_one_model_compare_surprise_with_entropy() -> None:
    signature = nextoken.read(P, ["abcde", "ddda"], against=P)
    expected = nextoken.score(signature, "mean_logprob") / -nextoken.score(signature, "low_entropy")
    np.testing.assert_allclose(nextoken.score(signature, "binoculars"), expected, rtol=1e-5)
    swapped = [nextoken.score(nextoken.read(a, "abcde", against=b), "binoculars")[0] for a, b in ((P, Q), (Q, P))]
    assert abs(swapped[0] - swapped[1]) > 0.01


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_points_at_the_text_that_the_model_would_write(name: str) -> None:
    written, ids = [], []
    for _ in range(12):
        ids.append(int(P.row(ids).argmax()))
        written.append(SYMBOLS[ids[-1]])
    unlike, ids = [], []
    for _ in range(12):
        ids.append(int(P.row(ids)[:5].argmin()))
        unlike.append(SYMBOLS[ids[-1]])
    machine, human = nextoken.score(nextoken.read(P, ["".join(written), "".join(unlike)]), name)
    if name == "low_entropy":  # says nothing of the tokens that came
        return
    assert machine >= human if name == "gltr" else machine > human


def test_a_text_without_tokens_has_no_score() -> None:
    signature = nextoken.read(P, ["", "abc"], against=Q)
    for name in (*DETECTORS, "binoculars"):
        found = nextoken.score(signature, name)
        assert np.isnan(found[0]) and np.isfinite(found[1]), name
    assert np.isnan(gltr_bins(signature)[0]).all()
    assert np.isnan(conditional_curvature(P, ["", "abc"], sampling=Q)[0])

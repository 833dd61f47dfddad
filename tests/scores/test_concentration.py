"""Concentration tests: exact errors by enumeration of small tables, identities, and behaviour at length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import nextoken
from nextoken.model.table import TableModel
from nextoken.scores.concentration import (
    _TILTS,
    _steps,
    attributed,
    betting_test,
    bound_test,
    normal_test,
)
from nextoken.scores.detection import cross_moments
from nextoken.scores.surprisal_bounds import _varentropy_bound, tolerance, type_one_bound, type_two_bound
from nextoken.signature import Signature

A = TableModel.random(3, order=2, seed=1, name="a")
B = TableModel.random(3, order=1, seed=5, name="b")
SIDES = ("two-sided", "surprising", "predictable")


def every(model: TableModel, size: int, judge: TableModel | None = None) -> tuple[Signature, np.ndarray]:
    """All strings of a size read by the judge, and their probabilities under the model."""
    law = model.enumerate(size)
    texts = [model.vocab.decode_text(ids) for ids in law]
    return nextoken.read(judge or model, texts, top=0, progress=False), np.array([*law.values()])


def drawn(model: TableModel, count: int, size: int, seed: int, power: float = 1.0) -> list[str]:
    """Texts from the model, its distributions raised to a power."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, model.order), model.vocab.bos_id)
    for _ in range(size):
        rows = torch.stack([model._log_table[model._index(context)] for context in ids[:, -model.order :]])
        ids = torch.cat([ids, torch.multinomial((power * rows).exp(), 1, generator=generator)], dim=1)
    return [model.vocab.decode_text(row[model.order :].tolist()) for row in ids]


@pytest.mark.paper("2501.02406")
@given(st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=4), st.integers(0, 3))
@settings(max_examples=30)
def test_the_statistic_is_surprisal_less_entropy(texts: list[str], skip: int) -> None:
    signature = nextoken.read(A, texts)
    found = nextoken.score(signature, "excess_surprisal", skip=skip)
    z = normal_test(signature, skip=skip).statistic
    for number, text in enumerate(texts):
        gaps, variance = [], 0.0
        ids = A.vocab.encode(text).ids
        for place, token in enumerate(ids):
            if place >= skip:
                p = A.row(ids[:place])[:3].exp().tolist()
                surprise = [-math.log(x) for x in p]
                entropy = sum(x * s for x, s in zip(p, surprise, strict=True))
                gaps.append(surprise[token] - entropy)
                variance += sum(x * (s - entropy) ** 2 for x, s in zip(p, surprise, strict=True))
        if not gaps:
            assert math.isnan(found[number]) and math.isnan(z[number])
            continue
        assert found[number] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
        assert z[number] == pytest.approx(sum(gaps) / math.sqrt(variance), rel=1e-4, abs=1e-4)
    assert np.array_equal(nextoken.score(signature, "liketropy", skip=skip), np.abs(found), equal_nan=True)


@pytest.mark.paper("2501.02406")
def test_the_mean_is_0_under_the_model_and_the_divergence_under_another() -> None:
    signature, weight = every(A, 4)
    assert weight @ nextoken.score(signature, "excess_surprisal") == pytest.approx(0, abs=1e-6)
    signature, weight = every(B, 4, judge=A)
    texts = [signature.text(number) for number in range(signature.n_texts)]
    moments = cross_moments(A, texts, sampling=B)
    rows = nextoken.scores.Rows(signature)
    expected = (moments.sum(moments.mean) - rows.sum(rows["entropy"])) / 4
    assert weight @ nextoken.score(signature, "excess_surprisal") == pytest.approx(weight @ expected, abs=1e-6)
    assert weight @ expected > 0.05


@pytest.mark.paper("2501.02406")
def test_z_is_fast_detectgpt_the_other_way() -> None:
    signature = nextoken.read(A, ["abcabc", "cc", "", "bab"])
    z = normal_test(signature).statistic
    np.testing.assert_allclose(z, -nextoken.score(signature, "fast_detectgpt"), rtol=1e-5)


@pytest.mark.paper("2501.02406")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("model", [A, TableModel.random(3, order=1, seed=7, zeros=0.3)], ids=["full", "sparse"])
def test_bets_are_fair_and_errors_never_exceed_the_level(side, model: TableModel) -> None:  # type: ignore[no-untyped-def]
    """Exactly, over every string of 6 tokens: E W <= 1, and P(p <= level) <= level for every level that occurs."""
    signature, weight = every(model, 6)
    wealth = np.exp(betting_test(signature, alternative=side, anytime=False).statistic)
    assert 0.9 < weight @ wealth <= 1 + 1e-5
    for verdict in (
        betting_test(signature, alternative=side),
        betting_test(signature, alternative=side, anytime=False),
        betting_test(signature, alternative=side, skip=2),
        bound_test(signature, alternative=side),
        bound_test(signature, alternative=side, skip=3),
    ):
        assert weight.sum() == pytest.approx(1)
        for level in np.unique(verdict.p_value):
            assert weight[verdict.p_value <= level].sum() <= level + 1e-6


@pytest.mark.paper("2501.02406")
@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0, 9.0]))
@settings(max_examples=25)
def test_the_mean_of_each_bet_is_known_or_bounded(seed: int, concentration: float) -> None:
    """Of one token of a model without memory: E e^(s (S - H)) / M(s) is 1 where M is known, just below 1 elsewhere."""
    model = TableModel.random(6, order=0, seed=seed, concentration=concentration)
    signature, weight = every(model, 1)
    for tilt, known in _TILTS.items():
        mean = weight @ np.exp(_steps(nextoken.scores.Rows(signature), tilt, np.ones(len(weight), dtype=bool)))
        assert mean == pytest.approx(1, abs=2e-5) if tilt == known else 0.85 < mean <= 1 + 2e-5


@pytest.mark.paper("2501.02406")
def test_the_best_place_counts_at_any_time() -> None:
    texts = ["abcabcab", "ccccbbbb", "a"]
    whole = betting_test(nextoken.read(A, texts))
    for number, text in enumerate(texts):
        beginnings = nextoken.read(A, [text[:size] for size in range(1, len(text) + 1)])
        ends = betting_test(beginnings, anytime=False).statistic
        assert whole.statistic[number] == pytest.approx(max(0.0, *ends), abs=1e-5)
    np.testing.assert_allclose(whole.p_value, np.exp(-whole.statistic))


@pytest.mark.paper("2501.02406")
@given(st.integers(0, 1000), st.sampled_from([0.2, 1.0, 5.0]))
@settings(max_examples=20)
def test_the_type_one_bound_holds_for_any_model(seed: int, concentration: float) -> None:
    signature, weight = every(TableModel.random(3, order=1, seed=seed, concentration=concentration), 5)
    gap = nextoken.score(signature, "excess_surprisal")
    for at in gap:
        tail = weight[gap >= at].sum() if at > 0 else weight[gap <= at].sum()
        # Rounding of D moves the bound by less than the allowance.
        assert tail <= type_one_bound(5, at, vocab_size=4) * (1 + 1e-4)


@pytest.mark.paper("2501.02406")
@given(st.floats(0.001, 0.999), st.integers(2, 5000), st.integers(0, 99))
def test_no_distribution_has_more_varentropy_than_the_bound(top: float, size: int, seed: int) -> None:
    bound = _varentropy_bound(size)
    random = np.random.default_rng(seed).dirichlet(np.full(size, 0.1)) + 1e-300
    for p in (np.array([top, *np.full(size - 1, (1 - top) / (size - 1))]), random / random.sum()):
        s = -np.log(p)
        assert p @ (s - p @ s) ** 2 <= bound


def test_the_bound_on_varentropy_is_nearly_reached() -> None:
    tops = np.linspace(0.001, 0.999, 5000)
    reached = tops * (1 - tops) * np.log(tops * 4095 / (1 - tops)) ** 2
    assert 0.95 * _varentropy_bound(4096) < reached.max() <= _varentropy_bound(4096)


@pytest.mark.paper("2501.02406")
@pytest.mark.parametrize("seed", range(4))
def test_the_type_two_bound_holds(seed: int) -> None:
    """Exactly, for two models without memory, whose excess and square are the same at each token."""
    judge, writer = (TableModel.random(3, order=0, seed=s, concentration=0.4) for s in (seed, seed + 20))
    a, b = judge.row()[:3].exp().numpy(), writer.row()[:3].exp().numpy()
    excess, square = -b @ np.log(a) + a @ np.log(a), b @ np.log(a) ** 2
    for n in (2, 7):
        signature, weight = every(writer, n, judge=judge)
        gap = nextoken.score(signature, "excess_surprisal")
        for at in np.linspace(excess - 1, excess + 0.2, 9):
            missed = weight[gap < at].sum()
            assert missed <= type_two_bound(n, at, excess=excess, square=square) + 1e-6
    assert type_two_bound(50, excess + 1, excess=excess, square=square) == 1
    rates = [math.log(type_two_bound(n, 0.0, excess=0.5, square=2.0)) for n in (10, 20, 40)]
    assert rates == pytest.approx([-0.625, -1.25, -2.5])


@pytest.mark.parametrize("size", [2, 100, 50257])
@pytest.mark.parametrize("level", [0.5, 0.01, 1e-9])
@pytest.mark.parametrize("n", [1, 30, 10_000])
def test_tolerance_inverts_the_bound(n: int, level: float, size: int) -> None:
    assert type_one_bound(n, tolerance(n, level, vocab_size=size), vocab_size=size) == pytest.approx(level, rel=1e-6)


@pytest.mark.paper("2501.02406")
def test_the_normal_test_is_calibrated_at_length() -> None:
    """800 texts of 120 tokens from the model, 5 % level; both ends of the count together fail 1 time in 10,000."""
    model = TableModel.random(6, order=1, seed=3)
    signature = nextoken.read(model, drawn(model, 800, 120, seed=0), top=0, progress=False)
    rejected = int((normal_test(signature).p_value <= 0.05).sum())
    # The law is normal only nearly, so one percent is allowed for.
    assert binom.ppf(5e-5, 800, 0.04) <= rejected <= binom.ppf(1 - 5e-5, 800, 0.06)
    assert (betting_test(signature).p_value <= 0.05).sum() <= binom.ppf(1 - 1e-4, 800, 0.05)
    assert not (bound_test(signature).p_value <= 0.05).any()


@pytest.mark.paper("2501.02406")
def test_sharpened_text_is_too_predictable_and_flattened_text_too_surprising() -> None:
    model = TableModel.random(6, order=1, seed=3)
    cold, hot = (
        nextoken.read(model, drawn(model, 60, 150, seed=1, power=power), top=0, progress=False) for power in (2.0, 0.3)
    )
    for test in (normal_test, betting_test, bound_test):
        level = 0.05 if test is not bound_test else 0.9
        assert (test(cold, alternative="predictable").p_value <= level).mean() > 0.9
        assert (test(cold, alternative="surprising").p_value <= level).mean() < 0.1
        assert (test(hot, alternative="surprising").p_value <= level).mean() > 0.9
        assert (test(hot, alternative="predictable").p_value <= level).mean() < 0.1
    assert nextoken.score(cold, "excess_surprisal").mean() < 0 < nextoken.score(hot, "excess_surprisal").mean()


def test_an_impossible_token_is_a_proof() -> None:
    model = TableModel.given({(): [0.5, 0.5, 0.0]}, ["a", "b", "c"])
    signature = nextoken.read(model, ["abca", "abba"])
    for test in (normal_test, betting_test, bound_test):
        for side in ("surprising", "two-sided"):
            p_value = test(signature, alternative=side).p_value
            assert p_value[0] == 0 and p_value[1] > 0.4
        assert test(signature, alternative="predictable").p_value[0] == 1


def test_a_text_without_tokens_is_not_rejected() -> None:
    signature = nextoken.read(A, ["", "ab"])
    for test in (normal_test, betting_test, bound_test):
        for side in SIDES:
            verdict = test(signature, alternative=side, skip=1)
            assert math.isnan(verdict.statistic[0]) and verdict.p_value[0] == 1 and verdict.n.tolist() == [0, 1]
    assert normal_test(signature, skip=2).n.tolist() == [0, 0]


def test_a_model_without_choice_is_not_rejected_by_rounding() -> None:
    flat = TableModel(torch.tensor([*[1 / 7] * 7, 0.0]), [*"abcdefg"])
    assert (normal_test(nextoken.read(flat, "abcdefg" * 20)).p_value > 0.3).all()


@pytest.mark.paper("2501.02406")
def test_texts_are_attributed_to_the_model_that_finds_them_most_probable() -> None:
    texts = [*drawn(A, 20, 60, seed=2), *drawn(B, 20, 60, seed=3)]
    found = attributed([nextoken.read(model, texts, top=0) for model in (A, B)])
    assert found.tolist() == [0] * 20 + [1] * 20
    with pytest.raises(ValueError, match="same texts"):
        attributed([nextoken.read(A, "ab"), nextoken.read(B, "ba")])


def test_misuse_is_refused() -> None:
    signature = nextoken.read(A, "ab")
    for test in (normal_test, betting_test, bound_test):
        with pytest.raises(ValueError, match="alternative"):
            test(signature, alternative="both")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="skip"):
            test(signature, skip=-1)
    with pytest.raises(ValueError, match="square"):
        type_two_bound(3, 0.1, excess=1.0, square=0.0)
    with pytest.raises(ValueError, match="level"):
        tolerance(3, 1.0, vocab_size=10)

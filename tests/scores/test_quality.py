"""Measures of scores against outcomes: each by brute force, over ties, weights, resamples and missing values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from nextoken.scores.quality import aurc, auroc, bootstrap, pr_auc, prr, risk_coverage, tpr_at_fpr
from nextoken.scores.reliability import brier, brier_decomposition, ece, ks_error, log_loss, reliability, wilson

SCORES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=12)
"""(score, outcome, weight); few values, so that there are ties."""


def columns(items: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, outcome, weights = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    return scores, outcome, weights


def same(found: float, expected: float) -> bool:
    return bool(np.isclose(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True))


@given(SCORES)
def test_auroc_is_the_share_of_pairs_in_order(items: list[tuple[int, int, int]]) -> None:
    scores, outcome, _ = columns(items)
    pairs = [(a > b) + (a == b) / 2 for a, b in product(scores[outcome == 1], scores[outcome == 0])]
    assert same(auroc(scores, outcome), np.mean(pairs) if pairs else math.nan)


@given(SCORES, st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
def test_tpr_at_fpr_is_the_best_threshold_allowed(items: list[tuple[int, int, int]], fpr: float) -> None:
    scores, outcome, _ = columns(items)
    found = tpr_at_fpr(scores, outcome, fpr=fpr)
    if len({*outcome}) < 2:
        assert math.isnan(found)
        return
    rates = [
        (np.mean(scores[outcome == 1] >= t), np.mean(scores[outcome == 0] >= t)) for t in [*np.unique(scores), math.inf]
    ]
    assert same(found, max(tpr for tpr, false in rates if false <= fpr + 1e-12))


@given(SCORES)
def test_pr_auc_sums_precision_over_recall(items: list[tuple[int, int, int]]) -> None:
    scores, outcome, _ = columns(items)
    if not outcome.any():
        assert math.isnan(pr_auc(scores, outcome))
        return
    total, before = 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        passed = outcome[scores >= threshold]
        total += (passed.sum() / outcome.sum() - before) * passed.mean()
        before = passed.sum() / outcome.sum()
    assert same(pr_auc(scores, outcome), total)


def kept_mean(order: tuple[int, ...], values: np.ndarray, rejected: int) -> float:
    """By its definition: the mean of `values` of the first k, over k = n - rejected + 1 ... n."""
    n = len(order)
    return float(np.mean([np.mean(values[list(order[:k])]) for k in range(n - rejected + 1, n + 1)]))


def over_orders(scores: np.ndarray, values: np.ndarray, rejected: int) -> float:
    """The same over all orders of equal scores, by enumeration."""
    found = [
        kept_mean(order, values, rejected)
        for order in permutations(range(len(scores)))
        if all(scores[a] <= scores[b] for a, b in pairwise(order))
    ]
    return float(np.mean(found))


@pytest.mark.paper("1805.08206")
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(-1, 1, width=32)), min_size=1, max_size=6))
def test_aurc_is_the_expectation_over_orders_of_ties(items: list[tuple[int, float]]) -> None:
    uncertainty, risk = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    expected = over_orders(uncertainty, risk, len(items))
    assert same(aurc(uncertainty, risk), expected)
    curve = risk_coverage(uncertainty, risk)
    assert same(curve.aurc, expected) and same(curve.risk[-1], risk.mean()) and curve.coverage[-1] == 1


@pytest.mark.paper("2406.15627")
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=2, max_size=6), st.sampled_from([0.5, 0.8, 1.0])
)
def test_prr_is_its_formula(items: list[tuple[int, int]], max_rejection: float) -> None:
    uncertainty, quality = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    rejected = max(1, math.floor(max_rejection * len(items) + 1e-9))
    random = quality.mean()
    oracle = over_orders(-quality, quality, rejected)
    found = prr(uncertainty, quality, max_rejection=max_rejection)
    if len({*quality}) == 1:
        assert math.isnan(found)
    elif abs(oracle - random) > 1e-12:
        assert same(found, (over_orders(uncertainty, quality, rejected) - random) / (oracle - random))


@pytest.mark.paper("2406.15627")
def test_prr_at_its_ends() -> None:
    rng = np.random.default_rng(0)
    quality = rng.random(200)
    assert same(prr(-quality, quality), 1.0) and prr(quality, quality) < -0.5
    assert same(prr(np.zeros(200), quality), 0.0)
    uncertainty = rng.random(200)
    assert same(prr(uncertainty, quality), prr(np.exp(uncertainty), 7 * quality - 3))
    # Of 0/1 qualities with mean a, A(oracle) is a (1 - ln a) in the limit.
    right = (np.arange(100_000) < 30_000).astype(float)
    curve = risk_coverage(-right, right)
    assert curve.aurc == pytest.approx(0.3 * (1 - math.log(0.3)), abs=1e-4)


MEASURES: dict[str, Callable[..., np.ndarray]] = {
    "auroc": auroc,
    "tpr": partial(tpr_at_fpr, fpr=0.3),
    "pr_auc": pr_auc,
    "aurc": aurc,
    "prr": prr,
    "prr half": partial(prr, max_rejection=0.5),
}
STATED: dict[str, Callable[..., np.ndarray]] = {
    "ece mass": partial(ece, bins=3),
    "ece width": partial(ece, bins=3, by="width"),
    "ks": ks_error,
    "brier": brier,
    "log_loss": log_loss,
}


@pytest.mark.parametrize("name", [*MEASURES, *STATED])
@given(items=SCORES)
def test_a_weight_counts_an_item_so_often(name: str, items: list[tuple[int, int, int]]) -> None:
    scores, outcome, weights = columns(items)
    measure = (MEASURES | STATED)[name]
    scores = scores / 4 if name in STATED else scores
    times = weights.astype(int)
    both = np.stack([weights, np.ones_like(weights)])
    found = measure(scores, outcome, weights=both)
    assert found.shape == (2,) and same(found[1], measure(scores, outcome))
    if times.sum():
        assert same(found[0], measure(np.repeat(scores, times), np.repeat(outcome, times)))
    else:
        assert math.isnan(found[0])


@pytest.mark.parametrize("name", [*MEASURES, *STATED])
@given(items=SCORES, seed=st.integers(0, 99))
def test_the_order_of_items_means_nothing(name: str, items: list[tuple[int, int, int]], seed: int) -> None:
    scores, outcome, _ = columns(items)
    measure = (MEASURES | STATED)[name]
    scores = scores / 4 if name in STATED else scores
    order = np.random.default_rng(seed).permutation(len(items))
    assert same(measure(scores[order], outcome[order]), measure(scores, outcome))


@pytest.mark.parametrize("measure", [*MEASURES.values(), *STATED.values()], ids=[*MEASURES, *STATED])
def test_missing_values_are_refused_or_left_out(measure: Callable[..., np.ndarray]) -> None:
    scores = np.array([0.1, math.nan, 0.4, 0.8, 0.9])
    outcome = np.array([0.0, 1.0, 0.0, 1.0, math.nan])
    with pytest.raises(ValueError, match="2 of 5 items have NaN"):
        measure(scores, outcome)
    kept = [0, 2, 3]
    assert same(measure(scores, outcome, missing="omit"), measure(scores[kept], outcome[kept]))


def test_infinite_scores_are_only_the_largest() -> None:
    outcome = np.array([0, 1, 0, 1, 1])
    for measure in MEASURES.values():
        finite = measure(np.array([1.0, 2.0, 3.0, 4.0, 9.0]), outcome)
        assert same(measure(np.array([-math.inf, 2.0, 3.0, 4.0, math.inf]), outcome), finite)


@pytest.mark.paper("1706.04599")
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=30), st.integers(1, 7))
def test_ece_over_equal_widths_is_its_formula(items: list[tuple[float, int]], bins: int) -> None:
    confidence, outcome = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    place = np.minimum(np.floor(confidence * bins), bins - 1)
    expected = sum(
        abs(confidence[place == b].mean() - outcome[place == b].mean()) * np.mean(place == b) for b in {*place}
    )
    assert same(ece(confidence, outcome, bins=bins, by="width"), expected)
    assert same(reliability(confidence, outcome, bins=bins, by="width").ece, expected)


@pytest.mark.paper("1706.04599")
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 99))
def test_ece_over_equal_masses_is_its_formula(n: int, bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence, outcome = rng.random(n), rng.integers(0, 2, n)
    order, expected = np.argsort(confidence), 0.0
    for b in range(bins):
        own = order[b * n // bins : (b + 1) * n // bins]
        expected += abs(confidence[own].sum() - outcome[own].sum()) / n
    assert same(ece(confidence, outcome, bins=bins), expected)


def test_the_base_rate_said_everywhere_is_calibrated_and_tells_nothing() -> None:
    outcome = np.array([1, 0, 0, 1, 1, 0, 0, 0, 1, 0])
    said = np.full(10, 0.4)
    # Equal confidences are shared between the bins, so that no order of the items makes them look wrong.
    assert ece(said, outcome, bins=5) == pytest.approx(0) and ks_error(said, outcome) == pytest.approx(0)
    parts = brier_decomposition(said, outcome, bins=5)
    assert (parts.reliability, parts.resolution) == pytest.approx((0, 0), abs=1e-15)
    assert parts.score == pytest.approx(parts.uncertainty) == pytest.approx(0.24)


@pytest.mark.paper("2006.12800")
@given(SCORES)
def test_ks_error_is_the_largest_gap_of_running_sums(items: list[tuple[int, int, int]]) -> None:
    confidence, outcome, _ = columns(items)
    confidence /= 4
    gaps = [abs((confidence - outcome)[confidence <= c].sum()) / len(items) for c in {*confidence}]
    assert same(ks_error(confidence, outcome), max(gaps))
    assert ks_error(outcome, outcome) == 0


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=30), st.integers(1, 6))
def test_the_parts_of_the_brier_score_add_up(items: list[tuple[float, int]], bins: int) -> None:
    c, y = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    parts = brier_decomposition(c, y, bins=bins, by="width")
    place = np.minimum(np.floor(c * bins), bins - 1)
    within = 0.0
    for b in {*place}:
        own = place == b
        dc, dy = c[own] - c[own].mean(), y[own] - y[own].mean()
        within += (dc**2 - 2 * dc * dy).sum() / len(c)
    assert parts.within == pytest.approx(within, abs=1e-12)
    assert parts.score == pytest.approx(np.mean((c - y) ** 2))
    assert same(parts.reliability - parts.resolution + parts.uncertainty + parts.within, parts.score)


def test_log_loss_of_the_impossible_is_infinite() -> None:
    assert log_loss(np.array([0.5, 0.25]), np.array([1, 0])) == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)
    assert log_loss(np.array([0.0, 1.0]), np.array([0, 1])) == 0
    assert log_loss(np.array([0.0]), np.array([1])) == math.inf


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (3, 7), (200, 214), (5, 5)])
def test_wilson_is_scipys(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(np.array(successes), np.array(trials)) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert all(map(math.isnan, wilson(np.array(0), np.array(0))))


def test_bootstrap_is_the_loop_over_resamples() -> None:
    rng = np.random.default_rng(3)
    scores, outcome = rng.integers(0, 5, 40).astype(float), rng.integers(0, 2, 40)
    found = bootstrap(auroc, scores, outcome, resamples=200, seed=7)
    counts = np.random.default_rng(7).multinomial(40, np.full(40, 1 / 40), size=200)
    by_hand = [auroc(np.repeat(scores, row), np.repeat(outcome, row)) for row in counts]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))
    assert found.value == auroc(scores, outcome) and found.error == pytest.approx(np.std(by_hand, ddof=1))


def test_groups_are_drawn_whole() -> None:
    rng = np.random.default_rng(4)
    scores, outcome = rng.normal(size=30), rng.integers(0, 2, 30)
    alone = bootstrap(auroc, scores, outcome, resamples=300)
    tripled = bootstrap(
        auroc, np.repeat(scores, 3), np.repeat(outcome, 3), groups=np.repeat(np.arange(30), 3), resamples=300
    )
    assert tripled == alone
    naive = bootstrap(auroc, np.repeat(scores, 3), np.repeat(outcome, 3), resamples=300)
    assert naive.error < 0.75 * alone.error


def test_bootstrap_covers_what_it_says() -> None:
    """Of 200 intervals at 95 % at least 176 hold the true AUROC: fewer have probability 2e-5 at a coverage of 0.95."""
    rng = np.random.default_rng(5)
    truth, held = 0.760250, 0  # Phi(1 / sqrt(2))
    for trial in range(200):
        outcome = np.arange(80) % 2
        interval = bootstrap(auroc, rng.normal(size=80) + outcome, outcome, resamples=400, seed=trial)
        held += interval.low <= truth <= interval.high
    assert held >= 176


def test_bootstrap_tells_how_often_there_was_nothing_to_measure() -> None:
    found = bootstrap(auroc, np.array([1.0, 2.0]), np.array([0, 1]), resamples=1000)
    assert found.undefined == pytest.approx(0.5, abs=0.07) and found.low == found.high == 1
    assert math.isnan(bootstrap(auroc, np.array([1.0]), np.array([1]), resamples=10).low)


def test_misuse_is_refused() -> None:
    one = np.array([0.5])
    for wrong, message in (
        (lambda: auroc(one, np.array([0, 1])), "two arrays"),
        (lambda: auroc(np.array([]), np.array([])), "n > 0"),
        (lambda: auroc(one, np.array([2])), "0 or 1"),
        (lambda: auroc(one, np.array([1]), weights=np.array([-1.0])), "weights"),
        (lambda: auroc(one, np.array([1]), missing="drop"), "missing"),  # type: ignore[arg-type]
        (lambda: tpr_at_fpr(one, np.array([1]), fpr=2.0), "fpr"),
        (lambda: prr(one, one, max_rejection=0.0), "max_rejection"),
        (lambda: ece(np.array([1.2]), np.array([1])), "from 0 to 1"),
        (lambda: ece(one, np.array([1]), bins=0), "bins"),
        (lambda: ece(one, np.array([1]), by="size"), "by must be"),  # type: ignore[arg-type]
        (lambda: bootstrap(auroc, one, one, level=1.0), "level"),
        (lambda: bootstrap(auroc, one, np.array([1]), groups=np.array([0, 1])), "groups"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()

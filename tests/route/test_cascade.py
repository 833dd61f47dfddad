"""Cascades: confidences by hand, deferral curves by enumeration, the length bias, and who answers at what cost."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextoken.decode.generate import generate
from nextoken.model.table import TableModel
from nextoken.route.cascade import Cascade
from nextoken.route.confidence import Answer, ChowAverage, ChowQuantile, ChowSum, DeferralRule, quantiles
from nextoken.route.cost import Spent
from nextoken.route.deferral import deferral_curve, threshold_for

SMALLER = TableModel.random(4, order=1, seed=1, name="smaller", eos=True, concentration=0.7)
LARGER = TableModel.random(4, order=2, seed=2, name="larger", eos=True, concentration=0.4)
RULES: list[DeferralRule] = [ChowSum(), ChowAverage(), ChowQuantile(0.0), ChowQuantile(0.3), ChowQuantile(1.0)]
LOGPROBS = st.lists(st.floats(-20, 0), min_size=1, max_size=12)


@pytest.mark.paper("2404.10136")
@given(LOGPROBS)
def test_confidences_are_their_formulas(logprobs: list[float]) -> None:
    answer = Answer(np.array(logprobs))
    said = [float(rule.confidence([answer])[0]) for rule in RULES]
    total = math.fsum(logprobs)
    expected = [total, total / len(logprobs), min(logprobs), float(np.quantile(logprobs, 0.3)), max(logprobs)]
    assert said == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.one_of(st.floats(-20, 0), st.just(-math.inf)), min_size=1, max_size=9), st.floats(0, 1))
def test_quantiles_with_impossible_tokens_are_never_nan(logprobs: list[float], level: float) -> None:
    low, at, high = quantiles(np.array(logprobs), [0.0, level, 1.0])
    assert low == min(logprobs) and high == max(logprobs)
    assert low <= at <= high


@pytest.mark.paper("2404.10136")
@given(st.lists(st.floats(-20, 0), min_size=2, max_size=10, unique=True))
def test_answers_of_one_token_are_ordered_alike_by_every_rule(logprobs: list[float]) -> None:
    answers = [Answer(np.array([value])) for value in logprobs]
    for rule in RULES:
        assert rule.confidence(answers) == pytest.approx(np.array(logprobs))


@given(st.floats(-9, 0), st.integers(1, 8), st.floats(0, 1))
def test_of_equal_tokens_every_quantile_is_the_average(logprob: float, count: int, alpha: float) -> None:
    answer = [Answer(np.full(count, logprob))]
    assert ChowQuantile(alpha).confidence(answer) == pytest.approx(ChowAverage().confidence(answer))


@pytest.mark.paper("2404.10136")
def test_sums_and_minima_defer_the_long_and_averages_the_extremes_are_short() -> None:
    """Answers whose tokens' log-probabilities are independent draws of one law: length tells nothing of quality.

    2,000 answers of 2 to 40 tokens; a rank correlation of independent numbers has a standard error of 0.022, so that
    bounds of 0.11 have a false alarm of 1e-6.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 41, 2000)
    answers = [Answer(-rng.exponential(1.0, size)) for size in lengths]

    def correlation(rule: DeferralRule) -> float:
        orders = [np.argsort(np.argsort(values)) for values in (-rule.confidence(answers), lengths)]
        return float(np.corrcoef(*orders)[0, 1])

    assert correlation(ChowSum()) > 0.9
    assert correlation(ChowQuantile(0.0)) > 0.3
    assert correlation(ChowQuantile(1.0)) < -0.3
    assert abs(correlation(ChowAverage())) < 0.11
    assert abs(correlation(ChowQuantile(0.5))) < 0.15
    order = np.argsort(ChowAverage().confidence(answers))
    ends, middle = np.concatenate([order[:100], order[-100:]]), order[900:1100]
    assert lengths[ends].mean() < 10 < 20 < lengths[middle].mean()


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_curves_are_means_over_the_orders_that_ties_allow(items: list[tuple[int, float, float]]) -> None:
    sure, small, large = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    count = len(items)
    found = []
    for order in itertools.permutations(range(count)):
        if all(sure[a] <= sure[b] for a, b in itertools.pairwise(order)):
            found.append(
                [(large[list(order[:k])].sum() + small[list(order[k:])].sum()) / count for k in range(count + 1)]
            )
    curve = deferral_curve(sure, small=small, large=large)
    assert curve.quality == pytest.approx(np.mean(found, 0))
    assert curve.rates == pytest.approx([k / count for k in range(count + 1)])
    area = sum((a + b) / 2 / count for a, b in itertools.pairwise(curve.quality))
    assert curve.area == pytest.approx(area)


@pytest.mark.paper("2404.10136")
def test_the_area_of_a_random_order_is_its_closed_form() -> None:
    rng = np.random.default_rng(3)
    small, large = rng.random(6), rng.random(6)
    areas = [deferral_curve(order, small=small, large=large).area for order in itertools.permutations(range(6))]
    even = deferral_curve(np.zeros(6), small=small, large=large)
    assert np.mean(areas) == pytest.approx((small.mean() + large.mean()) / 2)
    assert even.area == pytest.approx(even.random_area) == pytest.approx(np.mean(areas))
    assert even.gain == pytest.approx(0.0)
    oracle = deferral_curve(small - large, small=small, large=large).area
    assert oracle == pytest.approx(max(areas))


def test_curves_begin_and_end_at_the_pure_models_and_peak_where_both_are_used() -> None:
    curve = deferral_curve([0.1, 0.2, 0.3, 0.4], small=[0, 0, 1, 1], large=[1, 1, 0, 1])
    assert curve.quality.tolist() == [0.5, 0.75, 1.0, 0.75, 0.75]
    assert curve.peak == (0.5, 1.0)
    assert curve.at(0.125) == pytest.approx(0.625)
    perfect = deferral_curve([0.3, 0.1, 0.2], small=[1, 1, 1], large=[1, 0, 1])
    assert bool((np.diff(perfect.quality) <= 0).all())


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=20, unique=True), st.floats(0, 1))
def test_a_threshold_defers_its_share(confidence: list[float], rate: float) -> None:
    threshold = threshold_for(confidence, rate)
    assert sum(value < threshold for value in confidence) == round(rate * len(confidence))


@pytest.mark.paper("2404.10136")
@pytest.mark.parametrize("rule", RULES)
def test_at_its_ends_a_cascade_is_the_pure_model(rule: DeferralRule) -> None:
    prompts = ["a", "ab", "ccd"]
    for transform, seed in (("greedy", 0), ("temperature(1.1)", 5)):
        for threshold, model in ((-math.inf, SMALLER), (math.inf, LARGER)):
            cascade = Cascade(SMALLER, LARGER, rule=rule, threshold=threshold)
            said = cascade.generate(prompts, transform=transform, max_tokens=9, seed=seed)
            expected = generate(model, prompts, transform=transform, max_tokens=9, seed=seed)
            assert [made.tokens for made in said.generations] == [made.tokens for made in expected]
            assert said.rate == float(model is LARGER)


@pytest.mark.paper("2404.10136")
def test_the_unsure_answers_are_the_large_models() -> None:
    prompts = ["a", "b", "c", "d", "ab", "cd"]
    own = generate(SMALLER, prompts, transform=None, max_tokens=8, seed=3)
    other = generate(LARGER, prompts, transform=None, max_tokens=8, seed=3)
    confidences = []
    for made in own:
        # By hand from the table: the sum over the tokens, the end token among them.
        row = [*made.request.prompt, *made.tokens]
        said = SMALLER.predict([row[:-1]]).log_probs()[0]
        begin = len(made.request.prompt)
        confidences.append(sum(float(said[place - 1, row[place]]) for place in range(begin, len(row))))
    threshold = threshold_for(confidences, 0.5)
    said = Cascade(SMALLER, LARGER, rule=ChowSum(), threshold=threshold, parameters=(10, 100)).generate(
        prompts, transform=None, max_tokens=8, seed=3
    )
    assert said.confidences == pytest.approx(confidences, abs=1e-5)
    expected = [b if sure < threshold else a for a, b, sure in zip(own, other, confidences, strict=True)]
    assert [made.tokens for made in said.generations] == [made.tokens for made in expected]
    assert sum(said.deferred) == 3 and [made.tokens for made in said.small] == [made.tokens for made in own]
    # Written and reviewed by the small model, and written again by the large one where deferred.
    read = [len(made.request.prompt) + len(made.tokens) - 1 for made in (*own, *other)]
    kept = sum(len(made.tokens) for made, handed in zip(own, said.deferred, strict=True) if not handed)
    again = [place for place, handed in enumerate(said.deferred) if handed]
    anew = sum(len(other[place].tokens) for place in again)
    assert said.cost.models == (
        Spent("smaller", 10, sum(len(made.tokens) + 1 for made in own), 2 * sum(read[:6]), kept),
        Spent("larger", 100, anew, sum(read[6 + place] for place in again), anew),
    )


def test_an_answer_is_the_same_alone_and_in_a_list() -> None:
    cascade = Cascade(SMALLER, LARGER, rule=ChowAverage(), threshold=-1.2)
    prompts = ["a", "bc", "d"]
    together = cascade.generate(prompts, transform=None, max_tokens=8, seed=1)
    for place, prompt in enumerate(prompts):
        alone = cascade.generate(prompt, transform=None, max_tokens=8, seed=1)
        assert alone.generations[0].tokens == together.generations[place].tokens


def test_the_end_token_may_be_left_out() -> None:
    made = next(
        made
        for seed in range(50)
        if (made := generate(SMALLER, "a", max_tokens=9, seed=seed)).finish == "eos" and len(made.tokens) > 1
    )
    whole, short = Answer.of(made), Answer.of(made, end_token=False)
    assert len(whole.logprobs) == len(made.tokens) == len(short.logprobs) + 1
    assert whole.logprobs[:-1] == pytest.approx(short.logprobs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Answer(np.array([])), "at least one token"),
        (lambda: Answer(np.array([0.5])), "at most 0"),
        (lambda: Answer(np.array([math.nan])), "NaN"),
        (lambda: ChowQuantile(1.5), "alpha"),
        (lambda: Cascade(SMALLER, LARGER, rule=ChowSum(), threshold=math.nan), "NaN"),
        (lambda: Cascade(SMALLER, LARGER, rule=ChowSum(), threshold=0.0).generate([]), "no prompt"),
        (lambda: deferral_curve([1.0], small=[1.0, 0.0], large=[1.0, 0.0]), "shapes"),
        (lambda: deferral_curve([math.nan], small=[1.0], large=[1.0]), "NaN"),
        (lambda: deferral_curve([0.0], small=[0.0], large=[0.0]).gain, "nothing can be gained"),
        (lambda: deferral_curve([0.0], small=[0.0], large=[0.0]).at(1.5), "from 0 to 1"),
        (lambda: threshold_for([], 0.5), "at least one"),
        (lambda: threshold_for([1.0], 1.5), "rate"),
    ],
)
def test_misuse_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()

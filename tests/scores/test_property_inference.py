"""Property inference: effective samples against binomial sums, and attacks on small models whose make-up is known."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nextoken
from nextoken.model.table import TableModel
from nextoken.scores.property_inference import (
    accuracy_bound,
    exact_accuracy,
    exact_samples,
    leakage,
    leaked_samples,
    loss_test,
    per_point_test,
    threshold_test,
)

RATIOS = st.floats(0.02, 0.98)


@pytest.mark.paper("2109.06024")
@pytest.mark.parametrize("n", [0, 1, 2, 7, 30])
@pytest.mark.parametrize(
    ("a0", "a1"), [(0.5, 0.2), (0.2, 0.5), (0.9, 0.91), (0.0, 0.3), (1.0, 0.4), (0.3, 0.3), (0, 1)]
)
def test_exact_accuracy_is_half_of_the_total_variation(n: int, a0: float, a1: float) -> None:
    law = [[math.comb(n, k) * a**k * (1 - a) ** (n - k) for k in range(n + 1)] for a in (a0, a1)]
    best = sum(max(x, y) for x, y in zip(*law, strict=True)) / 2
    assert exact_accuracy(n, a0, a1) == pytest.approx(best, abs=1e-12)
    assert best <= accuracy_bound(n, a0, a1) + 1e-12


@pytest.mark.paper("2109.06024")
def test_the_example_of_the_loose_bound() -> None:
    assert exact_accuracy(10, 0.5, 0.2) == pytest.approx(0.854, abs=5e-4)
    assert accuracy_bound(10, 0.5, 0.2) == pytest.approx(0.998, abs=5e-4)
    # Not having the property tells less than having it: r is 0.5 / 0.8, not 0.2 / 0.5.
    assert leaked_samples(0.75, 0.5, 0.2) == pytest.approx(math.log(0.75) / math.log(0.625))


@pytest.mark.paper("2109.06024")
@given(RATIOS, RATIOS, st.integers(1, 60))
def test_effective_samples_invert_the_bound_and_never_exceed_the_truth(a0: float, a1: float, n: int) -> None:
    accuracy = accuracy_bound(n, a0, a1)
    if abs(a0 - a1) < 1e-3 or accuracy > 1 - 1e-6:
        return
    assert leaked_samples(accuracy, a0, a1) == pytest.approx(n, rel=1e-4)
    assert leaked_samples(accuracy, a0, a1) == pytest.approx(leaked_samples(accuracy, a1, a0))
    optimum = exact_accuracy(n, a0, a1)
    assert leaked_samples(optimum, a0, a1) <= n * (1 + 1e-9)
    fewest = exact_samples(optimum - 1e-12, a0, a1)
    assert fewest <= n and (fewest == 0 or exact_accuracy(int(fewest) - 1, a0, a1) < optimum)


@pytest.mark.paper("2109.06024")
def test_conventions_at_the_ends() -> None:
    assert leaked_samples(0.9, 0.3, 0.3) == 0 and exact_samples(0.9, 0.3, 0.3) == math.inf
    assert leaked_samples(1.0, 0.3, 0.4) == math.inf and exact_samples(1.0, 0.3, 0.4) == math.inf
    assert leaked_samples(0.9, 0.0, 1.0) == math.inf and exact_samples(1.0, 0.0, 1.0) == 1
    assert leaked_samples(0.2, 0.3, 0.4) == 0 and exact_samples(0.5, 0.3, 0.4) == 0
    assert exact_samples(0.99, 0.5, 0.501, most=1000) == math.inf
    for wrong in (lambda: leaked_samples(1.2, 0.3, 0.4), lambda: accuracy_bound(3, -0.1, 0.4)):
        with pytest.raises(ValueError, match="from 0 to 1"):
            wrong()


@pytest.mark.paper("2109.06024")
def test_an_adversary_with_samples_leaks_no_more_than_it_was_given() -> None:
    """4,000 games with 8 samples: the accuracy is the optimum within four standard errors (fails once in 16,000)."""
    random, n = np.random.default_rng(0), 8
    side = random.integers(0, 2, 4000)
    counts = random.binomial(n, np.where(side == 1, 0.5, 0.2))
    likelier = counts * math.log(0.5 / 0.2) + (n - counts) * math.log(0.5 / 0.8) > 0
    found = leakage(likelier, side, 0.2, 0.5)
    assert abs(found.accuracy - exact_accuracy(n, 0.2, 0.5)) < 4 * math.sqrt(0.25 / 4000)
    assert found.samples <= n and found.low < found.accuracy < found.high
    assert found.advantage == pytest.approx(2 * found.accuracy - 1, abs=0.02)
    assert found.samples_low < found.samples


def test_few_victims_prove_little() -> None:
    found = leakage(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), 0.2, 0.5)
    assert found.accuracy == 1 and found.samples == math.inf and found.samples_low < 0.2
    with pytest.raises(ValueError, match="both sides"):
        leakage(np.ones(3), np.ones(3), 0.2, 0.5)


def brute_rule(zero: list[float], one: list[float]) -> float:
    """The best accuracy, balanced, of any threshold in any direction."""
    cuts = [*zero, *one, max(*zero, *one) + 1]
    shares = [(np.mean([z < c for z in zero]), np.mean([o < c for o in one])) for c in cuts]
    return max(max((1 - z + o) / 2, (z + 1 - o) / 2) for z, o in shares)


@pytest.mark.paper("2109.06024")
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6),
)
def test_the_threshold_is_the_best_on_the_shadow_models(
    zero: list[tuple[int, int]], one: list[tuple[int, int]]
) -> None:
    """Judged on the shadow models themselves: nothing that a threshold on either loss can do is better."""
    shadow0, shadow1 = np.array(zero, dtype=float), np.array(one, dtype=float)
    said0, said1 = threshold_test(shadow0, shadow1, shadow0), threshold_test(shadow0, shadow1, shadow1)
    reached = (1 - said0.mean() + said1.mean()) / 2
    best = max(brute_rule(shadow0[:, side].tolist(), shadow1[:, side].tolist()) for side in (0, 1))
    assert reached == pytest.approx(best)


@pytest.mark.paper("2109.06024")
def test_losses_decide_by_the_smaller_and_ties_say_1() -> None:
    assert loss_test(np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]])).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"\[models, 2\]"):
        loss_test(np.ones((3, 3)))


@pytest.mark.paper("2109.06024")
def test_one_text_that_tells_the_sides_apart_outvotes_noise() -> None:
    random = np.random.default_rng(1)

    def losses(side: int) -> np.ndarray:
        noise = random.normal(size=(30, 20))
        noise[:, 7] = 4.0 * side + 0.3 * random.normal(size=30)
        return noise

    shadow0, shadow1 = losses(0), losses(1)
    said = [per_point_test(shadow0, shadow1, losses(side)).mean() for side in (0, 1)]
    assert said == [0, 1]
    with pytest.raises(ValueError, match="same texts"):
        per_point_test(shadow0, shadow1, shadow0[:, :5])


@pytest.mark.paper("2109.06024")
def test_with_two_texts_the_vote_is_a_rule_on_one_of_them_or_both() -> None:
    """Exhaustive over small losses: shadow models are told apart at least as well as by the better text alone."""
    values = [np.array(v, dtype=float).reshape(2, 2) for v in product((0, 1), repeat=4)]
    for shadow0, shadow1 in product(values, values):
        said0, said1 = (per_point_test(shadow0, shadow1, shadow) for shadow in (shadow0, shadow1))
        best = max(brute_rule(shadow0[:, p].tolist(), shadow1[:, p].tolist()) for p in (0, 1))
        assert (1 - said0.mean() + said1.mean()) / 2 >= best - 1e-9


LANGUAGES = [TableModel.random(4, order=1, seed=seed, concentration=0.5) for seed in (1, 2)]


def corpus(random: np.random.Generator, ratio: float, size: int) -> list[list[int]]:
    """Sequences of 12 tokens, a share `ratio` of them exactly of the second language."""
    second = round(ratio * size)
    found = []
    for model, count in ((LANGUAGES[0], size - second), (LANGUAGES[1], second)):
        steps = model._log_table.exp().numpy().cumsum(1)
        ids = np.full((count, 1), 4)
        for _ in range(12):
            drawn = (steps[ids[:, -1]] < random.random((count, 1))).sum(1, keepdims=True)
            ids = np.concatenate([ids, drawn], axis=1)
        found += ids[:, 1:].tolist()
    return found


def losses(random: np.random.Generator, ratio: float, models: int, held_out: list[list[str]]) -> np.ndarray:
    """Mean surprisals of bigram models on the adversary's texts of either side [models, 2]."""
    found = []
    for _ in range(models):
        model = TableModel.from_counts(corpus(random, ratio, 60), [*"abcd"], order=1, smoothing=0.5)
        signature = nextoken.read(model, [text for texts in held_out for text in texts], top=0)
        found.append(-nextoken.score(signature, "mean_logprob").reshape(2, -1).mean(1))
    return np.array(found)


@pytest.mark.paper("2109.06024")
def test_attacks_on_bigram_models_of_two_mixtures() -> None:
    """0.3 against 0.7: nearly always told apart. The same ratio twice: by chance, within 4 standard errors."""
    random = np.random.default_rng(5)
    sides = (0.3, 0.7)
    held_out = [["".join("abcd"[i] for i in ids) for ids in corpus(random, ratio, 60)] for ratio in sides]
    shadow, victims = ([losses(random, ratio, 12, held_out) for ratio in sides] for _ in range(2))
    truth = np.repeat([0, 1], 12)
    by_loss = leakage(loss_test(np.concatenate(victims)), truth, *sides)
    by_threshold = leakage(threshold_test(*shadow, np.concatenate(victims)), truth, *sides)
    assert by_loss.accuracy > 0.9 and by_threshold.accuracy > 0.9
    null = [losses(random, 0.5, 12, held_out) for _ in range(4)]
    for said in (loss_test(np.concatenate(null[:2])), threshold_test(null[2], null[3], np.concatenate(null[:2]))):
        assert abs((said == truth).mean() - 0.5) < 4 * 0.5 / math.sqrt(24)

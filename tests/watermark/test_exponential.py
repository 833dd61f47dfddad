"""ExponentialWatermark: its numbers, its law at one place, its cost with and without the key."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma
from scipy.stats import chisquare, kstest

from nextoken.watermark.exponential import ExponentialWatermark
from nextoken.watermark.key import Key

LAW = np.array([0.5, 0.25, 0.15, 0.07, 0.03, 0.0])


def mark(number: int, **settings: float) -> ExponentialWatermark:
    return ExponentialWatermark(Key(f"key of a test {number:6}"), **settings)  # type: ignore[arg-type]


def harmonic(p: np.ndarray) -> np.ndarray:
    return np.asarray(digamma(1 / p + 1) + np.euler_gamma)


@pytest.mark.paper("2307.15593")
def test_one_token_has_its_law_and_its_expected_cost() -> None:
    """20,000 places of keys: chi-square at 1e-4, and the mean of -c given y within 4.5 standard errors of H_{1/p}."""
    scores = torch.tensor(LAW).log()
    chosen, costs = [], []
    for number in range(40):
        one = mark(number, length=500)
        columns = one.costs(np.arange(6))
        for place in range(500):
            token = one.choose(scores, place)
            chosen.append(token)
            costs.append(columns[token, place])
    tokens, found = np.array(chosen), -np.array(costs)
    assert chisquare(np.bincount(tokens, minlength=5), LAW[:5] * 20_000).pvalue > 1e-4
    for token in range(5):
        sample = found[tokens == token]
        error = sample.std() / math.sqrt(len(sample))
        assert abs(sample.mean() - harmonic(LAW[token : token + 1])[0]) < 4.5 * error
    assert harmonic(np.array([1.0]))[0] == pytest.approx(1)


@pytest.mark.paper("2307.15593")
def test_the_choice_is_the_definition() -> None:
    """argmin -log(xi) / p in plain arithmetic, with half-precision scores of a constant more as well."""
    one = mark(3)
    for place in range(50):
        costs = one.costs(np.arange(5))[:, place]
        arrival = -np.log(-np.expm1(costs)) / LAW[:5]
        scores = torch.tensor(LAW).log()
        assert one.choose(scores, place) == one.choose(scores + 7.5, place) == arrival.argmin()
        wide = torch.cat([scores, torch.full((4,), -math.inf)])
        assert one.choose(wide, place) == arrival.argmin()


def test_tiny_probabilities_do_not_underflow() -> None:
    """xi^(1/p) would be 0 for all of them; the law among them must stay (chi-square at 1e-4 over 3,000 places)."""
    one = mark(1, length=3000)
    scores = torch.tensor([-800.0, -800.0 + math.log(3.0), -math.inf])
    counts = np.bincount([one.choose(scores, place) for place in range(3000)], minlength=3)
    assert counts[2] == 0 and chisquare(counts[:2], [750, 2250]).pvalue > 1e-4


@pytest.mark.paper("2307.15593")
def test_without_the_key_the_cost_of_a_block_is_a_gamma_variable() -> None:
    """-sum c at a fixed place ~ Gamma(k, 1), under the key and under fresh keys; false-alarm rate 1e-4 each."""
    text = np.array([0, 3, 3, 1, 4, 0, 2, 2])
    sums = [-sum(mark(n, length=8).costs(np.arange(5))[token, i] for i, token in enumerate(text)) for n in range(700)]
    assert kstest(sums, "gamma", args=(8,)).pvalue > 1e-4
    fresh = mark(0, length=8)._fresh_costs(np.arange(5), 1500, np.random.default_rng(0))
    assert kstest(-fresh[:, text, np.arange(8)].sum(1), "gamma", args=(8,)).pvalue > 1e-4


def test_only_the_columns_that_occur_are_made() -> None:
    one = mark(2)
    assert (one.costs(np.array([4, 90, 7])) == one.costs(np.arange(100))[[4, 90, 7]]).all()
    assert one._fresh_costs(np.array([4, 90]), 3, np.random.default_rng(0)).shape == (3, 2, 256)

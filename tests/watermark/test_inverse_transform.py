"""InverseTransformWatermark: its order, its law at one place, its cost."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp

from nextoken.watermark.inverse_transform import InverseTransformWatermark
from nextoken.watermark.key import Key

LAW = np.array([0.5, 0.25, 0.0, 0.15, 0.07, 0.03])


def mark(number: int, vocab_size: int = 6, **settings: float) -> InverseTransformWatermark:
    return InverseTransformWatermark(Key(f"key of a test {number:6}"), vocab_size=vocab_size, **settings)  # type: ignore[arg-type]


@pytest.mark.paper("2307.15593")
def test_one_token_has_its_law_under_any_one_order() -> None:
    """The numbers alone make the law, whatever the order: 10,000 places of one key, chi-square at 1e-4."""
    one, scores = mark(1, length=10_000), torch.tensor(LAW).log()
    counts = np.bincount([one.choose(scores, place) for place in range(10_000)], minlength=6)
    there = LAW > 0
    assert counts[2] == 0 and chisquare(counts[there], LAW[there] * 10_000).pvalue > 1e-4


@pytest.mark.paper("2307.15593")
def test_the_choice_is_the_definition() -> None:
    """The first token in the order whose cumulative reaches u."""
    for number in range(20):
        one = mark(number)
        order, numbers = one._order, one._uniform
        assert sorted(order) == list(range(6)) and [one._places[token] for token in order] == [i / 5 for i in range(6)]
        for place in range(20):
            total = 0.0
            for token in order:
                total += LAW[token]
                if total >= numbers[place]:
                    break
            assert one.choose(torch.tensor(LAW).log() - 3.0, place) == token
            assert one.costs(np.array([token]))[0, place] == abs(one._places[token] - numbers[place])


@pytest.mark.paper("2307.15593")
def test_marked_tokens_cost_less_and_less_with_entropy() -> None:
    """Over flat laws of V tokens |eta - u| is at most 1 / V, without the key 1/3 on average; with p = 1 it is that."""
    one = mark(2, vocab_size=40)
    flat = [one.costs(np.array([one.choose(torch.zeros(40), place)]))[0, place] for place in range(256)]
    assert max(flat) < 1 / 39
    others = one.costs(np.arange(40)).mean()
    assert others == pytest.approx(1 / 3, abs=0.03)


def test_fresh_keys_have_the_law_of_keys() -> None:
    """Sums of costs along a text under 1,500 keys and fresh ones, two-sample test at 1e-4; all orders come alike."""
    text = np.array([0, 3, 3, 1, 5])
    ours = [mark(n, length=5).costs(np.arange(6))[text, np.arange(5)].sum() for n in range(1500)]
    fresh = mark(0, length=5)._fresh_costs(np.arange(6), 1500, np.random.default_rng(0))[:, text, np.arange(5)]
    assert ks_2samp(ours, fresh.sum(1)).pvalue > 1e-4
    orders = Counter(tuple(mark(n, vocab_size=3)._order) for n in range(1200))
    assert len(orders) == 6 and chisquare(list(orders.values())).pvalue > 1e-4


def test_a_number_beyond_a_rounded_sum_takes_a_possible_token() -> None:
    one = mark(0)
    one.__dict__["_uniform"] = np.array([math.nextafter(1, 0), 2.0**-53])
    scores = torch.tensor([0.1] * 6).log()
    assert one.choose(scores, 0) == one._order[-1] and one.choose(scores, 1) == one._order[0]
    scores[one._order[-1]] = scores[one._order[0]] = -math.inf
    assert one.choose(scores, 0) == one._order[-2] and one.choose(scores, 1) == one._order[1]


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 6, the model's distributions have 7"):
        mark(0).choose(torch.zeros(7), 0)
    with pytest.raises(ValueError, match="go from 0 to 5, got 2 to 6"):
        mark(0).detect([2, 6])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        mark(0, vocab_size=1)

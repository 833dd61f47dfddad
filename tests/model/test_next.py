"""Next: narrowing, drawing, and the two ways of holding distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from nextoken.head import Head
from nextoken.model.next import DenseNext, HeadNext, invert_cdf


def test_the_head_and_its_logits_say_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 8, generator=generator), torch.randn(50, 8, generator=generator)
    lazy, dense = HeadNext(hidden, Head(weight)), DenseNext(hidden @ weight.T)
    torch.testing.assert_close(lazy.log_probs(), dense.log_probs())
    targets = torch.tensor([[1, 2, 3], [4, 5, -1]])
    left, right = lazy.statistics(targets, top=4), dense.statistics(targets, top=4)
    torch.testing.assert_close(left.entropy, right.entropy)
    torch.testing.assert_close(left.logprob, right.logprob, equal_nan=True)
    assert torch.equal(left.top_ids, right.top_ids)
    assert lazy[1, :2].hidden.shape == (1, 2, 8)


@pytest.mark.parametrize("key", [(2, 0), (slice(None), 5), (-4,)])
def test_indices_outside_are_refused(key: tuple) -> None:
    with pytest.raises(IndexError):
        DenseNext(torch.zeros(2, 3, 4))[key if len(key) > 1 else key[0]]


def test_draws_follow_the_distribution() -> None:
    """Chi-square at a false-alarm rate of 1e-4."""
    logits = torch.tensor([2.0, float("-inf"), 0.0, -1.0, 1.0])
    draws = DenseNext(logits.expand(20_000, 1, 5)).sample(torch.Generator().manual_seed(7))
    counts = torch.bincount(draws.flatten(), minlength=5)
    assert counts[1] == 0
    possible = [0, 2, 3, 4]
    expected = torch.softmax(logits.double(), 0)[possible] * 20_000
    assert chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-4


@given(st.integers(0, 2**31), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_an_impossible_token_is_never_drawn_at_the_edges(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.log_softmax(torch.randn(size, generator=generator), 0)
    log_probs[torch.randint(size, (), generator=generator)] = float("-inf")
    for edge in (0.0, 5e-324, 1 - 2**-53):
        token = invert_cdf(log_probs, torch.tensor(edge, dtype=torch.float64))
        assert log_probs[token] > float("-inf")


def test_one_generator_per_row_or_one_for_all() -> None:
    result = DenseNext(torch.zeros(3, 2, 9))
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        result.sample([torch.Generator(), torch.Generator()])

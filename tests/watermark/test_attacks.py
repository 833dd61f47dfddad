"""Attacks: their rates are exact, order is kept where they say so, and what they draw follows the law."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from nextoken.watermark import attacks

texts = st.lists(st.integers(0, 6), max_size=40)
rates = st.floats(0, 1)
seeds = st.integers(0, 2**32)


def is_subsequence(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(any(token == other for other in rest) for token in part)


@given(texts, rates, seeds)
def test_substitution_changes_exactly_its_share(tokens: list[int], rate: float, seed: int) -> None:
    attacked = attacks.substitute(tokens, rate, 7, seed=seed)
    assert sum(a != b for a, b in zip(attacked, tokens, strict=True)) == math.floor(rate * len(tokens) + 0.5)
    assert attacked == attacks.substitute(tokens, rate, 7, seed=seed) and set(attacked) <= set(range(7))


@given(texts, st.floats(0, 2), seeds)
def test_insertion_keeps_the_text_within(tokens: list[int], rate: float, seed: int) -> None:
    attacked = attacks.insert(tokens, rate, [0, 0, 1, 3], seed=seed)
    assert len(attacked) == len(tokens) + math.floor(rate * len(tokens) + 0.5)
    assert is_subsequence(tokens, attacked)
    assert not (Counter(attacked) - Counter(tokens)).keys() - {2, 3}


@given(texts, rates, seeds)
def test_deletion_leaves_a_part_in_order(tokens: list[int], rate: float, seed: int) -> None:
    attacked = attacks.delete(tokens, rate, seed=seed)
    assert len(tokens) - len(attacked) == math.floor(rate * len(tokens) + 0.5)
    assert is_subsequence(attacked, tokens)


@given(texts, st.integers(0, 50), seeds)
def test_a_crop_is_a_stretch(tokens: list[int], length: int, seed: int) -> None:
    attacked = attacks.crop(tokens, length, seed=seed)
    assert len(attacked) == min(length, len(tokens))
    assert any(tokens[at : at + len(attacked)] == attacked for at in range(len(tokens) + 1))


@given(texts, st.integers(1, 9), seeds)
def test_shuffled_texts_are_of_the_same_parts(tokens: list[int], size: int, seed: int) -> None:
    blocks = [tuple(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    attacked = attacks.shuffle_blocks(tokens, size, seed=seed)
    assert Counter(attacked) == Counter(tokens)
    if len(tokens) % size == 0:
        assert Counter(tuple(attacked[at : at + size]) for at in range(0, len(tokens), size)) == Counter(blocks)
    if len(blocks) == 1:
        assert attacked == tokens
    marked = [token for token in tokens if token != 6] + [6]
    text = attacks.shuffle_sentences([*marked, *marked, 6], {6}, seed=seed)
    assert text.count(6) == 3 and Counter(text) == Counter([*marked, *marked, 6])


def test_sentences_stay_whole() -> None:
    orders = {tuple(attacks.shuffle_sentences([1, 9, 2, 2, 9, 3], {9}, seed=seed)) for seed in range(60)}
    assert orders == {
        (*a, *b, *c)
        for a, b, c in [
            ([1, 9], [2, 2, 9], [3]),
            ([1, 9], [3], [2, 2, 9]),
            ([2, 2, 9], [1, 9], [3]),
            ([2, 2, 9], [3], [1, 9]),
            ([3], [1, 9], [2, 2, 9]),
            ([3], [2, 2, 9], [1, 9]),
        ]
    }


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 5), seeds)
def test_pasted_pieces_are_apart_and_in_order(size: int, others: int, pieces: int, seed: int) -> None:
    marked, human = list(range(100, 100 + size)), list(range(others))
    if pieces > max(1, size) or pieces > others + 1:
        with pytest.raises(ValueError, match="pieces"):
            attacks.paste(marked, human, pieces=pieces, seed=seed)
        return
    attacked = attacks.paste(marked, human, pieces=pieces, seed=seed)
    assert [t for t in attacked if t >= 100] == marked and [t for t in attacked if t < 100] == human
    begins = [at for at, t in enumerate(attacked) if t >= 100 and (at == 0 or attacked[at - 1] < 100)]
    assert len(begins) == (pieces if size else 0)


def test_what_is_put_in_follows_the_law() -> None:
    """Chi-square at a false-alarm rate of 1e-4 each: insertions by the law, substitutions by the law less the token."""
    law = [0.5, 0.3, 0.0, 0.2]
    put_in = Counter(attacks.insert([9] * 20_000, 1.0, law, seed=1))
    assert chisquare([put_in[0], put_in[1], put_in[3]], [10_000, 6_000, 4_000]).pvalue > 1e-4 and put_in[2] == 0
    instead = Counter(attacks.substitute([0] * 20_000, 1.0, law, seed=2))
    assert chisquare([instead[1], instead[3]], [12_000, 8_000]).pvalue > 1e-4 and set(instead) == {1, 3}
    outside = Counter(attacks.substitute([7] * 20_000, 1.0, 2, seed=3))
    assert chisquare([outside[0], outside[1]]).pvalue > 1e-4


def test_places_are_uniform() -> None:
    """Chi-square at a false-alarm rate of 1e-4 each, over 4,000 seeds."""
    tokens, runs = list(range(8)), 4000
    gone = Counter(
        token for seed in range(runs) for token in set(tokens) - set(attacks.delete(tokens, 0.25, seed=seed))
    )
    assert chisquare([gone[token] for token in tokens]).pvalue > 1e-4
    gaps = Counter(attacks.insert(tokens, 0.125, [0.0] * 9 + [1.0], seed=seed).index(9) for seed in range(runs))
    assert chisquare([gaps[gap] for gap in range(9)]).pvalue > 1e-4
    begins = Counter(attacks.crop(tokens, 5, seed=seed)[0] for seed in range(runs))
    assert chisquare([begins[at] for at in range(4)]).pvalue > 1e-4


def test_unigram_counts_shares() -> None:
    assert attacks.unigram([[0, 1, 1], [], [3]], vocab_size=5).tolist() == [0.25, 0.5, 0, 0.25, 0]
    for wrong in ([], [[]], [[5]], [[-1]]):
        with pytest.raises(ValueError):
            attacks.unigram(wrong, vocab_size=5)


def test_misuse_is_refused() -> None:
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="rate"):
            attacks.substitute([1, 2], rate, 5, seed=0)
        with pytest.raises(ValueError, match="rate"):
            attacks.delete([1, 2], rate, seed=0)
    for rate in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="rate"):
            attacks.insert([1, 2], rate, 5, seed=0)
    for law in (0, [], [0.0, 0.0], [-1.0, 2.0], np.ones((2, 2)), [math.nan]):
        with pytest.raises(ValueError, match="law"):
            attacks.insert([1, 2], 0.5, law, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no other token than 1"):
        attacks.substitute([1, 1], 1.0, [0.0, 1.0], seed=0)
    with pytest.raises(ValueError, match="at least 0"):
        attacks.crop([1], -1, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        attacks.shuffle_blocks([1], 0, seed=0)

"""Beam searches against exhaustive search, transformers and the law of sampling without replacement."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from nextoken.decode.generate import generate
from nextoken.decode.parsing import transform
from nextoken.decode.search import beam_search, stochastic_beam_search
from nextoken.model.loading import load
from nextoken.model.table import TableModel


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_strings(penalty: float, seed: int) -> None:
    """With room for every prefix the search is exhaustive."""
    model = TableModel.random(3, order=2, eos=True, seed=seed)
    law = model.enumerate(4)

    def score(string: tuple[int, ...]) -> float:
        return math.log(law[string]) / len(string) ** penalty

    best = sorted(law, key=score, reverse=True)
    found = beam_search(model, "", width=200, max_tokens=4, length_penalty=penalty)
    assert [g.tokens for g in found[:10]] == best[:10]
    assert [-sum(g.surprisals) for g in found[:10]] == pytest.approx([math.log(law[s]) for s in best[:10]])


def test_a_beam_of_one_is_greedy() -> None:
    model = TableModel.random(5, order=2, eos=True, seed=3)
    (found,) = beam_search(model, "a", width=1, max_tokens=8)
    assert found.tokens == generate(model, "a", transform="greedy", max_tokens=8).tokens


def test_transforms_change_the_law_that_is_searched() -> None:
    model = TableModel.random(4, order=1, seed=1)
    found = beam_search(model, "", width=64, max_tokens=3, transform="no_repeat_ngram(1)")
    assert all(len(set(g.tokens)) == 3 for g in found)


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("penalty", [0.5, 1.0])
def test_equals_transformers(width: int, penalty: float) -> None:
    model = load("nano")
    network = model.model
    for prompt in ("It was", "Question: Tom has 3 apples and eats 1."):
        ids = torch.tensor([[model.vocab.bos_id, *model.vocab.encode(prompt).ids]])
        with torch.no_grad():
            theirs = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=width,
                do_sample=False,
                max_new_tokens=12,
                length_penalty=penalty,
                num_return_sequences=width,
                pad_token_id=1,
            )
        expected = [[t for t in row if t != 1] for row in theirs[:, ids.shape[1] :].tolist()]
        ours = beam_search(model, prompt, width=width, max_tokens=12, length_penalty=penalty)
        assert [[t for t in g.tokens if t != 1] for g in ours] == expected


def test_diverse_groups_choose_different_tokens() -> None:
    model = TableModel.random(6, order=2, seed=5)
    plain = beam_search(model, "", width=4, groups=4, diversity=0.0, max_tokens=4)
    varied = beam_search(model, "", width=4, groups=4, diversity=100.0, max_tokens=4)
    assert len({g.tokens for g in plain}) == 1
    assert len({g.tokens[0] for g in varied}) == 4
    # The first group never sees a penalty.
    assert beam_search(model, "", width=1, max_tokens=4)[0].tokens in {g.tokens for g in varied}


@pytest.mark.paper("1903.06059")
def test_strings_without_replacement_follow_their_law() -> None:
    """Ordered pairs have probability p_1 p_2 / (1 - p_1); chi-square at a false-alarm rate of 1e-4."""
    model = TableModel.random(2, order=1, eos=True, seed=8)
    law, runs = model.enumerate(2), 3000
    expected = {(a, b): law[a] * law[b] / (1 - law[a]) for a, b in itertools.permutations(law, 2)}
    counts: Counter[tuple] = Counter()
    for seed in range(runs):
        drawn = stochastic_beam_search(model, "", k=2, max_tokens=2, seed=seed)
        counts[tuple(g.tokens for g in drawn.generations)] += 1
    assert set(counts) <= set(expected)
    pairs = [pair for pair in expected if expected[pair] * runs >= 5]
    observed = [counts[pair] for pair in pairs]
    shares = [expected[pair] for pair in pairs]
    if 1 - sum(shares) > 1e-9:
        observed.append(runs - sum(observed))
        shares.append(1 - sum(shares))
    assert chisquare(observed, np.array(shares) * runs).pvalue > 1e-4


def test_weights_give_unbiased_estimates() -> None:
    model = TableModel.random(3, order=1, eos=True, seed=2)
    law = model.enumerate(3)
    truth = sum(p * len(s) for s, p in law.items())
    estimates = []
    for seed in range(1500):
        drawn = stochastic_beam_search(model, "", k=3, max_tokens=3, seed=seed)
        estimates.append(sum(w * len(g.tokens) for w, g in zip(drawn.weights, drawn.generations, strict=True)))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 4 * error
    assert error < 0.05


def test_all_strings_when_k_is_large() -> None:
    model = TableModel.random(2, order=1, eos=True, seed=8)
    law = model.enumerate(2)
    drawn = stochastic_beam_search(model, "", k=50, max_tokens=2, seed=0)
    assert {g.tokens for g in drawn.generations} == set(law)
    assert sum(drawn.weights) == pytest.approx(1)
    for generation, log_prob in zip(drawn.generations, drawn.log_probs, strict=True):
        assert log_prob == pytest.approx(math.log(law[generation.tokens]))


def test_one_string_is_an_ordinary_sample() -> None:
    model = TableModel.random(2, order=1, eos=True, seed=8)
    law, runs = model.enumerate(2), 2000
    counts = Counter(
        stochastic_beam_search(model, "", k=1, max_tokens=2, seed=s).generations[0].tokens for s in range(runs)
    )
    strings = list(law)
    assert chisquare([counts[s] for s in strings], np.array([law[s] for s in strings]) * runs).pvalue > 1e-4


def test_misuse_is_refused() -> None:
    model = TableModel.random(3, seed=0)
    with pytest.raises(ValueError, match="multiple of groups"):
        beam_search(model, "", width=3, groups=2)
    with pytest.raises(ValueError, match="flips coins"):
        beam_search(model, "", transform=transform("xtc(0.5, 0.1)"))
    with pytest.raises(ValueError, match="k must be"):
        stochastic_beam_search(model, "", k=0)

"""Prefix labels: by hand and by brute force, the tree's sums, and that they estimate the exact value without bias."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextoken.decode.generate import generate
from nextoken.model.table import TableModel
from nextoken.values.prefix_labels import Solution, outcome_labels, prefix_labels
from nextoken.values.token_value import TableTokenValue

MODEL = TableModel.random(3, order=2, eos=True, seed=4)
BOS, EOS = 3, 4
MOST = 5


def right(tokens: tuple[int, ...]) -> float:
    """Whether the symbols sum to a multiple of 3."""
    return float(sum(token for token in tokens if token < BOS) % 3 == 0)


SOLUTIONS = st.lists(
    st.builds(
        lambda prompt, tokens: Solution((BOS, *prompt), tuple(tokens), right(tuple(tokens))),
        st.sampled_from([(), (0,), (0, 1)]),
        st.lists(st.integers(0, 2), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=25,
)


@pytest.mark.paper("2407.12863")
def test_labels_by_hand() -> None:
    """A shared prefix has the mean of those that share it; the outcome of the own solution comes after the fork."""
    solutions = [
        Solution((BOS,), (0, 1, EOS), 1),
        Solution((BOS,), (0, 1, EOS), 1),
        Solution((BOS,), (0, 2, EOS), 0),
        Solution((BOS,), (1, EOS), 0),
        Solution((BOS, 0), (0, 1, EOS), 0),
    ]
    found = prefix_labels(solutions)
    assert found.labels == ((2 / 3, 1, 1), (2 / 3, 1, 1), (2 / 3, 0, 0), (0, 0), (0, 0, 0))
    assert found.visits == ((3, 2, 2), (3, 2, 2), (3, 1, 1), (1, 1), (1, 1, 1))
    assert found.accuracy == {(BOS,): 0.5, (BOS, 0): 0.0}
    assert found.shared == 7 / 14
    assert outcome_labels(solutions).labels == ((1, 1, 1), (1, 1, 1), (0, 0, 0), (0, 0), (0, 0, 0))


@pytest.mark.paper("2407.12863")
@given(SOLUTIONS)
@settings(max_examples=60)
def test_labels_are_the_definition_and_the_tree_adds_up(solutions: list[Solution]) -> None:
    found = prefix_labels(solutions)
    for one, labels, visits in zip(solutions, found.labels, found.visits, strict=True):
        for k in range(1, len(one.tokens) + 1):
            same = [s.outcome for s in solutions if s.prompt == one.prompt and s.tokens[:k] == one.tokens[:k]]
            assert visits[k - 1] == len(same)
            assert labels[k - 1] == pytest.approx(sum(same) / len(same))
    # What passes a node is what passes its children and what ends there.
    sums: dict[tuple[object, ...], float] = {}
    ends: dict[tuple[object, ...], float] = {}
    for one, labels, visits in zip(solutions, found.labels, found.visits, strict=True):
        sums[(one.prompt,)] = found.accuracy[one.prompt] * sum(s.prompt == one.prompt for s in solutions)
        for k in range(1, len(one.tokens) + 1):
            sums[(one.prompt, *one.tokens[:k])] = labels[k - 1] * visits[k - 1]
        end = (one.prompt, *one.tokens)
        ends[end] = ends.get(end, 0.0) + one.outcome
    for node, total in sums.items():
        children = sum(x for other, x in sums.items() if len(other) == len(node) + 1 and other[:-1] == node)
        assert total == pytest.approx(children + ends.get(node, 0.0))


@pytest.mark.paper("2110.14168")
@given(SOLUTIONS)
@settings(max_examples=30)
def test_solutions_alone_or_different_from_the_start_have_their_outcome(solutions: list[Solution]) -> None:
    apart = {(s.prompt, s.tokens[0]): s for s in solutions}.values()
    assert prefix_labels(list(apart)) == outcome_labels(list(apart))
    assert prefix_labels(solutions[:1]) == outcome_labels(solutions[:1])


def test_solutions_keep_the_tokens_that_were_drawn() -> None:
    made = generate(MODEL, "ab", n=3, max_tokens=MOST, seed=0)
    assert isinstance(made, list)
    for one in made:
        solution = Solution.of(one, 1)
        assert (solution.prompt, solution.tokens) == ((BOS, 0, 1), one.tokens)


@pytest.mark.paper("2407.12863")
def test_labels_at_a_fixed_prefix_are_unbiased_and_their_intervals_hold() -> None:
    """300 data sets of 60 solutions. False alarms: 4 standard errors, 6e-5 a prefix; coverage 4 sigma of a binomial."""
    law = MODEL.enumerate(MOST)
    strings, rng = list(law), np.random.default_rng(0)
    p = np.array([law[string] for string in strings])
    exact = TableTokenValue(MODEL, lambda text: right(text[1:]), length=MOST + 1)
    prefixes = [(0,), (1, 2), (2, 0)]
    said: dict[tuple[int, ...], list[tuple[float, int]]] = {prefix: [] for prefix in prefixes}
    for _ in range(300):
        drawn = [strings[i] for i in rng.choice(len(strings), size=60, p=p / p.sum())]
        found = prefix_labels([Solution((BOS,), tokens, right(tokens)) for tokens in drawn])
        for prefix in prefixes:
            at = next((i for i, tokens in enumerate(drawn) if tokens[: len(prefix)] == prefix), None)
            if at is not None:
                said[prefix].append((found.labels[at][len(prefix) - 1], found.visits[at][len(prefix) - 1]))
    covered, tried = 0, 0
    for prefix in prefixes:
        truth = exact.of((BOS, *prefix))
        y, m = np.array([one[0] for one in said[prefix]]), np.array([one[1] for one in said[prefix]])
        assert 0.05 < truth < 0.95
        assert abs(y.mean() - truth) < 4 * y.std(ddof=1) / math.sqrt(len(y))
        # The error falls as 1 / sqrt(visits): its square times the visits is the variance of one outcome.
        assert np.mean((y - truth) ** 2 * m) == pytest.approx(truth * (1 - truth), rel=0.35)
        z = 1.96
        centre = (y + z * z / (2 * m)) / (1 + z * z / m)
        half = z * np.sqrt(y * (1 - y) / m + z * z / (4 * m * m)) / (1 + z * z / m)
        covered += int((abs(centre - truth) <= half).sum())
        tried += len(y)
    assert abs(covered / tried - 0.95) < 4 * math.sqrt(0.95 * 0.05 / tried) + 0.02  # discrete counts: 2 points


@pytest.mark.paper("2407.12863")
def test_leaving_repetitions_out_would_bias() -> None:
    drawn = [(0, 1)] * 9 + [(0, 0)]
    everything = prefix_labels([Solution((BOS,), tokens, right(tokens)) for tokens in drawn])
    single = prefix_labels([Solution((BOS,), tokens, right(tokens)) for tokens in dict.fromkeys(drawn)])
    assert everything.labels[0][0] == pytest.approx(0.1)
    assert single.labels[0][0] == pytest.approx(0.5)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="no solutions"):
        prefix_labels([])
    with pytest.raises(ValueError, match="from 0"):
        Solution((BOS,), (0,), 2.0)
    with pytest.raises(ValueError, match="at least one drawn"):
        Solution((BOS,), (), 1.0)

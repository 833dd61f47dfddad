"""CNTP: the law of its selection, its limits, and what is counted."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from nextoken.decode.cautious import Caution, cautious
from nextoken.decode.generate import generate
from nextoken.model.table import TableModel

RULE = "temperature(0.9)"


def paths(model: TableModel, depth: int) -> dict[tuple[int, ...], float]:
    """Every trial: tokens up to the first mark (the last symbol) or `depth`, with its probability."""
    mark, found = model.vocab.bos_id - 1, {}

    def walk(path: tuple[int, ...], probability: float) -> None:
        if len(path) == depth or (path and path[-1] == mark):
            found[path] = probability
            return
        row = model.row(path).exp()
        for token in range(mark + 1):
            walk((*path, token), probability * row[token].item())

    walk((), 1.0)
    return found


@pytest.mark.paper("2507.03038")
@pytest.mark.parametrize("count", [2, 5])
def test_selection_follows_its_law(count: int) -> None:
    """P(j) = S_ge(j)^N - S_gt(j)^N over perplexities; chi-square at a false-alarm rate of 1e-4."""
    model = TableModel.random(["a", "b", "."], order=2, seed=4)
    care = Caution(low=-2.0, high=-1.0, most=count, max_trial_tokens=4)
    law = paths(model, 4)
    perplexity = {path: -math.log(p) / len(path) for path, p in law.items()}
    expected = {}
    for path in law:
        at_least = sum(p for other, p in law.items() if perplexity[other] >= perplexity[path] - 1e-12)
        above = sum(p for other, p in law.items() if perplexity[other] > perplexity[path] + 1e-12)
        expected[path] = at_least**count - above**count
    assert sum(expected.values()) == pytest.approx(1)
    runs, counts = 2500, Counter()
    for seed in range(runs):
        made = cautious(model, "", max_tokens=4, caution=care, seed=seed)
        first = next((i + 1 for i, token in enumerate(made.tokens) if token == 2), 4)
        counts[made.tokens[:first]] += 1
    frequent = [path for path in expected if expected[path] * runs >= 5]
    observed = [counts[path] for path in frequent]
    shares = [expected[path] for path in frequent]
    if 1 - sum(shares) > 1e-9:
        observed.append(runs - sum(observed))
        shares.append(1 - sum(shares))
    assert chisquare(observed, np.array(shares) * runs).pvalue > 1e-4


@pytest.mark.parametrize("care", [Caution(most=1), Caution(low=99.0, high=100.0)])
def test_without_branching_it_is_plain_sampling(care: Caution) -> None:
    model = TableModel.random(["a", "b", "c", "."], order=2, eos=True, seed=4)
    for seed in range(20):
        ours = cautious(model, "ab", transform=RULE, max_tokens=9, caution=care, seed=seed)
        plain = generate(model, "ab", transform=RULE, max_tokens=9, seed=seed)
        assert (ours.tokens, ours.finish, ours.text) == (plain.tokens, plain.finish, plain.text)


def test_greedy_never_branches() -> None:
    model = TableModel.random(["a", "b", "."], order=2, seed=1)
    ours = cautious(model, "a", transform="greedy", max_tokens=8, seed=0)
    assert ours.tokens == generate(model, "a", transform="greedy", max_tokens=8).tokens


def test_many_trials_commit_the_least_perplexed_path() -> None:
    model = TableModel.random(["a", "b", "."], order=2, seed=6)
    law = paths(model, 3)
    best = min(law, key=lambda path: -math.log(law[path]) / len(path))
    care = Caution(low=-2.0, high=-1.0, most=400, max_trial_tokens=3)
    made = cautious(model, "", max_tokens=3, caution=care, seed=0)
    assert made.tokens[: len(best)] == best


def test_more_trials_make_likelier_texts() -> None:
    model = TableModel.random(["a", "b", "c", "d", "."], order=2, seed=3)
    means = []
    for most in (1, 4, 16):
        made = [cautious(model, "", max_tokens=12, caution=Caution(most=most), seed=seed) for seed in range(60)]
        means.append(np.mean([np.mean(g.surprisals) for g in made]))
    assert means[0] > means[1] > means[2]


@given(st.floats(0, 5), st.floats(0, 5), st.integers(1, 40))
def test_trials_grow_with_entropy(first: float, second: float, most: int) -> None:
    for rule in ("paper", "code"):
        care = Caution(most=most, rule=rule)
        assert care.trials(min(first, second)) <= care.trials(max(first, second))
        assert care.trials(0.01) == 1 and care.trials(1.5) == most
    paper, code = Caution(most=most).trials(first), Caution(most=most, rule="code").trials(first)
    assert abs(paper - code) <= 1


def test_marks_are_found_in_tokens() -> None:
    care = Caution()
    for spelled in (b".", b" ,", b".\n", b'."', b"?!", b"\n\n", "!”".encode()):
        assert care.ends(spelled), spelled
    for spelled in (b"a.", b"", b" ", b"U.S", b'"', b"-"):
        assert not care.ends(spelled), spelled


def test_misuse_is_refused() -> None:
    model = TableModel.random(3, seed=0)
    with pytest.raises(ValueError, match="low < high"):
        Caution(low=1.0, high=1.0)
    with pytest.raises(ValueError, match="flips coins"):
        cautious(model, "", transform="xtc(0.5, 0.1)")


@pytest.mark.parametrize(
    "settings", [{"rule": "warped"}, {"score": "warped"}, {"max_trial_tokens": 0}, {"low": 2.0}, {"most": 0}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Caution(**settings)

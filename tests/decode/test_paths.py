"""Path nucleus sampling: the law of its survivors by enumeration, and its limits: top-p, beam search, all strings."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from nextoken.decode.generate import generate
from nextoken.decode.paths import path_nucleus
from nextoken.decode.search import beam_search
from nextoken.model.loading import load
from nextoken.model.table import TableModel

String = tuple[int, ...]


def survivors(
    model: TableModel, k: int, top_p: float, depth: int, decay: float = 1.0, temperature: float = 1.0
) -> dict[frozenset[String], float]:
    """The law of the set of final paths, from the definition, by walking every ordered draw."""
    ends = model.vocab.eos_ids
    law: Counter[frozenset[String]] = Counter()

    def walk(live: dict[String, float], done: tuple[String, ...], step: int, mass: float) -> None:
        slots = k - len(done)
        if step == depth or not live:
            law[frozenset([*live, *done])] += mass
            return
        scores = {}
        for string, past in live.items():
            said = torch.log_softmax(model.row(string) / temperature, -1).tolist()
            for token, log_p in enumerate(said):
                if log_p > -math.inf:
                    scores[*string, token] = decay * past + log_p
        total = math.log(sum(math.exp(s) for s in scores.values()))
        shares = {string: math.exp(score - total) for string, score in scores.items()}
        ranked = sorted(shares, key=lambda string: -shares[string])
        size = next(n for n in range(1, len(ranked) + 1) if sum(shares[s] for s in ranked[:n]) >= top_p - 1e-12)
        nucleus, beyond = ranked[:size], ranked[size:]
        count = min(slots, size)
        inside = sum(shares[s] for s in nucleus)
        for drawn in itertools.permutations(nucleus, count):
            chance, left = 1.0, inside
            for string in drawn:
                chance *= shares[string] / left
                left -= shares[string]
            taken = [*drawn, *beyond[: slots - count]]
            walk(
                {s: scores[s] for s in taken if s[-1] not in ends},
                (*done, *(s for s in taken if s[-1] in ends)),
                step + 1,
                mass * chance,
            )

    walk({(): 0.0}, (), 0, 1.0)
    return law


@pytest.mark.paper("2409.19790")
@pytest.mark.parametrize(
    ("k", "top_p", "decay", "temperature", "eos", "table"),
    [(2, 0.7, 1.0, 1.0, False, 4), (2, 0.8, 0.2, 1.3, True, 7), (3, 0.7, 1.0, 2.0, True, 4)],
)
def test_survivors_follow_their_law(
    k: int, top_p: float, decay: float, temperature: float, eos: bool, table: int
) -> None:
    """Chi-square over sets of survivors at a false-alarm rate of 1e-4."""
    model, runs = TableModel.random(2 if eos else 3, order=1, eos=eos, seed=table), 800
    law = survivors(model, k, top_p, 3, decay, temperature)
    assert sum(law.values()) == pytest.approx(1)
    counts: Counter[frozenset[String]] = Counter()
    for seed in range(runs):
        found = path_nucleus(model, "", k=k, top_p=top_p, decay=decay, temperature=temperature, max_tokens=3, seed=seed)
        counts[frozenset(g.tokens for g in found.generations)] += 1
    assert set(counts) <= set(law)
    frequent = [s for s in law if law[s] * runs >= 5]
    assert len(frequent) > 3
    observed, shares = [counts[s] for s in frequent], [law[s] for s in frequent]
    if 1 - sum(shares) > 1e-9:
        observed.append(runs - sum(observed))
        shares.append(1 - sum(shares))
    assert chisquare(observed, np.array(shares) * runs).pvalue > 1e-4


@pytest.mark.paper("2409.19790")
@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_one_path_is_top_p_sampling_token_for_token(top_p: float) -> None:
    table = TableModel.random(5, order=2, eos=True, seed=3)
    for model, prompt, seeds in ((table, "ab", 30), (load("nano"), "It was", 3)):
        for seed in range(seeds):
            rule = f"temperature(0.9) | top_p({top_p})"
            plain = generate(model, prompt, transform=rule, max_tokens=12, seed=seed)
            (found,) = path_nucleus(
                model, prompt, k=1, top_p=top_p, temperature=0.9, max_tokens=12, seed=seed
            ).generations
            assert (found.tokens, found.finish, found.text) == (plain.tokens, plain.finish, plain.text)


def test_without_accumulation_it_is_so_many_chains() -> None:
    model = TableModel.random(4, order=2, eos=True, seed=6)
    for seed in range(20):
        chains = generate(model, "a", transform="top_p(0.8)", max_tokens=6, n=4, seed=seed)
        found = path_nucleus(model, "a", k=4, top_p=0.8, accumulate=False, max_tokens=6, seed=seed)
        assert Counter(g.tokens for g in found.generations) == Counter(g.tokens for g in chains)
        assert max(found.effective_parents) == 4


@pytest.mark.paper("2409.19790")
@given(st.integers(0, 200), st.integers(1, 4))
def test_an_empty_nucleus_is_beam_search(seed: int, k: int) -> None:
    model = TableModel.random(4, order=2, seed=seed)
    beam = beam_search(model, "", width=k, max_tokens=4)
    found = path_nucleus(model, "", k=k, top_p=0.0, max_tokens=4, seed=seed)
    # The nucleus of mass 0 is the best candidate, and the rest are filled in by score: nothing is random.
    assert [g.tokens for g in found.generations] == [g.tokens for g in beam]


def test_with_room_for_all_strings_it_finds_them_all() -> None:
    model = TableModel.random(2, order=1, eos=True, seed=8)
    law = model.enumerate(3)
    found = path_nucleus(model, "", k=len(law), top_p=1.0, max_tokens=3, seed=1)
    assert {g.tokens for g in found.generations} == set(law)
    assert sum(map(math.exp, found.log_probs)) == pytest.approx(1)


@given(st.integers(0, 300), st.integers(1, 5), st.floats(0, 1), st.floats(0.3, 1))
def test_what_always_holds(seed: int, k: int, top_p: float, decay: float) -> None:
    model = TableModel.random(3, order=2, eos=True, seed=seed % 17, zeros=0.2)
    found = path_nucleus(model, "", k=k, top_p=top_p, decay=decay, max_tokens=5, seed=seed)
    strings = [g.tokens for g in found.generations]
    assert len(set(strings)) == len(strings) <= k
    for string, log_prob in zip(strings, found.log_probs, strict=True):
        forced = sum(model.row(string[:t])[token].item() for t, token in enumerate(string))
        assert log_prob == pytest.approx(forced) and log_prob > -math.inf
    assert found.effective_parents[0] == 1
    assert all(1 <= parents <= k + 1e-9 for parents in found.effective_parents)
    assert all(1 <= parents <= k for parents in found.surviving_parents)
    assert sum(found.weights) == pytest.approx(1)
    ended = [g.finish == "eos" for g in found.generations]
    assert ended == sorted(ended, reverse=True)


def test_the_past_decides_which_parents_survive() -> None:
    """Two parents of weights 0.9 and 0.1 with uniform children: of the draws for one slot, 0.9 are of the first."""
    half = [0.5, 0.5]
    model = TableModel.given({(): half, (2,): [0.9, 0.1]}, ["a", "b"])
    shares = []
    for accumulate in (True, False):
        first = Counter(
            g.tokens[0]
            for seed in range(400)
            for g in path_nucleus(model, "", k=2, top_p=1.0, accumulate=accumulate, max_tokens=2, seed=seed).generations
        )
        shares.append(first[0] / first.total())
    # Both first tokens are drawn; then pairs of children: P(aa, ab), P(a, b each) and so on by enumeration.
    expected = survivors(model, 2, 1.0, 2)
    mean = sum(p * sum(s[0] == 0 for s in strings) / 2 for strings, p in expected.items())
    spread = 4 * 0.5 / math.sqrt(400)  # a false alarm in 10,000
    assert abs(shares[0] - mean) < spread and abs(shares[1] - 0.9) < spread
    assert mean > 0.7


def test_order_and_length() -> None:
    rows = {(): [0.6, 0.4], (0,): [0.9, 0.1], (1,): [0.2, 0.8]}
    model = TableModel.given({c: [*r[:1], *r[1:], 0.0] for c, r in rows.items()}, ["a", "b"], eos=True)
    found = path_nucleus(model, "", k=3, top_p=1.0, max_tokens=3, length_exponent=1.0)
    assert list(found.log_probs) == sorted(found.log_probs, reverse=True)
    assert all(g.finish == "length" for g in found.generations)
    short = TableModel.given({(): [0.5, 0.5], (0,): [0.95, 0.05]}, ["a"], eos=True)
    by_sum = path_nucleus(short, "", k=9, top_p=1.0, max_tokens=3).generations
    by_mean = path_nucleus(short, "", k=9, top_p=1.0, max_tokens=3, length_exponent=1.0).generations
    assert [len(g.tokens) for g in by_sum] == [1, 2, 3, 3]
    assert [len(g.tokens) for g in by_mean] == [1, 3, 2, 3]


def test_misuse_is_refused() -> None:
    model = TableModel.random(3, seed=0)
    for options in ({"k": 0}, {"decay": 0.0}, {"decay": 1.1}, {"temperature": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            path_nucleus(model, "", **options)  # type: ignore[arg-type]

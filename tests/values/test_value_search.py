"""Value search: what it collapses to, that exact values find what is right, its law on a table, and ranking."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.values.test_token_value import begun, small_hf

from nextoken.decode.generate import generate
from nextoken.decode.generation import Generation
from nextoken.model.table import TableModel
from nextoken.values._continuations import Continuations, Opening
from nextoken.values.token_value import TableTokenValue
from nextoken.values.value_ranking import final_values, rank, weighted_vote
from nextoken.values.value_search import Steps, apportioned, reward_balanced_search, value_beam_search

TABLE = TableModel.random(["a", "b", "."], order=2, eos=True, seed=8)
BOS, EOS, MOST = 3, 4, 7
STEPS = Steps(end=".", max_tokens=2)


def right(text: tuple[int, ...]) -> float:
    """Whether there are two b and an odd number of a: seldom, and not settled before the end."""
    return float(text.count(1) == 2 and text.count(0) % 2 == 1)


VALUE = TableTokenValue(TABLE, lambda text: right(text[1:]), length=MOST + 1)


def many(prompt: str, n: int, seed: int, **limits: object) -> list[Generation]:
    made = generate(TABLE, [prompt], n=n, seed=seed, **limits)  # type: ignore[call-overload]
    assert isinstance(made, list)
    return made


@given(st.integers(0, 10_000), st.sampled_from(["", "ab", "a."]))
@settings(max_examples=25)
def test_one_candidate_is_plain_sampling(seed: int, prompt: str) -> None:
    plain = generate(TABLE, prompt, seed=seed, max_tokens=MOST)
    for found in (
        value_beam_search(TABLE, VALUE, prompt, beams=1, candidates=1, steps=STEPS, max_tokens=MOST, seed=seed),
        reward_balanced_search(TABLE, VALUE, prompt, width=1, steps=STEPS, max_tokens=MOST, seed=seed),
    ):
        made = found.best
        assert (made.tokens, made.text, made.finish) == (plain.tokens, plain.text, plain.finish)
        assert made.surprisals == pytest.approx(plain.surprisals)
        assert found.tokens == len(plain.tokens)


@pytest.mark.paper("2408.00724")
def test_an_even_budget_is_independent_sampling() -> None:
    drawn = many("", 6, 3, max_tokens=MOST)
    found = reward_balanced_search(
        TABLE, VALUE, "", width=6, temperature=math.inf, steps=STEPS, max_tokens=MOST, seed=3
    )
    assert Counter(made.tokens for made in found.generations) == Counter(made.tokens for made in drawn)
    assert found.tokens == sum(len(made.tokens) for made in drawn)


def test_steps_longer_than_the_text_are_best_of_n() -> None:
    drawn = many("a", 8, 1, max_tokens=MOST)
    whole = Steps(end="nowhere", max_tokens=100)
    found = value_beam_search(TABLE, VALUE, "a", beams=2, candidates=8, steps=whole, max_tokens=MOST, seed=1)
    ranked = rank(VALUE, drawn)
    assert found.steps == 1
    assert list(found.values) == pytest.approx([v for v, _ in ranked[:2]])
    assert [made.tokens for made in found.generations] == [made.tokens for _, made in ranked[:2]]


@pytest.mark.paper("2407.12863")
def test_exact_values_guide_to_what_is_right() -> None:
    """Plain samples seldom are right; a search by exact values nearly always is: its candidates mostly hold the way."""
    rate = sum(p for text, p in TABLE.enumerate(MOST).items() if right(text))
    assert 0.05 < rate < 0.25
    beam = [
        value_beam_search(TABLE, VALUE, "", beams=2, candidates=16, steps=STEPS, max_tokens=MOST, seed=seed)
        for seed in range(25)
    ]
    assert sum(right(found.best.tokens) for found in beam) >= 22
    tree = [
        reward_balanced_search(TABLE, VALUE, "", width=16, steps=STEPS, max_tokens=MOST, seed=seed)
        for seed in range(25)
    ]
    drawn = [many("", 16, 100 + seed, max_tokens=MOST) for seed in range(25)]
    mean = sum(right(m.tokens) for found in tree for m in found.generations) / (25 * 16)
    plain = sum(right(m.tokens) for made in drawn for m in made) / (25 * 16)
    assert mean > plain + 0.1  # over 25 searches the standard error is near 0.03


@pytest.mark.paper("2407.12863")
def test_one_step_of_the_beam_follows_the_law_of_the_best_of_k() -> None:
    """P(best of K in value has value <= v) = F(v)^K over single tokens; 600 searches, false alarm 1e-4 a value."""
    p, k, n = TABLE.row(()).exp().tolist(), 3, 600
    first = {token: VALUE.of((BOS, token)) for token in (0, 1, 2, 4)}
    single = Steps(end="nowhere", max_tokens=1, most=1)
    counts = Counter(
        value_beam_search(TABLE, VALUE, "", beams=1, candidates=k, steps=single, max_tokens=MOST, seed=s).best.tokens[0]
        for s in range(n)
    )
    order, below = sorted(first, key=lambda token: first[token]), 0.0
    for token in order:
        share = (below + p[token]) ** k - below**k
        below += p[token]
        assert abs(counts[token] / n - share) <= 3.9 * math.sqrt(share * (1 - share) / n) + 1e-9


@pytest.mark.paper("2408.00724")
@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(0, 40))
def test_budgets_are_shared_out_whole(scores: list[float], total: int) -> None:
    shares = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0).tolist()
    counts = apportioned(shares, total)
    assert sum(counts) == total and all(abs(c - s * total) < 1 + 1e-6 for c, s in zip(counts, shares, strict=True))


def test_rows_branched_midway_go_on_from_where_they_are() -> None:
    opening = Opening(TABLE, (BOS,))
    requests = [made.request for made in many("", 3, 2, max_tokens=MOST)]
    texts = Continuations(opening, requests)
    texts.advance(most=2)
    begun = [tuple(row.tokens) for row in texts.rows]
    texts.choose([2, 0, 2, 2], [10, 11, 12, 13])
    texts.advance()
    for row, source in enumerate([2, 0, 2, 2]):
        assert tuple(texts.rows[row].tokens)[: len(begun[source])] == begun[source]
        made = texts.generation(row)
        log_probs = TABLE.predict([[BOS, *made.tokens]]).log_probs()[0]
        expected = [-float(log_probs[k, token]) for k, token in enumerate(made.tokens)]
        assert made.surprisals == pytest.approx(expected)
    # The first of equal rows keeps its own random numbers.
    assert texts.generation(0).tokens == generate(TABLE, "", n=3, seed=2, max_tokens=MOST)[2].tokens  # type: ignore[index]


@pytest.mark.paper("2110.14168")
@pytest.mark.paper("2407.12863")
def test_ranking_and_votes() -> None:
    drawn = many("", 12, 4, max_tokens=MOST)
    values = final_values(VALUE, drawn)
    assert values == pytest.approx([right(made.tokens) for made in drawn])
    assert next(made for _, made in rank(VALUE, drawn)) is drawn[values.index(max(values))]

    def answer(text: str) -> str | None:
        return text[0] if text else None

    vote = weighted_vote(VALUE, drawn, answer=answer)
    for said, weight in vote.weights.items():
        alike = [v for made, v in zip(drawn, values, strict=True) if answer(made.text) == said]
        assert weight == pytest.approx(sum(alike))
    assert vote.answer == max(vote.weights, key=lambda said: vote.weights[said])
    assert weighted_vote(VALUE, [], answer=answer).answer is None
    even = TableTokenValue(TABLE, lambda text: 1.0, length=MOST + 1)
    majority = Counter(answer(made.text) for made in drawn if made.text)
    assert weighted_vote(even, drawn, answer=answer).weights == {said: float(n) for said, n in majority.items()}


def test_networks_are_followed_from_memory_as_if_read_anew() -> None:
    """Rows end at different times and are dropped and branched: values and surprisals are those of one plain pass."""
    model, value = small_hf(3, spread=0.5), begun()
    steps = Steps(end="c", max_tokens=3)
    for seed in range(4):
        beam = value_beam_search(model, value, "", beams=3, candidates=6, steps=steps, max_tokens=9, seed=seed)
        tree = reward_balanced_search(model, value, "", width=6, steps=steps, max_tokens=9, seed=seed)
        for found in (beam, tree):
            assert found.values == pytest.approx(final_values(value, found.generations), abs=1e-5)
            for made in found.generations:
                assert made.finish in ("eos", "length")
                log_probs = model.predict([[*made.request.prompt, *made.tokens]]).log_probs()[0]
                expected = [-float(log_probs[k, token]) for k, token in enumerate(made.tokens)]
                assert made.surprisals == pytest.approx(expected, abs=1e-4)


def test_searches_are_repeatable() -> None:
    one, two, other = (
        value_beam_search(TABLE, VALUE, "", beams=2, candidates=4, steps=STEPS, max_tokens=MOST, seed=seed)
        for seed in (1, 1, 2)
    )
    assert one == two and one != other


def test_misuse_is_refused() -> None:
    for beams, candidates in ((0, 4), (3, 4), (4, 2)):
        with pytest.raises(ValueError, match="multiple"):
            value_beam_search(TABLE, VALUE, "", beams=beams, candidates=candidates)
    with pytest.raises(ValueError, match="temperature"):
        reward_balanced_search(TABLE, VALUE, "", temperature=0)
    with pytest.raises(ValueError, match="different vocabularies"):
        value_beam_search(TableModel.random(4, seed=0), VALUE, "")
    with pytest.raises(ValueError, match="needs an end"):
        Steps(end="")

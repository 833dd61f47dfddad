"""Entropies of sampled answers and of their meanings: by enumeration, by loops, in limits, and the way they point."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from answers import blank, drawn, samples_of, surprisals
from nextoken.model.table import TableModel
from nextoken.scores import Samples, Score, all_scores
from nextoken.scores.similarity import jaccard
from nextoken.signature import Signature

MODEL = TableModel.random(3, order=1, eos=True, concentration=2.0, seed=4)
STRINGS = MODEL.enumerate(3)
MINE = [
    entry
    for entry in all_scores().values()
    if entry.function.__module__ in ("nextoken.scores.sampled", "nextoken.scores.agreement", "nextoken.scores.sar")
    and "samples" in entry.needs
]


def scored(name: str | Score, samples: Samples, **options: object) -> np.ndarray:
    return nextoken.score(blank(MODEL, len(samples.counts)), name, samples=samples, **options)


def first_letter(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """Answers mean the same that begin with the same letter."""
    return np.array([[x[:1] == y[:1] for y in b] for x in a]).reshape(len(a), len(b))


def meaning_of(string: tuple[int, ...]) -> int:
    return string[0]


@pytest.mark.paper("2002.07650")
def test_the_mean_surprisal_of_an_answer_is_the_entropy_of_answers() -> None:
    """E[-log p(s)] over every string, one answer to a prompt."""
    samples = drawn(MODEL, [*STRINGS], [1] * len(STRINGS))
    weights = np.array([*STRINGS.values()])
    expected = -sum(p * math.log(p) for p in STRINGS.values())
    assert weights.sum() == pytest.approx(1)
    assert weights @ scored("sequence_entropy", samples) == pytest.approx(expected, rel=1e-6)
    per_token = sum(-p * math.log(p) / len(string) for string, p in STRINGS.items())
    assert weights @ scored("sequence_entropy_per_token", samples) == pytest.approx(per_token, rel=1e-6)


@pytest.mark.paper("2002.07650")
@settings(max_examples=25)
@given(st.lists(st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), min_size=1, max_size=3))
def test_sequence_entropies_are_loops(groups: list[list[str]]) -> None:
    samples = samples_of(MODEL, groups, ["ab"] * len(groups))
    each = [[surprisals(MODEL, text, "ab") for text in group] for group in groups]
    whole = [sum(map(sum, group)) / len(group) if group else math.nan for group in each]
    mean = [sum(sum(s) / len(s) for s in group) / len(group) if group else math.nan for group in each]
    np.testing.assert_allclose(scored("sequence_entropy", samples), whole, rtol=1e-5)
    np.testing.assert_allclose(scored("sequence_entropy_per_token", samples), mean, rtol=1e-5)


@pytest.mark.paper("2302.09664")
def test_normalised_semantic_entropy_of_all_answers_is_the_entropy_of_their_meaning() -> None:
    mass: dict[int, float] = defaultdict(float)
    for string, p in STRINGS.items():
        mass[meaning_of(string)] += p
    expected = -sum(p * math.log(p) for p in mass.values())
    repeated = [*STRINGS, *[*STRINGS][:7]]
    for strings in ([*STRINGS], repeated):
        samples = drawn(MODEL, strings, [len(strings)])
        found = scored("normalised_semantic_entropy", samples, equivalence=first_letter)
        assert found[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.paper("2302.09664")
def test_semantic_entropy_over_draws_is_the_entropy_of_meaning() -> None:
    """Answers in proportion to their probability, each string among them: -sum_j log P(C_j) / M tends to the entropy.

    Repetitions carry the proportions and add nothing to P(C); counted each time they would."""
    strings = [string for string, p in STRINGS.items() for _ in range(max(1, round(p * 400)))]
    samples = drawn(MODEL, strings, [len(strings)])
    mass: dict[int, float] = defaultdict(float)
    for string in STRINGS:
        mass[meaning_of(string)] += STRINGS[string]
    expected = -sum(p * math.log(p) for p in mass.values())
    found = scored("semantic_entropy", samples, equivalence=first_letter)[0]
    assert found == pytest.approx(expected, abs=0.03)
    assert scored("semantic_entropy", samples, equivalence=first_letter, distinct=False)[0] < 0 < found


@pytest.mark.paper("2302.09664")
@settings(max_examples=25)
@given(st.lists(st.sampled_from(["a", "ab", "b", "ba", "c"]), min_size=1, max_size=6), st.booleans())
def test_semantic_entropy_is_a_loop(group: list[str], distinct: bool) -> None:
    total = 0.0
    for answer in group:
        alike = [other for other in group if other[0] == answer[0]]
        mass = sum(math.exp(-sum(surprisals(MODEL, other))) for other in ({*alike} if distinct else alike))
        total -= math.log(mass)
    found = scored("semantic_entropy", samples_of(MODEL, [group]), equivalence=first_letter, distinct=distinct)
    assert found[0] == pytest.approx(total / len(group), abs=1e-5)


@pytest.mark.paper("2302.09664")
def test_where_nothing_is_alike_semantic_entropy_is_sequence_entropy() -> None:
    samples = samples_of(MODEL, [["a", "b", "ca"], ["ab", "cc"]])
    np.testing.assert_allclose(scored("semantic_entropy", samples), scored("sequence_entropy", samples), rtol=1e-9)


def test_answers_of_equal_text_and_other_tokens_are_two_events() -> None:
    model = TableModel.random(["a", "b", "ab"], order=1, seed=2)
    first, second = (0, 1), (2,)
    samples = drawn(model, [first, second], [2])
    assert samples.texts == [["ab", "ab"]]
    both = math.exp(float(model.row([])[0] + model.row([0])[1])) + math.exp(float(model.row([])[2]))
    found = nextoken.score(blank(model, 1), "semantic_entropy", samples=samples)
    assert found[0] == pytest.approx(-math.log(both), abs=1e-6)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["a", "ab", "b", "c"]), min_size=2, max_size=7))
def test_scores_of_counts_are_loops(group: list[str]) -> None:
    samples = samples_of(MODEL, [group])
    shares = [sum(x[0] == letter for x in group) / len(group) for letter in {x[0] for x in group}]
    expected = {
        "discrete_semantic_entropy": -sum(share * math.log(share) for share in shares),
        "label_prob": max(shares),
        "semantic_sets": len(shares),
    }
    for name, value in expected.items():
        assert scored(name, samples, equivalence=first_letter)[0] == pytest.approx(value, abs=1e-12), name


@pytest.mark.paper("2305.19187")
def test_sets_are_connected_through_others() -> None:
    """a and c are alike only through b: one part of the graph, and two sets of the greedy algorithm."""
    near = {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")}

    def relation(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        return np.array([[x == y or (x, y) in near for y in b] for x in a])

    samples = samples_of(MODEL, [["a", "b", "c"]])
    assert scored("semantic_sets", samples, equivalence=relation).tolist() == [1.0]
    assert scored("label_prob", samples, equivalence=relation)[0] == pytest.approx(2 / 3)


def test_the_prompt_can_stand_before_the_answers() -> None:
    seen: list[str] = []

    def relation(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        seen.extend(a)
        return np.ones((len(a), len(b)), dtype=bool)

    scored("semantic_entropy", samples_of(MODEL, [["a", "b"]], ["ca"]), equivalence=relation, prompted=True)
    assert seen == ["caa", "cab"]


@pytest.mark.parametrize("entry", MINE, ids=lambda entry: entry.name)
def test_few_answers_and_unknown_ones(entry: Score) -> None:
    """No answer is NaN for every score, one answer for those that compare; an answer nothing is known of makes NaN."""
    options = {"nli": judge} if entry.name == "luq" else {}
    values = scored(entry, samples_of(MODEL, [[], ["a"], ["a", "b"]]), **options)
    alone = {"sequence_entropy", "sequence_entropy_per_token", "semantic_entropy", "sentence_sar", "sar", "cocoa"}
    assert math.isnan(values[0]) and np.isfinite(values[2])
    assert np.isfinite(values[1]) == (entry.name in alone)
    by_probability = (alone - {"cocoa"}) | {"normalised_semantic_entropy"}
    unknown = scored(entry, samples_of(MODEL, [["", "a"]]), **options)[0]
    assert math.isnan(unknown) == (entry.name in by_probability)


def judge(pairs: list[tuple[str, str]]) -> np.ndarray:
    """Entailment by the share of common letters."""
    share = np.array([jaccard([" ".join(x)], [" ".join(y)])[0, 0] for x, y in pairs])
    return np.stack([share, np.zeros(len(pairs)), 1 - share], axis=1)


def certain_and_not() -> tuple[Signature, Samples]:
    """A prompt to which eight answers of a sure model were drawn, and one of an unsure model."""
    peaked = TableModel.given({(): [0.97, 0.01, 0.01, 0.01]}, "abcd", name="model")
    flat = TableModel.given({(): [0.26, 0.25, 0.25, 0.24]}, "abcd", name="model")
    parts = []
    for model in (peaked, flat):
        made = nextoken.generate(model, ["a"], n=8, max_tokens=6, seed=5)
        parts.append(nextoken.read(model, [g.text for g in made], prompts=["a"] * 8, top=0))
    own = [nextoken.read(model, "aaaaaa", top=0) for model in (peaked, flat)]
    joined = []
    for signatures in (own, parts):
        # Two models in one signature, which nobody but a test wants.
        object.__setattr__(signatures[1], "metadata", signatures[0].metadata)
        joined.append(Signature.concat(signatures))
    return joined[0], Samples(joined[1], [8, 8])


@pytest.mark.parametrize("entry", MINE, ids=lambda entry: entry.name)
def test_each_score_points_the_way_it_says(entry: Score) -> None:
    signature, samples = certain_and_not()
    options = {"nli": judge} if entry.name == "luq" else {}
    sure, unsure = nextoken.score(signature, entry, samples=samples, **options)
    assert entry.high in ("certain", "uncertain")
    assert sure > unsure if entry.high == "certain" else sure < unsure


def test_there_are_scores_to_try() -> None:
    assert len(MINE) == 16

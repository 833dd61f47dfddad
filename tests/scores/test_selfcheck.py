"""SelfCheckGPT: each variant by hand or by loops, its limits, and the way it points."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nextoken
from nextoken.model.table import TableModel
from nextoken.scores import Samples
from nextoken.scores.selfcheck import (
    asking,
    ngram_surprisals,
    nli_inconsistency,
    prompt_inconsistency,
    sentences,
    similarity_inconsistency,
)
from nextoken.scores.similarity import exact, jaccard, rouge_1, token_matched, words

WORDS = [" bern", " lies", " on", " the", " aare", ".", "\n"]
MODEL = TableModel.random(WORDS, order=1, seed=2)
SENTENCE = st.lists(st.sampled_from(["bern", "lies", "on", "the", "aare", "Aare"]), min_size=1, max_size=5).map(
    " ".join
)
TEXT = st.lists(SENTENCE.map("{}.".format), min_size=1, max_size=3).map(" ".join)


def inputs(texts: Sequence[str], groups: Sequence[Sequence[str]]) -> tuple[nextoken.Signature, Samples]:
    spelled = [f" {text}" if text else "" for text in texts]
    flat = [f" {answer}" if answer else "" for group in groups for answer in group]
    model = TableModel.random([chr(i) for i in range(32, 127)] + ["\n"], order=0, seed=0)
    return (
        nextoken.read(model, spelled, top=0),
        Samples(nextoken.read(model, flat, top=0), [len(group) for group in groups]),
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two!  Three?\nFour", ["One.", "Two!", "Three?", "Four"]),
        ('He said "go." Then 3.5 left.', ['He said "go."', "Then 3.5 left."]),
        ("(So.) Yes", ["(So.)", "Yes"]),
        ("", []),
        (" \n\n ", []),
        ("no end", ["no end"]),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


@pytest.mark.paper("2303.08896")
def test_unigrams_by_hand() -> None:
    """R = "the aare. bern", S = "The Aare lies. The aare": 3 the, 3 aare, 1 lies, 1 bern of 8 words."""
    first, second = ngram_surprisals(["the aare.", "bern"], ["The Aare lies. The aare"])
    np.testing.assert_allclose(first, [math.log(8 / 3), math.log(8 / 3)])
    np.testing.assert_allclose(second, [math.log(8)])
    signature, samples = inputs(["the aare. bern"], [["The Aare lies. The aare"]])
    found = nextoken.score(signature, "selfcheck_ngram", samples=samples)[0]
    assert found == pytest.approx((2 * math.log(8 / 3) + math.log(8)) / 3)
    worst = nextoken.score(signature, "selfcheck_ngram_max", samples=samples)[0]
    assert worst == pytest.approx((math.log(8 / 3) + math.log(8)) / 2)


@pytest.mark.paper("2303.08896")
@given(TEXT, st.lists(TEXT, max_size=3), st.integers(1, 3))
def test_ngrams_are_a_loop(text: str, samples: list[str], n: int) -> None:
    counts: Counter[tuple[str, ...]] = Counter()
    for other in [*samples, text]:
        for part in sentences(other):
            line = ["<s>"] * (n - 1) + words(part)
            for end in range(n, len(line) + 1):
                counts[tuple(line[end - n : end])] += 1
    parts = sentences(text)
    found = ngram_surprisals(parts, samples, n=n)
    for part, values in zip(parts, found, strict=True):
        line = ["<s>"] * (n - 1) + words(part)
        expected = [-math.log(counts[tuple(line[e - n : e])] / sum(counts.values())) for e in range(n, len(line) + 1)]
        np.testing.assert_allclose(values, expected)
        assert np.isfinite(values).all() and len(values) == len(words(part))


@pytest.mark.paper("2303.08896")
def test_unigrams_tend_to_the_cross_entropy_of_the_model() -> None:
    """With 400 answers of 10 words the mean surprisal is within 0.1 of that under the model's own unigrams, each
    probability being known to about 2 %; seed fixed."""
    p = [0.4, 0.3, 0.2, 0.1]
    model = TableModel.given({(): p}, [" bern", " lies", " on", " aare"])
    made = nextoken.generate(model, [" bern"], n=400, max_tokens=10, seed=7)
    (found,) = ngram_surprisals(["bern on aare"], [g.text for g in made])
    np.testing.assert_allclose(found, [-math.log(x) for x in (0.4, 0.2, 0.1)], atol=0.1)


@pytest.mark.paper("2303.08896")
@given(TEXT, st.lists(st.one_of(TEXT, st.just("")), max_size=3))
def test_similarity_is_a_loop(text: str, samples: list[str]) -> None:
    parts = sentences(text)
    found = similarity_inconsistency(parts, samples, similarity=rouge_1, least_words=2)
    for part, value in zip(parts, found, strict=True):
        best = []
        for sample in samples:
            known = [rouge_1([part], [other])[0, 0] for other in sentences(sample) if len(words(other)) >= 2]
            best.append(max(known, default=0.0))
        assert math.isnan(value) if not samples else value == pytest.approx(1 - sum(best) / len(best))


@pytest.mark.paper("2303.08896")
def test_answers_equal_to_the_text_support_it_wholly() -> None:
    text = "Bern lies on the Aare. The Aare is a river."
    signature, samples = inputs([text], [[text] * 4])
    letters = {chr(i): np.eye(128)[i] for i in range(128)}
    bert = token_matched(lambda texts: [np.array([letters[c] for c in text]) for text in texts])
    for similarity in (exact, rouge_1, jaccard, bert):
        found = nextoken.score(signature, "selfcheck_similarity", samples=samples, similarity=similarity)
        assert found[0] == pytest.approx(0.0, abs=1e-9)
    assert nextoken.score(signature, "selfcheck_nli", samples=samples, nli=contains)[0] == pytest.approx(0.0)


def contains(pairs: list[tuple[str, str]]) -> np.ndarray:
    """Entailed is what the premise contains, contradicted what has no word of it, else even."""
    rows = []
    for premise, hypothesis in pairs:
        if hypothesis in premise:
            rows.append([0.9, 0.1, 0.0])
        elif not {*words(premise)} & {*words(hypothesis)}:
            rows.append([0.1, 0.2, 0.7])
        else:
            rows.append([0.2, 0.6, 0.2])
    return np.array(rows)


@pytest.mark.paper("2303.08896")
def test_nli_by_hand_and_in_both_directions() -> None:
    parts, samples = ["a b.", "c."], ["a b. d", "c."]
    expected = [[0.0, 0.875], [0.875, 0.0]]
    np.testing.assert_allclose(nli_inconsistency(parts, samples, nli=contains), np.mean(expected, axis=1))
    turned = [[0.5, 0.875], [0.875, 0.0]]
    np.testing.assert_allclose(
        nli_inconsistency(parts, samples, nli=contains, sentence_first=True), np.mean(turned, axis=1)
    )
    signature, given_samples = inputs(["a b. c."], [samples])
    found = nextoken.score(signature, "selfcheck_nli", samples=given_samples, nli=contains)
    assert found[0] == pytest.approx(np.mean(expected))


@pytest.mark.paper("2303.08896")
def test_prompts_are_asked_and_answers_read() -> None:
    asked: list[str] = []

    def ask(prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        return [" Yes, it is.", "NO", "perhaps", "yes", "no.", "No"]

    found = prompt_inconsistency(["r 1", "r 2"], ["s\n1", "s2", "s3"], ask=ask)
    np.testing.assert_allclose(found, [(0 + 1 + 0.5) / 3, (0 + 1 + 1) / 3])
    assert len(asked) == 6
    assert "Context: s 1\n" in asked[0] and "Sentence: r 1\n" in asked[0] and asked[0].endswith("Answer: ")
    with pytest.raises(ValueError, match="6 prompts were asked and 1 answers came"):
        prompt_inconsistency(["r 1", "r 2"], ["s1", "s2", "s3"], ask=lambda prompts: ["yes"])
    assert np.isnan(prompt_inconsistency(["r"], [], ask=ask)).all()
    signature, samples = inputs(["r 1.\nr 2."], [["s1", "s2", "s3"]])
    assert nextoken.score(signature, "selfcheck_prompt", samples=samples, ask=ask)[0] == pytest.approx(3.5 / 6)


def test_a_model_can_be_asked() -> None:
    yes = TableModel.given({(): [0.9, 0.05, 0.05], (0,): [0.0, 0.1, 0.9]}, ["Yes", "No", " q"])
    assert asking(yes, max_tokens=2)([" q", "No q"]) == ["Yes q", "Yes q"]
    found = prompt_inconsistency(["Yes"], ["No", " q"], ask=asking(yes), template="{context}{sentence} q")
    assert found.tolist() == [0.0]


@pytest.mark.parametrize("name", ["selfcheck_ngram", "selfcheck_ngram_max", "selfcheck_similarity", "selfcheck_nli"])
def test_what_answers_repeat_scores_lower_than_what_they_do_not(name: str) -> None:
    groups = [["Bern lies on the Aare.", "Bern lies on the river Aare.", "It lies on the Aare, in Bern."]] * 2
    signature, samples = inputs(["Bern lies on the Aare.", "Quito stands by some lake."], groups)
    options = {"nli": contains} if name == "selfcheck_nli" else {}
    borne_out, made_up = nextoken.score(signature, name, samples=samples, **options)
    assert borne_out < made_up


def test_without_sentences_or_samples_nothing_is_known() -> None:
    signature, samples = inputs(["", "a b.", "?!", "a b."], [["a b."], [], ["a b."], [""]])
    for name, options in (
        ("selfcheck_ngram", {}),
        ("selfcheck_ngram_max", {}),
        ("selfcheck_similarity", {}),
        ("selfcheck_nli", {"nli": contains}),
        ("selfcheck_prompt", {"ask": lambda prompts: ["yes"] * len(prompts)}),
    ):
        values = nextoken.score(signature, name, samples=samples, **options)
        assert np.isnan(values[:2]).all() and np.isfinite(values[3]), name
        assert math.isnan(values[2]) == name.startswith("selfcheck_ngram")
    with pytest.raises(ValueError, match="n must be at least 1"):
        nextoken.score(signature, "selfcheck_ngram", samples=samples, n=0)

"""SAR: by loops, in its limits, and the pair that a mean surprisal cannot tell apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from answers import blank, drawn, samples_of, surprisals
from nextoken.model.table import TableModel
from nextoken.scores.sar import relevance
from nextoken.scores.similarity import character_ngrams, exact, jaccard

MODEL = TableModel.random(["the ", "cat ", "of ", "sat "], order=2, seed=6)
WORDS = st.lists(st.sampled_from(["the ", "cat ", "of ", "sat "]), min_size=1, max_size=5).map("".join)


def constant(value: float):  # type: ignore[no-untyped-def]
    return lambda a, b: np.full((len(a), len(b)), value)


def token_sar(text: str, prompt: str = "", *, shown: bool = False) -> float:
    """By taking tokens out of the text one at a time; every token of these models is a word and a blank."""
    tokens = [f"{word} " for word in text.split()]
    before = prompt if shown else ""
    r = [
        1 - abs(jaccard([before + text], [before + "".join(tokens[:t] + tokens[t + 1 :])])[0, 0])
        for t in range(len(tokens))
    ]
    weights = [x / sum(r) for x in r] if sum(r) > 0 else [1 / len(r)] * len(r)
    return sum(w * s for w, s in zip(weights, surprisals(MODEL, text, prompt), strict=True))


@pytest.mark.paper("2307.01379")
@settings(max_examples=25)
@given(WORDS)
def test_token_sar_is_its_formula(text: str) -> None:
    found = nextoken.score(nextoken.read(MODEL, text, top=0), "token_sar", similarity=jaccard)
    assert found[0] == pytest.approx(token_sar(text), rel=1e-5)


@pytest.mark.paper("2307.01379")
def test_the_prompt_can_stand_before_the_text() -> None:
    signature = nextoken.read(MODEL, "the cat ", prompts=["cat sat "], top=0)
    found = nextoken.score(signature, "token_sar", similarity=jaccard, prompted=True)[0]
    assert found == pytest.approx(token_sar("the cat ", "cat sat ", shown=True), rel=1e-5)
    assert found == pytest.approx(surprisals(MODEL, "the cat ", "cat sat ")[0], rel=1e-5)


@pytest.mark.paper("2307.01379")
def test_alike_relevance_gives_the_mean_surprisal() -> None:
    """As does none at all, where weights are 0 / 0."""
    signature = nextoken.read(MODEL, ["the cat of sat ", "of ", ""], top=0)
    mean = -nextoken.score(signature, "mean_logprob")
    for similarity in (constant(0.3), constant(1.0), constant(-1.0)):
        np.testing.assert_allclose(nextoken.score(signature, "token_sar", similarity=similarity), mean, rtol=1e-9)


def test_an_unknown_similarity_is_not_certainty() -> None:
    signature = nextoken.read(MODEL, ["the cat "], top=0)
    assert math.isnan(nextoken.score(signature, "token_sar", similarity=constant(math.nan))[0])


@pytest.mark.paper("2307.01379")
def test_an_uncertain_keyword_counts_and_an_uncertain_stop_word_does_not() -> None:
    """Equal surprisals in another order: the mean is the same, token SAR is not."""
    early = TableModel.given({(): [0.1, 0.9, 0.0], (3,): [0.1, 0.9, 0.0]}, ["zürich", " of", "x"])
    late = TableModel.given({(): [0.9, 0.1, 0.0], (3,): [0.9, 0.1, 0.0]}, ["zürich", " of", "x"])
    of_keyword, of_stop = (nextoken.read(model, "zürich of", top=0) for model in (early, late))
    assert nextoken.score(of_keyword, "mean_logprob")[0] == pytest.approx(nextoken.score(of_stop, "mean_logprob")[0])
    assert nextoken.score(of_keyword, "token_sar")[0] > nextoken.score(of_stop, "token_sar")[0] + 0.5


@pytest.mark.paper("2307.01379")
def test_relevance_takes_out_one_token_and_not_its_like() -> None:
    seen: list[Sequence[str]] = []

    def looking(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        seen.extend([a, b])
        return jaccard(a, b)

    model = TableModel.random(["a", "n", "b", b"\xc3", b"\xa9"], order=1, eos=True, seed=1)
    signature = drawn(model, [(2, 0, 1, 0, 6), (3, 4)], [2]).signature
    found = relevance(signature, similarity=looking)
    assert seen == [["bana"], ["ana", "bna", "baa", "ban"], ["é"], ["\ufffd", "\ufffd"]]
    assert found.shape == (7,) and found[4] == 0.0 and (found >= 0).all()


def vouched(own: list[float], g: np.ndarray, t: float) -> float:
    """The formula in probabilities, as the paper writes it."""
    total = 0.0
    for j, e in enumerate(own):
        others = sum(g[j, k] * math.exp(-own[k]) for k in range(len(own)) if k != j)
        total -= math.log(math.exp(-e) + others / t)
    return total / len(own)


@pytest.mark.paper("2307.01379")
@settings(max_examples=25)
@given(st.lists(WORDS, min_size=1, max_size=4), st.sampled_from([0.001, 0.5, 10.0]))
def test_sentence_sar_and_sar_are_their_formulas(group: list[str], t: float) -> None:
    samples = samples_of(MODEL, [group, []])
    g = jaccard(group, group)
    sentence = nextoken.score(blank(DIGIT, 2), "sentence_sar", samples=samples, similarity=jaccard, t=t)
    assert sentence[0] == pytest.approx(vouched([sum(surprisals(MODEL, x)) for x in group], g, t), rel=1e-5, abs=1e-5)
    joint = nextoken.score(blank(DIGIT, 2), "sar", samples=samples, similarity=jaccard, t=t)
    assert joint[0] == pytest.approx(vouched([token_sar(x) for x in group], g, t), rel=1e-5, abs=1e-5)
    assert np.isnan([sentence[1], joint[1]]).all()


DIGIT = TableModel.random(["a"], order=0, seed=0)


@pytest.mark.paper("2307.01379")
def test_limits_of_sar() -> None:
    groups = [["the cat ", "of sat cat "], ["sat "]]
    samples = samples_of(MODEL, groups)

    def score(name: str, **options: object) -> np.ndarray:
        return nextoken.score(blank(DIGIT, 2), name, samples=samples, **options)

    np.testing.assert_allclose(score("sentence_sar", similarity=exact), score("sequence_entropy"), rtol=1e-9)
    alone = nextoken.score(samples.signature, "token_sar")
    np.testing.assert_allclose(score("sar")[1], alone[2], rtol=1e-9)
    # Alike and equally probable: -log(p (1 + (K - 1) / t)).
    same = samples_of(MODEL, [["the cat "] * 3])
    p = math.exp(-sum(surprisals(MODEL, "the cat ")))
    found = nextoken.score(blank(DIGIT, 1), "sentence_sar", samples=same)
    assert found[0] == pytest.approx(-math.log(p * (1 + 2 / 0.001)), rel=1e-6)
    with pytest.raises(ValueError, match="t must be above 0"):
        score("sar", t=0.0)


@pytest.mark.paper("2307.01379")
def test_order_does_not_matter_and_repetition_does() -> None:
    group = ["the cat ", "cat sat ", "of "]
    values = [
        nextoken.score(blank(DIGIT, 1), "sar", samples=samples_of(MODEL, [answers]))[0]
        for answers in (group, group[::-1], group * 2)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[2] < values[0]


def test_long_answers_do_not_underflow() -> None:
    """4 000 tokens have a probability of e^-4000 or so, which is 0 in float64."""
    samples = samples_of(MODEL, [["the cat of sat " * 1000, "cat of sat the " * 1000]])
    found = nextoken.score(blank(DIGIT, 1), "sentence_sar", samples=samples, similarity=constant(0.5))[0]
    own = -samples.logprobs
    expected = own - np.logaddexp(
        0, math.log(500) - np.abs(own[0] - own[1]) * np.array([1, -1]) * np.sign(own[1] - own[0])
    )
    assert found == pytest.approx(expected.mean(), rel=1e-9) and found > 1000


def test_the_default_similarity_is_of_characters() -> None:
    assert relevance(nextoken.read(MODEL, "the cat ", top=0)).tolist() == pytest.approx(
        [1 - character_ngrams(["the cat "], [rest])[0, 0] for rest in ("cat ", "the ")]
    )

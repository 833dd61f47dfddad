"""The contract of scores: what is asked for, what is given, what is missing; samples; the likelihoods."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from answers import samples_of, surprisals
from nextoken.methods import all_methods
from nextoken.model.table import TableModel
from nextoken.scores import Given, MissingInput, Samples, Score, all_scores, find, register, table

MODEL = TableModel.random(["a", "b", "c", "é"], order=2, seed=1)
TEXTS = ["abca", "", "é", "bb"]
SIGNATURE = nextoken.read(MODEL, TEXTS, top=2)


def plain(given: Given, *, power: float = 1.0) -> np.ndarray:
    """Rows of each text to a power."""
    return given.rows.counts.astype(float) ** power


def demanding(given: Given, *, judge: object) -> np.ndarray:
    """Zeros, for whoever gives a judge."""
    return np.zeros(given.signature.n_texts)


@settings(max_examples=25)
@given(st.lists(st.text("abcé", max_size=6), min_size=1, max_size=4))
def test_likelihoods_are_loops(texts: list[str]) -> None:
    signature = nextoken.read(MODEL, texts, top=0)
    each = [surprisals(MODEL, text) for text in texts]
    mean = [sum(s) / len(s) if s else math.nan for s in each]
    expected = {
        "logprob": [-sum(s) if s else math.nan for s in each],
        "mean_logprob": [-m for m in mean],
        "perplexity": [math.exp(m) for m in mean],
        "bits_per_byte": [
            sum(s) / math.log(2) / len(text.encode()) if s else math.nan for s, text in zip(each, texts, strict=True)
        ],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(nextoken.score(signature, name), values, rtol=1e-5, err_msg=name)


def test_an_impossible_token_is_infinitely_surprising() -> None:
    model = TableModel.given({(): [0.5, 0.5, 0.0]}, ["a", "b", "c"])
    signature = nextoken.read(model, ["ac", "ab"], top=0)
    for name, value in {
        "logprob": -math.inf,
        "mean_logprob": -math.inf,
        "perplexity": math.inf,
        "bits_per_byte": math.inf,
    }.items():
        assert nextoken.score(signature, name)[0] == value
        assert np.isfinite(nextoken.score(signature, name)[1])


def test_a_score_is_asked_for_by_name_or_as_itself() -> None:
    own = Score("plain", plain)
    np.testing.assert_array_equal(nextoken.score(SIGNATURE, own), [4, 0, 1, 2])
    np.testing.assert_array_equal(nextoken.score(SIGNATURE, own, power=2.0), [16, 0, 1, 4])
    np.testing.assert_array_equal(nextoken.score(SIGNATURE, "logprob"), nextoken.score(SIGNATURE, find("logprob")))
    assert own.options == {"power": 1.0}


def test_unknown_names_and_options() -> None:
    with pytest.raises(ValueError, match="perplexity"):
        nextoken.score(SIGNATURE, "perplexty")
    with pytest.raises(ValueError, match="zzzz"):
        find("zzzz")
    with pytest.raises(TypeError, match=r"no option depth; its options: none"):
        nextoken.score(SIGNATURE, "perplexity", depth=1)
    with pytest.raises(TypeError, match=r"no option a, b; its options: power"):
        nextoken.score(SIGNATURE, Score("plain", plain), b=1, a=2)


def test_what_is_missing_is_named() -> None:
    hungry = Score(
        "hungry", plain, columns=("kl", "logprob"), needs=("reference", "samples"), reference_columns=("kl",)
    )
    with pytest.raises(MissingInput, match=r"'hungry' needs column 'kl', reference=\.\.\., samples=\.\.\.$"):
        nextoken.score(SIGNATURE, hungry)
    with pytest.raises(MissingInput, match=r"column 'kl', samples=\.\.\., column 'kl' of the reference"):
        nextoken.score(SIGNATURE, hungry, reference=SIGNATURE)
    with pytest.raises(MissingInput, match=r"'demanding' needs option judge"):
        nextoken.score(SIGNATURE, Score("demanding", demanding))
    assert nextoken.score(SIGNATURE, Score("demanding", demanding), judge=1).tolist() == [0.0] * 4


def test_the_number_of_answers_is_checked() -> None:
    with pytest.raises(ValueError, match="not one number per text"):
        nextoken.score(SIGNATURE, Score("wide", lambda given: np.zeros((4, 1))))
    with pytest.raises(ValueError, match="not one number per token"):
        nextoken.score(SIGNATURE, Score("short", lambda given: np.zeros(4), per="token"))
    every = Score("rows", lambda given: given.rows["logprob"], per="token")
    assert nextoken.score(SIGNATURE, every).shape == (len(SIGNATURE),) == (7,)


def test_inputs_must_belong_together() -> None:
    with pytest.raises(ValueError, match="the reference has 1 texts and the signature 4"):
        Given(SIGNATURE, reference=SIGNATURE[0])
    with pytest.raises(ValueError, match="samples are given for 2 texts"):
        Given(SIGNATURE, samples=Samples(SIGNATURE, [1, 3]))


def test_a_table_holds_what_each_score_says_alone() -> None:
    samples = samples_of(MODEL, [["a", "b"], ["c"], [], ["ab", "ab", "c"]])
    found = table(SIGNATURE, samples=samples)
    assert [*found] == sorted(found)
    for name, values in found.items():
        entry = find(name)
        assert entry.per == "text" and values.shape == (4,) and values.dtype == np.float64
        np.testing.assert_array_equal(values, entry(Given(SIGNATURE, samples=samples)), err_msg=name)
    assert {"perplexity", "mean_entropy", "semantic_entropy", "sar", "selfcheck_ngram"} <= {*found}
    assert not {"luq", "selfcheck_nli", "selfcheck_prompt", "token_entropy"} & {*found}
    without = table(SIGNATURE)
    assert {"perplexity", "mean_entropy"} <= {*without}
    assert not any("samples" in find(name).needs for name in without)
    assert [*table(SIGNATURE, ["mean_entropy", "logprob"])] == ["mean_entropy", "logprob"]


def test_a_table_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(MissingInput, match="samples"):
        table(SIGNATURE, ["perplexity", "semantic_entropy"])
    with pytest.raises(MissingInput, match="nli"):
        table(SIGNATURE, ["luq"], samples=samples_of(MODEL, [[], [], [], []]))
    with pytest.raises(ValueError, match="token_entropy tells numbers per token"):
        table(SIGNATURE, ["token_entropy"])
    with pytest.raises(ValueError, match="perplexty"):
        table(SIGNATURE, ["perplexty"])


def test_no_text_at_all_gives_no_numbers() -> None:
    nothing = SIGNATURE[[]]
    found = table(nothing, samples=Samples(nothing, []))
    assert all(values.shape == (0,) for values in found.values())


def test_every_score_of_a_text_without_tokens_is_unknown() -> None:
    for name, values in table(SIGNATURE).items():
        assert math.isnan(values[1]), name


def test_every_score_is_a_method_and_says_which_way_it_points() -> None:
    methods = {entry.name: entry for entry in all_methods()}
    for name, entry in all_scores().items():
        assert methods[name].room == "scores" and methods[name].arxiv == entry.arxiv
        assert entry.function.__doc__ and entry.summary and entry.high


def test_a_name_belongs_to_one_function() -> None:
    before = all_scores()
    for taken in ("perplexity", "P(True)"):
        with pytest.raises(ValueError, match="registered"):
            register(taken, high="certain", summary="another")(plain)
    assert all_scores() == before


def test_samples_are_divided_among_prompts() -> None:
    groups = [["a", "bc"], [], ["c"]]
    samples = samples_of(MODEL, groups, ["a", "b", "ab"])
    assert samples.texts == groups
    assert samples.tokens == [[(0,), (1, 2)], [], [(2,)]]
    assert samples.prompt.tolist() == [0, 0, 2]
    expected = [-sum(surprisals(MODEL, text, prompt)) for text, prompt in (("a", "a"), ("bc", "a"), ("c", "ab"))]
    np.testing.assert_allclose(samples.logprobs, expected, rtol=1e-6)
    np.testing.assert_array_equal(samples.mean(np.array([1.0, 2.0, 5.0])), [1.5, math.nan, 5.0])
    assert samples.grouped("xyz") == [["x", "y"], [], ["z"]]


@pytest.mark.parametrize("counts", [[3], [1, 2, 2], [-1, 5], []])
def test_samples_that_do_not_divide(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="4 answers do not divide"):
        Samples(SIGNATURE, counts)


def test_an_answer_of_which_nothing_was_scored_is_unknown_not_certain() -> None:
    samples = samples_of(MODEL, [["", "a"]])
    assert math.isnan(samples.logprobs[0]) and samples.logprobs[1] < 0


def test_answers_are_compared_once() -> None:
    samples = samples_of(MODEL, [["a", "bc"], [], ["c"]], ["a", "b", "ab"])
    seen: list[list[str]] = []

    def lengths(a: list[str], b: list[str]) -> np.ndarray:
        seen.append(a)
        return np.array([[len(x) - len(y) for y in b] for x in a])

    first, again = samples.compared(lengths), samples.compared(lengths)
    assert first is again and seen == [["a", "bc"], ["c"]]
    assert [matrix.tolist() for matrix in first] == [[[0, -1], [1, 0]], [], [[0]]]
    samples.compared(lengths, prompted=True)
    assert seen[2:] == [["aa", "abc"], ["abc"]]
    with pytest.raises(ValueError, match="give one per pair"):
        samples.compared(lambda a, b: np.zeros(len(a)))


def test_a_score_of_ones_own_is_no_method_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["nextoken.scores.score"], "_SCORES", {})

    @register("my_own", columns=("logprob",), high="surprising", summary="surprisal of the least expected token")
    def my_own(given: Given) -> np.ndarray:
        return -given.rows.min(given.rows["logprob"])

    signature = nextoken.read(TableModel.random(3, seed=1), ["abca", "b"])
    expected = [-signature[i].column("logprob").min() for i in range(2)]
    np.testing.assert_allclose(nextoken.score(signature, "my_own"), expected)
    assert "my_own" not in {entry.name for entry in nextoken.all_methods()}

"""DetectGPT and NPR by hand, and the law of the variants that a language model draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

import nextoken
from nextoken.model.ngram import NgramModel
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab
from nextoken.scores.perturbation import SpanResampler, read_variants

MODEL = TableModel.random(4, order=2, seed=1)
TEXTS = ["abcda", "ddd", "bacb"]
VARIANTS = [["abcdd", "aacda", "dbcda"], ["dad", "add"], ["b"]]


def logprob(text: str) -> float:
    ids = MODEL.vocab.encode(text).ids
    return sum(MODEL.row(ids[:place])[token].item() for place, token in enumerate(ids)) / len(ids)


def log_rank(text: str) -> float:
    ids = MODEL.vocab.encode(text).ids
    rows = [(MODEL.row(ids[:place]), token) for place, token in enumerate(ids)]
    return sum(math.log(1 + int((row > row[token]).sum())) for row, token in rows) / len(ids)


def written(_: Sequence[str]) -> Sequence[Sequence[str]]:
    return VARIANTS


@pytest.mark.paper("2301.11305")
def test_detectgpt_is_its_formula() -> None:
    variants = read_variants(MODEL, TEXTS, written)
    found = nextoken.score(nextoken.read(MODEL, TEXTS), "detectgpt", variants=variants)
    for number, (text, others) in enumerate(zip(TEXTS, VARIANTS, strict=True)):
        each = [logprob(other) for other in others]
        mean = sum(each) / len(each)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in each) / len(each)) or 1.0
        assert found[number] == pytest.approx((logprob(text) - mean) / deviation, rel=1e-4)


@pytest.mark.paper("2306.05540")
def test_npr_is_its_quotient() -> None:
    found = nextoken.score(nextoken.read(MODEL, TEXTS), "npr", variants=read_variants(MODEL, TEXTS, written))
    for number, (text, others) in enumerate(zip(TEXTS, VARIANTS, strict=True)):
        expected = sum(map(log_rank, others)) / len(others) / log_rank(text)
        assert found[number] == pytest.approx(expected, rel=1e-5)


@pytest.mark.paper("2301.11305")
def test_a_text_that_does_not_change_stands_out_by_nothing() -> None:
    """A model that leaves no choice redraws every text as it was."""
    certain = TableModel.given({(): [1.0, 0.0], (0,): [0.0, 1.0], (1,): [1.0, 0.0]}, ["a", "b"])
    texts = ["abababab", "ab"]
    change = SpanResampler(certain, variants=3, share=0.5)
    assert change(texts) == [[text] * 3 for text in texts]
    signature = nextoken.read(MODEL, texts)
    variants = read_variants(MODEL, texts, change)
    np.testing.assert_allclose(nextoken.score(signature, "detectgpt", variants=variants), 0, atol=1e-6)
    np.testing.assert_allclose(nextoken.score(signature, "npr", variants=variants), 1, rtol=1e-6)


def test_texts_and_variants_must_match() -> None:
    variants = read_variants(MODEL, TEXTS, written)
    with pytest.raises(ValueError, match="one group per text"):
        nextoken.score(nextoken.read(MODEL, ["a"]), "detectgpt", variants=variants)
    with pytest.raises(ValueError, match="3 lists of variants for 1"):
        read_variants(MODEL, ["a"], written)
    with pytest.raises(nextoken.scores.MissingInput, match="variants"):
        nextoken.score(nextoken.read(MODEL, ["a"]), "detectgpt")
    none = read_variants(MODEL, ["a"], lambda texts: [[] for _ in texts])
    assert np.isnan(nextoken.score(nextoken.read(MODEL, ["a"]), "detectgpt", variants=none)[0])


@pytest.mark.paper("2301.11305")
def test_variants_follow_the_law_of_the_model() -> None:
    """One token of "bcab" drawn anew: place uniform, token by its left side. Chi-square, false alarms of 1e-4."""
    text, runs = "bcab", 6000
    ids, law = MODEL.vocab.encode(text).ids, Counter()
    for place in range(len(ids)):
        for token, p in enumerate(MODEL.row(ids[:place]).exp().tolist()):
            if p > 0:
                law[MODEL.vocab.decode_text([*ids[:place], token, *ids[place + 1 :]])] += p / len(ids)
    assert sum(law.values()) == pytest.approx(1)
    made = Counter(SpanResampler(MODEL, variants=runs, share=0.25, span=1, batch=1000)([text])[0])
    assert set(made) <= set(law)
    assert chisquare([made[v] for v in law], [p * runs for p in law.values()]).pvalue > 1e-4


@pytest.mark.paper("2301.11305")
def test_new_tokens_are_context_for_those_after_them() -> None:
    """Both tokens of "aa" drawn anew are a text of the model. Chi-square, false alarms of 1e-4."""
    runs = 4000
    law = {MODEL.vocab.decode_text(ids): p for ids, p in MODEL.enumerate(2).items()}
    made = Counter(SpanResampler(MODEL, variants=runs, share=1.0, span=2, batch=1000)(["aa"])[0])
    assert chisquare([made[v] for v in law], [p * runs for p in law.values()]).pvalue > 1e-4


def test_placements_are_uniform() -> None:
    """Two spans of 2 in 8 places, a token between them. Chi-square, false alarms of 1e-4."""
    change, random, runs = SpanResampler(MODEL, share=0.5, span=2), np.random.default_rng(3), 6000
    possible = [(a, b) for a, b in combinations(range(7), 2) if b - a >= 3]
    made = Counter(tuple(np.flatnonzero(change._mask(8, random)).tolist()) for _ in range(runs))
    assert set(made) == {(a, a + 1, b, b + 1) for a, b in possible}
    assert chisquare([*made.values()]).pvalue > 1e-4


@given(st.integers(0, 60), st.integers(1, 4), st.floats(0.01, 1.0), st.integers(0, 9))
def test_spans_keep_their_distance(length: int, span: int, share: float, seed: int) -> None:
    mask = SpanResampler(MODEL, share=share, span=span)._mask(length, np.random.default_rng(seed))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    runs = edges[1::2] - edges[::2]
    assert len(mask) == length and (runs == min(span, length)).all()
    if length:
        fits = (length + 1) // (min(span, length) + 1)
        assert len(runs) == max(1, min(round(share * length / min(span, length)), fits))


@given(st.lists(st.text("abcd", max_size=12), min_size=1, max_size=4), st.integers(1, 5))
def test_variants_do_not_depend_on_the_company(texts: list[str], batch: int) -> None:
    together = SpanResampler(MODEL, variants=3, share=0.4, seed=5)(texts)
    alone = [SpanResampler(MODEL, variants=3, share=0.4, seed=5, batch=batch)([text])[0] for text in texts]
    assert together == alone
    assert [[len(variant) for variant in group] for group in together] == [[len(text)] * 3 for text in texts]


def test_long_texts_are_redrawn_in_windows() -> None:
    """With an order of 2, half a context of 6 is all that a draw looks at."""
    limited = TableModel.random(4, order=2, seed=1)
    limited.context_length = 6
    texts = ["abcd" * 12, "ab", "dacb" * 7]
    assert SpanResampler(limited, share=0.3, batch=7)(texts) == SpanResampler(MODEL, share=0.3)(texts)


def test_specials_are_never_drawn_and_the_first_token_stays_where_nothing_predicts_it() -> None:
    ending = TableModel.random(3, order=1, eos=True, seed=2)
    assert all(len(variant) == 6 for variant in SpanResampler(ending, variants=50, share=1.0)(["abcabc"])[0])
    vocab = Vocab([b"a", b"b", b"c"])
    unbegun = NgramModel.from_tokens([[0, 1, 2, 1, 0, 2, 2]], vocab, order=2)
    made = SpanResampler(unbegun, variants=50, share=1.0, span=1)(["abc", "b", ""])
    assert {variant[0] for variant in made[0]} == {"a"} and len({*made[0]}) > 2
    assert made[1:] == [["b"] * 50, [""] * 50]


def test_tokens_of_a_real_tokenizer() -> None:
    nano = nextoken.load("nano")
    text = "The lamp went out, and for a while nobody in the room said anything at all."
    (made,) = SpanResampler(nano, variants=4, seed=1)([text])
    assert len({*made, text}) == 5
    signature = nextoken.read(nano, [text])
    variants = read_variants(nano, [text], lambda texts: [made])
    assert nextoken.score(signature, "detectgpt", variants=variants)[0] > 0


@pytest.mark.parametrize("wrong", [{"share": 0}, {"share": 1.1}, {"variants": 0}, {"span": 0}, {"batch": 0}])
def test_misuse_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        SpanResampler(MODEL, **wrong)

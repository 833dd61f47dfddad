"""Membership scores: each against a loop over exact tables, its limits, and the way it points."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.model.ngram import NgramModel
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab
from nextoken.scores import MissingInput
from nextoken.scores.perturbation import read_variants

MODEL = TableModel.random([*"abcABC"], order=2, seed=1)
SMALL = TableModel.random([*"abcABC"], order=1, seed=2)
SYMBOLS = "abcABC"
TEXTS = st.lists(st.text(SYMBOLS, min_size=1, max_size=15), min_size=1, max_size=4)


def rows(model: TableModel, text: str, before: str = "") -> list[tuple[int, np.ndarray]]:
    given_ids, ids = model.vocab.encode(before).ids, model.vocab.encode(text).ids
    return [(token, model.row((*given_ids, *ids[:place])).exp().numpy()) for place, token in enumerate(ids)]


def mean(model: TableModel, text: str, before: str = "") -> float:
    found = rows(model, text, before)
    return sum(math.log(p[token]) for token, p in found) / len(found)


@pytest.mark.paper("2012.07805")
@given(TEXTS)
@settings(max_examples=30)
def test_the_plain_attacks_are_their_formulas(texts: list[str]) -> None:
    signature = nextoken.read(MODEL, texts)
    lowered = nextoken.read(MODEL, [text.lower() for text in texts])
    found = {
        "zlib": nextoken.score(signature, "zlib"),
        "lowercase": nextoken.score(signature, "lowercase", lowered=lowered),
        "reference": nextoken.score(signature, "reference", reference=nextoken.read(SMALL, texts)),
    }
    for number, text in enumerate(texts):
        own = mean(MODEL, text)
        assert found["zlib"][number] == pytest.approx(own / len(zlib.compress(text.encode())), rel=1e-5)
        assert found["lowercase"][number] == pytest.approx(mean(MODEL, text.lower()) / own, rel=1e-4)
        assert found["reference"][number] == pytest.approx(own - mean(SMALL, text), abs=1e-5)


@pytest.mark.paper("2012.07805")
def test_zlib_counts_bytes_and_lower_case_text_has_nothing_to_lose() -> None:
    model = TableModel.random(["é", "a"], order=1, seed=3)
    signature = nextoken.read(model, ["éaé"])
    size = len(zlib.compress("éaé".encode()))
    expected = nextoken.score(signature, "mean_logprob")[0] / size
    assert nextoken.score(signature, "zlib")[0] == pytest.approx(expected)
    assert nextoken.score(signature, "lowercase", lowered=signature)[0] == 1
    assert nextoken.score(signature, "reference", reference=signature)[0] == 0


@pytest.mark.paper("2310.16789")
@given(TEXTS, st.floats(0.01, 1.0))
@settings(max_examples=30)
def test_min_k_is_the_mean_of_the_smallest(texts: list[str], share: float) -> None:
    found = nextoken.score(nextoken.read(MODEL, texts), "min_k", share=share)
    for number, text in enumerate(texts):
        logs = sorted(math.log(p[token]) for token, p in rows(MODEL, text))
        kept = logs[: max(1, int(share * len(logs) + 1e-9))]
        assert found[number] == pytest.approx(sum(kept) / len(kept), rel=1e-5)


@pytest.mark.paper("2404.02936")
@given(TEXTS, st.floats(0.01, 1.0))
@settings(max_examples=30)
def test_min_k_plus_plus_standardises(texts: list[str], share: float) -> None:
    found = nextoken.score(nextoken.read(MODEL, texts), "min_k_plus_plus", share=share)
    for number, text in enumerate(texts):
        each = []
        for token, p in rows(MODEL, text):
            p = p[p > 0]
            centre = p @ np.log(p)
            each.append((math.log(p[token]) - centre) / math.sqrt(p @ np.log(p) ** 2 - centre**2))
        kept = sorted(each)[: max(1, int(share * len(each) + 1e-9))]
        assert found[number] == pytest.approx(sum(kept) / len(kept), rel=1e-3, abs=1e-4)


@pytest.mark.paper("2310.16789")
def test_all_of_the_tokens_are_the_loss() -> None:
    signature = nextoken.read(MODEL, ["abcABC", "a", "CCbA"])
    every = nextoken.score(signature, "min_k", share=1.0)
    np.testing.assert_allclose(every, nextoken.score(signature, "mean_logprob"), rtol=1e-6)
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="share"):
            nextoken.score(signature, "min_k", share=share)


@pytest.mark.paper("2404.02936")
def test_places_without_choice_do_not_blow_up() -> None:
    certain = TableModel.given({(): [0.5, 0.5], (0,): [0.0, 1.0], (1,): [1.0, 0.0]}, ["a", "b"])
    found = nextoken.score(nextoken.read(certain, ["ababab", "abba"]), "min_k_plus_plus", share=1.0)
    assert abs(found[0]) < 1e-3 and found[1] == -math.inf
    weights = 1 + 1e-6 * np.arange(-3, 4)  # as near to one another as rounding puts them
    flat = TableModel(np.array([*weights / 7, 0.0]), [*"abcdefg"])
    assert abs(nextoken.score(nextoken.read(flat, "abcdefg"), "min_k_plus_plus")[0]) < 1e-2


@pytest.mark.paper("2305.18462")
def test_neighbourhood_is_the_difference() -> None:
    texts, others = ["abcA", "CCb"], [["abca", "bbcA"], ["CBb"]]
    signature = nextoken.read(MODEL, texts)
    found = nextoken.score(signature, "neighbourhood", variants=read_variants(MODEL, texts, lambda _: others))
    for number, (text, group) in enumerate(zip(texts, others, strict=True)):
        expected = mean(MODEL, text) - sum(mean(MODEL, other) for other in group) / len(group)
        assert found[number] == pytest.approx(expected, abs=1e-5)
    same = read_variants(MODEL, texts, lambda given: [[text, text] for text in given])
    np.testing.assert_allclose(nextoken.score(signature, "neighbourhood", variants=same), 0, atol=1e-6)


@pytest.mark.paper("2305.18462")
def test_neighbourhood_is_detectgpt_undivided() -> None:
    texts, others = ["abcA", "CCb"], [["abca", "bbcA", "cccc"], ["CBb", "aab"]]
    signature = nextoken.read(MODEL, texts)
    variants = read_variants(MODEL, texts, lambda _: others)
    deviation = [np.std([mean(MODEL, other) for other in group]) for group in others]
    divided = nextoken.score(signature, "neighbourhood", variants=variants) / deviation
    np.testing.assert_allclose(nextoken.score(signature, "detectgpt", variants=variants), divided, rtol=1e-4)


@pytest.mark.paper("2406.15968")
@given(TEXTS, st.text(SYMBOLS, max_size=4))
@settings(max_examples=30)
def test_recall_is_its_quotient(texts: list[str], prefix: str) -> None:
    prefixed = nextoken.read(MODEL, texts, prompts=[prefix] * len(texts))
    found = nextoken.score(nextoken.read(MODEL, texts), "recall", prefixed=prefixed)
    for number, text in enumerate(texts):
        assert found[number] == pytest.approx(mean(MODEL, text, prefix) / mean(MODEL, text), rel=1e-4)
        assert prefix or found[number] == pytest.approx(1)


@pytest.mark.parametrize("name", ["mean_logprob", "zlib", "min_k", "min_k_plus_plus", "reference", "neighbourhood"])
def test_every_score_points_at_the_text_known_by_heart(name: str) -> None:
    """A count model of the members: both sets are of one source, and one of them was counted."""
    random, vocab = np.random.default_rng(0), Vocab([b"a", b"b", b"c", b"d", b"<s>"], bos_id=4)
    texts = ["".join(random.choice([*"abcd"], 24)) for _ in range(80)]
    model = NgramModel.from_text(texts[:40], vocab, order=6)
    signature = nextoken.read(model, texts, top=0)
    options = {
        "reference": {"reference": nextoken.read(NgramModel.from_text(texts[:40], vocab, order=1), texts, top=0)},
        "neighbourhood": {"variants": read_variants(model, texts, lambda given: [[text[::-1]] for text in given])},
    }.get(name, {})
    found = nextoken.score(signature, name, **options)
    auroc = (found[:40, None] > found[None, 40:]).mean()
    assert auroc > 0.9


def test_a_text_without_tokens_is_unknown_and_inputs_are_asked_for() -> None:
    signature = nextoken.read(MODEL, ["", "abc"])
    options = {
        "lowercase": {"lowered": signature},
        "recall": {"prefixed": signature},
        "reference": {"reference": signature},
        "neighbourhood": {"variants": read_variants(MODEL, ["", "abc"], lambda _: [["a"], ["b"]])},
    }
    for name in ("zlib", "lowercase", "reference", "min_k", "min_k_plus_plus", "neighbourhood", "recall"):
        found = nextoken.score(signature, name, **options.get(name, {}))
        assert math.isnan(found[0]) and math.isfinite(found[1]), name
        if name in options:
            with pytest.raises(MissingInput):
                nextoken.score(signature, name)
    for name, option in (("lowercase", "lowered"), ("recall", "prefixed")):
        with pytest.raises(ValueError, match="same texts"):
            nextoken.score(signature, name, **{option: nextoken.read(MODEL, "abc")})

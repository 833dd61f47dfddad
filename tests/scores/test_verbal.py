"""Stated confidence: a corpus for the reader, tables for the screen, and the published counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextoken.scores.quality import auroc
from nextoken.scores.stated import PHRASES, numeric_question, phrase_question, stated_percentage, stated_phrase
from nextoken.scores.verbal import rates_of, screen


@pytest.mark.parametrize(
    ("text", "confidence", "answer"),
    [
        ("Answer: Paris\nConfidence: 95%", 0.95, "Paris"),
        ("**Answer:** Paris\n**Confidence:** 95 %", 0.95, "Paris"),
        ("Paris.\nMy confidence is 80 percent.", 0.8, "Paris"),
        ("Paris\nConfidence level: 100/100", 1.0, "Paris"),
        ("It is Paris, I am 70% sure.", 0.7, "It is Paris, I am"),
        ("Rome, and 40 % confident.", 0.4, "Rome, and"),
        ("Answer: 1995\nConfidence: 60", 0.6, "1995"),
        ("In 1995, 30% of them left.\nConfidence: 85%", 0.85, "In 1995, 30% of them left"),
        ("Answer: 12\n90", 0.9, "12"),
        ("Confidence (0-100): 75\n", 0.75, "Confidence (0-100):"),
        ("Answer: Oslo\nConfidence: 0.95", 0.95, "Oslo"),
        ("Answer: Oslo\nConfidence: 0.95%", 0.0095, "Oslo"),
        ("Answer: Oslo\nConfidence: 1%", 0.01, "Oslo"),
        ("<think>Confidence: 5%</think>Answer: Bern\nConfidence: 55%", 0.55, "Bern"),
    ],
)
def test_numbers_are_read(text: str, confidence: float, answer: str) -> None:
    stated = stated_percentage(text)
    assert stated.status == "success" and stated.confidence == pytest.approx(confidence)
    assert stated.answer == answer


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Answer: Paris", "no_confidence"),
        ("It was in 1995", "no_confidence"),
        ("Answer: Paris\nConfidence: 150%", "no_confidence"),
        ("Rate it from 0-100.", "no_confidence"),
        ("Confidence: 90%", "no_answer"),
        ("", "no_answer"),
        ("<think>Confidence: 90%", "no_confidence"),
        ("The answer is the. " * 9, "degenerate_loop"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, status: str) -> None:
    stated = stated_percentage(text)
    assert stated.status == status
    assert math.isnan(stated.confidence) or status == "no_answer"


def test_a_cut_off_answer_is_told_apart() -> None:
    assert stated_percentage("Well, let me", cut_off=True).status == "max_tokens"
    assert stated_percentage("<think>Well", cut_off=True).status == "max_tokens"
    assert stated_percentage("Answer: a\nConfidence: 9%", cut_off=True).status == "success"


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("Almost certain.", "almost certain"),
        ("That is unlikely.", "unlikely"),
        ("It is highly likely, not just likely.", "highly likely"),
        ("HIGHLY UNLIKELY", "highly unlikely"),
        ("likely", "likely"),
    ],
)
def test_phrases_are_read_whole(text: str, phrase: str) -> None:
    assert stated_phrase(text).confidence == pytest.approx((PHRASES.index(phrase) + 0.5) / 10)


def test_of_phrases_that_begin_alike_the_longest_is_read() -> None:
    assert stated_phrase("Very sure.", phrases=("no", "sure", "very", "very sure")).confidence == 0.875


def test_a_repeated_list_and_no_phrase_state_nothing() -> None:
    assert stated_phrase("Pick one: " + ", ".join(PHRASES)).status == "no_confidence"
    assert stated_phrase("I could not say. An unlikelihood.").status == "no_confidence"


def test_questions_are_conversations() -> None:
    assert [message["role"] for message in numeric_question("Why?")] == ["system", "user"]
    asked = phrase_question("Why?", "Because.")
    assert asked[1] == {"role": "assistant", "content": "Because."} and PHRASES[-1] in asked[2]["content"]


def table(a: int, b: int, c: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences 0.9 and 0.1, and outcomes, with these counts."""
    return np.repeat([0.9, 0.9, 0.1, 0.1], [a, b, c, d]), np.repeat([1, 0, 1, 0], [a, b, c, d])


@pytest.mark.paper("2604.22215")
@pytest.mark.parametrize(
    ("counts", "study", "package"),
    [
        # The published cell: n = 522, accuracy 0.59, L = 0.953, Fp = 0.0065, TRIN = 0.977.
        ((306, 204, 2, 10), "invalid", "insufficient"),
        ((80, 20, 20, 80), "valid", "valid"),
        ((40, 20, 4, 10), "insufficient", "insufficient"),
        ((20, 80, 80, 20), "invalid", "invalid"),  # inverted, and half of the right ones low
        ((50, 50, 50, 50), "invalid", "invalid"),  # Fp = 0.5, surely above 0.4
        ((20, 20, 22, 22), "indeterminate", "indeterminate"),
        ((4600, 4700, 400, 300), "indeterminate", "invalid"),  # RBS = 0.02, surely above 0, within the margin
        ((500, 490, 40, 10), "invalid", "invalid"),  # L = 0.98
    ],
)
def test_tiers_of_both_orders(counts: tuple[int, int, int, int], study: str, package: str) -> None:
    confidence, correct = table(*counts)
    found = {order: screen(confidence, correct, order=order, resamples=50).tier for order in ("study", "package")}
    assert found == {"study": study, "package": package}


@pytest.mark.paper("2604.22215")
def test_the_published_figures_come_out() -> None:
    found = screen(*table(306, 204, 2, 10), resamples=50)
    assert found.false_high[0] == pytest.approx(0.953, abs=5e-4)
    assert found.false_low[0] == pytest.approx(0.0065, abs=5e-5)
    assert found.same == pytest.approx(0.977, abs=5e-4)
    assert "degenerate" in found.reason and found.counts == (306, 204, 2, 10)


def test_rates_at_their_ends() -> None:
    def rate(name: str, *counts: int) -> float:
        return rates_of(*counts)[name][0]

    assert (rate("false_high", 9, 5, 0, 0), rate("false_low", 9, 5, 0, 0), rate("bias", 9, 5, 0, 0)) == (1, 0, 0)
    assert (rate("bias", 9, 0, 0, 5), rate("correlation", 9, 0, 0, 5)) == (-1, 1)
    assert (rate("bias", 0, 9, 5, 0), rate("correlation", 0, 9, 5, 0)) == (1, -1)
    assert math.isnan(rate("false_high", 3, 0, 4, 0)) and screen(*table(3, 0, 4, 0), resamples=9).tier == "insufficient"


@given(st.tuples(*[st.integers(1, 40)] * 4))
def test_swapping_the_labels_turns_the_bias_around(counts: tuple[int, int, int, int]) -> None:
    a, b, c, d = counts
    one, other = rates_of(a, b, c, d), rates_of(b, a, d, c)
    assert one["bias"][0] == pytest.approx(-other["bias"][0])
    assert one["bias"][1] == pytest.approx(-other["bias"][2])
    high, right = np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)
    assert one["correlation"][0] == pytest.approx(np.corrcoef(high, right)[0, 1])


def test_what_cannot_be_read_is_reported_and_not_low() -> None:
    confidence, correct = table(40, 10, 10, 40)
    more = np.concatenate([confidence, np.full(60, math.nan)])
    found = screen(more, np.concatenate([correct, np.ones(60)]), resamples=50)
    assert found.failures == pytest.approx(60 / 160) and found.counts == (40, 10, 10, 40)
    assert any("30 %" in warning for warning in found.warnings)
    nothing = screen(np.full(9, math.nan), np.ones(9), resamples=9)
    assert nothing.tier == "insufficient" and nothing.failures == 1 and math.isnan(nothing.auroc.value)


@pytest.mark.paper("2604.22215")
def test_sharpening_fails_the_screen_but_keeps_the_order() -> None:
    """What the screen does and does not measure: the same ranking, pushed to the ceiling."""
    rng = np.random.default_rng(0)
    p = rng.random(400)
    correct = (rng.random(400) < p).astype(int)
    sharp = 0.95 + 0.05 * p
    before, after = screen(p, correct, resamples=200), screen(sharp, correct, resamples=200)
    assert (before.tier, after.tier) == ("valid", "invalid") and after.ceiling == 1 > before.ceiling
    assert before.auroc.value == after.auroc.value == auroc(p, correct) and after.auroc.low > 0.5
    halved = screen(sharp, correct, threshold="median", resamples=50)
    assert halved.tier == "valid" and abs(sum(halved.counts[:2]) - 200) <= 1


def test_misuse_is_refused() -> None:
    for confidence, correct, message in (
        ([95.0], [1], "from 0 to 1"),
        ([0.5], [2], "0/1"),
        ([0.5, 0.4], [1], "0/1"),
        ([], [], "n > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            screen(np.array(confidence), np.array(correct))
    with pytest.raises(ValueError, match="order"):
        screen(np.array([0.5]), np.array([1]), order="other")  # type: ignore[arg-type]

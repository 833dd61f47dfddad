"""P(True): by the table's own rows, over verdicts of several tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nextoken.model.table import TableModel
from nextoken.scores.true import BRAINSTORM, TEMPLATE, p_true

SYMBOLS = ["Q", "A", "T", "F", "x"]
MODEL = TableModel.random(SYMBOLS, order=3, seed=3)


def probability(prompt: str, verdict: str) -> float:
    ids = list(MODEL.vocab.encode(prompt + verdict).ids)
    return math.exp(sum(float(MODEL.row(ids[:t])[ids[t]]) for t in range(len(prompt), len(ids))))


@pytest.mark.paper("2207.05221")
def test_it_is_the_share_of_the_true_verdict() -> None:
    questions, answers = ["QQ", "Qx", "xx"], ["A", "AA", ""]
    found = p_true(MODEL, questions, answers, template="{question}{answer}x", true="TTx", false="F")
    for question, answer, value in zip(questions, answers, found, strict=True):
        right, wrong = (probability(f"{question}{answer}x", verdict) for verdict in ("TTx", "F"))
        assert value == pytest.approx(right / (right + wrong), rel=1e-5)
    turned = p_true(MODEL, questions, answers, template="{question}{answer}x", true="F", false="TTx")
    np.testing.assert_allclose(found + turned, 1, rtol=1e-6)


@pytest.mark.paper("2207.05221")
def test_other_answers_can_be_shown() -> None:
    shown = p_true(MODEL, ["Q"], ["A"], ideas=[["xA"]], template="{question}{ideas}{answer}", true="T", false="F")
    right, wrong = (probability("QxAA", verdict) for verdict in "TF")
    assert shown[0] == pytest.approx(right / (right + wrong), rel=1e-5)


def test_the_templates_ask_for_letters() -> None:
    assert TEMPLATE.format(question="q", answer="a").endswith("The proposed answer is:")
    assert "i1\ni2" in BRAINSTORM.format(question="q", answer="a", ideas="i1\ni2")


def test_verdicts_that_cannot_be() -> None:
    model = TableModel.given({(): [0.5, 0.5, 0.0, 0.0]}, ["Q", "T", "F", "G"])
    ask = {"template": "{question}{answer}"}
    assert p_true(model, ["Q"], ["Q"], true="T", false="F", **ask).tolist() == [1.0]
    assert p_true(model, ["Q"], ["Q"], true="F", false="T", **ask).tolist() == [0.0]
    assert math.isnan(p_true(model, ["Q"], ["Q"], true="F", false="G", **ask)[0])
    assert p_true(model, [], []).shape == (0,)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="2 questions, 1 answers: give one"):
        p_true(MODEL, ["Q", "Q"], ["A"])
    with pytest.raises(ValueError, match="and 0 lists of ideas"):
        p_true(MODEL, ["Q"], ["A"], ideas=[])
    with pytest.raises(ValueError, match="verdicts"):
        p_true(MODEL, ["Q"], ["A"], true="")

"""Solutions that begin differently: the same answers as navigation gives, and a vote on the greedy results."""

from __future__ import annotations

from collections import Counter

import pytest

from nextoken.decode.generate import generate
from nextoken.decode.navigation import Listing, ban_only, navigate
from nextoken.decode.solutions import WAYS, Ways, branch_reasoning, letter, navigate_reasoning, number
from nextoken.model.table import TableModel

FORM = Listing("{instruction}", "#{answer}", "#", ("#",), lists_unfinished=True)
SETTINGS = Ways(paths=4, max_tokens=5, request="", suffix="=", result_tokens=2, listing=FORM)


@pytest.mark.paper("2410.02284")
def test_solutions_are_those_of_navigation_with_one_token_per_run() -> None:
    for seed in range(8):
        model = TableModel.random(["1", "2", "+", "x", "=", "#"], order=3, seed=seed)
        vote = navigate_reasoning(model, "x", ways=SETTINGS)
        assert vote.navigation == navigate(model, "x", runs=4, k=1, listing=FORM, max_tokens=5)
        plain = branch_reasoning(model, "x", ways=SETTINGS)
        assert plain.navigation == ban_only(model, "x", runs=4, k=1, listing=FORM, max_tokens=5)
        for found in (vote, plain):
            expected = []
            for answer in found.navigation.answers:
                asked = f"x#{answer.text}="
                expected.append(number(generate(model, asked, transform="greedy", max_tokens=2).text))
            assert list(found.results) == expected
            counts = Counter(result for result in expected if result is not None)
            assert found.result == (max(counts, key=lambda r: (counts[r], -expected.index(r))) if counts else None)


def test_first_tokens_lie_within_the_best() -> None:
    model = TableModel.random(["1", "2", "+", "x", "=", "#"], order=3, seed=1)
    found = navigate_reasoning(
        model, "x", ways=Ways(paths=6, within=2, max_tokens=5, request="", suffix="=", listing=FORM)
    )
    assert all(answer.rank < 2 for answer in found.navigation.answers)


def test_a_full_context_has_no_result() -> None:
    model = TableModel.given({(): [1.0, 0.0, 0.0]}, ["x", "=", "#"])
    model.context_length = 6
    vote = navigate_reasoning(model, "x", ways=Ways(paths=1, max_tokens=50, request="", suffix="=", listing=FORM))
    assert vote.navigation.answers[0].finish == "context" and vote.results == (None,) and vote.result is None


def test_results_are_read_off() -> None:
    assert number("is 1,234.5 or 6") == "1234.5" and number("-3.") == "-3" and number("none") is None
    assert letter("the answer is B.") == "B" and letter("(C) or D") == "C" and letter("Above") is None


def test_the_default_listing() -> None:
    assert WAYS.prompt("Q", ["one"]) == "Q\n\n### Way 1:\n* **Step 1:**\none\n\n### Way 2:\n* **Step 1:**\n"

"""nextoken generate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nextoken
from nextoken.decode.generate import generate

Run = Callable[..., Any]  # the fixture of conftest.py
NANO = ("--model", "nano")


def test_a_text_is_what_the_library_draws(run: Run) -> None:
    rule = "temperature(0.8) | top_p(0.9)"
    done = run("generate", "It was", *NANO, "--transform", rule, "--seed", 4, "--max-tokens", 20)
    expected = generate("nano", "It was", transform=rule, seed=4, max_tokens=20).text
    assert (done.code, done.out) == (0, expected + "\n")


def test_speculation_by_name_or_by_model_keeps_greedy_text(run: Run) -> None:
    expected = run("generate", "It was", *NANO, "--transform", "greedy", "--max-tokens", 12).out
    for draft in ("lookup", "recycling", "nano"):
        done = run("generate", "It was", *NANO, "--transform", "greedy", "--max-tokens", 12, "--speculate", draft)
        assert (done.code, done.out) == (0, expected)
    run("generate", "It was", *NANO, "--speculate", "no/such").refused("no/such")


def test_the_prompt_may_come_from_stdin(run: Run) -> None:
    done = run("generate", "-", *NANO, "--transform", "greedy", "--max-tokens", 5, stdin=b"It was")
    assert done.out == generate("nano", "It was", transform="greedy", max_tokens=5).text + "\n"


def test_several_texts_as_json_with_their_surprisals(run: Run) -> None:
    done = run("generate", "It was", *NANO, "-n", 3, "--seed", 1, "--max-tokens", 6, "--json")
    records = json.loads(done.out)
    made = generate("nano", "It was", n=3, seed=1, max_tokens=6)
    assert [record["text"] for record in records] == [g.text for g in made]
    for record in records:
        assert record["surprisals"] == pytest.approx(record["model_surprisals"], abs=1e-3)


def test_signature_and_page_are_written(run: Run, tmp_path: Path) -> None:
    table, page = tmp_path / "g.parquet", tmp_path / "g.html"
    done = run("generate", "It was", *NANO, "--seed", 1, "--max-tokens", 8, "--signature", table, "--html", page)
    signature = nextoken.Signature.from_parquet(table)
    assert signature.text() + "\n" == done.out
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--transform", "nonsense"), "no transform 'nonsense'"),
        (("--transform", "top_p(3)"), "at most 1"),
        (("-n", 0), "n must be at least 1"),
        (("--max-tokens", 0), "max_tokens must be at least 1"),
        (("--stop", ""), "stop string is empty"),
        (("--signature", "/nowhere/x.parquet"), "no folder"),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: tuple[Any, ...], words: str) -> None:
    run("generate", "It was", *NANO, *arguments).refused(words)


def test_a_prompt_longer_than_the_context_is_refused(run: Run) -> None:
    run("generate", "word " * 1500, *NANO).refused("context of nano holds 1024")


def test_a_transform_that_removes_every_token_is_refused(run: Run) -> None:
    everything = "{" + ", ".join(f"{i}: -inf" for i in range(4096)) + "}"
    run("generate", "It was", *NANO, "--transform", f"logit_bias({everything})").refused("no token is left")


GRAMMAR = 'start: NUMBER "+" NUMBER\nNUMBER: /[0-9]{1,2}/'


def test_an_output_under_a_constraint(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema, grammar = tmp_path / "schema.json", tmp_path / "sum.lark"
    schema.write_text(json.dumps({"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}))
    grammar.write_text(GRAMMAR)
    settings = (*NANO, "--transform", "temperature(0.8)", "--seed", 1, "--max-tokens", 60)
    assert re.fullmatch(" 1[0-9]{3}\n", run("generate", "The year", *settings, "--regex", " 1[0-9]{3}").out)
    assert set(json.loads(run("generate", "The list:", *settings, "--json-schema", schema).out)) <= {"a", "b"}
    assert re.fullmatch(r"\d{1,2}\+\d{1,2}\n", run("generate", "1+", *settings, "--grammar", grammar).out)


def test_an_output_that_was_cut_off_is_said_to_be(run: Run) -> None:
    done = run("generate", "It was", *NANO, "--seed", 1, "--max-tokens", 2, "--regex", "[a-z ]{40}")
    assert done.code == 0 and "cut off before it was complete" in done.err
    whole = run("generate", "It was", *NANO, "--seed", 1, "--max-tokens", 2, "--regex", "a.*")
    assert whole.err == ""


def test_a_bad_constraint_is_one_line(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    bad = tmp_path / "bad"
    bad.write_text("start: x )")
    for options, words in (
        (("--regex", "(a"), "--regex (a: the regular expression '(a' is malformed"),
        (("--regex", r"(a)\1"), "backreference"),
        (("--json-schema", bad), "no JSON"),
        (("--grammar", bad), "expecting rule"),
        (("--grammar", tmp_path / "none"), "No such file"),
        (("--json-schema", tmp_path), "Is a directory"),
        (("--regex", "a", "--grammar", bad), "--regex and --grammar were given"),
    ):
        run("generate", "It was", *NANO, *options).refused(words)

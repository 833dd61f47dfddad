"""nextoken detect and nextoken membership."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nextoken
from nextoken.scores import all_scores, table
from nextoken.scores.quality import auroc

Run = Callable[..., Any]  # the fixture of conftest.py
NANO = ("--model", "nano")
PEOPLE = ["The rain had stopped by noon, and they went on.", "He never wrote to his sister again.", "It was late."]
OTHERS = ["the the the the the the the the", "of the of the of the of the of the"]
SUSPECT = "She said that the house was cold."


@pytest.fixture
def known(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a file per human text, and JSON lines with the others."""
    people, others = tmp_path / "people", tmp_path / "others.jsonl"
    people.mkdir()
    for number, text in enumerate(PEOPLE):
        (people / f"{number}.txt").write_text(text)
    (people / ".hidden").write_text("not a text")
    others.write_text(json.dumps({"text": OTHERS[0], "id": 7}) + "\n\n" + json.dumps(OTHERS[1]) + "\n")
    return people, others


def scores_of(texts: list[str], name: str) -> Any:
    return table(nextoken.read("nano", texts, progress=False), [name])[name]


@pytest.mark.parametrize(("command", "high"), [("detect", "machine"), ("membership", "member")])
def test_scores_are_those_of_the_library_that_answer_the_question(run: Run, command: str, high: str) -> None:
    told = json.loads(run(command, "-t", SUSPECT, *NANO, "--json").out)["texts"][0]
    entries = all_scores()
    assert told["scores"] and all(entries[name].high == high for name in told["scores"])
    for name, value in told["scores"].items():
        assert value == pytest.approx(float(scores_of([SUSPECT], name)[0]), rel=1e-5), name
    assert set(told["p_values"].values()) == {None}


def test_p_values_count_the_innocents_that_score_as_high(run: Run, known: tuple[Path, Path]) -> None:
    told = json.loads(run("detect", "-t", SUSPECT, *NANO, "--human", known[0], "--json").out)
    for name, p in told["texts"][0]["p_values"].items():
        value, people = scores_of([SUSPECT], name)[0], scores_of(PEOPLE, name)
        assert p == pytest.approx((1 + sum(one >= value - 1e-6 for one in people)) / 4), name
    assert told["known"] == {"innocent": 3, "guilty": 0}
    assert told["power"] == {}


def test_power_is_told_where_both_kinds_are_known(run: Run, known: tuple[Path, Path]) -> None:
    told = json.loads(run("detect", *NANO, "--human", known[0], "--machine", known[1], "--json").out)
    assert told["texts"] == [] and told["known"] == {"innocent": 3, "guilty": 2}
    for name, measures in told["power"].items():
        values = scores_of(PEOPLE + OTHERS, name)
        assert measures["auroc"]["value"] == pytest.approx(float(auroc(values, [0, 0, 0, 1, 1])), abs=1e-9), name


def test_a_table_for_people(run: Run, known: tuple[Path, Path]) -> None:
    done = run("membership", "-t", SUSPECT, *NANO, "--unseen", known[0], "--seen", known[1])
    assert "AUROC" in done.out and "min_k" in done.out and "3 known unseen texts" in done.out
    assert "none of these numbers has a scale" in run("detect", "-t", SUSPECT, *NANO).out


def test_texts_are_cut_to_one_length(run: Run) -> None:
    vocab = nextoken.load("nano").vocab
    end = vocab.encode(SUSPECT).ends[3]
    told = json.loads(run("detect", "-t", SUSPECT, *NANO, "--tokens", "4", "--scores", "rank", "--json").out)
    beginning = SUSPECT.encode()[:end].decode()
    assert told["texts"][0]["scores"]["rank"] == pytest.approx(float(scores_of([beginning], "rank")[0]), rel=1e-6)
    run("detect", "-t", "Short.", *NANO, "--tokens", "400").refused("fewer than --tokens 400")


def test_scores_of_two_models_need_the_second(run: Run) -> None:
    run("detect", "-t", SUSPECT, *NANO, "--scores", "binoculars").refused("binoculars", "--reference")
    told = json.loads(run("detect", "-t", SUSPECT, *NANO, "--reference", "nano", "--json").out)
    assert told["texts"][0]["scores"]["binoculars"] is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to read"),
        (("-t", "x", "--scores", "perplexity"), "does not tell whether a machine wrote a text"),
        (("-t", "x", "--scores", "binocular"), "did you mean binoculars"),
        (("-t", "x", "--scores", ","), "names no score"),
        (("-t", "x", "--human", "/nowhere"), "no such file"),
    ],
)
def test_bad_input(run: Run, arguments: tuple[str, ...], words: str) -> None:
    run("detect", *arguments).refused(words)


def test_bad_collections(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    lines = tmp_path / "lines.jsonl"
    run("detect", "-t", "x", "--human", tmp_path / "empty").refused("holds no file", "human texts")
    for text, words in (('{"text": 3}', "line 1"), ("{", "no JSON"), ("\n", "no line with a text")):
        lines.write_text(text)
        run("detect", "-t", "x", "--human", lines).refused(words)
    lines.write_bytes(b"\xff\xff")
    run("detect", "-t", "x", "--human", lines).refused("not UTF-8")

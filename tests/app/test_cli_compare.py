"""nextoken compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nextoken
from nextoken.scores.paired import paired_difference

Run = Callable[..., Any]  # the fixture of conftest.py
TEXT = "It was the best of times, it was the worst of times. " * 20
BOTH = ("--model", "tiny", "--model", "nano")


def test_figures_and_interval_are_those_of_the_library(run: Run) -> None:
    told = json.loads(run("compare", "-t", TEXT, *BOTH, "--json").out)
    readings = [nextoken.read(name, [TEXT], progress=False) for name in ("tiny", "nano")]
    for record, reading in zip(told["models"], readings, strict=True):
        assert record["bits_per_byte"] == pytest.approx(reading.summary()["bits_per_byte"], rel=1e-6)
    found = paired_difference(nextoken.compare(*readings))
    (pair,) = told["pairs"]
    assert (pair["difference"], pair["low"], pair["high"]) == pytest.approx((found.value, found.low, found.high))
    gaps = [abs(place["nats_a"] - place["nats_b"]) for place in pair["most_different"]]
    assert len(gaps) == 8 and gaps == sorted(gaps, reverse=True)


def test_a_table_for_people(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    done = run("compare", tmp_path / "one.txt", *BOTH, "--model", "nano", "--most", "2")
    assert done.out.count("where they differ most") == 2
    assert "too short" in run("compare", "-t", "Once upon a time", *BOTH, "--most", "0").out


def test_bad_input(run: Run) -> None:
    run("compare", "-t", "x", "--model", "tiny").refused("nothing to be compared with")
    run("compare", *BOTH).refused("nothing to read")

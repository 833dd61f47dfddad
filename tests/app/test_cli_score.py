"""nextoken score, compress, decompress."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import nextoken
from nextoken.scores import all_scores, table

Run = Callable[..., Any]  # the fixture of conftest.py
NANO = ("--model", "nano")
TEXTS = ("It was the best of times, it was the worst of times.", "Call me Ishmael.")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


def test_scores_are_those_of_the_library(run: Run, files: list[Path]) -> None:
    done = run("score", *files, *NANO, "--scores", "perplexity, min_k", "--json")
    found = table(nextoken.read("nano", list(TEXTS), progress=False), ["perplexity", "min_k"])
    records = json.loads(done.out)
    assert [record["text"] for record in records] == [str(path) for path in files]
    for name, values in found.items():
        assert [record[name] for record in records] == pytest.approx(values.tolist(), rel=1e-5)


def test_all_scores_that_can_be_had(run: Run, files: list[Path]) -> None:
    alone = json.loads(run("score", files[0], *NANO, "--json").out)[0]
    both = json.loads(run("score", files[0], *NANO, "--reference", "nano", "--json").out)[0]
    assert "perplexity" in alone and "binoculars" not in alone
    assert both["binoculars"] is not None
    assert both["reference"] == pytest.approx(0.0, abs=1e-6)


def test_a_table_for_people_and_a_file_for_programs(run: Run, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    done = run("score", *files, *NANO, "--scores", "perplexity", "--parquet", out)
    assert "perplexity" in done.out and "uncertain" in done.out
    assert pq.read_table(out).column_names == ["text", "perplexity"]
    assert pq.read_table(out).num_rows == 2


def test_the_list(run: Run) -> None:
    told = json.loads(run("score", "--list", "--json").out)
    assert [entry["name"] for entry in told] == list(all_scores())
    needs = {entry["name"]: entry["needs"] for entry in told}
    assert needs["perplexity"] == []
    assert "reference" in needs["binoculars"]
    assert "samples" in needs["semantic_entropy"]
    assert "min_k" in run("score", "--list").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scores", "perplexty"), "did you mean perplexity"),
        (("--scores", " , "), "names no score"),
        (("--scores", "binoculars"), "--reference"),
        (("--parquet", "/nowhere/x.parquet"), "no folder"),
    ],
)
def test_bad_input_is_one_line(run: Run, files: list[Path], arguments: tuple[Any, ...], words: str) -> None:
    run("score", files[0], *NANO, *arguments).refused(words)


def test_a_file_comes_back(run: Run, files: list[Path], tmp_path: Path) -> None:
    done = run("compress", files[0], *NANO, "--streams", 1)
    code = tmp_path / "one.txt.nxtc"
    assert "bits per byte" in done.err and code.exists()
    files[0].unlink()
    run("decompress", code, *NANO)
    assert files[0].read_text() == TEXTS[0]
    run("decompress", code, "--model", "tiny", "-o", tmp_path / "x").refused(
        "decompress with the model that compressed"
    )
    assert not (tmp_path / "x").exists()


def test_compression_of_what_is_not_there(run: Run, tmp_path: Path) -> None:
    run("compress", tmp_path / "none.txt", *NANO).refused("cannot read")
    run("decompress", tmp_path / "none.txt", *NANO).refused("name the file to write")
    plain = tmp_path / "plain.nxtc"
    plain.write_bytes(b"not compressed")
    run("decompress", plain, *NANO).refused("compressed")

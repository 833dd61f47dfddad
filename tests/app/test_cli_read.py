"""`nextoken read` on the model nano: its figures are those of transformers, and its files are whole or not there."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nextoken
from nextoken.model import bundled_path, load

Run = Callable[..., Any]  # the fixture of conftest.py
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model nano with a tokenizer that knows no begin token."""
    folder = tmp_path_factory.mktemp("models") / "beginless"
    shutil.copytree(bundled_path("nano"), folder)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        kept = {key: value for key, value in settings.items() if not key.startswith("bos_token")}
        (folder / name).write_text(json.dumps(kept))
    return folder


def nats_by_transformers(text: str) -> float:
    """-sum log p by the plain route: transformers' logits, softmax over all of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(bundled_path("nano"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("nano"))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
    return -float(logprobs.gather(-1, ids[0, 1:, None]).sum())


def test_the_summary_is_that_of_transformers(run: Run, book: Path) -> None:
    finished = run("read", book, "--model", "nano", "--json")
    assert finished.code == 0 and finished.err == ""
    record = json.loads(finished.out)
    (of_text,) = record["texts"]
    expected = nats_by_transformers(TEXT)
    assert of_text["nats"] == pytest.approx(expected, rel=1e-5)
    assert of_text["bytes"] == len(TEXT)
    assert of_text["bits_per_byte"] == pytest.approx(expected / math.log(2) / len(TEXT), rel=1e-5)
    assert record["model"] == "nano" and of_text["name"] == str(book)
    assert record["total"] == {name: value for name, value in of_text.items() if name != "name"}


def test_several_texts_from_everywhere(run: Run, book: Path) -> None:
    options = ["--text", "First.", "--text", "Second text.", "--model", "nano", "--json"]
    record = json.loads(run("read", book, "-", *options, stdin=b"From stdin.").out)
    assert [text["name"] for text in record["texts"]] == [str(book), "stdin", "text 1", "text 2"]
    assert [text["bytes"] for text in record["texts"]] == [len(TEXT), 11, 6, 12]
    for figure in ("tokens", "bytes", "nats"):
        assert record["total"][figure] == pytest.approx(sum(text[figure] for text in record["texts"]))


def test_a_line_for_each_text_and_one_for_all(run: Run, book: Path) -> None:
    finished = run("read", book, "--text", "Another.", "--model", "nano")
    lines = finished.out.splitlines()
    assert [line.split()[0] for line in lines] == [str(book), "text", "total"]
    assert "\x1b" not in finished.out  # no colours where nobody looks
    figures = nextoken.read("nano", TEXT).summary()
    assert f"{figures['tokens']} tokens" in lines[0]
    assert f"{figures['bits_per_byte']:.3f} bits/byte" in lines[0]
    assert f"perplexity {figures['perplexity']:,.4g}" in lines[0]
    assert len({line.index(" bits/byte") for line in lines}) == 1  # in columns


def test_colours_at_a_terminal(run: Run, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = run("read", book, "--model", "nano")
    assert "\x1b[" in coloured.out and " times" in coloured.out
    quiet = run("read", book, "--model", "nano", "--quiet")
    assert " times" not in quiet.out and "bits/byte" in quiet.out


def test_files_hold_what_python_would_have_made(run: Run, book: Path, tmp_path: Path) -> None:
    page, table = tmp_path / "page.html", tmp_path / "table.parquet"
    finished = run("read", book, "--model", "nano", "--html", page, "--parquet", table, "--top", "3")
    assert finished.code == 0
    assert str(page) in finished.err and str(table) in finished.err
    written = nextoken.Signature.from_parquet(table)
    expected = nextoken.read("nano", TEXT.encode(), names=[str(book)], top=3)
    assert written.texts == expected.texts and written.column("top_ids").shape[1] == 3
    np.testing.assert_allclose(written.column("entropy"), expected.column("entropy"), rtol=1e-5)
    html = page.read_text(encoding="utf-8")
    assert html.lower().startswith("<!doctype html>") and "book.txt" in html
    assert sorted(os.listdir(tmp_path)) == ["book.txt", "page.html", "table.parquet"]


def test_invalid_utf8_is_read_and_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Ein Gruß aus Köln, wo es heute wieder einmal regnet.".encode("latin-1"))
    finished = run("read", tmp_path / "latin", "--model", "nano", "--json")
    assert finished.code == 0 and "2 bytes are not UTF-8" in finished.err
    assert json.loads(finished.out)["texts"][0]["replaced"] == 2


def test_a_text_far_beyond_the_context(run: Run, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 60)
    record = json.loads(run("read", long, "--model", "nano", "--json").out)
    assert record["total"]["tokens"] > record["context_length"]
    assert record["total"]["bytes"] == len(TEXT) * 60


def test_a_model_without_a_begin_token(run: Run, book: Path, without_bos: Path) -> None:
    finished = run("read", book, "--model", without_bos, "--json")
    assert finished.code == 0
    assert "no begin token" in finished.err and finished.err.count("\n") == 1
    first = len(load("nano").vocab.decode(load("nano").vocab.encode(TEXT).ids[:1]))
    assert json.loads(finished.out)["total"]["bytes"] == len(TEXT) - first


def test_one_token_that_nothing_predicts(run: Run, without_bos: Path) -> None:
    assert len(load("nano").vocab.encode(" the")) == 1
    run("read", "--text", " the", "--model", without_bos).refused("single token", "begin token")
    assert run("read", "--text", " the", "--model", "nano").code == 0


def test_top_beyond_the_vocabulary(run: Run, book: Path) -> None:
    run("read", book, "--model", "nano", "--top", "5000").refused("--top 5,000", "4,096")


# --- two models -------------------------------------------------------------------------------------------------------


def test_a_model_beside_itself(run: Run, book: Path) -> None:
    record = json.loads(run("read", book, "--model", "nano", "--compare", bundled_path("nano"), "--json").out)
    assert record["against"] and record["total"]["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert record["total"]["against_bits_per_byte"] == pytest.approx(record["total"]["bits_per_byte"])
    finished = run("read", book, "--model", "nano", "--compare", bundled_path("nano"), "--colour", "kl")
    assert finished.code == 0 and "KL 0.000 nats" in finished.out


def test_a_column_that_needs_a_second_model(run: Run, book: Path) -> None:
    run("read", book, "--model", "nano", "--colour", "kl").refused("'kl'", "--compare")
    run("read", book, "--model", "nano", "--colour", "entropy_lower").refused("'entropy_lower'", "server")


def test_models_with_different_tokenizers(run: Run, book: Path, without_bos: Path) -> None:
    """Vocabularies that differ in their begin token differ; both readings are of the same bytes."""
    arguments = ["read", book, "--model", "nano", "--compare", without_bos]
    record = json.loads(run(*arguments, "--json").out)
    assert record["against"] is None
    first, second = record["total"], record["compare"]["total"]
    assert first["tokens"] == second["tokens"] + 1
    joined = nextoken.compare(nextoken.read("nano", TEXT), nextoken.read(load(without_bos), TEXT)).summary()
    assert record["comparison"]["nats_b"] == pytest.approx(joined["nats_b"]) == pytest.approx(second["nats"])
    lines = run(*arguments).out.splitlines()
    assert all("bits/byte" in line for line in lines[:3])
    assert f"{joined['bits_per_byte_a']:.3f}" in lines[2] and f"{joined['bits_per_byte_b']:.3f}" in lines[2]
    assert len(lines) == 3 + 10


# --- a disk that fills up ---------------------------------------------------------------------------------------------


def few_bytes() -> None:
    """A limit on the size of files stands in for a full disk: a write fails half-way through just the same."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))


@pytest.mark.parametrize("option", ["--html", "--parquet"])
def test_a_disk_that_fills_up_leaves_what_was_there(option: str, book: Path, tmp_path: Path) -> None:
    """In a process of its own, for the limit would also be that of a file the test report is written to."""
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("what was there")
    for target in (new, old):
        command = [sys.executable, "-m", "nextoken", "read", book, "--model", "nano", "--quiet", option, target]
        done = subprocess.run(command, preexec_fn=few_bytes, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"nextoken: cannot write {target}") and done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["book.txt", "old"]
    assert old.read_text() == "what was there"

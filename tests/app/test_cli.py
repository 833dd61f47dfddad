"""The command line as a person meets it: exit codes, what goes to stdout and what to stderr, what is left on disk."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

import nextoken
from nextoken.app import cli

Run = Callable[..., Any]  # the fixture of conftest.py


def in_a_process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "nextoken", *map(str, arguments)]
    return subprocess.run(program, stderr=subprocess.PIPE, text=True, **options)


# --- help -------------------------------------------------------------------------------------------------------------


COMMANDS: dict[str, Any] = dict(get_command(cli.app).commands)  # type: ignore[attr-defined]


def examples(name: str) -> list[str]:
    _, _, block = COMMANDS[name].help.partition("Examples:")
    return [line.strip() for line in block.splitlines() if line.strip()]


def test_there_are_the_commands_promised() -> None:
    assert {"read", "models", "methods", "verify", "serve"} <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_line_the_command_takes(name: str) -> None:
    lines = examples(name)
    assert lines
    for line in lines:
        words = shlex.split(line)
        words = words[len(words) - words[::-1].index("|") :] if "|" in words else words  # the end of a pipeline
        assert words[:2] == ["nextoken", name]
        COMMANDS[name].make_context(name, words[2:])  # raises on an unknown option or a missing argument


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_examples(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    finished = run(name, "--help")
    assert finished.code == 0 and finished.err == ""
    for line in examples(name):
        assert line in finished.out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"nextoken {nextoken.__version__}\n", "")


def test_usage_errors_exit_with_2(run: Run) -> None:
    assert run("read", "--bogus").code == 2
    assert run("nonsense").code == 2


# --- texts refused before a model is loaded -------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: bad input is to be found before."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("nextoken.app._read.load_quietly", load)


@pytest.mark.usefixtures("no_model")
class TestRefusedAtOnce:
    def test_nothing(self, run: Run) -> None:
        run("read").refused("nothing to read", "--text")

    def test_missing_file(self, run: Run, tmp_path: Path) -> None:
        run("read", tmp_path / "absent.txt").refused("no such file", "absent.txt")

    def test_words_instead_of_a_file(self, run: Run) -> None:
        run("read", "It was the best of times").refused("no such file", "--text")

    def test_directory(self, run: Run, tmp_path: Path) -> None:
        run("read", tmp_path).refused(str(tmp_path), "directory")

    @pytest.mark.parametrize(
        ("data", "word"),
        [
            (b"", "empty"),
            (b"\x7fELF\x00\x01\x02", "zero bytes"),
            (bytes(range(128, 256)) * 8, "not UTF-8: 1,024 of its 1,024"),
            ("Grüße".encode("utf-16"), "iconv"),
        ],
    )
    def test_bytes_that_are_no_text(self, data: bytes, word: str, run: Run, tmp_path: Path) -> None:
        (tmp_path / "odd").write_bytes(data)
        run("read", tmp_path / "odd").refused("odd", word)
        run("read", "-", stdin=data).refused("stdin", word)

    def test_invalid_utf8_where_it_must_be_strict(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "latin").write_bytes("Ein Gruß aus Köln, wo es heute wieder einmal regnet.".encode("latin-1"))
        run("read", tmp_path / "latin", "--strict").refused("2 bytes", "first at 7", "--strict")

    def test_one_bad_text_among_good_ones(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "good").write_text("A text.")
        run("read", tmp_path / "good", tmp_path / "absent").refused("absent")

    def test_stdin_twice(self, run: Run) -> None:
        run("read", "-", "-", stdin=b"text").refused("more than once")

    def test_empty_text(self, run: Run) -> None:
        run("read", "--text", "").refused("text is empty")

    @pytest.mark.parametrize("option", ["--html", "--parquet"])
    def test_output_folder_missing(self, option: str, run: Run, tmp_path: Path) -> None:
        run("read", "--text", "a", option, tmp_path / "absent" / "page").refused("no folder", "absent")

    def test_output_is_a_directory(self, run: Run, tmp_path: Path) -> None:
        run("read", "--text", "a", "--html", tmp_path).refused("is a directory")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
    def test_output_is_a_device(self, run: Run) -> None:
        """It is not replaced by a file, which root could do."""
        run("read", "--text", "a", "--html", "/dev/full").refused("/dev/full", "device")
        assert not Path("/dev/full").is_file()

    def test_both_outputs_to_one_file(self, run: Run, tmp_path: Path) -> None:
        run("read", "--text", "a", "--html", tmp_path / "x", "--parquet", tmp_path / "." / "x").refused("two outputs")

    @pytest.mark.parametrize("column", ["nonsense", "token", "top_ids"])
    def test_colour_that_is_none(self, column: str, run: Run) -> None:
        run("read", "--text", "a", "--colour", column).refused(repr(column), "entropy", "varentropy")

    def test_unknown_room(self, run: Run) -> None:
        run("methods", "--room", "nonsense").refused("nonsense")


# --- what goes wrong later -------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., None]:
    def load(*_: object, **__: object) -> None:
        raise error

    return load


def test_unknown_model(run: Run) -> None:
    run("read", "--text", "a", "--model", "nobody/no-such-model").refused("nobody/no-such-model")


def test_unreachable_server(run: Run) -> None:
    run("read", "--text", "a", "--model", "http://127.0.0.1:9/v1").refused("127.0.0.1:9")


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (nextoken.ModelError("this\nand that"), 2, "this and that"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (PermissionError(13, "Permission denied", "weights"), 2, "weights: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("boom"), 70, "RuntimeError: boom"),
    ],
)
def test_an_error_is_one_line(error: BaseException, code: int, word: str, run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr("nextoken.app._verify.load_quietly", raising(error))
    finished = run("verify", "nano")
    assert finished.code == code and finished.out == ""
    assert word in finished.err and finished.err.count("\n") == 1


@pytest.mark.parametrize("error", [nextoken.ModelError("this"), OSError("that"), RuntimeError("boom")])
def test_debug_lets_the_error_through(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextoken.app._verify.load_quietly", raising(error))
    with pytest.raises(type(error)):
        cli.app(["--debug", "verify", "nano"], prog_name="nextoken")


def test_exit_codes_of_commands_pass(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextoken.app._verify.load_quietly", raising(typer.Exit(5)))
    assert run("verify", "nano").code == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
def test_stdout_on_a_full_disk() -> None:
    for arguments in (["--help"], ["read", "--help"]):
        with open("/dev/full", "w") as full:
            finished = in_a_process(*arguments, stdout=full)
        assert finished.returncode == 2
        assert finished.stderr == "nextoken: cannot write the output: No space left on device\n"


def test_a_reader_that_stops_reading_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    finished = in_a_process("read", "--help", stdout=write_end)
    os.close(write_end)
    assert finished.returncode in (0, 1)
    assert finished.stderr == ""

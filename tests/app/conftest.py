"""The command line, run in this process as a person would run it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from nextoken.app import cli


class Finished(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """Assert exit code 2, nothing on stdout, and one line on stderr that says these things."""
        assert self.code == 2, self
        assert self.out == ""
        assert self.err.startswith("nextoken: ")
        assert self.err.count("\n") == 1 and self.err.endswith("\n")
        for word in words:
            assert word in self.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """`run("read", path, stdin=b"...")` runs `nextoken read path`."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> Finished:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            cli.app([str(argument) for argument in arguments], prog_name="nextoken")
        return Finished(int(end.value.code or 0), *capsys.readouterr())

    return run

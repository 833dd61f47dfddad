"""What a command says and returns when it cannot do what was asked: one line, never a stack trace."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

import typer
from typer.core import TyperGroup

from nextoken.errors import NextokenError

BAD_INPUT = 2
INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C
UNEXPECTED = 70  # EX_SOFTWARE: a defect of ours rather than of the input
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Complaints(TyperGroup):
    """The group of commands: turns what they raise into a line on stderr and an exit code.

    2 for bad input and for what the system refuses, 130 for an interrupt, 70 for a defect. `--debug` before the command
    lets the exception through. A reader of stdout that stops reading (`head`, a pager) is no error.
    """

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        try:
            try:
                return super().main(given, *positional, **options)
            finally:
                sys.stdout.flush()  # while a full disk can still be reported
        except BrokenPipeError:
            _silence_stdout()
            sys.exit(0)
        except Exception as error:
            if "--debug" in takewhile(lambda word: word.startswith("-"), given):
                raise
            message, code = _verdict(error)
            complain(message)
            if isinstance(error, OSError):
                _silence_stdout()
            sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _silence_stdout()
            raise typer.Exit(0) from None


def complain(message: str) -> None:
    """One line on stderr, whatever line breaks the message holds."""
    print(f"nextoken: {' '.join(message.split())}", file=sys.stderr)


def _verdict(error: Exception) -> tuple[str, int]:
    if isinstance(error, NextokenError):
        return str(error), BAD_INPUT
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        where = error.filename or ("cannot write the output" if error.errno in DISK else None)
        return (f"{where}: {reason}" if where else reason), BAD_INPUT
    return f"{type(error).__name__}: {error} (a defect of nextoken; `nextoken --debug ...` shows where)", UNEXPECTED


def _silence_stdout() -> None:
    """Send what is left in the buffer of stdout nowhere, or the interpreter complains of it on its way out."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

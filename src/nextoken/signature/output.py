"""Output files that are complete or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nextoken.errors import OutputError

PARTIAL = ".partial"
"""How the names of unfinished files end; they begin with a dot and the name of the finished file."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the system says against writing into one line.

    Raises:
        OutputError: no such folder, no permission, disk full, ...
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(f"cannot write {target}: {reason}") from error


def begun(target: Path) -> Path:
    """A new empty file beside `target`, to be renamed to it when finished."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
    temporary.touch(exist_ok=False)
    return temporary


@contextmanager
def written(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the name `path` when all is written and is removed if anything fails.

    Raises:
        OutputError: it cannot be written.
    """
    target = Path(path)
    with writing(target):
        temporary = begun(target)
        try:
            with temporary.open("wb") as out:
                yield out
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file in UTF-8.

    Raises:
        OutputError: it cannot be written.
    """
    target = Path(path)
    with writing(target):
        temporary = begun(target)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

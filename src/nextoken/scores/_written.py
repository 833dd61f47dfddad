"""Written: a binary file that is there complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nextoken.signature.output import begun, writing


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

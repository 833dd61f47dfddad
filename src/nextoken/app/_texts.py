"""Texts named on the command line, read and judged before a model is loaded."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nextoken.errors import InputError

MOST_INVALID = 0.1
"""Share of bytes that may be no UTF-8; Latin-1 prose in most European languages stays below it."""


@dataclass(frozen=True)
class Text:
    """A text to read: where it came from and its bytes as they were."""

    name: str
    data: bytes


def gather(files: Sequence[str], given: Sequence[str], *, strict: bool) -> list[Text]:
    """The texts of files (`-` is stdin) and those given as arguments.

    Raises:
        InputError: nothing to read, a file that is missing, a directory, binary or empty, or, when `strict`, one with
            bytes that are no UTF-8.
    """
    if not files and not given:
        raise InputError("nothing to read: name a file, `-` for stdin, or give --text '...'")
    if files.count("-") > 1:
        raise InputError("stdin can be read once only: `-` was given more than once")
    texts = [Text("stdin", sys.stdin.buffer.read()) if name == "-" else Text(name, _bytes_of(name)) for name in files]
    for number, words in enumerate(given, start=1):
        # Bytes of the command line that are no UTF-8 reach Python as surrogates; this gives the bytes back.
        texts.append(Text("text" if len(given) == 1 else f"text {number}", words.encode("utf-8", "surrogateescape")))
    for text in texts:
        _judge(text, strict=strict)
    return texts


def _bytes_of(name: str) -> bytes:
    path = Path(name)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        hint = "; to read the words themselves give --text" if " " in name else ""
        raise InputError(f"no such file: {name}{hint}") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a directory; name the files in it") from None
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None


def _judge(text: Text, *, strict: bool) -> None:
    if not text.data:
        raise InputError(f"{text.name} is empty: there is nothing to predict")
    if text.data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{text.name} looks like UTF-16; convert it first, for example with iconv -f UTF-16 -t UTF-8")
    if b"\0" in text.data:
        raise InputError(f"{text.name} is binary (it holds zero bytes); texts are read as UTF-8")
    invalid, where = _invalid(text.data)
    if invalid > MOST_INVALID * len(text.data):
        raise InputError(f"{text.name} is binary or not UTF-8: {invalid:,} of its {len(text.data):,} bytes are invalid")
    if invalid and strict:
        raise InputError(f"{text.name} has {invalid:,} bytes that are not UTF-8, the first at {where:,} (--strict)")


def _invalid(data: bytes) -> tuple[int, int]:
    """How many bytes are no part of UTF-8, and where the first of them is (-1 if there is none)."""
    escaped = data.decode("utf-8", "surrogateescape")  # each such byte becomes one lone surrogate
    found = [match.start() for match in re.finditer("[\udc80-\udcff]", escaped)]
    return len(found), len(escaped[: found[0]].encode()) if found else -1

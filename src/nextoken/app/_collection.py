"""Collections of texts that a command compares with: files, folders, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nextoken.app._texts import Text, gather
from nextoken.errors import InputError


def collect(places: Sequence[str], *, what: str) -> list[Text]:
    """The texts of these places: a file is one text, a folder its files, and `.jsonl` has one on each line.

    A line of JSON is a text, or an object whose "text" is one. Hidden files of a folder are left out.

    Args:
        what: how messages call these texts, "human texts" for one.

    Raises:
        InputError: a place is missing or without texts, or a line is no such JSON.
    """
    texts: list[Text] = []
    for place in places:
        path = Path(place)
        if path.is_dir():
            files = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
            if not files:
                raise InputError(f"{place} holds no file, so it gives no {what}")
            for file in files:
                texts += _lines(Path(file)) if file.endswith(".jsonl") else gather([file], [], strict=False)
        else:
            texts += _lines(path) if path.suffix == ".jsonl" else gather([place], [], strict=False)
    return texts


def _lines(path: Path) -> list[Text]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: no JSON ({error.msg})") from None
        words = record.get("text") if isinstance(record, dict) else record
        if not isinstance(words, str) or not words:
            raise InputError(f'{path}, line {number}: neither a text nor an object with a "text" that is one')
        texts.append(Text(f"{path}:{number}", words.encode("utf-8", "surrogatepass")))
    if not texts:
        raise InputError(f"{path} has no line with a text")
    return texts

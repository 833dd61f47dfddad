"""Texts on their way in: bytes, names, and what a signature remembers of each."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from nextoken.errors import InputError

Texts: TypeAlias = str | bytes | Iterable[str | bytes]

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Text:
    """A text as it will be read: `data` is valid UTF-8, with U+FFFD where `replaced` invalid bytes stood.

    `prompt` is read before it and not scored.
    """

    name: str
    data: bytes
    replaced: int = 0
    prompt: str = ""

    @property
    def digest(self) -> str:
        """Fingerprint of the bytes and of the prompt, if there is one, 16 hexadecimal digits."""
        before = self.prompt.encode() + b"\0" if self.prompt else b""
        return hashlib.sha256(before + self.data).hexdigest()[:16]


@dataclass(frozen=True)
class TextInfo:
    """What a signature says of one text beside its rows.

    Args:
        name: given by the reader, else `text-<number>`.
        prefix: bytes before the first predicted token: none where a begin token predicted it.
        suffix: bytes after the last token; none but for tokenizers that drop something there.
        size: bytes of the whole text.
        replaced: bytes that were not UTF-8 and were read as U+FFFD.
        n_rows: predicted tokens.
        digest: fingerprint of the bytes read, and of the prompt.
        prompt: what was read before the text and not scored.
    """

    name: str
    prefix: bytes = b""
    suffix: bytes = b""
    size: int = 0
    replaced: int = 0
    n_rows: int = 0
    digest: str = ""
    prompt: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes as base64."""
        return {
            **vars(self),
            "prefix": base64.b64encode(self.prefix).decode(),
            "suffix": base64.b64encode(self.suffix).decode(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TextInfo:
        info = cls(**values)
        return replace(info, prefix=base64.b64decode(values["prefix"]), suffix=base64.b64decode(values["suffix"]))


def incoming(
    texts: Texts,
    names: Iterable[str] | None = None,
    *,
    prompts: str | Iterable[str] | None = None,
    strict: bool = False,
) -> Iterator[Text]:
    """The texts one by one, decoded and named.

    Args:
        texts: one text, or any iterable of them; bytes are taken as UTF-8.
        names: one per text; default `text-0`, `text-1`, ...
        prompts: one per text, read before it; default none.
        strict: refuse what is not UTF-8 instead of replacing it.

    Raises:
        InputError: a text is not UTF-8 and `strict` is set.
        TypeError: something is neither str nor bytes.
        ValueError: there are more or fewer names or prompts than texts.
    """
    source = [texts] if isinstance(texts, str | bytes) else texts
    beside = {"name": _values(source, names, "name"), "prompt": _values(source, prompts, "prompt")}
    number = -1
    for number, text in enumerate(source):
        one = {what: None if rest is None else next(rest, None) for what, rest in beside.items()}
        for what, rest in beside.items():
            if rest is not None and one[what] is None:
                raise ValueError(f"{number} {what}s for more texts: give one {what} per text")
        read = decoded(text, f"text-{number}" if one["name"] is None else str(one["name"]), strict=strict)
        yield replace(read, prompt=str(one["prompt"])) if one["prompt"] else read
    for what, rest in beside.items():
        if rest is not None and next(rest, None) is not None:
            raise ValueError(f"more {what}s than the {number + 1} texts: give one {what} per text")


def _values(source: Iterable[str | bytes], given: str | Iterable[str] | None, what: str) -> Iterator[str] | None:
    """What is given beside the texts, one value each."""
    values = [given] if isinstance(given, str) else given
    if isinstance(values, Sequence) and isinstance(source, Sequence) and len(values) != len(source):
        raise ValueError(f"{len(values)} {what}s for {len(source)} texts: give one {what} per text")
    return None if values is None else iter(values)


def decoded(text: str | bytes, name: str, *, strict: bool = False) -> Text:
    """A text as valid UTF-8, invalid bytes (or unpaired surrogates of a str) replaced by U+FFFD and counted."""
    if isinstance(text, str):
        try:
            return Text(name, text.encode())
        except UnicodeEncodeError as error:
            if strict:
                raise InputError(
                    f"{name}: not valid Unicode, an unpaired surrogate at character {error.start}"
                ) from error
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Text(name, clean.encode(), clean.count(_REPLACEMENT) - text.count(_REPLACEMENT))
    if not isinstance(text, bytes | bytearray | memoryview):
        raise TypeError(f"{name}: a text is str or bytes, got {type(text).__name__}")
    data = bytes(text)
    try:
        data.decode()
        return Text(name, data)
    except UnicodeDecodeError as error:
        if strict:
            raise InputError(
                f"{name}: not UTF-8, byte 0x{data[error.start]:02x} at {error.start}; "
                "convert it, or read it without strict to have such bytes replaced"
            ) from error
    clean = data.decode(errors="replace")
    encoded = clean.encode()
    # One U+FFFD (3 bytes) stands for one or more invalid bytes; those that were in the data already are valid.
    added = clean.count(_REPLACEMENT) - data.count(_REPLACEMENT.encode())
    return Text(name, encoded, len(data) - (len(encoded) - 3 * added))

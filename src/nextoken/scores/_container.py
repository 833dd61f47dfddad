"""The layout of compressed files: a header, then rounds of parts, then a zero."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import BinaryIO

from nextoken.errors import InputError

MAGIC = b"nxtc\x01"


@dataclass(frozen=True)
class Header:
    """What must be known before anything can be decoded.

    Args:
        model: name of the model.
        model_digest: fingerprint of its weights.
        vocab_digest: fingerprint of its vocabulary.
        build: of what computed: versions and kind of machine.
        threads: it computed with.
        context: most tokens seen at once, 0 for no limit.
        overlap: of windows, 0 where there is no limit.
        length: bytes of the original.
        checksum: the first 8 bytes of its sha256, as a number.
    """

    model: str
    model_digest: str
    vocab_digest: str
    build: str
    threads: int
    context: int
    overlap: int
    length: int
    checksum: int

    def write(self, out: BinaryIO) -> None:
        out.write(MAGIC)
        for value in astuple(self):
            data = value.encode()[:255] if isinstance(value, str) else b""
            write_number(out, len(data) if isinstance(value, str) else value)
            out.write(data)

    @classmethod
    def read(cls, source: BinaryIO) -> Header:
        """The header.

        Raises:
            InputError: it is not there, or cut short.
        """
        if source.read(len(MAGIC)) != MAGIC:
            raise InputError("not a file that nextoken compressed (or by another version): it begins otherwise")
        values: list[str | int] = []
        for field in fields(cls):
            number = read_number(source)
            values.append(read_exactly(source, number).decode(errors="replace") if field.type == "str" else number)
        return cls(*values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Part:
    """A stretch of the original, coded by itself.

    Args:
        length: its bytes.
        tokens: how many spell it.
        raws: stretches of raw bytes among them.
        code: the code, always shorter than the stretch; or the stretch itself, if no code was.
    """

    length: int
    tokens: int
    raws: int
    code: bytes

    @property
    def is_stored(self) -> bool:
        return len(self.code) == self.length


def write_round(out: BinaryIO, parts: list[Part]) -> None:
    """Parts that are decoded together; none at the end of a file."""
    write_number(out, len(parts))
    for part in parts:
        for number in (part.length, part.tokens, part.raws, len(part.code)):
            write_number(out, number)
    for part in parts:
        out.write(part.code)


def read_round(source: BinaryIO) -> list[Part]:
    """Raises InputError where the file is cut short."""
    heads = [[read_number(source) for _ in range(4)] for _ in range(read_number(source))]
    if any(tokens > length for length, tokens, _, _ in heads):
        raise InputError("the compressed file is damaged: a part of it has more tokens than bytes")
    return [Part(length, tokens, raws, read_exactly(source, size)) for length, tokens, raws, size in heads]


def write_number(out: BinaryIO, number: int) -> None:
    """7 bits per byte, the least first; the highest bit says that more follow."""
    while number >= 128:
        out.write(bytes([number & 127 | 128]))
        number >>= 7
    out.write(bytes([number]))


def read_number(source: BinaryIO) -> int:
    number = shift = 0
    while True:
        byte = read_exactly(source, 1)[0]
        number |= (byte & 127) << shift
        if byte < 128:
            return number
        shift += 7
        if shift > 63:
            raise InputError("the compressed file is damaged: a number in it has no end")


def read_exactly(source: BinaryIO, size: int) -> bytes:
    data = source.read(size) if size < 1 << 40 else b""
    if len(data) != size:
        raise InputError(f"the compressed file is cut short: {size - len(data)} bytes are missing")
    return data

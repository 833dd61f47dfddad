"""Coder: files compressed by arithmetic coding with a model's next-token probabilities, and got back bit by bit.

code = compress("tiny", data)
assert decompress("tiny", code) == data
compress_file("tiny", "book.txt", "book.nxtc", streams=32)
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nextoken.errors import InputError, ModelError
from nextoken.methods import method
from nextoken.scores._coding import Report, decoded, encoded
from nextoken.scores._container import Header, read_round, write_round
from nextoken.scores._pieces import BREAKS, rounds
from nextoken.signature.output import written
from nextoken.signature.window import checked_overlap

if TYPE_CHECKING:
    from nextoken.model.base import LanguageModel


@dataclass(frozen=True)
class Compressed:
    """What came of a compression.

    Args:
        length: bytes of the original.
        size: bytes of the compressed file.
        tokens: coded.
    """

    length: int
    size: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """8 size / length."""
        return 8 * self.size / self.length if self.length else float("nan")


@method(
    name="LM arithmetic coding",
    arxiv="2309.10668",
    access="gray",
    summary="lossless compression of any file, at the cost of its surprisal under a model",
)
def compress_file(
    model: LanguageModel | str | Path,
    source: str | Path,
    target: str | Path,
    *,
    streams: int = 1,
    overlap: int | None = None,
    part_bytes: int = 1 << 20,
    progress: bool | None = None,
) -> Compressed:
    """Write a file of about -sum_t log2 p(x_t | x_<t) / 8 bytes from which `decompress_file` makes `source` again.

    The sum is that of `nextoken.read` over the same tokens (each part by itself). To it come some 90 bytes of header, 5
    to 15 bytes for each part, and less than V / 2^32 / log 2 bits per token for probabilities in whole counts. Any
    bytes are taken: where the vocabulary cannot spell them they stand raw, at 8 bits each and some more for each
    stretch; a part that would not become smaller is stored.

    Decoding repeats the forward passes of coding one token at a time, and so does coding, for only equal calls give
    equal numbers: it takes as long as generating the text. It works where these calls give the same bits as here: same
    weights, same versions, same kind of machine; the header tells what they were. `streams` parts are coded side by
    side: several times faster. Each part begins without context, which costs the bundled models some ten bytes, and
    more those that gain more from context.

    Args:
        model: a model that gives whole distributions, or what `nextoken.load` takes.
        source: any file.
        target: where to write; it is there complete or not at all.
        streams: parts that are coded at once, as one batch.
        overlap: tokens by which windows overlap where a part is longer than the context; default half of it.
        part_bytes: most bytes of a part; memory is bounded by `streams` of them.
        progress: show a progress bar on stderr; default where it is a terminal.

    Raises:
        InputError: `source` cannot be read.
        OutputError: `target` cannot be written.
        ModelError: the model cannot be loaded, gives no whole distributions, or has no digest to know it by.
        ValueError: an argument is out of range.

    Source: Deletang et al., arXiv:2309.10668.
    """
    settings = _Settings(_loaded(model), streams, overlap, part_bytes)
    path = Path(source)
    try:
        with path.open("rb") as file:
            length, checksum = os.fstat(file.fileno()).st_size, _checksum(file)
            with written(target) as out, _bar(progress, "compressing", length) as report:
                tokens = _compress(settings, file, length, checksum, out, report)
                size = out.tell()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return Compressed(length, size, tokens)


def decompress_file(
    model: LanguageModel | str | Path, source: str | Path, target: str | Path, *, progress: bool | None = None
) -> int:
    """Write the file that `compress_file` was given, complete and checked, or nothing; returns its length.

    Args:
        model: the same that compressed it.
        source: the compressed file.
        target: where to write.
        progress: show a progress bar on stderr; default where it is a terminal.

    Raises:
        InputError: `source` cannot be read, is no such file, is damaged, or comes out otherwise than it went in.
        OutputError: `target` cannot be written.
        ModelError: it was compressed with another model.
    """
    path = Path(source)
    try:
        with path.open("rb") as file:
            header = Header.read(file)
            with written(target) as out, _bar(progress, "decompressing", header.length) as report:
                _decompress(_loaded(model), file, header, out, report)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return header.length


def compress(
    model: LanguageModel | str | Path,
    data: bytes,
    *,
    streams: int = 1,
    overlap: int | None = None,
    part_bytes: int = 1 << 20,
) -> bytes:
    """`compress_file` in memory."""
    settings = _Settings(_loaded(model), streams, overlap, part_bytes)
    source, out = io.BytesIO(data), io.BytesIO()
    _compress(settings, source, len(data), _checksum(source), out, lambda done: None)
    return out.getvalue()


def decompress(model: LanguageModel | str | Path, code: bytes) -> bytes:
    """`decompress_file` in memory."""
    source, out = io.BytesIO(code), io.BytesIO()
    _decompress(_loaded(model), source, Header.read(source), out, lambda done: None)
    return out.getvalue()


@dataclass(frozen=True)
class _Settings:
    model: LanguageModel
    streams: int
    overlap: int | None
    part_bytes: int

    def __post_init__(self) -> None:
        if self.streams < 1 or self.part_bytes < 1:
            raise ValueError(f"streams and part_bytes must be at least 1, got {self.streams} and {self.part_bytes}")
        if self.model.context_length is not None:
            checked_overlap(self.model.context_length, self.overlap)


def _compress(settings: _Settings, source: BinaryIO, length: int, checksum: int, out: BinaryIO, report: Report) -> int:
    import torch

    model, limit = settings.model, settings.model.context_length
    overlap = 0 if limit is None else checked_overlap(limit, settings.overlap)
    Header(
        model=model.name,
        model_digest=model.digest,
        vocab_digest=model.vocab.digest,
        build=_build(),
        threads=torch.get_num_threads(),
        context=limit or 0,
        overlap=overlap,
        length=length,
        checksum=checksum,
    ).write(out)
    # Parts end up to so much earlier, and still there should be no more of them than streams.
    share = -(-length // settings.streams) + BREAKS
    size, tokens = min(settings.part_bytes, share), 0
    for pieces in rounds(source, size, streams=settings.streams):
        parts = encoded(model, pieces, overlap=overlap or None, report=report)
        write_round(out, parts)
        tokens += sum(part.tokens for part in parts)
    write_round(out, [])
    return tokens


def _decompress(model: LanguageModel, source: BinaryIO, header: Header, out: BinaryIO, report: Report) -> None:
    _check(model, header)
    sha = hashlib.sha256()
    with _threads(header.threads):
        while parts := read_round(source):
            try:
                pieces = decoded(model, parts, overlap=header.overlap or None, report=report)
            except InputError as error:
                raise _damaged(header) from error
            for data in pieces:
                sha.update(data)
                out.write(data)
    if int.from_bytes(sha.digest()[:8], "big") != header.checksum:
        raise _damaged(header)


def _loaded(model: LanguageModel | str | Path) -> LanguageModel:
    from nextoken.model.loading import load

    found = load(model)
    if found.is_partial:
        raise ModelError(f"{found.name} tells only its most probable tokens, and coding needs whole distributions")
    if not found.digest:
        raise ModelError(f"{found.name} has no digest by which decoding could know it: load its weights into memory")
    return found


def _check(model: LanguageModel, header: Header) -> None:
    if (model.digest, model.vocab.digest) != (header.model_digest, header.vocab_digest):
        what = "the same weights" if model.vocab.digest == header.vocab_digest else "the same vocabulary"
        raise ModelError(
            f"compressed with {header.model} (digest {header.model_digest}), and {model.name} ({model.digest}) has not "
            f"{what}: decompress with the model that compressed"
        )
    if (model.context_length or 0) != header.context:
        raise ModelError(
            f"compressed with a context of {header.context or 'any'} tokens, and that of {model.name} is "
            f"{model.context_length or 'any'}: set it as it was"
        )


def _damaged(header: Header) -> InputError:
    advice = "the file is damaged, or this machine computes other numbers than that which compressed"
    return InputError(f"the original does not come out: {advice} (there {header.build}; here {_build()})")


def _build() -> str:
    from importlib.metadata import version

    return f"torch {version('torch')}, {platform.machine()}"


def _checksum(source: BinaryIO) -> int:
    sha = hashlib.sha256()
    while block := source.read(1 << 20):
        sha.update(block)
    source.seek(0)
    return int.from_bytes(sha.digest()[:8], "big")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sums over a number of threads are rounded as that number has it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _bar(shown: bool | None, what: str, total: int) -> Iterator[Report]:
    import sys

    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)

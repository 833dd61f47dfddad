"""ShardWriter: a signature written piece by piece into a folder, kept through interruptions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from nextoken.errors import OutputError
from nextoken.model.vocab import Vocab
from nextoken.signature import parquet
from nextoken.signature.blocks import Block
from nextoken.signature.labels import Labels
from nextoken.signature.metadata import Metadata
from nextoken.signature.output import PARTIAL, write_text, writing
from nextoken.signature.shards import RUN, Run, shard_files
from nextoken.signature.texts import Text, TextInfo

LOCK = ".lock"


class ShardWriter:
    """Writes blocks of rows into `part-00000.parquet`, `part-00001.parquet`, ... and goes on where a reading stopped.

    A shard appears under its name only when it is complete, and holds whole texts. What an interrupted reading had not
    finished is read again. To be used in a `with` block.

    Args:
        folder: made if need be.
        metadata: of the reading; that of the shards already there must not disagree.
        names: columns of the rows.
        vocab: names the tokens.
        shard_rows: a shard is finished at the first end of a text after so many rows.

    Raises:
        OutputError: the folder cannot be written, is being written by another process, or holds another reading.
    """

    def __init__(
        self, folder: str | Path, metadata: Metadata, names: Sequence[str], vocab: Vocab, *, shard_rows: int
    ) -> None:
        if shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, got {shard_rows}")
        self.folder = Path(folder)
        self._metadata, self._names, self._vocab, self._shard_rows = metadata, list(names), vocab, shard_rows
        self._lock = ExitStack()
        self._open: _Part | None = None
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(_alone(self.folder))
        try:
            self.done = self._resume()
        except BaseException:
            self._lock.close()
            raise

    def _resume(self) -> tuple[TextInfo, ...]:
        """The texts of the shards already there."""
        if (self.folder / RUN).exists():
            run = Run.of(self.folder)
            difference = run.metadata.disagreement(self._metadata)
            if difference is None and run.columns != self._names:
                difference = f"only one has {', '.join(sorted({*run.columns} ^ {*self._names}))}"
            if difference is not None:
                raise OutputError(
                    f"{self.folder} holds shards of another reading: {difference}; read with the same settings, "
                    "or give another folder"
                )
        elif any(self.folder.glob("*.parquet")):
            raise OutputError(f"{self.folder} holds Parquet files that are not of a reading: give another folder")
        self._tell(is_complete=False)
        for leftover in self.folder.glob(f".part-*{PARTIAL}"):
            leftover.unlink()
        files = shard_files(self.folder)
        self._number = len(files)
        return tuple(text for file in files for text in file.texts)

    def remaining(self, texts: Iterable[Text]) -> Iterator[tuple[int, Text]]:
        """The numbered texts that are in no finished shard.

        Raises:
            OutputError: the first texts are not those of the finished shards.
        """
        count = 0
        for text in texts:
            if count < len(self.done):
                known = self.done[count]
                if (known.name, known.digest) != (text.name, text.digest):
                    raise OutputError(
                        f"{self.folder} has shards of other texts: text {count} is {known.name!r}, {known.size} bytes, "
                        f"there, and {text.name!r} of {len(text.data)} now; give another folder"
                    )
            else:
                yield count, text
            count += 1
        if count < len(self.done):
            raise OutputError(
                f"{self.folder} holds shards of {len(self.done)} texts, and {count} were given: give another folder"
            )

    def add(self, block: Block) -> None:
        """Write the rows of a block.

        Raises:
            OutputError: they cannot be written.
        """
        if self._open is None:
            path = self.folder / f"part-{self._number:05d}.parquet"
            self._open = _Part(path, block.table.schema, len(self.done), self._vocab)
        self._open.add(block)
        if not block.unfinished and self._open.n_rows >= self._shard_rows:
            self._finish()

    def _finish(self) -> None:
        if self._open is not None:
            part, self._open = self._open, None
            part.finish(self._metadata)
            self._number += 1
            self.done = (*self.done, *part.texts)

    def _tell(self, *, is_complete: bool) -> None:
        told = Run(self._metadata, self._names, is_complete).as_dict()
        write_text(self.folder / RUN, json.dumps(told, indent=2) + "\n")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if kind is None:
                self._finish()
                self._tell(is_complete=True)
            elif self._open is not None:
                self._open.abandon()


class _Part:
    """A shard being written."""

    def __init__(self, path: Path, schema: pa.Schema, first_text: int, vocab: Vocab) -> None:
        self.n_rows = 0
        self.texts: list[TextInfo] = []
        self._first_text = first_text
        self._labels = Labels(vocab)
        self._writer = parquet.Writer(path, schema)

    def add(self, block: Block) -> None:
        self._writer.write(block.table)
        self._labels.add(block.table)
        self.texts += block.finished
        self.n_rows += len(block.table)

    def finish(self, metadata: Metadata) -> None:
        self._writer.close(metadata, self.texts, self._labels.as_dict(), first_text=self._first_text)

    def abandon(self) -> None:
        self._writer.abandon()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:
        # Windows has no such lock; a shard's name is still taken by one writer at a time.
        yield
        return
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another reading is writing to {folder}: wait until it is done, or give another folder"
            ) from error
        yield

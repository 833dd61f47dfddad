"""Shards: a signature kept as a folder of Parquet files, of which only what is asked for is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nextoken.errors import InputError
from nextoken.signature import columns
from nextoken.signature.metadata import Metadata
from nextoken.signature.parquet import File
from nextoken.signature.signature import Signature

RUN = "run.json"
"""Says which reading the shards of a folder belong to."""


@dataclass(frozen=True)
class Run:
    """A reading whose rows go to a folder: its metadata, its columns, and whether all its texts are there."""

    metadata: Metadata
    columns: list[str]
    is_complete: bool

    def as_dict(self) -> dict[str, Any]:
        return {"metadata": self.metadata.as_dict(), "columns": self.columns, "is_complete": self.is_complete}

    @classmethod
    def of(cls, folder: Path) -> Run:
        """The run of a folder.

        Raises:
            InputError: there is none.
        """
        try:
            told = json.loads((folder / RUN).read_text(encoding="utf-8"))
            return cls(Metadata(**told["metadata"]), told["columns"], told["is_complete"])
        except OSError as error:
            raise InputError(f"{folder} holds no shards of a signature: it has no {RUN}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{folder / RUN} is damaged: {error}") from error


def shard_files(folder: Path) -> list[File]:
    """The finished shards, in order.

    Raises:
        InputError: one is missing or damaged.
    """
    files = [File(path) for path in sorted(folder.glob("part-*.parquet"))]
    texts = 0
    for number, file in enumerate(files):
        if file.path.name != f"part-{number:05d}.parquet" or file.first_text != texts:
            raise InputError(f"{folder} is damaged: shard part-{number:05d}.parquet is missing or of another reading")
        texts += len(file.texts)
    return files


class ShardedSignature(Signature):
    """The signature in a folder of shards, also of a reading that has not ended yet.

    It is used like any `Signature`. A column is loaded when asked for, a text's rows with their shard; `table` loads
    all, and `shards()` goes through a corpus larger than memory.

    Args:
        folder: what `read(..., shards=folder)` wrote.

    Raises:
        InputError: it holds no signature, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        run = Run.of(self.folder)
        self.metadata = run.metadata
        self.is_complete = run.is_complete
        self._files = shard_files(self.folder)
        self.texts = tuple(text for file in self._files for text in file.texts)
        self._names = run.columns
        self._loaded: tuple[int, pa.Table] | None = None

    @cached_property
    def _schema(self) -> pa.Schema:
        if self._files:
            return self._files[0].schema
        return columns.schema(
            against=self.metadata.against is not None,
            is_partial=self.metadata.is_partial,
            hidden_size=0 if "hidden" in self._names else None,
        )

    @property
    def schema(self) -> pa.Schema:
        return self._schema

    @property
    def table(self) -> pa.Table:
        """All rows as an Arrow table, loaded anew each time."""
        return pa.concat_tables([self.schema.empty_table(), *self._tables()])

    @cached_property
    def _all_labels(self) -> dict[int, str]:
        return {token_id: label for file in self._files for token_id, label in file.labels.items()}

    @property
    def vocab_labels(self) -> dict[int, str]:
        return self._all_labels

    def shards(self) -> Iterator[Signature]:
        """The shards one after the other, each a `Signature` of its texts."""
        for file in self._files:
            yield Signature.from_parquet(file.path)

    def __repr__(self) -> str:
        state = "" if self.is_complete else ", unfinished"
        return f"ShardedSignature({str(self.folder)!r}, {len(self._files)} shards, {self.n_texts} texts{state})"

    def _tables(self) -> Iterator[pa.Table]:
        for file in self._files:
            yield file.read()

    def _column(self, name: str) -> pa.ChunkedArray:
        chunks = [chunk for file in self._files for chunk in file.read([name])[name].chunks]
        return pa.chunked_array(chunks, type=self.schema.field(name).type)

    @cached_property
    def _first_texts(self) -> np.ndarray:
        return np.array([file.first_text for file in self._files])

    def _rows(self, number: int) -> pa.Table:
        part = int(np.searchsorted(self._first_texts, number, side="right")) - 1
        if self._loaded is None or self._loaded[0] != part:
            self._loaded = (part, self._files[part].read())
        begin = self.row_offsets[number] - self.row_offsets[self._first_texts[part]]
        return self._loaded[1].slice(begin, self.texts[number].n_rows)

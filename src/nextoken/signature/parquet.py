"""Signatures as Parquet files: complete or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nextoken.errors import InputError
from nextoken.signature import columns
from nextoken.signature.metadata import Metadata
from nextoken.signature.output import begun, writing
from nextoken.signature.texts import TextInfo

KEY = b"nextoken.signature"
FORMAT = 1


class Writer:
    """A signature written to one file, block by block; what is known only at the end goes into its footer.

    The file appears under its name when `close` has succeeded. After an error nothing is left of it.

    Raises:
        OutputError: it cannot be written; so from `write` and `close`.
    """

    def __init__(self, path: str | Path, schema: pa.Schema) -> None:
        self.path = Path(path)
        floats = [field.name for field in schema if pa.types.is_floating(field.type)]
        with writing(self.path):
            self._temporary = begun(self.path)
        with self._kept_clean():
            self._writer = pq.ParquetWriter(
                self._temporary,
                schema,
                compression="zstd",
                # Ids and bytes repeat; floats do not, and compress better with their bytes apart.
                use_dictionary=["text_id", "token_id", "token"],
                use_byte_stream_split=[*floats, "top_logprobs.list.element"],
                write_statistics=["text_id"],
            )

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        with self._kept_clean():
            self._writer.write_table(table)

    def close(
        self, metadata: Metadata, texts: Sequence[TextInfo], labels: dict[int, str], *, first_text: int = 0
    ) -> None:
        """Finish the file and give it its name."""
        told = {
            "format": FORMAT,
            "metadata": metadata.as_dict(),
            "first_text": first_text,
            "texts": [text.as_dict() for text in texts],
            "labels": {str(token_id): label for token_id, label in labels.items()},
        }
        with self._kept_clean():
            self._writer.add_key_value_metadata({KEY.decode(): json.dumps(told)})
            self._writer.close()
            os.replace(self._temporary, self.path)

    def abandon(self) -> None:
        """Stop, and leave nothing behind."""
        # The disk may be full, which is why it is abandoned: what closing says then is no news.
        with suppress(OSError):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _kept_clean(self) -> Iterator[None]:
        try:
            with writing(self.path):
                yield
        except BaseException:
            if hasattr(self, "_writer"):
                self.abandon()
            self._temporary.unlink(missing_ok=True)
            raise


class File:
    """A signature's file, its footer read.

    Raises:
        InputError: there is no such file, it is not Parquet, or it is not a signature.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._footer = pq.read_metadata(self.path)
        except FileNotFoundError as error:
            raise InputError(f"no such file: {self.path}") from error
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{self.path} is not a Parquet file: {str(error).splitlines()[0]}") from error
        told = (self._footer.metadata or {}).get(KEY)
        if told is None:
            raise InputError(f"{self.path} is a Parquet file but no signature, which nextoken.read(...) would make")
        self._told: dict[str, Any] = json.loads(told)
        if self._told["format"] != FORMAT:
            raise InputError(
                f"{self.path} has format {self._told['format']}, and this version of nextoken reads format {FORMAT}: "
                "upgrade nextoken, or read the texts again"
            )
        self.metadata = Metadata(**self._told["metadata"])
        self.texts = tuple(TextInfo.from_dict(text) for text in self._told["texts"])
        self.first_text: int = self._told["first_text"]

    @property
    def n_rows(self) -> int:
        return int(self._footer.num_rows)

    @property
    def labels(self) -> dict[int, str]:
        return {int(token_id): label for token_id, label in self._told["labels"].items()}

    @property
    def schema(self) -> pa.Schema:
        found = self._footer.schema.to_arrow_schema().remove_metadata()
        try:
            columns.check(found)
        except ValueError as error:
            raise InputError(f"{self.path}: {error}") from error
        return found

    def read(self, names: Sequence[str] | None = None) -> pa.Table:
        """The table, or some of its columns."""
        schema = self.schema
        kept = schema if names is None else pa.schema([schema.field(name) for name in names])
        try:
            found = pq.read_table(self.path, columns=kept.names, partitioning=None)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{self.path} is damaged: {str(error).splitlines()[0]}") from error
        return found.replace_schema_metadata(None).cast(kept)

"""Signature: what a model says about texts, one row per predicted token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nextoken.errors import InputError
from nextoken.signature import columns, parquet
from nextoken.signature.metadata import Metadata
from nextoken.signature.output import write_text
from nextoken.signature.texts import TextInfo

if TYPE_CHECKING:
    import pandas
    import polars

Index = int | slice | Sequence[int] | np.ndarray


class Signature:
    """One row per predicted token of one or more texts; `nextoken.signature.COLUMNS` says what each column holds.

    `len(signature)` counts rows; `signature[i]`, `signature[a:b]` and `signature[[2, 0]]` are the signatures of some of
    its texts. Rows stand in the order of the texts, and text ids count from 0 in every signature.

    Args:
        table: the rows.
        metadata: model, vocabulary and settings they were made with.
        texts: name, size and unpredicted bytes of each text.
        vocab_labels: how each token id that occurs in `token_id` or `top_ids` reads.

    Raises:
        ValueError: columns are missing, unknown or of another type, or the rows do not belong to the texts in order.
    """

    def __init__(
        self, table: pa.Table, metadata: Metadata, texts: Iterable[TextInfo], vocab_labels: Mapping[int, str]
    ) -> None:
        columns.check(table.schema)
        self._table = table
        self.metadata = metadata
        self.texts = tuple(texts)
        self._labels = dict(vocab_labels)
        expected = np.repeat(np.arange(self.n_texts), [text.n_rows for text in self.texts])
        if not np.array_equal(table["text_id"].to_numpy(), expected):
            raise ValueError(
                f"not a signature: text_id should count the {self.n_texts} texts, {len(expected)} rows in their order"
            )

    @property
    def table(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self._table

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self._table.schema

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.schema.names)

    @property
    def vocab_labels(self) -> dict[int, str]:
        """How each token id that occurs in `token_id` or `top_ids` reads."""
        return self._labels

    @property
    def n_texts(self) -> int:
        return len(self.texts)

    @cached_property
    def row_offsets(self) -> np.ndarray:
        """Where the rows of each text begin, and the number of rows at the end [n_texts + 1]."""
        return np.concatenate([[0], np.cumsum([text.n_rows for text in self.texts], dtype=np.int64)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.row_offsets[-1])

    def __repr__(self) -> str:
        return f"Signature({self.metadata.model!r}, {self.n_texts} texts, {len(self)} tokens)"

    def column(self, name: str) -> np.ndarray:
        """A column as numpy: [N], or [N, k] for `top_ids`, `top_logprobs` and `hidden`; what is unknown is NaN.

        Lists of different lengths (partial models) come as an object array of arrays. Numbers are a view of the table
        where that can be: copy them before writing to them.

        Raises:
            KeyError: there is no such column; the message says what to do for one that could have been read.
        """
        self._has(name)
        return columns.numpy(self._column(name))

    def text(self, i: int = 0) -> str:
        """The i-th text, put together from what the signature holds of it."""
        return self.text_bytes(i).decode(errors="replace")

    def text_bytes(self, i: int = 0) -> bytes:
        """The i-th text as bytes: its prefix, its tokens, its suffix."""
        number = self._numbers(i)[0]
        info = self.texts[number]
        tokens: list[bytes] = self._rows(number)["token"].to_pylist()
        return info.prefix + b"".join(tokens) + info.suffix

    def __getitem__(self, key: Index) -> Signature:
        numbers = self._numbers(key)
        if not numbers:
            return self._with(self.schema.empty_table(), [])
        parts = [self._rows(number) for number in numbers]
        texts = [self.texts[number] for number in numbers]
        ids = np.repeat(np.arange(len(texts), dtype=np.int32), [text.n_rows for text in texts])
        return self._with(pa.concat_tables(parts).set_column(0, "text_id", pa.array(ids)), texts)

    @classmethod
    def concat(cls, signatures: Iterable[Signature]) -> Signature:
        """The texts of several signatures in one, numbered anew.

        Raises:
            ValueError: there are none, or they were made by different models or settings, or differ in columns.
        """
        parts = list(signatures)
        if not parts:
            raise ValueError("nothing to concatenate: give at least one signature")
        first = parts[0]
        for number, part in enumerate(parts[1:], start=1):
            difference = first.metadata.disagreement(part.metadata)
            if difference is None and first.columns != part.columns:
                odd = sorted({*first.columns} ^ {*part.columns})
                difference = f"column {', '.join(odd)} is in one only"
            if difference is None and first.table.schema != part.table.schema:
                difference = "hidden states differ in width"
            if difference is not None:
                raise ValueError(f"signatures 0 and {number} do not belong together: {difference}")
        shifts = np.cumsum([0, *(part.n_texts for part in parts[:-1])])
        ids = np.concatenate([part.column("text_id") + shift for part, shift in zip(parts, shifts, strict=True)])
        table = pa.concat_tables([part.table for part in parts])
        labels = {token_id: label for part in parts for token_id, label in part.vocab_labels.items()}
        texts = [text for part in parts for text in part.texts]
        return cls(table.set_column(0, "text_id", pa.array(ids.astype(np.int32))), first.metadata, texts, labels)

    def summary(self) -> dict[str, Any]:
        """Figures of all texts together.

        nats = -sum log p; bits = nats / log 2; bits_per_byte = bits / bytes, where bytes are those of the predicted
        tokens; perplexity = exp(nats / tokens). `mean_...` are means over the tokens, ranks counted from 0; `top1` and
        `top10` are the shares of tokens among the 1 and 10 most probable. With `tokens` = 0 the ratios are NaN, and so
        are sums over tokens that a partial model did not tell (`unknown` of them).
        """
        logprob = self.column("logprob").astype(np.float64)
        size = int((self.column("byte_end") - self.column("byte_start")).sum())
        nats = -float(logprob.sum()) + 0.0
        rank = self.column("rank").astype(np.float64)
        figures: dict[str, Any] = {
            "texts": self.n_texts,
            "tokens": len(self),
            "bytes": size,
            "nats": nats,
            "bits": nats / math.log(2),
            "bits_per_byte": _ratio(nats / math.log(2), size),
            "perplexity": _exp(_ratio(nats, len(self))),
            "mean_entropy": _mean(self.column("entropy")),
            "mean_rank": _mean(rank),
            "top1": _share(rank < 1, rank),
            "top10": _share(rank < 10, rank),
        }
        if self.metadata.is_partial:
            figures["unknown"] = int(np.isnan(logprob).sum())
            figures["mean_entropy_lower"] = _mean(self.column("entropy_lower"))
            figures["mean_entropy_upper"] = _mean(self.column("entropy_upper"))
        if self.metadata.against is not None:
            against = -float(self.column("against_logprob").astype(np.float64).sum()) + 0.0
            figures["against_bits_per_byte"] = _ratio(against / math.log(2), size)
            figures |= {f"mean_{name}": _mean(self.column(name)) for name in columns.AGAINST[:-1]}
        figures["replaced"] = sum(text.replaced for text in self.texts)
        return figures

    def equals(self, other: Signature, *, tolerance: float = 0.0) -> bool:
        """Whether texts, model and settings are the same and numbers differ by no more than tolerance * (1 + |number|).

        NaN equals NaN, unknown equals unknown.
        """
        if self.texts != other.texts or self.columns != other.columns or self.metadata.disagreement(other.metadata):
            return False
        return all(_equal(self.table[name], other.table[name], tolerance) for name in self.columns)

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self.table

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a pandas data frame (needs pandas)."""
        _need("pandas")
        return self.table.to_pandas()

    def to_polars(self) -> polars.DataFrame:
        """The rows as a polars data frame (needs polars)."""
        _need("polars")
        import polars

        return polars.DataFrame(polars.from_arrow(self.table))

    def to_parquet(self, path: str | Path) -> None:
        """Write rows, metadata and texts to one Parquet file, which is there complete or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        writer = parquet.Writer(path, self.schema)
        for table in self._tables():
            writer.write(table)
        writer.close(self.metadata, self.texts, self.vocab_labels)

    @classmethod
    def from_parquet(cls, path: str | Path) -> Signature:
        """The signature in a file, or in the folder of shards that `read(..., shards=folder)` wrote.

        Raises:
            InputError: there is none.
        """
        if Path(path).is_dir():
            from nextoken.signature.shards import ShardedSignature

            return ShardedSignature(path)
        file = parquet.File(path)
        table = file.read()
        if file.first_text:
            ids = pc.subtract(table["text_id"], pa.scalar(file.first_text, pa.int32()))
            table = table.set_column(0, "text_id", ids)
        try:
            return cls(table, file.metadata, file.texts, file.labels)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error

    def to_html(self, path: str | Path | None = None, *, title: str | None = None, colour: str = "logprob") -> str:
        """A self-contained page with the texts coloured by a column, returned and, given a path, written there.

        Raises:
            OutputError: it cannot be written.
        """
        from nextoken.signature import html

        page: str = html.render(self, title=title, colour=colour)
        if path is not None:
            write_text(path, page)
        return page

    def _repr_html_(self) -> str:
        from nextoken.signature import html

        fragment: str = html.render_fragment(self)
        return fragment

    def show(self, *, colour: str = "logprob") -> None:
        """Print the texts to the terminal, coloured by a column."""
        from rich.console import Console

        from nextoken.signature import terminal

        Console().print(terminal.render(self, colour=colour))

    def _has(self, name: str) -> None:
        if name in self.columns:
            return
        advice = f"there are {', '.join(self.columns)}"
        if name == "hidden":
            advice = "read with hidden=True to have it"
        elif name in columns.AGAINST:
            advice = "read with against=<another model of this vocabulary> to have it"
        elif name in columns.BOUNDS:
            advice = "only partial models have it; entropy is exact here"
        raise KeyError(f"no column {name!r}: {advice}")

    def _numbers(self, key: Index) -> list[int]:
        """Text numbers that an index means."""
        if isinstance(key, slice):
            return list(range(self.n_texts))[key]
        wanted = np.atleast_1d(np.asarray(key, dtype=None if len(np.atleast_1d(key)) else np.int64))
        if wanted.dtype == bool and wanted.shape == (self.n_texts,):
            return [int(number) for number in wanted.nonzero()[0]]
        if wanted.ndim != 1 or not np.issubdtype(wanted.dtype, np.integer):
            raise TypeError(f"texts are chosen by number, slice, list of numbers or mask, not by {key!r}")
        for number in wanted.tolist():
            if not -self.n_texts <= number < self.n_texts:
                raise IndexError(f"no text {number} in a signature of {self.n_texts}")
        return [int(number) % self.n_texts for number in wanted]

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._table[name]

    def _tables(self) -> Iterator[pa.Table]:
        """The rows, a bounded number at a time where they are on disk."""
        yield self._table

    def _rows(self, number: int) -> pa.Table:
        begin, end = self.row_offsets[number : number + 2]
        return self._table.slice(begin, end - begin)

    def _with(self, table: pa.Table, texts: Sequence[TextInfo]) -> Signature:
        return Signature(table, self.metadata, texts, self.vocab_labels)


def _need(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ImportError(f"to_{package}() needs {package}: pip install {package}")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf if value > 0 else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else math.nan


def _share(hits: np.ndarray, values: np.ndarray) -> float:
    # A rank that is not known is not among the first; of one that is null nothing else is known.
    return _ratio(int(hits.sum()), len(values))


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray, tolerance: float) -> bool:
    if left.null_count != right.null_count or not left.is_null().equals(right.is_null()):
        return False
    a, b = columns.numpy(left), columns.numpy(right)
    if a.shape != b.shape:
        return False
    if a.dtype == object:
        return all(x == y if isinstance(x, bytes) else _close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return _close(a, b, tolerance)


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True))

"""compare(): two models with different tokenizers on the same bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from nextoken.signature.signature import Signature

_SCHEMA = pa.schema(
    [
        ("text_id", pa.int32()),
        ("byte_start", pa.int64()),
        ("byte_end", pa.int64()),
        ("bytes", pa.binary()),
        ("tokens_a", pa.int32()),
        ("tokens_b", pa.int32()),
        ("nats_a", pa.float64()),
        ("nats_b", pa.float64()),
        ("difference", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Comparison:
    """Two readings of the same bytes, cut into the shortest segments at whose ends both have a token end.

    Columns of `table`, one row per segment: text_id, byte_start, byte_end, bytes, tokens_a, tokens_b, nats_a = -log p
    of its tokens under the first model, nats_b under the second, difference = nats_a - nats_b (positive where the
    second model expected the segment more).

    Args:
        table: the segments.
        models: names of the two models.
        names: names of the texts.
        skipped: bytes at the beginnings of texts that not both models predicted, and are in no segment.
    """

    table: pa.Table
    models: tuple[str, str]
    names: tuple[str, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> np.ndarray:
        """A column as numpy.

        Raises:
            KeyError: there is no such column.
        """
        if name not in self.table.schema.names:
            raise KeyError(f"no column {name!r}: there are {', '.join(self.table.schema.names)}")
        column = self.table[name]
        return np.array([*column.to_pylist(), None], dtype=object)[:-1] if name == "bytes" else column.to_numpy()

    def summary(self) -> dict[str, Any]:
        """Totals over the bytes that both predicted.

        `bits_per_byte_a` and `_b`, their `difference`, and `b_better`, the share of segments that the second model
        expected more.
        """
        size = int((self.column("byte_end") - self.column("byte_start")).sum())
        nats = {side: float(self.column(f"nats_{side}").sum()) for side in "ab"}
        per_byte = {side: total / math.log(2) / size if size else math.nan for side, total in nats.items()}
        return {
            "model_a": self.models[0],
            "model_b": self.models[1],
            "texts": len(self.names),
            "segments": len(self),
            "bytes": size,
            "skipped": self.skipped,
            "tokens_a": int(self.column("tokens_a").sum()),
            "tokens_b": int(self.column("tokens_b").sum()),
            "nats_a": nats["a"],
            "nats_b": nats["b"],
            "bits_per_byte_a": per_byte["a"],
            "bits_per_byte_b": per_byte["b"],
            "difference": per_byte["a"] - per_byte["b"],
            "b_better": float((self.column("difference") > 0).mean()) if len(self) else math.nan,
        }


def compare(a: Signature, b: Signature) -> Comparison:
    """Join two signatures of the same texts by bytes, whatever their tokenizers.

    A byte position is a common boundary if in both readings a token ends there (or the predicted part begins). Between
    two neighbouring common boundaries lies one segment: the finest partition on which both models assign probabilities
    to the same bytes. -log p of a segment is the sum over its tokens; so the segments' totals are those of the texts.

    A model that predicts a text's first token and one that does not are compared from the first common boundary on.

    Raises:
        ValueError: the signatures are of different texts; the message names the first difference.
    """
    _check_same(a, b)
    tables, skipped = [], 0
    for number, info in enumerate(a.texts):
        sides = [_Side.of(signature, number) for signature in (a, b)]
        common = np.intersect1d(sides[0].boundaries, sides[1].boundaries)
        skipped += int(common[0]) if len(common) else info.size
        tables.append(_segments(number, a.text_bytes(number), common, *sides))
    table = pa.concat_tables([_SCHEMA.empty_table(), *tables])
    return Comparison(table, (a.metadata.model, b.metadata.model), tuple(text.name for text in a.texts), skipped)


@dataclass(frozen=True)
class _Side:
    """One model's tokens of one text: `begin` of the predicted part, where its tokens end, and -log p of each."""

    begin: int
    ends: np.ndarray
    nats: np.ndarray

    @classmethod
    def of(cls, signature: Signature, number: int) -> _Side:
        rows = signature[number]
        nats = -rows.column("logprob").astype(np.float64)
        return cls(len(rows.texts[0].prefix), rows.column("byte_end"), nats)

    @property
    def boundaries(self) -> np.ndarray:
        return np.union1d([self.begin], self.ends)

    def cut(self, boundaries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and nats of each segment between neighbouring boundaries."""
        # Tokens that end at or before each boundary; none at the beginning, though tokens without bytes may end there.
        at = np.where(boundaries <= self.begin, 0, np.searchsorted(self.ends, boundaries, side="right"))
        return np.diff(at).astype(np.int32), np.add.reduceat(self.nats[: at[-1]], at[:-1])


def _segments(number: int, data: bytes, common: np.ndarray, a: _Side, b: _Side) -> pa.Table:
    if len(common) < 2:
        return _SCHEMA.empty_table()
    starts, ends = common[:-1], common[1:]
    (tokens_a, nats_a), (tokens_b, nats_b) = a.cut(common), b.cut(common)
    pieces = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    numbers = np.full(len(starts), number, dtype=np.int32)
    with np.errstate(invalid="ignore"):
        # Impossible under both: infinite less infinite is NaN, rightly.
        difference = nats_a - nats_b
    values = [numbers, starts, ends, pieces, tokens_a, tokens_b, nats_a, nats_b, difference]
    arrays = [pa.array(column, type=field.type) for column, field in zip(values, _SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def _check_same(a: Signature, b: Signature) -> None:
    if a.n_texts != b.n_texts:
        raise ValueError(
            f"the signatures are of different texts: {a.n_texts} in the first and {b.n_texts} in the second"
        )
    for number, (left, right) in enumerate(zip(a.texts, b.texts, strict=True)):
        if left.digest == right.digest and left.size == right.size:
            continue
        one, other = a.text_bytes(number), b.text_bytes(number)
        at = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
        raise ValueError(
            f"the signatures are of different texts: text {number} ({left.name!r}) differs at byte {at}, "
            f"{one[at : at + 12]!r} in the first and {other[at : at + 12]!r} in the second"
        )

"""Features: what a trained classifier looks at, computed from signatures once and kept on disk.

features = los_features(signature)
features.save("train.features")
Features.load("train.features")[:100]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nextoken.errors import InputError
from nextoken.signature.metadata import Metadata
from nextoken.signature.output import written
from nextoken.signature.signature import Index, Signature

_FORMAT = 1


@dataclass(frozen=True)
class Source:
    """Which model and vocabulary features are of: a classifier takes no others.

    Args:
        kind: of the features, such as `los`.
        model, model_digest, tokenizer_digest, vocab_size, dtype: as in the metadata of the signature.
    """

    kind: str
    model: str
    model_digest: str
    tokenizer_digest: str
    vocab_size: int
    dtype: str

    @classmethod
    def of(cls, kind: str, metadata: Metadata) -> Source:
        told = ("model", "model_digest", "tokenizer_digest", "vocab_size", "dtype")
        return cls(kind, *(getattr(metadata, name) for name in told))

    def disagreement(self, other: Source) -> str | None:
        """The first thing in which the two differ, as one line; None if there is none.

        Models of different names and one digest are the same; those without a digest go by name.
        """
        told = bool(self.model_digest and other.model_digest)
        names = ("kind", "model_digest" if told else "model", "tokenizer_digest", "vocab_size", "dtype")
        for name in names:
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                return f"{name} is {mine!r} in one and {others!r} in the other"
        return None


@dataclass(frozen=True, eq=False)
class Features:
    """Arrays of one row per token, N rows of T texts, with what they were computed from.

    `len(features)` counts texts, and `features[3:8]`, `features[[2, 0]]` and `features[mask]` are those of some texts,
    so that tools which split items, scikit-learn's among them, take them as they are.

    Args:
        values: arrays [N, ...] by name.
        offsets: where the rows of each text begin, and N [T + 1].
        source: model and vocabulary.
        length: most rows that a text was allowed, the rest left out.

    Raises:
        ValueError: the arrays do not have one number of rows, or not that of the offsets.
    """

    values: Mapping[str, np.ndarray]
    offsets: np.ndarray
    source: Source
    length: int

    def __post_init__(self) -> None:
        rows = {name: len(array) for name, array in self.values.items()}
        if not rows or {*rows.values()} != {int(self.offsets[-1])}:
            raise ValueError(f"features need arrays of {int(self.offsets[-1])} rows, got {rows}")

    @property
    def counts(self) -> np.ndarray:
        """Rows of each text [T]."""
        counts: np.ndarray = np.diff(self.offsets)
        return counts

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, key: Index) -> Features:
        chosen = np.atleast_1d(np.arange(len(self))[key])
        counts = self.counts[chosen]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][chosen] - offsets[:-1], counts)
        return Features({name: array[rows] for name, array in self.values.items()}, offsets, self.source, self.length)

    @classmethod
    def concat(cls, parts: Sequence[Features]) -> Features:
        """The texts of several in one.

        Raises:
            ValueError: there are none, or they are of different models, kinds or sizes.
        """
        if not parts:
            raise ValueError("nothing to concatenate: give at least one set of features")
        first = parts[0]
        for number, part in enumerate(parts):
            difference = first.source.disagreement(part.source)
            shapes = [{name: array.shape[1:] for name, array in one.values.items()} for one in (first, part)]
            if difference is None and (first.length != part.length or shapes[0] != shapes[1]):
                difference = f"{shapes[0]} of {first.length} rows at most, and {shapes[1]} of {part.length}"
            if difference is not None:
                raise ValueError(f"features 0 and {number} do not belong together: {difference}")
        counts = np.concatenate([part.counts for part in parts])
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in first.values}
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(values, offsets, first.source, first.length)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the source as JSON in its header; it is there complete or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        from safetensors.numpy import save

        about = {"format": _FORMAT, "source": asdict(self.source), "length": self.length}
        arrays = {f"values.{name}": np.ascontiguousarray(array) for name, array in self.values.items()}
        arrays["offsets"] = np.ascontiguousarray(self.offsets)
        with written(path) as out:
            out.write(save(arrays, metadata={"features": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """What `save` wrote.

        Raises:
            InputError: there is none.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                about: dict[str, Any] = json.loads(file.metadata()["features"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            offsets = found.pop("offsets")
            values = {name.removeprefix("values."): array for name, array in found.items()}
            return cls(values, offsets, Source(**about["source"]), int(about["length"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"no features in {path}: {error}; give a file that save() wrote") from error


def first_rows(signature: Signature, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the first `length` rows of each text [N], and where those of each text begin, and N [T + 1].

    Raises:
        ValueError: length is less than 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    begins = signature.row_offsets
    counts = np.minimum(np.diff(begins), length)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.arange(offsets[-1]) + np.repeat(begins[:-1] - offsets[:-1], counts)
    return rows, offsets

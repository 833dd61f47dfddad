"""The figures of a reading, as lines for a person and as a record for a program."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nextoken.signature import Comparison, Signature


MOST_DIFFERENT = 10
"""Segments shown of a comparison."""


def as_record(
    signature: Signature, beside: Signature | None = None, comparison: Comparison | None = None
) -> dict[str, Any]:
    """Model, settings and the summary of each text and of all together.

    A second model's reading stands under `compare`, what the two say of the bytes both predicted under `comparison`.
    What is not known or not defined is None, never NaN: the record is for JSON.
    """
    record: dict[str, Any] = {
        **signature.metadata.as_dict(),
        "texts": [{"name": text.name, **_figures(signature[i])} for i, text in enumerate(signature.texts)],
        "total": _figures(signature),
    }
    if beside is not None:
        record["compare"] = as_record(beside)
    if comparison is not None:
        record["comparison"] = _finite(comparison.summary())
    return record


def lines(signature: Signature, beside: Signature | None = None) -> list[str]:
    """A line for each text, a line for all if there are several, in columns that align.

    With a second model's reading each text has a line for either model; their bits per byte compare, for both are of
    the same bytes, whatever the tokenizers.
    """
    readings = [signature] if beside is None else [signature, beside]
    rows = [
        [text.name, *([reading.metadata.model] if beside is not None else []), *_cells(reading[i])]
        for i, text in enumerate(signature.texts)
        for reading in readings
    ]
    if signature.n_texts > 1:
        rows += [["total", *([r.metadata.model] if beside is not None else []), *_cells(r)] for r in readings]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = 1 if beside is None else 2
    return [
        "  ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def segment_lines(comparison: Comparison) -> list[str]:
    """What two models with different tokenizers say of the bytes both predicted, and where they differ most."""
    figures, table = comparison.summary(), comparison.table
    first, second = comparison.models
    heading = [
        f"on the {figures['bytes']:,} bytes both predicted: "
        f"{first} {_shown(figures['bits_per_byte_a'], '.3f')}, {second} {_shown(figures['bits_per_byte_b'], '.3f')} "
        f"bits/byte; {second} expected {_shown(figures['b_better'], '.0%')} of {figures['segments']:,} segments more"
    ]
    difference = np.nan_to_num(np.abs(comparison.column("difference")))
    rows = [
        (repr(row["bytes"].decode(errors="backslashreplace")), row)
        for row in table.take(np.argsort(-difference, kind="stable")[:MOST_DIFFERENT]).to_pylist()
    ]
    width = max((len(segment) for segment, _ in rows), default=0)
    return heading + [
        f"  {segment.ljust(width)}  {first} {row['nats_a']:7.2f} nats  {second} {row['nats_b']:7.2f} nats"
        for segment, row in rows
    ]


def _cells(signature: Signature) -> list[str]:
    figures = signature.summary()
    cells = [
        f"{figures['tokens']:,} tokens",
        f"{figures['bytes']:,} bytes",
        f"{_shown(figures['bits_per_byte'], '.3f')} bits/byte",
        f"perplexity {_shown(figures['perplexity'], ',.4g')}",
    ]
    if signature.metadata.is_partial:
        bounds = (_shown(figures[f"mean_entropy_{side}"], ".2f") for side in ("lower", "upper"))
        cells.append(f"entropy {' to '.join(bounds)} nats")
    else:
        cells.append(f"entropy {_shown(figures['mean_entropy'], '.2f')} nats")
    if signature.metadata.against is not None:
        cells += [
            f"{signature.metadata.against} {_shown(figures['against_bits_per_byte'], '.3f')} bits/byte",
            f"KL {_shown(figures['mean_kl'], '.3f')} nats",
            f"JS {_shown(figures['mean_js'], '.3f')} nats",
        ]
    return cells


def _shown(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "unknown" if math.isnan(value) else "infinite"


def _figures(signature: Signature) -> dict[str, Any]:
    return _finite({name: value for name, value in signature.summary().items() if name != "texts"})


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }

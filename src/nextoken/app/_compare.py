"""`nextoken compare`: which of several models expects texts best, by how much, and where."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextoken.app._loading import load_quietly
from nextoken.app._texts import gather
from nextoken.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nextoken.scores.quality import Interval
    from nextoken.signature import Comparison, Signature


def compare(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Text files in UTF-8; `-` is stdin.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", metavar="TEXT", help="A text itself; may be repeated.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Name, id or folder; two or more. The first is the measure."
        ),
    ] = None,
    most: Annotated[
        int, typer.Option("--most", min=0, metavar="N", help="Places shown at which the models differ most.")
    ] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse texts with bytes that are not UTF-8.")] = False,
) -> None:
    """Compare models on the same texts, whatever their tokenizers, in bits per byte.

    Each model after the first has what it is better by, with a 95 % interval: a paired bootstrap over stretches of 500
    bytes. Then the places at which they differ most.

    Examples:

        nextoken compare essay.txt --model tiny --model nano
        nextoken compare book.txt -m ./base -m ./finetuned -m gpt2 --json
    """
    texts = gather(files or [], text or [], strict=strict)
    wanted = model or ["tiny", "nano"]
    if len(wanted) < 2:
        raise InputError("one model has nothing to be compared with: give --model twice or more")
    import nextoken

    progress = False if as_json else None
    data, names = [one.data for one in texts], [one.name for one in texts]
    readings = [nextoken.read(load_quietly(name), data, names=names, progress=progress) for name in wanted]
    pairs = [_pair(readings[0], reading) for reading in readings[1:]]
    if as_json:
        record = {
            "models": [_figures(reading) for reading in readings],
            "pairs": [_record(*pair, most=most) for pair in pairs],
        }
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))
        return
    _print(readings, pairs, most=most)


def _pair(first: Signature, second: Signature) -> tuple[Comparison, Interval]:
    from nextoken.scores.paired import paired_difference
    from nextoken.signature import compare as join

    comparison = join(first, second)
    try:
        return comparison, paired_difference(comparison)
    except ValueError as error:
        raise InputError(str(error)) from error


def _figures(reading: Signature) -> dict[str, Any]:
    summary = reading.summary()
    names = ("tokens", "bytes", "bits_per_byte", "perplexity", "mean_entropy")
    return {"model": reading.metadata.model, **{name: _number(summary.get(name)) for name in names}}


def _record(comparison: Comparison, interval: Interval, *, most: int) -> dict[str, Any]:
    return {
        **{name: _number(value) for name, value in comparison.summary().items()},
        "low": _number(interval.low),
        "high": _number(interval.high),
        "level": interval.level,
        "most_different": [
            {
                "text": comparison.names[row["text_id"]],
                "byte_start": row["byte_start"],
                "segment": row["bytes"].decode(errors="backslashreplace"),
                "nats_a": _number(row["nats_a"]),
                "nats_b": _number(row["nats_b"]),
            }
            for row in _most_different(comparison, most)
        ],
    }


def _most_different(comparison: Comparison, most: int) -> list[dict[str, Any]]:
    import numpy as np

    size = np.nan_to_num(np.abs(comparison.column("difference")))
    rows: list[dict[str, Any]] = comparison.table.take(np.argsort(-size, kind="stable")[:most]).to_pylist()
    return rows


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(readings: Sequence[Signature], pairs: Sequence[tuple[Comparison, Interval]], *, most: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("tokens", "bits/byte", "perplexity", "entropy", "better by, bits/byte"):
        table.add_column(heading, justify="right")
    for number, reading in enumerate(readings):
        summary = reading.summary()
        beside = "" if number == 0 else _difference(pairs[number - 1][1])
        entropy = summary.get("mean_entropy", math.nan)
        table.add_row(
            escape(reading.metadata.model),
            f"{summary['tokens']:,}",
            f"{summary['bits_per_byte']:.3f}",
            f"{summary['perplexity']:,.4g}",
            "-" if math.isnan(entropy) else f"{entropy:.2f} nats",
            escape(beside),
        )
    console.print(table)
    for comparison, _ in pairs if most else []:
        first, second = comparison.models
        console.print()
        places = Table(box=None, pad_edge=False, title=None)
        places.add_column("where they differ most", overflow="fold")
        for name in (first, second):
            places.add_column(escape(name), justify="right")
        for row in _most_different(comparison, most):
            segment = repr(row["bytes"].decode(errors="backslashreplace"))
            where = "" if len(comparison.names) == 1 else f"{comparison.names[row['text_id']]}, "
            places.add_row(
                f"{escape(segment)}  [dim]{escape(where)}byte {row['byte_start']:,}[/dim]",
                f"{row['nats_a']:.2f} nats",
                f"{row['nats_b']:.2f} nats",
            )
        console.print(places)


def _difference(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.value:+.3f} [text too short]"
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"

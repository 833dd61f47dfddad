"""`nextoken score`: verdicts on texts, many from one reading."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nextoken.app._complaints import complain
from nextoken.app._loading import load_quietly
from nextoken.app._read import check_outputs
from nextoken.app._texts import gather
from nextoken.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from nextoken.scores import Score

BESIDE = 4
"""Texts whose scores stand beside each other; more come one after the other."""


def score(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Text files in UTF-8; `-` is stdin.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", metavar="TEXT", help="A text itself; may be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="Bundled name, Hugging Face id or folder.")
    ] = "tiny",
    scores: Annotated[
        str,
        typer.Option("--scores", "-s", metavar="NAMES", help="Names with commas between, or `all` that can be had."),
    ] = "all",
    reference: Annotated[
        str | None,
        typer.Option("--reference", "-r", metavar="MODEL", help="A second model, for scores that compare two."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="List the scores, what each needs and which way it points.")
    ] = False,
    parquet: Annotated[Path | None, typer.Option("--parquet", metavar="FILE", help="Write a row per text.")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a page to look at, complete in one file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON, and nothing else.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse texts with bytes that are not UTF-8.")] = False,
) -> None:
    """Score texts: how uncertain, how machine-like, how well known they are to a model.

    Each text is read once, and every score is computed from that reading.

    Examples:

        nextoken score essay.txt
        nextoken score a.txt b.txt --scores perplexity,min_k_plus_plus,fast_detectgpt
        nextoken score essay.txt --reference nano --scores binoculars --json
        nextoken score corpus/*.txt --parquet scores.parquet --report scores.html
        nextoken score --list
    """
    if show:
        _list(as_json=as_json)
        return
    texts = gather(files or [], text or [], strict=strict)
    check_outputs(parquet, report)
    chosen = _chosen(scores)
    reader = load_quietly(model)
    other = None if reference is None else load_quietly(reference)

    import nextoken
    from nextoken.scores import MissingInput, find, table

    against = other if other is not None and other.vocab.digest == reader.vocab.digest else None
    data, names = [one.data for one in texts], [one.name for one in texts]
    progress = False if as_json else None
    signature = nextoken.read(reader, data, names=names, against=against, progress=progress)
    try:
        # What compares distributions is in the first reading; a second one is for scores of the other model's own.
        wanted = chosen == "all" or any("reference" in find(name).needs for name in chosen)
        beside = nextoken.read(other, data, names=names, progress=progress) if other is not None and wanted else None
        found = table(signature, chosen, reference=beside)
    except MissingInput as error:
        advice = "" if reference is not None else "; a second model is named with --reference"
        raise InputError(f"{error}{advice}") from error
    except ValueError as error:  # a name that is unknown, or of a score per token
        raise InputError(str(error)) from error
    if parquet is not None:
        _write(parquet, names, found)
    if report is not None:
        from nextoken.scores.report import report as page
        from nextoken.signature.output import written

        with written(report) as file:
            file.write(page(signature, found).encode())
    if as_json:
        typer.echo(json.dumps(_records(names, found), indent=2, ensure_ascii=False, allow_nan=False))
        return
    _print(names, found)
    for output in (parquet, report):
        if output is not None:
            complain(f"wrote {output}")


def _chosen(names: str) -> list[str] | Literal["all"]:
    if names == "all":
        return "all"
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError("--scores names no score: give names with commas between, or all")
    return wanted


def _records(names: Sequence[str], found: Mapping[str, np.ndarray]) -> list[dict[str, object]]:
    """One record per text; what is not a number is null."""
    return [
        {"text": name} | {score: _number(values[i]) for score, values in found.items()} for i, name in enumerate(names)
    ]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _write(path: Path, names: Sequence[str], found: Mapping[str, np.ndarray]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nextoken.signature.output import written

    with written(path) as file:
        pq.write_table(pa.table({"text": list(names), **found}), file)


def _print(names: Sequence[str], found: Mapping[str, np.ndarray]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from nextoken.scores import find

    console = Console(highlight=False)
    for begin in range(0, len(names), BESIDE):
        shown = names[begin : begin + BESIDE]
        table = Table(box=None, pad_edge=False)
        table.add_column("score")
        for name in shown:
            table.add_column(escape(name), justify="right", overflow="fold")
        table.add_column("high means", style="dim")
        for score, values in found.items():
            cells = [f"{value:.4g}" if not math.isnan(value) else "-" for value in values[begin : begin + BESIDE]]
            table.add_row(score, *cells, find(score).high)
        console.print(table)


def _list(*, as_json: bool) -> None:
    from nextoken.scores import all_scores

    entries = list(all_scores().values())
    if as_json:
        typer.echo(json.dumps([_described(entry) for entry in entries], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("score", "high means", "needs", "what it is"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        table.add_row(entry.name, entry.high, ", ".join(_needs(entry)) or "-", entry.summary)
    Console(highlight=False).print(table)


def _described(entry: Score) -> dict[str, object]:
    return {
        "name": entry.name,
        "per": entry.per,
        "high": entry.high,
        "needs": _needs(entry),
        "arxiv": entry.arxiv,
        "summary": entry.summary,
    }


def _needs(entry: Score) -> list[str]:
    """What a score needs beside one reading with one model."""
    from nextoken.scores.score import REQUIRED
    from nextoken.signature.columns import AGAINST

    two = ["reference"] if {*entry.columns} & {*AGAINST} else []
    required = [name for name, default in entry.options.items() if default is REQUIRED]
    return list(dict.fromkeys([*two, *entry.needs, *required]))

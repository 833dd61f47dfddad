"""What `detect` and `membership` share: scores of suspected texts beside those of texts that are known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from nextoken.app._collection import collect
from nextoken.app._loading import load_quietly
from nextoken.app._texts import Text, gather
from nextoken.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from nextoken.model.base import LanguageModel
    from nextoken.scores.score import High
    from nextoken.signature import Signature

BESIDE = 4
"""Suspected texts that stand beside each other; more come one after the other."""
FEW = 100
"""Known innocents below which a false-alarm rate of 1 % cannot be read off."""


@dataclass(frozen=True)
class Suspicion:
    """One question put to texts.

    Args:
        high: what a high score speaks for.
        asked: the question, after "whether".
        innocent, guilty: how the two kinds of known texts are called.
    """

    high: High
    asked: str
    innocent: str
    guilty: str


@dataclass(frozen=True)
class Panel:
    """Scores by name: of the suspected texts, of known innocents and of known culprits (either may be empty)."""

    names: tuple[str, ...]
    suspected: Mapping[str, np.ndarray]
    innocent: Mapping[str, np.ndarray]
    guilty: Mapping[str, np.ndarray]

    def alarms(self, score: str) -> np.ndarray:
        """(1 + innocents with at least this score) / (1 + innocents), for each suspected text; NaN without innocents.

        Were the text one more innocent, this number would be at most a with probability at most a: a p-value.
        """
        import numpy as np

        values, known = self.suspected[score], self.innocent.get(score, np.empty(0))
        known = known[~np.isnan(known)]
        if not len(known):
            return np.full(len(values), np.nan)
        above = (known[None] >= values[:, None]).sum(1)
        return np.where(np.isnan(values), np.nan, (1 + above) / (1 + len(known)))


def examine(
    suspicion: Suspicion,
    files: Sequence[str],
    given: Sequence[str],
    *,
    model: str,
    reference: str | None,
    scores: str,
    innocent: Sequence[str],
    guilty: Sequence[str],
    tokens: int | None,
    as_json: bool,
) -> None:
    """Read the texts and those known, and print scores, false-alarm rates and, with both kinds known, how good each is.

    Raises:
        InputError: nothing to do, a score that is unknown or answers another question, or needs what is not given.
    """
    suspects = gather(files, given, strict=False) if files or given or not (innocent and guilty) else []
    known = collect(innocent, what=suspicion.innocent), collect(guilty, what=suspicion.guilty)
    names = _names(scores, suspicion)
    reader = load_quietly(model)
    other = None if reference is None else load_quietly(reference)
    texts = [_cut(text, reader, tokens) for group in (suspects, *known) for text in group]
    found = _scored(reader, other, texts, names, suspicion, quiet=as_json)
    begin, end = len(suspects), len(suspects) + len(known[0])
    panel = Panel(
        tuple(text.name for text in suspects),
        {name: values[:begin] for name, values in found.items()},
        {name: values[begin:end] for name, values in found.items()},
        {name: values[end:] for name, values in found.items()},
    )
    powers = _powers(panel) if known[0] and known[1] else {}
    if as_json:
        typer.echo(json.dumps(_record(panel, powers), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(panel, powers, suspicion)


def _names(scores: str, suspicion: Suspicion) -> list[str] | None:
    """The scores asked for; None for all that answer the question."""
    if scores == "all":
        return None
    from nextoken.scores import find

    wanted = [name.strip() for name in scores.split(",") if name.strip()]
    if not wanted:
        raise InputError("--scores names no score: give names with commas between, or all")
    try:
        entries = [find(name) for name in wanted]
    except ValueError as error:
        raise InputError(str(error)) from error
    wrong = [entry.name for entry in entries if entry.high != suspicion.high or entry.per != "text"]
    if wrong:
        raise InputError(f"{', '.join(wrong)} does not tell whether {suspicion.asked}; `nextoken score` computes it")
    return wanted


def _cut(text: Text, model: LanguageModel, tokens: int | None) -> Text:
    """The text up to its first `tokens` tokens."""
    if tokens is None:
        return text
    ends = model.vocab.encode(text.data.decode(errors="replace")).ends
    if len(ends) < tokens:
        raise InputError(f"{text.name} has {len(ends)} tokens, fewer than --tokens {tokens}: lower it, or leave it out")
    return Text(text.name, text.data.decode(errors="replace").encode()[: ends[tokens - 1]])


def _scored(
    model: LanguageModel,
    other: LanguageModel | None,
    texts: Sequence[Text],
    names: list[str] | None,
    suspicion: Suspicion,
    *,
    quiet: bool,
) -> dict[str, np.ndarray]:
    import nextoken
    from nextoken.scores import Given, MissingInput, all_scores, find, table

    against = other if other is not None and other.vocab.digest == model.vocab.digest else None
    data = [text.data for text in texts]
    progress = False if quiet else None
    signature: Signature = nextoken.read(model, data, against=against, progress=progress)
    answering = [entry for entry in all_scores().values() if entry.high == suspicion.high and entry.per == "text"]
    # What compares distributions is in the first reading; a second one is for scores of the other model's own.
    wanted = any("reference" in entry.needs for entry in (answering if names is None else map(find, names)))
    beside = nextoken.read(other, data, progress=progress) if other is not None and wanted else None
    if names is None:
        given = Given(signature, beside)
        names = [entry.name for entry in answering if not entry.missing(given)]
    try:
        return table(signature, names, reference=beside)
    except MissingInput as error:
        advice = "" if other is not None else "; a second model is named with --reference"
        raise InputError(f"{error}{advice}") from error


def _powers(panel: Panel) -> dict[str, dict[str, Any]]:
    """How well each score tells the known texts apart."""
    import numpy as np

    from nextoken.scores.quality import auroc, bootstrap, tpr_at_fpr

    powers: dict[str, dict[str, Any]] = {}
    for name in panel.suspected:
        innocent, guilty = panel.innocent[name], panel.guilty[name]
        values = np.concatenate([innocent, guilty])
        kinds = np.repeat([0, 1], [len(innocent), len(guilty)])
        kept = ~np.isnan(values)
        if len(set(kinds[kept].tolist())) < 2:
            continue
        powers[name] = {
            label: bootstrap(measure, values[kept], kinds[kept])
            for label, measure in (
                ("auroc", auroc),
                ("tpr_at_1", partial(tpr_at_fpr, fpr=0.01)),
                ("tpr_at_5", partial(tpr_at_fpr, fpr=0.05)),
            )
        }
    return powers


def _record(panel: Panel, powers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rates = {name: panel.alarms(name) for name in panel.suspected}
    return {
        "texts": [
            {
                "text": name,
                "scores": {score: _number(values[i]) for score, values in panel.suspected.items()},
                "p_values": {score: _number(values[i]) for score, values in rates.items()},
            }
            for i, name in enumerate(panel.names)
        ],
        "known": {
            "innocent": len(next(iter(panel.innocent.values()), [])),
            "guilty": len(next(iter(panel.guilty.values()), [])),
        },
        "power": {
            score: {
                label: {"value": _number(found.value), "low": _number(found.low), "high": _number(found.high)}
                for label, found in measures.items()
            }
            for score, measures in powers.items()
        },
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _print(panel: Panel, powers: Mapping[str, Mapping[str, Any]], suspicion: Suspicion) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    count = len(next(iter(panel.innocent.values()), []))
    if powers:
        table = Table(box=None, pad_edge=False)
        table.add_column("score", overflow="fold")
        for heading in ("AUROC", "found at 1 % false alarms", "at 5 %"):
            table.add_column(heading, justify="right")
        for score, measures in sorted(powers.items(), key=lambda item: -item[1]["auroc"].value):
            found = measures["auroc"]
            table.add_row(
                score,
                f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]",
                f"{measures['tpr_at_1'].value:.0%}",
                f"{measures['tpr_at_5'].value:.0%}",
            )
        console.print(table)
        if panel.names:
            console.print()
    for begin in range(0, len(panel.names), BESIDE):
        shown = panel.names[begin : begin + BESIDE]
        table = Table(box=None, pad_edge=False)
        table.add_column("score", overflow="fold")
        for name in shown:
            table.add_column(escape(name), justify="right", overflow="fold")
            if count:
                table.add_column("p", justify="right", style="dim")
        for score, values in panel.suspected.items():
            rates = panel.alarms(score)
            cells = []
            for i in range(begin, begin + len(shown)):
                cells.append("-" if math.isnan(values[i]) else f"{values[i]:.4g}")
                if count:
                    cells.append("-" if math.isnan(rates[i]) else f"{rates[i]:.3f}")
            table.add_row(score, *cells)
        console.print(table)
    if count:
        note = f"p: share of {count} known {suspicion.innocent} that score as high, the text itself counted in"
        if count < FEW:
            note += f"; with {count} of them no p is below {1 / (1 + count):.2g}"
    else:
        note = (
            f"High speaks for a {suspicion.high}, but none of these numbers has a scale of its own: "
            f"name known {suspicion.innocent} to compare with"
        )
    console.print(f"[dim]{escape(note)}[/dim]", soft_wrap=True)

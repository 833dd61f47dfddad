"""Report: the scores of some texts as one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from nextoken.scores.score import Score, find
from nextoken.signature.html import render_fragment
from nextoken.signature.signature import Signature

SHADED_FROM = 3
"""Texts from which on a score's values are shaded by their place among each other."""
SHOWN = 20
"""Texts shown token by token; each takes some 100 kB."""
_MEANINGS = {
    "uncertain": "How uncertain: high means the model was unsure",
    "certain": "How certain: high means the model was sure",
    "surprising": "How surprising: high means the model did not expect it",
    "machine": "Written by a machine? High speaks for a machine",
    "human": "Written by a machine? High speaks for a person",
    "member": "Seen in training? High speaks for a member",
    "compressible": "How compressible: high means few bits will do",
}


def report(signature: Signature, scores: Mapping[str, np.ndarray], *, title: str | None = None) -> str:
    """A self-contained page: a table of scores by what they tell, then each text in the colours of its surprisal.

    A score has no scale of its own, so a cell is shaded by the place of its text among the texts of the page, from the
    third on. The page runs no script of its own and loads nothing; the texts are frames as in a notebook.

    Args:
        signature: of the texts.
        scores: name -> number per text [T], from `nextoken.scores.table`.
        title: default the name of the text, or how many there are.

    Raises:
        ValueError: a score is not registered, or has not one number per text.
    """
    count = signature.n_texts
    for name, values in scores.items():
        if np.shape(values) != (count,):
            raise ValueError(f"score {name!r} has {np.shape(values)}, not one number per text: ({count},)")
    entries = [find(name) for name in scores]
    groups = [
        (meaning, [_row(entry, scores[entry.name]) for entry in entries if entry.high == high])
        for high, meaning in _MEANINGS.items()
        if any(entry.high == high for entry in entries)
    ]
    names = [text.name for text in signature.texts]
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=title or (names[0] if count == 1 else f"{count} texts"),
            model=signature.metadata.model,
            against=signature.metadata.against,
            tokens=len(signature),
            names=names,
            groups=groups,
            shaded=count >= SHADED_FROM,
            texts=[
                (name, render_fragment(signature[number]) if signature.texts[number].n_rows else None)
                for number, name in enumerate(names[:SHOWN])
            ],
            left_out=max(0, count - SHOWN),
        )
    )


def _row(entry: Score, values: np.ndarray) -> dict[str, object]:
    """A line of the table: name, what it is, and per text the number as read and its place from 0 to 1."""
    known = np.isfinite(values)
    places = np.full(len(values), np.nan)
    if known.sum() >= SHADED_FROM:
        order = values[known]
        below = (order[:, None] > order[None]).sum(1) + (order[:, None] == order[None]).sum(1) / 2 - 0.5
        places[known] = below / (len(order) - 1)
    cells = [
        (_shown(value), None if math.isnan(place) else round(float(place), 3))
        for value, place in zip(values, places, strict=True)
    ]
    return {"name": entry.name, "summary": entry.summary, "arxiv": entry.arxiv, "cells": cells}


def _shown(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("nextoken.scores", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

"""HTML: a signature as one page that needs nothing else, and as a fragment for notebooks."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined

from nextoken.signature import ramp
from nextoken.signature.columns import COLUMNS
from nextoken.signature.scale import BINS, check_colour, colourable, scale
from nextoken.signature.spelling import spelled

if TYPE_CHECKING:
    from nextoken.signature.signature import Signature

_SCRIPTS = ("columns.js", "words.js", "text.js", "plot.js", "card.js", "page.js")
"""In the order in which they need each other."""
_UNKNOWN = "(unknown)"
"""Label of a token of which a server told the probability but not which it is."""
_LIMIT = 400_000
"""Tokens of a page: about 100 MB, which browsers still open."""


def render(
    signature: Signature, *, title: str | None = None, colour: str = "logprob", text_id: int | None = None
) -> str:
    """A self-contained page: no network, no other files, light and dark.

    Shows each token in the colour of a column, which the reader may change; its distribution on hover, focus or click;
    surprisal and entropy along the text; the figures of `Signature.summary` for each text. Numbers are those of the
    table, in float32.

    Args:
        title: default the name of the text, or how many there are.
        colour: the column that colours the tokens at first.
        text_id: the text shown at first; default the first that has rows.

    Raises:
        ValueError: `colour` is no numeric column of this signature; there are too many tokens for a page.
        IndexError: there is no text `text_id`.
    """
    return _page(signature, title=title, colour=colour, text_id=text_id, compact=False, left_out=0)


def render_fragment(
    signature: Signature, *, colour: str = "logprob", max_rows: int = 2_000, height: int | None = None
) -> str:
    """The page in small, for a notebook's cell: a sandboxed frame, so that neither disturbs the other.

    Args:
        colour: the column that colours the tokens at first.
        max_rows: most tokens shown; whole texts are left out, or the only text cut, beyond that, and the page says so.
        height: of the frame in pixels; default by the length of the text.
    """
    shown, left_out = _head(signature, max_rows)
    page = _page(shown, title=None, colour=colour, text_id=None, compact=True, left_out=left_out)
    if height is None:
        longest = max((text.size for text in shown.texts), default=0)
        height = min(620, 330 + 30 * (1 + longest // 90))
    frame = _environment().from_string(
        '<iframe class="nextoken" title="{{ name }}" sandbox="allow-scripts" loading="lazy" srcdoc="{{ page }}" '
        'style="width:100%;height:{{ height }}px;border:0;border-radius:10px;color-scheme:normal"></iframe>'
    )
    return frame.render(name=f"Signature of {signature.n_texts} texts", page=page, height=height)


def _page(
    signature: Signature, *, title: str | None, colour: str, text_id: int | None, compact: bool, left_out: int
) -> str:
    check_colour(signature, colour)
    if len(signature) > _LIMIT:
        raise ValueError(
            f"a page holds at most {_LIMIT:,} tokens and this signature has {len(signature):,}: "
            "choose some of its texts, signature[:10].to_html(...)"
        )
    if text_id is None:
        text_id = next((number for number, text in enumerate(signature.texts) if text.n_rows), 0)
    elif not 0 <= text_id < signature.n_texts:
        raise IndexError(f"no text {text_id} in a signature of {signature.n_texts}")
    if title is None:
        title = signature.texts[0].name if signature.n_texts == 1 else f"{signature.n_texts} texts"
    style = _source("page.css") + _colours()
    script = "\n".join(_source(name) for name in _SCRIPTS)
    told = {
        **_told(signature),
        "title": title,
        "colour": colour,
        "first_text": text_id,
        "compact": compact,
        "left_out": left_out,
    }
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=title,
            model=signature.metadata.model,
            compact=compact,
            style=style,
            script=script,
            style_digest=_digest(style),
            script_digest=_digest(script),
            data=_json(told),
        )
    )


def _told(signature: Signature) -> dict[str, Any]:
    """What the page's script is given: names and figures as JSON, columns as base64 of little-endian numbers."""
    table = signature.table
    labels = sorted(signature.vocab_labels)
    texts = []
    for number, info in enumerate(signature.texts):
        texts.append(
            {
                "name": info.name,
                "begin": int(signature.row_offsets[number]),
                "end": int(signature.row_offsets[number + 1]),
                "prefix": info.prefix.decode(errors="backslashreplace"),
                "suffix": info.suffix.decode(errors="backslashreplace"),
                "replaced": info.replaced,
                "figures": _finite(signature[number].summary()),
            }
        )
    tokens = table["token"].to_pylist()
    shown = [piece for a, b in pairwise(signature.row_offsets) for piece in spelled(tokens[a:b])]
    pieces = {piece: number for number, piece in enumerate(dict.fromkeys(shown))}
    top = _one(table["top_ids"])
    top_ids = np.asarray(pc.fill_null(top.flatten(), -1))
    sizes = np.asarray(pc.fill_null(pc.list_value_length(top), 0))
    begins = signature.column("byte_start")
    columns = {}
    for name in colourable(signature):
        values = signature.column(name)
        columns[name] = {
            "about": COLUMNS[name],
            "scale": _finite(vars(scale(name, values))),
            "data": _numbers(values, np.float32),
        }
    return {
        "metadata": signature.metadata.as_dict(),
        "bins": BINS,
        "rows": len(signature),
        "texts": texts,
        "figures": _finite(signature.summary()),
        "columns": columns,
        "labels": [*(signature.vocab_labels[token_id] for token_id in labels), _UNKNOWN],
        "pieces": [piece.text for piece in pieces],
        "broken": [number for number, piece in enumerate(pieces) if not piece.is_whole],
        "piece": _numbers(np.array([pieces[piece] for piece in shown]), np.uint32),
        "token_id": _numbers(signature.column("token_id"), np.int32),
        "label": _numbers(np.searchsorted(labels, signature.column("token_id")), np.uint32),
        "position": _numbers(signature.column("position"), np.int32),
        "byte_start": _numbers(begins, np.float64),
        "byte_size": _numbers(signature.column("byte_end") - begins, np.uint32),
        "top_begin": _numbers(np.concatenate([[0], sizes.cumsum()]), np.uint32),
        "top_label": _numbers(np.where(top_ids < 0, len(labels), np.searchsorted(labels, top_ids)), np.uint32),
        "top_logprob": _numbers(np.asarray(_one(table["top_logprobs"]).flatten()), np.float32),
    }


def _head(signature: Signature, max_rows: int) -> tuple[Signature, int]:
    """The first texts that fit, the first one cut if it does not, and how many tokens are left out."""
    if len(signature) <= max_rows:
        return signature, 0
    fitting = int(np.searchsorted(signature.row_offsets, max_rows, side="right")) - 1
    if fitting and signature.row_offsets[fitting]:
        shown = signature[:fitting]
        return shown, len(signature) - len(shown)
    from dataclasses import replace

    first = next(number for number, text in enumerate(signature.texts) if text.n_rows)
    info = replace(signature.texts[first], n_rows=max_rows, suffix=b"")
    table = signature[first].table.slice(0, max_rows)
    shown = type(signature)(table, signature.metadata, [info], signature.vocab_labels)
    return shown, len(signature) - max_rows


def _one(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _numbers(values: np.ndarray, kind: type[np.generic]) -> str:
    little = np.dtype(kind).newbyteorder("<")
    return base64.b64encode(np.ascontiguousarray(values, dtype=little).tobytes()).decode()


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which has neither NaN nor infinity: the first is null, the second a word."""
    return {
        name: value
        if not isinstance(value, float) or math.isfinite(value)
        else None
        if math.isnan(value)
        else str(value)
        for name, value in figures.items()
    }


def _json(told: dict[str, Any]) -> str:
    """JSON that may stand within <script>: no markup can end or comment it."""
    text = json.dumps(told, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("nextoken.signature", "templates"), autoescape=True, undefined=StrictUndefined
    )


@cache
def _source(name: str) -> str:
    return (files("nextoken.signature") / "templates" / name).read_text(encoding="utf-8")


@cache
def _colours() -> str:
    """CSS of the ramps: class b<i> for bin i, within .diverging or not, within either theme."""
    rules = []
    for theme, plain, diverging in (
        ("light", ramp.LIGHT, ramp.LIGHT_DIVERGING),
        ("dark", ramp.DARK, ramp.DARK_DIVERGING),
    ):
        for scope, colours, clear in (("", plain, 0), (" .diverging", diverging, BINS // 2)):
            for number, (ground, ink) in enumerate(zip(colours.colours, colours.inks, strict=True)):
                if number != clear:
                    rules.append(f"[data-theme={theme}]{scope} .b{number}{{background:{ground};color:{ink}}}")
                else:
                    rules.append(f"[data-theme={theme}]{scope} .b{number}{{background:none;color:inherit}}")
    return "\n".join(rules)


def _digest(source: str) -> str:
    """For the page's content security policy: only these very styles and scripts may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()

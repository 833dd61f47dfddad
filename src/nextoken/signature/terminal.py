"""The terminal's view of a signature: texts in colour, or a table of their most surprising tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

from nextoken.signature import ramp
from nextoken.signature.scale import BINS, check_colour, scale
from nextoken.signature.spelling import spelled

if TYPE_CHECKING:
    from nextoken.signature.signature import Signature

# Everything a terminal could obey, or that has no shape: C0 and C1 controls, and what reorders or hides its neighbours.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNKNOWN = Style(dim=True, italic=True)
_MARK = Style(dim=True)


def render(
    signature: Signature,
    *,
    colour: str = "logprob",
    text_id: int | None = None,
    width: int | None = None,
    legend: bool = True,
    summary: bool = True,
    max_rows: int | None = None,
) -> RenderableType:
    """The texts with each token on the colour of a column, for `rich.print`.

    Colours are of one middling lightness, so they stand out on light and on dark terminals: weak ones colour the ink,
    strong ones the ground, and tokens at the scale's clear end keep the terminal's own. Where there are no colours
    (NO_COLOR is set, or the output is a file or a pipe) a table of the most surprising tokens stands in. Control
    characters of the text are shown, never sent.

    Args:
        colour: a numeric column.
        text_id: the one text to show; default all.
        width: columns to use; default the console's.
        legend: end with the scale.
        summary: end each text with a line of its figures.
        max_rows: most tokens of each text; the rest is counted.

    Raises:
        ValueError: `colour` is no numeric column of this signature.
        IndexError: there is no text `text_id`.
    """
    check_colour(signature, colour)
    shown = signature if text_id is None else signature[text_id]
    return _View(shown, colour=colour, width=width, legend=legend, summary=summary, max_rows=max_rows)


def most_surprising(signature: Signature, n: int = 10) -> Table:
    """A table of the n tokens of least logprob, least first: where they stand, after what, and what was expected."""
    logprob = signature.column("logprob").astype(np.float64)
    order = np.argsort(np.where(np.isnan(logprob), np.inf, logprob), kind="stable")
    chosen = [int(row) for row in order[:n] if not math.isnan(logprob[row])]
    table = Table(box=None, pad_edge=False, header_style="bold")
    if signature.n_texts > 1:
        table.add_column("text", overflow="fold")
    table.add_column("position", justify="right")
    table.add_column("after", justify="right", overflow="fold")
    table.add_column("token", style="bold", overflow="fold")
    table.add_column("logprob", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("entropy", justify="right")
    table.add_column("expected", overflow="fold")
    rows = signature.table.take(chosen).to_pylist()
    for row, values in zip(chosen, rows, strict=True):
        begin = int(signature.row_offsets[values["text_id"]])
        before = b"".join(signature.table["token"].slice(max(begin, row - 6), row - max(begin, row - 6)).to_pylist())
        expected = ""
        if values["top_ids"]:
            first = values["top_ids"][0]
            label = "unknown" if first is None else _marked(signature.vocab_labels[first])
            expected = f"{label} {math.exp(values['top_logprobs'][0]):.1%}"
        cells = [
            f"{values['position']:,}",
            _visible(before.decode(errors="ignore").replace("\n", " "))[-20:],
            _marked(signature.vocab_labels[values["token_id"]]),
            _written(values["logprob"], ".2f"),
            _written(values["rank"], ","),
            _entropy(values),
            expected,
        ]
        named = [_visible(signature.texts[values["text_id"]].name)] if signature.n_texts > 1 else []
        table.add_row(*(Text(cell) for cell in [*named, *cells]))
    return table


def tinted(text: str, column: str | None = None, value: float | None = None) -> Text:
    """A piece of text on the colour that `value` has in `column`, if given; control characters are made visible."""
    if column is None:
        return Text(_visible(text))
    ruler = scale(column, np.array([]))
    place = ruler.bins(np.array([math.nan if value is None else value]))
    return Text(_visible(text), style=_styles(diverging=ruler.diverging)[int(place[0])])


class _View:
    """What `render` returns: it is only when it is drawn that the console tells whether it has colours."""

    def __init__(
        self,
        signature: Signature,
        *,
        colour: str,
        width: int | None,
        legend: bool,
        summary: bool,
        max_rows: int | None,
    ) -> None:
        self.signature = signature
        self.colour = colour
        self.width = width
        self.legend = legend
        self.summary = summary
        self.max_rows = max_rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.width is not None:
            options = options.update(width=min(self.width, options.max_width))
        coloured = console.color_system is not None and not console.no_color
        for part in self._coloured() if coloured else self._plain():
            yield from console.render(part, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(20, options.max_width), min(self.width or options.max_width, options.max_width))

    def _plain(self) -> Iterator[RenderableType]:
        count = 20 if self.max_rows is None else min(20, self.max_rows)
        for number in range(self.signature.n_texts):
            one = self.signature[number]
            if self.signature.n_texts > 1:
                yield Text(_visible(one.texts[0].name), style="bold")
            yield most_surprising(one, count)
            if self.summary:
                yield _figures(one)

    def _coloured(self) -> Iterator[RenderableType]:
        values = self.signature.column(self.colour)
        ruler = scale(self.colour, values)
        styles = _styles(diverging=ruler.diverging)
        for number in range(self.signature.n_texts):
            one = self.signature[number]
            if self.signature.n_texts > 1:
                yield Text(_visible(one.texts[0].name), style="bold underline")
            yield _text(one, [styles[place] for place in ruler.bins(one.column(self.colour)).tolist()], self.max_rows)
            if self.summary:
                yield _figures(one)
        if self.legend:
            strip = Text(f"{self.colour} ")
            strip.append(f"{ruler.low:,.4g} ")
            for number in range(0, BINS, 2):
                strip.append("▪", style=styles[number])
            strip.append(f" {ruler.high:,.4g}{' ' + ruler.unit if ruler.unit else ''}")
            if np.isnan(values).any():
                strip.append("  unknown", style=_UNKNOWN)
            yield strip


def _styles(*, diverging: bool) -> dict[int, Style]:
    """The style of each bin: none near the clear place, then coloured ink, then a coloured ground; -1 is unknown."""
    grounds = ramp.TERMINAL_DIVERGING if diverging else ramp.TERMINAL
    inks = ramp.TERMINAL_DIVERGING_INK if diverging else ramp.TERMINAL_INK
    clear = BINS // 2 if diverging else 0
    styles = {-1: _UNKNOWN}
    for number in range(BINS):
        strength = abs(number - clear) / (BINS - 1 - clear)
        if strength < 0.16:
            styles[number] = Style.null()
        elif strength < 0.45:
            styles[number] = Style(color=inks.colours[number])
        else:
            styles[number] = Style(color=grounds.inks[number], bgcolor=grounds.colours[number])
    return styles


def _text(one: Signature, styles: list[Style], max_rows: int | None) -> Text:
    """One text, each token in its style; line breaks break."""
    rows = len(one) if max_rows is None else min(max_rows, len(one))
    shown = Text(overflow="fold")
    info = one.texts[0]
    if info.prefix:
        shown.append(_visible(info.prefix.decode(errors="backslashreplace")), style=_MARK)
    tokens = one.table["token"].slice(0, rows).to_pylist()
    for piece, style in zip(spelled(tokens), styles, strict=False):
        if not piece.text or piece.text.isspace():
            marked = (piece.text or "·").replace(" ", "·").replace("\n", "⏎\n")
            shown.append(_visible(marked), style=style + _MARK)
        else:
            shown.append(_visible(piece.text), style=style)
    if rows < len(one):
        shown.append(f" … {len(one) - rows:,} tokens more", style=_MARK)
    shown.end = "" if shown.plain.endswith("\n") else "\n"
    return shown


def _figures(one: Signature) -> Text:
    """A line of a text's figures."""
    figures = one.summary()
    parts = [
        f"{figures['tokens']:,} tokens",
        f"{_written(figures['bits_per_byte'], '.3f')} bits/byte",
        f"perplexity {_written(figures['perplexity'], ',.4g')}",
    ]
    if one.metadata.is_partial:
        bounds = (_written(figures[f"mean_entropy_{side}"], ".2f") for side in ("lower", "upper"))
        parts.append(f"mean entropy {' to '.join(bounds)} nats, by the {one.metadata.top} most probable alone")
    else:
        parts.append(f"mean entropy {_written(figures['mean_entropy'], '.2f')} nats")
    parts.append(f"top-1 {_written(figures['top1'], '.1%')}")
    return Text(" · ".join([_visible(one.metadata.model), *parts]), style=_MARK)


def _entropy(values: dict[str, Any]) -> str:
    if values["entropy"] is None and values.get("entropy_upper") is not None:
        return f"{values['entropy_lower']:.2f} to {values['entropy_upper']:.2f}"
    return _written(values["entropy"], ".2f")


def _written(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return "unknown"
    return format(value, form) if math.isfinite(value) else "∞" if value > 0 else "-∞"


def _visible(text: str) -> str:
    """A text that a terminal can only show: line breaks stay, tabs are blanks, other controls are spelled out."""
    return _HIDDEN.sub(_spelt, text)


def _marked(label: str) -> str:
    """A token on its own, its blanks visible."""
    return _visible(label.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣"))


def _spelt(found: re.Match[str]) -> str:
    character = found.group()
    if character == "\n":
        return character
    if character == "\t":
        return "    "
    if character == "\r":
        return "\\r"
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

"""The terminal's view: colours where there are some, a table where there are none, and no control of the text's own."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.style import Style

import nextoken
from nextoken.model.table import TableModel
from nextoken.signature import Signature, ramp, terminal
from nextoken.signature.scale import SCALES
from signature import specimens

SGR = re.compile(r"\x1b\[[0-9;]*m")
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printed(renderable: object, *, coloured: bool = True, width: int = 100, **environment: str) -> str:
    file = io.StringIO()
    Console(
        file=file,
        force_terminal=coloured,
        color_system="truecolor" if coloured else None,
        width=width,
        _environ=environment,
    ).print(renderable)
    return file.getvalue()


@pytest.fixture(scope="module")
def prose() -> Signature:
    return specimens.prose(120)


@pytest.fixture(scope="module")
def hostile() -> Signature:
    return specimens.hostile()


def test_every_token_has_the_style_of_its_bin(prose: Signature) -> None:
    view = terminal.render(prose, colour="logprob", legend=False, summary=False)
    # Segments rather than escape codes: rich keeps a style's codes from the first console that drew it in this process.
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=100, _environ={})
    drawn = [segment for segment in console.render(view) if not segment.control]
    plain = "".join(segment.text for segment in drawn)
    styles = [segment.style or Style.null() for segment in drawn for _ in segment.text]
    bins = SCALES["logprob"].bins(prose.column("logprob"))
    at = 0
    for token, number in zip(prose.table["token"].to_pylist(), bins.tolist(), strict=True):
        text = token.decode()
        shown = text.replace("\n", "⏎\n") if text.isspace() else text
        shown = shown.replace(" ", "·") if text.isspace() else shown
        visible = shown.rstrip("\n")
        at = plain.index(visible, at)
        style = styles[at]
        ground = style.bgcolor.triplet.hex if style.bgcolor else None
        if number / 32 >= 0.45:
            assert ground == ramp.TERMINAL.colours[number]
            assert style.color and style.color.triplet.hex == ramp.TERMINAL.inks[number]
        else:
            assert ground is None
            assert (style.color is not None) == (number / 32 >= 0.16)
        at += len(visible)


def test_the_text_is_all_there(prose: Signature) -> None:
    drawn = SGR.sub("", printed(terminal.render(prose, legend=False, summary=False), width=400))
    lines = [line.replace("·", " ").replace("⏎", "").rstrip() for line in drawn.splitlines()]
    assert lines == [line.rstrip() for line in prose.text().removesuffix("\n").split("\n")]


def test_nothing_of_the_text_controls_the_terminal(hostile: Signature) -> None:
    views = [
        terminal.render(hostile),
        terminal.render(hostile, colour="kl", text_id=0),
        terminal.most_surprising(hostile),
    ]
    for view in views:
        for coloured in (True, False):
            left = SGR.sub("", printed(view, coloured=coloured))
            assert not UNSAFE.search(left.replace("\n", ""))
    # The very sequence that the text holds is shown, and its escape character never sent.
    assert "\x1b[31m" not in printed(views[0])
    assert "\\x1b[31m" in SGR.sub("", printed(views[0], width=1000))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=6, unique=True))
def test_no_text_controls_the_terminal(symbols: list[str]) -> None:
    symbols = [symbol for symbol in symbols if symbol.isprintable() or symbol.encode("utf-8", "ignore")]
    if not symbols:
        return
    model = TableModel.random(symbols, order=0, seed=1)
    signature = nextoken.read(model, "".join(symbols), names=["".join(symbols)], top=2, progress=False)
    for view in (terminal.render(signature), terminal.most_surprising(signature)):
        assert not UNSAFE.search(SGR.sub("", printed(view)).replace("\n", ""))


def test_without_colours_a_table_of_the_most_surprising_stands_in(prose: Signature) -> None:
    plain = printed(terminal.render(prose), coloured=False)
    assert "\x1b" not in plain
    assert "expected" in plain and "bits/byte" in plain
    no_colour = printed(terminal.render(prose), NO_COLOR="1")
    assert "expected" in no_colour
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", no_colour)


def test_the_table_lists_the_least_probable_first(prose: Signature) -> None:
    table = terminal.most_surprising(prose, 7)
    rows = np.argsort(prose.column("logprob"), kind="stable")[:7]
    cells = {column.header: [cell.plain for cell in column.cells] for column in table.columns}
    assert cells["position"] == [str(row) for row in rows]
    assert cells["logprob"] == [f"{prose.column('logprob')[row]:.2f}" for row in rows]
    assert cells["rank"] == [str(prose.column("rank")[row]) for row in rows]
    assert cells["entropy"] == [f"{prose.column('entropy')[row]:.2f}" for row in rows]
    for row, token, expected in zip(rows, cells["token"], cells["expected"], strict=True):
        assert token == prose.table["token"][int(row)].as_py().decode().replace("\n", "⏎").replace(" ", "␣")
        label, share = expected.rsplit(" ", 1)
        assert label.replace("␣", " ").replace("⏎", "\n") == prose.vocab_labels[prose.column("top_ids")[row][0]]
        assert share == f"{np.exp(prose.column('top_logprobs')[row][0]):.1%}"


def test_max_rows_counts_the_rest(prose: Signature) -> None:
    drawn = SGR.sub("", printed(terminal.render(prose, max_rows=10)))
    assert f"{len(prose) - 10} tokens more" in drawn
    assert "tokens more" not in SGR.sub("", printed(terminal.render(prose)))


def test_the_width_is_kept(prose: Signature) -> None:
    for coloured in (True, False):
        lines = SGR.sub("", printed(terminal.render(prose, width=60), coloured=coloured, width=200)).splitlines()
        assert max(map(len, lines)) <= 60


def test_all_texts_or_one(hostile: Signature) -> None:
    assert SGR.sub("", printed(terminal.render(hostile))).count("bits/byte") == 2
    assert SGR.sub("", printed(terminal.render(hostile, text_id=1))).count("bits/byte") == 1
    with pytest.raises(IndexError):
        terminal.render(hostile, text_id=2)


def test_characters_spread_over_tokens_are_whole() -> None:
    drawn = SGR.sub("", printed(terminal.render(specimens.characters(), legend=False, summary=False)))
    # A dot stands for each token that is a space or the rest of a character.
    assert drawn == "né··好···好··⏎\n"


def test_unknown_numbers_are_said_to_be_unknown() -> None:
    signature = specimens.partial()
    drawn = SGR.sub("", printed(terminal.render(signature), width=200))
    assert "by the 2 most probable alone" in drawn
    assert "unknown" in drawn
    figures = signature[0].summary()
    assert f"{figures['mean_entropy_lower']:.2f} to {figures['mean_entropy_upper']:.2f}" in drawn


@pytest.mark.parametrize("colour", ["token", "top_ids", "hidden", "nonsense"])
def test_what_is_no_number_cannot_colour(prose: Signature, colour: str) -> None:
    with pytest.raises(ValueError, match="columns to colour by are logprob, rank"):
        terminal.render(prose, colour=colour)

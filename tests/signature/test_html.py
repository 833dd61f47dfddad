"""The source of the page: what it holds, and that nothing in a text can leave its place."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nextoken.signature import Signature, html, ramp
from nextoken.signature.scale import BINS, SCALES, Scale, colourable, scale
from nextoken.signature.spelling import spelled
from signature import specimens


class Outline(HTMLParser):
    """Tags of a page, the text of each script, and every attribute that could load or run something."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.active: list[str] = []
        self.policy = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")
        self.active += [name for name, _ in attributes if name in ("src", "href", "srcset") or name.startswith("on")]
        if ("http-equiv", "Content-Security-Policy") in attributes:
            self.policy = dict(attributes)["content"] or ""

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append("/" + tag)


@pytest.fixture(scope="module")
def hostile() -> Signature:
    return specimens.hostile()


def told(source: str) -> dict:
    return json.loads(Outline(source).scripts[0])


def numbers(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def test_the_page_holds_the_table(hostile: Signature) -> None:
    data = told(html.render(hostile))
    for name in colourable(hostile):
        assert np.array_equal(
            numbers(data["columns"][name]["data"], "<f4"), hostile.column(name).astype(np.float32), equal_nan=True
        ), name
    assert np.array_equal(numbers(data["token_id"], "<i4"), hostile.column("token_id"))
    begins = numbers(data["top_begin"], "<u4")
    label, logprob = numbers(data["top_label"], "<u4"), numbers(data["top_logprob"], "<f4")
    own = numbers(data["label"], "<u4")
    for row, values in enumerate(hostile.table.to_pylist()):
        mine = slice(begins[row], begins[row + 1])
        assert [data["labels"][i] for i in label[mine]] == [hostile.vocab_labels[i] for i in values["top_ids"]]
        assert logprob[mine].tolist() == values["top_logprobs"]
        assert data["labels"][own[row]] == hostile.vocab_labels[values["token_id"]]
    pieces = numbers(data["piece"], "<u4")
    for number, text in enumerate(data["texts"]):
        assert "".join(data["pieces"][i] for i in pieces[text["begin"] : text["end"]]) == hostile.text(number)
        for name, figure in hostile[number].summary().items():
            assert text["figures"][name] == figure or (figure != figure and text["figures"][name] is None)


def test_nothing_leaves_its_place(hostile: Signature) -> None:
    source = html.render(hostile, title=specimens.HOSTILE + "<b>'\"")
    outline = Outline(source)
    assert outline.tags.count("script") == outline.tags.count("/script") == 2
    assert outline.active == []
    assert not {"img", "b", "iframe", "link", "object", "form"} & set(outline.tags)
    assert "http://" not in source and "https://" not in source
    # No byte that markup is made of is left in the data.
    assert not set("<>&\u2028\u2029") & set(outline.scripts[0])


def test_only_the_pages_own_script_and_style_may_run(hostile: Signature) -> None:
    import hashlib

    source = html.render(hostile)
    outline = Outline(source)
    digest = base64.b64encode(hashlib.sha256(outline.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in outline.policy
    style = re.search(r"<style>(.*?)</style>", source, re.S)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in outline.policy
    assert outline.policy.startswith("default-src 'none'")
    assert "unsafe" not in outline.policy


def test_a_fragment_is_one_sandboxed_frame(hostile: Signature) -> None:
    outline = Outline(html.render_fragment(hostile))
    assert [tag for tag in outline.tags if not tag.startswith("/")] == ["iframe"]
    inner = re.search(r'srcdoc="([^"]*)"', html.render_fragment(hostile))
    assert inner is not None and "<" not in inner[1]
    assert hostile._repr_html_().startswith("<iframe")


def test_a_fragment_keeps_whole_texts_or_the_beginning_of_the_first() -> None:
    hostile = specimens.hostile()
    first = hostile.texts[0].n_rows
    shown, left_out = html._head(hostile, first + 2)
    assert (shown.n_texts, len(shown), left_out) == (1, first, len(hostile) - first)
    shown, left_out = html._head(hostile, 4)
    assert (shown.n_texts, len(shown), left_out) == (1, 4, len(hostile) - 4)
    assert shown.table.equals(hostile.table.slice(0, 4))
    assert html._head(hostile, len(hostile)) == (hostile, 0)


def test_numbers_that_json_lacks_are_told(hostile: Signature) -> None:
    figures = html._finite({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1, "e": 2.5})
    assert figures == {"a": None, "b": "inf", "c": "-inf", "d": 1, "e": 2.5}
    data = told(html.render(specimens.partial()))
    assert data["texts"][0]["figures"]["bits_per_byte"] is None


@pytest.mark.parametrize("colour", ["token", "text_id", "top_ids", "hidden", "nonsense"])
def test_what_is_no_number_cannot_colour(hostile: Signature, colour: str) -> None:
    with pytest.raises(ValueError, match=f"{colour}.*columns to colour by are logprob, rank"):
        html.render(hostile, colour=colour)


def test_a_text_that_is_not_there(hostile: Signature) -> None:
    with pytest.raises(IndexError, match="no text 2 in a signature of 2"):
        html.render(hostile, text_id=2)


def test_too_long_for_a_page(hostile: Signature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_LIMIT", 5)
    with pytest.raises(ValueError, match="at most 5 tokens and this signature has 2"):
        html.render(hostile)


def test_a_text_without_rows_makes_a_page() -> None:
    empty = specimens.hostile()[:0]
    assert told(html.render(empty))["rows"] == 0


# Scales and ramps.


def test_scales_place_their_ends_and_middle() -> None:
    for name, ruler in SCALES.items():
        low, high = ruler.bins(np.array([ruler.low, ruler.high])).tolist()
        assert (low, high) == (0, BINS - 1), name
        if ruler.diverging:
            assert ruler.bins(np.array([0.0])).tolist() == [BINS // 2]
        beyond = np.array([ruler.low - (ruler.high - ruler.low), ruler.high + (ruler.high - ruler.low), np.nan])
        assert ruler.bins(beyond).tolist()[1:] == [BINS - 1, -1], name
        assert all(min(ruler.low, ruler.high) <= tick <= max(ruler.low, ruler.high) for tick in ruler.ticks)


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(sorted(SCALES)))
def test_scales_keep_order(one: float, other: float, name: str) -> None:
    ruler: Scale = SCALES[name]
    values = ruler.low + np.array([one, other]) * (ruler.high - ruler.low)
    placed = ruler.fraction(values)
    assert (placed[0] - placed[1]) * (one - other) >= -1e-12


def test_a_column_without_natural_ends_is_fitted_and_says_so() -> None:
    ruler = scale("log_normalizer", np.array([np.nan, 3.0, 5.0, np.inf]))
    assert ruler.is_fitted and 3.0 <= ruler.low < ruler.high <= 5.0
    flat = scale("log_normalizer", np.array([2.0, 2.0]))
    assert flat.low < flat.high
    assert scale("log_normalizer", np.array([])).high > 0


def test_ramps_are_monotone_in_lightness_and_their_ink_is_legible() -> None:
    light = [ramp._luminance(colour) for colour in ramp.LIGHT.colours]
    dark = [ramp._luminance(colour) for colour in ramp.DARK.colours]
    assert all(one > other for one, other in pairwise(light))
    assert all(one < other for one, other in pairwise(dark))
    for name in ("LIGHT", "DARK", "LIGHT_DIVERGING", "DARK_DIVERGING", "TERMINAL", "TERMINAL_DIVERGING"):
        one = getattr(ramp, name)
        assert len(one.colours) == BINS
        assert min(map(ramp.contrast, one.colours, one.inks)) >= 4.5, name
    for one in (ramp.TERMINAL_INK, ramp.TERMINAL_DIVERGING_INK):
        for ground in ("#ffffff", "#000000"):
            assert min(ramp.contrast(colour, ground) for colour in one.colours) >= 3.0
    assert ramp.contrast("#ffffff", "#000000") == pytest.approx(21)


def test_oklch_of_known_colours() -> None:
    # White, black, and pure red, whose Oklch coordinates are known.
    white = ramp.Ramp.through((1, 0, 0), (0, 0, 0)).colours
    assert (white[0], white[-1]) == ("#ffffff", "#000000")
    red = ramp.Ramp.through((0.62796, 0.25768, 29.234), (0.62796, 0.25768, 29.234)).colours[0]
    assert red == "#ff0000"


# Spelling.


@given(st.text(max_size=30), st.data())
@example("né 好🙂", None)
def test_tokens_cut_anywhere_spell_the_text(text: str, data: st.DataObject | None) -> None:
    raw = text.encode("utf-8", "ignore")
    cuts = range(len(raw)) if data is None else data.draw(st.lists(st.integers(0, len(raw)), max_size=12))
    ends = sorted({0, *cuts, len(raw)})
    tokens = [raw[a:b] for a, b in pairwise(ends)]
    pieces = spelled(tokens)
    assert len(pieces) == len(tokens)
    assert all(piece.is_whole for piece in pieces)
    assert "".join(piece.text for piece in pieces).encode() == raw
    # A character belongs to the token in which its first byte lies.
    for token, piece in zip(tokens, pieces, strict=True):
        assert len(piece.text) == sum(byte & 0xC0 != 0x80 for byte in token)


def test_bytes_of_no_character_are_shown_as_such() -> None:
    assert spelled([b"a", b"\xff", b"\xe5\xa5", b"b", b"\xbd"]) == [
        ("a", True),
        ("\\xff", False),
        ("\\xe5\\xa5", False),
        ("b", True),
        ("\\xbd", False),
    ]

"""The page in a browser: what it shows, what pointer and keys do, and that nothing in a text can act."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import nextoken
from nextoken.model.table import TableModel
from nextoken.signature import Signature, html
from nextoken.signature.scale import SCALES, colourable
from signature import specimens

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
IN_VIEW = """row => {
  const box = tokenAt(row).getBoundingClientRect();
  return box.top > plotBox.getBoundingClientRect().bottom && box.bottom < innerHeight;
}"""
Open = Callable[..., "sync_api.Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: sync_api.Browser, tmp_path: Path) -> Iterator[Open]:
    """Open a page; at the end of the test it must have asked nothing of the network and said nothing on the console."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def opened(source: str, *, width: int = 1300, height: int = 900, scheme: str = "light") -> sync_api.Page:
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(source, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("file:") and url != "about:srcdoc"] == []
    assert len(asked) == len([url for url in asked if url.endswith(".html") or url == "about:srcdoc"])


@pytest.fixture(scope="module")
def prose() -> Signature:
    return specimens.prose()


@pytest.fixture(scope="module")
def hostile() -> Signature:
    return specimens.hostile()


def number(text: str) -> float:
    """A number as the page writes it."""
    found = re.match(r"[≤ ]*([−-]?[\d,.]+(?:e[+-]?\d+)?|[−-]?∞)( %)?", text.strip())
    assert found, text
    value = float(found[1].replace("−", "-").replace(",", "").replace("∞", "inf"))
    return value / 100 if found[2] else value


def shown(page: sync_api.Page, card: str, column: str) -> str:
    return page.locator(f"{card} dd[data-column={column}]").inner_text()


def test_hover_shows_the_distribution_of_the_table(show: Open, prose: Signature) -> None:
    page = show(html.render(prose))
    for row in (0, 7, 41):
        page.locator(f"#t{row}").hover()
        page.locator("#card").wait_for(state="visible")
        values = prose.table.slice(row, 1).to_pylist()[0]
        assert number(shown(page, "#card", "probability")) == pytest.approx(math.exp(values["logprob"]), rel=6e-3)
        for column in ("logprob", "rank", "entropy", "varentropy", "mass_above", "margin"):
            assert number(shown(page, "#card", column)) == pytest.approx(values[column], rel=1e-3, abs=1e-9), column
        bars = page.locator("#card .top li:not(.gap):not(.else)")
        expected = list(zip(values["top_ids"], values["top_logprobs"], strict=True))
        came = values["token_id"] in values["top_ids"]
        assert bars.count() == len(expected) + (not came)
        track = page.locator("#card .track").first.bounding_box()
        for i, (token_id, logprob) in enumerate(expected):
            label = prose.vocab_labels[token_id]
            assert bars.nth(i).locator(".word").inner_text() == label.replace(" ", "␣").replace("\n", "⏎")
            assert number(bars.nth(i).locator(".share").inner_text()) == pytest.approx(math.exp(logprob), rel=6e-3)
            assert ("came" in (bars.nth(i).get_attribute("class") or "")) == (token_id == values["token_id"])
            full = bars.nth(i).locator(".full").bounding_box()
            assert full["width"] == pytest.approx(max(1, math.exp(logprob) * track["width"]), abs=0.6)
        assert page.locator("#card .came").count() == 1
        rest = page.locator("#card .else .share").inner_text()
        assert number(rest) == pytest.approx(values["rest_mass"], rel=6e-3, abs=1e-6)


def test_a_token_beyond_the_top_is_shown_after_it(show: Open, prose: Signature) -> None:
    row = int(np.flatnonzero(prose.column("rank") > 4)[0])
    page = show(html.render(prose))
    page.evaluate("row => point(row, tokenAt(row).getBoundingClientRect())", row)
    items = page.locator("#card .top li")
    assert [items.nth(i).get_attribute("class") for i in range(items.count())] == [
        "",
        "",
        "",
        "",
        "gap",
        "came",
        "else",
    ]
    assert number(items.nth(5).locator(".share").inner_text()) == pytest.approx(
        math.exp(prose.column("logprob")[row]), rel=6e-3
    )


def test_every_column_colours_by_its_scale(show: Open, hostile: Signature) -> None:
    page = show(html.render(hostile))
    assert page.locator("#text .t").count() == hostile[0].table.num_rows
    names = page.locator("#colour-select option").evaluate_all("all => all.map(option => option.value)")
    assert set(names) >= set(SCALES) - {"entropy_lower", "entropy_upper"}
    for name in names:
        page.select_option("#colour-select", name)
        column = hostile[0].column(name)
        if name not in SCALES:
            assert "fitted" in page.locator("#about").inner_text()
            continue
        bins = page.locator("#text .t").evaluate_all("all => all.map(token => token.classList[1])")
        assert bins == [f"b{number}" for number in SCALES[name].bins(column).tolist()], name
        assert page.evaluate("document.body.classList.contains('diverging')") == SCALES[name].diverging


def test_colours_differ_and_the_given_one_is_first(show: Open, prose: Signature) -> None:
    page = show(html.render(prose, colour="entropy"))
    assert page.locator("#colour-select").input_value() == "entropy"
    strip = page.locator("#legend .strip i").evaluate_all("all => all.map(i => getComputedStyle(i).backgroundColor)")
    assert len(set(strip)) == len(strip)


def test_the_theme_follows_the_system_and_the_button(show: Open, prose: Signature) -> None:
    def ground(page: sync_api.Page) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    page = show(html.render(prose), scheme="dark")
    token = "getComputedStyle(document.querySelector('#text .b12, #text .b20, #text .b6')).backgroundColor"
    dark = page.evaluate(token)
    assert ground(page) < 150
    page.click("#theme")
    assert ground(page) > 600
    assert page.evaluate(token) != dark
    page.click("#theme")
    assert ground(page) < 150
    assert ground(show(html.render(prose), scheme="light")) > 600


def test_the_selector_changes_text_and_figures(show: Open, hostile: Signature) -> None:
    page = show(html.render(hostile))
    for index in (1, 0):
        page.select_option("#text-select", str(index))
        figures = hostile[index].summary()
        for name in (
            "bits_per_byte",
            "perplexity",
            "mean_entropy",
            "mean_kl",
            "against_bits_per_byte",
            "tokens",
            "top1",
        ):
            written = page.locator(f"#figures [data-figure={name}] dd").inner_text()
            assert number(written) == pytest.approx(figures[name], rel=1e-3), name
        assert page.locator("#text .t").count() == figures["tokens"]
        least = np.sort(hostile[index].column("logprob"))[:10]
        listed = page.locator("#surprises .share").all_inner_texts()
        assert [number(text) for text in listed] == pytest.approx((-least).tolist(), rel=1e-3)


def test_the_text_given_first_is_shown_first(show: Open, hostile: Signature) -> None:
    page = show(html.render(hostile, text_id=1))
    assert page.locator("#text-select").input_value() == "1"
    assert page.locator("#text").evaluate("box => box.textContent") == hostile.text(1)


def test_nothing_in_a_text_acts(show: Open, hostile: Signature) -> None:
    page = show(html.render(hostile, title=specimens.HOSTILE))
    assert page.locator("h1").inner_text() == specimens.HOSTILE
    assert page.locator("img").count() == 0
    assert page.evaluate("document.scripts.length") == 2
    text = page.locator("#text").evaluate("box => box.textContent")
    # The page spells out what has no shape and keeps every other character.
    assert text == hostile.text(0).replace("\x1b", "\\x1b").replace("\u202e", "U+202E")
    for row in range(len(hostile[0])):
        page.evaluate("row => { point(row, tokenAt(row).getClientRects()[0]); keep(row); }", row)
    assert page.locator("img, b").count() == 0
    assert page.locator("#text-select option").first.inner_text().startswith(specimens.HOSTILE[:10])


def test_characters_spread_over_tokens_are_whole(show: Open) -> None:
    signature = specimens.characters()
    page = show(html.render(signature))
    assert page.locator("#text").evaluate("box => box.textContent") == signature.text()
    assert page.locator("#text .t").count() == len(signature)
    assert page.locator("#text .part").count() == 5
    assert page.locator("#t5").bounding_box()["width"] > 2  # the rest of a character can still be pointed at
    page.locator("#t5").hover()
    assert page.locator("#card header .word").inner_text() == signature.vocab_labels[signature.column("token_id")[5]]


def test_blanks_that_are_tokens_are_visible_and_copy_as_themselves(show: Open, hostile: Signature) -> None:
    page = show(html.render(hostile))
    for kind in ("newline", "space", "tab"):
        content = page.locator(f"#text .{kind}").first.evaluate("mark => getComputedStyle(mark, '::before').content")
        assert content not in ("none", "normal")
    lines = page.locator("#text .block").all_inner_texts()
    assert lines[0].startswith("a b") and lines[1].startswith(" b")


def test_a_click_keeps_a_token_and_escape_drops_it(show: Open, prose: Signature) -> None:
    page = show(html.render(prose))
    page.locator("#t3").click()
    page.locator("#t9").hover()
    names = page.locator("#kept dl.rest dd").evaluate_all("all => all.map(value => value.dataset.column)")
    assert set(names) == {name for name in colourable(prose) if name not in ("logprob", "rank")}
    for name in names:
        assert number(shown(page, "#kept", name)) == pytest.approx(float(prose.column(name)[3]), rel=1e-3, abs=1e-9)
    assert number(shown(page, "#card", "logprob")) == pytest.approx(float(prose.column("logprob")[9]), rel=1e-3)
    page.keyboard.press("Escape")
    assert page.locator("#kept").is_hidden() and page.locator("#card").is_hidden()


def test_keys_move_from_token_to_token(show: Open, prose: Signature) -> None:
    page = show(html.render(prose))
    page.locator("#colour-select").focus()
    focus = "document.activeElement.row"
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate(focus) is not None:
            break
    assert page.evaluate(focus) == 0
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.evaluate(focus) == 4
    assert number(shown(page, "#card", "logprob")) == pytest.approx(float(prose.column("logprob")[4]), rel=1e-3)
    assert "token 4" in page.locator("#spoken").inner_text()
    assert "token 4" in page.locator("#t4").get_attribute("aria-label")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focus) == 3
    tops = [page.locator("#t3").bounding_box()["y"]]
    page.keyboard.press("ArrowDown")
    tops.append(page.evaluate("document.activeElement.getClientRects()[0].y"))
    assert tops[1] > tops[0] + 10
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.getClientRects()[0].y") == pytest.approx(tops[0], abs=12)
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.locator("#kept").is_visible()
    page.keyboard.press("End")
    assert page.evaluate(focus) == len(prose) - 1
    assert page.locator("#text [tabindex='0']").count() == 1


def test_the_plot_and_the_text_point_at_each_other(show: Open, prose: Signature) -> None:
    page = show(html.render(prose))
    box = page.locator("#plot").bounding_box()
    edge = page.evaluate("EDGE")
    inner = box["width"] - edge["left"] - edge["right"]

    def x(row: int) -> float:
        return float(box["x"] + edge["left"] + (row + 0.5) / len(prose) * inner)

    page.mouse.move(x(60), box["y"] + 70)
    assert page.locator(".pointed").evaluate("token => token.row") == 60
    assert number(shown(page, "#card", "logprob")) == pytest.approx(float(prose.column("logprob")[60]), rel=1e-3)
    page.locator("#t5").hover()
    cursor = page.locator("#cursor").bounding_box()
    assert cursor["x"] == pytest.approx(x(5), abs=1.5)
    target = len(prose) - 10
    page.mouse.click(x(target), box["y"] + 70)
    page.wait_for_function(IN_VIEW, arg=target)
    assert page.locator("#kept").is_visible()
    assert f"token {target}" in page.locator("#kept .place").inner_text()


def test_the_plot_draws_surprisal_to_scale(show: Open) -> None:
    """Of a text with one certain and one improbable token, the pixels above each tell which is which."""
    signature = specimens.prose(40)
    page = show(html.render(signature))
    heights = page.evaluate(
        """() => {
          const pen = canvas.getContext("2d");
          const dense = devicePixelRatio;
          const ink = getComputedStyle(document.documentElement).getPropertyValue("--surprisal").trim();
          const wanted = [1, 3, 5].map((at) => parseInt(ink.slice(at, at + 2), 16));
          const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
          return Array.from({ length: extent[1] }, (_, row) => {
            const x = Math.round((xOf(row) + plotWidth() / extent[1] * 0.2) * dense);
            let count = 0;
            for (let y = 0; y < canvas.height; y++) {
              const i = 4 * (y * canvas.width + x);
              if (wanted.every((part, j) => Math.abs(part - data[i + j]) < 3)) count++;
            }
            return count / dense;
          });
        }"""
    )
    surprisal = -signature.column("logprob")
    # The curve of the entropy covers a pixel or two of most bars.
    assert np.corrcoef(heights, surprisal)[0, 1] > 0.98


def test_twenty_thousand_tokens_stay_usable(show: Open) -> None:
    signature = specimens.long(20_000)
    page = show(html.render(signature))
    page.locator("#t0").wait_for()
    assert page.locator("#figures [data-figure=tokens] dd").inner_text() == "20,000"
    # Only what is near the window is made into elements, but all of the text is there to be searched.
    assert page.locator(".t").count() < 6_000
    assert page.locator("#text").evaluate("box => box.textContent") == signature.text()
    far = 19_990
    page.evaluate("row => { scrollToRow(row); }", far)
    page.wait_for_function(IN_VIEW, arg=far)
    page.locator(f"#t{far}").hover()
    assert number(shown(page, "#card", "logprob")) == pytest.approx(float(signature.column("logprob")[far]), rel=1e-3)
    assert page.locator(".t").count() < 12_000
    # A hover makes one card and touches nothing else.
    page.evaluate(
        "() => { window.changes = 0; new MutationObserver((all) => { window.changes += all.length; })"
        ".observe(document.body, { subtree: true, childList: true, attributes: true }); }"
    )
    page.locator(f"#t{far - 3}").hover()
    assert 0 < page.evaluate("changes") < 20
    page.select_option("#colour-select", "entropy")
    assert page.locator(f"#t{far}").get_attribute("class").split()[1] == (
        f"b{SCALES['entropy'].bins(signature.column('entropy')[[far]])[0]}"
    )


def test_a_partial_reading_is_marked_and_bounded(show: Open) -> None:
    signature = specimens.partial()
    page = show(html.render(signature))
    assert "Partial" in page.locator("#notices").inner_text()
    logprob = signature.column("logprob")
    row = int(np.flatnonzero(np.isnan(logprob[: signature.texts[0].n_rows]))[0])
    page.locator(f"#t{row}").hover()
    values = signature.table.slice(row, 1).to_pylist()[0]
    assert shown(page, "#card", "logprob").startswith("unknown")
    bound = min(values["rest_mass"], math.exp(values["top_logprobs"][-1]))
    assert shown(page, "#card", "probability").startswith("≤")
    assert number(shown(page, "#card", "probability")) == pytest.approx(bound, rel=6e-3)
    low, high = shown(page, "#card", "entropy").replace("nats", "").split(" to ")
    assert number(low) == pytest.approx(values["entropy_lower"], rel=1e-3)
    assert number(high) == pytest.approx(values["entropy_upper"], rel=1e-3)
    figures = signature[0].summary()
    low, high = page.locator("#figures [data-figure=mean_entropy] dd").inner_text().replace("nats", "").split(" to ")
    assert number(low) == pytest.approx(figures["mean_entropy_lower"], rel=1e-3)
    assert number(high) == pytest.approx(figures["mean_entropy_upper"], rel=1e-3)
    assert page.locator(f"#t{row}.bunknown").count() == 1
    known = int(np.flatnonzero(~np.isnan(logprob))[0])
    assert page.locator(f"#t{known}.bunknown").count() == 0


def test_a_fragment_shows_itself_in_its_frame_and_leaves_the_notebook_alone(show: Open, prose: Signature) -> None:
    page = show(
        f"<!doctype html><meta charset=utf-8><style>p{{color:rgb(1,2,3)}}</style><p id=own>{'x' * 9}</p>"
        + html.render_fragment(prose, max_rows=100)
    )
    frame = page.frame_locator("iframe.nextoken")
    frame.locator("#t0").hover()
    assert number(frame.locator("#card dd[data-column=logprob]").inner_text()) == pytest.approx(
        float(prose.column("logprob")[0]), rel=1e-3
    )
    assert "600 more" in frame.locator("#notices").inner_text()
    assert page.locator("body > *").count() == 2
    assert page.evaluate("getComputedStyle(own).color") == "rgb(1, 2, 3)"
    assert page.evaluate("typeof told") == "undefined"


def test_nothing_overflows_a_narrow_window(show: Open, hostile: Signature) -> None:
    width = 360
    page = show(html.render(hostile, title="a-title-without-any-place-to-break-" * 3), width=width)
    page.locator("#t0").click()
    assert page.locator("#kept").is_visible()
    page.evaluate("point(3, tokenAt(3).getClientRects()[0])")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    card = page.locator("#card").bounding_box()
    assert card["x"] >= 0 and card["x"] + card["width"] <= width


def test_texts_without_tokens_and_no_texts_at_all(show: Open) -> None:
    model = TableModel.random(3, seed=1)
    page = show(html.render(nextoken.read(model, ["", "ab"], progress=False)))
    assert page.locator("#text-select").input_value() == "1"
    page.select_option("#text-select", "0")
    assert "no predicted token" in page.locator("#text").inner_text()
    assert page.locator("#figures [data-figure=bits_per_byte] dd").inner_text() == "unknown"
    page = show(html.render(specimens.hostile()[:0]))
    assert "no text" in page.locator("#text").inner_text()

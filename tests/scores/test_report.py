import re
import shutil

import numpy as np
import pytest

import nextoken
from nextoken.scores import table
from nextoken.scores.report import SHOWN, report

TEXTS = ["The sea was calm.", "It rained <b>all</b> day & night.", "Nobody came back from the hill."]


@pytest.fixture(scope="module")
def signature():
    return nextoken.read("nano", TEXTS, names=["one", "two <i>", "three"], progress=False)


def test_every_score_has_a_row_with_each_text(signature):
    scores = table(signature)
    page = report(signature, scores)
    rows = re.findall(r'<tr><th class="score" scope="row">(\w+)</th>(.*?)<td class="about">', page, re.S)
    assert {name for name, _ in rows} == {*scores}
    for name, cells in rows:
        shown = re.findall(r">([^<>]+)</td>", cells)
        assert shown == [f"{value:.4g}" for value in scores[name]], name


def test_it_needs_nothing_else_and_names_are_text(signature):
    page = report(signature, table(signature, ["perplexity"]))
    assert "two &lt;i&gt;" in page and "<i>" not in page
    assert "<script" not in page.replace("&lt;script", "")
    # Links to papers lead out when followed; nothing is loaded.
    assert not re.findall(r'(?:src|link rel)="(?:https?:)?//', page)


def test_cells_are_shaded_by_place_from_three_texts_on(signature):
    scores = {"perplexity": np.array([3.0, 1.0, 2.0])}
    shades = re.findall(r"rgb\(var\(--shade\) / ([\d.]+)\)", report(signature, scores))
    assert [float(shade) for shade in shades] == [0.42, 0.0, 0.21]
    assert "rgb(var(--shade) /" not in report(signature[:2], {"perplexity": np.array([3.0, 1.0])})


def test_equal_and_missing_values(signature):
    page = report(signature, {"perplexity": np.array([2.0, 2.0, 2.0]), "zlib": np.array([np.nan, np.inf, 1.0])})
    assert re.findall(r"rgb\(var\(--shade\) / ([\d.]+)\)", page) == ["0.210"] * 3
    assert "–</td>" in page and "∞</td>" in page


def test_wrong_shapes_and_names_are_refused(signature):
    with pytest.raises(ValueError, match="not one number per text"):
        report(signature, {"perplexity": np.zeros(2)})
    with pytest.raises(ValueError, match="no score 'perplexitty'"):
        report(signature, {"perplexitty": np.zeros(3)})


def test_many_texts_stand_in_the_table_only():
    many = nextoken.read("nano", ["A short text."] * (SHOWN + 2), progress=False)
    page = report(many, table(many, ["perplexity"]))
    assert page.count("<iframe") == SHOWN and "2 more texts stand in the table only" in page


def test_a_person_sees_table_and_texts(signature, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    path = tmp_path / "scores.html"
    path.write_text(report(signature, table(signature)), encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(path.as_uri())
        assert page.locator("th.score").count() > 20
        page.frame_locator("iframe").first.locator("#text").get_by_text("sea").first.wait_for()
        # Wider than the window, the table scrolls within its sheet and the page does not.
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()

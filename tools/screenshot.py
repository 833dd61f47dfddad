"""Make the README's picture of the page: a passage read by a bundled model, in Chromium, with a token's card open.

    python tools/screenshot.py                                    # writes docs/images/page.png
    python tools/screenshot.py --dark --out page-dark.png
    python tools/screenshot.py --text my.txt --token 120 --model gpt2

The passage is from a book that the bundled models were not trained on; tiny reads it, or nano where tiny is not there.
Needs Playwright and Pillow (`pip install playwright pillow`) and a Chromium: the system's, or that of
`playwright install chromium`. The picture is 1,400 x 900 points at twice the density and less than 400 KB.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import nextoken
from nextoken.errors import NextokenError
from nextoken.signature import Signature

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 400_000
TITLE = "Frankenstein, Letter 1"
EXCERPT = ROOT / "tests" / "data" / "frankenstein.txt"


def passage() -> str:
    """The first paragraphs of the letter, their lines joined."""
    paragraphs = re.split(r"\n\s*\n", EXCERPT.read_text(encoding="utf-8"))
    told = [" ".join(paragraph.split()) for paragraph in paragraphs if len(paragraph) > 200]
    return "\n\n".join(told[:2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default tiny, or nano where tiny is not there")
    parser.add_argument("--text", type=Path, help="a text file; default a passage of Frankenstein")
    parser.add_argument("--title", help="of the page; default the name of the text")
    parser.add_argument("--token", type=int, help="whose card is open; default one that shows the card well")
    parser.add_argument("--colour", default="logprob", help="the column that colours the tokens")
    parser.add_argument("--dark", action="store_true", help="the dark theme")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "page.png")
    chosen = parser.parse_args()

    text = chosen.text.read_text(encoding="utf-8") if chosen.text else passage()
    title = chosen.title or (chosen.text.name if chosen.text else TITLE)
    try:
        signature = read(chosen.model, text, title)
    except NextokenError as error:
        print(f"screenshot: {error}", file=sys.stderr)
        return 2
    picture = reduced(photograph(signature, title, chosen.token, chosen.colour, dark=chosen.dark))
    if len(picture) > LIMIT:
        print(f"screenshot: {len(picture):,} bytes are more than {LIMIT:,}: take a shorter text", file=sys.stderr)
        return 1
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_bytes(picture)
    print(f"{chosen.out}: {len(picture):,} bytes, {len(signature)} tokens by {signature.metadata.model}")
    return 0


def read(model: str | None, text: str, title: str) -> Signature:
    """The text under a model, or under the best of the bundled ones."""
    from nextoken.model.loading import bundled_names

    name = model or ("tiny" if "tiny" in bundled_names() else "nano")
    return nextoken.read(name, text, names=[title], progress=False)


def photograph(signature: Signature, title: str, token: int | None, colour: str, *, dark: bool) -> bytes:
    """The page as PNG, with the card of a token open."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        signature.to_html(path, title=title, colour=colour)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(
            viewport={"width": 1400, "height": 900},
            device_scale_factor=2,
            color_scheme="dark" if dark else "light",
        )
        page.goto(path.as_uri())
        page.locator(f"#t{telling(signature, page) if token is None else token}").hover()
        page.locator("#card").wait_for(state="visible")
        page.wait_for_timeout(200)
        picture = page.screenshot()
        browser.close()
    return bytes(picture)


def telling(signature: Signature, page: Page) -> int:
    """Of the tokens whose card would hide little, at the left, the one whose neighbours in rank are most probable:

    something else was expected, and what came is listed too.
    """
    left = page.locator(".t").evaluate_all(
        """all => all.filter((token) => {
          const box = token.getBoundingClientRect();
          return box.left < 330 && box.top > 480 && box.bottom < 760 && token.textContent.trim().length > 2;
        }).map((token) => token.row)"""
    )
    rank, top1 = signature.column("rank"), signature.column("top1_prob")
    listed = [row for row in left if 1 <= rank[row] <= 6]
    return max(listed or left or [0], key=lambda row: float(top1[row]))


def reduced(picture: bytes) -> bytes:
    """The same picture, in a palette of 256 colours if it would be too large."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    # Octree quantisation would merge the page's whites; the median cut leaves bands, which k-means evens out.
    for reduction in (image, image.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=8, dither=Image.Dither.NONE)):
        out = io.BytesIO()
        reduction.save(out, "PNG", optimize=True)
        if len(out.getvalue()) <= LIMIT:
            break
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())

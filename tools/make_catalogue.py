"""Write docs/methods.md, the catalogue of methods, from the registry.

python tools/make_catalogue.py
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from nextoken.methods import Method, all_methods

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"

HEAD = """<!-- Made by tools/make_catalogue.py; a test holds it to the code. -->

# Methods

Every method of a paper that nextoken implements, read off the registry that `nextoken methods` prints. Access says what
a method must see of a model: *white*, its weights or hidden states; *gray*, its probabilities; *black*, text only.
"""


def catalogue() -> str:
    """The whole page."""
    page = HEAD
    for room, entries in groupby(all_methods(), key=lambda entry: entry.room):
        rows = [row(entry) for entry in entries]
        heading = "| method | source | access | trained | what it does | where |"
        page += "\n".join(["", f"## {room}", "", heading, "| --- | --- | --- | --- | --- | --- |", *rows, ""])
    return page


def row(entry: Method) -> str:
    source = f"[{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else "common knowledge"
    place = entry.entry_point.replace(":", ".")
    trained = "yes" if entry.trained else "no"
    summary = entry.summary.replace("|", "\\|")
    return f"| {entry.name} | {source} | {entry.access} | {trained} | {summary} | `{place}` |"


def main() -> None:
    PAGE.write_text(catalogue(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()

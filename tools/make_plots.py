"""Write the plots of docs/images from the results of benchmarks.

python tools/make_plots.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "images"
SHOWN = {
    "exponential, edits forgiven": ("exponential", "#1b6ca8"),
    "inverse transform, edits forgiven": ("inverse transform", "#d1495b"),
    "Gumbel, context 2": ("Gumbel, h = 2", "#2e8b57"),
    "SynthID, 30 layers": ("SynthID", "#8a5fb0"),
    "green list": ("green list", "#c98a1b"),
    "green list, one for all (Unigram)": ("Unigram", "#6f6a60"),
}
"""Marks of the plot: how they are called there, and their colour."""
EDITS = {"substitute": "substituted", "insert": "inserted", "delete": "deleted"}
WIDTH, HEIGHT, MARGIN, GAP = 250, 190, 46, 58
INK, QUIET, GRID = "#3c3b40", "#77757c", "#d9d6cf"


def watermark_power(figures: Mapping[str, Any]) -> str:
    """Share of marked texts found at p <= 0.01: against their length, and at 35 tokens against three kinds of edits."""
    marks = figures["marks"]
    panels = [
        (
            "unedited, by length (tokens)",
            {name: [(row["tokens"], row["found"]) for row in marks[name]["by_length"]] for name in SHOWN},
            (10, 20, 35, 50),
            (10.0, 50.0),
        )
    ]
    for edit, done in EDITS.items():
        lines = {}
        for name in SHOWN:
            whole = next(row["found"] for row in marks[name]["by_length"] if row["tokens"] == 35)
            edited = [
                (100 * row["rate"], row["found"])
                for row in marks[name]["by_edit"]
                if row["edit"] == edit and row["tokens"] == 35
            ]
            lines[name] = [(0.0, whole), *sorted(edited)]
        panels.append((f"35 tokens, by share {done} (%)", lines, (0, 10, 30, 50), (0.0, 50.0)))
    columns = 2
    width = MARGIN + columns * (WIDTH + GAP) + 10
    rows = -(-len(panels) // columns)
    height = rows * (HEIGHT + 62) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="Inter, Segoe UI, Arial, '
        f'sans-serif" font-size="12" role="img">',
        "<title>Share of marked texts found at p of at most 0.01</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#fbfaf7"/>',
    ]
    for number, panel in enumerate(panels):
        left = MARGIN + (number % columns) * (WIDTH + GAP)
        top = 34 + (number // columns) * (HEIGHT + 62)
        parts += plot(*panel, left=left, top=top)
    parts += legend(left=MARGIN, top=height - 36)
    return "\n".join([*parts, "</svg>", ""])


def plot(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    ticks: Sequence[int],
    span: tuple[float, float],
    *,
    left: int,
    top: int,
) -> list[str]:
    """One panel: shares from 0 to 1 upwards."""

    def x(value: float) -> float:
        return round(left + WIDTH * (value - span[0]) / (span[1] - span[0]), 1)

    def y(value: float) -> float:
        return round(top + HEIGHT * (1 - value), 1)

    parts = [f'<text x="{left}" y="{top - 12}" fill="{INK}" font-weight="600">{escape(title)}</text>']
    for share in (0, 0.5, 1):
        parts.append(f'<path d="M{left} {y(share)}h{WIDTH}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(share) + 4}" fill="{QUIET}" text-anchor="end">{share:.0%}</text>')
    for tick in ticks:
        parts.append(f'<text x="{x(tick)}" y="{top + HEIGHT + 18}" fill="{QUIET}" text-anchor="middle">{tick}</text>')
    for name, points in lines.items():
        inside = [(x(a), y(b)) for a, b in points if span[0] <= a <= span[1]]
        path = "L".join(f"{a} {b}" for a, b in inside)
        colour = SHOWN[name][1]
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>')
        parts += [f'<circle cx="{a}" cy="{b}" r="2.6" fill="{colour}"/>' for a, b in inside]
    return parts


def legend(*, left: int, top: int) -> list[str]:
    """Names of the lines, in their colours."""
    parts = []
    for number, (name, colour) in enumerate(SHOWN.values()):
        at, line = left + 160 * (number % 3), top + 20 * (number // 3)
        parts.append(f'<path d="M{at} {line - 4}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{at + 24}" y="{line}" fill="{INK}">{escape(name)}</text>')
    return parts


def main() -> None:
    figures = json.loads((RESULTS / "watermark.json").read_text(encoding="utf-8"))["figures"]
    target = IMAGES / "watermark-power.svg"
    target.write_text(watermark_power(figures), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()

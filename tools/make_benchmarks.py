"""Write docs/benchmarks.md from the measured figures in bench/results/.

    python tools/make_benchmarks.py

No figure is typed by hand: each table is one file, with the command that made it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"

HEAD = """<!-- Made by tools/make_benchmarks.py; a test holds it to bench/results/. -->

# Benchmarks

What was measured, on which machine, and the command that measures it again. These are figures of the machines named;
yours will differ.
"""


def benchmarks(results: Path) -> str:
    """The whole page, from the JSON files of a folder."""
    page = HEAD
    for path in sorted(results.glob("*.json")):
        page += section(path.stem, json.loads(path.read_text(encoding="utf-8")))
    return page


def section(name: str, result: dict[str, Any]) -> str:
    lines = ["", f"## {name.replace('_', ' ')}", "", f"```sh\n{result['command']}\n```", ""]
    if result.get("note"):
        lines += [result["note"], ""]
    lines += [*tables(result["figures"]), "", machine(result["machine"], result["date"]), ""]
    return "\n".join(lines)


def machine(found: dict[str, Any], date: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    parts = [found.get("accelerator"), found.get("processor"), f"{found['cores']} cores", f"{found['memory_gib']} GiB"]
    load = f"; load {found['load']} when it ended" if found.get("load") is not None else ""
    return f"*{'; '.join(part for part in parts if part)}{load}; {versions}; {date}.*"


_COLUMNS = 9
"""Most columns of a table that is still read at a glance."""


def tables(figures: Any, title: str = "") -> list[str]:
    """Figures as tables: records become rows, single values a table of two columns.

    A mapping of mappings is a table whose first column is the key, with `outer: inner` for what is deeper; where that
    would be too wide each key becomes a table of its own.
    """
    head = ["", f"**{title}**", ""] if title else []
    if isinstance(figures, list):
        return [*head, *_table([_flat(record) if isinstance(record, dict) else {"": record} for record in figures])]
    if figures and all(isinstance(value, dict) and value for value in figures.values()):
        records = [{"": name, **_flat(record)} for name, record in figures.items()]
        if len({name for record in records for name in record}) <= _COLUMNS or _is_flat(figures):
            return [*head, *_table(records)]
    inner = {name: value for name, value in figures.items() if _is_inner(value)}
    single = {name: value for name, value in figures.items() if name not in inner}
    lines = [*head, *_table([{"": _words(name), "value": value} for name, value in single.items()])] if single else []
    for name, value in inner.items():
        lines += tables(value, f"{title}: {_words(name)}" if title else _words(name))
    return lines


def _is_inner(value: Any) -> bool:
    """Whether a value is a table of its own."""
    return bool(value) and (isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)))


def _is_flat(figures: dict[str, Any]) -> bool:
    return not any(_is_inner(value) for record in figures.values() for value in record.values())


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}: ")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _table(records: list[dict[str, Any]]) -> list[str]:
    headings = list(dict.fromkeys(name for record in records for name in record))
    aligned = ["---" if _is_words(records, name) else "---:" for name in headings]
    rows = [" | ".join(_shown(record.get(name)) for name in headings) for record in records]
    return [f"| {row} |" for row in (" | ".join(map(_words, headings)), " | ".join(aligned), *rows)]


def _is_words(records: list[dict[str, Any]], name: str) -> bool:
    return any(isinstance(record.get(name), str) for record in records)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{_words(name)} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return str(value).replace("|", "\\|")


def main() -> None:
    PAGE.write_text(benchmarks(ROOT / "bench" / "results"), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()

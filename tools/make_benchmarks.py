"""Write docs/benchmarks.md from the measured figures in bench/results/.

    python tools/make_benchmarks.py

No figure is typed by hand: each table is one file, with the command that made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = "https://github.com/nextoken/nextoken/blob/main/bench/results"

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
    shown = tables(_with_intervals(result["figures"]))
    if sum(map(len, shown)) > _LONGEST:
        shown = [f"Too many figures for a page: they are in [{name}.json]({RESULTS}/{name}.json)."]
    lines += [*shown, "", machine(result["machine"], result["date"]), ""]
    return "\n".join(lines)


def machine(found: dict[str, Any], date: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    parts = [found.get("accelerator"), found.get("processor"), f"{found['cores']} cores", f"{found['memory_gib']} GiB"]
    load = f"; load {found['load']} when it ended" if found.get("load") is not None else ""
    return f"*{'; '.join(part for part in parts if part)}{load}; {versions}; {date}.*"


_COLUMNS = 9
"""Most columns of a table that is still read at a glance."""
_LONGEST = 10_000
"""Most characters of the tables of one benchmark."""


def tables(figures: Any) -> list[str]:
    """Figures as tables.

    A list of records is a table, and so is a mapping of mappings whose first column is the key, deeper ones becoming
    columns `outer: inner`, if it fits a line. Any other mapping becomes records: what stands in it by itself is one,
    named by the path that leads there, and those with the same entries share a table. One with more entries than fit a
    line is a table of two columns.
    """
    if isinstance(figures, list):
        return _table([_flat(record) if isinstance(record, dict) else {"": record} for record in figures])
    if figures and all(isinstance(value, dict) for value in figures.values()):
        rows = [{"": name, **_flat(record)} for name, record in figures.items()]
        if len({name for row in rows for name in row}) <= _COLUMNS and not any(
            _is_inner(v) for r in rows for v in r.values()
        ):
            return _table(rows)
    alike: dict[Any, list[tuple[tuple[str, ...], Any]]] = {}
    for path, value in _records(figures, ()):
        wide = isinstance(value, list) or len(value) > _COLUMNS
        alike.setdefault(path if wide else (path[:-1][:1], *value), []).append((path, value))
    lines: list[str] = []
    for group in alike.values():
        shared = _shared([path for path, _ in group])
        lines += [f"**{_words(': '.join(shared))}**", ""] if shared else []
        if len(group) > 1:
            lines += _table([{"": _words(": ".join(path[len(shared) :])), **value} for path, value in group])
        elif isinstance(group[0][1], list):
            lines += tables(group[0][1])
        else:
            lines += _table([{"": _words(name), "value": value} for name, value in group[0][1].items()])
        lines.append("")
    return lines[:-1]


def _shared(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The beginning that all paths have."""
    first = paths[0]
    return first[: next((i for i, names in enumerate(zip(*paths, strict=False)) if len({*names}) > 1), len(first))]


def _records(figures: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What stands by itself in each mapping, and each list of records, with the path to it."""
    single = {name: value for name, value in figures.items() if not _is_inner(value)}
    if single:
        yield path, single
    for name, value in figures.items():
        if isinstance(value, dict) and _is_inner(value):
            yield from _records(value, (*path, str(name)))
        elif _is_inner(value):
            yield (*path, str(name)), value


def _with_intervals(figures: Any) -> Any:
    """The figures with every estimate and its interval, {mean, low, high}, as one value."""
    if isinstance(figures, list):
        return [_with_intervals(value) for value in figures]
    if not isinstance(figures, dict):
        return figures
    if {"low", "high"} < {*figures} and len(figures) == 3:
        (middle,) = (value for name, value in figures.items() if name not in ("low", "high"))
        return f"{_shown(middle)} [{_shown(figures['low'])}, {_shown(figures['high'])}]"
    return {name: _with_intervals(value) for name, value in figures.items()}


def _is_inner(value: Any) -> bool:
    """Whether a value is a table of its own."""
    return bool(value) and (isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)))


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

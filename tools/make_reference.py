"""Write docs/cli.md from the commands themselves and docs/columns.md from the columns of a signature.

python tools/make_reference.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
from typer.main import get_command

from nextoken.app.cli import app
from nextoken.signature.columns import AGAINST, BOUNDS, COLUMNS, PLACE, schema

DOCS = Path(__file__).resolve().parent.parent / "docs"
MADE = "<!-- Made by tools/make_reference.py; a test holds it to the code. -->"

CLI = """{made}

# Command line

{help}

Options before the command:

{options}

Exit codes:

| | |
| --- | --- |
| 0 | done |
| 1 | a statement does not hold (`nextoken verify`) |
| 2 | bad input, or the system refused (a full disk, an unreachable server); one line on stderr says which |
| 70 | a defect of nextoken |
| 130 | interrupted |

Results go to stdout and everything else to stderr. A file is written whole or not at all. Colours are for terminals.
"""

COMMAND = """
## nextoken {name}

{usage}

{help}

{options}
"""


COLUMN_GUIDE = """{made}

# Columns of a signature

One row is one predicted token x, and p is the model's next-token distribution at that place, over its whole vocabulary.
Everything is in natural units (nats). Values are null only for partial models (servers that tell no more than the top
of each distribution), where what cannot be known is left out.
"""


def pages() -> dict[str, str]:
    """The text of each page, by its name in docs/."""
    return {"cli.md": cli(), "columns.md": columns()}


def columns() -> str:
    types = {field.name: kind(field.type) for field in schema(against=True, is_partial=True, hidden_size=1)}
    page = COLUMN_GUIDE.format(made=MADE)
    groups = {
        "The place": PLACE,
        "The distribution": [c for c in COLUMNS if c not in {*PLACE, *AGAINST, *BOUNDS, "hidden"}],
        "With partial models": BOUNDS,
        "With a second model q (`against=`, `--compare`)": AGAINST,
        "On request (`hidden=True`)": ["hidden"],
    }
    for title, names in groups.items():
        rows = [f"| `{name}` | {types[name]} | {COLUMNS[name].replace('|', chr(92) + '|')} |" for name in names]
        page += "\n".join(["", f"## {title}", "", "| column | type | meaning |", "| --- | --- | --- |", *rows, ""])
    return page


def kind(column: pa.DataType) -> str:
    """A type in words that do not change with the version of Arrow."""
    if pa.types.is_list(column):
        return f"k of {column.value_type}"
    return f"H of {column.value_type}" if pa.types.is_fixed_size_list(column) else str(column)


def cli() -> str:
    group: Any = get_command(app)
    page = CLI.format(made=MADE, help=prose(group.help), options=table(group))
    for name, command in group.commands.items():
        page += COMMAND.format(
            name=name, usage=f"```text\n{usage(name, command)}\n```", help=prose(command.help), options=table(command)
        )
    return page


def usage(name: str, command: Any) -> str:
    arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
    return " ".join(["nextoken", name, "[OPTIONS]", *arguments])


def prose(text: str) -> str:
    """A docstring as Markdown, its indented examples as a shell block."""
    clean = inspect.cleandoc(text)
    blocks = re.compile(r"(?:^ {4}.+\n?)+", flags=re.MULTILINE)
    return blocks.sub(lambda found: f"```sh\n{inspect.cleandoc(found[0])}\n```\n", clean).strip()


def table(command: Any) -> str:
    rows = ["| | | default |", "| --- | --- | --- |"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            spelled = f"`{parameter.metavar or parameter.name.upper()}`"
        else:
            metavar = f" {parameter.metavar}" if parameter.metavar else ""
            spelled = ", ".join(f"`{option}{metavar}`" for option in parameter.opts)
        default = parameter.default
        shown = "" if default is None or isinstance(default, bool) or callable(default) else f"`{default}`"
        rows.append(f"| {spelled} | {parameter.help} | {shown} |")
    return "\n".join(rows) if len(rows) > 2 else "No options."


def main() -> None:
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)


if __name__ == "__main__":
    main()

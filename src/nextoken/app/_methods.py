"""`nextoken methods`: the registry of methods."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nextoken.errors import InputError


def methods(
    room: Annotated[
        str | None, typer.Option("--room", metavar="ROOM", help="Only this room, such as `head` or `scores`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the methods of papers that nextoken implements, and what each needs.

    Access: white, the weights or hidden states of the model; gray, its probabilities; black, text only.

    Examples:

        nextoken methods
        nextoken methods --room head
        nextoken methods --json
    """
    from nextoken.methods import all_methods

    entries = all_methods()
    if room is not None:
        rooms = sorted({entry.room for entry in entries})
        entries = tuple(entry for entry in entries if entry.room == room)
        if not entries:
            raise InputError(f"no method lives in room {room!r}; rooms with methods: {', '.join(rooms) or 'none'}")
    if as_json:
        typer.echo(json.dumps([entry.as_dict() for entry in entries], indent=2, ensure_ascii=False))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("name", "arXiv", "room", "access", "trained", "what it does", box=None, header_style="bold")
    for entry in entries:
        trained = "yes" if entry.trained else "no"
        table.add_row(entry.name, entry.arxiv or "-", entry.room, entry.access, trained, entry.summary)
    Console().print(table)

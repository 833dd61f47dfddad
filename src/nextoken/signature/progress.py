"""Progress of a reading, for a person who waits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[float, int], None]
"""Called with the texts done so far, parts of a text counted, and the tokens newly scored."""


@contextmanager
def progress(shown: bool | None, total: int | None) -> Iterator[Report]:
    """A bar on stderr with texts, tokens per second and time left.

    Args:
        shown: None for only where stderr is a terminal.
        total: number of texts, None where it is not known.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda texts, tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            tokens, elapsed = task.fields["tokens"], task.elapsed or 0.0
            return Text(f"{tokens:,} tokens, {tokens / elapsed if elapsed else 0:,.0f}/s")

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}" + (f" of {total:,}" if total is not None else "") + " texts"),
        Rate(),
        TimeRemainingColumn(),
        console=console,
        transient=console.is_terminal,
    )
    with bar:
        task = bar.add_task("reading", total=total, tokens=0)
        seen = 0

        def report(texts: float, tokens: int) -> None:
            nonlocal seen
            seen += tokens
            bar.update(task, completed=texts, tokens=seen)

        yield report

"""`nextoken detect`: whether a machine wrote a text."""

from __future__ import annotations

from typing import Annotated

import typer

from nextoken.app._suspicion import Suspicion, examine


def detect(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Text files in UTF-8; `-` is stdin.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", metavar="TEXT", help="A text itself; may be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="The model that judges: name, id or folder.")
    ] = "tiny",
    reference: Annotated[
        str | None,
        typer.Option("--reference", "-r", metavar="MODEL", help="A second model, for detectors that compare two."),
    ] = None,
    scores: Annotated[
        str, typer.Option("--scores", "-s", metavar="NAMES", help="Detectors with commas between, or `all`.")
    ] = "all",
    human: Annotated[
        list[str] | None,
        typer.Option("--human", metavar="PLACE", help="Texts people wrote: a file, a folder, or .jsonl; repeatable."),
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(
            "--machine", metavar="PLACE", help="Texts machines wrote, likewise; both show each detector's power."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, metavar="N", help="Judge the first N tokens of every text only.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Look for signs that a machine wrote a text.

    Every detector is high where the text looks machine-made. With texts that people wrote beside it, each also tells a
    p-value: how often a human text looks as suspicious. With both kinds, the detectors are ranked by how well they tell
    them apart. Length moves all of them, so cut the texts to one length with --tokens. No detector proves authorship.

    Examples:

        nextoken detect essay.txt
        nextoken detect essay.txt --human essays/ --tokens 200
        nextoken detect --human people.jsonl --machine machines.jsonl --reference nano
    """
    examine(
        Suspicion("machine", "a machine wrote a text", "human texts", "machine texts"),
        files or [],
        text or [],
        model=model,
        reference=reference,
        scores=scores,
        innocent=human or [],
        guilty=machine or [],
        tokens=tokens,
        as_json=as_json,
    )

"""`nextoken membership`: whether a text was in a model's training data."""

from __future__ import annotations

from typing import Annotated

import typer

from nextoken.app._suspicion import Suspicion, examine


def membership(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Text files in UTF-8; `-` is stdin.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", metavar="TEXT", help="A text itself; may be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="The model whose training is asked about.")
    ] = "tiny",
    reference: Annotated[
        str | None,
        typer.Option("--reference", "-r", metavar="MODEL", help="A model of like training that did not see the texts."),
    ] = None,
    scores: Annotated[
        str, typer.Option("--scores", "-s", metavar="NAMES", help="Attacks with commas between, or `all`.")
    ] = "all",
    unseen: Annotated[
        list[str] | None,
        typer.Option(
            "--unseen",
            metavar="PLACE",
            help="Like texts surely not trained on: a file, a folder, or .jsonl; repeatable.",
        ),
    ] = None,
    seen: Annotated[
        list[str] | None,
        typer.Option("--seen", metavar="PLACE", help="Like texts trained on; both show each attack's power."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, metavar="N", help="Judge the first N tokens of every text only.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Look for signs that a model was trained on a text.

    Every attack is high where the text seems known to the model. With unseen texts of the same kind beside it, each
    also tells a p-value. The kinds must be alike but for the training: texts of another date, topic or author are told
    apart without any model, and so prove nothing.

    Examples:

        nextoken membership chapter.txt --model ./my-model
        nextoken membership chapter.txt --unseen other-chapters/ --tokens 200
        nextoken membership --unseen held-out.jsonl --seen trained.jsonl --model ./my-model --reference ./base
    """
    examine(
        Suspicion("member", "a model was trained on a text", "unseen texts", "texts trained on"),
        files or [],
        text or [],
        model=model,
        reference=reference,
        scores=scores,
        innocent=unseen or [],
        guilty=seen or [],
        tokens=tokens,
        as_json=as_json,
    )

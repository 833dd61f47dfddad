"""`nextoken read`: what a model says about texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nextoken.app._complaints import complain
from nextoken.app._loading import load_quietly
from nextoken.app._texts import Text, gather
from nextoken.errors import InputError, OutputError

SHOWN = 2_000
"""Tokens of each text printed at a terminal, some three screens; `--html` shows all."""

if TYPE_CHECKING:
    from nextoken.model.base import LanguageModel
    from nextoken.signature import Signature


def read(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Text files in UTF-8; `-` is stdin.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", metavar="TEXT", help="A text itself; may be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="Bundled name, Hugging Face id, folder or address.")
    ] = "tiny",
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="MODEL", help="A second model to read the same texts with.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=0, metavar="K", help="Alternatives kept for each token.")] = 10,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page to look at, complete in one file.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="Write the signature: a row per token.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")] = False,
    colour: Annotated[
        str, typer.Option("--colour", "--color", metavar="COLUMN", help="The column that colours the tokens.")
    ] = "logprob",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse texts with bytes that are not UTF-8.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No coloured text, no progress; just the summary.")
    ] = False,
) -> None:
    """Read texts under a model, exactly: how probable each token was, and what else was.

    Prints the text, coloured by how surprising each token was (at a terminal), and a line of figures for each text, all
    over the whole vocabulary. A text longer than the model's context is read in overlapping windows.

    Examples:

        nextoken read README.md
        nextoken read --text "It was the best of times, it was the worst of times."
        nextoken read book.txt --html book.html --parquet book.parquet --quiet
        cat notes.txt | nextoken read - --json
        nextoken read essay.txt --compare nano --colour kl
        nextoken read essay.txt --model http://localhost:8080/v1
    """
    texts = gather(files or [], text or [], strict=strict)
    check_outputs(html, parquet)
    _check_colour(colour, compare)
    reader = load_quietly(model)
    if top > reader.vocab.size:
        raise InputError(f"--top {top:,} is more than the {reader.vocab.size:,} tokens of {reader.name}")
    other = None if compare is None else load_quietly(compare)
    against = other if other is not None and other.vocab.digest == reader.vocab.digest else None

    progress = False if quiet or as_json else None
    signature = _read(reader, texts, against=against, top=top, progress=progress)
    if colour not in signature.columns:
        from nextoken.signature.columns import AGAINST

        needs = "two models with one tokenizer" if colour in AGAINST else "a server, which tells the top tokens only"
        raise InputError(f"this reading has no column {colour!r}: it takes {needs}")
    beside = comparison = None
    if other is not None and against is None:
        from nextoken.signature import compare as join

        beside = _read(other, texts, against=None, top=top, progress=progress)
        comparison = join(signature, beside)

    if parquet is not None:
        signature.to_parquet(parquet)
    if html is not None:
        signature.to_html(html, colour=colour)

    from nextoken.app._summary import as_record, lines, segment_lines

    if as_json:
        typer.echo(json.dumps(as_record(signature, beside, comparison), indent=2, ensure_ascii=False, allow_nan=False))
        return

    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal and not quiet:
        from nextoken.signature import terminal

        console.print(terminal.render(signature, colour=colour, summary=False, max_rows=SHOWN))
        console.print()
    for line in [*lines(signature, beside), *([] if comparison is None else segment_lines(comparison))]:
        console.print(line, markup=False, soft_wrap=True)
    for output in (parquet, html):
        if output is not None and not quiet:
            complain(f"wrote {output}")


def _read(
    model: LanguageModel, texts: list[Text], *, against: LanguageModel | None, top: int, progress: bool | None
) -> Signature:
    """The signature of the texts; what the person should know of how they were read goes to stderr."""
    import nextoken

    signature: Signature = nextoken.read(
        model,
        [text.data for text in texts],
        names=[text.name for text in texts],
        against=against,
        top=top,
        progress=progress,
    )
    unread = [text.name for text in signature.texts if not text.n_rows]
    if unread and signature.metadata.bos_text is None:
        raise InputError(
            f"{', '.join(unread)}: a single token, and {model.name} has no begin token to predict it from; "
            "give a longer text, or a model that has one"
        )
    if signature.metadata.bos_text is None:
        complain(f"{model.name} has no begin token, so the first token of each text is not scored")
    for text in signature.texts:
        if text.replaced:
            complain(
                f"{text.name}: {text.replaced:,} bytes are not UTF-8 and were read as U+FFFD (--strict refuses them)"
            )
    return signature


def check_outputs(*outputs: Path | None) -> None:
    """Refuse before the work is done what could not be written after it."""
    wanted = [output for output in outputs if output is not None]
    if len({output.resolve() for output in wanted}) < len(wanted):
        raise OutputError(f"two outputs would be written to {wanted[0]}")
    for output in wanted:
        if output.is_dir():
            raise OutputError(f"cannot write {output}: it is a directory; name a file in it")
        if output.exists() and not output.is_file():
            raise OutputError(f"cannot write {output}: it is a device or a pipe, and files are put in place whole")
        if not output.parent.is_dir():
            raise OutputError(f"cannot write {output}: there is no folder {output.parent}")


def _check_colour(colour: str, compare: str | None) -> None:
    from nextoken.signature.columns import AGAINST, COLUMNS, PLACE

    if colour in AGAINST and compare is None:
        raise InputError(f"column {colour!r} is of two models: name the second with --compare")
    known = [name for name in COLUMNS if name not in {*PLACE, "top_ids", "top_logprobs", "hidden"}]
    if colour not in known:
        raise InputError(f"cannot colour by {colour!r}; the columns to colour by are {', '.join(known)}")

"""`nextoken compress` and `nextoken decompress`: files coded by a model's next-token probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextoken.app._complaints import complain
from nextoken.app._loading import load_quietly
from nextoken.app._read import check_outputs
from nextoken.errors import InputError

SUFFIX = ".nxtc"


def compress(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Any file; text in the model's language gets smallest.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help=f"Where to write; FILE{SUFFIX} by default.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="Bundled name, Hugging Face id or folder.")
    ] = "tiny",
    streams: Annotated[
        int, typer.Option("--streams", min=1, metavar="N", help="Parts coded side by side: faster, a little larger.")
    ] = 16,
) -> None:
    """Compress a file to about the bits that a model finds surprising in it.

    Decompressing needs the same model, and a machine that computes the same numbers.

    Examples:

        nextoken compress book.txt
        nextoken compress notes.txt -o notes.small --model nano --streams 1
    """
    target = output or file.with_name(file.name + SUFFIX)
    check_outputs(target)
    from nextoken.scores.coder import compress_file

    made = compress_file(load_quietly(model), file, target, streams=streams)
    told = f"{made.length:,} bytes to {made.size:,}"
    complain(f"wrote {target}: {told}, {made.bits_per_byte:.3f} bits per byte" if made.length else f"wrote {target}")


def decompress(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `nextoken compress` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help=f"Where to write; FILE less its {SUFFIX} by default."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="The model that compressed it.")
    ] = "tiny",
) -> None:
    """Get back the file that was compressed, complete and checked, or nothing.

    Examples:

        nextoken decompress book.txt.nxtc
        nextoken decompress notes.small -o notes.txt --model nano
    """
    if output is None and file.suffix != SUFFIX:
        raise InputError(f"{file} does not end in {SUFFIX}: name the file to write with --output")
    target = output or file.with_suffix("")
    check_outputs(target)
    from nextoken.scores.coder import decompress_file

    length = decompress_file(load_quietly(model), file, target)
    complain(f"wrote {target}: {length:,} bytes")

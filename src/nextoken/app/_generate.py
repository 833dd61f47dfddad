"""`nextoken generate`: texts drawn from a model's distribution, as a transform leaves it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nextoken.app._complaints import complain
from nextoken.app._constraint import constraint
from nextoken.app._loading import load_quietly
from nextoken.app._read import check_outputs
from nextoken.app._speculation import speculation
from nextoken.errors import InputError

if TYPE_CHECKING:
    from nextoken.decode.generation import Generation
    from nextoken.decode.request import Piece


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; `-` is stdin.")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="Bundled name, Hugging Face id or folder.")
    ] = "tiny",
    transform: Annotated[
        str, typer.Option("--transform", "-t", metavar="RULE", help="Changes of the distribution, in order, with `|`.")
    ] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Most tokens to generate.")] = 128,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends the output; may be repeated.")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", metavar="N", help="How many texts to draw.")] = 1,
    seed: Annotated[int | None, typer.Option("--seed", help="Equal seeds give equal texts.")] = None,
    signature: Annotated[
        Path | None, typer.Option("--signature", metavar="FILE", help="Write what the model said of the output.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="The same as a page to look at.")] = None,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="Colour each piece by the entropy of the model's distribution.")
    ] = False,
    speculate: Annotated[
        str | None,
        typer.Option(
            "--speculate",
            metavar="DRAFT",
            help="Draft with auto, lookup, suffix, recycling, stand, or a model.",
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", metavar="PATTERN", help="The output matches it from end to end.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE", help="The output is JSON, valid under this schema.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", metavar="FILE", help="The output follows this Lark grammar.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the texts and their figures as JSON.")] = False,
) -> None:
    """Continue a text: draw tokens from the model's distribution, as the transform leaves it.

    A single text is printed as it is drawn. Without a transform it is plain sampling from the model.

    Examples:

        nextoken generate "It was the best of times," --seed 1
        nextoken generate "Call me" --transform "temperature(0.8) | top_p(0.95)" -n 3
        nextoken generate "Question: 2 + 2?" --transform greedy --stop "Question:"
        nextoken generate "The door opened" --transform "min_p(0.05) | temperature(1.5)" --entropy
        nextoken generate "Once upon a time" --signature once.parquet --html once.html
        nextoken generate "It was the best of times," --speculate nano
        nextoken generate "The year was" --regex " 1[0-9]{3}"
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    check_outputs(signature, html)
    wanted = constraint(regex, json_schema, grammar)
    reader = load_quietly(model)
    from nextoken.constrain.mask import Masked
    from nextoken.decode.generate import generate as draw
    from nextoken.decode.parsing import transform as parsed

    streams = n == 1 and not as_json
    show = _printer(entropy=entropy) if streams else None
    try:
        found = draw(
            reader,
            [text],
            transform=parsed(transform) if wanted is None else Masked(wanted) | parsed(transform),
            max_tokens=max_tokens,
            stop=stop or [],
            n=n,
            seed=seed,
            on_piece=show,
            entropies=entropy and streams,
            speculate=None if speculate is None else speculation(speculate),
        )
    except ValueError as error:  # what the library refuses as misuse is bad input here
        raise InputError(str(error)) from error
    made = found if isinstance(found, list) else [found]
    if streams:
        typer.echo()
    else:
        _print(made, as_json=as_json)
    if wanted is not None and not all(g.finish == "eos" or wanted.complete(g.text) for g in made):
        complain("an output was cut off before it was complete: raise --max-tokens")
    if signature is not None or html is not None:
        from nextoken.signature import Signature

        said = Signature.concat([generation.signature for generation in made])
        if signature is not None:
            said.to_parquet(signature)
        if html is not None:
            said.to_html(html, colour="entropy")
        for output in (signature, html):
            if output is not None:
                complain(f"wrote {output}")


def _printer(*, entropy: bool) -> Callable[[Piece], None]:
    """Prints each piece as it is drawn; at a terminal with nothing in it that the terminal could obey."""
    from rich.console import Console

    from nextoken.signature.terminal import tinted

    console = Console(highlight=False)

    def show(piece: Piece) -> None:
        if console.is_terminal:
            console.print(tinted(piece.text, "entropy" if entropy else None, piece.entropy), end="", soft_wrap=True)
        else:
            sys.stdout.write(piece.text)
        sys.stdout.flush()

    return show


def _print(made: list[Generation], *, as_json: bool) -> None:
    if as_json:
        records = [
            {
                "text": g.text,
                "finish": g.finish,
                "tokens": list(g.tokens),
                "surprisals": list(g.surprisals),
                "model_surprisals": [-value for value in g.signature.column("logprob").tolist()],
                "seed": g.request.seed,
            }
            for g in made
        ]
        typer.echo(json.dumps(records, indent=2, ensure_ascii=False))
        return
    for number, generation in enumerate(made, start=1):
        typer.echo(f"--- {number} ({generation.finish}, seed {generation.request.seed})")
        typer.echo(generation.text)

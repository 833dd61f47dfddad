"""The command `nextoken`. Commands import what they need when they run, so `nextoken --help` is there at once."""

from __future__ import annotations

from typing import Annotated

import typer

import nextoken
from nextoken.app._compare import compare
from nextoken.app._complaints import Complaints
from nextoken.app._compress import compress, decompress
from nextoken.app._detect import detect
from nextoken.app._generate import generate
from nextoken.app._membership import membership
from nextoken.app._methods import methods
from nextoken.app._models import models
from nextoken.app._read import read
from nextoken.app._score import score
from nextoken.app._serve import serve
from nextoken.app._verify import verify

app = typer.Typer(
    name="nextoken",
    cls=Complaints,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    read,
    score,
    detect,
    membership,
    compare,
    generate,
    compress,
    decompress,
    models,
    methods,
    verify,
    serve,
)
for command in COMMANDS:
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nextoken {nextoken.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error show where in the code it arose.")] = False,
) -> None:
    """The next-token distribution of language models.

    A model is named by `tiny` or `nano` (they ship with nextoken), a Hugging Face id, a folder, or the address of an
    OpenAI-compatible server.
    """


def main() -> None:
    """Run the command line on the arguments of the process."""
    app(prog_name="nextoken")

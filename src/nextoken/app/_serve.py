"""`nextoken serve`: any model behind the protocol of OpenAI's completions."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import ip_address
from typing import Annotated

import typer

from nextoken.app._complaints import complain
from nextoken.app._loading import load_quietly


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name, Hugging Face id or folder.")],
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Address to listen on; by default this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="0 is any free port.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What the model is called to clients.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="NEXTOKEN_API_KEY", metavar="KEY", help="Require this key (or set NEXTOKEN_API_KEY)."
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP: OpenAI's completions with log-probabilities, until interrupted.

    The address to give to clients ends in /v1. Needs the extra [serve].

    Examples:

        nextoken serve nano
        nextoken serve ./my-finetuned-model --port 8080 --name mine
    """
    from nextoken.app import service

    source = load_quietly(model)
    if not api_key and not _is_loopback(host):
        complain(f"anyone who reaches {host}:{port} can use the model; --api-key lets in only those who know it")
    with suppress(KeyboardInterrupt):  # the way to stop a server
        service.serve(source, host, port, name=name, api_key=api_key or None)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

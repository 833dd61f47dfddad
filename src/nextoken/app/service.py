"""An HTTP service that answers for any language model in the way of OpenAI's completions.

from nextoken.app.service import serve

serve(nextoken.load("nano"))  # http://127.0.0.1:8000/v1/completions
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nextoken.errors import ModelError, NextokenError
from nextoken.model.base import LanguageModel

if TYPE_CHECKING:
    from fastapi import FastAPI

_STARTING = 30.0
"""Seconds a service may take to come up."""


def create_app(
    model: LanguageModel, *, name: str | None = None, api_key: str | None = None, max_logprobs: int = 1000
) -> FastAPI:
    """A FastAPI application that serves one model.

    GET /health, GET /v1/models, POST /v1/completions (prompts as text or token ids, one or many; max_tokens,
    temperature, n, seed, stop, echo, logprobs, prompt_logprobs), POST /tokenize and POST /detokenize (the forms of vLLM
    and of llama.cpp). Log-probabilities are the model's own, in nats, before any temperature; -9999 stands for log 0.
    Text gets the begin token in front where the model has one. What is not offered is refused with an error in OpenAI's
    shape. One request is computed at a time.

    Args:
        name: what the model is called to clients; its own name by default.
        api_key: if given, requests must carry it as `Authorization: Bearer ...`.
        max_logprobs: greatest number of log-probabilities per token a client may ask for.

    Raises:
        ModelError: the model knows only its most probable tokens (a remote server), so it cannot be sampled from.
        NextokenError: FastAPI is not installed.
    """
    if model.is_partial:
        raise ModelError(
            f"{model.name} tells only its most probable tokens, so it cannot be served: load the model itself"
        )
    try:
        from nextoken.app._endpoints import build
    except ImportError as error:
        raise NextokenError("serving needs FastAPI and uvicorn: pip install 'nextoken[serve]'") from error
    return build(model, name=name or model.name, api_key=api_key, max_logprobs=max_logprobs)


def serve(
    model: LanguageModel,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    name: str | None = None,
    api_key: str | None = None,
    max_logprobs: int = 1000,
    log_level: str = "info",
) -> None:
    """Serve a model until interrupted; by default to this machine only. Arguments and errors as for `create_app`."""
    app = create_app(model, name=name, api_key=api_key, max_logprobs=max_logprobs)
    import uvicorn

    listening = _bound(host, port)
    with listening:
        uvicorn.Server(uvicorn.Config(app, log_level=log_level)).run(sockets=[listening])


@contextmanager
def serving(
    model: LanguageModel,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    name: str | None = None,
    api_key: str | None = None,
    max_logprobs: int = 1000,
) -> Iterator[str]:
    """Serve a model from a thread as long as the `with` block lasts, and give its address; port 0 is any free one."""
    app = create_app(model, name=name, api_key=api_key, max_logprobs=max_logprobs)
    import uvicorn

    with _bound(host, port) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + _STARTING
            while not server.started:
                if not thread.is_alive() or time.monotonic() > deadline:
                    raise NextokenError(f"the service did not start within {_STARTING:.0f} seconds")
                time.sleep(0.01)
            yield f"http://{host}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=_STARTING)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise NextokenError(f"cannot serve on {host}:{port}: {error}") from error
    return listening

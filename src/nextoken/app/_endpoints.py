"""The endpoints of the service and the shape of its errors."""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nextoken.app._completion import complete
from nextoken.app._completion_request import CompletionRequest, Refusal, checked
from nextoken.app._tokenization import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from nextoken.errors import NextokenError
from nextoken.model.base import LanguageModel

_KINDS = {401: "authentication_error", 404: "not_found_error", 500: "server_error"}


def build(model: LanguageModel, *, name: str, api_key: str | None, max_logprobs: int) -> FastAPI:
    """The application; see `service.create_app`."""
    started = int(time.time())
    most = None if model.context_length is None else model.context_length + 1
    computing = threading.Lock()

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not secrets.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise Refusal("missing or wrong API key", code="invalid_api_key", status=401)

    def meant(given: str | None) -> None:
        if given is not None and given != name:
            message = f"the model {given!r} does not exist here; this server has {name!r}"
            raise Refusal(message, param="model", code="model_not_found", status=404)

    app = FastAPI(title="nextoken", dependencies=[Depends(authorised)])
    _explain_errors(app)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        vocab = model.vocab
        meta = {"n_vocab": vocab.size, "vocab_digest": vocab.digest, "digest": model.digest, "dtype": model.dtype}
        entry = {"id": name, "object": "model", "created": started, "owned_by": "nextoken", "max_model_len": most}
        return {"object": "list", "data": [{**entry, "meta": meta}]}

    @app.post("/v1/completions")
    def completions(request: CompletionRequest) -> JSONResponse:
        meant(request.model)
        order = checked(request, model, max_logprobs=max_logprobs)
        with computing:
            choices, generated = complete(model, order)
        read = sum(map(len, order.prompts))
        answer = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "choices": choices,
            "usage": {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated},
        }
        # Made here: what FastAPI does to find out how to write a value takes longer than reading the prompt.
        return JSONResponse(answer)

    @app.post("/tokenize")
    def to_tokens(request: TokenizeRequest) -> dict[str, Any]:
        meant(request.model)
        return tokenize(request, model) | {"max_model_len": most}

    @app.post("/detokenize")
    def to_text(request: DetokenizeRequest) -> dict[str, Any]:
        meant(request.model)
        return detokenize(request, model)

    return app


def _explain_errors(app: FastAPI) -> None:
    """Every error as {"error": {"message", "type", "param", "code"}}."""

    @app.exception_handler(Refusal)
    def on_refusal(_: Request, error: Refusal) -> JSONResponse:
        return _refused(str(error), error.status, param=error.param, code=error.code)

    @app.exception_handler(HTTPException)
    def on_http(request: Request, error: HTTPException) -> JSONResponse:
        return _refused(f"{request.method} {request.url.path}: {error.detail}", error.status_code)

    @app.exception_handler(RequestValidationError)
    def on_malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        return _refused(f"{where[0] if where else 'body'}: {first['msg']}", 400, param=where[0] if where else None)

    @app.exception_handler(NextokenError)
    def on_error(_: Request, error: NextokenError) -> JSONResponse:
        return _refused(str(error), 500)


def _refused(message: str, status: int, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    error = {"message": message, "type": _KINDS.get(status, "invalid_request_error"), "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)

"""Text to token ids and back over HTTP, in the forms of vLLM (`prompt`) and llama.cpp (`content`)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from nextoken.app._completion_request import Refusal, tokens_of
from nextoken.model.base import LanguageModel


class TokenizeRequest(BaseModel):
    """The body of /tokenize: one of `prompt` (begin token added unless refused) and `content` (only if asked for)."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool = True
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeRequest(BaseModel):
    """The body of /detokenize."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str | None = None
    tokens: list[int]


def tokenize(request: TokenizeRequest, model: LanguageModel) -> dict[str, Any]:
    """The tokens, as ids or with the text of each (a list of bytes where it is no UTF-8), and their number."""
    if (request.prompt is None) == (request.content is None):
        raise Refusal("give the text as 'prompt' or as 'content'", param="prompt")
    text = request.content if request.prompt is None else request.prompt
    assert text is not None
    special = request.add_special if request.prompt is None else request.add_special_tokens
    begins = bool(text) or (special and model.vocab.bos_id is not None)
    ids = tokens_of(text, model, special=special) if begins else []
    tokens = [{"id": i, "piece": _piece(model.vocab.token_bytes[i])} for i in ids] if request.with_pieces else ids
    return {"tokens": tokens, "count": len(ids)}


def detokenize(request: DetokenizeRequest, model: LanguageModel) -> dict[str, Any]:
    """The text of the tokens, specials left out, invalid UTF-8 replaced."""
    text = model.vocab.decode_text(tokens_of(request.tokens, model, special=False)) if request.tokens else ""
    return {"content": text, "prompt": text}


def _piece(spelled: bytes) -> str | list[int]:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)

"""What a client may ask of /v1/completions, checked: anything not offered is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nextoken.model.base import LanguageModel

MOST_SEQUENCES = 256
MOST_TOKENS = 1 << 16
"""Most tokens generated per sequence, for models without a limit of their own."""

# Fields that other servers know: offered only at the value that changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "stream": (False,),
    "stream_options": (),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
}
_WITHOUT_EFFECT = {"user", "metadata", "store"}


class Refusal(Exception):
    """A request that cannot be served: status 4xx and what to change."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


_TokenIds = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(BaseModel):
    """The body of /v1/completions."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=(), allow_inf_nan=False)

    model: str | None = None
    prompt: str | _TokenIds | list[str] | list[_TokenIds] = ""
    max_tokens: int | None = Field(16, ge=0)
    temperature: float | None = Field(1.0, ge=0, le=100)
    n: int | None = Field(1, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool | None = True
    return_tokens_as_token_ids: bool | None = False
    return_token_ids: bool | None = False


@dataclass(frozen=True)
class Order:
    """A checked request: prompts as token ids, and how to go on from each."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    temperature: float
    choices: int
    seed: int | None
    stop: tuple[bytes, ...]
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    names_as_ids: bool
    with_ids: bool


def checked(request: CompletionRequest, model: LanguageModel, *, max_logprobs: int) -> Order:
    """The order that a request amounts to.

    Raises:
        Refusal: something in it is not offered, or does not fit the model.
    """
    for name, value in (request.model_extra or {}).items():
        if name not in _NEUTRAL and name not in _WITHOUT_EFFECT:
            raise Refusal(f"unknown field {name!r}", param=name)
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            raise Refusal(f"{name}={value!r} is not offered by this server: leave it out", param=name)
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(request, name)
        if wanted is not None and wanted > max_logprobs:
            raise Refusal(f"{name}={wanted} is more than this server gives, {max_logprobs}", param=name)
    prompts = _prompts(request, model)
    choices = request.n or 1
    if len(prompts) * choices > MOST_SEQUENCES:
        raise Refusal(f"{len(prompts)} prompts with n={choices} are more than {MOST_SEQUENCES} sequences", param="n")
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    if max_tokens > MOST_TOKENS:
        raise Refusal(f"max_tokens={max_tokens} is more than {MOST_TOKENS}", param="max_tokens")
    if model.context_length is not None:
        # The last token generated is never fed.
        longest = max(map(len, prompts))
        if longest + max_tokens > model.context_length + 1:
            raise Refusal(
                f"a prompt of {longest} tokens and max_tokens={max_tokens} are more than this model's context takes, "
                f"{model.context_length + 1} together",
                param="prompt",
                code="context_length_exceeded",
            )
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if not all(stop):
        raise Refusal("stop strings must not be empty", param="stop")
    return Order(
        prompts=tuple(map(tuple, prompts)),
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        choices=choices,
        seed=request.seed,
        stop=tuple(text.encode() for text in stop),
        echo=bool(request.echo),
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        names_as_ids=bool(request.return_tokens_as_token_ids),
        with_ids=bool(request.return_token_ids),
    )


def _prompts(request: CompletionRequest, model: LanguageModel) -> list[list[int]]:
    given: Any = request.prompt
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if given == []:
        raise Refusal("prompt is an empty list", param="prompt")
    special = request.add_special_tokens is not False
    return [tokens_of(prompt, model, special=special) for prompt in several]


def tokens_of(prompt: str | Sequence[int], model: LanguageModel, *, special: bool) -> list[int]:
    """Token ids of one prompt; text gets the begin token in front where the model has one and `special` is wanted."""
    vocab = model.vocab
    if isinstance(prompt, str):
        try:
            encoded = list(vocab.encode(prompt).ids)
        except ValueError as error:
            raise Refusal(f"the prompt cannot be written in this model's tokens: {error}", param="prompt") from error
        ids = ([vocab.bos_id] if special and vocab.bos_id is not None else []) + encoded
    else:
        ids = list(prompt)
        wrong = [token for token in ids if not 0 <= token < vocab.size]
        if wrong:
            raise Refusal(f"token id {wrong[0]} is outside the vocabulary of {vocab.size}", param="prompt")
    if not ids:
        raise Refusal("the prompt is empty and this model has no begin token to start from", param="prompt")
    return ids

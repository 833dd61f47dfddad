"""generate() and stream(): prompts in, texts out."""

from __future__ import annotations

import hashlib
import importlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, overload

from nextoken.decode.generation import Generation
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.request import Piece, Request
from nextoken.decode.transform import Chain, Transform
from nextoken.model.base import LanguageModel
from nextoken.model.loading import load


class Decoding(Protocol):
    """A way of decoding: it makes the loop in which texts are drawn."""

    def loop(self, model: LanguageModel, *, max_rows: int = 64, entropies: bool = False) -> Loop: ...


Chat: TypeAlias = Sequence[Mapping[str, str]]
Prompt: TypeAlias = str | Chat


@overload
def generate(
    model: LanguageModel | str | Path,
    prompt: str,
    *,
    transform: Transform | str | None = None,
    max_tokens: int = 128,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    ignore_eos: bool = False,
    max_rows: int = 64,
    speculate: Decoding | str | None = None,
    on_piece: Callable[[Piece], object] | None = None,
    entropies: bool = False,
) -> Generation: ...


@overload
def generate(
    model: LanguageModel | str | Path,
    prompt: Prompt | Sequence[Prompt],
    *,
    transform: Transform | str | None = None,
    max_tokens: int = 128,
    stop: str | Sequence[str] = (),
    n: int = 1,
    seed: int | None = None,
    ignore_eos: bool = False,
    max_rows: int = 64,
    speculate: Decoding | str | None = None,
    on_piece: Callable[[Piece], object] | None = None,
    entropies: bool = False,
) -> Generation | list[Generation]: ...


def generate(
    model: LanguageModel | str | Path,
    prompt: Prompt | Sequence[Prompt],
    *,
    transform: Transform | str | None = None,
    max_tokens: int = 128,
    stop: str | Sequence[str] = (),
    n: int = 1,
    seed: int | None = None,
    ignore_eos: bool = False,
    max_rows: int = 64,
    speculate: Decoding | str | None = None,
    on_piece: Callable[[Piece], object] | None = None,
    entropies: bool = False,
) -> Generation | list[Generation]:
    """Draw texts from transform(p): at each step a token from the model's distribution as the transform leaves it.

    Args:
        model: a model, or what `nextoken.load` takes.
        prompt: a text, a conversation (list of {"role", "content"}, laid out by the tokenizer's chat template), or a
            list of either. The begin token, if there is one, is put before a text.
        transform: changes of the distribution, e.g. `Temperature(0.8) | TopP(0.95)` or the same as text
            (`"temperature(0.8) | top_p(0.95)"`); none means plain sampling from the model, `"greedy"` its best token.
        max_tokens: most tokens per text.
        stop: texts that end the output, matched on bytes across tokens; not part of it.
        n: texts per prompt; they share the work of reading it.
        seed: equal seeds give equal tokens, whatever else is generated at the same time; None draws one, which the
            result's `request.seed` tells. The i-th of n texts uses a seed derived from it and i. The prompts of a call
            share it, so that a text is the same alone and in a list: for texts of different prompts that are to be
            independent, call once per prompt with seeds of their own.
        ignore_eos: go on after an end token.
        max_rows: most sequences at work at once.
        speculate: how to draw several tokens per pass of the model without a change of their law, a
            `nextoken.speculate.Speculation`; or the name of one of `nextoken.speculate.NAMES`.
        on_piece: called with every piece as it is drawn; its `ticket` counts the texts in the order they are returned.
        entropies: whether pieces tell the entropy of the model's distribution.

    Returns:
        A Generation for one prompt and n = 1, else a list: all of the first prompt, then all of the second, ...

    Raises:
        ValueError: a limit is out of range, the prompt is empty or does not fit the context, or the transform removes
            every token.
        ModelError: the model cannot be loaded.
    """
    p = load(model)
    prompts, single = listed(prompt)
    requests = _requests(p, prompts, transform, max_tokens, stop, n, seed, ignore_eos)
    loop = _loop(p, speculate, max_rows=max_rows, entropies=entropies)
    running = {loop.submit(request): request for request in requests}
    pieces: dict[int, list[Piece]] = {ticket: [] for ticket in running}
    for piece in loop.run():
        pieces[piece.ticket].append(piece)
        if on_piece is not None:
            on_piece(piece)
    made = [generation_of(pieces[ticket], request, p) for ticket, request in running.items()]
    return made[0] if single and n == 1 else made


def stream(
    model: LanguageModel | str | Path,
    prompt: Prompt,
    *,
    transform: Transform | str | None = None,
    max_tokens: int = 128,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    ignore_eos: bool = False,
    speculate: Decoding | str | None = None,
    entropies: bool = False,
) -> Iterator[Piece]:
    """The pieces of one text as they are drawn; their `text` joined is what `generate` would return.

    Never half a character, never a part of a stop string. Closing the iterator frees the model's memory of the text.
    Arguments and errors as of `generate`; with `entropies` each piece tells the entropy of the model's distribution.
    """
    p = load(model)
    loop = _loop(p, speculate, max_rows=1, entropies=entropies)
    (request,) = _requests(p, [prompt], transform, max_tokens, stop, 1, seed, ignore_eos)
    loop.submit(request)
    return loop.run()


def _loop(model: LanguageModel, way: Decoding | str | None, *, max_rows: int, entropies: bool) -> Loop:
    if way is None:
        return Loop(model, max_rows=max_rows, entropies=entropies)
    # By name, as the registry finds methods: speculation stands above decoding and is imported only when asked for.
    found: Decoding = importlib.import_module("nextoken.speculate").named(way) if isinstance(way, str) else way
    return found.loop(model, max_rows=max_rows, entropies=entropies)


def derived_seed(seed: int, sample: int) -> int:
    """The seed of the i-th text of a call; the first has the call's own."""
    if sample == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}".encode()).digest()[:8], "big")


def prompt_tokens(model: LanguageModel, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt, begin token included.

    Raises:
        ValueError: a conversation is given to a model without a chat template, or the prompt has no token at all.
    """
    if not isinstance(prompt, str):
        return model.vocab.chat(prompt)
    begin = () if model.vocab.bos_id is None else (model.vocab.bos_id,)
    return (*begin, *model.vocab.encode(prompt).ids)


def listed(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts of a call, and whether it was one alone."""
    if isinstance(prompt, str):
        return [prompt], True
    if prompt and all(isinstance(turn, Mapping) for turn in prompt):
        return [prompt], True  # type: ignore[list-item]
    return list(prompt), False  # type: ignore[arg-type]


def _requests(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    transform: Transform | str | None,
    max_tokens: int,
    stop: str | Sequence[str],
    n: int,
    seed: int | None,
    ignore_eos: bool,
) -> list[Request]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rule = parsed(transform) if isinstance(transform, str) else transform or Chain()
    stops = tuple(text.encode() for text in ([stop] if isinstance(stop, str) else stop))
    root = secrets.randbits(63) if seed is None else seed
    return [
        Request(
            prompt=prompt_tokens(model, prompt),
            transform=rule,
            max_tokens=max_tokens,
            stops=stops,
            seed=derived_seed(root, sample),
            ignore_eos=ignore_eos,
        )
        for prompt in prompts
        for sample in range(n)
    ]


def generation_of(pieces: Sequence[Piece], request: Request, model: LanguageModel) -> Generation:
    """The text that the pieces of a finished request make."""
    last = pieces[-1]
    assert last.finish is not None
    return Generation(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(piece.token for piece in pieces),
        finish=last.finish,
        surprisals=tuple(piece.surprisal for piece in pieces),
        request=request,
        model=model,
        coins=last.coins,
    )

"""Responses: independent texts of many prompts, what values and predictors are learnt from."""

from __future__ import annotations

from collections.abc import Sequence

from nextoken.decode.generate import Prompt, derived_seed, prompt_tokens
from nextoken.decode.generation import Generation
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.request import Piece, Request
from nextoken.decode.transform import Chain, Transform
from nextoken.model.base import LanguageModel


def responses(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    transform: Transform | str | None = None,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    max_rows: int = 64,
) -> list[list[Generation]]:
    """n texts of every prompt, all drawn independently: made[i][j] is text j of prompt i.

    It draws as `nextoken.generate(model, prompts[i], n=n, seed=derived_seed(seed, i + 1))` does, for all prompts in one
    loop; `generate` itself gives all prompts of a call the same random numbers.

    Args:
        model, transform, max_tokens, stop, max_rows: as of `nextoken.generate`.
        prompts: any number.
        n: texts of each.
        seed: equal seeds give equal texts.

    Raises:
        ValueError: as of `nextoken.generate`.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rule = parsed(transform) if isinstance(transform, str) else transform or Chain()
    stops = tuple(text.encode() for text in ([stop] if isinstance(stop, str) else stop))
    requests = [
        Request(ids, rule, max_tokens, stops, derived_seed(derived_seed(seed, number + 1), sample))
        for number, ids in enumerate(prompt_tokens(model, prompt) for prompt in prompts)
        for sample in range(n)
    ]
    loop = Loop(model, max_rows=max_rows)
    pieces: list[list[Piece]] = [[] for _ in requests]
    for request in requests:
        loop.submit(request)
    for piece in loop.run():
        pieces[piece.ticket].append(piece)
    made = [_joined(parts, request, model) for parts, request in zip(pieces, requests, strict=True)]
    return [made[at : at + n] for at in range(0, len(made), n)]


def _joined(pieces: Sequence[Piece], request: Request, model: LanguageModel) -> Generation:
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

"""think(): a phase of thought in mixtures of tokens, then an answer in tokens.

made = think(model, "2 + 2 = ?<think>", SoftThinking(), end_of_thinking="</think>", seed=1)
made.answer.text, made.ended, made.text           # the answer, why thinking ended, the tokens noted on the way
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from nextoken.decode._thinking import ThinkingRow, think_in_step
from nextoken.decode.generate import Prompt, derived_seed, generation_of, listed, prompt_tokens
from nextoken.decode.generation import Generation
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.request import Piece, Request, Running
from nextoken.decode.thinking import Thinking
from nextoken.decode.thought import Thought
from nextoken.decode.transform import Chain, Transform
from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.model.loading import load
from nextoken.model.soft import Recalled, SoftModel, soft_model
from nextoken.model.vocab import Vocab


@overload
def think(
    model: LanguageModel | str | Path,
    prompt: str,
    thinking: Thinking,
    *,
    end_of_thinking: str | int | None = "</think>",
    answer_prefix: str = "",
    max_thinking_tokens: int = 1024,
    transform: Transform | str | None = None,
    max_tokens: int = 128,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    ignore_eos: bool = False,
    max_rows: int = 64,
) -> Thought: ...


@overload
def think(
    model: LanguageModel | str | Path,
    prompt: Prompt | Sequence[Prompt],
    thinking: Thinking,
    *,
    end_of_thinking: str | int | None = "</think>",
    answer_prefix: str = "",
    max_thinking_tokens: int = 1024,
    transform: Transform | str | None = None,
    max_tokens: int = 128,
    stop: str | Sequence[str] = (),
    n: int = 1,
    seed: int | None = None,
    ignore_eos: bool = False,
    max_rows: int = 64,
) -> Thought | list[Thought]: ...


@torch.no_grad()
def think(
    model: LanguageModel | str | Path,
    prompt: Prompt | Sequence[Prompt],
    thinking: Thinking,
    *,
    end_of_thinking: str | int | None = "</think>",
    answer_prefix: str = "",
    max_thinking_tokens: int = 1024,
    transform: Transform | str | None = None,
    max_tokens: int = 128,
    stop: str | Sequence[str] = (),
    n: int = 1,
    seed: int | None = None,
    ignore_eos: bool = False,
    max_rows: int = 64,
) -> Thought | list[Thought]:
    """Feed x_1, x_2, ... of the policy in place of tokens until thinking ends, then draw the answer from transform(p).

        x_t = thinking(p(. | prompt, x_1 .. x_t-1));  answer ~ p(. | prompt, x_1 .. x_S, closing)

    Before each step, in this order: the limit is looked at, the policy makes its mixture, Cold Stop counts, and the
    token noted may be the marker or an end token. However thinking ends but by an end token, the marker is then fed as
    the token it is, never as a mixture.

    Args:
        model: a transformers model that remembers keys and values, or any `SoftModel`; or what `nextoken.load` takes.
        prompt: as of `generate`. What begins the thought ("<think>\\n") is a part of it.
        thinking: a policy of `nextoken.decode.mixtures`: `SoftThinking`, `NoisySoft`, `TokenMixture`,
            `DirichletMixture`; `TokenMixture(1, transform)` thinks in ordinary tokens.
        end_of_thinking: the marker: a text of one token, or its id. Of a text of several tokens the last is the marker,
            as in Soft Thinking's code. None: nothing but Cold Stop and the limit ends a thought, and nothing marks it.
        answer_prefix: a text fed before the answer, and no part of it.
        max_thinking_tokens: S at most; after as many soft steps the thought is closed.
        transform, max_tokens, stop, ignore_eos: of the answer, as of `generate`; an end token in the answer ends it
            unless ignored. In the thought it ends the whole.
        n: texts per prompt. Where the policy draws nothing they share one thought.
        seed: as of `generate`, and with the same numbers: each text is the same in any company. But what a batch
            changes by rounding goes on from step to step in a mixture, where the drawing of a token would forget it.
        max_rows: most sequences at work at once.

    Returns:
        A Thought for one prompt and n = 1, else a list: all of the first prompt, then all of the second, ...

    Raises:
        ModelError: the model cannot be fed mixtures.
        ValueError: a limit is out of range, the marker is no token of the model, or prompt, thought and closing do not
            fit the context.

    Source: the phases are those of Soft Thinking, arXiv:2505.15778, with a thought closed at its limit, where its
        released code ends the text; that code also goes on to count Cold Stop in the answer, which is not done here.
        Fixed lengths (`end_of_thinking=None`) and the answer's prefix: arXiv:2505.23648 and arXiv:2509.19170.
    """
    p = soft_model(load(model))
    prompts, single = listed(prompt)
    for name, value in (("n", n), ("max_rows", max_rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if max_thinking_tokens < 0:
        raise ValueError(f"max_thinking_tokens must be at least 0, got {max_thinking_tokens}")
    marker = None if end_of_thinking is None else marker_of(p.vocab, end_of_thinking)
    closing = (*(() if marker is None else (marker,)), *p.vocab.encode(answer_prefix).ids)
    root = secrets.randbits(63) if seed is None else seed
    seeds = [derived_seed(root, sample) for sample in range(n)]
    texts = [prompt_tokens(p, text) for text in prompts]
    for text in texts:
        _check_room(p, text, max_thinking_tokens, closing)
    rule = parsed(transform) if isinstance(transform, str) else transform or Chain()
    stops = tuple(word.encode() for word in ([stop] if isinstance(stop, str) else stop))
    sample = Request((0,), rule, max_tokens, stops, ignore_eos=ignore_eos)  # checks the settings of the answer
    drawn = thinking.is_random
    rows = [
        ThinkingRow(number, Request(text, thinking.transform, max(1, max_thinking_tokens), seed=own), seeds)
        for number, (text, own) in enumerate((text, own) for text in texts for own in (seeds if drawn else seeds[:1]))
    ]
    scale, made = p.embedding_scale(), []
    share = max(1, max_rows if drawn else max_rows // n)
    for begin in range(0, len(rows), share):
        going = rows[begin : begin + share]
        think_in_step(p, going, thinking, marker, closing, max_thinking_tokens, scale)
        made += _answered(p, going, sample, closing, resumes=drawn)
    return made[0] if single and n == 1 else made


class _Resumed(Running):
    """An answer at work, on the random numbers of its thought where that drew any."""

    def __init__(self, ticket: int, request: Request, thinker: ThinkingRow | None) -> None:
        super().__init__(ticket, request)
        if thinker is not None:
            self._random = thinker._random


class _Answers(Loop):
    """The loop, begun with rows that have been read already."""

    def __init__(self, model: LanguageModel, rows: list[Running], state: State, logits: Tensor) -> None:
        super().__init__(model, max_rows=len(rows))
        self._rows, self._state, self._logits = rows, state, logits


def _answered(
    model: SoftModel, rows: Sequence[ThinkingRow], sample: Request, closing: tuple[int, ...], *, resumes: bool
) -> list[Thought]:
    """The thoughts of rows, each with as many answers as it has seeds, or with one if it was drawn for one seed."""
    going: list[Running] = []
    states, logits, source = [], [], []
    for row in rows:
        if row.state is None or row.logits is None:
            continue
        recalled = _recalled(model, row)
        prompt = (*row.request.prompt, *row.tokens[: len(row.vectors)], *closing)
        for seed in [row.request.seed] if resumes else row.seeds:
            request = Request(prompt, sample.transform, sample.max_tokens, sample.stops, seed, sample.ignore_eos)
            going.append(_Resumed(len(going), request, row if resumes else None))
            states.append(row.state)
            logits.append(row.logits)
            source.append((row, recalled))
    pieces: list[list[Piece]] = [[] for _ in going]
    requests = [running.request for running in going]
    if going:
        loop = _Answers(
            model, going, states[0].join(*states[1:]) if len(states) > 1 else states[0], torch.stack(logits)
        )
        for piece in loop.run():
            pieces[piece.ticket].append(piece)
    answers: dict[int, list[Generation]] = {row.ticket: [] for row in rows}
    for (row, recalled), said, request in zip(source, pieces, requests, strict=True):
        answers[row.ticket].append(generation_of(said, request, recalled))
    made = []
    for row in rows:
        count = 1 if resumes else len(row.seeds)
        given: list[Generation | None] = [*answers[row.ticket]] or [None] * count
        made += [_thought(model, row, closing, answer) for answer in given]
    return made


def _thought(model: SoftModel, row: ThinkingRow, closing: tuple[int, ...], answer: Generation | None) -> Thought:
    assert row.ended is not None
    width = max((len(ids) for ids in row.ids), default=0)
    ids = torch.full((len(row.ids), width), ABSENT)
    weights = torch.zeros(len(row.ids), width)
    for at, (own, shares) in enumerate(zip(row.ids, row.weights, strict=True)):
        ids[at, : len(own)], weights[at, : len(own)] = own, shares
    return Thought(
        prompt=row.request.prompt,
        tokens=tuple(row.tokens),
        ids=ids,
        weights=weights,
        entropies=torch.tensor(row.entropies, dtype=torch.float64),
        log_probs=None if row.log_probs is None else torch.tensor(row.log_probs, dtype=torch.float64),
        vectors=torch.stack(row.vectors) if row.vectors else torch.zeros(0, model.embedding_width),
        closing=() if row.ended == "eos" else closing,
        ended=row.ended,
        answer=answer,
        vocab=model.vocab,
    )


def _recalled(model: SoftModel, row: ThinkingRow) -> Recalled:
    vectors = torch.stack(row.vectors) if row.vectors else torch.zeros(0, model.embedding_width)
    return Recalled(model, len(row.request.prompt), vectors)


def marker_of(vocab: Vocab, marker: str | int) -> int:
    """The id that ends a thought: the token or special of this name, else the last token of the text.

    Raises:
        ValueError: an id outside the vocabulary, or a text that the vocabulary cannot spell.
    """
    if isinstance(marker, int):
        if not 0 <= marker < vocab.size:
            raise ValueError(f"the end of thinking is token {marker}, outside the vocabulary of {vocab.size}")
        return marker
    named = [token for token in vocab.specials if vocab.label(token) == marker]
    if named:
        return named[0]
    try:
        ids = vocab.encode(marker).ids
    except ValueError:
        ids = ()
    if not ids or vocab.decode(ids).strip() != marker.encode().strip():
        raise ValueError(
            f"the end of thinking, {marker!r}, is no token of this model and cannot be spelled in it: give "
            "end_of_thinking a text or an id that the model was trained with, or None to think for a fixed length"
        )
    return ids[-1]


def _check_room(model: SoftModel, prompt: tuple[int, ...], limit: int, closing: tuple[int, ...]) -> None:
    needed, room = len(prompt) + limit + len(closing), model.context_length
    if room is not None and needed > room:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens, max_thinking_tokens={limit} and {len(closing)} to close the thought do "
            f"not fit the context of {model.name}, {room}: lower max_thinking_tokens"
        )

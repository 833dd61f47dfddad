"""Completions of checked orders: what the model says of the prompts, and a plain sampling loop."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nextoken.app._completion_request import Order
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.next import DenseNext, Next
from nextoken.model.vocab import Vocab

IMPOSSIBLE = -9999.0
"""Stands for log 0, which JSON has no number for."""


@dataclass(frozen=True)
class Said:
    """What the model says of one token: its log-probability, rank, and the most probable in its place."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass
class Continuation:
    """One prompt and what it is continued with."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    text: bytes = b""
    finished: str | None = None


@torch.inference_mode()
def complete(model: LanguageModel, order: Order) -> tuple[list[dict[str, Any]], int]:
    """The `choices` of the answer, all of the first prompt, then of the second, ...; and how many tokens they have."""
    prompts = _padded(order.prompts)
    state = model.start(len(order.prompts))
    following = model.extend(state, prompts)
    read = _read(following, order) if order.prompt_logprobs is not None or _echoes(order) else None
    sequences = [Continuation(prompt) for prompt in order.prompts for _ in range(order.choices)]
    last = torch.zeros_like(prompts, dtype=torch.bool)
    last[torch.arange(len(prompts)), (prompts != ABSENT).sum(1) - 1] = True
    next_ = following[last]
    if order.choices > 1:
        copies = [row for row in range(len(prompts)) for _ in range(order.choices)]
        state, next_ = state.fork(copies), next_[copies]
    generators = _generators(order, len(sequences))
    for step in range(order.max_tokens):
        tokens = _choose(next_, order.temperature, generators)
        _grow(sequences, tokens, _said(next_, tokens[:, None], order.logprobs or 0), model.vocab, order)
        if step + 1 == order.max_tokens or all(sequence.finished for sequence in sequences):
            break
        alive = torch.tensor([sequence.finished is None for sequence in sequences])
        next_ = model.extend(state, torch.where(alive, tokens, ABSENT)[:, None])
    choices = [
        _choice(index, sequence, None if read is None else read[index // order.choices], model.vocab, order)
        for index, sequence in enumerate(sequences)
    ]
    return choices, sum(len(sequence.tokens) for sequence in sequences)


def _choose(next_: Next, temperature: float, generators: list[torch.Generator] | None) -> Tensor:
    """One token per row [B] of a Next [B, 1]: the most probable at temperature 0, else drawn from p^(1/T) / Z."""
    log_probs = next_.log_probs()
    if temperature == 0:
        return log_probs[:, 0].argmax(-1).cpu()
    # Relative to the largest, so that a small T cannot turn every entry into -inf.
    scaled = (log_probs - log_probs.amax(-1, keepdim=True)).double() / temperature
    return DenseNext(scaled).sample(generators)[:, 0].cpu()


def _generators(order: Order, count: int) -> list[torch.Generator] | None:
    """One per sequence, so that a choice is the same whatever prompts share the request."""
    if order.seed is None:
        return None
    return [torch.Generator().manual_seed((order.seed + row % order.choices) & (2**63 - 1)) for row in range(count)]


def _grow(
    sequences: Sequence[Continuation], tokens: Tensor, said: list[list[Said]], vocab: Vocab, order: Order
) -> None:
    for sequence, token, (what,) in zip(sequences, tokens.tolist(), said, strict=True):
        if sequence.finished:
            continue
        # An end token is part of the answer, so that its distribution is told; it has no text.
        sequence.tokens.append(token)
        sequence.said.append(what)
        if token in vocab.eos_ids:
            sequence.finished = "stop"
            continue
        sequence.text += vocab.token_bytes[token]
        found = [at for stop in order.stop if (at := sequence.text.find(stop)) >= 0]
        if found:
            sequence.text, sequence.finished = sequence.text[: min(found)], "stop"


def _said(next_: Next, targets: Tensor, top: int) -> list[list[Said]]:
    statistics = next_.statistics(targets, top=top)
    assert statistics.logprob is not None and statistics.rank is not None
    logprobs, ranks = statistics.logprob.tolist(), statistics.rank.tolist()
    if statistics.top_ids is None or statistics.top_logprobs is None:
        tops: list[list[tuple[tuple[int, float], ...]]] = [[()] * len(row) for row in logprobs]
    else:
        pairs = zip(statistics.top_ids.tolist(), statistics.top_logprobs.tolist(), strict=True)
        tops = [[tuple(zip(i, v, strict=True)) for i, v in zip(*row, strict=True)] for row in pairs]
    return [[Said(*what) for what in zip(*row, strict=True)] for row in zip(logprobs, ranks, tops, strict=True)]


def _read(following: Next, order: Order) -> list[list[Said]]:
    """Of each prompt, what the model says of its second token, its third, ..."""
    prompts = _padded(order.prompts)
    targets = torch.cat([prompts[:, 1:], torch.full((len(prompts), 1), ABSENT)], dim=1)
    # A Next has a statistic for every place; those without a target are cut off.
    said = _said(following, targets, max(order.logprobs or 0, order.prompt_logprobs or 0))
    return [row[: len(prompt) - 1] for row, prompt in zip(said, order.prompts, strict=True)]


def _choice(index: int, sequence: Continuation, read: list[Said] | None, vocab: Vocab, order: Order) -> dict[str, Any]:
    shown = (vocab.decode(sequence.prompt) if order.echo else b"") + sequence.text
    choice: dict[str, Any] = {
        "index": index,
        "text": shown.decode("utf-8", errors="replace"),
        "finish_reason": sequence.finished or "length",
        "logprobs": None,
    }
    if order.logprobs is not None:
        before: list[Said | None] = [None, *(read or [])] if order.echo else []
        tokens = [*sequence.prompt, *sequence.tokens] if order.echo else sequence.tokens
        choice["logprobs"] = _logprobs(tokens, [*before, *sequence.said], vocab, order)
    if order.prompt_logprobs is not None:
        places = zip(sequence.prompt[1:], read or (), strict=True)
        choice["prompt_logprobs"] = [None, *(_prompt_entry(token, what, vocab, order) for token, what in places)]
    if order.with_ids:
        choice["prompt_token_ids"], choice["token_ids"] = list(sequence.prompt), list(sequence.tokens)
    return choice


def _logprobs(tokens: Sequence[int], said: Sequence[Said | None], vocab: Vocab, order: Order) -> dict[str, Any]:
    """The four lists of a completion's log-probabilities; the first token of a prompt has none."""

    def name(token: int) -> str:
        return f"token_id:{token}" if order.names_as_ids else vocab.label(token)

    top: list[dict[str, float] | None] = []
    for token, what in zip(tokens, said, strict=True):
        if what is None:
            top.append(None)
        else:
            best = {name(i): _number(value) for i, value in what.top[: order.logprobs]}
            top.append(best | {name(token): _number(what.logprob)})
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(decoder.decode(vocab.token_bytes[token]))
    return {
        "tokens": [name(token) for token in tokens],
        "token_logprobs": [None if what is None else _number(what.logprob) for what in said],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _prompt_entry(token: int, said: Said, vocab: Vocab, order: Order) -> dict[str, dict[str, Any]]:
    """Log-probabilities by token id at one place of a prompt, ranks from 1."""
    best = list(enumerate(said.top[: order.prompt_logprobs], start=1))
    entries = {i: (value, rank) for rank, (i, value) in best}
    entries.setdefault(token, (said.logprob, said.rank + 1))
    return {
        str(i): {"logprob": _number(value), "rank": rank, "decoded_token": vocab.label(i)}
        for i, (value, rank) in entries.items()
    }


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows])


def _echoes(order: Order) -> bool:
    return order.echo and order.logprobs is not None


def _number(value: float) -> float:
    return value if math.isfinite(value) else IMPOSSIBLE

"""Continuations: texts of one prompt drawn side by side, which can be stopped, dropped and branched midway."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from nextoken.decode.generation import Generation
from nextoken.decode.loop import draw
from nextoken.decode.request import Finish, Request, Running
from nextoken.model.base import ABSENT, LanguageModel


class Opening:
    """A prompt that a model has read.

    Args:
        model: any that gives whole distributions.
        prompt: token ids, at least one.

    Raises:
        ValueError: the model tells only its most probable tokens, or the prompt does not fit the context.
    """

    def __init__(self, model: LanguageModel, prompt: Sequence[int]) -> None:
        if model.is_partial:
            raise ValueError(f"{model.name} tells only its most probable tokens; sampling needs whole distributions")
        limit = model.context_length
        if limit is not None and len(prompt) > limit:
            raise ValueError(f"the prompt has {len(prompt)} tokens and the context of {model.name} holds {limit}")
        self.model, self.prompt = model, tuple(prompt)
        self.state = model.start()
        self.logits = model.extend(self.state, [self.prompt])[0, -1].logits()[:, 0]


class Continuations:
    """Texts under way after an opening, a row each; every token drawn is fed at once, the last one of a text too.

    A row's tokens are those of `nextoken.generate` for the same request, as long as `choose` gives it no new seed.

    Args:
        opening: read once, for any number of these.
        requests: one per row, all with the prompt of the opening and with one transform.
    """

    def __init__(self, opening: Opening, requests: Sequence[Request]) -> None:
        self.model = opening.model
        self.rows = [Running(number, request) for number, request in enumerate(requests)]
        self.finishes: list[Finish | None] = [None] * len(self.rows)
        self.state = opening.state.fork([0] * len(self.rows))
        self.drawn = 0
        """Tokens drawn so far, dropped rows included."""
        self._logits = opening.logits.expand(len(self.rows), -1)

    @property
    def open(self) -> list[int]:
        """Rows that have not ended."""
        return [row for row, finish in enumerate(self.finishes) if finish is None]

    def advance(self, *, until: bytes | None = None, most: int | None = None) -> None:
        """Draw for every open row until it has ended, has spelled `until`, or has `most` more tokens."""
        begun = [len(row.tokens) for row in self.rows]
        spelled = [b""] * len(self.rows)
        active = self.open
        while active:
            drawn, spent = draw(self._logits[active], [self.rows[i] for i in active], self.model)
            fed = [ABSENT] * len(self.rows)
            for i, token, surprisal in zip(active, drawn, spent, strict=True):
                self.rows[i].tokens.append(token)
                self.rows[i].surprisals.append(surprisal)
                spelled[i] += self.model.vocab.token_bytes[token]
                self.finishes[i] = self._finish(self.rows[i], token)
                fed[i] = ABSENT if self.finishes[i] == "context" else token
            self.drawn += len(active)
            self._feed(fed)
            active = [
                i
                for i in active
                if self.finishes[i] is None
                and not (until is not None and until in spelled[i])
                and not (most is not None and len(self.rows[i].tokens) - begun[i] >= most)
            ]

    def choose(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Go on with these rows only, in this order; one named again becomes another row, with the seed given for it.

        Args:
            rows: at least one.
            seeds: one for each, for where it is named again.
        """
        kept: list[Running] = []
        for place, (i, seed) in enumerate(zip(rows, seeds, strict=True)):
            kept.append(_twin(self.rows[i], seed) if i in rows[:place] else self.rows[i])
        self.rows, self.finishes = kept, [self.finishes[i] for i in rows]
        self.state, self._logits = self.state.fork(rows), self._logits[list(rows)]

    def generation(self, row: int) -> Generation:
        """What row number `row` has come to."""
        running, finish = self.rows[row], self.finishes[row]
        stream = copy.deepcopy(running.stream)
        stream.finish()
        return Generation(
            stream.text,
            tuple(running.tokens),
            finish or "cancelled",
            tuple(running.surprisals),
            running.request,
            self.model,
            tuple(running.coins),
        )

    def _feed(self, tokens: list[int]) -> None:
        present = torch.tensor(tokens) != ABSENT
        if bool(present.any()):
            following = self.model.extend(self.state, torch.tensor(tokens)[:, None]).logits()[:, 0]
            self._logits = torch.where(present.to(following.device)[:, None], following, self._logits)

    def _finish(self, row: Running, token: int) -> Finish | None:
        """Why this token ends the row, as `decode.loop.Loop` tells it."""
        if token in self.model.vocab.eos_ids and not row.request.ignore_eos:
            return "eos"
        row.stream.push(self.model.vocab.token_bytes[token])
        if row.stream.stopped:
            return "stop"
        if len(row.tokens) >= row.request.max_tokens:
            return "length"
        limit = self.model.context_length
        return "context" if limit is not None and len(row.request.prompt) + len(row.tokens) > limit else None


def _twin(row: Running, seed: int) -> Running:
    twin = Running(row.ticket, replace(row.request, seed=seed))
    twin.tokens, twin.surprisals, twin.coins = list(row.tokens), list(row.surprisals), list(row.coins)
    twin.stream = copy.deepcopy(row.stream)
    return twin

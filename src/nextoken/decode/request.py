"""Request: one sequence to be generated, and Piece: what a step adds to it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from nextoken.decode.text_stream import TextStream
from nextoken.decode.transform import Chain, Transform

Finish = Literal["eos", "stop", "length", "context", "cancelled"]
"""Why a sequence ended: an end token, a stop string, `max_tokens`, a full context, or the caller."""


@dataclass(frozen=True)
class Request:
    """One sequence to be generated.

    Args:
        prompt: token ids, begin token included; at least one.
        transform: applied to every distribution before a token is drawn from it.
        max_tokens: most tokens to generate.
        stops: byte strings that end the text.
        seed: of the sequence's own random numbers; the same prompt, transform and seed give the same tokens whatever
            else is generated at the same time.
        ignore_eos: go on after an end token.
    """

    prompt: tuple[int, ...]
    transform: Transform = field(default_factory=Chain)
    max_tokens: int = 128
    stops: tuple[bytes, ...] = ()
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt has no token: the model has no begin token, so give it some text")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if any(not stop for stop in self.stops):
            raise ValueError("a stop string is empty; leave it out to stop at max_tokens only")


@dataclass(frozen=True)
class Piece:
    """What one step adds to one sequence.

    Args:
        ticket: which sequence, as `Loop.submit` numbered it.
        token: the token drawn.
        text: text that is now sure; empty while a character or a possible stop string is incomplete.
        surprisal: -log p in nats of the token under the distribution it was drawn from.
        entropy: of the model's own distribution at this step, in nats, where the loop was asked for it.
        finish: why the sequence ended, or None while it goes on.
        coins: of the last piece, the uniform number each step gave to a random transform.
    """

    ticket: int
    token: int
    text: str
    surprisal: float
    entropy: float | None = None
    finish: Finish | None = None
    coins: tuple[float, ...] = ()


class Running:
    """A request at work: what was drawn so far, and its own random numbers."""

    def __init__(self, ticket: int, request: Request) -> None:
        self.ticket, self.request = ticket, request
        self.tokens: list[int] = []
        self.surprisals: list[float] = []
        self.coins: list[float] = []
        """The uniform number each step gave to a random transform."""
        self.stream = TextStream(request.stops)
        self._random = random.Random(request.seed)

    def coin(self) -> float:
        self.coins.append(self._random.random())
        return self.coins[-1]

    def uniform(self) -> float:
        """The number that inverts the cumulative distribution of the next draw."""
        return self._random.random()

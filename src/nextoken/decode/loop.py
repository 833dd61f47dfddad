"""Loop: the decoding loop. Every sequence at work takes one step together; who is done leaves, who waits joins.

Continuous batching: a request is fused into the running batch at the next step, whenever it arrives, and no sequence
waits for another to end. Source: Flover, arXiv:2305.13484 (there with slots that are kept contiguous; here the state is
forked and joined, which keeps rows dense by construction).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nextoken.decode.request import Finish, Piece, Request, Running
from nextoken.decode.scaling import Greedy, Temperature
from nextoken.decode.transform import Context, Transform, check_possible, normalise
from nextoken.methods import method
from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.model.next import Next, invert_cdf


@method(
    name="Continuous batching",
    arxiv="2305.13484",
    access="white",
    summary="requests join and leave the running batch at every step",
)
class Loop:
    """Requests decoded together, one token each per step.

        loop = Loop(model)
        loop.submit(Request(prompt, transform, max_tokens=50, seed=1))
        for piece in loop.run():
            ...

    Args:
        model: any language model that gives whole distributions.
        max_rows: most sequences at work at once; others wait their turn.
        entropies: whether each piece is to tell the entropy of the model's own distribution.
    """

    def __init__(self, model: LanguageModel, *, max_rows: int = 64, entropies: bool = False) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        if model.is_partial:
            raise ValueError(f"{model.name} tells only its most probable tokens; sampling needs whole distributions")
        self.model, self.max_rows, self.entropies = model, max_rows, entropies
        self.steps = 0
        """Steps taken: forward passes for one token of every row."""
        self.slots = 0
        """Rows decoded, summed over steps; slots / steps is the mean size of the batch."""
        self._waiting: deque[Running] = deque()
        self._rows: list[Running] = []
        self._state: State | None = None
        self._logits: Tensor | None = None
        self._submitted = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing is at work or waiting."""
        return not self._rows and not self._waiting

    def submit(self, request: Request) -> int:
        """Queue a request, which joins at the next step; returns its ticket.

        Raises:
            ValueError: the prompt is longer than the context.
        """
        limit = self.model.context_length
        if limit is not None and len(request.prompt) > limit:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens and the context of {self.model.name} holds {limit}: "
                "shorten the prompt"
            )
        self._submitted += 1
        self._waiting.append(Running(self._submitted - 1, request))
        return self._submitted - 1

    def cancel(self, ticket: int) -> None:
        """Drop a request, at work or waiting, and free its memory; unknown tickets are ignored."""
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        self._leave([row.ticket == ticket for row in self._rows])

    def run(self) -> Iterator[Piece]:
        """Step until nothing is left. Abandoning the iterator frees the memory of what was at work."""
        try:
            while not self.is_done:
                yield from self.step()
        finally:
            for row in [*self._rows, *self._waiting]:
                self.cancel(row.ticket)

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Let waiting requests join, draw one token for every row, and feed it."""
        self._admit()
        if not self._rows:
            return []
        assert self._logits is not None
        drawn, surprisals = self._draw(self._rows, self._logits)
        said = self._said(self._logits)
        pieces = [self._advance(*step) for step in zip(self._rows, drawn, surprisals, said, strict=True)]
        finished = [piece.finish is not None for piece in pieces]
        fed = [token for token, over in zip(drawn, finished, strict=True) if not over]
        self._leave(finished)
        self.steps += 1
        self.slots += len(pieces)
        if self._rows:
            assert self._state is not None
            following = self.model.extend(self._state, torch.tensor(fed)[:, None])
            self._logits = following.logits()[:, -1]
        return pieces

    def _admit(self) -> None:
        """Put waiting requests beside the rows at work."""
        joining, state, logits = self._prefill()
        if state is None or logits is None:
            return
        if self._state is None:
            self._state, self._logits = state, logits
        else:
            assert self._logits is not None
            self._state, self._logits = self._state.join(state), torch.cat([self._logits, logits])
        self._rows += joining

    def _prefill(self) -> tuple[list[Running], State | None, Tensor | None]:
        """As many waiting requests as there is room for, their state and logits; each different prompt is read once."""
        room = self.max_rows - len(self._rows)
        joining = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not joining:
            return [], None, None
        prompts = list(dict.fromkeys(row.request.prompt for row in joining))
        width = max(map(len, prompts))
        tokens = torch.tensor([[*prompt, *[ABSENT] * (width - len(prompt))] for prompt in prompts])
        state = self.model.start(len(prompts))
        following = self.model.extend(state, tokens)
        last = torch.zeros(len(prompts), width, dtype=torch.bool)
        last[range(len(prompts)), [len(prompt) - 1 for prompt in prompts]] = True
        logits = following[last].logits()[:, 0]
        number = {prompt: i for i, prompt in enumerate(prompts)}
        source = [number[row.request.prompt] for row in joining]
        self._heard(joining, following, source)
        if source != list(range(len(prompts))):
            state, logits = state.fork(source), logits[source]
        return joining, state, logits

    def _heard(self, joining: Sequence[Running], said: Next, source: Sequence[int]) -> None:
        """What the model said along the prompts [P, n] of rows that join, row b having that of number source[b]."""
        return None

    def _draw(self, rows: Sequence[Running], logits: Tensor) -> tuple[list[int], list[float]]:
        """One token per row and its surprisal, each row under its own transform."""
        tokens, surprisals = [0] * len(rows), [0.0] * len(rows)
        for members in alike(rows):
            part = logits if len(members) == len(rows) else logits[members]
            drawn, spent = draw(part, [rows[index] for index in members], self.model)
            for index, token, surprisal in zip(members, drawn, spent, strict=True):
                tokens[index], surprisals[index] = token, surprisal
        return tokens, surprisals

    def _said(self, logits: Tensor) -> list[float | None]:
        """Entropies of the model's own distributions [R, V], if they are wanted."""
        if not self.entropies:
            return [None] * len(logits)
        entropies: list[float | None] = torch.special.entr(logits.float().softmax(-1)).sum(-1).tolist()
        return entropies

    def _advance(self, row: Running, token: int, surprisal: float, entropy: float | None) -> Piece:
        row.tokens.append(token)
        row.surprisals.append(surprisal)
        request, text = row.request, ""
        finish: Finish | None = None
        if token in self.model.vocab.eos_ids and not request.ignore_eos:
            finish = "eos"
        else:
            text = row.stream.push(self.model.vocab.token_bytes[token])
            limit = self.model.context_length
            if row.stream.stopped:
                finish = "stop"
            elif len(row.tokens) >= request.max_tokens:
                finish = "length"
            elif limit is not None and len(request.prompt) + len(row.tokens) > limit:
                finish = "context"
        if finish is not None:
            text += row.stream.finish()
        coins = () if finish is None else tuple(row.coins)
        return Piece(row.ticket, token, text, surprisal, entropy, finish, coins)

    def _leave(self, gone: Sequence[bool]) -> None:
        if not any(gone):
            return
        stay = [index for index, over in enumerate(gone) if not over]
        self._rows = [self._rows[index] for index in stay]
        if not stay:
            self._state = self._logits = None
            return
        assert self._state is not None
        self._state = self._state.fork(stay)
        self._logits = None if self._logits is None else self._logits[stay]


def alike(rows: Sequence[Running]) -> list[list[int]]:
    """Indices of the rows that have the same transform."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(id(row.request.transform), []).append(index)
    return list(groups.values())


def draw(logits: Tensor, rows: Sequence[Running], model: LanguageModel) -> tuple[list[int], list[float]]:
    """Draw a token for each row from transform(logits) [B, V]; returns tokens and surprisals in nats."""
    transform = rows[0].request.transform
    scores = transform(logits, context_of(rows, model, transform))
    if is_greedy(transform):
        return check_possible(scores).argmax(-1).tolist(), [0.0] * len(rows)
    log_probs = normalise(scores)
    uniform = torch.tensor([row.uniform() for row in rows], dtype=torch.float64)
    tokens = invert_cdf(log_probs, uniform)
    surprisals = -log_probs.gather(-1, tokens[:, None])[:, 0]
    return tokens.tolist(), surprisals.tolist()


def context_of(rows: Sequence[Running], model: LanguageModel, transform: Transform) -> Context:
    """What `transform` may know of these rows; a coin is flipped for each if it wants one."""
    coins = torch.tensor([row.coin() for row in rows], dtype=torch.float64) if transform.is_random else None
    return Context(
        prompts=[row.request.prompt for row in rows],
        outputs=[row.tokens for row in rows],
        surprisals=[row.surprisals for row in rows],
        uniform=coins,
        seeds=[row.request.seed for row in rows],
        vocab=model.vocab,
    )


def is_greedy(transform: Transform) -> bool:
    """Whether the transform leaves one token, so that nothing is drawn."""
    last = transform.steps[-1] if transform.steps else None
    return isinstance(last, Greedy) or (isinstance(last, Temperature) and last.t == 0)

"""The phase of thought: rows that take one soft step together, until each has come to its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextoken.decode.request import Request
from nextoken.decode.thinking import Step, Thinker, Thinking
from nextoken.decode.thought import Ended
from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.model.soft import Mixtures, SoftModel
from nextoken.model.vocab import Vocab

_SHOWN = 10  # of a mixture over the whole vocabulary


class ThinkingRow(Thinker):
    """A row that thinks, and what it thought."""

    def __init__(self, ticket: int, request: Request, seeds: Sequence[int]) -> None:
        super().__init__(ticket, request)
        self.seeds = seeds
        self.ids: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.entropies: list[float] = []
        self.log_probs: list[float] | None = []
        self.vectors: list[Tensor] = []
        self.ended: Ended | None = None
        self.state: State | None = None
        self.logits: Tensor | None = None

    def note(self, step: Step, at: int, token: int) -> None:
        """Write down row `at` of a step; where it ended the thought, the token is all there is of its mixture."""
        over = self.ended is not None
        ids, weights = (torch.tensor([token]), torch.ones(1)) if over else _leading(step.mixtures, at)
        self.ids.append(ids.cpu())
        self.weights.append(weights.float().cpu())
        self.entropies.append(float(step.entropies[at]))
        self.tokens.append(token)
        spent = None if step.log_probs is None else float(step.log_probs[at])
        if spent is not None and (self.ended == "cold stop" or (over and step.mixtures.noise is not None)):
            spent = 0.0  # what was drawn is put aside, and did not decide that it is
        if spent is None:
            self.log_probs = None
        elif self.log_probs is not None:
            self.log_probs.append(spent)
        # Per token drawn, as the transforms of sampled thoughts know it; mixtures of all tokens draw none.
        draws = 1 if step.mixtures.ids is None else step.mixtures.ids.shape[-1]
        self.surprisals.append(0.0 if spent is None else -spent / draws)


def think_in_step(
    model: SoftModel,
    rows: Sequence[ThinkingRow],
    thinking: Thinking,
    marker: int | None,
    closing: tuple[int, ...],
    limit: int,
    scale: float,
) -> None:
    """Think in all rows; each is left with its state and the logits after the closing."""
    state, logits = _read(model, [row.request.prompt for row in rows])
    active = list(rows)
    while active:
        if len(active[0].tokens) == limit:  # all rows at work have taken as many steps
            for row in active:
                row.ended = "length"
            step = None
        else:
            step = thinking.step(logits, active, model, scale)
            for at, row in enumerate(active):
                _settle(row, step, at, thinking, marker, model.vocab)
        over = [at for at, row in enumerate(active) if row.ended is not None]
        stay = [at for at, row in enumerate(active) if row.ended is None]
        _close(model, state, logits, active, over, closing)
        if not stay or step is None:
            return
        if over:
            state, active = state.fork(stay), [active[at] for at in stay]
        mixtures = _narrowed(step.mixtures, stay)
        vectors = model.embed(mixtures)
        for row, vector in zip(active, vectors[:, 0].cpu(), strict=True):
            row.vectors.append(vector)
        noted = torch.tensor([[row.tokens[-1]] for row in active])
        logits = model.extend_embedded(state, vectors, noted).logits()[:, -1]


def _settle(row: ThinkingRow, step: Step, at: int, thinking: Thinking, marker: int | None, vocab: Vocab) -> None:
    """Write a step down, and whether it ends the thought."""
    token, cold = int(step.tokens[at]), thinking.cold_stop
    row.low = row.low + 1 if cold is not None and float(step.entropies[at]) < cold.entropy else 0
    if cold is not None and row.low >= cold.length:
        row.ended, token = "cold stop", token if marker is None else marker
    elif token == marker:
        row.ended = "marker"
    elif token in vocab.eos_ids:
        row.ended = "eos"
    row.note(step, at, token)


def _close(
    model: SoftModel,
    state: State,
    logits: Tensor,
    active: Sequence[ThinkingRow],
    over: list[int],
    closing: Sequence[int],
) -> None:
    """Feed the closing to the rows whose thought is over, and leave each with its state."""
    answering = [at for at in over if active[at].ended != "eos"]
    if not answering:
        return
    apart = state.fork(answering)
    after = logits[answering]
    if closing:
        after = model.extend(apart, [list(closing)] * len(answering))[:, -1].logits()[:, 0]
    for number, at in enumerate(answering):
        active[at].state, active[at].logits = apart.fork([number]), after[number]


def _read(model: LanguageModel, prompts: Sequence[tuple[int, ...]]) -> tuple[State, Tensor]:
    """A state with these prompts, and the logits [R, V] after each; every different one is read once."""
    different = list(dict.fromkeys(prompts))
    width = max(map(len, different))
    state = model.start(len(different))
    following = model.extend(state, [[*prompt, *[ABSENT] * (width - len(prompt))] for prompt in different])
    last = torch.zeros(len(different), width, dtype=torch.bool)
    last[range(len(different)), [len(prompt) - 1 for prompt in different]] = True
    logits = following[last].logits()[:, 0]
    source = [different.index(prompt) for prompt in prompts]
    return (state, logits) if source == list(range(len(different))) else (state.fork(source), logits[source])


def _narrowed(mixtures: Mixtures, rows: list[int]) -> Mixtures:
    ids, noise = mixtures.ids, mixtures.noise
    return Mixtures(None if ids is None else ids[rows], mixtures.weights[rows], None if noise is None else noise[rows])


def _leading(mixtures: Mixtures, row: int) -> tuple[Tensor, Tensor]:
    """ids and weights [K] of a mixture, of one over the whole vocabulary its largest."""
    if mixtures.ids is not None:
        return mixtures.ids[row, 0], mixtures.weights[row, 0]
    weights, ids = mixtures.weights[row, 0].sort(descending=True, stable=True)
    return ids[:_SHOWN], weights[:_SHOWN]

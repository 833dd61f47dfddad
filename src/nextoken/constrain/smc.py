"""smc(): texts from the model's distribution given a constraint, by sequential Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextoken.constrain.awrs import AWRS
from nextoken.constrain.constraint import Constraint, Place
from nextoken.constrain.kernel import DEAD, End, Kernel, NextToken
from nextoken.constrain.particles import Population, Step, advance, pool, prune, resample, spawn, twisted, weigh
from nextoken.constrain.posterior import Posterior, Stage, Text
from nextoken.constrain.resampling import Scheme, SchemeName, scheme
from nextoken.decode.generate import Prompt, derived_seed, prompt_tokens
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.transform import Chain, Context, Transform, normalise
from nextoken.methods import method
from nextoken.model.base import LanguageModel, State
from nextoken.model.loading import load


@method(
    name="Properly weighted SMC",
    arxiv="1711.03219",
    access="gray",
    summary="weighted texts under a constraint and its probability without bias, of blocks that keep the measure",
)
@torch.no_grad()
def smc(
    model: LanguageModel | str | Path,
    prompt: Prompt,
    constraint: Constraint,
    *,
    particles: int = 10,
    kernel: Kernel | None = None,
    transform: Transform | str | None = None,
    potential: Callable[[str], float] | None = None,
    max_tokens: int = 128,
    ess_threshold: float = 0.5,
    resampling: SchemeName = "systematic",
    runs: int = 1,
    seed: int = 0,
    on_stage: Callable[[Stage], object] | None = None,
) -> Posterior:
    """Weighted texts y with E[sum_i w_i f(y_i)] = sum_y p(y) c(y) psi(y) f(y), by sequential Monte Carlo.

    p(y) is the chance with which generate(model, prompt, transform=...) says y and ends within `max_tokens`, c(y)
    whether y is of the constraint, psi(y) = exp(potential(y)). K particles grow token by token: each draws one by
    `kernel`, whose weight multiplies its own; where ESS = (sum w)^2 / sum w^2 falls below `ess_threshold` K, particles
    are drawn anew by their weights. Without the weights this is locally constrained decoding: each text is of the
    constraint, but their frequencies are wrong wherever a likely beginning has unlikely completions only.

    Particles with the same text are read by the model once. At its last token (number `max_tokens`, or where the
    context is full) a text is made to end, with w = c(y) p(end): longer texts are no part of the target.

    Args:
        model: that gives whole distributions and has an end token, or what `nextoken.load` takes.
        prompt: a text or a conversation; the constraint is on what follows it.
        constraint: on the text.
        particles: K; the variance of the evidence falls as 1/K.
        kernel: properly weighted draws of tokens, AWRS() unless given.
        transform: defines p, before any constraint; not one that flips coins.
        potential: log psi of a text, in nats, asked for every beginning: psi(y + token) / psi(y) multiplies the weight
            at each step, so that a potential that foresees well keeps the right particles. -inf must rule out what
            follows too.
        max_tokens: most tokens of a text, its end token included.
        ess_threshold: 0 never resamples (see `importance`), 1 at every step at which weights differ.
        resampling: the scheme, see module `resampling`.
        runs: independent repetitions, for an honest standard error.
        seed: equal seeds give equal posteriors.
        on_stage: called after each step, for those who wait.

    Returns:
        A Posterior; if every particle died, one that says so.

    Raises:
        ValueError: an argument is out of range, the model has no end token or is partial, the prompt does not fit the
            context, or the transform removes every token.

    Source: Ścibior et al., arXiv:1711.03219, for the blocks and why they compose; Lipkin et al., arXiv:2504.05410, for
    the kernel and the forced end.
    """
    if particles < 1 or runs < 1 or max_tokens < 1:
        raise ValueError(f"particles, runs and max_tokens must be at least 1, got {particles}, {runs} and {max_tokens}")
    if not 0 <= ess_threshold <= 1:
        raise ValueError(f"ess_threshold is a share of the particles, between 0 and 1, got {ess_threshold}")
    reader = _Reader(load(model), prompt, transform, max_tokens)
    redraw = scheme(resampling)
    stages: list[Stage] = []

    def report(stage: Stage) -> None:
        stages.append(stage)
        if on_stage is not None:
            on_stage(stage)

    made = []
    for run in range(runs):
        course = _Run(reader, constraint, kernel or AWRS(), potential, derived_seed(seed, run), report)
        made.append(course.texts(run, particles, ess_threshold * particles, redraw))
    return Posterior(pool(made), tuple(population.log_total for population in made), tuple(stages), particles)


@torch.no_grad()
def importance(
    model: LanguageModel | str | Path,
    prompt: Prompt,
    constraint: Constraint,
    *,
    particles: int = 10,
    kernel: Kernel | None = None,
    transform: Transform | str | None = None,
    potential: Callable[[str], float] | None = None,
    max_tokens: int = 128,
    seed: int = 0,
    on_stage: Callable[[Stage], object] | None = None,
) -> Posterior:
    """`smc` without resampling: K independent texts of locally constrained decoding, with weights that correct them.

    The standard error is exact here. Arguments and errors as of `smc`.
    """
    return smc(
        model,
        prompt,
        constraint,
        particles=particles,
        kernel=kernel,
        transform=transform,
        potential=potential,
        max_tokens=max_tokens,
        ess_threshold=0.0,
        seed=seed,
        on_stage=on_stage,
    )


@dataclass(frozen=True)
class _Particle:
    """A text under way. Particles of one text share a row of the model's state."""

    place: Place
    founder: int
    tokens: tuple[int, ...] = ()
    surprisals: tuple[float, ...] = ()
    row: int = 0
    ended: bool = False


class _Reader:
    """The model's side: the target distribution after each of several texts, the prompt read once for all runs."""

    def __init__(self, model: LanguageModel, prompt: Prompt, rule: Transform | str | None, max_tokens: int) -> None:
        if model.is_partial:
            raise ValueError(f"{model.name} tells only its most probable tokens; weights need whole distributions")
        if not model.vocab.eos_ids:
            raise ValueError(f"{model.name} has no end token, so that none of its texts is ever complete")
        self.rule = parsed(rule) if isinstance(rule, str) else rule or Chain()
        if self.rule.is_random:
            raise ValueError("the transform defines the target, and this one flips coins: leave it out")
        self.model, self.prompt = model, prompt_tokens(model, prompt)
        limit = model.context_length
        if not self.prompt:
            raise ValueError("the prompt has no token: the model has no begin token, so give it some text")
        if limit is not None and len(self.prompt) > limit:
            raise ValueError(
                f"the prompt has {len(self.prompt)} tokens and the context of {model.name} holds {limit}: shorten it"
            )
        self.most = max_tokens if limit is None else min(max_tokens, limit - len(self.prompt) + 1)
        self._state = model.start()
        logits = model.extend(self._state, [self.prompt])[0, -1].logits()[:, 0]
        self._first = self._log_probs(logits, [((), ())])

    def begin(self) -> tuple[State, np.ndarray]:
        """The state after the prompt, one row that is not to be changed, and log p [1, V]."""
        return self._state, self._first

    def follow(self, state: State, texts: list[_Particle], rows: list[int]) -> tuple[State, np.ndarray]:
        """Texts that each added a token to one of `rows`: the state whose rows they are, and log p [R, V]."""
        moved = state.fork(rows) if state is self._state or rows != list(range(state.batch)) else state
        logits = self.model.extend(moved, [[text.tokens[-1]] for text in texts]).logits()[:, -1]
        return moved, self._log_probs(logits, [(text.tokens, text.surprisals) for text in texts])

    def _log_probs(self, logits: Tensor, texts: list[tuple[tuple[int, ...], tuple[float, ...]]]) -> np.ndarray:
        context = Context(
            prompts=[self.prompt] * len(texts),
            outputs=[tokens for tokens, _ in texts],
            surprisals=[surprisals for _, surprisals in texts],
            vocab=self.model.vocab,
        )
        return np.asarray(normalise(self.rule(logits, context)).cpu().numpy())


class _Run:
    """One run: what its steps look at."""

    def __init__(
        self,
        reader: _Reader,
        constraint: Constraint,
        kernel: Kernel,
        potential: Callable[[str], float] | None,
        seed: int,
        report: Callable[[Stage], object],
    ) -> None:
        self.reader, self.constraint, self.kernel, self.report = reader, constraint, kernel, report
        self.vocab = reader.model.vocab
        self._potential = potential
        self._known: dict[str, float] = {}
        self._rng = np.random.default_rng(seed)
        self._here: list[NextToken] = []

    def texts(self, run: int, particles: int, least: float, redraw: Scheme) -> Population[Text]:
        """The weighted texts, `least` being the ESS below which particles are drawn anew."""
        start = self.constraint.start()
        population = Population(
            tuple(_Particle(start, founder) for founder in range(particles)), spawn(particles, start).log_weights
        )
        step: Step[_Particle] = self._grow
        if self._potential is not None:
            population, step = prune(weigh(population, self._log_psi)), twisted(step, self._log_psi)
        state, log_probs = self.reader.begin()
        texts = [_Particle(start, 0)]
        for index in range(self.reader.most):
            self._here = [NextToken(row, text.place, self.vocab) for row, text in zip(log_probs, texts, strict=True)]
            live = sum(not particle.ended for particle in population.items)
            if index == self.reader.most - 1:
                self.kernel = End()
            population = prune(advance(population, step, self._rng))
            ess, log_total = population.ess, population.log_total
            resampled = not _all_ended(population) and ess < least
            if resampled:
                population = resample(population, self._rng, n=particles, scheme=redraw)
            checks = sum(here.spent for here in self._here)
            self.report(Stage(run, index, live, len(texts), checks, ess, resampled, log_total))
            if _all_ended(population):
                break
            population, texts, rows = _regrouped(population)
            state, log_probs = self.reader.follow(state, texts, rows)
        return Population(
            tuple(Text(self.vocab.decode_text(p.tokens), p.tokens, p.founder) for p in population.items),
            population.log_weights,
        )

    def _grow(self, particle: _Particle, rng: np.random.Generator) -> tuple[_Particle, float]:
        """A token more, and log w; a text that has ended stays, and so does one for which nothing was found."""
        if particle.ended:
            return particle, 0.0
        here = self._here[particle.row]
        draw = self.kernel(here, rng)
        if draw.is_dead:
            return particle, DEAD
        grown = _Particle(
            here.after(draw.token),
            particle.founder,
            (*particle.tokens, draw.token),
            (*particle.surprisals, -math.log(here.probs[draw.token])),
            particle.row,
            draw.token in self.vocab.eos_ids,
        )
        return grown, draw.log_weight

    def _log_psi(self, particle: _Particle) -> float:
        assert self._potential is not None
        text = self.vocab.decode_text(particle.tokens)
        if text not in self._known:
            self._known[text] = float(self._potential(text))
        return self._known[text]


def _all_ended(population: Population[_Particle]) -> bool:
    return all(particle.ended for particle in population.items)


def _regrouped(population: Population[_Particle]) -> tuple[Population[_Particle], list[_Particle], list[int]]:
    """The particles with the rows they will have, one of each different live text, and the row that it comes from."""
    rows: dict[tuple[int, int], int] = {}
    texts: list[_Particle] = []
    items = []
    for particle in population.items:
        if not particle.ended:
            key = particle.row, particle.tokens[-1]
            if key not in rows:
                rows[key] = len(rows)
                texts.append(particle)
            particle = replace(particle, row=rows[key])
        items.append(particle)
    return Population(tuple(items), population.log_weights), texts, [row for row, _ in rows]

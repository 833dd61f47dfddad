"""Cautious next-token prediction: several trials where the model is unsure, of which the least perplexed is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nextoken.decode.generate import Prompt, derived_seed, prompt_tokens
from nextoken.decode.generation import Generation
from nextoken.decode.loop import context_of, draw, is_greedy
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.request import Finish, Request, Running
from nextoken.decode.transform import Chain, Transform, normalise
from nextoken.methods import method
from nextoken.model.base import LanguageModel, State
from nextoken.model.loading import load

MARKS = ".,\n?!:;)]}"
_AROUND = " \"'\u201c\u201d\u2018\u2019"


@dataclass(frozen=True)
class Caution:
    """When to try, and how often.

    The number of trials at entropy H (nats) is 1 up to `low` and `most` from `high` on. Between, with
    x = (H - low) / (high - low): max(1, floor(x most)) by the paper, floor(1 + (most - 1) x) by its code.

    Args:
        low, high: entropies.
        most: trials at high entropy.
        rule: the formula between.
        score: perplexity under the distribution the trials are drawn from (`drawn`, as released) or the model's own.
        marks: a trial ends with a token whose text, less spaces and quotation marks, is of these characters only.
        max_trial_tokens: and at this length at the latest.
    """

    low: float = 0.01
    high: float = 1.5
    most: int = 10
    rule: Literal["paper", "code"] = "paper"
    score: Literal["drawn", "model"] = "drawn"
    marks: str = MARKS
    max_trial_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high or self.most < 1:
            raise ValueError(f"caution needs low < high and most >= 1, got {self.low}, {self.high} and {self.most}")
        if self.rule not in ("paper", "code") or self.score not in ("drawn", "model"):
            raise ValueError(
                f"rule must be 'paper' or 'code' and score 'drawn' or 'model', got {self.rule!r} and {self.score!r}"
            )
        if self.max_trial_tokens is not None and self.max_trial_tokens < 1:
            raise ValueError(f"max_trial_tokens must be at least 1, got {self.max_trial_tokens}")

    def trials(self, entropy: float) -> int:
        """How many trials at this entropy."""
        share = min(max((entropy - self.low) / (self.high - self.low), 0.0), 1.0)
        if self.rule == "code":
            return int(1 + (self.most - 1) * share)
        return max(1, min(self.most, math.floor(share * self.most)))

    def ends(self, spelled: bytes) -> bool:
        """Whether a token of these bytes ends a trial."""
        core = spelled.decode("utf-8", "replace").strip(_AROUND)
        return bool(core) and set(core) <= set(self.marks)


@method(
    name="CNTP",
    arxiv="2507.03038",
    access="gray",
    summary="branch at high entropy up to the next punctuation mark, keep the trial of lowest perplexity",
)
@torch.no_grad()
def cautious(
    model: LanguageModel | str | Path,
    prompt: Prompt,
    *,
    transform: Transform | str | None = None,
    max_tokens: int = 128,
    caution: Caution | None = None,
    seed: int = 0,
) -> Generation:
    """Sample while the model is sure; where it is not, try N continuations and keep the one of lowest perplexity.

    At each point H is the entropy of transform(p) and N the number of trials. N = 1 draws one token, from the same
    random numbers as `generate`. N > 1 draws N continuations from this point, each up to its first mark, and appends
    that with the lowest exp(-mean log p); of equal ones the first. The output's `surprisals` are of the steps; because
    of the selection their sum is not the probability of the output.

    Args:
        model, prompt, transform, max_tokens: as of `nextoken.generate`. A greedy transform never branches.
        caution: when and how often to try; the defaults are those of the paper's runs.
        seed: equal seeds give equal texts.

    Raises:
        ValueError: an argument is out of range, or the prompt does not fit the context.

    Source: Wang et al., arXiv:2507.03038. Where the released code takes the first token id of each mark, trials here
    end by the text of a token, so that tokens such as ".\\n" end them too.
    """
    model, care = load(model), caution or Caution()
    rule = parsed(transform) if isinstance(transform, str) else transform or Chain()
    if rule.is_random:
        raise ValueError("how sure the model is depends on the transform, and this one flips coins: leave it out")
    request = Request(prompt_tokens(model, prompt), rule, max_tokens, seed=seed)
    limit = model.context_length
    if limit is not None and len(request.prompt) > limit:
        raise ValueError(f"the prompt has {len(request.prompt)} tokens and the context of {model.name} holds {limit}")
    most = max_tokens if limit is None else min(max_tokens, limit - len(request.prompt) + 1)
    row = Running(0, request)
    state = model.start()
    logits = model.extend(state, [request.prompt])[0, -1].logits()[:, 0]
    branches = 0
    while len(row.tokens) < most and not _over(model, row):
        count = 1 if is_greedy(rule) else care.trials(_entropy(logits, row, model))
        if count == 1:
            (token,), (surprisal,) = draw(logits, [row], model)
            path, spent = [token], [surprisal]
        else:
            branches += 1
            trials = [_trial(row, derived_seed(seed, branches * care.most + i + 1)) for i in range(count)]
            path, spent = _best(model, state, logits, trials, care, most)
        row.tokens += path
        row.surprisals += spent
        if len(row.tokens) < most and not _over(model, row):
            logits = model.extend(state, [path])[0, -1].logits()[:, 0]
    for token in row.tokens:
        row.stream.push(model.vocab.token_bytes[token])
    row.stream.finish()
    finish: Finish = "eos" if _over(model, row) else "length" if len(row.tokens) == max_tokens else "context"
    return Generation(row.stream.text, tuple(row.tokens), finish, tuple(row.surprisals), request, model)


def _trial(row: Running, seed: int) -> Running:
    trial = Running(row.ticket, replace(row.request, seed=seed))
    trial.tokens, trial.surprisals = list(row.tokens), list(row.surprisals)
    return trial


def _best(
    model: LanguageModel, state: State, logits: Tensor, trials: Sequence[Running], care: Caution, most: int
) -> tuple[list[int], list[float]]:
    """The tokens and surprisals of the trial of lowest perplexity; `state` is left at the branching point."""
    begun = len(trials[0].tokens)
    scored: list[list[float]] = [[] for _ in trials]
    active, rows = list(range(len(trials))), state.fork([0] * len(trials))
    logits = logits.expand(len(trials), -1)
    while active:
        own = torch.log_softmax(logits.float(), -1) if care.score == "model" else None
        tokens, spent = draw(logits, [trials[i] for i in active], model)
        going = []
        for place, (i, token, surprisal) in enumerate(zip(active, tokens, spent, strict=True)):
            trials[i].tokens.append(token)
            trials[i].surprisals.append(surprisal)
            scored[i].append(surprisal if own is None else -float(own[place, token]))
            long = care.max_trial_tokens is not None and len(trials[i].tokens) - begun >= care.max_trial_tokens
            ended = care.ends(model.vocab.token_bytes[token]) or _over(model, trials[i])
            if not (ended or long or len(trials[i].tokens) >= most):
                going.append(place)
        active = [active[place] for place in going]
        if active:
            rows = rows if len(going) == len(tokens) else rows.fork(going)
            logits = model.extend(rows, [[trials[i].tokens[-1]] for i in active]).logits()[:, -1]
    # exp is monotone, so the mean surprisal orders as the perplexity does.
    best = min(range(len(trials)), key=lambda i: math.fsum(scored[i]) / len(scored[i]))
    return trials[best].tokens[begun:], trials[best].surprisals[begun:]


def _entropy(logits: Tensor, row: Running, model: LanguageModel) -> float:
    log_probs = normalise(row.request.transform(logits, context_of([row], model, row.request.transform)))
    return float(torch.special.entr(log_probs.exp()).sum())


def _over(model: LanguageModel, row: Running) -> bool:
    return bool(row.tokens) and row.tokens[-1] in model.vocab.eos_ids

"""SARSA: learning what every next token is worth from logged texts and the reward each of them got at its end."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nextoken.model._training import Training
from nextoken.model.hf import HFModel
from nextoken.model.value_head import HFValue


@dataclass(frozen=True)
class LoggedText:
    """One text and the reward it got at its end.

    Args:
        tokens: ids, begin token included, and the end token where the text came to it.
        given: how many of them were given (the prompt); the others were drawn, and are what there is to learn from.
            With 1 the prompt's tokens count as drawn too, as in the released code of rectification.
        reward: -1 for an undesired text, else 0; for other values, what they say.
    """

    tokens: tuple[int, ...]
    given: int
    reward: float

    def __post_init__(self) -> None:
        if not 0 < self.given < len(self.tokens):
            raise ValueError(
                f"of {len(self.tokens)} tokens at least one must be given and one drawn; {self.given} are given"
            )


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of rectification's released runs.

    Args:
        epochs, batch: passes over the texts, and texts per step.
        rate: AdamW's, after it has risen over `warm_up` steps; it then falls linearly to 0 at the last step.
        warm_up: steps; fewer where there are fewer in all.
        discount: gamma of the targets.
        polyak: share of the head that the target head takes over after each step. The values spread backwards from the
            end of the texts by about one token per 1 / polyak steps: few steps need a larger one, or a trace.
        trace: lambda; 0 is SARSA, 1 trains every token on the reward at the end (Monte Carlo).
        weight_decay: AdamW's.
    """

    epochs: int = 3
    batch: int = 64
    rate: float = 3e-4
    warm_up: int = 500
    discount: float = 1.0
    polyak: float = 0.1
    trace: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.warm_up < 0:
            raise ValueError(
                f"epochs and batch must be at least 1 and warm_up at least 0, got {self.epochs}, {self.batch} and "
                f"{self.warm_up}"
            )
        if not 0 < self.polyak <= 1 or not 0 <= self.trace <= 1 or not 0 <= self.discount <= 1:
            raise ValueError(
                f"polyak must be above 0 and, like trace and discount, at most 1; got {self.polyak}, {self.trace} and "
                f"{self.discount}"
            )
        if self.rate <= 0 or self.weight_decay < 0:
            raise ValueError(f"rate must be above 0 and weight_decay at least 0, got {self.rate}, {self.weight_decay}")

    def rate_at(self, step: int, steps: int) -> float:
        """The rate of step number `step` (from 0) of `steps`."""
        rising = (step + 1) / max(1, self.warm_up)
        falling = (steps - step) / max(1, steps - min(self.warm_up, steps))
        return self.rate * min(1.0, rising, falling)


@dataclass(frozen=True)
class FitStep:
    """What one step tells: its number from 1, how many there are, and its loss per token."""

    step: int
    steps: int
    loss: float


def sarsa_targets(
    values: Tensor, rewards: Tensor, last: Tensor, *, discount: float = 1.0, trace: float = 0.0
) -> Tensor:
    """y [B, T]: y_last = reward; before it y_t = discount ((1 - trace) Q(s_t+1, a_t+1) + trace y_t+1).

    Args:
        values: Q(s_t, a_t) [B, T] of the tokens that came, by the target head.
        rewards: [B], at the end of each row.
        last: [B], index of each row's last token; what is right of it is undefined.
    """
    targets = torch.empty_like(values)
    following = torch.zeros_like(rewards)
    for t in reversed(range(values.shape[1])):  # each target needs the one after it
        targets[:, t] = following = torch.where(last == t, rewards, discount * following)
        following = (1 - trace) * values[:, t] + trace * following
    return targets


def fit_value(
    value: HFValue,
    texts: Sequence[LoggedText],
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 100,
    on_step: Callable[[FitStep], object] | None = None,
) -> tuple[float, ...]:
    """Minimise the mean over drawn tokens of (Q(s_t, a_t) - y_t)^2, y of `sarsa_targets` clamped to the value's bounds.

    Body and head of `value` are trained in place; the targets come from a copy of the head that follows it slowly, on
    the body as it is. What is learnt is the value under the policy that drew the texts, after prompts like theirs. The
    body is run without dropout. Equal seeds give equal weights on one machine.

    Args:
        value: see `HFValue.on`.
        texts: at least one.
        recipe: how to train.
        seed: of the order of the texts and of the head's dropout.
        checkpoint: a file from which a run that was cut off goes on when called again with the same arguments, to end
            with the same weights. It stays when the run is done.
        every: steps from one writing of it to the next.
        on_step: called after each step.

    Returns:
        The loss of every step.

    Raises:
        ValueError: there are no texts, or one of them does not fit the vocabulary, the context or the bounds.
        InputError: the checkpoint is of another run, or broken.
        OutputError: the checkpoint cannot be written.

    Source: Cao et al., arXiv:2302.14003, section 4, and its released code (src/sarsa.py, src/train.py). There padding
    is told by the end token's id, which is then never learnt from; here rows know their lengths.
    """
    _check(value, texts)
    if every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}")
    how = recipe or Recipe()
    steps = how.epochs * math.ceil(len(texts) / how.batch)
    run = "" if checkpoint is None else _run_digest(value, texts, how, seed)
    training = Training(value, weight_decay=how.weight_decay)
    if checkpoint is not None and Path(checkpoint).exists():
        training.restore(Path(checkpoint), run)
    while training.step < steps:
        chosen = _chosen(training.step, len(texts), how.batch, seed)
        with training.randomness(_derived(seed, f"step {training.step}")):
            loss = _loss(training, [texts[i] for i in chosen], how)
        training.descend(loss, rate=how.rate_at(training.step, steps), polyak=how.polyak)
        if checkpoint is not None and (training.step % every == 0 or training.step == steps):
            training.save(Path(checkpoint), run)
        if on_step is not None:
            on_step(FitStep(training.step, steps, training.losses[-1]))
    return tuple(training.losses)


def fit_dead_ends(
    model: HFModel,
    texts: Sequence[LoggedText],
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 100,
    on_step: Callable[[FitStep], object] | None = None,
) -> HFValue:
    """A new value, with a copy of `model` for its body, whose -Q(s, a) is the chance of an undesired ending.

    The model is one with the tokenizer of the model to be rectified, and may be much smaller. Where the texts are not
    as the model to be rectified would draw them (only the most and the least undesired of each prompt, say), -Q is not
    calibrated: then take `eps` of `Rectified` as a dial.

    Args:
        model: to start from; it stays as it is.
        texts: rewards of -1 and 0 only, some of each; see `nextoken.decode.logged`.
        recipe, seed, checkpoint, every, on_step: as of `fit_value`.

    Raises:
        ValueError: other rewards, or all alike; and as of `fit_value`.
    """
    if {float(text.reward) for text in texts} != {-1.0, 0.0}:
        raise ValueError(
            "dead ends are learnt from texts with reward -1 (undesired) and others with reward 0, and these have "
            f"rewards {sorted({float(text.reward) for text in texts})[:5]}"
        )
    value = HFValue.on(model, seed=seed)
    fit_value(value, texts, recipe=recipe, seed=seed, checkpoint=checkpoint, every=every, on_step=on_step)
    return value


def _loss(training: Training, texts: Sequence[LoggedText], how: Recipe) -> Tensor:
    value, head = training.value, training.value.head
    # Padded to the right, where a causal body does not look.
    width = max(len(text.tokens) for text in texts)
    ids = torch.tensor([[*text.tokens, *[0] * (width - len(text.tokens))] for text in texts])
    at = torch.arange(width - 1)
    last = torch.tensor([len(text.tokens) - 2 for text in texts])
    drawn = (at >= torch.tensor([text.given - 1 for text in texts])[:, None]) & (at <= last[:, None])
    hidden = value.hidden(ids[:, :-1])
    drawn, last = drawn.to(hidden.device), last.to(hidden.device)
    states, actions = hidden[drawn], ids[:, 1:].to(hidden.device)[drawn]
    said = head.taken(states, actions)
    with torch.no_grad():
        following = torch.zeros(drawn.shape, dtype=said.dtype, device=said.device)
        following[drawn] = training.target.taken(states, actions)
        rewards = torch.tensor([text.reward for text in texts], dtype=said.dtype, device=said.device)
        targets = sarsa_targets(following, rewards, last, discount=how.discount, trace=how.trace)[drawn]
    return (said - targets.clamp(value.low, value.high)).square().mean()


def _chosen(step: int, count: int, batch: int, seed: int) -> list[int]:
    """Which texts step number `step` learns from: every epoch has an order of its own."""
    epoch, place = divmod(step, math.ceil(count / batch))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_derived(seed, f"epoch {epoch}")))
    return order[place * batch : (place + 1) * batch].tolist()


def _derived(seed: int, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}".encode()).digest()[:7], "big")


def _run_digest(value: HFValue, texts: Sequence[LoggedText], how: Recipe, seed: int) -> str:
    sha = hashlib.sha256(repr((value.digest, how, seed)).encode())
    for text in texts:
        sha.update(repr((text.tokens, text.given, float(text.reward))).encode())
    return sha.hexdigest()[:16]


def _check(value: HFValue, texts: Sequence[LoggedText]) -> None:
    if not texts:
        raise ValueError("there are no texts to learn from")
    for number, text in enumerate(texts):
        if not 0 <= min(text.tokens) <= max(text.tokens) < value.vocab.size:
            raise ValueError(f"text {number} has token ids outside the vocabulary of {value.vocab.size}")
        if value.context_length is not None and len(text.tokens) > value.context_length:
            raise ValueError(
                f"text {number} has {len(text.tokens)} tokens and the context of {value.name} holds "
                f"{value.context_length}: shorten it"
            )
        if not value.low <= text.reward <= value.high:
            raise ValueError(
                f"text {number} has reward {text.reward}, outside the value's bounds {value.low} and {value.high}"
            )

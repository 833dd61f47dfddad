"""How the adapter of Kangaroo is learnt: to say after a few layers what the target says after all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.model.base import ABSENT
from nextoken.model.early_exit import EarlyExit
from nextoken.model.sarsa import FitStep
from nextoken.speculate.kangaroo_adapter import KangarooAdapter

_READ = 16


@dataclass(frozen=True)
class KangarooRecipe:
    """How to train. The released run has 20 epochs of 32 texts per step at a rate of 3e-5, for models of billions of
    weights; smaller ones take a larger rate.

    Args:
        epochs, batch: passes over the texts, and texts per step.
        rate: AdamW's (betas 0.9 and 0.95); it rises over the first `warm_up` of the steps and falls linearly to 0.
        warm_up: share of the steps.
        clip: largest absolute value of any number of the gradient.
        weight_decay: AdamW's.
    """

    epochs: int = 20
    batch: int = 32
    rate: float = 1e-3
    warm_up: float = 0.05
    clip: float = 0.5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"epochs and batch must be at least 1, got {self.epochs} and {self.batch}")
        if self.rate <= 0 or self.clip <= 0 or self.weight_decay < 0 or not 0 <= self.warm_up < 1:
            raise ValueError(
                f"rate and clip must be above 0, weight_decay at least 0 and warm_up from 0 to below 1; got "
                f"{self.rate}, {self.clip}, {self.weight_decay} and {self.warm_up}"
            )

    def rate_at(self, step: int, steps: int) -> float:
        """The rate of step number `step` (from 0) of `steps`."""
        rises = self.warm_up * steps
        rising = (step + 1) / rises if rises else 1.0
        return self.rate * min(1.0, rising, (steps - step) / (steps - rises))


def soft_cross_entropy(log_q: Tensor, log_p: Tensor) -> Tensor:
    """mean over places of - sum_v p(v) log q(v), in nats, of log-probabilities [..., V]."""
    return -(log_p.exp() * log_q).sum(-1).mean()


def fit_kangaroo(
    adapter: KangarooAdapter,
    target: EarlyExit,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    recipe: KangarooRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> tuple[float, ...]:
    """Minimise - sum_v p(v) log q(v) at every place of the responses, p what the target says and q the adapter.

    The target reads every text once and is not changed; its states, 2 H numbers per token, are held meanwhile. The
    adapter is trained in place. Equal seeds give equal weights on one machine.

    Args:
        adapter: see `KangarooAdapter`.
        target: whose exit states it reads.
        texts: pairs of a prompt and the text that followed, token ids; best of the target's own.
        recipe: how to train.
        seed: of the order of the texts.
        on_step: called after each step.

    Returns:
        The loss of every step.

    Raises:
        ValueError: there are no texts, a prompt or response is empty, or the adapter is for other exit states.

    Source: Liu et al., arXiv:2404.18911, section 3.2, and the released code (train.py).
    """
    how = recipe or KangarooRecipe()
    adapter.check(target)
    read = _read(target, texts)
    optimizer = torch.optim.AdamW(adapter.parameters(), betas=(0.9, 0.95), weight_decay=how.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    steps, losses = how.epochs * math.ceil(len(read) / how.batch), list[float]()
    adapter.train()
    for _ in range(how.epochs):
        order = torch.randperm(len(read), generator=generator).tolist()
        for start in range(0, len(order), how.batch):
            chosen = [read[number] for number in order[start : start + how.batch]]
            log_q, log_p = _compared(adapter, target, chosen)
            loss = soft_cross_entropy(log_q, log_p)
            optimizer.param_groups[0]["lr"] = how.rate_at(len(losses), steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_value_(adapter.parameters(), how.clip)
            optimizer.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(FitStep(len(losses), steps, losses[-1]))
    adapter.eval()
    return tuple(losses)


@torch.no_grad()
def overlap(adapter: KangarooAdapter, target: EarlyExit, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """mean over the places of the responses of sum_v min(p(v), q(v)): the chance that a guess drawn there stands.

    Raises:
        ValueError: as `fit_kangaroo`.
    """
    adapter.check(target)
    read = _read(target, texts)
    shared, places = 0.0, 0
    for start in range(0, len(read), _READ):
        log_q, log_p = _compared(adapter, target, read[start : start + _READ])
        shared += float(torch.minimum(log_q, log_p).exp().sum())
        places += len(log_q)
    return shared / places


@dataclass(frozen=True)
class _Read:
    """What the target made of one text: exit states and final normed ones [n, H], and the first place to learn from."""

    exits: Tensor
    final: Tensor
    first: int


@torch.no_grad()
def _read(target: EarlyExit, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[_Read]:
    if not texts or any(not prompt or not output for prompt, output in texts):
        raise ValueError("there must be texts, and every prompt and every response needs at least one token")
    read = list[_Read]()
    for start in range(0, len(texts), _READ):
        # The last token of a text is not read: what follows it is no part of the text.
        some = [(len(prompt), [*prompt, *output][:-1]) for prompt, output in texts[start : start + _READ]]
        width = max(len(row) for _, row in some)
        state = target.start(len(some))
        final = target.extend(state, [[*row, *[ABSENT] * (width - len(row))] for _, row in some]).hidden
        exits = target.exits(state)
        assert final is not None
        read += [
            _Read(exits[number, : len(row)].clone(), final[number, : len(row)].clone(), given - 1)
            for number, (given, row) in enumerate(some)
        ]
    return read


def _compared(adapter: KangarooAdapter, target: EarlyExit, texts: Sequence[_Read]) -> tuple[Tensor, Tensor]:
    """log q and log p [M, V] at all places to learn from."""
    # Rows are padded on the right, where causal attention does not look.
    exits = torch.nn.utils.rnn.pad_sequence([text.exits for text in texts], batch_first=True)
    places = torch.arange(exits.shape[1])
    asked = torch.stack([(places >= text.first) & (places < len(text.exits)) for text in texts])
    said = adapter(exits, target.stack.parallel(places[None]))
    log_q = adapter.next(said[asked.to(said.device)][None], target).log_probs()[0]
    with torch.no_grad():
        final = torch.cat([text.final[text.first :] for text in texts])
        log_p = adapter.next(final[None], target).log_probs()[0]
    return log_q, log_p

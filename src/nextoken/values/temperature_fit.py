"""Training a temperature network on texts, with the language model left as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.sarsa import FitStep
from nextoken.values._descent import Schedule, descend
from nextoken.values.robust import entropy_at, robust_loss
from nextoken.values.temperature_network import LearnedTemperature, Shift, TemperatureNetwork


def neutral_radius(
    model: LanguageModel, texts: Sequence[str], *, true_size: int | None = None, max_tokens: int = 256
) -> float:
    """rho = log V - mean H(p), the mean over every token of the texts: with it the best constant temperature is 1.

    So whatever a network trained with it gains, it gains by telling one position from another. A larger rho makes
    distributions sharper, a smaller one flatter. (The paper takes 8 to 10 nats, which leaves 0.4 to 2.8 for H.)
    """
    rows = _rows(model, texts, max_tokens)
    total, count = 0.0, 0
    for logits, _ in _batches(model, rows, true_size or model.vocab.size):
        total += float(entropy_at(logits, torch.ones(len(logits), device=logits.device)).double().sum())
        count += len(logits)
    return math.log(true_size or model.vocab.size) - total / count


def fit_temperature(
    model: LanguageModel,
    texts: Sequence[str],
    *,
    rho: float | None = None,
    low: float = 0.5,
    high: float = 2.0,
    width: int = 256,
    shift: Shift = "mean",
    true_size: int | None = None,
    dropout: float = 0.5,
    max_tokens: int = 256,
    schedule: Schedule | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> LearnedTemperature:
    """Minimise the mean of F(tau(s); s, y) over every token y of the texts, s the model's logits before it.

    F is `robust_loss`. The model is not changed. What is learnt is a temperature that depends on the logits and not on
    the label; where the network could say anything it would make all distributions equally uncertain, see
    `equalising_temperature`. F is not comparable with cross-entropy.

    Args:
        model: any language model that gives whole distributions.
        texts: to learn from; each is read from its beginning.
        rho: radius in nats; by default that of `neutral_radius`. From log V on all temperatures go to `low`.
        low, high, width, shift, true_size, dropout: as of `TemperatureNetwork`.
        max_tokens: tokens of each text that are read, begin token included.
        schedule: how to train. The paper takes 30,000 steps at a rate of 1e-4; few steps want more.
        seed: of the first weights, the order of the texts and the dropout.
        on_step: called after each step.

    Raises:
        ValueError: no text has a token to predict, the model tells only its top tokens or makes tokens impossible, or
            a number is out of range.

    Source: TempNet, arXiv:2404.04575, section 4 ("frozen").
    """
    if model.is_partial:
        raise ValueError(f"{model.name} tells only its most probable tokens; whole distributions are needed")
    how = schedule or Schedule(epochs=4, batch=4, rate=2e-2, weight_decay=1e-2)
    rows = _rows(model, texts, max_tokens)
    radius = rho if rho is not None else neutral_radius(model, texts, true_size=true_size, max_tokens=max_tokens)
    if not 0 <= radius < math.inf:
        raise ValueError(f"rho must be at least 0 and finite, got {radius}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TemperatureNetwork(
            model.vocab.size, low=low, high=high, width=width, shift=shift, true_size=true_size, dropout=dropout
        )

        def loss_of(chosen: list[int]) -> Tensor:
            (logits, labels), *_ = _batches(model, [rows[i] for i in chosen], network.true_size, size=how.batch)
            return robust_loss(logits, labels, network.to(logits.device)(logits), rho=radius).mean()

        network.train()
        descend(list(network.parameters()), loss_of, len(rows), schedule=how, seed=seed, on_step=on_step)
    return LearnedTemperature(network.eval(), radius, model.digest)


def _rows(model: LanguageModel, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    limit = max_tokens if model.context_length is None else min(max_tokens, model.context_length)
    begin = [] if model.vocab.bos_id is None else [model.vocab.bos_id]
    rows = [[*begin, *model.vocab.encode(text).ids][:limit] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError(f"none of {len(texts)} texts has a token to predict: give longer ones")
    return rows


@torch.no_grad()
def _batches(
    model: LanguageModel, rows: Sequence[Sequence[int]], size_of_vocabulary: int, *, size: int = 8
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [N, V] and labels [N] of every token after the first, `size` texts at a time."""
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        width = max(map(len, part))
        ids = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in part])
        there = ids[:, 1:] != ABSENT
        logits = model.predict(ids[:, :-1])[there].logits()[:, 0, :size_of_vocabulary]
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"{model.name} makes some tokens impossible, and a temperature network reads finite logits: give "
                "true_size where these only fill the vocabulary up, or take another model"
            )
        yield logits.float(), ids[:, 1:][there].to(logits.device)

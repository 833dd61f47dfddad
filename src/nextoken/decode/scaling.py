"""Scalings of the whole distribution: temperature, greedy, bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.transform import REMOVED, Context, Transform
from nextoken.methods import method


@method(name="Temperature", access="gray", summary="scores divided by T")
@dataclass(frozen=True)
class Temperature(Transform):
    """l / T; T = 0 is greedy."""

    t: float

    def __post_init__(self) -> None:
        if not 0 <= self.t < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.t}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return Greedy()(scores, context) if self.t == 0 else scores / self.t


@method(name="Greedy", access="gray", summary="the most probable token with certainty")
@dataclass(frozen=True)
class Greedy(Transform):
    """Only the most probable token stays; of several, the one of lowest id."""

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        best = scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, REMOVED).scatter(-1, best, scores.gather(-1, best))


@method(name="Dynamic temperature", access="gray", summary="a temperature that rises with the entropy")
@dataclass(frozen=True)
class DynamicTemperature(Transform):
    """l / T with T = low + (high - low) (H / log n)^exponent, n the number of tokens still possible."""

    low: float
    high: float
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"dynamic_temperature needs 0 < low <= high, got {self.low} and {self.high}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        log_probs = torch.log_softmax(scores, -1)
        entropy = -torch.where(log_probs > REMOVED, log_probs.exp() * log_probs, 0.0).sum(-1, keepdim=True)
        largest = (scores > REMOVED).sum(-1, keepdim=True).clamp(min=2).to(scores.dtype).log()
        share = (entropy / largest).clamp(0.0, 1.0)
        return scores / (self.low + (self.high - self.low) * share**self.exponent)


@method(name="Logit bias", access="gray", summary="constants added to the scores of chosen tokens")
@dataclass(frozen=True)
class LogitBias(Transform):
    """l(v) + bias(v) for the tokens named; -inf forbids a token.

    Args:
        bias: token id -> number added.
    """

    bias: Mapping[int, float]

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        outside = [token for token in self.bias if not 0 <= token < scores.shape[-1]]
        if outside:
            raise ValueError(f"logit_bias names token {outside[0]}, outside the vocabulary of {scores.shape[-1]}")
        ids = torch.tensor(list(self.bias), dtype=torch.long, device=scores.device)
        values = torch.tensor(list(self.bias.values()), dtype=scores.dtype, device=scores.device)
        return scores.index_add(-1, ids, values.expand(*scores.shape[:-1], -1))

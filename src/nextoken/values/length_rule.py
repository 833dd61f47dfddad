"""LengthRule: how candidates are weighed by the lengths that they lead to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nextoken.values.length_value import value_of
from nextoken.values.tilting import solve_tilt, tilt

_REMOVED = float("-inf")

Kind = Literal["equal", "at_least", "at_most"]


@dataclass(frozen=True)
class Candidates:
    """What a rule may go by: N places with up to K candidates each, the most probable first.

    Args:
        log_p: of the candidates [N, K], normalised over them; -inf where there is none.
        lengths: l after each candidate [N, K], float64.
        drawn: tokens of the output before each place [N].
        discount: g of the lengths.
    """

    log_p: Tensor
    lengths: Tensor
    drawn: Tensor
    discount: float

    @property
    def u(self) -> Tensor:
        """1 - g^l [N, K]."""
        return value_of(self.lengths, self.discount)


class LengthRule(ABC):
    """How candidates are weighed by the lengths that they lead to."""

    needs_prompt: bool = False
    """Whether it counts the tokens drawn, so that it must be known where the prompt ends."""

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Tensor:
        """log p' [N, K] up to a constant per place; -inf forbids a candidate."""


@dataclass(frozen=True)
class Tilt(LengthRule):
    """p' proportional to p exp(b u): b above 0 lengthens, below 0 shortens, 0 changes nothing.

    Args:
        b: the paper sweeps from -20 to -1000. Larger |b| means a larger divergence from p, step by step.
    """

    b: float

    def __call__(self, candidates: Candidates) -> Tensor:
        return tilt(candidates.log_p, candidates.u, torch.as_tensor(self.b, dtype=torch.float64))


@dataclass(frozen=True)
class Scaled(LengthRule):
    """The tilt at which E_p'[u] = factor E_p[u], as far as the candidates reach; factor 1 changes nothing."""

    factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.factor < float("inf"):
            raise ValueError(f"factor must be at least 0 and finite, got {self.factor}")

    def __call__(self, candidates: Candidates) -> Tensor:
        u = candidates.u
        expected = (candidates.log_p.double().exp() * u).sum(-1)
        return tilt(candidates.log_p, u, solve_tilt(candidates.log_p, u, self.factor * expected))


@dataclass(frozen=True)
class SoftTarget(LengthRule):
    """The tilt at which E_p'[u] = u* = 1 - g^l*, l* = max(length - n, 0), as far as the candidates reach.

    Args:
        length: tokens of the output, the end token not counted.
    """

    length: int
    needs_prompt = True

    def __post_init__(self) -> None:
        _check_length(self.length)

    def __call__(self, candidates: Candidates) -> Tensor:
        u = candidates.u
        wanted = value_of((self.length - candidates.drawn).clamp(min=0), candidates.discount)
        return tilt(candidates.log_p, u, solve_tilt(candidates.log_p, u, wanted))


@dataclass(frozen=True)
class HardTarget(LengthRule):
    """One candidate is left. With l* = max(length - n, 0) tokens to go and u* = 1 - g^l*:

    - `equal`: that of the smallest |u - u*|;
    - `at_least`: that of the largest u while l* > 0, then of the smallest;
    - `at_most`: that of the smallest u, always.

    Of equal ones the more probable. u of a candidate counts the end token among what is to come, so that u* is met just
    where `length` tokens come before it. It takes a gamble on the rest for its sure equivalent, at every step anew: a
    length is hit for certain only where candidates lead to sure lengths, with the exact value as with a learnt one.

    Args:
        length: tokens of the output, the end token not counted.
        kind: as above.
        space: "value" as in the paper; "length" compares |l - l*| instead, as its released code does.
    """

    length: int
    kind: Kind = "equal"
    space: Literal["value", "length"] = "value"
    needs_prompt = True

    def __post_init__(self) -> None:
        _check_length(self.length)
        if self.kind not in get_args(Kind) or self.space not in ("value", "length"):
            raise ValueError(
                f"kind must be one of {', '.join(get_args(Kind))} and space 'value' or 'length'; got {self.kind!r} and "
                f"{self.space!r}"
            )

    def __call__(self, candidates: Candidates) -> Tensor:
        left = (self.length - candidates.drawn).clamp(min=0)[:, None]
        lengths = candidates.lengths
        if self.kind == "equal":
            wanted = value_of(left, candidates.discount)
            distance = (lengths - left).abs() if self.space == "length" else (candidates.u - wanted).abs()
        elif self.kind == "at_least":
            distance = torch.where(left > 0, -lengths, lengths)
        else:
            distance = lengths
        # nan stands for "no further than": every candidate that is there is a choice, even of infinite length.
        there = candidates.log_p > _REMOVED
        least = distance.masked_fill(~there, float("inf")).amin(-1, keepdim=True)
        best = ((distance <= least) & there).byte().argmax(-1, keepdim=True)
        return torch.full_like(candidates.log_p, _REMOVED).scatter(-1, best, 0.0)


def _check_length(length: int) -> None:
    if length < 0:
        raise ValueError(f"length must be at least 0 tokens, got {length}")

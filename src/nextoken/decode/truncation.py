"""Truncations: keep a set K of tokens, give the rest probability 0.

Each is the rule of its paper as transformers has it, ties and all. p is the distribution that comes in, H its entropy
in nats; the most probable token always stays unless said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.transform import REMOVED, Context, Transform, keep_at_least_one
from nextoken.methods import method


def _share(name: str, value: float, *, zero: bool = False) -> None:
    low = value >= 0 if zero else value > 0
    if not (low and value <= 1):
        raise ValueError(f"{name} must be {'at least' if zero else 'above'} 0 and at most 1, got {value}")


@method(name="Top-k", access="gray", summary="keep the k most probable tokens")
@dataclass(frozen=True)
class TopK(Transform):
    """K = the k largest; tokens tied with the k-th stay."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"top_k keeps k >= 1 tokens, got {self.k}; leave it out to keep all")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        least = scores.topk(min(self.k, scores.shape[-1]), dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, REMOVED)


@method(name="Top-p", arxiv="1904.09751", access="gray", summary="nucleus: the smallest set with mass p")
@dataclass(frozen=True)
class TopP(Transform):
    """K = the smallest set of most probable tokens whose mass reaches p; the token that crosses p stays.

    Source: Holtzman et al., arXiv:1904.09751.
    """

    p: float

    def __post_init__(self) -> None:
        _share("top_p", self.p, zero=True)

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        ordered, order = torch.sort(scores, descending=False, dim=-1)
        # Counted from the least probable, the tail that is cut is the longest whose mass is at most 1 - p.
        cut = ordered.softmax(-1).cumsum(-1) <= 1 - self.p
        cut[..., -1] = False
        return scores.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), REMOVED)


@method(name="Min-p", arxiv="2407.01082", access="gray", summary="keep p(v) >= m max p")
@dataclass(frozen=True)
class MinP(Transform):
    """K = {v : p(v) >= m max p}. Source: arXiv:2407.01082."""

    m: float

    def __post_init__(self) -> None:
        _share("min_p", self.m, zero=True)

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        probs = scores.softmax(-1)
        return keep_at_least_one(scores, probs < self.m * probs.amax(-1, keepdim=True))


@method(
    name="Locally typical sampling",
    arxiv="2202.00666",
    access="gray",
    summary="keep the tokens whose surprisal is closest to the entropy",
)
@dataclass(frozen=True)
class Typical(Transform):
    """K = the tokens of least |-log p(v) - H| whose mass reaches tau; it need not hold the most probable token.

    Source: Locally Typical Sampling, arXiv:2202.00666. The paper's set is any smallest one; like transformers, we keep
    every token tied with the last of it.
    """

    tau: float = 0.95

    def __post_init__(self) -> None:
        _share("tau", self.tau)

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        log_probs = torch.log_softmax(scores, -1)
        probs = log_probs.exp()
        entropy = -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1, keepdim=True)
        deviation = (-log_probs - entropy).abs()
        ordered, order = deviation.sort(-1)
        mass = scores.gather(-1, order).softmax(-1).cumsum(-1)
        last = (mass < self.tau).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        removed = deviation > ordered.gather(-1, last)
        removed.scatter_(-1, order[..., :1], False)
        return scores.masked_fill(removed, REMOVED)


@method(name="Epsilon sampling", arxiv="2210.15191", access="gray", summary="keep p(v) >= epsilon")
@dataclass(frozen=True)
class Epsilon(Transform):
    """K = {v : p(v) >= epsilon}. Source: arXiv:2210.15191."""

    epsilon: float = 3e-4

    def __post_init__(self) -> None:
        _share("epsilon", self.epsilon)

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return keep_at_least_one(scores, scores.softmax(-1) < self.epsilon)


@method(name="Eta sampling", arxiv="2210.15191", access="gray", summary="epsilon sampling with a threshold by entropy")
@dataclass(frozen=True)
class Eta(Transform):
    """K = {v : p(v) >= min(epsilon, sqrt(epsilon) exp(-H))}. Source: arXiv:2210.15191."""

    epsilon: float = 3e-4

    def __post_init__(self) -> None:
        _share("epsilon", self.epsilon)

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        log_probs = torch.log_softmax(scores, -1)
        probs = log_probs.exp()
        entropy = -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1, keepdim=True)
        threshold = (math.sqrt(self.epsilon) * (-entropy).exp()).clamp(max=self.epsilon)
        return keep_at_least_one(scores, probs < threshold)


@method(name="Top-n-sigma", arxiv="2411.07641", access="gray", summary="keep logits within n deviations of the largest")
@dataclass(frozen=True)
class TopNSigma(Transform):
    """K = {v : l(v) >= max l - n sigma}, sigma the population deviation of the finite scores.

    Which tokens stay does not depend on a temperature before it; a truncation before it changes sigma. n = 0 keeps the
    largest. Source: arXiv:2411.07641.
    """

    n: float = 1.0

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"top_n_sigma needs n >= 0, got {self.n}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        finite = torch.isfinite(scores)
        count = finite.sum(-1, keepdim=True)
        mean = scores.masked_fill(~finite, 0.0).sum(-1, keepdim=True) / count
        variance = (scores - mean).masked_fill(~finite, 0.0).square().sum(-1, keepdim=True) / count
        return scores.masked_fill(scores < scores.amax(-1, keepdim=True) - self.n * variance.sqrt(), REMOVED)


@method(name="XTC", access="gray", summary="sometimes drop all probable tokens but the least of them")
@dataclass(frozen=True)
class XTC(Transform):
    """With probability q, of the tokens with p(v) >= t remove all but the least probable; fewer than two: nothing.

    Of several least probable ones the one of highest id stays. t above 1/2 never does anything.
    """

    q: float = 0.5
    t: float = 0.1

    def __post_init__(self) -> None:
        _share("q", self.q, zero=True)
        _share("t", self.t)

    @property
    def is_random(self) -> bool:
        return True

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        if context.uniform is None:
            raise ValueError("xtc flips a coin for each row: context.uniform must hold a number in [0, 1) per row")
        probs = scores.softmax(-1)
        probable = probs >= self.t
        ids = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
        lowest = probs.masked_fill(~probable, 2.0).amin(-1, keepdim=True)
        least = ids.masked_fill(~probable | (probs > lowest), -1).amax(-1, keepdim=True)
        coin = context.uniform.to(scores.device)[:, None] < self.q
        return scores.masked_fill(coin & probable & (ids != least), REMOVED)

"""Adaptive transforms: how much is cut depends on how the text has gone, or on the shape of the distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.scaling import Greedy
from nextoken.decode.transform import REMOVED, Context, Transform, keep_at_least_one
from nextoken.methods import method

_BITS = 1 / math.log(2)


def _mu(context: Context, row: int, tau: float, eta: float) -> float:
    """Mirostat's running limit in bits: mu_0 = 2 tau, then mu - eta (surprise - tau) after each token."""
    if not context.surprisals:
        return 2 * tau
    spent = context.surprisals[row]
    return 2 * tau - eta * (sum(spent) * _BITS - tau * len(spent))


@method(name="Mirostat 2", arxiv="2007.14966", access="gray", summary="hold the surprise of the output at tau bits")
@dataclass(frozen=True)
class Mirostat2(Transform):
    """K = {v : -log2 p(v) <= mu}; mu <- mu - eta (surprise of the token drawn - tau), mu_0 = 2 tau, all in bits.

    The surprise is of the distribution drawn from, as llama.cpp takes it. Source: arXiv:2007.14966.
    """

    tau: float = 5.0
    eta: float = 0.1

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        mu = torch.tensor([_mu(context, row, self.tau, self.eta) for row in range(scores.shape[0])])
        surprise = -torch.log_softmax(scores, -1) * _BITS
        return keep_at_least_one(scores, surprise > mu.to(scores.device, scores.dtype)[:, None])


@method(name="Mirostat 1", arxiv="2007.14966", access="gray", summary="mirostat with top-k from a Zipf exponent")
@dataclass(frozen=True)
class Mirostat1(Transform):
    """Top-k with k = (e 2^mu / (1 - V^-e))^(1/s), e = s - 1, s the Zipf exponent of the m most probable tokens.

    s = sum t_i b_i / sum t_i^2 with t_i = ln((i + 2) / (i + 1)) and b_i = ln(p_i / p_(i+1)); mu as in `Mirostat2`.
    Source: arXiv:2007.14966, algorithm 1.
    """

    tau: float = 5.0
    eta: float = 0.1
    m: int = 100

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        size = scores.shape[-1]
        log_probs = torch.log_softmax(scores, -1)
        highest = log_probs.topk(min(self.m, size), dim=-1).values.double()
        gaps = highest[:, :-1] - highest[:, 1:]
        usable = torch.isfinite(gaps)
        t = torch.log((torch.arange(gaps.shape[1]) + 2.0) / (torch.arange(gaps.shape[1]) + 1.0)).to(gaps)
        s = (t * gaps.masked_fill(~usable, 0.0)).sum(-1) / (t.square() * usable).sum(-1).clamp(min=1e-12)
        result = scores.clone()
        for row in range(scores.shape[0]):
            k = self._k(float(s[row]), _mu(context, row, self.tau, self.eta), size)
            least = scores[row].topk(k).values[-1]
            result[row] = scores[row].masked_fill(scores[row] < least, REMOVED)
        return result

    @staticmethod
    def _k(s: float, mu: float, size: int) -> int:
        e = s - 1
        if abs(e) < 1e-9:
            e = 1e-9 if e >= 0 else -1e-9
        try:
            k = (e * 2.0**mu / (1 - size ** (-e))) ** (1 / s)
        except (OverflowError, ZeroDivisionError):
            return size
        return max(1, min(size, round(k))) if math.isfinite(k) else size


@method(name="Entropy-varentropy sampling", access="gray", summary="sure: greedy; unsure: hotter, wider or narrower")
@dataclass(frozen=True)
class EntropyVarentropy(Transform):
    """Regimes by the entropy H and the varentropy W of the distribution, in bits.

    H < low_entropy and W < low_varentropy: the most probable token. H > high_entropy and W < low_varentropy:
    temperature times 1.3. W > high_varentropy: times 1.2 where H < high_entropy, else times 2 where H > middle_entropy.
    Otherwise the base temperature. The limits are those of the entropix sampler; its terms from attention are left out,
    since they are no properties of the distribution.
    """

    temperature: float = 0.666
    low_entropy: float = 0.1
    middle_entropy: float = 3.0
    high_entropy: float = 5.0
    low_varentropy: float = 0.1
    high_varentropy: float = 5.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        log_probs = torch.log_softmax(scores, -1)
        probs = log_probs.exp()
        bits = torch.where(probs > 0, -log_probs * _BITS, 0.0)
        entropy = (probs * bits).sum(-1, keepdim=True)
        varentropy = (probs * (bits - entropy).square()).sum(-1, keepdim=True)
        calm, stormy = varentropy < self.low_varentropy, varentropy > self.high_varentropy
        factor = torch.ones_like(entropy)
        factor = torch.where(stormy & (entropy > self.middle_entropy), 2.0, factor)
        factor = torch.where(stormy & (entropy < self.high_entropy), 1.2, factor)
        factor = torch.where(calm & (entropy > self.high_entropy), 1.3, factor)
        warm = scores / (self.temperature * factor)
        return torch.where(calm & (entropy < self.low_entropy), Greedy()(scores, context), warm)

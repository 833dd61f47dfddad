"""Acceptance: which of the guesses at a node stands, or what comes instead.

p is the target's distribution after the transform, q the draft's, both [V] in float64. A rule is lossless if the token
that results, whichever way, has the law p.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model.next import invert_probs

Uniform = Callable[[], float]
"""Gives independent numbers in [0, 1)."""


@dataclass(frozen=True)
class Candidates:
    """The children of a node, in the order drawn.

    Args:
        tokens: of each; a token drawn more than once stands more than once.
        law: q [V], or None if they were chosen rather than drawn.
        replacement: whether each was drawn from q, or from q without those before.
    """

    tokens: Sequence[int]
    law: Tensor | None = None
    replacement: bool = False


class Acceptance(ABC):
    """A rule: the token that follows a node, given the target's distribution there and the guesses."""

    lossless: bool = True

    @abstractmethod
    def __call__(self, p: Tensor, candidates: Candidates, uniform: Uniform) -> int:
        """The next token: one of the candidates, which is then followed, or another, which ends the walk."""


def drawn(p: Tensor, uniform: Uniform) -> int:
    """A token of law p [V], by one uniform number."""
    return int(invert_probs(p, torch.tensor(uniform(), dtype=torch.float64)))


@method(
    name="Token-level verification",
    access="gray",
    summary="draw from the target, and follow the draft as long as it guessed so",
)
class Follow(Acceptance):
    """Y ~ p; a guess stands if it is Y. The chance that one does is p(candidates), the best for guesses not drawn.

    Each token takes one uniform number, the same as without speculation: tokens are those that plain decoding with the
    same seed gives, at any temperature. Works for any draft.
    """

    def __call__(self, p: Tensor, candidates: Candidates, uniform: Uniform) -> int:
        return drawn(p, uniform)


@method(
    name="Recursive rejection sampling",
    arxiv="2402.14160",
    access="gray",
    summary="try drawn guesses one after the other, each against what the target has left",
)
class Recursive(Acceptance):
    """For each candidate x_k of law q_k: stands with probability min(1, p_k(x_k) / q_k(x_k)), else p_{k+1} =
    norm(max(p_k - q_k, 0)); if none stands, the token is drawn from what is left of p.

    q_{k+1} is q_k, or without replacement q_k less x_k, renormalised. With one candidate it is speculative sampling
    (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318). Guesses that were not drawn are followed as
    `Follow` does.

    Source: Jeon et al., arXiv:2402.14160, section 3.
    """

    def __call__(self, p: Tensor, candidates: Candidates, uniform: Uniform) -> int:
        if candidates.law is None:
            return drawn(p, uniform)
        q = candidates.law
        for token in candidates.tokens:
            # Strictly below: a number of 0 must not let an impossible token stand.
            if uniform() * float(q[token]) < float(p[token]):
                return token
            p = _normalised((p - q).clamp(min=0), p)
            if not candidates.replacement:
                rest = q.clone()
                rest[token] = 0
                q = _normalised(rest, q)
        return drawn(p, uniform)


@method(
    name="SpecTr",
    arxiv="2310.15141",
    access="gray",
    summary="k-sequential selection among independent guesses, near the optimum of transport",
)
class KSequential(Acceptance):
    """Each of k independent guesses x ~ q stands with probability min(1, p(x) / (rho q(x))), in order; else the token
    is drawn from p_res = (p - min(q, p / rho) p_acc / beta) / (1 - p_acc).

    beta = sum min(q, p / rho), p_acc = 1 - (1 - beta)^k, and rho in [1, k] is the smallest with p_acc <= rho beta,
    found by bisection. The chance that a guess stands is at least 1 - (1 - 1/k)^k of the best possible.

    Raises:
        ValueError: the guesses were drawn without replacement.

    Source: Sun et al., arXiv:2310.15141, algorithm 3 (there p and q are the other way round).
    """

    def __call__(self, p: Tensor, candidates: Candidates, uniform: Uniform) -> int:
        if candidates.law is None:
            return drawn(p, uniform)
        if not candidates.replacement and len(candidates.tokens) > 1:
            raise ValueError("k-sequential selection needs independent guesses; use Recursive for these")
        q, k = candidates.law, len(candidates.tokens)
        rho = smallest_rho(p, q, k)
        for token in candidates.tokens:
            if uniform() * rho * float(q[token]) < float(p[token]):
                return token
        return drawn(residual(p, q, k, rho), uniform)


def smallest_rho(p: Tensor, q: Tensor, k: int) -> float:
    """The smallest rho in [1, k] with 1 - (1 - beta)^k <= rho beta, beta = sum min(q, p / rho)."""
    if k == 1:
        return 1.0
    low, high = 1.0, float(k)
    for _ in range(60):
        rho = (low + high) / 2
        beta = float(torch.minimum(q, p / rho).sum())
        low, high = (rho, high) if 1 - (1 - beta) ** k > rho * beta else (low, rho)
    return high


def residual(p: Tensor, q: Tensor, k: int, rho: float) -> Tensor:
    """Law of the token when none of the k guesses stands; p where q misses the support of p altogether."""
    common = torch.minimum(q, p / rho)
    beta = float(common.sum())
    if beta == 0:
        return p
    accepted = 1 - (1 - beta) ** k
    return _normalised((p - common * (accepted / beta)).clamp(min=0), p)


def best_acceptance(p: Tensor, q: Tensor, k: int) -> float:
    """The largest chance with which any lossless rule can let one of k independent guesses of law q stand.

    min over sets A of p(V - A) + 1 - (1 - q(A))^k, the minimal cut of the transport; all sets are tried.

    Raises:
        ValueError: V is above 20.
    """
    size = len(p)
    if size > 20:
        raise ValueError(f"all subsets of {size} tokens are too many; at most 20")
    members = (torch.arange(2**size)[:, None] >> torch.arange(size)) & 1
    inside = members.double()
    return float((((1 - inside) @ p) + 1 - (1 - inside @ q).clamp(min=0) ** k).min())


@method(
    name="Typical acceptance",
    arxiv="2401.10774",
    access="gray",
    summary="let guesses stand that the target finds plausible; changes the distribution",
)
@dataclass(frozen=True)
class Typical(Acceptance):
    """A guess x stands if p(x) > min(epsilon, delta exp(-H(p))), the first such in order; else it is drawn from p.

    Not lossless: what is plausible passes as often as the draft proposes it.

    Source: Cai et al. (Medusa), arXiv:2401.10774, section 2.3.1.
    """

    epsilon: float = 0.3
    delta: float = 0.09
    lossless: bool = False

    def __call__(self, p: Tensor, candidates: Candidates, uniform: Uniform) -> int:
        entropy = torch.special.entr(p).sum()
        bar = min(self.epsilon, self.delta * float((-entropy).exp()))
        plausible = [token for token in candidates.tokens if float(p[token]) > bar]
        return plausible[0] if plausible else drawn(p, uniform)


def _normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    """weights / sum; `otherwise` where rounding has left nothing, which a chance of 0 leads to."""
    total = weights.sum()
    return weights / total if float(total) > 0 else otherwise

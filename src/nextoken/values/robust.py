"""The robust loss that temperatures are learnt by, and what is known of it exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def robust_loss(logits: Tensor, labels: Tensor, tau: Tensor, *, rho: float) -> Tensor:
    """F [...] = tau log((1/V) sum_k exp((s_k - s_y) / tau)) + tau rho, in nats times tau, from logits s [..., V].

    That is tau CE(s / tau, y) + tau (rho - log V). Its minimum over tau >= tau_0 is, up to tau_0 rho, the worst case

        max_q sum_k q_k (s_k - s_y) - tau_0 KL(q || uniform)   with KL(q || uniform) <= rho:

    a contrast of y with the distribution of other tokens that is hardest within the radius rho. With tau fixed to 1 it
    is cross-entropy, up to a constant.

    Args:
        logits: float32 or wider.
        labels: y [...].
        tau: [...], above 0.
        rho: radius, nats.

    Source: TempNet, arXiv:2404.04575, section 3.
    """
    own = logits.to(torch.promote_types(logits.dtype, torch.float32))
    label = own.gather(-1, labels[..., None])[..., 0]
    free = torch.logsumexp(own / tau[..., None], -1)
    return tau * (free + rho - math.log(own.shape[-1])) - label


def entropy_at(logits: Tensor, tau: Tensor) -> Tensor:
    """H(softmax(s / tau)) [...] in nats."""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / tau[..., None], -1)
    return -torch.where(log_p > float("-inf"), log_p.exp() * log_p, 0.0).sum(-1)


def equalising_temperature(logits: Tensor, *, rho: float, low: float, high: float, steps: int = 60) -> Tensor:
    """tau [...] with H(softmax(s / tau)) = log V - rho, or the end of [low, high] that is nearest to it; float64.

    This is where F is least, whatever the label: dF/dtau = H(softmax(s / tau)) + rho - log V, without y in it. So the
    robust loss, minimised point by point, makes all distributions equally uncertain: it warms those surer than
    log V - rho and cools those less sure. H rises with tau, so it is found by bisection in log tau.

    Args:
        logits: [..., V], all V tokens real ones.
        rho: radius; from log V on tau is `low`.
        low, high: bounds of tau.
        steps: halvings.

    Source: derived from arXiv:2404.04575, section 3.
    """
    wide, wanted = logits.double(), math.log(logits.shape[-1]) - rho
    below = torch.full(wide.shape[:-1], math.log(low), dtype=torch.float64, device=wide.device)
    above = torch.full_like(below, math.log(high))
    too_cold = entropy_at(wide, above.exp()) <= wanted
    too_warm = entropy_at(wide, below.exp()) >= wanted
    for _ in range(steps):
        middle = (below + above) / 2
        colder = entropy_at(wide, middle.exp()) < wanted
        below, above = torch.where(colder, middle, below), torch.where(colder, above, middle)
    tau = ((below + above) / 2).exp()
    return torch.where(too_cold, high, torch.where(too_warm, low, tau))

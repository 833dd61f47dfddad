"""Exponential tilts: p'(x) proportional to p(x) exp(b u(x)), and the b at which E_p'[u] is what is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

_REMOVED = float("-inf")


def tilt(log_p: Tensor, u: Tensor, b: Tensor) -> Tensor:
    """log p' [N, K] in float64 from log p and u, both [N, K], and b, a number or one per row [N].

    At b = +inf and -inf the candidates of largest and of smallest u are left, in their proportions under p. Candidates
    of log p = -inf stay impossible, whatever their u.
    """
    wide = torch.as_tensor(b, dtype=torch.float64, device=log_p.device)
    wide = wide[..., None] if wide.ndim else wide
    there = log_p > _REMOVED
    shift, edge = _ends(u, there)
    endless = torch.isinf(wide)
    finite = torch.where(endless, 0.0, wide)
    at_the_end = torch.where(wide > 0, u.double() == edge, u.double() == shift)
    scores = log_p.double() + finite * (u.double() - shift)
    return torch.log_softmax(scores.masked_fill(~there | (endless & ~at_the_end), _REMOVED), -1)


def solve_tilt(log_p: Tensor, u: Tensor, wanted: Tensor) -> Tensor:
    """b [N] with E_p'[u] = wanted [N], p' the tilt of p by b; -inf or +inf where `wanted` is not within reach.

    dE/db = Var_p'[u] >= 0, so that there is one root wherever `wanted` lies between the smallest and the largest u of
    the candidates. Newton's steps, with bisection where one would leave the bracket. 0 where all u are equal.
    """
    there = log_p > _REMOVED
    low, high = _ends(u, there)
    spread = (high - low)[..., 0]
    scale = torch.where(spread > 0, spread, 1.0)
    # On [0, 1], where a b of order 1 matters however close the values are together.
    place = ((u.double() - low) / scale[..., None]).masked_fill(~there, 0.0)
    aim = (wanted.double() - low[..., 0]) / scale
    inside = (aim > 0) & (aim < 1) & (spread > 0)
    aim = torch.where(inside, aim, 0.5)
    c = torch.zeros_like(aim)
    below, above = _bracket(log_p, place, aim, inside)
    for _ in range(200):
        mean, variance = _moments(log_p, place, c)
        miss = mean - aim
        if not bool((inside & (miss.abs() > 1e-13) & (above - below > 1e-12 * (1 + c.abs()))).any()):
            break
        above, below = torch.where(miss > 0, c, above), torch.where(miss < 0, c, below)
        newton = c - miss / variance.clamp(min=1e-300)
        middle = (below + above) / 2
        c = torch.where(inside & (miss != 0), torch.where((newton > below) & (newton < above), newton, middle), c)
    root = c / scale
    out_of_reach = torch.where(wanted.double() <= low[..., 0], -torch.inf, torch.inf)
    return torch.where(inside, root, torch.where(spread > 0, out_of_reach, 0.0))


def _bracket(log_p: Tensor, place: Tensor, aim: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Ends [N] between which the root lies; doubled until they do."""
    below, above = -torch.ones_like(aim), torch.ones_like(aim)
    for _ in range(1000):
        low_enough = _moments(log_p, place, below)[0] <= aim
        high_enough = _moments(log_p, place, above)[0] >= aim
        if bool((low_enough & high_enough | ~inside).all()):
            break
        below, above = torch.where(low_enough, below, 2 * below), torch.where(high_enough, above, 2 * above)
    return below, above


def _moments(log_p: Tensor, place: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N] of `place` under the tilt by c [N]."""
    p = torch.softmax(log_p.double() + c[..., None] * place, -1)
    mean = (p * place).sum(-1)
    return mean, (p * (place - mean[..., None]).square()).sum(-1)


def _ends(u: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest u [N, 1] of the candidates that are there."""
    wide = u.double()
    low = wide.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
    return low, wide.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)

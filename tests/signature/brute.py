"""Brute force for signatures: every column of one row from log-probabilities in float64, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nextoken.model.table import TableModel
from nextoken.signature import Window


def columns_of(log_probs: torch.Tensor, target: int, top: int) -> dict[str, object]:
    """All statistics of one distribution [V], by their definitions."""
    logp = log_probs.double().numpy()
    possible = logp > -np.inf
    known = logp[possible]
    p = np.exp(known)
    entropy = -(p * known).sum()
    central = [(p * (-known - entropy) ** k).sum() for k in range(5)]
    order = sorted(range(len(logp)), key=lambda v: (-logp[v], v))
    above = logp > logp[target] + 1e-12
    ranked = np.sort(np.exp(logp))[::-1]
    spread = central[2] > 1e-20
    return {
        "logprob": logp[target],
        "rank": int(above.sum()),
        "mass_above": np.exp(logp[above]).sum(),
        "entropy": entropy,
        "varentropy": central[2],
        "skewness": central[3] / central[2] ** 1.5 if spread else 0.0,
        "kurtosis": central[4] / central[2] ** 2 if spread else 0.0,
        "collision": (p**2).sum(),
        "mean_logprob": known.mean(),
        "std_logprob": known.std(),
        "top1_prob": ranked[0],
        "margin": ranked[0] - ranked[1],
        "half_sum": (p**0.5).sum(),
        "quarter_sum": (p**0.25).sum(),
        "cube_sum": (p**3).sum(),
        "fourth_sum": (p**4).sum(),
        "top_ids": order[:top],
        "top_logprobs": logp[order[:top]],
        "rest_mass": 1 - ranked[:top].sum(),
    }


def compared(p: torch.Tensor, q: torch.Tensor) -> dict[str, float]:
    """The columns of a second model, from two distributions [V] of which q is nowhere 0 where p is not."""
    lp, lq = p.double().numpy(), q.double().numpy()
    both = np.logaddexp(lp, lq) - np.log(2)

    def expected(weight: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
        """E_weight[left - right]."""
        here = weight > -np.inf
        return float((np.exp(weight[here]) * (left[here] - right[here])).sum())

    return {
        "cross_entropy": expected(lp, np.zeros_like(lp), lq),
        "kl": expected(lp, lp, lq),
        "reverse_kl": expected(lq, lq, lp),
        "js": 0.5 * expected(lp, lp, both) + 0.5 * expected(lq, lq, both),
    }


def distribution(model: TableModel, own: Sequence[int], place: int, window: Window, bos: bool) -> torch.Tensor:
    """p(. | what the window shows before `own[place]`) [V]; windows count the begin token if there is one.

    A table takes what lies before its context for begin tokens, so a begin token that is cut off changes nothing, and
    tokens that are cut off do.
    """
    return model.row(own[max(0, window.begin - bos) : place])

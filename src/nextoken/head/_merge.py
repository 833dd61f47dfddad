"""Sums over parts of the vocabulary become the statistics of the whole distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextoken.head._leaders import Leaders
from nextoken.head._partial import (
    ABOVE,
    BIQUADRATE,
    CUBE,
    FOURTH,
    HALF,
    MASS,
    ONE,
    PLAIN,
    PLAIN_SQUARE,
    QUARTER,
    SQUARE,
    Partial,
)
from nextoken.head._statistics import Statistics
from nextoken.head._sweep import Target

NOISE = 4.0  # in units of eps * (1 + |largest logit|): a standard deviation of log p below it is rounding


def merge(
    partial: Partial,
    aside: tuple[Tensor, Tensor, Tensor],
    leaders: Leaders,
    spoilt: Tensor,
    target: Target | None,
    target_logit: Tensor,
    top: int,
) -> Statistics:
    """Statistics [n] from the sums of all parts, in float64 about the final mean, rounded to float32 at the very end.

    Args:
        partial: sums over the vocabulary without the entries set aside, as one part.
        aside: rows, logits and ids of the entries set aside.
        leaders: the k >= max(top, 2) leading tokens (or all, if the vocabulary is smaller).
        spoilt: [n] rows with a NaN or +inf logit; their statistics are NaN, as are those of rows with -inf only.
        target, target_logit: as in the sweep.
        top: how many leaders to report.
    """
    rows, logit, ids = aside
    peak = leaders.values[:, 0].double()
    n = peak.numel()

    def scattered(values: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64, device=peak.device).index_add(0, rows, values)

    def powered(column: int, power: float) -> Any:
        """sum p^power over the vocabulary."""
        return (((centre - peak) * power).exp() * sums[column] + scattered((power * x).exp())) / mass**power

    centre, about, sums = partial.centre[0], partial.about[0] - peak, partial.sums[0]
    x = logit - peak[rows]
    ex = x.exp()
    weight = (centre - peak).exp()
    m0, m1, m2, m3, m4 = weight * sums[ONE : FOURTH + 1]
    mass = m0 + scattered(ex)
    mean = (m1 + about * m0 + scattered(ex * x)) / mass  # of z - peak
    d = about - mean
    dx = x - mean[rows]
    second = (m2 + d * (2 * m1 + d * m0) + scattered(ex * dx**2)) / mass
    third = (m3 + d * (3 * m2 + d * (3 * m1 + d * m0)) + scattered(ex * dx**3)) / mass
    fourth = (m4 + d * (4 * m3 + d * (6 * m2 + d * (4 * m1 + d * m0))) + scattered(ex * dx**4)) / mass
    second = second.clamp(min=0.0)
    noise = NOISE * torch.finfo(leaders.values.dtype).eps * (1.0 + peak.abs())
    flat = second.sqrt() <= noise
    safe = torch.where(flat, 1.0, second)

    count = partial.count[0]
    plain_mean = centre + sums[PLAIN] / count
    plain_variance = sums[PLAIN_SQUARE] / count

    log_mass = mass.log()
    log_normalizer = peak + log_mass
    probabilities = (leaders.values.double() - log_normalizer[:, None]).exp()
    margin = probabilities[:, 0] - (probabilities[:, 1] if leaders.k > 1 else 0.0)
    reported = leaders.ids[:, :top]
    beyond = ~(ids[:, None] == reported[rows]).any(1)
    rest = (m0 + scattered(ex * beyond)) / mass

    spoilt = spoilt | ~torch.isfinite(peak)

    def result(values: Tensor) -> Tensor:
        broken = spoilt.view(-1, *[1] * (values.ndim - 1))
        return values.masked_fill(broken, torch.nan).float()

    logprob = rank = above = None
    if target is not None:
        given = target.ids >= 0
        own = target_logit > target.threshold  # the target's own logit, when rounding puts it above its threshold
        over = logit > target.threshold[rows].double()
        above = weight * sums[MASS] + scattered(ex * over) - own * (target_logit - peak).exp()
        above = (above / mass).clamp(0.0, 1.0)
        rank = sums[ABOVE].round().long() - own.long()
        first = (leaders.ids[:, 0] == target.ids) | (rank <= 0)
        above = result(torch.where(first, 0.0, above).masked_fill(~given, torch.nan))
        rank = torch.where(first, 0, rank).masked_fill(~given | spoilt, -1)
        logprob = result((target_logit - log_normalizer).clamp(max=0.0).masked_fill(~given, torch.nan))
    return Statistics(
        logprob=logprob,
        rank=rank,
        mass_above=above,
        entropy=result((log_mass - mean).clamp(min=0.0)),
        varentropy=result(second),
        skewness=result(torch.where(flat, 0.0, -third / safe**1.5)),
        kurtosis=result(torch.where(flat, 0.0, fourth / safe**2)),
        collision=result(powered(SQUARE, 2)),
        mean_logprob=result(plain_mean - log_normalizer),
        std_logprob=result(plain_variance.sqrt()),
        top1_prob=result(probabilities[:, 0]),
        margin=result(margin),
        log_normalizer=result(log_normalizer),
        half_sum=result(powered(HALF, 0.5)),
        quarter_sum=result(powered(QUARTER, 0.25)),
        cube_sum=result(powered(CUBE, 3)),
        fourth_sum=result(powered(BIQUADRATE, 4)),
        top_ids=reported if top else None,
        top_logprobs=result((leaders.values[:, :top].double() - log_normalizer[:, None]).clamp(max=0.0))
        if top
        else None,
        rest_mass=result(rest.clamp(0.0, 1.0)),
    )

"""The obvious formulas on all logits in float64: what every other implementation is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from nextoken.head._statistics import Statistics


def naive_statistics(logits: Tensor, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
    """`Statistics` of softmax(z), z [n, V], by materialising everything; targets [n] with -1 for none."""
    eps = torch.finfo(logits.dtype).eps if logits.dtype == torch.float64 else torch.finfo(torch.float32).eps
    z = logits.double()
    broken = ~(z.amax(1).isfinite()) | z.isnan().any(1)
    normalizer = z.logsumexp(1)
    logp = z - normalizer[:, None]
    p = logp.exp()
    present = logp > -torch.inf
    log_or_0 = logp.masked_fill(~present, 0.0)
    entropy = -(p * log_or_0).sum(1)
    deviation = -(log_or_0 + entropy[:, None])
    varentropy = (p * deviation**2).sum(1)
    flat = varentropy.sqrt() <= 4 * eps * (1 + z.amax(1).abs())
    safe = torch.where(flat, 1.0, varentropy)
    count = present.sum(1)
    mean = log_or_0.sum(1) / count
    std = (((log_or_0 - mean[:, None]) ** 2 * present).sum(1) / count).sqrt()
    ordered, ids = logp.sort(dim=1, descending=True, stable=True)
    best = ordered.exp()

    def result(values: Tensor) -> Tensor:
        return values.masked_fill(broken.view(-1, *[1] * (values.ndim - 1)), torch.nan).float()

    logprob = rank = above = None
    if targets is not None:
        given = targets >= 0
        own = logp.gather(1, targets.clamp(min=0)[:, None])
        larger = logp > own
        logprob = result(own.squeeze(1).masked_fill(~given, torch.nan))
        rank = larger.sum(1).masked_fill(~given | broken, -1)
        above = result((p * larger).sum(1).masked_fill(~given, torch.nan))
    return Statistics(
        logprob=logprob,
        rank=rank,
        mass_above=above,
        entropy=result(entropy),
        varentropy=result(varentropy),
        skewness=result(torch.where(flat, 0.0, (p * deviation**3).sum(1) / safe**1.5)),
        kurtosis=result(torch.where(flat, 0.0, (p * deviation**4).sum(1) / safe**2)),
        collision=result((p**2).sum(1)),
        mean_logprob=result(mean),
        std_logprob=result(std),
        top1_prob=result(best[:, 0]),
        margin=result(best[:, 0] - (best[:, 1] if best.shape[1] > 1 else 0.0)),
        log_normalizer=result(normalizer),
        half_sum=result((p**0.5).sum(1)),
        quarter_sum=result((p**0.25).sum(1)),
        cube_sum=result((p**3).sum(1)),
        fourth_sum=result((p**4).sum(1)),
        top_ids=ids[:, :top] if top else None,
        top_logprobs=result(ordered[:, :top]) if top else None,
        rest_mass=result(best[:, top:].sum(1) if top else torch.ones_like(entropy)),
    )

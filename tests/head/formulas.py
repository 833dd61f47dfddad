"""The textbook formulas, in float64, one line each, on all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from nextoken.head import Head, Statistics


def logits64(hidden: Tensor, head: Head) -> Tensor:
    z = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.scale
    if head.softcap is not None:
        z = torch.where(z == -torch.inf, -torch.inf, head.softcap * torch.tanh(z / head.softcap))
    return z


def brute(z: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
    """Every column of Statistics but the top-k, for logits z [n, V] in float64."""
    logp = z - z.logsumexp(1, keepdim=True)
    p = logp.exp()
    surprise = torch.where(p > 0, -logp, 0.0)
    h = (p * surprise).sum(1)
    central = [(p * (surprise - h[:, None]) ** k).sum(1) for k in range(5)]
    finite = [row[row > -torch.inf] for row in logp]
    ordered = p.sort(1, descending=True).values
    columns = {
        "entropy": h,
        "varentropy": central[2],
        "skewness": central[3] / central[2] ** 1.5,
        "kurtosis": central[4] / central[2] ** 2,
        "collision": (p**2).sum(1),
        "mean_logprob": torch.stack([row.mean() for row in finite]),
        "std_logprob": torch.stack([row.std(unbiased=False) for row in finite]),
        "top1_prob": ordered[:, 0],
        "margin": ordered[:, 0] - (ordered[:, 1] if z.shape[1] > 1 else 0.0),
        "log_normalizer": z.logsumexp(1),
        "half_sum": p.sqrt().sum(1),
        "quarter_sum": (p**0.25).sum(1),
        "cube_sum": (p**3).sum(1),
        "fourth_sum": (p**4).sum(1),
    }
    if targets is not None:
        own = logp.gather(1, targets[:, None])
        columns |= {
            "logprob": own.squeeze(1),
            "rank": (logp > own).sum(1),
            "mass_above": (p * (logp > own)).sum(1),
        }
    return columns


def assert_matches(
    found: Statistics,
    expected: dict[str, Tensor],
    *,
    rtol: float = 1e-4,
    atol: float = 2e-6,
    skip: tuple[str, ...] = (),
) -> None:
    """Every expected column is there, in float32 (rank: int64, compared exactly), within the tolerance."""
    columns = found.as_dict()
    for name, value in expected.items():
        if name in skip:
            continue
        assert columns[name].dtype == (torch.int64 if name == "rank" else torch.float32), name
        if name == "rank":
            assert torch.equal(columns[name], value), name
        else:
            torch.testing.assert_close(
                columns[name].double(),
                value.double(),
                rtol=rtol,
                atol=atol,
                msg=lambda text, name=name: f"{name}: {text}",
            )

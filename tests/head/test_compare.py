"""Two distributions over one vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from head.formulas import logits64
from nextoken.head import Head, _compare, compare, compare_logits


def expected(z_p: torch.Tensor, z_q: torch.Tensor) -> dict[str, torch.Tensor]:
    lp, lq = z_p.double().log_softmax(-1), z_q.double().log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    mixed = ((p + q) / 2).log()

    def mean(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.where(weight > 0, weight * values, 0.0).sum(-1)

    return {
        "cross_entropy": -mean(p, lq),
        "kl": mean(p, lp - lq),
        "reverse_kl": mean(q, lq - lp),
        "js": (mean(p, lp - mixed) + mean(q, lq - mixed)) / 2,
    }


def check(found: object, wanted: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(found, name).double(), value, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("entries", [60, 700, 1 << 20])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_two_heads_of_different_width(monkeypatch: pytest.MonkeyPatch, entries: int, spread: float) -> None:
    monkeypatch.setattr(_compare, "ENTRIES", entries)
    monkeypatch.setattr(_compare, "ROWS", 4)
    p, q = (
        Head(torch.randn(501, 16) * spread, torch.randn(501)),
        Head(torch.randn(501, 9) * spread, scale=0.5, softcap=8.0),
    )
    a, b = torch.randn(2, 3, 16), torch.randn(2, 3, 9)
    found = compare(a, p, b, q)
    assert found.kl.shape == (2, 3)
    check(found, expected(logits64(a, p), logits64(b, q)), atol=1e-5)


def test_a_distribution_does_not_differ_from_itself_and_close_ones_by_little() -> None:
    z = torch.randn(4, 20_000)
    same = compare_logits(z, z + 3.0)
    for value in (same.kl, same.reverse_kl, same.js):
        assert (value < 1e-6).all()
    nudged = z + torch.randn(4, 20_000) * 0.01
    check(compare_logits(z, nudged), expected(z, nudged), atol=5e-7)


def test_disjoint_supports() -> None:
    p, q = torch.zeros(1, 40), torch.zeros(1, 40)
    p[:, 20:], q[:, :20] = -math.inf, -math.inf
    found = compare_logits(p, q)
    assert (
        found.kl.item() == math.inf and found.reverse_kl.item() == math.inf and found.cross_entropy.item() == math.inf
    )
    assert found.js.item() == pytest.approx(math.log(2))
    half = compare_logits(p, torch.zeros(1, 40))
    assert half.kl.item() == pytest.approx(math.log(2), rel=1e-5) and half.reverse_kl.item() == math.inf


def test_errors() -> None:
    with pytest.raises(ValueError, match="one vocabulary"):
        compare(torch.randn(2, 3), Head(torch.randn(5, 3)), torch.randn(2, 3), Head(torch.randn(6, 3)))
    with pytest.raises(ValueError, match="one batch shape"):
        compare(torch.randn(2, 3), Head(torch.randn(5, 3)), torch.randn(1, 3), Head(torch.randn(5, 3)))
    with pytest.raises(ValueError, match="both must be"):
        compare_logits(torch.randn(2, 3), torch.randn(2, 4))

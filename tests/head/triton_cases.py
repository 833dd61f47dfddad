"""Cases for the Triton kernel; run with TRITON_INTERPRET=1 (see test_triton.py)."""

from __future__ import annotations

import torch

from head.formulas import assert_matches, brute, logits64
from nextoken.head import Head, _triton, statistics

torch.set_num_threads(1)


def check(name: str, hidden: torch.Tensor, head: Head, targets: torch.Tensor | None, top: int) -> None:
    found = statistics(hidden, head, targets, top=top, impl="triton")
    blocks = statistics(hidden, head, targets, top=top, impl="torch")
    assert found.as_dict().keys() == blocks.as_dict().keys()
    for column, value in blocks.as_dict().items():
        torch.testing.assert_close(
            found.as_dict()[column],
            value,
            rtol=2e-4,
            atol=1e-3 if column in ("skewness", "kurtosis") else 3e-6,
            equal_nan=True,
            msg=lambda text, column=column: f"{name}, {column}: {text}",
        )
    if targets is not None and (targets >= 0).all() and found.entropy.isfinite().all():
        flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        wanted = brute(logits64(flat, head), ids)
        assert_matches(found.reshape(-1), wanted, rtol=2e-4, atol=1e-5, skip=("skewness", "kurtosis"))


def main() -> None:
    torch.manual_seed(0)
    _triton.TILE_ROWS, _triton.TILE_WIDTH = 16, 16  # small tiles: rows, tokens and widths that fill none of them
    _triton.TILE_TOKENS, _triton.PROGRAMS = 32, 6
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        hidden, weight = torch.randn(21, 24).to(dtype), (torch.randn(205, 24) * 0.7).to(dtype)
        targets = torch.randint(0, 205, (21,))
        check(f"{dtype}", hidden, Head(weight), targets, 5)
    hidden, weight, bias = torch.randn(5, 20), torch.randn(150, 20), torch.randn(150)
    targets = torch.randint(0, 150, (5,))
    check("scale and cap", hidden, Head(weight, bias, 0.5, 4.0), targets, 3)
    check("no targets, no top", hidden, Head(weight), None, 0)
    check("some targets", hidden, Head(weight), torch.tensor([3, -1, 4, -1, 149]), 40)
    check("near-uniform", hidden, Head(weight * 1e-3), targets, 2)
    check("peaked", hidden, Head(weight * 8), targets, 2)
    masked = bias.clone()
    masked[2:140] = -torch.inf
    check("masked", hidden, Head(weight, masked), torch.tensor([0, 1, 140, 149, 145]), 20)
    check("ties", torch.ones(3, 4), Head(torch.randint(0, 3, (100, 4)).float()), torch.tensor([0, 50, 99]), 7)
    check("uniform", torch.ones(2, 4), Head(torch.zeros(100, 4)), torch.tensor([0, 99]), 4)
    check("one token, one row", torch.randn(1, 4), Head(torch.randn(1, 4)), torch.tensor([0]), 1)
    check("batch", torch.randn(2, 3, 20), Head(weight), torch.randint(0, 150, (2, 3)).clamp(min=-1), 2)
    broken = hidden.clone()
    broken[1] = torch.nan
    check("a broken row", broken, Head(weight), targets, 2)
    print("all cases passed")


if __name__ == "__main__":
    main()

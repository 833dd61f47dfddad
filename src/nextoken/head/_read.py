"""`statistics`: from hidden states or logits to Statistics, a block of logits at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from nextoken.head._leaders import STRIDE, Leaders
from nextoken.head._merge import merge
from nextoken.head._naive import naive_statistics
from nextoken.head._statistics import Statistics
from nextoken.head._sweep import Scratch, Sweep, Target
from nextoken.head._unembedding import Head, accumulation_dtype

Implementation = Literal["auto", "torch", "triton", "naive"]
ROWS = 512  # rows per block: enough that the matrix product runs at full speed
ENTRIES = 1 << 20  # logits per block: three float32 blocks stay in a last-level cache
CONVERTED = 1 << 22  # entries of a block of weights that must be converted to float32


@torch.no_grad()
def statistics(
    hidden: Tensor, head: Head, targets: Tensor | None = None, *, top: int = 0, impl: Implementation = "auto"
) -> Statistics:
    """Statistics of softmax(z), z = head(hidden) [..., V], without ever holding z: float32 sums, merged in float64.

    Time is that of the matrix product h W^T plus about a dozen passes over blocks in cache; memory beyond the result is
    three blocks of at most 2^20 logits, whatever N and V.

    Args:
        hidden: h [..., H], any floating dtype.
        head: the unembedding.
        targets: [...] ids of the tokens that came, -1 for none; or None.
        top: k of the top-k to keep; cut to V.
        impl: "torch" (any device), "triton" (CUDA), "naive" (holds all logits in float64: the reference), "auto":
            triton on CUDA where it is installed, else torch.

    A target's rank counts logits above its own by more than the rounding of the two dot products, so that neither the
    target itself nor an identical row of W is ever counted.

    Raises:
        ValueError: shapes that do not fit, targets outside [-1, V), a negative top, or an unknown or unavailable impl.
    """
    head.check(hidden)
    batch = hidden.shape[:-1]
    targets = _check_targets(targets, batch, head.vocab_size)
    top = _check_top(top, head.vocab_size)
    rows = hidden.reshape(-1, head.hidden_size)
    chosen = _choose(impl, rows, head, top)
    if chosen == "naive":
        return naive_statistics(head.logits(rows), targets, top=top).reshape(*batch)
    dtype = accumulation_dtype(rows, head.weight)
    target = None if targets is None else target_of(rows, head, targets)
    if chosen == "triton" and rows.shape[0]:
        from nextoken.head._triton import triton_statistics

        return triton_statistics(rows, head, target, top=top).reshape(*batch)
    rows = rows.to(dtype)
    width = block_width(rows.shape[0], head.vocab_size)
    if head.weight.dtype != dtype:
        width = min(width, max(STRIDE * 8, CONVERTED // head.hidden_size // STRIDE * STRIDE))

    def block(first: int, last: int) -> Callable[[Tensor, slice], None]:
        weight = head.weight[first:last].to(dtype)
        bias = None if head.bias is None else head.bias[first:last].to(dtype)

        def fill(out: Tensor, some: slice) -> None:
            head.fill(out, rows[some], weight, bias)

        return fill

    return _sweep(block, rows.shape[0], head.vocab_size, width, target, top, dtype, rows.device).reshape(*batch)


@torch.no_grad()
def statistics_from_logits(logits: Tensor, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
    """Statistics of softmax(z) for logits or log-probabilities z [..., V] that are already there, block by block too.

    Arguments, results and errors as for `statistics`. Ranks are exact: logits are compared as given.
    """
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got shape {tuple(logits.shape)}")
    batch, size = logits.shape[:-1], logits.shape[-1]
    targets = _check_targets(targets, batch, size)
    top = _check_top(top, size)
    flat = logits.reshape(-1, size)
    dtype = accumulation_dtype(flat)
    target = None
    if targets is not None:
        target = Target(targets, flat.gather(1, targets.clamp(min=0)[:, None]).squeeze(1).to(dtype))

    def block(first: int, last: int) -> Callable[[Tensor, slice], None]:
        def fill(out: Tensor, some: slice) -> None:
            out.copy_(flat[some, first:last])

        return fill

    width = block_width(flat.shape[0], size)
    return _sweep(block, flat.shape[0], size, width, target, top, dtype, flat.device).reshape(*batch)


def block_width(rows: int, vocab_size: int) -> int:
    """Tokens per block: as many as ENTRIES allow, a multiple of the leaders' STRIDE, blocks of about equal width."""
    width = max(STRIDE, ENTRIES // max(1, min(rows, ROWS)))
    even = math.ceil(vocab_size / math.ceil(vocab_size / width))
    return math.ceil(even / STRIDE) * STRIDE


def target_of(rows: Tensor, head: Head, targets: Tensor) -> Target:
    """Target ids with the threshold above which a logit counts as larger.

    The target's logit is needed before its block is reached, so it is a dot product of its own, whose last bits differ
    from those of the matrix product. The threshold adds the error both can have: a few eps times the root of the sum of
    squares of the H products (what independent roundings add up to) plus a few eps of the logit.
    """
    safe = targets.clamp(min=0)
    dtype = accumulation_dtype(rows, head.weight)
    products = rows.to(dtype) * head.weight[safe].to(dtype)
    logit = products.sum(1)
    absent = torch.zeros_like(logit, dtype=torch.bool)
    eps = torch.finfo(dtype).eps
    slack = 4 * eps * (torch.linalg.vector_norm(products, dim=1) + logit.abs())
    if head.bias is not None:
        bias = head.bias[safe].to(dtype)
        absent = bias == -torch.inf
        logit, slack = logit + bias, slack + 2 * eps * bias.abs()
    logit, slack = head.scale * logit, abs(head.scale) * slack
    if head.softcap is not None:
        logit = head.softcap * torch.tanh(logit / head.softcap)
        slack = slack + 4 * eps * head.softcap
    return Target(targets, torch.where(absent, -torch.inf, logit + slack))


def _sweep(
    block: Callable[[int, int], Callable[[Tensor, slice], None]],
    rows: int,
    vocab_size: int,
    width: int,
    target: Target | None,
    top: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Statistics:
    """Blocks of the vocabulary outside, blocks of rows inside: a block of weights is read (and converted) once."""
    if rows == 0:
        return _empty(target is not None, top, device)
    parts = [slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]
    kept = min(max(top, 2), vocab_size)
    sweeps = []
    for part in parts:
        some = None if target is None else Target(target.ids[part], target.threshold[part])
        sweeps.append(Sweep(part.stop - part.start, kept, some, dtype, device))
    scratch = Scratch.empty(min(rows, ROWS) * min(width, vocab_size), dtype, device)
    for first in range(0, vocab_size, width):
        last = min(first + width, vocab_size)
        fill = block(first, last)
        for part, sweep in zip(parts, sweeps, strict=True):
            fill(scratch.logits(part.stop - part.start, last - first), part)
            sweep.absorb(scratch, last - first, first)
    results = []
    for sweep in sweeps:
        sweep.leaders.complete(vocab_size)
        results.append(
            merge(sweep.partial(), sweep.aside(), sweep.leaders, sweep.spoilt, sweep.target, sweep.target_logit, top)
        )
    return results[0] if len(results) == 1 else Statistics.concat(results)


def _empty(with_target: bool, top: int, device: torch.device) -> Statistics:
    leaders = Leaders(1, max(top, 1), torch.float32, device)
    ones = naive_statistics(
        torch.zeros(1, leaders.k, device=device), leaders.ids[:, 0] if with_target else None, top=top
    )
    return ones[:0]


def _choose(impl: str, rows: Tensor, head: Head, top: int) -> str:
    if impl == "auto":
        double = accumulation_dtype(rows, head.weight) == torch.float64
        if rows.device.type != "cuda" or double or top > 64 or find_spec("triton") is None:
            return "torch"
        return "triton"
    if impl == "triton" and find_spec("triton") is None:
        raise ValueError("impl='triton' needs the package triton; install it, or use impl='torch'")
    if impl not in ("torch", "triton", "naive"):
        raise ValueError(f"unknown impl {impl!r}: expected 'auto', 'torch', 'triton' or 'naive'")
    return impl


def _check_targets(targets: Tensor | None, batch: torch.Size, vocab_size: int) -> Tensor | None:
    if targets is None:
        return None
    if targets.shape != batch:
        raise ValueError(f"targets must have the batch's shape {tuple(batch)}, got {tuple(targets.shape)}")
    if targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer token ids, got {targets.dtype}")
    flat = targets.reshape(-1).long()
    if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) >= vocab_size):
        raise ValueError(
            f"targets must lie in [0, {vocab_size}), or be -1 for none; got {int(flat.min())} .. {int(flat.max())}"
        )
    return flat


def _check_top(top: int, vocab_size: int) -> int:
    if top < 0:
        raise ValueError(f"top must be 0 or more, got {top}")
    return min(top, vocab_size)

"""Two distributions over one vocabulary: cross-entropy and divergences, by blocks of both heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.head._terms import Running, _peak
from nextoken.head._unembedding import Head, accumulation_dtype

ROWS = 512
ENTRIES = 1 << 19  # half of what a sweep takes: six blocks are alive at once


@dataclass(frozen=True)
class Comparison:
    """How p and q differ, in nats, float32, each of the batch's shape [...].

    Args:
        cross_entropy: -sum p log q.
        kl: KL(p || q) = sum p log(p / q).
        reverse_kl: KL(q || p).
        js: Jensen-Shannon divergence, the mean KL of p and q from (p + q) / 2; at most log 2.
    """

    cross_entropy: Tensor
    kl: Tensor
    reverse_kl: Tensor
    js: Tensor


@torch.no_grad()
def compare(hidden_p: Tensor, head_p: Head, hidden_q: Tensor, head_q: Head) -> Comparison:
    """-sum p log q, KL(p || q), KL(q || p) and JS(p, q) in nats for p = softmax(head_p(hidden_p)), q likewise.

    Two sweeps: the normalisers of both first, then the divergences from blocks of log p and log q, which JS needs and
    which keeps small divergences from drowning in the difference of two large numbers. Where p has mass and q has none,
    KL is inf.

    Args:
        hidden_p, hidden_q: [..., H] and [..., H'] with one batch shape; the widths may differ.
        head_p, head_q: of one vocabulary.

    Raises:
        ValueError: vocabularies or batch shapes that differ.
    """
    head_p.check(hidden_p)
    head_q.check(hidden_q)
    if head_p.vocab_size != head_q.vocab_size:
        raise ValueError(
            f"both heads must have one vocabulary, got {head_p.vocab_size} and {head_q.vocab_size} tokens; "
            "compare models with different tokenizers on bytes instead"
        )
    if hidden_p.shape[:-1] != hidden_q.shape[:-1]:
        raise ValueError(
            f"both must have one batch shape, got {tuple(hidden_p.shape[:-1])} and {tuple(hidden_q.shape[:-1])}"
        )
    dtype = accumulation_dtype(hidden_p, head_p.weight, hidden_q, head_q.weight)
    fills = [_filler(hidden, head, dtype) for hidden, head in ((hidden_p, head_p), (hidden_q, head_q))]
    result = _compare(fills[0], fills[1], hidden_p.shape[:-1].numel(), head_p.vocab_size, dtype, hidden_p.device)
    return _reshaped(result, hidden_p.shape[:-1])


@torch.no_grad()
def compare_logits(logits_p: Tensor, logits_q: Tensor) -> Comparison:
    """The same for logits or log-probabilities [..., V] that are already there.

    Raises:
        ValueError: shapes that differ.
    """
    if logits_p.shape != logits_q.shape or logits_p.ndim == 0:
        raise ValueError(f"both must be [..., V], got {tuple(logits_p.shape)} and {tuple(logits_q.shape)}")
    size = logits_p.shape[-1]
    dtype = accumulation_dtype(logits_p, logits_q)

    def filler(flat: Tensor) -> Filler:
        return lambda first, last: lambda out, some: out.copy_(flat[some, first:last])

    fills = [filler(logits.reshape(-1, size)) for logits in (logits_p, logits_q)]
    result = _compare(fills[0], fills[1], logits_p.shape[:-1].numel(), size, dtype, logits_p.device)
    return _reshaped(result, logits_p.shape[:-1])


Filler = Callable[[int, int], Callable[[Tensor, slice], Tensor]]  # (first, last) -> write logits of some rows to out


def _filler(hidden: Tensor, head: Head, dtype: torch.dtype) -> Filler:
    rows = hidden.reshape(-1, head.hidden_size).to(dtype)

    def block(first: int, last: int) -> Callable[[Tensor, slice], Tensor]:
        weight = head.weight[first:last].to(dtype)
        bias = None if head.bias is None else head.bias[first:last].to(dtype)
        return lambda out, some: head.fill(out, rows[some], weight, bias)

    return block


def _compare(
    fill_p: Filler, fill_q: Filler, rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    width = min(vocab_size, max(1, ENTRIES // max(1, min(rows, ROWS))))
    p_flat, q_flat, term_flat = (torch.empty(min(rows, ROWS) * width, dtype=dtype, device=device) for _ in range(3))
    parts = [slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]
    running_p, running_q = Running(rows, device), Running(rows, device)
    starts = range(0, vocab_size, width)
    for first in starts:
        last = min(first + width, vocab_size)
        for fill, running in ((fill_p(first, last), running_p), (fill_q(first, last), running_q)):
            for some in parts:
                z = p_flat[: (some.stop - some.start) * (last - first)].view(-1, last - first)
                fill(z, some)
                peak = _peak(z)
                running.add(some, peak, z.sub_(peak[:, None]).exp_().sum(1).double())
    lse_p, lse_q = running_p.log().to(dtype), running_q.log().to(dtype)
    cross, kl, reverse, js = (torch.zeros(rows, dtype=torch.float64, device=device) for _ in range(4))
    for first in starts:
        last = min(first + width, vocab_size)
        put_p, put_q = fill_p(first, last), fill_q(first, last)
        for some in parts:
            shape = (some.stop - some.start, last - first)
            lp, lq, term = (flat[: shape[0] * shape[1]].view(shape) for flat in (p_flat, q_flat, term_flat))
            put_p(lp, some).sub_(lse_p[some, None])
            put_q(lq, some).sub_(lse_q[some, None])
            p, q = lp.exp(), lq.exp()
            # Sums of p and q differ from 1 by rounding; adding their difference cancels that to first order.
            excess = (q.sum(1) - p.sum(1)).double()
            cross[some] -= torch.mul(p, lq, out=term).masked_fill_(p == 0, 0.0).sum(1).double()
            kl[some] += torch.sub(lp, lq, out=term).mul_(p).masked_fill_(p == 0, 0.0).sum(1).double() + excess
            reverse[some] += torch.sub(lq, lp, out=term).mul_(q).masked_fill_(q == 0, 0.0).sum(1).double() - excess
            mixed = torch.logaddexp(lp, lq, out=term).sub_(math.log(2))
            js[some] += lp.sub_(mixed).mul_(p).masked_fill_(p == 0, 0.0).sum(1).double()
            js[some] += lq.sub_(mixed).mul_(q).masked_fill_(q == 0, 0.0).sum(1).double()
    return [cross, kl.clamp(min=0.0), reverse.clamp(min=0.0), (js / 2).clamp(0.0, math.log(2))]


def _reshaped(values: list[Tensor], batch: torch.Size) -> Comparison:
    return Comparison(*(value.float().view(batch) for value in values))

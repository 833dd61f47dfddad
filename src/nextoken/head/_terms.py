"""Differentiable per-token terms of softmax(h W^T), by blocks: forward keeps [n] numbers, backward remakes the logits.

With z the logits of a row, p = softmax(z), y the target and g. the gradients that reach the outputs:

    nll     = LSE(z) - z_y             d nll / dz_v     = p_v - [v = y]
    lse     = LSE(z)                   d lse / dz_v     = p_v
    entropy = LSE(z) - E_p[z]          d entropy / dz_v = -p_v (log p_v + entropy)
    kl      = KL(t || p), both at temperature T: d kl / dz_v = (p_v(T) - t_v(T)) / T; the teacher t is a constant

dh = scale dz W, dW = scale dz^T h, db = scale sum dz, and dz is multiplied by 1 - (z / c)^2 under a soft-cap c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nextoken.head._sweep import Scratch
from nextoken.head._unembedding import Head, accumulation_dtype

ROWS = 512
ENTRIES = 1 << 20


@dataclass(frozen=True)
class Teacher:
    """What a student is pulled towards: softmax(head(hidden) / temperature), hidden [n, H'], over one vocabulary."""

    hidden: Tensor
    head: Head
    temperature: float


@dataclass(frozen=True)
class Plan:
    """What is asked for besides nll and lse, and how the backward pass may save work.

    Args:
        scale, softcap: of the head.
        targets: [n] ids, or None if nll is not wanted (it is then lse).
        entropy: whether entropy is wanted.
        teacher: or None.
        filter_eps: rows of a block with every |p - onehot| below it add nothing to dh.
        filter_weight: nor to dW and db.
    """

    scale: float
    softcap: float | None
    targets: Tensor | None = None
    entropy: bool = False
    teacher: Teacher | None = None
    filter_eps: float | None = None
    filter_weight: bool = False


class Running:
    """sum e^z and sum e^z x of each row, for weights e^z that arrive in blocks; merged in float64."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.peak = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.mass = torch.zeros_like(self.peak)
        self.moment = torch.zeros_like(self.peak)

    def add(self, some: slice, peak: Tensor, mass: Tensor, moment: Tensor | None = None) -> None:
        """Add a block's sums, both divided by e^peak."""
        new = torch.maximum(self.peak[some], peak.double())
        old = (self.peak[some] - new).exp().nan_to_num(0.0)
        now = (peak.double() - new).exp().nan_to_num(0.0)
        self.mass[some] = old * self.mass[some] + now * mass
        if moment is not None:
            self.moment[some] = old * self.moment[some] + now * moment
        self.peak[some] = new

    def log(self) -> Tensor:
        return self.peak + self.mass.log()

    def mean(self) -> Tensor:
        return self.moment / self.mass


def _peak(z: Tensor) -> Tensor:
    """Row maxima, 0 where all of a row is -inf: what exponents are taken relative to."""
    peak = z.amax(1)
    return torch.where(peak == -torch.inf, 0.0, peak)


class Terms(torch.autograd.Function):
    """(nll, lse, entropy, kl), each [n], of hidden [n, H], weight [V, H], bias [V] or None; 0 where not asked for."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(hidden, weight)
        head = Head(weight.detach(), None if bias is None else bias.detach(), plan.scale, plan.softcap)
        rows, device = hidden.detach().to(dtype), hidden.device
        n = rows.shape[0]
        teacher = plan.teacher
        inverse = 1.0 if teacher is None else 1.0 / teacher.temperature
        student, tempered, teaching = (Running(n, device) for _ in range(3))
        target_logit = torch.zeros(n, dtype=torch.float64, device=device)
        for first, last, some, z, e, t in _blocks(head, rows, plan, dtype):
            peak = _peak(z)
            torch.sub(z, peak[:, None], out=e).exp_()
            mass = e.sum(1).double()
            if plan.targets is not None:
                here, columns = _inside(plan.targets[some], first, last)
                target_logit[some.start + here] = z[here, columns].double()
            moment = None
            if plan.entropy:
                moment = e.mul_((z - peak[:, None]).masked_fill_(z == -torch.inf, 0.0)).sum(1).double()
                moment = moment + mass * peak.double()
            student.add(some, peak, mass, moment)
            if teacher is not None:
                z.mul_(inverse)
                t.mul_(inverse)
                peak = _peak(z)
                tempered.add(some, peak, torch.sub(z, peak[:, None], out=e).exp_().sum(1).double())
                peak = _peak(t)
                torch.sub(t, peak[:, None], out=e).exp_()
                gap = t.sub_(z).mul_(e).masked_fill_(e == 0.0, 0.0)
                teaching.add(some, peak, e.sum(1).double(), gap.sum(1).double())
        lse = student.log()
        zero = torch.zeros_like(lse)
        nll = lse - target_logit if plan.targets is not None else lse
        entropy = (lse - student.mean()).clamp(min=0.0) if plan.entropy else zero
        kl, lse_tempered, lse_teacher = zero, zero, zero
        if teacher is not None:
            lse_tempered, lse_teacher = tempered.log(), teaching.log()
            kl = (teaching.mean() - lse_teacher + lse_tempered).clamp(min=0.0)
        ctx.save_for_backward(hidden, weight, bias, *(x.to(dtype) for x in (lse, entropy, lse_tempered, lse_teacher)))
        ctx.plan = plan
        return nll.to(dtype), lse.to(dtype), entropy.to(dtype), kl.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lse, entropy, lse_tempered, lse_teacher = ctx.saved_tensors
        plan: Plan = ctx.plan
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = lse.dtype
        head = Head(weight.detach(), None if bias is None else bias.detach(), plan.scale, plan.softcap)
        rows = hidden.detach().to(dtype)
        g_nll, g_lse, g_entropy, g_kl = grads
        g_mass = g_nll + g_lse
        d_hidden = torch.zeros_like(rows) if need_hidden else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if need_bias else None
        block = rows.new_zeros(0)
        teacher = plan.teacher
        inverse = 1.0 if teacher is None else 1.0 / teacher.temperature
        for first, last, some, z, g, t in _blocks(head, rows, plan, dtype):
            p = torch.sub(z, lse[some, None], out=g).exp_()
            absent = (z == -torch.inf) if bias is not None else None
            slope = _slope(z, plan)
            if plan.entropy:
                surprise = z - (lse - entropy)[some, None]
                if absent is not None:
                    surprise.masked_fill_(absent, 0.0)
                surprise.mul_(-g_entropy[some, None]).add_(g_mass[some, None])
                g = p.mul_(surprise)
            else:
                g = p.mul_(g_mass[some, None]) if plan.filter_eps is None else p
            if teacher is not None:
                pull = (g_kl * inverse)[some, None]
                g.add_(z.mul_(inverse).sub_(lse_tempered[some, None]).exp_().mul_(pull))
                g.sub_(t.mul_(inverse).sub_(lse_teacher[some, None]).exp_().mul_(pull))
            if plan.targets is not None:
                here, columns = _inside(plan.targets[some], first, last)
            else:
                here = columns = torch.empty(0, dtype=torch.int64, device=rows.device)
            live = None
            if plan.filter_eps is not None:
                g[here, columns] -= 1.0
                keep = g.abs().amax(1) >= plan.filter_eps
                g[here, columns] += 1.0
                g.mul_(g_mass[some, None])
                live = keep.nonzero().squeeze(1)
            g[here, columns] -= g_nll[some][here]
            if slope is not None:
                g.mul_(slope)
                if absent is not None:
                    g.masked_fill_(absent, 0.0)
            if plan.scale != 1.0:
                g.mul_(plan.scale)
            chosen = g if live is None else g[live]
            if d_hidden is not None:
                product = chosen @ head.weight[first:last].to(dtype)
                if live is None:
                    d_hidden[some] += product
                else:
                    d_hidden[some].index_add_(0, live, product)
            filtered = plan.filter_weight and live is not None
            source = chosen if filtered else g
            if d_weight is not None:
                at = rows[some][live] if filtered else rows[some]
                if some.start == 0:
                    block = source.T @ at
                else:
                    block.addmm_(source.T, at)
                if some.stop == rows.shape[0]:
                    d_weight[first:last] = block  # rounded once, after all rows have been added in `dtype`
            if d_bias is not None:
                d_bias[first:last] += source.sum(0)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
        )


def terms(hidden: Tensor, head: Head, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Terms` of hidden [n, H] under a head whose scale and soft-cap the plan repeats."""
    result = Terms.apply(hidden, head.weight, head.bias, plan)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], result)


def _slope(z: Tensor, plan: Plan) -> Tensor | None:
    """dz / d(uncapped z) = 1 - (z / c)^2."""
    if plan.softcap is None:
        return None
    return 1.0 - (z / plan.softcap).square_()


def _inside(targets: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in the block, and its column."""
    here = ((targets >= first) & (targets < last)).nonzero().squeeze(1)
    return here, targets[here] - first


def _blocks(head: Head, rows: Tensor, plan: Plan, dtype: torch.dtype) -> Any:
    """Yield (first, last, slice of rows, logits, scratch, teacher's logits or an empty tensor), rows innermost."""
    n = rows.shape[0]
    if n == 0:
        return
    width = min(head.vocab_size, max(1, ENTRIES // min(n, ROWS)))
    scratch = Scratch.empty(min(n, ROWS) * width, dtype, rows.device)
    teacher = plan.teacher
    for first in range(0, head.vocab_size, width):
        last = min(first + width, head.vocab_size)
        weight = head.weight[first:last].to(dtype)
        bias = None if head.bias is None else head.bias[first:last].to(dtype)
        if teacher is not None:
            teacher_weight = teacher.head.weight[first:last].to(dtype)
            teacher_bias = None if teacher.head.bias is None else teacher.head.bias[first:last].to(dtype)
        for start in range(0, n, ROWS):
            some = slice(start, min(start + ROWS, n))
            size, shape = (some.stop - start) * (last - first), (some.stop - start, last - first)
            z, e, t = (part[:size].view(shape) for part in (scratch.z, scratch.powers, scratch.terms))
            head.fill(z, rows[some], weight, bias)
            if teacher is not None:
                teacher.head.fill(t, teacher.hidden[some].to(dtype), teacher_weight, teacher_bias)
            yield first, last, some, z, e, t

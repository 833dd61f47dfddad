"""Losses over the vocabulary that never hold its logits: cross-entropy, entropy, divergence from a teacher."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from nextoken.head._terms import Plan, Teacher, terms
from nextoken.head._unembedding import Head, accumulation_dtype
from nextoken.methods import method

Reduction = Literal["mean", "sum", "none"]


@method(
    name="CCE",
    arxiv="2411.09009",
    room="head",
    access="white",
    trained=False,
    summary="Cross-entropy of a large vocabulary, with exact gradients, without its logits in memory.",
)
def cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    shift: int = 0,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
    teacher: tuple[Tensor, Head] | None = None,
    teacher_weight: float = 1.0,
    teacher_temperature: float = 1.0,
    filter_eps: float | Literal["auto"] | None = None,
    filter_weight: bool = False,
    impl: Literal["auto", "torch", "naive"] = "auto",
) -> Tensor:
    """-log p_y + z_loss LSE(z)^2 - entropy_weight H(p) + teacher_weight KL(t || p), nats, with p = softmax(z), z =
    head(h).

    Exact gradients reach hidden, head.weight and head.bias; z is made twice, a block at a time, in float32 (float64 for
    float64 inputs), and dW is rounded to the weight's dtype once. Memory beyond the gradients is three blocks of 2^20
    numbers and the valid rows of hidden in float32.

    Args:
        hidden: h [..., H].
        targets: y [...], ids; `ignore_index` marks tokens without a loss.
        reduction: "mean" over the valid tokens, and 0 with zero gradients if there are none (torch gives NaN); "sum",
            to be divided by the global count when gradients are accumulated; "none" gives [...] with 0 at the ignored
            ones.
        ignore_index: the id that marks a token to leave out.
        shift: k pairs h[..., t, :] with y[..., t + k]; the loss then is [..., T - k].
        z_loss: weight of LSE(z)^2, which keeps the normaliser near 1 (PaLM).
        entropy_weight: weight of the entropy bonus; negative for a penalty.
        teacher: (hidden [..., H'], head) of a model with the same vocabulary, aligned with `hidden`; a constant.
        teacher_weight, teacher_temperature: both distributions are softened by the temperature T in the KL term;
            multiply the weight by T^2 to keep the size of its gradient.
        filter_eps: leave out of dh what comes from a row of a block where every |p - onehot| is below it; the error per
            logit's gradient is below filter_eps |g|. "auto": 2^-12 for bfloat16, 2^-15 for float16, 2^-28 for float32
            weights. None is exact.
        filter_weight: filter dW and db too. Not for pre-training: rare tokens then never receive the push down.
        impl: "torch" (any device; what "auto" takes), "naive" (all logits; the reference, it ignores filter_eps).

    Raises:
        ValueError: shapes that do not fit, targets outside the vocabulary, filtering together with an entropy or
            teacher term.

    Source: Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009, sections 4.1 to 4.3. The filter works
    on rows of a block instead of blocks, and vocabulary sorting is left out: it changes speed on a GPU only.
    """
    head.check(hidden)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must be {tuple(hidden.shape[:-1])}, like hidden without H; got {tuple(targets.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if impl not in ("auto", "torch", "naive"):
        raise ValueError(f"unknown impl {impl!r}: expected 'auto', 'torch' or 'naive'")
    teacher_hidden = None if teacher is None else teacher[0]
    if shift:
        hidden, targets, teacher_hidden = _shifted(shift, hidden, targets, teacher_hidden)
    if filter_eps is not None and (entropy_weight or teacher is not None):
        raise ValueError("filter_eps is for cross-entropy alone; drop it, or entropy_weight and teacher")
    flat = targets.reshape(-1)
    valid = (flat != ignore_index).nonzero().squeeze(1)
    labels = flat[valid].long()
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= head.vocab_size):
        raise ValueError(
            f"targets must lie in [0, {head.vocab_size}) or be ignore_index = {ignore_index}; "
            f"got {int(labels.min())} .. {int(labels.max())}"
        )
    rows = hidden.reshape(-1, head.hidden_size)
    rows = rows if valid.numel() == flat.numel() else rows[valid]
    guide = None
    if teacher is not None and teacher_hidden is not None:
        guide = _teacher(teacher_hidden, teacher[1], hidden, head, teacher_temperature)
        guide = Teacher(guide.hidden[valid], guide.head, guide.temperature)
    if impl == "naive":
        nll, lse, entropy_, kl = _naive_terms(rows, head, labels, guide)
    else:
        plan = Plan(
            scale=head.scale,
            softcap=head.softcap,
            targets=labels,
            entropy=entropy_weight != 0.0,
            teacher=guide,
            filter_eps=_filter_eps(filter_eps, head.weight.dtype),
            filter_weight=filter_weight,
        )
        nll, lse, entropy_, kl = terms(rows, head, plan)
    loss = nll
    if z_loss:
        loss = loss + z_loss * lse.square()
    if entropy_weight:
        loss = loss - entropy_weight * entropy_
    if guide is not None:
        loss = loss + teacher_weight * kl
    if reduction == "none":
        return (
            torch.zeros(flat.shape, dtype=loss.dtype, device=loss.device).index_put((valid,), loss).view(targets.shape)
        )
    total = loss.sum()
    return total / max(1, valid.numel()) if reduction == "mean" else total


def entropy(hidden: Tensor, head: Head) -> Tensor:
    """H(p) = -sum p log p [...] in nats for p = softmax(head(hidden)), with gradients d H / dz_v = -p_v (log p_v + H).

    Memory and precision as for `cross_entropy`.
    """
    head.check(hidden)
    plan = Plan(scale=head.scale, softcap=head.softcap, entropy=True)
    rows = hidden.reshape(-1, head.hidden_size)
    return terms(rows, head, plan)[2].view(hidden.shape[:-1])


def kl_to_teacher(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, *, temperature: float = 1.0
) -> Tensor:
    """KL(t || p) [...] in nats, t = softmax(teacher's z / T), p = softmax(z / T), with gradients (p - t) / T for z.

    The teacher is a constant; its width may differ, its vocabulary may not. Memory as for `cross_entropy`. Values are
    differences of sums in float32, so divergences below about 1e-6 are rounding (`compare` is finer, without
    gradients).

    Raises:
        ValueError: vocabularies or batch shapes that differ, or a temperature that is not positive.
    """
    head.check(hidden)
    teacher = _teacher(teacher_hidden, teacher_head, hidden, head, temperature)
    plan = Plan(scale=head.scale, softcap=head.softcap, teacher=teacher)
    rows = hidden.reshape(-1, head.hidden_size)
    return terms(rows, head, plan)[3].view(hidden.shape[:-1])


def _teacher(teacher_hidden: Tensor, teacher_head: Head, hidden: Tensor, head: Head, temperature: float) -> Teacher:
    teacher_head.check(teacher_hidden)
    if teacher_head.vocab_size != head.vocab_size:
        raise ValueError(
            f"teacher and student must share a vocabulary, got {teacher_head.vocab_size} and {head.vocab_size} tokens"
        )
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"teacher and student must have one batch shape, got {tuple(teacher_hidden.shape[:-1])} and "
            f"{tuple(hidden.shape[:-1])}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    bias = None if teacher_head.bias is None else teacher_head.bias.detach()
    constant = Head(teacher_head.weight.detach(), bias, teacher_head.scale, teacher_head.softcap)
    return Teacher(teacher_hidden.detach().reshape(-1, teacher_head.hidden_size), constant, temperature)


def _shifted(
    shift: int, hidden: Tensor, targets: Tensor, teacher_hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if hidden.ndim < 2 or not 0 < shift <= targets.shape[-1]:
        raise ValueError(f"shift must lie in [0, T] with T = {tuple(targets.shape)[-1:]} tokens, got {shift}")
    cut = None if teacher_hidden is None else teacher_hidden[..., :-shift, :]
    return hidden[..., :-shift, :], targets[..., shift:], cut


def _filter_eps(given: float | Literal["auto"] | None, dtype: torch.dtype) -> float | None:
    return torch.finfo(dtype).eps / 32 if given == "auto" else given


def _naive_terms(
    rows: Tensor, head: Head, labels: Tensor, teacher: Teacher | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same four terms from all logits, differentiated by autograd."""
    z = head.logits(rows)
    log_p = z.log_softmax(1)
    entropy_ = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    kl = torch.zeros_like(entropy_)
    if teacher is not None:
        log_t = (teacher.head.logits(teacher.hidden).to(accumulation_dtype(z)) / teacher.temperature).log_softmax(1)
        kl = functional.kl_div((z / teacher.temperature).log_softmax(1), log_t, reduction="none", log_target=True).sum(
            1
        )
    return -log_p.gather(1, labels[:, None]).squeeze(1), z.logsumexp(1), entropy_, kl

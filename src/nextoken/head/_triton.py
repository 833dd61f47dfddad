"""`statistics` by the Triton kernel: what goes in, and how its parts become one."""

from __future__ import annotations

import torch
from torch import Tensor

from nextoken.head._leaders import Leaders
from nextoken.head._merge import merge
from nextoken.head._partial import COLUMNS, FIRST, ONE, PLAIN, Partial
from nextoken.head._statistics import Statistics
from nextoken.head._sweep import Target
from nextoken.head._unembedding import Head

LOWEST = -1e30  # stands for the maximum of an empty part: finite, so that differences are
PROGRAMS = 1024  # at least about so many programs, if the vocabulary has enough tiles
TILE_ROWS, TILE_TOKENS, TILE_WIDTH = 64, 128, 64
LEADERS_LIMIT = 64


def triton_statistics(rows: Tensor, head: Head, target: Target | None, *, top: int) -> Statistics:
    """`statistics` of rows [n, H] by the kernel; n >= 1.

    Raises:
        ValueError: float64, a top-k beyond 64, or tensors on a CPU without Triton's interpreter.
    """
    import triton

    from nextoken.head._kernel import sweep_kernel

    _check(rows, head, top, on_cpu=triton.knobs.runtime.interpret)
    n, size = rows.shape[0], head.vocab_size
    kept = min(max(top, 2), size)
    lanes = max(2, triton.next_power_of_2(kept))
    common = torch.promote_types(rows.dtype, head.weight.dtype)
    rows, weight = rows.to(common).contiguous(), head.weight.to(common).contiguous()
    tiles = triton.cdiv(size, TILE_TOKENS)
    blocks = triton.cdiv(n, TILE_ROWS)
    splits = max(1, min(tiles, PROGRAMS // blocks))
    span = triton.cdiv(tiles, splits) * TILE_TOKENS
    splits = triton.cdiv(size, span)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=rows.device)

    sums = new(splits, COLUMNS, n)
    centre, about, count, target_logit = (new(splits, n) for _ in range(4))
    spoilt = new(splits, n, dtype=torch.int32)
    values, ids = new(splits, n, lanes), new(splits, n, lanes, dtype=torch.int32)
    nothing = rows  # a pointer that is never read
    sweep_kernel[(blocks, splits)](
        rows,
        weight,
        nothing if head.bias is None else head.bias.contiguous(),
        nothing if target is None else target.ids.contiguous(),
        nothing if target is None else target.threshold.float().contiguous(),
        sums,
        centre,
        about,
        count,
        target_logit,
        spoilt,
        values,
        ids,
        n,
        size,
        span,
        head.scale,
        1.0 if head.softcap is None else head.softcap,
        rows.stride(0),
        weight.stride(0),
        WIDTH=head.hidden_size,
        HAS_BIAS=head.bias is not None,
        HAS_CAP=head.softcap is not None,
        HAS_TARGET=target is not None,
        WIDEN=triton.knobs.runtime.interpret,  # its dot knows no bfloat16
        K=lanes,
        ROWS=TILE_ROWS,
        TOKENS=TILE_TOKENS,
        DEPTH=TILE_WIDTH,
        BOTTOM=LOWEST,
        num_warps=8,
    )
    sums, centre, count = sums.double(), centre.double(), count.double()
    # A part whose tokens all lead has no sums and no maximum: its plain mean is as good a centre as any.
    bare = sums[:, ONE] == 0.0
    centre = torch.where(bare & (count > 0), sums[:, PLAIN], centre)
    about = torch.where(bare, centre, about.double())
    sums[:, PLAIN] = count * (sums[:, PLAIN] - centre)
    sums[:, FIRST] = 0.0
    partial = Partial(centre, about, sums, count).joined()
    leaders = _best(values, ids, kept)
    part, row, place = (values > -torch.inf).nonzero().unbind(1)
    aside = (row, values[part, row, place].double(), ids[part, row, place].long())
    leaders.complete(size)
    own = target_logit.double().sum(0)
    return merge(partial, aside, leaders, spoilt.amax(0) > 0, target, own, top)


def _best(values: Tensor, ids: Tensor, k: int) -> Leaders:
    """The k best of the leaders [S, N, K] of all parts, equal ones by lower id."""
    flat_values, flat_ids = (x.transpose(0, 1).flatten(1) for x in (values, ids))
    flat_ids, order = flat_ids.long().sort(dim=1)
    flat_values, order = flat_values.gather(1, order).sort(dim=1, descending=True, stable=True)
    leaders = Leaders(values.shape[1], k, values.dtype, values.device)
    leaders.values = flat_values[:, :k].contiguous()
    leaders.ids = flat_ids.gather(1, order[:, :k]).masked_fill(leaders.values == -torch.inf, -1)
    return leaders


def _check(rows: Tensor, head: Head, top: int, *, on_cpu: bool) -> None:
    if torch.float64 in (rows.dtype, head.weight.dtype):
        raise ValueError("the Triton kernel sums in float32; use impl='torch' for float64")
    if top > LEADERS_LIMIT:
        raise ValueError(
            f"the Triton kernel keeps at most {LEADERS_LIMIT} leading tokens, got top={top}; use impl='torch'"
        )
    if rows.device.type == "cpu" and not on_cpu:
        raise ValueError("the Triton kernel needs a CUDA device; on a CPU use impl='torch'")

"""The sweep as one Triton kernel: logits live in registers, a tile at a time.

A program owns a block of rows and a range of the vocabulary. Per tile it multiplies, takes the leaders, and merges the
tile's moments into its own about their means (Chan et al. 1979; Pebay 2008), so nothing cancels. What leaves the kernel
are the same sums over parts of the vocabulary that the torch blocks make; `merge` does the rest.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheels for this platform; `statistics` then never comes here
    pass
else:

    @triton.jit  # type: ignore[untyped-decorator]
    def sweep_kernel(  # type: ignore[no-untyped-def]
        hidden,  # [N, H]
        weight,  # [V, H]
        bias,  # [V]
        targets,  # [N] int64
        thresholds,  # [N]
        sums,  # [S, 14, N]
        centres,  # [S, N]
        abouts,  # [S, N]
        counts,  # [S, N]
        target_logits,  # [S, N]
        spoilt,  # [S, N] int32
        leader_values,  # [S, N, K]
        leader_ids,  # [S, N, K] int32
        n,
        size,
        span,
        scale,
        softcap,
        hidden_row,
        weight_row,
        WIDTH: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_CAP: tl.constexpr,
        HAS_TARGET: tl.constexpr,
        WIDEN: tl.constexpr,
        K: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        DEPTH: tl.constexpr,
        BOTTOM: tl.constexpr,
    ):
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        split = tl.program_id(1)
        here = rows < n
        depth = tl.arange(0, DEPTH)
        wide_rows = rows.to(tl.int64)
        peak = tl.full((ROWS,), BOTTOM, tl.float32)
        mean = tl.zeros((ROWS,), tl.float32)
        m0 = tl.zeros((ROWS,), tl.float32)
        m2 = tl.zeros((ROWS,), tl.float32)
        m3 = tl.zeros((ROWS,), tl.float32)
        m4 = tl.zeros((ROWS,), tl.float32)
        quarter = tl.zeros((ROWS,), tl.float32)
        half = tl.zeros((ROWS,), tl.float32)
        square = tl.zeros((ROWS,), tl.float32)
        cube = tl.zeros((ROWS,), tl.float32)
        biquadrate = tl.zeros((ROWS,), tl.float32)
        count = tl.zeros((ROWS,), tl.float32)
        plain_mean = tl.zeros((ROWS,), tl.float32)
        plain_square = tl.zeros((ROWS,), tl.float32)
        above = tl.zeros((ROWS,), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        own = tl.zeros((ROWS,), tl.float32)
        bad = tl.zeros((ROWS,), tl.int32)
        slot = tl.arange(0, K)
        values = tl.full((ROWS, K), float("-inf"), tl.float32)
        ids = tl.zeros((ROWS, K), tl.int32) - 1 - slot[None, :]
        if HAS_TARGET:
            target = tl.load(targets + rows, mask=here, other=-1)
            threshold = tl.load(thresholds + rows, mask=here, other=float("inf"))
        for first in range(split * span, tl.minimum((split + 1) * span, size), TOKENS):
            tokens = first + tl.arange(0, TOKENS)
            inside = tokens < size
            wide_tokens = tokens.to(tl.int64)
            z = tl.zeros((ROWS, TOKENS), tl.float32)
            for start in range(0, WIDTH, DEPTH):
                part = (start + depth) < WIDTH
                h = tl.load(
                    hidden + wide_rows[:, None] * hidden_row + (start + depth)[None, :],
                    mask=here[:, None] & part[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight + wide_tokens[:, None] * weight_row + (start + depth)[None, :],
                    mask=inside[:, None] & part[None, :],
                    other=0.0,
                )
                if WIDEN:
                    h, w = h.to(tl.float32), w.to(tl.float32)
                z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
            if HAS_BIAS:
                b = tl.load(bias + tokens, mask=inside, other=0.0).to(tl.float32)
                z += b[None, :]
            z = z * scale
            if HAS_CAP:
                capped = softcap * (2.0 / (1.0 + tl.exp(-2.0 * (z / softcap))) - 1.0)
                z = tl.where(z == float("-inf"), z, capped)
            z = tl.where(inside[None, :], z, float("-inf"))
            wrong = (z != z) | (z == float("inf"))
            bad = tl.maximum(bad, tl.max(wrong.to(tl.int32), 1))
            z = tl.where(wrong, float("-inf"), z)

            finite = z > float("-inf")
            tile_count = tl.sum(finite.to(tl.float32), 1)
            plain = tl.where(finite, z, 0.0)
            tile_mean = tl.sum(plain, 1) / tl.maximum(tile_count, 1.0)
            off = tl.where(finite, z - tile_mean[:, None], 0.0)
            both = tl.maximum(count + tile_count, 1.0)
            gap = tile_mean - plain_mean
            plain_square += tl.sum(off * off, 1) + gap * gap * (count * (tile_count / both))
            plain_mean += gap * (tile_count / both)
            count += tile_count
            if HAS_TARGET:
                above += tl.sum((z > threshold[:, None]).to(tl.float32), 1)
                own += tl.sum(tl.where(wide_tokens[None, :] == target[:, None], z, 0.0), 1)

            # A token that beats the least leader takes its place, and the least leader its place in the tile: so the
            # sums below are over all tokens so far but the leaders.
            top = tl.max(z, 1)
            least = tl.min(values, 1)
            moving = top > least
            while tl.max(moving.to(tl.int32), 0) > 0:
                column = tl.argmax(z, 1)
                worst = tl.max(tl.where(values == least[:, None], ids, -2147483647), 1)
                out = (ids == worst[:, None]) & moving[:, None]
                values = tl.where(out, top[:, None], values)
                ids = tl.where(out, (first + column)[:, None].to(tl.int32), ids)
                taken = (tokens - first)[None, :] == column[:, None]
                z = tl.where(taken & moving[:, None], least[:, None], z)
                top = tl.max(z, 1)
                least = tl.min(values, 1)
                moving = top > least

            new_peak = tl.maximum(peak, top)
            shrink = tl.exp(0.25 * (peak - new_peak))
            e = tl.exp(0.25 * (z - new_peak[:, None]))  # exp(z - peak)^(1/4)
            quarter = quarter * shrink + tl.sum(e, 1)
            e = e * e
            shrink = shrink * shrink
            half = half * shrink + tl.sum(e, 1)
            e = e * e
            shrink = shrink * shrink
            square = square * shrink * shrink + tl.sum(e * e, 1)
            cube = cube * shrink * shrink * shrink + tl.sum(e * e * e, 1)
            biquadrate = biquadrate * shrink * shrink * shrink * shrink + tl.sum(e * e * e * e, 1)
            if HAS_TARGET:
                mass = mass * shrink + tl.sum(tl.where(z > threshold[:, None], e, 0.0), 1)
            m0 = m0 * shrink
            m2 = m2 * shrink
            m3 = m3 * shrink
            m4 = m4 * shrink
            tile = tl.sum(e, 1)
            s = tl.where(e > 0.0, z - new_peak[:, None], 0.0)
            centre = tl.sum(e * s, 1) / tl.maximum(tile, 1e-37)
            s = tl.where(e > 0.0, s - centre[:, None], 0.0)
            t2 = e * s * s
            t3 = tl.sum(t2 * s, 1)
            t4 = tl.sum(t2 * s * s, 1)
            t2s = tl.sum(t2, 1)
            total = tl.maximum(m0 + tile, 1e-37)
            a = m0 / total  # shares of what was there and of the tile
            b_ = tile / total
            d = centre + new_peak - mean
            d = tl.where((m0 > 0.0) & (tile > 0.0), d, 0.0)
            m4 += (
                t4
                + d * d * d * d * m0 * b_ * (a * a - a * b_ + b_ * b_)
                + 6.0 * d * d * (a * a * t2s + b_ * b_ * m2)
                + 4.0 * d * (a * t3 - b_ * m3)
            )
            m3 += t3 + d * d * d * m0 * b_ * (a - b_) + 3.0 * d * (a * t2s - b_ * m2)
            m2 += t2s + d * d * m0 * b_
            mean = tl.where(m0 > 0.0, mean + d * b_, tl.where(tile > 0.0, centre + new_peak, mean))
            m0 += tile
            peak = new_peak

        at = split.to(tl.int64) * n + rows
        into = sums + split.to(tl.int64) * 14 * n + rows
        tl.store(into, quarter, mask=here)
        tl.store(into + n, half, mask=here)
        tl.store(into + 2 * n, m0, mask=here)
        tl.store(into + 4 * n, m2, mask=here)
        tl.store(into + 5 * n, m3, mask=here)
        tl.store(into + 6 * n, m4, mask=here)
        tl.store(into + 7 * n, square, mask=here)
        tl.store(into + 8 * n, cube, mask=here)
        tl.store(into + 9 * n, biquadrate, mask=here)
        tl.store(into + 10 * n, plain_mean, mask=here)
        tl.store(into + 11 * n, plain_square, mask=here)
        tl.store(into + 12 * n, above, mask=here)
        tl.store(into + 13 * n, mass, mask=here)
        tl.store(centres + at, peak, mask=here)
        tl.store(abouts + at, mean, mask=here)
        tl.store(counts + at, count, mask=here)
        tl.store(target_logits + at, own, mask=here)
        tl.store(spoilt + at, bad, mask=here)
        tl.store(leader_values + at[:, None] * K + slot[None, :], values, mask=here[:, None])
        tl.store(leader_ids + at[:, None] * K + slot[None, :], ids, mask=here[:, None])

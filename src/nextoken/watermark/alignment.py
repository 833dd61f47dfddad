"""Alignment: what it costs to lay a block of a text along a sequence of secret numbers, wherever it begins there.

Costs c[t, j] of token t of a text at place j of the key come in [..., T, n]; the key is a circle. Every function looks
at all n places to begin at once.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]
_AT_ONCE = 1 << 17
"""Cells of the table of edits held at a time: more than this and they leave the processor's cache."""


def plain_costs(costs: Costs, block: int) -> Costs:
    """S[i, j] = sum_{s < k} c[i + s, (j + s) mod n]: blocks of k tokens with no edits, [..., T - k + 1, n].

    Args:
        costs: [..., T, n].
        block: k, from 1 to T.
    """
    length, n = costs.shape[-2:]
    # Row t turned to the left by t: what lay on a diagonal then lies in a column, and a block is a difference of sums.
    at = (np.arange(n) + np.arange(length)[:, None]) % n
    turned = np.take_along_axis(costs, np.broadcast_to(at, costs.shape), axis=-1)
    if block == length:
        return np.asarray(turned.sum(axis=-2, keepdims=True))
    sums = turned.cumsum(axis=-2)
    blocks = sums[..., block - 1 :, :].copy()
    blocks[..., 1:, :] -= sums[..., : length - block, :]
    # Column j of block i began at place j + i.
    back = (np.arange(n) - np.arange(length - block + 1)[:, None]) % n
    return np.take_along_axis(blocks, np.broadcast_to(back, blocks.shape), axis=-1)


def edit_costs(costs: Costs, gamma: float) -> Costs:
    """A[k, k] for every place j to begin, [..., n]: k tokens along places j .. j + k - 1 with edits at gamma each.

    A[0, b] = b gamma, A[a, 0] = a gamma and
    A[a, b] = min(A[a-1, b] + gamma, A[a, b-1] + gamma, A[a-1, b-1] + cost of the a-th token at the b-th place).

    Args:
        costs: [..., k, n].
        gamma: cost of a token left out or of a place left out; finite, at least 0.
    """
    block, n = costs.shape[-2:]
    flat = costs.reshape(-1, block, n)
    at_once = max(1, _AT_ONCE // ((block + 1) * n))
    found = [_edited(flat[start : start + at_once], gamma) for start in range(0, len(flat), at_once)]
    return np.concatenate(found).reshape(*costs.shape[:-2], n) if found else np.empty((*costs.shape[:-2], n))


def _edited(costs: Costs, gamma: float) -> Costs:
    """`edit_costs` of [R, k, n], diagonal after diagonal of the table, for the cells of one do not need each other.

    With A'[a, b] = A[a, b] - (a + b) gamma an edit is free, a match costs c - 2 gamma, and the edges are 0.
    """
    count, block, n = costs.shape
    # Row r turned to the right by r: the matches of diagonal d = a + b then lie in the n columns from d - 2 on.
    at = (np.arange(2 * n - 1) - np.arange(block)[:, None]) % n
    turned = np.take_along_axis(np.swapaxes(costs - 2 * gamma, 0, 1), at[:, None], axis=-1)
    before, last, cells = (np.zeros((block + 1, count, n)) for _ in range(3))
    for diagonal in range(2, 2 * block + 1):
        low, high = max(1, diagonal - block), min(block, diagonal - 1) + 1
        begin = (diagonal - 2) % n
        # `before` is not needed again: the matches are added where it stands.
        matched = before[low - 1 : high - 1]
        matched += turned[low - 1 : high - 1, :, begin : begin + n]
        np.minimum(last[low - 1 : high - 1], last[low:high], out=cells[low:high])
        np.minimum(cells[low:high], matched, out=cells[low:high])
        # The upper edge is spoilt where a match was added to it.
        before[0] = 0.0
        before, last, cells = last, cells, before
    return np.asarray(last[-1] + 2 * gamma * block)


def lowest(costs: Costs, block: int, gamma: float) -> Costs:
    """phi = min over blocks of k tokens and places to begin of the cost of their alignment, [...].

    Args:
        costs: [..., T, n].
        block: k, from 1 to T.
        gamma: cost of an edit; infinity for none.

    Raises:
        ValueError: the block does not fit the text, or gamma is negative or no number.
    """
    length = costs.shape[-2]
    if not 1 <= block <= length:
        raise ValueError(f"a block of {block} tokens does not fit a text of {length}")
    if not gamma >= 0:
        raise ValueError(f"an edit costs at least 0, got gamma={gamma}")
    if math.isinf(gamma):
        return np.asarray(plain_costs(costs, block).min(axis=(-2, -1)))
    # One block of the text after the other: tables for all of them at once would not stay in the cache.
    found = [edit_costs(costs[..., at : at + block, :], gamma).min(-1) for at in range(length - block + 1)]
    return np.asarray(np.min(found, axis=0))

"""Token trees given by parent indices: depth, ancestry, paths.

A tree of n nodes is `parents` [B, n]: `parents[b, i] < i` is the node that node i continues, -1 the last kept token. A
chain is the tree `[-1, 0, 1, ...]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def chain(batch: int, n: int) -> Tensor:
    """Parents [B, n] of a chain."""
    return torch.arange(-1, n - 1).expand(batch, n)


def check_parents(parents: Tensor, present: Tensor) -> None:
    """Check `parents` [B, n] against which nodes are `present` [B, n].

    Raises:
        ValueError: a parent does not come before its node, or a present node hangs on an absent one.
    """
    before = torch.arange(parents.shape[1], device=parents.device)
    if bool(((parents >= before) | (parents < -1)).any()):
        raise ValueError("every parent must be -1 (the last kept token) or the index of an earlier node of this call")
    parent_present = torch.gather(present, 1, parents.clamp(min=0)) | (parents < 0)
    if bool((present & ~parent_present).any()):
        raise ValueError("a node hangs on an absent one: tokens of -1 may only have children of -1")


def depths(parents: Tensor) -> Tensor:
    """Number of ancestors of each node [B, n] within its tree: 0 for a child of the last kept token."""
    depth = torch.zeros_like(parents)
    for i in range(parents.shape[1]):
        parent = parents[:, i]
        above = torch.gather(depth, 1, parent.clamp(min=0)[:, None])[:, 0] + 1
        depth[:, i] = torch.where(parent < 0, 0, above)
    return depth


def ancestry(parents: Tensor) -> Tensor:
    """Boolean [B, n, n]: entry (b, i, j) is true where node j is node i itself or one of its ancestors."""
    batch, n = parents.shape
    sees = torch.eye(n, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    rows = torch.arange(batch, device=parents.device)
    for i in range(n):
        parent = parents[:, i]
        inherited = sees[rows, parent.clamp(min=0)] & (parent >= 0)[:, None]
        sees[:, i] |= inherited
    return sees


def is_path(path: Sequence[int], parents: Sequence[int]) -> bool:
    """Whether `path` starts at the last kept token and each node continues the one before."""
    previous = -1
    for node in path:
        if not 0 <= node < len(parents) or parents[node] != previous:
            return False
        previous = node
    return True

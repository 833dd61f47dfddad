"""Nothing of size N x V is ever alive: the one property that full logits inside a function would break."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nextoken.head import Head, _compare, _read, _terms, compare, cross_entropy, statistics

N, H, V = 1024, 16, 32_768


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks shrink with the problem, so that a tenth of its logits is a lot more than a few blocks."""
    for module in (_read, _terms, _compare):
        monkeypatch.setattr(module, "ENTRIES", 1 << 18)


class Peak(TorchDispatchMode):
    """Bytes of tensor storage alive at once, of those made inside the block: every operator's outputs are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pointers = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() in pointers or storage.data_ptr() in self._seen or storage.nbytes() == 0:
                continue
            key, size = storage.data_ptr(), storage.nbytes()
            self._seen.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_of(work: Callable[[], Any]) -> int:
    with Peak() as peak:
        work()
    return peak.peak


def setting() -> tuple[torch.Tensor, Head, torch.Tensor]:
    return torch.randn(N, H), Head(torch.randn(V, H)), torch.randint(0, V, (N,))


def test_the_gauge_sees_full_logits() -> None:
    hidden, head, _ = setting()
    assert peak_of(lambda: head.logits(hidden).exp()) >= 2 * N * V * 4


@pytest.mark.parametrize("top", [0, 10])
def test_statistics(top: int) -> None:
    hidden, head, targets = setting()
    assert peak_of(lambda: statistics(hidden, head, targets, top=top)) < 0.1 * N * V * 4


def test_compare() -> None:
    hidden, head, _ = setting()
    assert peak_of(lambda: compare(hidden, head, hidden.flip(0), head)) < 0.1 * N * V * 4


@pytest.mark.paper("2411.09009")
def test_cross_entropy_forward_and_backward() -> None:
    hidden, head, targets = setting()
    head.weight.requires_grad_()
    hidden.requires_grad_()
    loss: list[torch.Tensor] = []
    assert peak_of(lambda: loss.append(cross_entropy(hidden, head, targets))) < 0.1 * N * V * 4
    assert peak_of(loss[0].backward) < 0.1 * N * V * 4

"""Routes of Duo-LLM: for every token and layer the big feed-forward block, the small one, or none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor


class Width(IntEnum):
    """What a token does in place of a feed-forward block, the cheapest first."""

    SKIP = 0
    SMALL = 1
    BIG = 2


Decide: TypeAlias = Callable[[Tensor], Tensor]
"""Of what goes into a block [B, n, H]: the `Width` of each token [B, n], or weights [B, n, 3] of all three."""


class RouteRule(Protocol):
    """Which width each token takes in each layer: a function of the tokens alone."""

    @abstractmethod
    def decides(self, tokens: Tensor, positions: Tensor, depth: int) -> Sequence[Decide]:
        """One decision per layer, for a call with tokens [B, n] (ABSENT where none) at positions [B, n]."""

    @property
    def size(self) -> int:
        """Weights that it activates per token and layer."""

    @abstractmethod
    def __repr__(self) -> str:
        """All that the routes depend on, for digests."""


@dataclass(frozen=True)
class FixedRoute:
    """The same route r in {skip, small, big}^L for every token.

    Args:
        route: r, a `Width` per layer from the lowest.
    """

    route: tuple[Width, ...]
    size: ClassVar[int] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "route", tuple(Width(width) for width in self.route))

    @classmethod
    def all(cls, width: Width, depth: int) -> FixedRoute:
        """One width in all layers."""
        return cls((width,) * depth)

    def decides(self, tokens: Tensor, positions: Tensor, depth: int) -> Sequence[Decide]:
        if len(self.route) != depth:
            raise ValueError(f"a route through {depth} layers is needed, got one of {len(self.route)}")
        return [given_widths(torch.full(tokens.shape, width)) for width in self.route]


@dataclass(frozen=True)
class RandomRoute:
    """For every token and layer a width drawn by itself: what trained routers must beat at equal shares.

    The draw is a hash of the seed, the layer, the token and its position, so that a text has the same routes in every
    batch and however it is fed.

    Args:
        shares: probabilities of skip, small and big; one triple, or one per layer.
        seed: of the draws.

    Raises:
        ValueError: shares are negative or do not sum to 1.
    """

    shares: tuple[float, float, float] | tuple[tuple[float, float, float], ...]
    seed: int = 0
    size: ClassVar[int] = 0

    def __post_init__(self) -> None:
        table = np.asarray(self.shares, dtype=np.float64)
        if table.shape[-1:] != (3,) or table.ndim > 2 or table.min() < 0 or np.abs(table.sum(-1) - 1).max() > 1e-6:
            raise ValueError(f"shares must be those of skip, small and big, summing to 1; got {self.shares}")

    def decides(self, tokens: Tensor, positions: Tensor, depth: int) -> Sequence[Decide]:
        table = np.asarray(self.shares, dtype=np.float64)
        if table.ndim == 2 and len(table) != depth:
            raise ValueError(f"shares for {depth} layers are needed, got {len(table)}")
        edges = np.broadcast_to(table, (depth, 3)).cumsum(-1)[:, :2]
        ids, places = (part.cpu().numpy().astype(np.uint64) for part in (tokens, positions))
        decides = []
        for layer in range(depth):
            uniform = _uniform(self.seed, layer, ids, places)
            # Of the two edges as many lie at or below the draw as the width says.
            widths = (uniform[..., None] >= edges[layer]).sum(-1)
            # A share of 0 at the end must not be drawn for the sum's rounding.
            widths = np.minimum(widths, int(np.flatnonzero(np.broadcast_to(table, (depth, 3))[layer])[-1]))
            decides.append(given_widths(torch.from_numpy(widths)))
        return decides


def given_widths(widths: Tensor) -> Decide:
    """A decision that was made beforehand."""

    def decide(hidden: Tensor) -> Tensor:
        return widths.to(hidden.device)

    return decide


def _uniform(seed: int, layer: int, tokens: Any, positions: Any) -> Any:
    """u in [0, 1) for whole numbers of one shape, by the finaliser of SplitMix64 after each of them."""
    state = np.full(tokens.shape, seed % 2**64, dtype=np.uint64)
    for part in (np.full_like(tokens, layer), positions, tokens):
        state = state * np.uint64(0x9E3779B97F4A7C15) + part + np.uint64(0x632BE59BD9B4E019)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2**53

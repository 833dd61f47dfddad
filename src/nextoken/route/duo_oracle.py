"""The oracle of Duo-LLM: what every token would have lost along every route, the tokens before it on a fixed one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextoken.methods import method
from nextoken.model._descent import check_rows, generator_of
from nextoken.model.base import ABSENT
from nextoken.model.next import invert_cdf
from nextoken.route.duo import DuoLLM
from nextoken.route.duo_route import Decide, Width, given_widths

Floats: TypeAlias = NDArray[np.float64]
Route: TypeAlias = tuple[Width, ...]
_ENTRIES = 1 << 22
"""Probabilities held at once."""


def every_route(depth: int, *, widths: Iterable[Width] = (Width.SMALL, Width.BIG)) -> tuple[Route, ...]:
    """All routes through `depth` layers, the first with the first width throughout.

    Raises:
        ValueError: there are more than 65,536; draw some with `some_routes`.
    """
    kinds = tuple(Width(width) for width in widths)
    if len(kinds) ** depth > 1 << 16:
        raise ValueError(f"{len(kinds)}^{depth} routes are too many to try them all; draw some with some_routes()")
    return tuple(itertools.product(kinds, repeat=depth))


def some_routes(
    depth: int, count: int, *, widths: Sequence[Width] = (Width.SMALL, Width.BIG), seed: int = 0
) -> tuple[Route, ...]:
    """`count` routes drawn with replacement, every width as likely as another in every layer."""
    drawn = torch.randint(len(widths), (count, depth), generator=generator_of(seed, "routes")).tolist()
    return tuple(tuple(Width(widths[place]) for place in row) for row in drawn)


@dataclass(frozen=True, eq=False)
class RouteTable:
    """-log p of N tokens along R routes.

    Args:
        routes: R of them.
        losses: [N, R] nats, of the tokens that followed.
        control: [N, R] nats, of other tokens in their place, which the route has no means to know: drawn from what the
            context route says there, unless others were given.
        context: [N] nats, of the tokens that followed, along the context route.
        entropies: [N] nats, of what the context route says.
    """

    routes: tuple[Route, ...]
    losses: Floats
    control: Floats
    context: Floats
    entropies: Floats

    @property
    def bigs(self) -> NDArray[np.int64]:
        """Big blocks in each route [R]."""
        return np.array([sum(width == Width.BIG for width in route) for route in self.routes])

    def best(self, *, most: int | None = None, exactly: int | None = None, control: bool = False) -> Floats:
        """min over routes of the loss [N]: the oracle's, who knows the token that follows.

        Args:
            most: only routes with at most so many big blocks; the minimum does not rise as it grows.
            exactly: only routes with exactly so many.
            control: of the control's tokens. What they seem to gain is the effect of choosing alone.
        """
        return np.asarray(self._of(control)[:, self._allowed(most, exactly)].min(1))

    def mean(self, *, most: int | None = None, exactly: int | None = None, control: bool = False) -> Floats:
        """Mean over these routes of the loss [N]: a random route's."""
        return np.asarray(self._of(control)[:, self._allowed(most, exactly)].mean(1))

    def best_of(
        self, draws: int, *, most: int | None = None, exactly: int | None = None, control: bool = False
    ) -> Floats:
        """E[min of R' routes drawn with replacement] [N], R' = `draws`, exactly:

            sum_k a_(k) ((1 - (k - 1) / R)^R' - (1 - k / R)^R'),   a_(1) <= ... <= a_(R)

        1 draw is the mean, and many are the oracle.
        """
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        ordered = np.sort(self._of(control)[:, self._allowed(most, exactly)], 1)
        size = ordered.shape[1]
        above = (1 - np.arange(size + 1) / size) ** draws
        # As steps up from the least, so that rounding cannot make it less than that.
        return np.asarray(ordered[:, 0] + np.diff(ordered, axis=1) @ above[1:-1])

    def gain(self, *, most: int | None = None, control: bool = False) -> Floats:
        """Loss along the cheapest route less the least loss with at most `most` big blocks [N]: a token's difficulty.

        A token that is hard to predict and gains nothing is not difficult in this sense, but unpredictable. The
        cheapest is the route with the fewest big and then the fewest small blocks.
        """
        cheapest = min(range(len(self.routes)), key=lambda number: sorted(self.routes[number], reverse=True))
        return np.asarray(self._of(control)[:, cheapest] - self.best(most=most, control=control))

    def _of(self, control: bool) -> Floats:
        return self.control if control else self.losses

    def _allowed(self, most: int | None, exactly: int | None) -> NDArray[np.int64]:
        bigs = self.bigs
        allowed = np.ones(len(bigs), dtype=bool) if most is None else bigs <= most
        if exactly is not None:
            allowed &= bigs == exactly
        if not allowed.any():
            raise ValueError(f"no route of the table has at most {most} and exactly {exactly} big blocks")
        return np.flatnonzero(allowed)


@method(
    name="Duo-LLM oracle",
    arxiv="2410.10846",
    access="white",
    summary="the least loss that any route through big and small blocks gives a token, and what choosing alone gives",
)
@torch.no_grad()
def route_losses(
    duo: DuoLLM,
    rows: Sequence[Sequence[int]],
    routes: Sequence[Route],
    *,
    context: Route | None = None,
    control: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> RouteTable:
    """L[t, r] = -log p(x_{t+1} | x_<=t), x_t along route r and x_<t along the context route.

    The tokens before it are held on one route, for keys and values of theirs depend on it; each token is looked at by
    itself. All routes of a token are read as siblings of one tree.

    Args:
        duo: trained with random routing, so that every route is a model.
        rows: token ids, at least two in each; N counts all but the first of each.
        routes: such as `every_route`.
        context: of the tokens before, big throughout by default.
        control: rows of the same lengths with other tokens, which are predicted in place of those of `rows` (the first
            of each row is not looked at); by default drawn from what the context route says.
        seed: of the drawn ones.

    Raises:
        ValueError: there are no rows or no routes, or they do not fit.

    Source: Duo-LLM, arXiv:2410.10846; the choice of context is ours.
    """
    check_rows(duo, rows)
    kept: Route = (Width.BIG,) * duo.depth if context is None else tuple(context)
    if not routes or any(len(route) != duo.depth for route in (*routes, kept)):
        raise ValueError(f"routes through {duo.depth} layers are needed, and at least one")
    if control is not None and list(map(len, control)) != list(map(len, rows)):
        raise ValueError("the control needs rows of the same lengths")
    nodes = [*routes, kept]
    model = duo.along(_Siblings(torch.tensor(nodes)))
    generator, found = generator_of(seed, "control"), dict[tuple[int, int], list[Floats]]()
    some = max(1, _ENTRIES // (len(nodes) * duo.vocab.size))
    for begin in range(0, len(rows), some):
        batch = rows[begin : begin + some]
        state = model.start(len(batch))
        for place in range(max(map(len, batch)) - 1):
            here = torch.tensor([row[place] if place + 1 < len(row) else ABSENT for row in batch])
            present = (here != ABSENT).nonzero()[:, 0].tolist()
            said = model.extend(state, here[:, None].expand(-1, len(nodes)), [-1] * len(nodes)).log_probs().cpu()
            state.keep([[len(nodes) - 1] if token != ABSENT else [] for token in here.tolist()])
            for row in present:
                own = said[row]
                uniform = torch.rand(1, dtype=torch.float64, generator=generator)
                drawn = int(invert_cdf(own[-1:], uniform)) if control is None else control[begin + row][place + 1]
                pair = -own[:, [rows[begin + row][place + 1], drawn]].double().numpy()
                entropy = float(torch.special.entr(own[-1].double().exp()).sum())
                found[begin + row, place] = [pair[:-1, 0], pair[:-1, 1], np.array([pair[-1, 0], entropy])]
    ordered = [found[key] for key in sorted(found)]
    losses, others, rest = (np.stack([part[number] for part in ordered]) for number in range(3))
    return RouteTable(tuple(routes), losses, others, rest[:, 0], rest[:, 1])


class _Siblings:
    """Every call is of R nodes, node r along route r of [R, L]."""

    size: ClassVar[int] = 0

    def __init__(self, routes: Tensor) -> None:
        self.routes = routes

    def decides(self, tokens: Tensor, positions: Tensor, depth: int) -> Sequence[Decide]:
        return [given_widths(widths.expand(tokens.shape)) for widths in self.routes.T]

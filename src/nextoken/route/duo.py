"""Duo-LLM: a small block beside every feed-forward block, and for every token and layer one of them, or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.methods import method
from nextoken.model import _saved
from nextoken.model.hf import HFModel
from nextoken.route._feed_forward import FeedForward, depth_of, initial_scale, with_blocks
from nextoken.route._width import AdaptiveWidth
from nextoken.route.cost import Cost, Spent
from nextoken.route.duo_route import Decide, FixedRoute, RouteRule, Width

_WHAT = "duo"


class DuoBlock(nn.Module):
    """F_r(x) [..., H]: the big block, the small one, or 0, as `decide` says of every token; big where it is not set.

    Args:
        big, small: blocks of one H.
    """

    def __init__(self, big: FeedForward, small: FeedForward) -> None:
        super().__init__()
        self.big, self.small = big, small
        self.decide: Decide | None = None
        self.last: Tensor | None = None

    @property
    def costs(self) -> tuple[float, float, float]:
        """Weights activated by skip, small and big, as shares of big's."""
        return (0.0, self.small.size / self.big.size, 1.0)

    def forward(self, hidden: Tensor) -> Tensor:
        said = torch.full(hidden.shape[:-1], Width.BIG) if self.decide is None else self.decide(hidden)
        if said.is_floating_point():
            self.last = said
            mixed: Tensor = said[..., 1:2] * self.small(hidden) + said[..., 2:] * self.big(hidden)
            return mixed
        self.last = said
        made = torch.zeros_like(hidden)
        for width, part in ((Width.SMALL, self.small), (Width.BIG, self.big)):
            chosen = (said == width).to(hidden.device)
            if bool(chosen.all()):  # in the shape it came in, so that all-big is the dense model to the last bit
                whole: Tensor = part(hidden)
                return whole
            if bool(chosen.any()):
                made = made.index_put((chosen,), part(hidden[chosen]))
        return made


@method(
    name="Duo-LLM",
    arxiv="2410.10846",
    access="white",
    trained=True,
    summary="a small block beside each feed-forward block, and routes through big, small and none for every token",
)
class DuoLLM(AdaptiveWidth):
    """x + F_{r_l}(norm(x)) in place of x + FFN_l(norm(x)), r a route for every token; attention is always run.

        duo = DuoLLM.beside(load("nano"), ratio=1 / 8)
        fit_duo(duo, rows)                                       # stage 1: every route is a model of its own
        table = route_losses(duo, rows, every_route(duo.depth))  # stage 2: the oracle
        routers, _ = fit_routers(duo, rows, budget=0.5)          # stage 3
        duo.along(routers)                                       # a model whose routes follow its hidden states

    The model itself takes the big blocks throughout; `along` makes others of it, which share its weights. Those are
    copies: what it was made of stays as it is. Passes of models that share weights must not overlap in time.

    Raises:
        ModelError: the model is built otherwise than Llama.
        ValueError: a setting is out of range.

    Source: Duo-LLM, arXiv:2410.10846. Widths, the routers' loss and the search's budget are reconstructed.
    """

    def __init__(self, model: HFModel, *, width: int, seed: int) -> None:
        """See `beside`; `width` is that of the small blocks."""
        self.depth = depth_of(model)
        generator, scale = torch.Generator().manual_seed(seed), initial_scale(model)

        def block(big: FeedForward, number: int) -> DuoBlock:
            if not 1 <= width <= big.width:
                raise ValueError(f"small blocks have from 1 to {big.width} inner units, got {width}")
            return DuoBlock(big, big.new(width, scale=scale, generator=generator))

        changed = with_blocks(model, block, name=f"duo({model.name})")
        blocks = [part for part in changed.model.modules() if isinstance(part, DuoBlock)]
        parts = [[("small", block.small.size), ("big", block.big.size)] for block in blocks]
        super().__init__(changed, blocks, parts=parts, base=model.digest)
        self.blocks, self._plain = tuple(blocks), self._parts
        self.rule: RouteRule = FixedRoute.all(Width.BIG, self.depth)
        self._made: dict[str, Any] = {"width": width, "seed": seed}

    @classmethod
    def beside(cls, model: HFModel, *, ratio: float = 0.125, seed: int = 0) -> DuoLLM:
        """Copies of the model's blocks are the big ones; the small ones have new weights.

        Args:
            model: a transformers model built like Llama.
            ratio: inner units of small blocks to those of big ones.
            seed: of the small blocks' weights.
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
        depth_of(model)
        inner = int(model.network.config.intermediate_size)
        return cls(model, width=max(1, round(ratio * inner)), seed=seed)

    def along(self, rule: RouteRule, *, name: str | None = None) -> DuoLLM:
        """The same weights under another rule of routes: `FixedRoute`, `RandomRoute` or `DuoRouters`."""
        other = copy.copy(self)
        other.rule = rule
        other._parts = other._spent = self._parts_under(rule)
        other.name = name or f"{self.inner.name} along {type(rule).__name__}"
        return other

    @contextmanager
    def deciding(self, decides: Sequence[Decide]) -> Iterator[None]:
        """Passes within take these decisions, one per layer."""
        for block, decide in zip(self.blocks, decides, strict=True):
            block.decide = decide
        try:
            yield
        finally:
            for block in self.blocks:
                block.decide = None

    def save(self, folder: str | Path) -> None:
        """Write the weights to a folder; the rule is not part of it.

        Raises:
            OutputError: it cannot be written.
        """
        digests = {"model": self.base, "vocabulary": self.vocab.digest}
        _saved.save(folder, _WHAT, settings=self._made, weights=self.inner.model.state_dict(), digests=digests)

    @classmethod
    def load(cls, folder: str | Path, model: HFModel) -> DuoLLM:
        """What `save` wrote, with the big blocks throughout.

        Args:
            folder: where.
            model: the one it was made of.

        Raises:
            ModelError: there is nothing whole in the folder, or it was made of another model.
        """
        saved = _saved.load(folder, _WHAT)
        saved.check(model=model.digest, vocabulary=model.vocab.digest)
        try:
            made = cls(model, **saved.settings)
        except (TypeError, ValueError) as error:
            raise ModelError(f"the settings of the duo in {folder} are not whole ({error}); save it again") from error
        saved.fill(made.inner.model)
        return made

    def _parts_under(self, rule: RouteRule) -> Cost:
        """The parts at a cost of nothing, the rule's own weights counted with each layer's attention."""
        per_layer, parts = (len(self._plain.models) - 1) // self.depth, list[Spent]()
        for number, part in enumerate(self._plain.models):
            assert part.parameters is not None
            is_own = number % per_layer == 0 and number < per_layer * self.depth
            parts.append(replace(part, parameters=part.parameters + rule.size) if is_own else part)
        return Cost(tuple(parts))

    def _settings(self) -> object:
        return repr(self.rule)

    @contextmanager
    def _deciding(self, tokens: Tensor, positions: Tensor) -> Iterator[None]:
        with self.deciding(self.rule.decides(tokens, positions, self.depth)):
            yield

    def _reads(self, present: Tensor) -> Sequence[Sequence[int]]:
        reads = []
        for block in self.blocks:
            assert block.last is not None
            widths = block.last.cpu()[present]
            reads.append([int((widths == width).sum()) for width in (Width.SMALL, Width.BIG)])
        return reads

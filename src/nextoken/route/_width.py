"""AdaptiveWidth: a model whose feed-forward blocks do more for some tokens than for others, and what it spent."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.model import tree
from nextoken.model._derived import Derived
from nextoken.model._sites import decoder_layers
from nextoken.model.base import ABSENT, State
from nextoken.model.hf import HFModel
from nextoken.model.next import Next
from nextoken.route.cost import Cost, Spent


class AdaptiveWidth(Derived):
    """A transformers model over changed feed-forward blocks; caches, trees and batches are as before.

    Args:
        changed: the model with other blocks in the place of its own.
        blocks: they, one per layer.
        parts: what each layer has for a token: names and weights, of which `_reads` tells how many tokens went through.
        base: digest of the model that was changed.
    """

    def __init__(
        self,
        changed: HFModel,
        blocks: Sequence[nn.Module],
        *,
        parts: Sequence[Sequence[tuple[str, int]]],
        base: str,
    ) -> None:
        if not changed.supports_trees:
            raise ModelError(f"{changed.name} keeps no keys and values that could be looked into; use another model")
        super().__init__(changed, changed.network, name=changed.name)
        self.base = base
        table, head = changed.model.get_input_embeddings(), changed.model.get_output_embeddings()
        layers = decoder_layers(changed.network)[1]
        fixed = [
            sum(w.numel() for w in layer.parameters()) - sum(w.numel() for w in block.parameters())
            for layer, block in zip(layers, blocks, strict=True)
        ]
        # A token looks up one row of the embeddings, so that they count only where they are the head as well.
        rest = sum(w.numel() for w in changed.model.parameters()) - sum(
            w.numel() for layer in layers for w in layer.parameters()
        )
        if head is None or head.weight is not table.weight:
            rest -= table.weight.numel()
        kinds: list[tuple[str, int]] = []
        for number, (own, some) in enumerate(zip(fixed, parts, strict=True)):
            kinds += [(f"layer {number}", own), *((f"layer {number}: {what}", size) for what, size in some)]
        self._parts = Cost(tuple(Spent(what, size) for what, size in (*kinds, ("head", rest))))
        self._spent = self._parts

    @property
    def spent(self) -> Cost:
        """What was read since this model was made: per layer its attention and each part of its block, then the head.

        `spent.activated` is the number of parameters activated per distribution given.
        """
        return self._spent

    @abstractmethod
    def _reads(self, present: Tensor) -> Sequence[Sequence[int]]:
        """Per layer how many of the `present` tokens [B, n] of the last pass went through each part of its block."""

    @contextmanager
    def _deciding(self, tokens: Tensor, positions: Tensor) -> Iterator[None]:
        """Around the pass for tokens [B, n] at positions [B, n]."""
        yield

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        lengths = torch.tensor(state.lengths)[:, None]
        positions = lengths + (torch.arange(tokens.shape[1]) if parents is None else tree.depths(parents))
        # Columns of a chain in which no row has a token are not run.
        width = int((tokens != ABSENT).sum(1).max()) if parents is None else tokens.shape[1]
        if not width:
            return super()._feed(state, tokens, parents)
        with self._deciding(tokens[:, :width], positions[:, :width]):
            said = super()._feed(state, tokens, parents)
        self._count(tokens[:, :width] != ABSENT)
        return said

    def _predict(self, tokens: Tensor) -> Next:
        with self._deciding(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape)):
            said = super()._predict(tokens)
        self._count(tokens != ABSENT)
        return said

    def _count(self, present: Tensor) -> None:
        read = int(present.sum())
        reads = [count for some in self._reads(present) for count in (read, *some)]
        told: list[dict[str, Any]] = [{"passes": 1, "read": count} for count in reads]
        told.append({"passes": 1, "read": read, "said": read})
        self._spent += Cost(
            tuple(
                Spent(part.model, part.parameters, **counts)
                for part, counts in zip(self._parts.models, told, strict=True)
            )
        )

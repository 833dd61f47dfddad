"""MultiToken: a decoder that says what it always says, and along with it holds guesses at the tokens after the next."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from nextoken.head import Head
from nextoken.model._kv import KVMemory
from nextoken.model.base import ABSENT, LanguageModel, Memory, State
from nextoken.model.multi_token_adapter import MultiTokenAdapter
from nextoken.model.next import HeadNext, Next

Expansion = Literal["quadratic", "linear"]


class AheadNext(HeadNext):
    """Next-token distributions, and after some of the tokens the states of k masks that look further ahead.

    Args:
        hidden, head: as of `HeadNext`.
        blocks: [M, k, H], states of the masks.
        which: [B, n], the block after each token, negative where there is none.
    """

    def __init__(self, hidden: Tensor, head: Head, blocks: Tensor, which: Tensor) -> None:
        super().__init__(hidden, head)
        self._blocks, self._which = blocks, which

    @property
    def is_ahead(self) -> Tensor:
        """Boolean [B, n]: after which tokens masks were read."""
        return self._which >= 0

    @property
    def ahead(self) -> Tensor:
        """z [B, n, k, H] of the masks after each token, zeros where none were read."""
        found = self._blocks[self._which.clamp(min=0).to(self._blocks.device)]
        return found * self.is_ahead.to(found)[:, :, None, None]

    def _take(self, rows: Tensor, columns: Tensor) -> AheadNext:
        at = rows.to(self._hidden.device), columns.to(self._hidden.device)
        return AheadNext(self._hidden[at], self.head, self._blocks, self._which[rows.cpu(), columns.cpu()])


class MultiToken(LanguageModel):
    """p(. | x_<=t) of the adapter's model, unchanged, and in the same pass z_1 .. z_k after some of the tokens fed.

    What `extend` returns is an `AheadNext`; of the masks nothing stays in memory. `predict` reads no masks.

    * "quadratic": masks after every node of a tree, and after each of the last k + 1 tokens of a chain (a chain of k
      guesses after the last token drawn, or the end of a prompt). Whatever was accepted, the right masks were read; a
      pass with k guesses reads (k + 1)^2 tokens.
    * "linear": masks after the last node, or the last token of a chain. A pass reads 2 k + 1 tokens; where not all
      guesses stood the masks read something else, and the next pass has nothing to verify.

    Args:
        adapter: see `MultiTokenAdapter`; it may be in training.
        masks: k, at most as many as the adapter has, which is the default. 0 is the plain model.
        expansion: where masks are read.

    Raises:
        ValueError: more masks than the adapter has, or an expansion that is none of the two.

    Source: Samragh et al., arXiv:2507.11851, section 3.
    """

    def __init__(
        self, adapter: MultiTokenAdapter, *, masks: int | None = None, expansion: Expansion = "quadratic"
    ) -> None:
        if masks is not None and not 0 <= masks <= len(adapter.masks):
            raise ValueError(f"masks must be from 0 to {len(adapter.masks)}, as many as the adapter has; got {masks}")
        if expansion not in get_args(Expansion):
            raise ValueError(f"expansion must be one of {', '.join(get_args(Expansion))}, got {expansion!r}")
        self.adapter, self.expansion = adapter, expansion
        self.masks = len(adapter.masks) if masks is None else masks
        self.model = adapter.stack.model
        self.name = f"ahead({self.model.name})"
        self.vocab, self.context_length = self.model.vocab, self.model.context_length

    @property
    def digest(self) -> str:
        """That of the model, for the distributions are its own."""
        return self.model.digest

    @property
    def dtype(self) -> str:
        return self.model.dtype

    def _remember(self, batch: int) -> Memory:
        return self.adapter.stack.memory(batch)

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        memory = state.memory
        if not isinstance(memory, KVMemory):
            raise ValueError(f"this state was started by another model than {self.name}; call start() of this one")
        counts = (tokens != ABSENT).sum(1)
        nodes = self._nodes(tokens, counts, parents)
        hidden, ahead = self.adapter.read(memory, tokens, parents, nodes, masks=self.masks)
        if parents is None:
            memory.advance(counts.tolist())
        which = torch.full((tokens.shape[0], tokens.shape[1] + 1), ABSENT)
        # Blocks after nothing are noted in a column of their own, which is cut off.
        places = torch.where(nodes < 0, tokens.shape[1], nodes)
        which.scatter_(1, places, torch.arange(nodes.numel()).reshape(nodes.shape))
        head = self.adapter.stack.head
        device = head.weight.device
        return AheadNext(hidden.to(device), head, ahead.flatten(0, 1).to(device), which[:, :-1])

    def _nodes(self, tokens: Tensor, counts: Tensor, parents: Tensor | None) -> Tensor:
        """[B, m], the nodes after which masks are read; negative for none."""
        n, present = tokens.shape[1], tokens != ABSENT
        if parents is not None and self.expansion == "quadratic":
            return torch.where(present, torch.arange(n), ABSENT)
        if parents is not None:
            return torch.where(present, torch.arange(n), ABSENT).amax(1, keepdim=True)
        size = min(n, self.masks + 1) if self.expansion == "quadratic" else 1
        return (counts[:, None] - size + torch.arange(size)).clamp(min=ABSENT)

    def _predict(self, tokens: Tensor) -> Next:
        return self.model.predict(tokens)

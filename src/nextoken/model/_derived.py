"""Derived: a transformers model whose forward passes are run by another network over the same weights."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from nextoken.model._network import Network
from nextoken.model.base import LanguageModel, Memory, State
from nextoken.model.hf import HFModel
from nextoken.model.next import Next


class Owned(Memory):
    """The state of the model within, and whose it is: what one model remembers is worth nothing to another."""

    def __init__(self, owner: Derived, state: State) -> None:
        self.owner, self.state = owner, state

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        self.state.keep(nodes)

    def rewind(self, lengths: Sequence[int]) -> None:
        self.state.rewind([have - want for have, want in zip(self.state.lengths, lengths, strict=True)])

    def fork(self, rows: Sequence[int]) -> Owned:
        return Owned(self.owner, self.state.fork(rows))

    def join(self, others: Sequence[Memory]) -> Owned:
        return Owned(self.owner, self.state.join(*(self.owner.own(other) for other in others)))


class Derived(LanguageModel):
    """An `HFModel`, or one derived already, over `network`; caches, trees and vocabulary are as before.

    Models derived from one network share its weights; passes of any of them must not overlap in time.
    """

    def __init__(self, model: HFModel | Derived, network: Network, *, name: str) -> None:
        self.model, self.name = model, name
        self._inner = transformers_model(model).over(network)
        self.vocab, self.context_length = model.vocab, model.context_length
        self.supports_trees = model.supports_trees

    @property
    def inner(self) -> HFModel:
        """The model that does the work."""
        return self._inner

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def digest(self) -> str:
        within = self.model.digest
        if not within:
            return ""
        return hashlib.sha256(repr((type(self).__name__, within, self._settings())).encode()).hexdigest()[:16]

    @abstractmethod
    def _settings(self) -> object:
        """What else the distribution depends on, for the digest."""

    def own(self, memory: Memory) -> State:
        """The state within, if it is this model's.

        Raises:
            ValueError: another model started it.
        """
        if not isinstance(memory, Owned) or memory.owner is not self:
            raise ValueError(f"this state was started by another model than {self.name}; call start() of this one")
        return memory.state

    def _remember(self, batch: int) -> Memory:
        return Owned(self, self._inner.start(batch))

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        return self._inner.extend(self.own(state.memory), tokens, parents)

    def _predict(self, tokens: Tensor) -> Next:
        return self._inner.predict(tokens)


def transformers_model(model: HFModel | Derived) -> HFModel:
    """The `HFModel` that runs a model's passes."""
    if isinstance(model, Derived):
        return model.inner
    if isinstance(model, HFModel):
        return model
    raise ValueError(f"a transformers model is needed, to look inside; {model.name} is a {type(model).__name__}")

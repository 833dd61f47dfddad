"""Thinking: the contract of what is fed, in place of tokens, while a model thinks.

A policy makes of the logits of each row a mixture of tokens, perhaps with noise. It sees no other row, and what is
random in it comes from the row's own numbers, so a row is the same whatever stands beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.request import Request, Running
from nextoken.decode.transform import Chain, Transform
from nextoken.model.soft import Mixtures, SoftModel


@dataclass(frozen=True)
class ColdStop:
    """Thinking ends at the `length`-th step in a row whose entropy is below `entropy` nats.

    Source: Soft Thinking, arXiv:2505.15778.
    """

    entropy: float = 0.01
    length: int = 256

    def __post_init__(self) -> None:
        if not self.entropy > 0 or self.length < 1:
            raise ValueError(f"cold stop needs entropy > 0 and length >= 1, got {self.entropy} and {self.length}")


class Thinker(Running):
    """A row that thinks: a request at work, and normal and gamma numbers of its own."""

    def __init__(self, ticket: int, request: Request) -> None:
        super().__init__(ticket, request)
        self.generator = torch.Generator().manual_seed(request.seed % 2**63)
        self.low = 0
        """Steps of low entropy in a row."""


@dataclass(frozen=True, eq=False)
class Step:
    """What a policy made of the logits [R, V].

    Args:
        mixtures: to be fed, [R, 1, K].
        tokens: [R], noted for them.
        entropies: [R] in nats, of the distribution that was mixed, before any truncation.
        log_probs: [R], log of the probability or density with which the policy draws what it drew; 0 where it draws
            nothing, None where it draws and has no density here.
    """

    mixtures: Mixtures
    tokens: Tensor
    entropies: Tensor
    log_probs: Tensor | None


class Thinking(ABC):
    """What is fed at a step of thought."""

    cold_stop: ColdStop | None
    """When to end for being sure; None for never."""

    @property
    @abstractmethod
    def is_random(self) -> bool:
        """Whether two thoughts on one prompt may differ."""

    @property
    def transform(self) -> Transform:
        """The change of the distributions that are mixed, for policies that take one."""
        return Chain()

    @abstractmethod
    def step(self, logits: Tensor, rows: Sequence[Thinker], model: SoftModel, scale: float) -> Step:
        """One step for rows with these logits [R, V]; `scale` is `model.embedding_scale()`."""

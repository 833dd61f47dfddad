"""Transform: a change made to next-token distributions on purpose.

    Temperature(0.8) | TopP(0.95)          # composed in the order written
    transform("temperature(0.8) | top_p(0.95)")   # the same, from text (module `parsing`)

A transform maps scores [B, V] to scores [B, V]. Scores are log-probabilities up to a constant per row (raw logits at
the head of a chain); -inf removes a token. Who needs probabilities normalises for itself, so that a chain never pays
for it twice and equals the processors of transformers number for number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextoken.model.vocab import Vocab

REMOVED = float("-inf")


@dataclass(frozen=True)
class Context:
    """What a transform may know beside the scores; one entry per row.

    Everything that happens while decoding is a function of the tokens and of their surprisals, so transforms keep no
    state of their own: the same row gives the same result whatever batch or draft tree it is in.
    """

    prompts: Sequence[Sequence[int]] = ()
    outputs: Sequence[Sequence[int]] = ()
    surprisals: Sequence[Sequence[float]] = ()
    """-log p in nats of each output token under the distribution it was drawn from."""
    uniform: Tensor | None = None
    """A number in [0, 1) per row [B] for transforms that flip a coin."""
    seeds: Sequence[int] = ()
    """The seed of each row's request, for what is drawn once per text; empty where rows have none (searches)."""
    vocab: Vocab | None = None

    def history(self, row: int) -> list[int]:
        """Prompt and output tokens of a row."""
        return [*self.prompts[row], *self.outputs[row]]


class Transform(ABC):
    """A change of next-token distributions; `a | b` does a, then b."""

    @abstractmethod
    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        """Scores [B, V] after the change; the input is left as it is."""

    @property
    def steps(self) -> tuple[Transform, ...]:
        """The single transforms of which this is made."""
        return (self,)

    @property
    def is_random(self) -> bool:
        """Whether it needs `context.uniform`."""
        return False

    def __or__(self, other: Transform) -> Chain:
        return Chain((*self.steps, *other.steps))


@dataclass(frozen=True)
class Chain(Transform):
    """Transforms one after the other; the empty chain changes nothing."""

    parts: tuple[Transform, ...] = field(default=())

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        for part in self.parts:
            scores = part(scores, context)
        return scores

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.parts)

    @property
    def steps(self) -> tuple[Transform, ...]:
        return self.parts

    @property
    def is_random(self) -> bool:
        return any(part.is_random for part in self.parts)


class EmptyDistribution(ValueError):
    """A transform removed every token of a row."""


def normalise(scores: Tensor) -> Tensor:
    """log p [B, V] in float32 or wider from scores.

    Raises:
        EmptyDistribution: a row has no token left, or a score is NaN.
    """
    wide = check_possible(scores).to(torch.promote_types(scores.dtype, torch.float32))
    return torch.log_softmax(wide, -1)


def check_possible(scores: Tensor) -> Tensor:
    """The scores, if every row has a token left.

    Raises:
        EmptyDistribution: a row has none, or a score is NaN.
    """
    highest = scores.amax(-1)
    if not bool(torch.isfinite(highest).all()):
        row = int((~torch.isfinite(highest)).nonzero()[0])
        raise EmptyDistribution(
            f"no token is left in row {row}: the transforms removed them all; loosen them or change their order"
        )
    return scores


def keep_at_least_one(scores: Tensor, removed: Tensor) -> Tensor:
    """`scores` with the `removed` tokens at -inf, except that the most probable ones always stay."""
    removed = removed & (scores < scores.amax(-1, keepdim=True))
    return scores.masked_fill(removed, REMOVED)

"""TokenRouter: how much a token that the small model would write needs the large one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.next import Next

_ENTRIES = 1 << 22
"""Logits held at once."""


@dataclass(frozen=True, eq=False)
class Sight:
    """What there is to see before a token is chosen, at any places of one shape.

    Args:
        hidden: the small model's final hidden states [..., H], None where it has none.
        logits: its raw logits [..., V].
    """

    hidden: Tensor | None
    logits: Tensor


def sights(said: Next) -> Iterator[Sight]:
    """`said` [B, n] from left to right, some positions at a time, so that [B, n, V] never exists."""
    batch, n = said.shape
    step = max(1, _ENTRIES // (batch * said.vocab_size))
    for begin in range(0, n, step):
        block = said[:, begin : begin + step]
        yield Sight(block.hidden, block.logits())


class TokenRouter(ABC):
    """score(y | s) of a token y that the small model would write after s, the higher the more it needs the large model.

    It sees the small model alone: whether to ask the large one must be settled before that has read anything.
    """

    threshold: float
    """The score from which on tokens are routed where nothing else is asked for."""
    parameters: int = 0
    """Weights that take part in a score."""
    digest: str = ""
    """Equal digests give equal scores of the same tokens."""

    @abstractmethod
    def scores(self, small: LanguageModel, sight: Sight, tokens: Tensor) -> Tensor:
        """[..., m] of candidates `tokens` [..., m] at every place of `sight`."""

    def check(self, small: LanguageModel, large: LanguageModel) -> None:  # noqa: B027
        """Refuse models that it was not made for; one that was made for none serves all.

        Raises:
            ModelError: it was made for others.
        """


@method(
    name="Entropy routing",
    access="gray",
    summary="a token is left to the large model where the small one is unsure: what a learned router must beat",
)
class EntropyRouter(TokenRouter):
    """score(y | s) = H(p_small(. | s)) in nats over the whole vocabulary, whatever y is.

    The untrained baseline of token routing. `EntropySwitching` instead goes by the entropies of the answers before,
    for which the small model need not read every token.

    Args:
        threshold: in nats; 0.45 is that of the released code of R2R (arXiv:2505.21600).
    """

    digest = "entropy"

    def __init__(self, threshold: float = 0.45) -> None:
        self.threshold = threshold

    def scores(self, small: LanguageModel, sight: Sight, tokens: Tensor) -> Tensor:
        wide = sight.logits.to(torch.promote_types(sight.logits.dtype, torch.float32))
        entropy: Tensor = torch.special.entr(wide.softmax(-1)).sum(-1, keepdim=True)
        return entropy.expand(tokens.shape)

"""InverseTransformWatermark: a key sequence of numbers that invert the cumulative distribution in a secret order."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextoken.methods import method
from nextoken.model.next import invert_cdf
from nextoken.watermark.alignment import Costs
from nextoken.watermark.key import Key
from nextoken.watermark.key_sequence import KeySequenceWatermark


@method(
    name="Key-sequence watermark, inverse transform",
    arxiv="2307.15593",
    access="gray",
    summary="tokens drawn by inverting the distribution in a secret order; the law stays, edits are forgiven",
)
class InverseTransformWatermark(KeySequenceWatermark):
    """xi_j = u_j in (0, 1) and one order pi of the vocabulary; y = first token in that order at which the cumulative of
    p reaches u_j. c(y, xi_j) = |eta(y) - u_j|, eta(y) = place of y in the order / (V - 1).

    The key is n numbers and an order, where `ExponentialWatermark` has n V numbers; it takes more tokens to be found.

    Args:
        vocab_size: V, the length of the model's distributions, `model.vocab.size`; the order depends on it.
        key, length, block, resamples, seed: see `KeySequenceWatermark`.
        gamma: 0.4 as in the paper's experiments, infinity for alignment without edits.

    Raises:
        ValueError: vocab_size is below 2, or another number is out of range.

    Source: Kuditipudi et al., arXiv:2307.15593; eta as in the paper, where the official code divides by
    V.
    """

    purpose = "inverse transform"

    def __init__(
        self,
        key: Key,
        *,
        vocab_size: int,
        length: int = 256,
        gamma: float = 0.4,
        block: int | None = None,
        resamples: int = 199,
        seed: int = 0,
    ) -> None:
        if vocab_size < 2:
            raise ValueError(f"a vocabulary has at least 2 tokens, got vocab_size={vocab_size}")
        super().__init__(key, length=length, gamma=gamma, block=block, resamples=resamples, seed=seed)
        self.vocab_size = vocab_size

    @property
    def settings(self) -> str:
        return f"vocab_size={self.vocab_size}, {super().settings}"

    @cached_property
    def _uniform(self) -> NDArray[np.float64]:
        """u [n]."""
        return self._key.uniform("numbers", size=self.length)

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """pi: the token at each place of the order [V]."""
        return np.argsort(self._key.uniform("order", size=self.vocab_size), kind="stable")

    @cached_property
    def _places(self) -> NDArray[np.float64]:
        """eta of each token [V]."""
        return np.argsort(self._order) / (self.vocab_size - 1)

    def choose(self, scores: Tensor, place: int) -> int:
        if scores.shape[-1] != self.vocab_size:
            raise ValueError(
                f"the watermark is for a vocabulary of {self.vocab_size}, the model's distributions have "
                f"{scores.shape[-1]}: make it with vocab_size=model.vocab.size"
            )
        ordered = torch.log_softmax(scores.double(), -1)[torch.from_numpy(self._order).to(scores.device)]
        at = int(invert_cdf(ordered, torch.tensor(self._uniform[place], dtype=torch.float64)))
        return int(self._order[at])

    def costs(self, tokens: NDArray[np.int64]) -> Costs:
        self._check(tokens)
        return np.abs(self._places[tokens][:, None] - self._uniform)

    def _fresh_costs(self, tokens: NDArray[np.int64], count: int, rng: np.random.Generator) -> Costs:
        self._check(tokens)
        # The places of U tokens in a random order of V are U different ones of V.
        places = np.stack([rng.choice(self.vocab_size, len(tokens), replace=False) for _ in range(count)])
        return np.abs(places[:, :, None] / (self.vocab_size - 1) - rng.random((count, 1, self.length)))

    def _check(self, tokens: NDArray[np.int64]) -> None:
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise ValueError(
                f"token ids of a vocabulary of {self.vocab_size} go from 0 to {self.vocab_size - 1}, got "
                f"{tokens.min()} to {tokens.max()}: tokenise the text as the model does"
            )

"""ExponentialWatermark: a key sequence whose every place holds a number per token, and the token that arrives first."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextoken.methods import method
from nextoken.watermark.alignment import Costs
from nextoken.watermark.key import Key
from nextoken.watermark.key_sequence import KeySequenceWatermark


@method(
    name="Key-sequence watermark, exponential minimum",
    arxiv="2307.15593",
    access="gray",
    summary="tokens drawn by a secret sequence; the law stays, and alignment finds it after edits",
)
class ExponentialWatermark(KeySequenceWatermark):
    """xi_j in (0, 1)^V; y = argmin_v -log xi_j[v] / p[v], and c(y, xi_j) = log(1 - xi_j[y]), at most 0.

    Without the key -c is exponential with mean 1. With it, the mean is H_{1/p} = digamma(1/p + 1) + 0.5772 where p is
    the probability of y: 1 where the model is sure, which leaves nothing to find, and 2 at p = 0.38. It takes fewer
    tokens than `InverseTransformWatermark`.

        mark = ExponentialWatermark(Key.new())
        text = nextoken.generate(model, prompt, transform=Temperature(1.0) | mark.transform())
        mark.detect(text.tokens).p_value

    Args:
        key, length, block, resamples, seed: see `KeySequenceWatermark`.
        gamma: 0 as in the paper's experiments, infinity for alignment without edits.

    Source: Kuditipudi et al., arXiv:2307.15593.
    """

    purpose = "exponential"

    def __init__(
        self,
        key: Key,
        *,
        length: int = 256,
        gamma: float = 0.0,
        block: int | None = None,
        resamples: int = 199,
        seed: int = 0,
    ) -> None:
        super().__init__(key, length=length, gamma=gamma, block=block, resamples=resamples, seed=seed)

    def choose(self, scores: Tensor, place: int) -> int:
        # argmin -log xi / p is argmax log p - log(-log xi): no power that underflows, and p = 0 stays at -inf.
        gumbel = -np.log(-np.log(self._numbers(place, scores.shape[-1])))
        return int((scores.double() + torch.from_numpy(gumbel).to(scores.device)).argmax())

    def costs(self, tokens: NDArray[np.int64]) -> Costs:
        if len(tokens) and tokens.min() < 0:
            raise ValueError(f"a token id is at least 0, got {tokens.min()}")
        size = int(tokens.max()) + 1
        return np.stack([np.log1p(-self._numbers(place, size)[tokens]) for place in range(self.length)], axis=-1)

    def _fresh_costs(self, tokens: NDArray[np.int64], count: int, rng: np.random.Generator) -> Costs:
        return -rng.standard_exponential((count, len(tokens), self.length))

    def _numbers(self, place: int, size: int) -> NDArray[np.float64]:
        """xi_j of the first `size` tokens."""
        return self._key.uniform("place", place, size=size)

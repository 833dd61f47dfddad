"""Ensembles: several models, one distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.combined import Branch, Combined


@method(name="Ensemble", access="gray", summary="the mean or the product of several models' distributions")
class Ensemble(Combined):
    """`mean`: p = sum_i w_i p_i. `product`: p proportional to prod_i p_i^w_i.

    Args:
        models: over one vocabulary.
        weights: w, at least 0, made to sum to 1; equal by default.
        rule: which of the two.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        *,
        weights: Sequence[float] | None = None,
        rule: Literal["mean", "product"] = "mean",
    ) -> None:
        super().__init__(
            [Branch(model) for model in models], name=f"{rule}({', '.join(model.name for model in models)})"
        )
        if rule not in ("mean", "product"):
            raise ValueError(f"rule must be 'mean' or 'product', got {rule!r}")
        self.weights, self.rule = normalised_weights(weights, len(models)), rule

    def combine(self, log_probs: Sequence[Tensor]) -> Tensor:
        used = [(w, said) for w, said in zip(self.weights, log_probs, strict=True) if w > 0]
        if self.rule == "product":
            return torch.stack([w * said for w, said in used]).sum(0)
        return torch.logsumexp(torch.stack([math.log(w) + said for w, said in used]), 0)

    def _settings(self) -> object:
        return self.rule, self.weights


def normalised_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Weights of `count` models made to sum to 1, equal where none are given.

    Raises:
        ValueError: they are not that many, one is below 0 or not finite, or all are 0.
    """
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count or any(w < 0 or not math.isfinite(w) for w in given) or sum(given) == 0:
        raise ValueError(f"weights must be {count} numbers of at least 0, not all 0; got {given}")
    return tuple(w / sum(given) for w in given)

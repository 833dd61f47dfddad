"""What is known of next-token distributions without keeping them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Statistics of p = softmax(z), z [..., V], for a batch [...] of distributions; natural logs, float32.

    Every tensor has the batch's shape [...], but for the top-k, which is [..., k]. Rows that are no distribution (a NaN
    or +inf logit, or nothing but -inf) are NaN throughout, with rank -1.

    Args:
        logprob: log p_y of the target y in nats; None without targets, NaN where the target is -1.
        rank: number of tokens strictly more probable than y (int64, 0 = top, ties do not count); -1 without y.
        mass_above: their probability.
        entropy: H = -sum p log p, nats.
        varentropy: sum p (log p + H)^2, nats^2.
        skewness: third standardised moment of -log p under p. 0 where log p does not vary (see `kurtosis`).
        kurtosis: fourth standardised moment (Pearson: 3 for a normal). 0, which no distribution has, marks rows whose
            standard deviation of log p is at most 4 eps (1 + |max z|): uniform ones and point masses up to rounding.
        collision: sum p^2, the probability that two draws agree.
        mean_logprob: unweighted mean of log p over the tokens with p > 0 (finite logit).
        std_logprob: the population standard deviation over the same tokens.
        top1_prob: p of the most probable token.
        margin: p of the most probable minus p of the second; p itself if V = 1.
        log_normalizer: log sum exp z.
        half_sum, quarter_sum, cube_sum, fourth_sum: sum of p^(1/2), p^(1/4), p^3, p^4 over the vocabulary.
        top_ids: the k most probable tokens, most probable first, equal ones by lower id; None if k = 0.
        top_logprobs: their log p; None if k = 0.
        rest_mass: 1 - sum of p over the top k, accurate however small it is.
    """

    logprob: Tensor | None
    rank: Tensor | None
    mass_above: Tensor | None
    entropy: Tensor
    varentropy: Tensor
    skewness: Tensor
    kurtosis: Tensor
    collision: Tensor
    mean_logprob: Tensor
    std_logprob: Tensor
    top1_prob: Tensor
    margin: Tensor
    log_normalizer: Tensor
    half_sum: Tensor
    quarter_sum: Tensor
    cube_sum: Tensor
    fourth_sum: Tensor
    top_ids: Tensor | None
    top_logprobs: Tensor | None
    rest_mass: Tensor

    @property
    def shape(self) -> torch.Size:
        """The batch's shape [...]."""
        return self.entropy.shape

    def as_dict(self) -> dict[str, Tensor]:
        """Name -> tensor, without the fields that are None."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if value is not None}

    def __getitem__(self, index: Any) -> Statistics:
        """Narrow the batch: any index that the batch's dimensions take; the dimension of the top-k stays whole."""
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis not in index:
            index = (*index, Ellipsis)
        wide = (*index, slice(None))
        return self._map({name: wide if name.startswith("top_") else index for name in self.as_dict()})

    def reshape(self, *shape: int) -> Statistics:
        """The same rows with the batch's shape changed, the top-k's last dimension kept."""
        return self._with(
            {
                name: value.reshape((*shape, value.shape[-1]) if name.startswith("top_") else shape)
                for name, value in self._names()
            }
        )

    def to(self, device: torch.device | str) -> Statistics:
        """A copy on the device."""
        return self._with({name: value.to(device) for name, value in self._names()})

    @classmethod
    def concat(cls, parts: Sequence[Statistics]) -> Statistics:
        """Join along the first dimension.

        Raises:
            ValueError: no parts, or parts that do not all have targets, or not all the same k.
        """
        if not parts:
            raise ValueError("concat needs at least one Statistics")
        columns = [part.as_dict() for part in parts]
        widths = {None if part.top_ids is None else part.top_ids.shape[-1] for part in parts}
        if any(column.keys() != columns[0].keys() for column in columns) or len(widths) > 1:
            raise ValueError("concat needs parts that all have targets, or none, and the same top-k")
        return parts[0]._with({name: torch.cat([column[name] for column in columns]) for name in columns[0]})

    def _names(self) -> list[tuple[str, Tensor]]:
        return list(self.as_dict().items())

    def _map(self, index: dict[str, Any]) -> Statistics:
        return self._with({name: value[index[name]] for name, value in self._names()})

    def _with(self, columns: dict[str, Tensor]) -> Statistics:
        return Statistics(**{field.name: columns.get(field.name) for field in fields(self)})  # type: ignore[arg-type]

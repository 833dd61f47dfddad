"""PartialNext: distributions of which only the most probable tokens are known, and what follows from them exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NoReturn

import torch
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.head import Statistics
from nextoken.model.next import Generators, Next


@dataclass(frozen=True)
class PartialStatistics(Statistics):
    """Statistics of distributions of which only some probabilities are known.

    Of the fields of `Statistics`, `logprob`, `rank`, `mass_above`, `top1_prob`, `margin`, `top_ids`, `top_logprobs` and
    `rest_mass` hold what is known exactly, NaN (-1 for rank and ids) elsewhere; all others are NaN. A target of rank -1
    is less probable than every listed token: at least k tokens rank above it, with at least their mass. Lists
    shorter than asked for end in -1 and NaN.

    Args:
        entropy_lower, entropy_upper: sharp bounds of the entropy in nats, see `PartialNext.entropy_bounds`.
    """

    entropy_lower: Tensor
    entropy_upper: Tensor

    def _with(self, columns: dict[str, Tensor]) -> PartialStatistics:
        return PartialStatistics(**{field.name: columns.get(field.name) for field in fields(self)})  # type: ignore[arg-type]


class PartialNext(Next):
    """Distributions p [B, n, V] of which the k most probable tokens are known, and maybe the one that came.

    Nothing is made up for the rest: what needs the whole distribution raises `ModelError` or is NaN.

    Args:
        top_ids: [B, n, k] the listed tokens, in any order; -1 for a token whose id is not known, or no token.
        top_logprobs: [B, n, k] their log p in nats; NaN for no token.
        vocab_size: V, the number of ids.
        other_ids: [B, n, m] tokens beside the list whose log p is known too, such as the one that came; -1 for none.
            One that is in the list as well is ignored here.
        other_logprobs: [B, n, m] their log p; NaN for none.
        is_complete: [B, n] whether every token outside the list is at most as probable as the least of it. Without,
            ranks, top1_prob and margin are unknown and the lower bound of the entropy is weaker. Default: all.
        choices: number of tokens that may have probability; V by default, None where the server does not tell (then
            there is no upper bound of the entropy: inf).
    """

    is_partial = True

    def __init__(
        self,
        top_ids: Tensor,
        top_logprobs: Tensor,
        *,
        vocab_size: int,
        other_ids: Tensor | None = None,
        other_logprobs: Tensor | None = None,
        is_complete: Tensor | None = None,
        choices: int | None = -1,
    ) -> None:
        if top_ids.ndim != 3 or top_ids.shape != top_logprobs.shape:
            raise ValueError(f"ids and logprobs must be [B, n, k], got {top_ids.shape} and {top_logprobs.shape}")
        batch, n, _ = top_ids.shape
        self.shape = (batch, n)
        self.vocab_size = vocab_size
        self.choices = vocab_size if choices == -1 else choices
        # Most probable first, equal ones by lower id, empty places last.
        by_id = torch.argsort(top_ids, dim=-1)
        values = top_logprobs.double().gather(-1, by_id)
        order = torch.argsort(_lowest(values), dim=-1, descending=True, stable=True)
        order = order.gather(-1, torch.argsort(values.isnan().gather(-1, order).int(), dim=-1, stable=True))
        self._logprobs = values.gather(-1, order)
        self._ids = top_ids.long().gather(-1, by_id).gather(-1, order)
        none = torch.full((batch, n, 0), -1)
        others = none if other_ids is None else other_ids.long()
        other_values = none.double() if other_logprobs is None else other_logprobs.double()
        repeated = ((others[..., :, None] == self._ids[..., None, :]) & (others >= 0)[..., None]).any(-1)
        self._other_ids = torch.where(repeated | other_values.isnan(), -1, others)
        self._other_logprobs = torch.where(repeated | (others < 0), torch.nan, other_values)
        self._is_complete = torch.ones(batch, n, dtype=torch.bool) if is_complete is None else is_complete

    def log_probs(self) -> NoReturn:
        """Not to be had.

        Raises:
            ModelError: always.
        """
        raise whole_unknown(self._ids.shape[-1], self.vocab_size)

    def sample(self, generator: Generators | None = None) -> NoReturn:
        """Not to be had: drawing among the known tokens only would be drawing from another distribution.

        Raises:
            ModelError: always.
        """
        raise draw_impossible(self._ids.shape[-1])

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> PartialStatistics:
        """What follows from the known probabilities, each of shape [B, n]; see `PartialStatistics`."""
        if top < 0:
            raise ValueError(f"top must be 0 or more, got {top}")
        p = self._logprobs.exp().nan_to_num(nan=0.0)
        nothing = torch.full(self.shape, torch.nan)
        listed = (~self._logprobs.isnan()).sum(-1)
        wanted = min(top, self.vocab_size)
        padding = max(0, wanted - p.shape[-1])
        ids = torch.nn.functional.pad(self._ids, (0, padding), value=-1)[..., :wanted]
        logprobs = torch.nn.functional.pad(self._logprobs, (0, padding), value=torch.nan)[..., :wanted]
        first, second = (p[..., i] if p.shape[-1] > i else torch.zeros(self.shape) for i in range(2))
        top1 = torch.where(self._is_complete & (listed > 0), first, torch.nan)
        # With a single token in the vocabulary the margin is its probability.
        has_second = (listed > 1) | ((listed == 1) & (self.choices == 1))
        margin = torch.where(self._is_complete & has_second, first - second, torch.nan)
        lower, upper = self.entropy_bounds()
        logprob, rank, above = (None, None, None) if targets is None else self._about(targets)
        unknown = dict.fromkeys(
            (
                *("entropy", "varentropy", "skewness", "kurtosis", "collision", "mean_logprob", "std_logprob"),
                *("log_normalizer", "half_sum", "quarter_sum", "cube_sum", "fourth_sum"),
            ),
            nothing,
        )
        return PartialStatistics(
            logprob=logprob,
            rank=rank,
            mass_above=above,
            top1_prob=top1.float(),
            margin=margin.float(),
            top_ids=ids if top else None,
            top_logprobs=logprobs.float() if top else None,
            rest_mass=(1 - p[..., :wanted].sum(-1)).clamp(min=0).float(),
            entropy_lower=lower.float(),
            entropy_upper=upper.float(),
            **unknown,
        )

    def entropy_bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest entropy [B, n], nats, of any distribution with the known probabilities.

        With known probabilities K (list and others), rest r = 1 - sum K over u = V - |K| tokens, none above the least
        listed probability c, and h(x) = -x log x:

            lower = sum_K h + floor(r / c) h(c) + h(r - c floor(r / c))     the rest packed into as few as c allows
            upper = sum_K h + r log(u / r)                                  the rest spread evenly over the u tokens

        Both are attained (entropy is Schur-concave: packing is the greatest rest in the majorisation order among those
        capped at c, spreading the least). Where the list may lack a more probable token, c is the rest itself. Float
        rounding of the server's numbers moves the bounds by as much.
        """
        known = torch.cat([self._logprobs, self._other_logprobs], -1)
        p = known.exp().nan_to_num(nan=0.0)
        base = _h(p).sum(-1)
        rest = (1 - p.sum(-1)).clamp(min=0)
        listed = ~self._logprobs.isnan()
        least = torch.where(listed, self._logprobs.exp(), torch.inf).amin(-1) if listed.shape[-1] else rest
        cap = torch.where(self._is_complete & listed.any(-1), torch.minimum(least, rest), rest)
        full = torch.where(cap > 0, (rest / cap.clamp(min=1e-300)).floor(), 0.0)
        lower = base + full * _h(cap) + _h((rest - full * cap).clamp(min=0))
        if self.choices is None:
            return lower, torch.where(rest > 0, torch.inf, base)
        unknown = (self.choices - (~known.isnan()).sum(-1)).clamp(min=0)
        spread = torch.where((rest > 0) & (unknown > 0), rest * (unknown / rest.clamp(min=1e-300)).log(), 0.0)
        upper = base + spread
        return torch.minimum(lower, upper), upper

    def _about(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logprob, rank and mass above of `targets` [B, n]."""
        if tuple(targets.shape) != self.shape:
            raise ValueError(f"targets must have shape {self.shape}, got {tuple(targets.shape)}")
        if bool(((targets < -1) | (targets >= self.vocab_size)).any()):
            raise ValueError(f"targets must lie in [0, {self.vocab_size}), or be -1 for none")
        ids = torch.cat([self._ids, self._other_ids], -1)
        values = torch.cat([self._logprobs, self._other_logprobs], -1)
        match = (ids == targets[..., None].to(ids.device)) & (ids >= 0)
        logprob = torch.where(match, values, -math.inf).amax(-1) if ids.shape[-1] else torch.full(self.shape, torch.nan)
        logprob = torch.where(match.any(-1), logprob, torch.nan)
        listed = _lowest(self._logprobs)
        higher = listed > logprob[..., None]
        # Whatever is more probable than a token at least as probable as the least of the list is in the list.
        least = torch.where(self._logprobs.isnan(), torch.inf, self._logprobs)
        within = self._is_complete & (logprob[..., None] >= least).any(-1)
        rank = torch.where(within, higher.sum(-1), -1)
        above = torch.where(within, (listed.exp() * higher).sum(-1), torch.nan)
        return logprob.float(), rank, above.float()

    def _take(self, rows: Tensor, columns: Tensor) -> PartialNext:
        return PartialNext(
            self._ids[rows, columns],
            self._logprobs[rows, columns],
            vocab_size=self.vocab_size,
            other_ids=self._other_ids[rows, columns],
            other_logprobs=self._other_logprobs[rows, columns],
            is_complete=self._is_complete[rows, columns],
            choices=self.choices,
        )


def whole_unknown(known: int, vocab_size: int) -> ModelError:
    """The error of asking for all probabilities."""
    return ModelError(
        f"only the {known} most probable of {vocab_size} tokens are known, not the whole distribution: "
        "use statistics(), or load the model itself instead of asking a server"
    )


def draw_impossible(known: int) -> ModelError:
    """The error of drawing a token."""
    return ModelError(
        f"cannot draw from a distribution of which only the {known} most probable tokens are known without "
        "changing it: let the server generate, or load the model itself"
    )


def _lowest(logprobs: Tensor) -> Tensor:
    """NaN as -inf; `nan_to_num` would raise the -inf of impossible tokens to a finite number."""
    return torch.where(logprobs.isnan(), -math.inf, logprobs)


def _h(p: Tensor) -> Tensor:
    """-p log p, 0 at 0."""
    product: Tensor = torch.special.xlogy(p, p)
    return -product

"""ExpertUsage: how many experts the tokens of a text took, which, and how that goes with what is hard to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from nextoken.model._descent import batch_of, check_rows
from nextoken.route.experts import DynaMoE

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
_BATCH = 16


@dataclass(frozen=True, eq=False)
class ExpertUsage:
    """What N tokens took in L layers.

    Args:
        counts: |A_l| of every token [N, L].
        uses: per layer, how many of the tokens took each of its experts [E_l].
        entropies: of the distributions after the tokens [N], nats.
        losses: -log p of the tokens that followed [N], nats.
    """

    counts: Ints
    uses: tuple[Ints, ...]
    entropies: Floats
    losses: Floats

    @property
    def mean(self) -> Floats:
        """Mean of |A_l| [L]."""
        return np.asarray(self.counts.mean(0), dtype=np.float64)

    @property
    def variance(self) -> Floats:
        """Variance of |A_l| over tokens [L]; 0 throughout is top-K in other words."""
        return np.asarray(self.counts.var(0), dtype=np.float64)

    @property
    def histograms(self) -> tuple[Ints, ...]:
        """Per layer, how many tokens took 0, 1, ..., E_l experts."""
        return tuple(
            np.bincount(taken, minlength=len(used) + 1) for taken, used in zip(self.counts.T, self.uses, strict=True)
        )

    @property
    def utilisation(self) -> tuple[Floats, ...]:
        """Per layer, the share of the tokens that took each expert [E_l]; one near 0 is idle."""
        return tuple(used / len(self.counts) for used in self.uses)

    @property
    def with_entropy(self) -> float:
        """Spearman's correlation of sum_l |A_l| and the entropy of what follows; NaN where all take the same number."""
        return rank_correlation(self.counts.sum(1), self.entropies)

    @property
    def with_loss(self) -> float:
        """The same with -log p of the token that followed."""
        return rank_correlation(self.counts.sum(1), self.losses)


@torch.no_grad()
def expert_usage(model: DynaMoE, rows: Sequence[Sequence[int]]) -> ExpertUsage:
    """Read rows and tell what their tokens took, all but each row's last, which nothing follows.

    Raises:
        ValueError: there are no rows, or one does not fit.
    """
    check_rows(model, rows)
    counts, entropies, losses = list[Any](), list[Any](), list[Any]()
    uses = [np.zeros(len(block.experts), dtype=np.int64) for block in model.blocks]
    for begin in range(0, len(rows), _BATCH):
        ids, targets = batch_of(rows[begin : begin + _BATCH])
        told = targets >= 0
        said = model.predict(ids.masked_fill(~told, -1))[told].statistics(targets[told][:, None])
        assert said.logprob is not None
        entropies.append(said.entropy[:, 0].double().cpu().numpy())
        losses.append(-said.logprob[:, 0].double().cpu().numpy())
        taken = []
        for block, used in zip(model.blocks, uses, strict=True):
            assert block.last is not None
            active = block.last.active.cpu()[told]
            taken.append(active.sum(1).numpy())
            used += active.sum(0).numpy()
        counts.append(np.stack(taken, 1))
    return ExpertUsage(np.concatenate(counts), tuple(uses), np.concatenate(entropies), np.concatenate(losses))


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's, equal values sharing their mean rank; NaN where one has no two different values."""
    ranks = [rankdata(values) for values in (a, b)]
    if min(rank.std() for rank in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])

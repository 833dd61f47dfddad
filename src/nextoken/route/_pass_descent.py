"""Training on rows of tokens that come with a number of passes for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nextoken.model._descent import TextRecipe, check_rows, seed_of, walk
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.sarsa import FitStep

NONE = -100


def descend_with_passes(
    learnt: Sequence[nn.Parameter],
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Sequence[Sequence[int]],
    passes: Sequence[Sequence[int]],
    *,
    given: Sequence[int] | int,
    recipe: TextRecipe,
    seed: int,
    on_step: Callable[[FitStep], object] | None,
) -> tuple[float, ...]:
    """Minimise loss_of(ids, tokens that follow or -100, passes), all [B, n]; every epoch has an order of its own.

    Args:
        given: tokens at the beginning of each row that are not to be learnt.
    """
    before = [given] * len(rows) if isinstance(given, int) else given
    wanted = [[*[NONE] * first, *row[first:]] for row, first in zip(rows, before, strict=True)]

    def loss_at(chosen: Sequence[int]) -> Tensor:
        ids, following, counts = (
            _padded([some[index] for index in chosen], filler)
            for some, filler in ((rows, ABSENT), (wanted, NONE), (passes, 1))
        )
        return loss_of(ids[:, :-1], following[:, 1:], counts[:, :-1])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "dropout"))
        return walk(learnt, loss_at, len(rows), recipe=recipe, seed=seed, on_step=on_step)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def check_passes(
    model: LanguageModel,
    rows: Sequence[Sequence[int]],
    passes: Sequence[Sequence[int]],
    *,
    given: Sequence[int] | int,
    most: int,
) -> None:
    """Raise a ValueError unless there are rows that the model can read, with 1 to `most` passes for each token."""
    check_rows(model, rows)
    if not isinstance(given, int) and len(given) != len(rows):
        raise ValueError(f"there are {len(rows)} rows, and numbers in `given` for {len(given)}")
    if len(rows) != len(passes):
        raise ValueError(f"there must be as many rows as rows of passes; got {len(rows)} and {len(passes)}")
    for number, (row, labels) in enumerate(zip(rows, passes, strict=True)):
        if len(labels) != len(row):
            raise ValueError(f"row {number} has {len(row)} tokens and {len(labels)} numbers of passes")
        if not 1 <= min(labels) <= max(labels) <= most:
            raise ValueError(f"row {number} asks for {min(labels)} to {max(labels)} passes of 1 to {most}")

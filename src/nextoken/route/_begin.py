"""Where the generated part of a text begins, as its tokens tell it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from nextoken.model import tree
from nextoken.model.base import ABSENT

Prompt: TypeAlias = int | tuple[int, ...]
"""How many tokens of a text are its prompt; or the ids after whose first occurrence, as they stand, it is over."""

NEVER = 1 << 40
"""Where a text begins to be generated that is all prompt so far."""


def begins(prompt: Prompt, kept: Sequence[Sequence[int]], tokens: Tensor, parents: Tensor | None) -> Tensor:
    """The number of prompt tokens [B, n] before and with each token fed, NEVER where the prompt may go on.

    Args:
        prompt: as above.
        kept: the tokens of each row before the call.
        tokens, parents: [B, n] as in `LanguageModel.extend`.
    """
    if isinstance(prompt, int):
        return torch.full(tokens.shape, prompt)
    size = len(prompt)
    tail = torch.tensor([[ABSENT] * (size - len(row)) + list(row[max(0, len(row) - size) :]) for row in kept])
    known = torch.tensor([first_end(row, prompt) for row in kept])[:, None]
    lengths = torch.tensor([len(row) for row in kept])[:, None]
    chain = tree.chain(*tokens.shape) if parents is None else parents
    depths = torch.arange(tokens.shape[1]) if parents is None else tree.depths(parents)
    # The last kept tokens of a row stand before its nodes, so that one walk upwards leads through both.
    text = torch.cat([tail.view(len(tokens), size), tokens], 1)
    above = torch.cat([torch.arange(-1, size - 1).clamp(min=0).expand(len(tokens), size), chain + size], 1)
    at = torch.arange(size, text.shape[1]).expand(tokens.shape)
    ends = torch.ones_like(tokens, dtype=torch.bool)
    for token in reversed(prompt):
        ends &= text.gather(1, at) == token
        at = above.gather(1, at)
    after = torch.where(ends, lengths + depths + 1, NEVER)
    if parents is None:
        after = after.cummin(1).values
    else:
        after = after[:, None, :].where(tree.ancestry(parents), NEVER).amin(2)
    return torch.minimum(after, known)


def first_end(row: Sequence[int], phrase: Sequence[int]) -> int:
    """The number of tokens up to the end of the first occurrence of a phrase, NEVER where it does not occur."""
    last, size = list(phrase), len(phrase)
    held = list(row)
    at = -1
    while True:
        try:
            at = held.index(last[0], at + 1)
        except ValueError:
            return NEVER
        if held[at : at + size] == last:
            return at + size

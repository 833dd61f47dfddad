"""Counting n-grams: sorted arrays in which a batch of contexts is looked up at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from nextoken.model.vocab import Vocab


@dataclass(frozen=True)
class Level:
    """All n-grams h w of one n, by context h.

    Contexts of n-1 tokens are numbered 0..C-1 by `keys` (sorted); the context of no token is number 0.

    Args:
        width: factor of the keys, more than any token id.
        keys: [C] number of h without its first token (among the contexts one shorter), times `width`, plus that token.
        starts: [C+1] where the tokens that followed each context begin.
        tokens: [T] the tokens w, ascending within a context.
        counts: [T] their counts a(h w).
    """

    width: int
    keys: Tensor
    starts: Tensor
    tokens: Tensor
    counts: Tensor

    def child(self, parents: Tensor, first: Tensor) -> Tensor:
        """Numbers [M] of the contexts that are `first` followed by the shorter context `parents`; -1 if never seen."""
        wanted = parents * self.width + first
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        if not len(self.keys):
            return torch.full_like(parents, -1)
        return torch.where((self.keys[place] == wanted) & (first >= 0), place, -1)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "width"}


def count(sequences: Sequence[Sequence[int]], vocab: Vocab, order: int) -> list[Level]:
    """Levels n = 1..order of the Kneser-Ney counts a(h w); see `NgramModel`.

    Raises:
        ValueError: no token at all, ids outside the vocabulary, a begin token in the middle.
    """
    # Without a begin token an id beyond the vocabulary marks the beginning: as a context it is never asked for.
    width = vocab.size + 1
    begin = vocab.size if vocab.bos_id is None else vocab.bos_id
    rows = [list(row[1:]) if row and row[0] == begin else list(row) for row in sequences]
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError("cannot count n-grams: there is no token in the text")
    line = np.fromiter(chain.from_iterable([begin, *row] for row in rows), dtype=np.int64)
    age = np.concatenate([np.arange(len(row) + 1) for row in rows])  # tokens since the beginning
    predicted = age > 0
    if (line[predicted] < 0).any() or (line[predicted] >= vocab.size).any():
        raise ValueError(f"token ids must lie in [0, {vocab.size})")
    if (line[predicted] == begin).any():
        raise ValueError(f"the begin token {begin} occurs in the middle of a sequence: give each text as one sequence")

    levels: list[Level] = []
    # Per position the number of the context of n-1 tokens before it, and of the n-gram it ends; -1 near the beginning.
    context = np.where(predicted, 0, -1)
    keys = np.zeros(1, dtype=np.int64)
    previous: tuple[np.ndarray, np.ndarray] | None = None
    for n in range(1, order + 1):
        if n > 1:
            inside = age >= n - 1
            key = np.full(len(line), -1)
            key[inside] = context[inside] * width + line[np.flatnonzero(inside) - (n - 1)]
            keys, numbers = np.unique(key[inside], return_inverse=True)
            context = np.full(len(line), -1)
            context[inside] = numbers
        here = np.flatnonzero(context >= 0)
        pairs, ngram_here, occurrences = np.unique(
            context[here] * width + line[here], return_inverse=True, return_counts=True
        )
        ngram = np.full(len(line), -1)
        ngram[here] = ngram_here
        counts = occurrences.astype(np.int64)
        if previous is not None:
            _count_different(*previous, ngram, levels)
        starts = np.searchsorted(pairs // width, np.arange(len(keys) + 1))
        arrays = (torch.from_numpy(array) for array in (keys, starts, pairs % width, counts))
        levels.append(Level(width, *arrays))
        previous = (ngram, age == n - 1)
    return levels


def _count_different(shorter: np.ndarray, at_begin: np.ndarray, longer: np.ndarray, levels: list[Level]) -> None:
    """Turn the occurrences of the last level into the number of different tokens seen before each n-gram.

    Those that begin with the begin token have nothing before them and keep their occurrences.
    """
    inside = longer >= 0
    _, first = np.unique(longer[inside], return_index=True)
    before = np.bincount(shorter[inside][first], minlength=len(levels[-1].counts))
    kept = np.zeros(len(before), dtype=bool)
    kept[shorter[at_begin & (shorter >= 0)]] = True
    levels[-1].counts[~torch.from_numpy(kept)] = torch.from_numpy(before[~kept])


def estimated_discounts(counts: Tensor) -> tuple[float, float, float]:
    """D(1), D(2), D(3+) from how many n-grams have count 1, 2, 3 and 4; see `NgramModel`."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in range(1, 5))
    if not (n1 and n2):
        return (0.5, 0.5, 0.5)
    y = n1 / (n1 + 2 * n2)
    if n3 and n4:
        found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 <= d <= c for c, d in enumerate(found, start=1)):
            return found
    return (y, y, y)

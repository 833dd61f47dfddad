"""Schedules of layers: which of them the t-th generated token goes through, none that an earlier one left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stages:
    """A schedule by stages, in each of which the set of layers is another and lies within that of the stage before.

    A token of stage s goes through layer l where s < until[l].

    Args:
        of: the stage of the generated token t = 1..T, from 0, never falling.
        until: of each layer, how many stages have it.
    """

    of: tuple[int, ...]
    until: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many stages there are."""
        return self.of[-1] + 1

    @cached_property
    def _table(self) -> Tensor:
        return torch.tensor(self.of)

    def at(self, t: Tensor) -> Tensor:
        """The stages [...] of the generated tokens t [...]; that of t = 1 before it, in the prompt."""
        return self._table[t.clamp(1, len(self.of)) - 1]


class LayerSchedule(ABC):
    """A_t, a set of layers for every generated token t = 1, 2, ...; A_1 for the prompt too.

    A_{t+1} lies within A_t. So whatever layer a token goes through, all tokens before it went through it as well, and
    have a key and a value there.
    """

    tokens: int
    """T, from which on the set stays as it is."""

    @abstractmethod
    def layers(self, t: int, depth: int) -> tuple[int, ...]:
        """A_t for t = 1..T of a model with `depth` layers: numbers from 0, rising.

        Raises:
            ValueError: the schedule wants more layers than there are.
        """

    def stages(self, depth: int) -> Stages:
        """The schedule of a model with `depth` layers.

        Raises:
            ValueError: a set does not lie within the one before, or has layers that are not there.
        """
        sets = [frozenset(self.layers(t, depth)) for t in range(1, self.tokens + 1)]
        if not sets[0] <= set(range(depth)):
            raise ValueError(f"{self} names layers {sorted(sets[0])} of a model whose layers are 0 to {depth - 1}")
        of, runs = [0], [sets[0]]
        for t, (before, now) in enumerate(pairwise(sets), start=2):
            if not now <= before:
                raise ValueError(
                    f"{self} takes layers {sorted(now - before)} for generated token {t} but not for the one before, "
                    "which has no keys there; a set must lie within the one before"
                )
            if now != before:
                runs.append(now)
            of.append(len(runs) - 1)
        return Stages(tuple(of), tuple(sum(layer in run for run in runs) for layer in range(depth)))

    def speedup(self, depth: int, *, prompt: int, generated: int) -> float:
        """N (P + n) / (P |A_1| + sum_{t=1}^n |A_t|): layer evaluations of the whole model over those of the schedule.

        Prompts and early ends count against it: of a text much shorter than T, most tokens go through A_1.

        Args:
            depth: N.
            prompt, generated: P and n, tokens.
        """
        sizes = [len(self.layers(t, depth)) for t in range(1, self.tokens + 1)]
        done = prompt * sizes[0] + sum(sizes[:generated]) + max(0, generated - self.tokens) * sizes[-1]
        return depth * (prompt + generated) / done


@dataclass(frozen=True)
class SkipSchedule(LayerSchedule):
    """A_t = {1..w} and {N - (L_t - w) + 1 .. N}, L_t = round(L_max - (L_max - L_min) (t - 1) / (T - 1)), halves up.

    Of N layers, counted from 1 and upwards here, the first w and the last L_t - w; from t = T on L_t is L_min. The
    hidden state goes from layer w straight into the first of the last ones.

    Args:
        most, least: L_max and L_min, numbers of layers.
        tokens: T, at least 2: how long texts are to become.
        warm: w, at most `least`.

    Raises:
        ValueError: not 1 <= least <= most, not 0 <= warm <= least, or fewer than two tokens.

    Source: SkipDecode, arXiv:2307.02628, section 3.
    """

    most: int
    least: int
    tokens: int
    warm: int = 1

    def __post_init__(self) -> None:
        _check(self.most, self.least, self.tokens)
        if not 0 <= self.warm <= self.least:
            raise ValueError(f"warm must be from 0 to least = {self.least} layers, got {self.warm}")

    def count(self, t: int) -> int:
        """L_t."""
        return _linear(self.most, self.least, self.tokens, t)

    def layers(self, t: int, depth: int) -> tuple[int, ...]:
        count = _within(self.count(t), self.most, depth)
        return (*range(self.warm), *range(depth - (count - self.warm), depth))


@dataclass(frozen=True)
class TruncationSchedule(LayerSchedule):
    """A_t = {1..L_t}, the lowest layers: an early exit of the ordinary kind, L_t as of `SkipSchedule`.

    With most = least it is the model cut off above a layer. It is here to be compared with.

    Args:
        most, least, tokens: as of `SkipSchedule`.

    Raises:
        ValueError: not 1 <= least <= most, or fewer than two tokens.
    """

    most: int
    least: int
    tokens: int

    def __post_init__(self) -> None:
        _check(self.most, self.least, self.tokens)

    def count(self, t: int) -> int:
        """L_t."""
        return _linear(self.most, self.least, self.tokens, t)

    def layers(self, t: int, depth: int) -> tuple[int, ...]:
        return tuple(range(_within(self.count(t), self.most, depth)))


def _linear(most: int, least: int, tokens: int, t: int) -> int:
    """Whole numbers throughout: a count that floating point rounds up once would break the nesting."""
    steps = tokens - 1
    at = min(max(t, 1), tokens) - 1
    return (2 * (most * steps - (most - least) * at) + steps) // (2 * steps)


def _check(most: int, least: int, tokens: int) -> None:
    if not 1 <= least <= most:
        raise ValueError(f"layers must be 1 <= least <= most, got least = {least} and most = {most}")
    if tokens < 2:
        raise ValueError(f"the schedule needs at least 2 tokens to fall over, got {tokens}")


def _within(count: int, most: int, depth: int) -> int:
    if most > depth:
        raise ValueError(f"the schedule wants {most} layers and the model has {depth}")
    return count

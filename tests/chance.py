"""Every outcome of a random program, with its probability: what Monte Carlo blocks are proved against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


class Chance:
    """A generator whose choices are dictated as far as `path` goes, and are the first possible ones from there on."""

    def __init__(self, path: Sequence[int] = ()) -> None:
        self.path = list(path)
        self.options: list[list[float]] = []
        self.probability = 1.0
        self.cells = [0.0, 1.0]
        """Bounds between which the outcome does not depend on where a uniform number falls."""

    def choose(self, probs: Sequence[float]) -> int:
        at = len(self.options)
        self.options.append(list(probs))
        if at == len(self.path):
            self.path.append(next(i for i, p in enumerate(probs) if p > 0))
        self.probability *= probs[self.path[at]]
        return self.path[at]

    def expect(self, *bounds: Any) -> None:
        """Uniform numbers from now on matter by the cell between two of these bounds only."""
        inner = np.concatenate([np.zeros(0), *(np.asarray(bound, dtype=float).ravel() for bound in bounds)])
        inner = np.unique(inner.round(14))
        self.cells = [0.0, *inner[(inner > 1e-12) & (inner < 1 - 1e-12)].tolist(), 1.0]

    def random(self, size: int | None = None) -> Any:
        if size is not None:
            return np.array([self.random() for _ in range(size)])
        cell = self.choose(np.diff(self.cells).tolist())
        return (self.cells[cell] + self.cells[cell + 1]) / 2


def outcomes(program: Callable[[Any], Any]) -> Iterator[tuple[float, Any]]:
    """(probability, result) of every run of `program`, which takes a generator."""
    waiting: list[list[int]] = [[]]
    while waiting:
        forced = waiting.pop()
        chance = Chance(forced)
        result = program(chance)
        for depth in range(len(forced), len(chance.path)):
            options = chance.options[depth]
            waiting += [
                [*chance.path[:depth], other]
                for other in range(chance.path[depth] + 1, len(options))
                if options[other] > 0
            ]
        yield chance.probability, result

"""ExitCounts: how many layers were run and how often the head was asked by a model with several exits."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ExitCounts:
    """What a model with exits did, one number per exit.

    Args:
        exits: layers up to each exit.
        read: tokens that went through the layers between the exit before and this one, later catching up included.
        judged: tokens whose distribution was made here, to see how sure it is or to tell it: products with the head.
        told: tokens of which this exit's distribution was told.
    """

    exits: tuple[int, ...]
    read: tuple[int, ...]
    judged: tuple[int, ...]
    told: tuple[int, ...]

    @property
    def layers(self) -> int:
        """Layers run, summed over tokens: sum_j (e_j - e_{j-1}) read_j."""
        return sum((e - b) * count for e, b, count in zip(self.exits, (0, *self.exits), self.read, strict=False))

    @property
    def heads(self) -> int:
        """Products with the head, summed over tokens."""
        return sum(self.judged)

    @property
    def mean_depth(self) -> float:
        """Mean over told distributions of the layers below their exit; nan where none was told."""
        said = sum(self.told)
        return sum(e * count for e, count in zip(self.exits, self.told, strict=True)) / said if said else float("nan")

    def __add__(self, other: ExitCounts) -> ExitCounts:
        return self._with(other, 1)

    def __sub__(self, other: ExitCounts) -> ExitCounts:
        return self._with(other, -1)

    def _with(self, other: ExitCounts, sign: int) -> ExitCounts:
        if self.exits != other.exits:
            raise ValueError(f"counts of exits {self.exits} and of exits {other.exits} cannot be taken together")
        sums = (
            tuple(a + sign * b for a, b in zip(getattr(self, part.name), getattr(other, part.name), strict=True))
            for part in fields(self)[1:]
        )
        return ExitCounts(self.exits, *sums)

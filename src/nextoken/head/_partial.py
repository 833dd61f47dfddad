"""Sums over parts of the vocabulary, and how parts become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUARTER, HALF, ONE, FIRST, SECOND, THIRD, FOURTH, SQUARE, CUBE, BIQUADRATE, PLAIN, PLAIN_SQUARE, ABOVE, MASS = range(14)
COLUMNS = 14
POWERS = (0.25, 0.5, 1, 1, 1, 1, 1, 2, 3, 4, 0, 0, 0, 1)  # of exp(z - c) in each column


@dataclass(frozen=True)
class Partial:
    """Sums over p parts of the vocabulary for n rows, in float64.

    Args:
        centre: c [p, n]; powers of e = exp(z - c) are summed.
        about: m [p, n]; moments are of z - m.
        sums: [p, COLUMNS, n]: e^(1/4), e^(1/2), e, e (z - m)^k for k = 1..4, e^2, e^3, e^4, the plain sum of z - c and
            the unweighted second moment of z about its own mean (both over finite z), the number of z above the target,
            and their e.
        count: [p, n], the number of finite z.
    """

    centre: Tensor
    about: Tensor
    sums: Tensor
    count: Tensor

    @classmethod
    def stack(cls, parts: list[Partial]) -> Partial:
        """Parts side by side."""
        return cls(
            torch.cat([part.centre for part in parts]),
            torch.cat([part.about for part in parts]),
            torch.cat([part.sums for part in parts]),
            torch.cat([part.count for part in parts]),
        )

    def joined(self) -> Partial:
        """All parts as one: p = 1, about the mean of z under e."""
        centre = self.centre.amax(0)
        offset = self.centre - centre
        powers = torch.tensor(POWERS, dtype=torch.float64, device=centre.device)
        sums = (powers[:, None] * offset[:, None]).exp() * self.sums
        m0, m1, m2, m3, m4 = sums[:, ONE : FOURTH + 1].clone().unbind(1)
        about = self.about - centre
        mean = ((m1 + about * m0).sum(0) / m0.sum(0)).nan_to_num(0.0, 0.0, 0.0)
        d = about - mean
        sums[:, FIRST] = m1 + d * m0
        sums[:, SECOND], sums[:, THIRD], sums[:, FOURTH] = (
            m2 + d * (2 * m1 + d * m0),
            m3 + d * (3 * m2 + d * (3 * m1 + d * m0)),
            m4 + d * (4 * m3 + d * (6 * m2 + d * (4 * m1 + d * m0))),
        )
        sums[:, PLAIN] += self.count * offset
        count = self.count.sum(0)
        between = sums[:, PLAIN] / self.count.clamp(min=1.0) - sums[:, PLAIN].sum(0) / count.clamp(min=1.0)
        sums[:, PLAIN_SQUARE] = sums[:, PLAIN_SQUARE].clamp(min=0.0) + self.count * between.square()
        return Partial(centre[None], (centre + mean)[None], sums.sum(0, keepdim=True), count[None])

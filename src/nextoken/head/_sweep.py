"""One sweep over the vocabulary: rows absorb blocks of logits and finish as statistics.

With s = z - c for a centre c close to E_p[z], a block adds e = exp(s), its powers, and e s^k for k = 1..4. Everything
comes from one exponential, q = s log2(e) / 4 and a = 2^q = exp(s)^(1/4): a, a^2, a^4 = e, e^2, e^3, e^4.

Three things keep single precision honest:

- each block is summed about a centre of its own, taken from what the row has shown so far; a row for which that
  centre turns out to be far off (measured in standard deviations of the whole) is summed again about a better one;
- the k leading tokens are set aside and added in float64, so that 1 - p(top) and the entropy of a row with one sure
  token do not drown in the rounding of 1;
- blocks are merged in float64, at the end, about the final mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextoken.head._leaders import Leaders, Peaks
from nextoken.head._partial import (
    ABOVE,
    BIQUADRATE,
    COLUMNS,
    CUBE,
    FIRST,
    FOURTH,
    HALF,
    MASS,
    ONE,
    PLAIN,
    PLAIN_SQUARE,
    QUARTER,
    SECOND,
    SQUARE,
    THIRD,
    Partial,
)

FAR = 4.0  # a block is summed again if its raw second moment exceeds FAR times the central one of all seen so far
SPREAD = 256.0  # the same for the unweighted second moment, against the block's own variance
PARTS = 16  # blocks whose sums are kept apart before they are joined


def exponent_scale(dtype: torch.dtype) -> float:
    """log2(e) / 4 as the dtype rounds it, so that q / exponent_scale gives s back without a systematic error."""
    scale = math.log2(math.e) / 4
    return float(np.float32(scale)) if dtype == torch.float32 else scale


@dataclass
class Scratch:
    """Three blocks of memory that every step of a sweep writes to: all that a sweep needs of size rows x block."""

    z: Tensor
    powers: Tensor
    terms: Tensor

    @classmethod
    def empty(cls, entries: int, dtype: torch.dtype, device: torch.device) -> Scratch:
        return cls(*(torch.empty(entries, dtype=dtype, device=device) for _ in range(3)))

    def logits(self, rows: int, width: int) -> Tensor:
        """The [rows, width] block to be filled with logits and then absorbed."""
        return self.z[: rows * width].view(rows, width)


@dataclass(frozen=True)
class Target:
    """Ids [n] with -1 for none, and a threshold [n]: tokens with a logit strictly above it count as more probable."""

    ids: Tensor
    threshold: Tensor


class Sweep:
    """n rows on their way through the vocabulary.

    Args:
        rows: n.
        leaders: k, how many leading tokens to keep and set aside; at least 1.
        target: the tokens that came, or None.
        dtype: of the logits and of the sums within a block, float32 or float64.
    """

    def __init__(
        self, rows: int, leaders: int, target: Target | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.leaders = Leaders(rows, leaders, dtype, device)
        self.target = target
        self.scale = exponent_scale(dtype)
        self.target_logit = torch.full((rows,), torch.nan, dtype=torch.float64, device=device)
        self.spoilt = torch.zeros(rows, dtype=torch.bool, device=device)
        self._mean = torch.zeros(rows, dtype=torch.float64, device=device)  # of z under p, without the set-aside
        self._mass = torch.full_like(self._mean, -torch.inf)  # log of sum exp(z), without the set-aside
        self._variance = torch.zeros_like(self._mean)
        self._parts: list[Partial] = []
        self._aside: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, logits, ids

    def absorb(self, scratch: Scratch, width: int, first: int) -> None:
        """Take in the logits of tokens first .. first + width - 1, held by scratch.logits(n, width); spoils them."""
        n = self.spoilt.numel()
        z = scratch.logits(n, width)
        a = scratch.powers[: n * width].view(n, width)
        g = scratch.terms[: n * width].view(n, width)
        peaks = Peaks.of(z)
        self.spoilt |= ~(peaks.row < torch.inf)
        rows, columns = self.leaders.update(z, peaks, first)
        self._aside.append((rows, z[rows, columns], columns + first))
        self._note_target(z, first)
        shift = (self._estimate() * -self.scale).to(z.dtype)
        centre = shift.double() / -self.scale

        sums = torch.zeros(COLUMNS, n, dtype=z.dtype, device=z.device)
        torch.add(shift[:, None], z, alpha=self.scale, out=a).exp2_()
        a[rows, columns] = 0.0
        torch.sum(a, 1, out=sums[QUARTER])
        a.mul_(a)
        torch.sum(a, 1, out=sums[HALF])
        a.mul_(a)
        torch.sum(a, 1, out=sums[ONE])
        if self.target is not None:
            self._count_above(z, a, g, peaks.row, sums)
        q = torch.add(shift[:, None], z, alpha=self.scale, out=z)
        count, absent = self._plain_sums(q, sums)
        torch.mul(a, q, out=g)
        torch.sum(g, 1, out=sums[FIRST])
        for column in (SECOND, THIRD, FOURTH):
            torch.sum(g.mul_(q), 1, out=sums[column])
        torch.mul(a, a, out=g)
        torch.sum(g, 1, out=sums[SQUARE])
        torch.sum(g.mul_(a), 1, out=sums[CUBE])
        torch.sum(g.mul_(a), 1, out=sums[BIQUADRATE])
        self._keep(sums.double(), centre, count, q, a, absent)

    def _note_target(self, z: Tensor, first: int) -> None:
        """The target's logit, from its own block, so that it agrees to the last bit with the leaders' logits."""
        if self.target is None:
            return
        here = ((self.target.ids >= first) & (self.target.ids < first + z.shape[1])).nonzero().squeeze(1)
        self.target_logit[here] = z[here, self.target.ids[here] - first].double()

    def _estimate(self) -> Tensor:
        """E_p[z] [n] over the leaders and all blocks so far; at least max z - log V, so exp(4 s) cannot overflow."""
        values = self.leaders.values.double()
        top = values[:, 0]
        s = (values - top[:, None]).clamp(min=-1e3)
        weight = s.exp()
        rest = (self._mass - top).exp()
        mean = ((weight * s).sum(1) + rest * (self._mean - top)) / (weight.sum(1) + rest)
        return (top + mean).nan_to_num(0.0, 0.0, 0.0)

    def _count_above(self, z: Tensor, e: Tensor, g: Tensor, row_peak: Tensor, sums: Tensor) -> None:
        """Number and mass of the tokens above the target; most rows of a real text have none in most blocks."""
        assert self.target is not None
        threshold = self.target.threshold
        rows = (row_peak > threshold).nonzero().squeeze(1)
        if rows.numel() == 0:
            return
        if rows.numel() > z.shape[0] // 2:
            above = g.copy_(z).gt_(threshold[:, None])
            torch.sum(above, 1, out=sums[ABOVE])
            torch.sum(above.mul_(e), 1, out=sums[MASS])
        else:
            above = z[rows].gt_(threshold[rows, None])
            sums[ABOVE, rows] = above.sum(1)
            sums[MASS, rows] = above.mul_(e[rows]).sum(1)

    def _plain_sums(self, q: Tensor, sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unweighted sums of q and q^2 over the finite entries; those of -inf are returned, and become 0 in q."""
        count = torch.full(q.shape[:1], float(q.shape[1]), dtype=torch.float64, device=q.device)
        absent = None
        plain = q.sum(1)
        if (plain == -torch.inf).any():
            absent = q == -torch.inf
            q.masked_fill_(absent, 0.0)
            plain = q.sum(1)
            count -= absent.sum(1)
        square = torch.linalg.vector_norm(q, dim=1).square()
        mean = plain / count.to(q.dtype).clamp(min=1.0)
        far = (square > SPREAD * (square - plain * mean)).nonzero().squeeze(1)
        sums[PLAIN] = plain
        sums[PLAIN_SQUARE] = square - plain * mean  # central, unlike the others
        for some in torch.split(far, 64):
            centred = q[some] - mean[some, None]
            if absent is not None:
                centred.masked_fill_(absent[some], 0.0)
            residue = centred.sum(1)
            sums[PLAIN_SQUARE, some] = torch.linalg.vector_norm(centred, dim=1).square()
            sums[PLAIN, some] += residue
        return count, absent

    def _keep(self, sums: Tensor, centre: Tensor, count: Tensor, q: Tensor, e: Tensor, absent: Tensor | None) -> None:
        """Store the block's sums in natural units; first check the centre, and sum again where it was poor."""
        unit = 1.0 / self.scale
        powers = torch.tensor([unit, unit**2, unit**3, unit**4], dtype=torch.float64, device=sums.device)
        sums[FIRST : FOURTH + 1] *= powers[:, None]
        sums[PLAIN] *= unit
        sums[PLAIN_SQUARE] *= unit**2
        top = self.leaders.values.double()
        peak = top[:, 0]
        weight = (centre - peak).exp()
        mass, first, second = weight * sums[ONE], weight * sums[FIRST], weight * sums[SECOND]
        old = (self._mass - peak).exp()
        total = old + mass
        mean = (old * self._mean + mass * centre + first) / total
        spread = old * (self._variance + (self._mean - mean).square())
        spread = spread + second + 2 * (centre - mean) * first + (centre - mean).square() * mass
        alive = total > 0
        self._mean = torch.where(alive, mean, self._mean)
        self._variance = torch.where(alive, (spread / total).clamp(min=0), self._variance)
        self._mass = torch.where(alive, peak + total.log(), self._mass)
        better = self._estimate()
        s = (top - better[:, None]).clamp(min=-1e3)
        spread_all = ((top - peak[:, None]).exp() * s.square()).sum(1)
        spread_all = spread_all + total * self._variance + total * (self._mean - better).square()
        noise = torch.finfo(q.dtype).eps * (1.0 + peak.abs())
        far = (second > FAR * (spread_all + total * noise.square())).nonzero().squeeze(1)
        if len(self._parts) == PARTS:
            self._parts = [self.partial()]
        self._parts.append(Partial(centre[None], centre[None].clone(), sums[None], count[None]))
        if far.numel():
            self._again(far, better, q, e, absent)

    def _again(self, far: Tensor, better: Tensor, q: Tensor, e: Tensor, absent: Tensor | None) -> None:
        """Sum e s^k once more for some rows of the block stored last, about a better centre."""
        about, sums = self._parts[-1].about[0], self._parts[-1].sums[0]
        unit = 1.0 / self.scale
        for some in torch.split(far, 64):
            move = ((better[some] - about[some]) * self.scale).to(q.dtype)
            nearer = q[some] - move[:, None]
            if absent is not None:
                nearer.masked_fill_(absent[some], 0.0)
            about[some] += move.double() * unit
            term = e[some]
            for power, column in enumerate((FIRST, SECOND, THIRD, FOURTH), start=1):
                sums[column, some] = term.mul_(nearer).sum(1).double() * unit**power

    def partial(self) -> Partial:
        """The blocks absorbed so far, as one part."""
        return Partial.stack(self._parts).joined()

    def aside(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, logits (float64) and ids of the entries set aside: in no sum but the unweighted ones and ABOVE."""
        rows, values, ids = zip(*self._aside, strict=True)
        return torch.cat(rows), torch.cat(values).double(), torch.cat(ids)

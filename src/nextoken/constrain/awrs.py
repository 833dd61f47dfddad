"""AWRS: a token exactly of the constrained law after a handful of tests, with an unbiased weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nextoken.constrain.kernel import DEAD, Kernel, NextToken, Uniform, invert, negative_binomial
from nextoken.methods import method

PEAKED = 2 / 3
"""Where p has a token so probable, the geometric variant needs 1 + 2 (1 - p) / p < 2 tests, which is less than the two
that the recursive one always makes."""


class Urn:
    """Tokens drawn by their probability, of which those put aside come no more.

    A draw is repeated while it gives a token that was put aside; where these hold half of the mass, they are taken out
    of the cumulative. So a draw costs two binary searches on average instead of V noises to be sorted, and what is left
    is known to full relative precision, however little it is.
    """

    def __init__(self, probs: np.ndarray, cumulative: np.ndarray, rng: Uniform) -> None:
        self._probs, self._cumulative, self._rng = probs, cumulative, rng
        self._aside: set[int] = set()
        self._recent = 0.0
        self.removed = 0.0
        """Mass put aside."""

    @property
    def left(self) -> float:
        """Mass of the tokens that may still come."""
        return float(self._cumulative[-1]) - self._recent

    def draw(self) -> int:
        """A token of those left, which must be some; it stays in the urn."""
        while (token := invert(self._cumulative, self._rng.random())) in self._aside:
            pass
        return token

    def remove(self, token: int) -> None:
        """Put a token aside."""
        self._aside.add(token)
        self.removed += float(self._probs[token])
        self._recent += float(self._probs[token])
        if self._recent > self._cumulative[-1] / 2:
            kept = self._probs.copy()
            kept[list(self._aside)] = 0.0
            self._cumulative, self._recent = np.cumsum(kept), 0.0


@method(
    name="AWRS",
    arxiv="2504.05410",
    access="gray",
    summary="tokens of the constrained law by rejection without replacement, with unbiased weights, after a few tests",
)
@dataclass(frozen=True)
class AWRS(Kernel):
    """x ~ p c / Z by rejection without replacement, with E[w | x] = Z = sum_v p(v) c(v).

    Tokens are drawn from p; one that is not allowed is put aside and the draw repeated. The first allowed one is x.
    With L the mass not put aside when x came:

    - recursive: one more token is drawn from what remains without x; w = L if it is allowed (or none remains), else
      p(x). That is one test more than finding x takes.
    - geometric: the run with replacement that this one shortens is completed: before a draw with mass m put aside,
      the rejects that would have come again are Geometric(1 - m) - 1. It goes on to `max_accepts` = r accepts, and with
      a accepts and n rejects w = min(r - 1, a) / (a + n - 1).

    "auto" is geometric where r > 2 or max p >= 2/3, else recursive. The number of tests grows with KL(p c / Z || p) =
    log 1/Z, not with V.

    Args:
        variant: which weight.
        max_accepts: r, at least 2; more lowers the variance of the geometric weight, and the recursive one ignores it.
        max_rejects: give up at so many rejects with w = 0 (recursive; at an accept before the last test w = L),
            or stop the run there (geometric): properly weighted either way, with more variance for less work. None
            tests until no mass is left.

    Source: Lipkin et al., arXiv:2504.05410. Where the paper's library takes mass below 1e-5 for none, all of it
    counts: the order comes from an urn that keeps what is left to full precision.
    """

    variant: Literal["auto", "recursive", "geometric"] = "auto"
    max_accepts: int = 2
    max_rejects: int | None = None

    def __post_init__(self) -> None:
        if self.variant not in ("auto", "recursive", "geometric"):
            raise ValueError(f"variant must be 'auto', 'recursive' or 'geometric', got {self.variant!r}")
        if self.max_accepts < 2:
            raise ValueError(f"max_accepts must be at least 2, got {self.max_accepts}: one accept tells no weight")
        if self.max_rejects is not None and self.max_rejects < 1:
            raise ValueError(f"max_rejects must be at least 1, got {self.max_rejects}")

    def _draw(self, here: NextToken, rng: Uniform) -> tuple[int, float]:
        urn = Urn(here.probs, here.cumulative, rng)
        most = math.inf if self.max_rejects is None else self.max_rejects
        if self._is_geometric(here):
            return geometric(urn, here, rng, accepts=self.max_accepts, max_rejects=most)
        return recursive(urn, here, max_rejects=most)

    def _is_geometric(self, here: NextToken) -> bool:
        if self.variant == "auto":
            return self.max_accepts > 2 or bool(here.probs.max() >= PEAKED)
        return self.variant == "geometric"


def recursive(urn: Urn, here: NextToken, *, max_rejects: float = math.inf) -> tuple[int, float]:
    """The first allowed token x and log w: w = the mass left when it came, or p(x) if the one after it is not allowed.

    By Z = p(x) c(x) + (1 - p(x)) E[c | not x], applied to what is left after each reject.
    """
    rejected = 0
    while urn.left > 0:
        left = urn.left
        token = urn.draw()
        if here.allows(token):
            urn.remove(token)
            sure = rejected + 1 >= max_rejects or not urn.left > 0
            weight = left if sure or here.allows(urn.draw()) else float(here.probs[token])
            return token, min(math.log(weight), 0.0)
        urn.remove(token)
        rejected += 1
        if rejected >= max_rejects:
            break
    return -1, DEAD


def geometric(
    urn: Urn, here: NextToken, rng: Uniform, *, accepts: int = 2, max_rejects: float = math.inf
) -> tuple[int, float]:
    """The first allowed token and log w of the run with replacement up to `accepts` accepts or `max_rejects` rejects.

    Rejects that come again are counted by their law instead of drawn.
    """
    first, accepted, rejected = -1, 0, 0.0
    while accepted < accepts and urn.left > 0:
        if urn.removed > 0:
            # Geometric on 0, 1, ...: floor(log U / log m), where m = 1 - left is what was put aside and 0 < U <= 1.
            again = math.log1p(-rng.random()) / math.log1p(-min(urn.left, 1 - 2**-53))
            rejected += math.floor(min(again, 1e300))
        if rejected >= max_rejects:
            break
        token = urn.draw()
        if here.allows(token):
            first = token if accepted == 0 else first
            accepted += 1
        else:
            urn.remove(token)
            rejected += 1
            if rejected >= max_rejects:
                break
    return first, negative_binomial(accepted, min(rejected, max_rejects), accepts)

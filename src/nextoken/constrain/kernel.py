"""Kernel: the draw of one token under a constraint, with a weight that makes it right.

    here = NextToken(log_probs, place, vocab)      # p over the next token, and c, what the constraint says of each
    draw = AWRS()(here, np.random.default_rng(0))
    draw.token, draw.log_weight, draw.checks

Where p(x) is the probability of token x and c(x) is 1 where the text stays viable after it, else 0, a kernel is
*properly weighted* if E[w 1{token = x}] = p(x) c(x) for every x. Sequences of such draws, their weights multiplied, are
properly weighted for the whole text, whatever kernel each comes from; `nextoken.testing.check_properly_weighted`
proves it of a kernel of your own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nextoken.constrain.constraint import Place
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.transform import Context, Transform, normalise
from nextoken.model.vocab import Vocab

DEAD = -math.inf
"""The log weight of a draw that found nothing."""


class Uniform(Protocol):
    """What a kernel takes its chance from; `numpy.random.Generator` is one."""

    def random(self) -> float: ...


class NextToken:
    """One next token to be chosen: p [V], and c, the constraint at this place, asked token by token.

    Answers are kept, so that no token is tested twice, and counted in `spent`.

    Args:
        log_probs: log p [V] in nats, after the transforms; a constant on top does no harm.
        place: how far the text has been read under the constraint.
        vocab: of the model.
    """

    def __init__(self, log_probs: Tensor | np.ndarray, place: Place, vocab: Vocab) -> None:
        array = log_probs.detach().cpu().numpy() if isinstance(log_probs, Tensor) else np.asarray(log_probs)
        if array.shape != (vocab.size,):
            raise ValueError(f"log_probs must be [{vocab.size}], one per token of the vocabulary, got {array.shape}")
        self.place, self.vocab = place, vocab
        self._given = array
        self._after: dict[int, Place | None] = {}
        self._mask: np.ndarray | None = None
        self.spent = 0
        """Tokens tested so far; a whole mask counts as V."""

    @cached_property
    def probs(self) -> np.ndarray:
        """p [V], float64, of sum 1."""
        raised = np.exp((self._given - self._given.max()).astype(np.float64))
        return np.asarray(raised / raised.sum())

    @cached_property
    def cumulative(self) -> np.ndarray:
        """p summed up to each token [V]."""
        return np.cumsum(self.probs)

    def allows(self, token: int) -> bool:
        """c(token): whether the text stays viable after it, or is complete where it ends the text."""
        if self._mask is not None:
            return bool(self._mask[token])
        if token not in self._after:
            self.spent += 1
            self._after[token] = self._read(token)
        return self._after[token] is not None

    def allowed(self) -> np.ndarray:
        """c [V], of all tokens at once."""
        if self._mask is None:
            self.spent += self.vocab.size
            self._mask = self.place.allowed(self.vocab).cpu().numpy()
        return self._mask

    def after(self, token: int) -> Place:
        """The place after an allowed token; an end token stays where it is."""
        if token not in self._after:
            self._after[token] = self._read(token)
        place = self._after[token]
        if place is None:
            raise ValueError(f"token {token} ({self.vocab.label(token)!r}) is not allowed here: it leads to no place")
        return place

    def seen_as(self, log_probs: Tensor) -> NextToken:
        """The same constraint under another distribution, with answers and count shared from now on."""
        return _Seen(self, log_probs)

    def _read(self, token: int) -> Place | None:
        if token in self.vocab.eos_ids:
            return self.place if self.place.is_complete else None
        spelled = self.vocab.token_bytes[token]
        return self.place.advance(spelled) if spelled else None


class _Seen(NextToken):
    """Another distribution at the same place, which answers and counts."""

    def __init__(self, here: NextToken, log_probs: Tensor) -> None:
        super().__init__(log_probs, here.place, here.vocab)
        self._here = here

    def allows(self, token: int) -> bool:
        return self._here.allows(token)

    def allowed(self) -> np.ndarray:
        return self._here.allowed()

    def after(self, token: int) -> Place:
        return self._here.after(token)


@dataclass(frozen=True)
class Draw:
    """A token and log w in nats, -inf where none was found; `checks` is how many tokens were newly tested for it."""

    token: int
    log_weight: float
    checks: int = 0

    @property
    def is_dead(self) -> bool:
        return self.log_weight == DEAD


class Kernel(ABC):
    """Draws a token x with a weight w such that E[w 1{x = v}] = p(v) c(v) for every token v.

    A subclass gives `_draw`. The token law alone may be any whose weight puts it right; w = 0 (log weight -inf) says
    that nothing was found, and its token means nothing.
    """

    def __call__(self, here: NextToken, rng: Uniform) -> Draw:
        """One draw.

        Raises:
            ValueError: the kernel gives a weight that is NaN or infinite.
        """
        before = here.spent
        token, log_weight = self._draw(here, rng)
        if not log_weight < math.inf:
            raise ValueError(f"{type(self).__name__} gave token {token} the log weight {log_weight}")
        return Draw(token, log_weight, here.spent - before)

    @abstractmethod
    def _draw(self, here: NextToken, rng: Uniform) -> tuple[int, float]:
        """A token and its log weight."""


@dataclass(frozen=True)
class FullMask(Kernel):
    """x ~ p c / Z with w = Z = sum_v p(v) c(v): every token is tested.

    The weight has no variance, which no other kernel offers; the price is the whole mask. Without its weights this is
    what is known as constrained decoding, whose texts have the wrong distribution.
    """

    def _draw(self, here: NextToken, rng: Uniform) -> tuple[int, float]:
        return _among(here.probs * here.allowed(), rng)


@dataclass(frozen=True)
class End(Kernel):
    """The text ends here: x an end token, w = c(complete) p(end).

    Properly weighted for p cut down to its end tokens: what is left of the target where a text may grow no longer.
    """

    def _draw(self, here: NextToken, rng: Uniform) -> tuple[int, float]:
        ends = np.zeros_like(here.probs)
        for token in here.vocab.eos_ids:
            ends[token] = here.probs[token] if here.allows(token) else 0.0
        return _among(ends, rng)


@dataclass(frozen=True)
class Rejection(Kernel):
    """Draws with replacement until `accepts` = r are allowed; x is the first of these and w = (r - 1) / (N - 1).

    N is the number of draws. It needs 2 / Z of them on average, which AWRS does not.

    Args:
        accepts: r, at least 2; more lowers the variance of the weight.
        max_rejects: after so many rejects it stops with the a tokens it has, and w = min(r - 1, a) / (a + rejects - 1),
            0 where a = 0: still properly weighted, and it ends where nothing is allowed.

    Source: Lipkin et al., arXiv:2504.05410, weighted rejection sampling; the weight is the unbiased estimator of the
    negative binomial.
    """

    accepts: int = 2
    max_rejects: int = 1000

    def __post_init__(self) -> None:
        if self.accepts < 2 or self.max_rejects < 1:
            raise ValueError(
                f"rejection needs accepts >= 2 and max_rejects >= 1, got {self.accepts} and {self.max_rejects}"
            )

    def _draw(self, here: NextToken, rng: Uniform) -> tuple[int, float]:
        first, accepted, rejected = -1, 0, 0
        while accepted < self.accepts and rejected < self.max_rejects:
            token = invert(here.cumulative, rng.random())
            if here.allows(token):
                first = token if accepted == 0 else first
                accepted += 1
            else:
                rejected += 1
        return first, negative_binomial(accepted, rejected, self.accepts)


@dataclass(frozen=True)
class Proposal(Kernel):
    """Draws from q = transform(p) in place of p, with the weight of `kernel` times p(x) / q(x).

    Args:
        kernel: properly weighted whatever the distribution, such as AWRS().
        transform: what makes q of p, such as Temperature(1.5); of the distribution alone: it does not see the text.

    Raises:
        ValueError: on a draw where q is 0 and p is not: the weight could not make up for it.
    """

    kernel: Kernel
    transform: Transform | str

    @cached_property
    def _rule(self) -> Transform:
        return parsed(self.transform) if isinstance(self.transform, str) else self.transform

    def _draw(self, here: NextToken, rng: Uniform) -> tuple[int, float]:
        context = Context(prompts=[()], outputs=[()], surprisals=[()], vocab=here.vocab)
        own = torch.from_numpy(here.probs).log()[None]
        q = here.seen_as(normalise(self._rule(own, context))[0])
        if bool(((q.probs == 0) & (here.probs > 0)).any()):
            raise ValueError(f"{self.transform} removes tokens that p has: a proposal must leave all of them possible")
        token, log_weight = self.kernel._draw(q, rng)
        if log_weight == DEAD:
            return token, DEAD
        return token, log_weight + math.log(here.probs[token]) - math.log(q.probs[token])


def negative_binomial(accepted: int, rejected: float, sought: int) -> float:
    """log of min(r - 1, a) / (a + n - 1), unbiased for the chance of an accept in a run that stopped at r = `sought`
    accepts or at a number of rejects set beforehand, with a accepts and n rejects; -inf where a = 0.

    Given a and n it is the chance that the first draw of the run was an accept.
    """
    if accepted == 0:
        return DEAD
    return math.log(min(sought - 1, accepted)) - math.log(accepted + rejected - 1)


def invert(cumulative: np.ndarray, uniform: float) -> int:
    """The token at which the cumulative [V] passes uniform * total; never one of probability 0."""
    total = cumulative[-1]
    return int(cumulative.searchsorted(min(uniform * total, np.nextafter(total, 0.0)), side="right"))


def _among(mass: np.ndarray, rng: Uniform) -> tuple[int, float]:
    """A token drawn by its share of mass [V], and the log of the whole."""
    cumulative = np.cumsum(mass)
    if not cumulative[-1] > 0:
        return -1, DEAD
    return invert(cumulative, rng.random()), min(math.log(cumulative[-1]), 0.0)

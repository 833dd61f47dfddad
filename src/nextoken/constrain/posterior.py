"""Posterior: weighted texts, and how probable the constraint is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from nextoken.constrain.particles import Population, log_sum, merge


@dataclass(frozen=True)
class Text:
    """One particle's text: what it says, its tokens with the end token, and the first particle it descends from."""

    text: str
    tokens: tuple[int, ...]
    founder: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Stage:
    """One step of all particles of a run.

    Args:
        run: which run.
        index: of the step; the first token is that of step 0.
        live: particles that drew a token.
        rows: different texts among these, each read once.
        checks: tokens tested under the constraint.
        ess: effective number of particles after the step, before they were resampled.
        resampled: whether they were.
        log_total: log of the sum of the weights: the evidence so far.
    """

    run: int
    index: int
    live: int
    rows: int
    checks: int
    ess: float
    resampled: bool
    log_total: float


@dataclass(frozen=True, eq=False)
class Posterior:
    """Weighted texts, properly weighted for target(y) = p(y) c(y) psi(y): E[sum_i w_i f(y_i)] = sum_y target(y) f(y).

    Args:
        population: the texts and their log weights, of all runs; texts of weight 0 are left out.
        log_evidences: of each run, log of the sum of its weights, -inf where no particle was left.
        stages: every step of every run.
        particles: K, as many as each run started with.
    """

    population: Population[Text]
    log_evidences: tuple[float, ...]
    stages: tuple[Stage, ...]
    particles: int

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each particle; equal ones come more than once."""
        return tuple(item.text for item in self.population.items)

    @property
    def log_weights(self) -> np.ndarray:
        """log w of each particle, nats; not normalised."""
        return self.population.log_weights

    @property
    def log_evidence(self) -> float:
        """log of the estimate of sum_y target(y): the chance that a text ends in time and meets the constraint.

        The estimate itself is unbiased; its logarithm is too low on average.
        """
        return log_sum(np.array(self.log_evidences)) - math.log(len(self.log_evidences))

    @property
    def evidence(self) -> float:
        """exp(log_evidence); 0 for a dead posterior."""
        return math.exp(self.log_evidence)

    @property
    def standard_error(self) -> float:
        """Of `evidence`. From the scatter of the runs where there are two or more, else of the particles.

        Within one run the weights are summed over the descendants of each first particle, which are independent of one
        another up to resampling: exact without it (the standard deviation over the square root of K), consistent with
        multinomial resampling (Chan and Lai), and nearly so with the others; prefer runs. NaN with one particle.
        """
        runs = len(self.log_evidences)
        if runs > 1:
            return float(np.std(np.exp(self.log_evidences), ddof=1)) / math.sqrt(runs)
        if self.particles == 1:
            return math.nan
        sums = np.zeros(self.particles)
        founders = [item.founder for item in self.population.items]
        np.add.at(sums, founders, np.exp(self.log_weights))
        return float(np.std(sums, ddof=1)) * math.sqrt(self.particles)

    @property
    def is_dead(self) -> bool:
        """Whether every weight is 0: no particle met the constraint within the tokens it had."""
        return len(self.population) == 0

    @property
    def ess(self) -> float:
        """(sum w)^2 / sum w^2: how many equally weighted texts these are worth; 0 for a dead posterior."""
        return self.population.ess

    @cached_property
    def posterior(self) -> Mapping[str, float]:
        """The share of each text in the weights, likeliest first, equal texts as one; empty for a dead posterior.

        Consistent: it tends to target(y) / evidence as particles grow in number, and is biased for few.
        """
        merged = merge(Population(self.texts, self.log_weights))
        shares = zip(merged.items, merged.probabilities.tolist(), strict=True)
        return dict(sorted(shares, key=lambda pair: -pair[1]))

    def sample(self, n: int = 1, *, seed: int = 0) -> list[str]:
        """n texts drawn by their weights, independently.

        Raises:
            ValueError: the posterior is dead.
        """
        if self.is_dead:
            raise ValueError(str(self))
        rng = np.random.default_rng(seed)
        texts: Sequence[str] = list(self.posterior)
        return [texts[i] for i in rng.choice(len(texts), size=n, p=list(self.posterior.values()))]

    @property
    def tokens_drawn(self) -> int:
        """By all particles that were alive, end tokens too."""
        return sum(stage.live for stage in self.stages)

    @property
    def checks_per_token(self) -> float:
        """Tokens tested under the constraint for each token drawn."""
        return sum(stage.checks for stage in self.stages) / max(self.tokens_drawn, 1)

    @property
    def resamplings(self) -> int:
        """How often the particles were resampled, over all runs."""
        return sum(stage.resampled for stage in self.stages)

    def __str__(self) -> str:
        if self.is_dead:
            return (
                f"no text was found: all {self.particles * len(self.log_evidences)} particles died, the last at token "
                f"{max((stage.index for stage in self.stages), default=0) + 1}. The constraint may be improbable under "
                "this prompt: take more particles, more tokens or a prompt that asks for it"
            )
        best, share = next(iter(self.posterior.items()))
        return (
            f"evidence {self.evidence:.3g} ± {self.standard_error:.1g}, {len(self.posterior)} texts "
            f"(ess {self.ess:.1f} of {self.particles * len(self.log_evidences)}), likeliest {best!r} ({share:.1%})"
        )

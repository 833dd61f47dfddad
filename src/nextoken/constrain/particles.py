"""Particles: weighted populations, and the blocks that Monte Carlo programs are built of.

A random population of pairs (x_i, w_i) stands for the measure mu with E[sum_i w_i f(x_i)] = sum_x mu(x) f(x) for every
f. It is not normalised: f = 1 gives its total, the evidence. Every block here is valid: what goes in for mu comes out
for the mu that the block names, exactly and for any number of particles. So does whatever is composed of them:

    population = spawn(100, start)                      # the unit at `start`
    for _ in range(steps):
        population = advance(population, step, rng)     # mu extended by a properly weighted step
        population = resample(population, rng)          # mu, on particles of equal weight
    item, log_weight = pick(population, rng)            # mu, on one particle

Not valid, though often seen: dividing by the total within the loop, keeping the best k, dropping duplicates without
adding their weights. Averages divided by the total (posterior probabilities) are consistent, not unbiased.

Source: Ścibior et al., arXiv:1711.03219, sections 4 and 5, after which the blocks are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from nextoken.constrain.resampling import Scheme, systematic

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)

Step: TypeAlias = Callable[[T, np.random.Generator], tuple[T, float]]
"""From an item its extension and log w in nats."""
Potential: TypeAlias = Callable[[T], float]
"""log psi of an item, nats; -inf for one that is not to count."""


@dataclass(frozen=True, eq=False)
class Population(Generic[T]):
    """Items x_i with log w_i [n] in nats; it may have none, which is the zero measure."""

    items: tuple[T, ...]
    log_weights: np.ndarray

    def __post_init__(self) -> None:
        if self.log_weights.shape != (len(self.items),):
            raise ValueError(f"{len(self.items)} items need as many weights, got {self.log_weights.shape}")
        if not bool((self.log_weights < math.inf).all()):
            raise ValueError("log weights must be finite, or -inf for a weight of 0; some are NaN or infinite")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def log_total(self) -> float:
        """log sum_i w_i, -inf for the zero measure."""
        return log_sum(self.log_weights)

    @property
    def probabilities(self) -> np.ndarray:
        """w_i / sum w [n]; all 0 for the zero measure."""
        total = self.log_total
        if total == -math.inf:
            return np.zeros(len(self))
        shares = np.exp(self.log_weights - total)
        return np.asarray(shares / shares.sum())

    @property
    def ess(self) -> float:
        """(sum w)^2 / sum w^2, the effective number of particles; 0 for the zero measure."""
        squares = float(np.square(self.probabilities).sum())
        return 1 / squares if squares > 0 else 0.0


def log_sum(log_weights: np.ndarray) -> float:
    """log sum exp, -inf where there is nothing or all is -inf."""
    highest = float(log_weights.max(initial=-math.inf))
    return highest if highest == -math.inf else highest + math.log(float(np.exp(log_weights - highest).sum()))


def spawn(n: int, item: T) -> Population[T]:
    """n copies of `item` with weight 1/n: the unit measure at it."""
    if n < 1:
        raise ValueError(f"a population is spawned of at least 1 particle, got {n}")
    return Population((item,) * n, np.full(n, -math.log(n)))


def weigh(population: Population[T], log_psi: Potential[T]) -> Population[T]:
    """Each weight times psi(x_i): mu(x) becomes mu(x) psi(x)."""
    factors = [log_psi(item) if w > -math.inf else 0.0 for item, w in _pairs(population)]
    return Population(population.items, population.log_weights + np.array(factors))


def advance(population: Population[T], step: Step[T], rng: np.random.Generator) -> Population[T]:
    """Each item a step further, weights multiplied: mu becomes sum_x mu(x) k(x, .), k the measure of the step.

    An item of weight 0 stays where it is.
    """
    moved = [step(item, rng) if w > -math.inf else (item, 0.0) for item, w in _pairs(population)]
    gained = np.array([log_weight for _, log_weight in moved], dtype=np.float64)
    return Population(tuple(item for item, _ in moved), population.log_weights + gained)


def twisted(step: Step[T], log_psi: Potential[T]) -> Step[T]:
    """The step whose weight is w psi(x_new) / psi(x_old).

    The quotients telescope: after `weigh(population, log_psi)` at the start and any number of such steps mu is that of
    the plain steps times psi of the last item. Where psi is 0 the way ends, so psi(x) = 0 must rule out what follows x.
    """

    def twist(item: T, rng: np.random.Generator) -> tuple[T, float]:
        moved, log_weight = step(item, rng)
        if moved is item or log_weight == -math.inf:
            return moved, log_weight
        reached = log_psi(moved)
        return moved, -math.inf if reached == -math.inf else log_weight + reached - log_psi(item)

    return twist


def resample(
    population: Population[T], rng: np.random.Generator, *, n: int | None = None, scheme: Scheme = systematic
) -> Population[T]:
    """n items drawn by their weights, each now of weight (sum w) / n: mu stays.

    The zero measure gives the population without items. Whether to resample may depend on the weights.

    Args:
        n: how many, as many as there are unless given.
        scheme: of module `resampling`; all are valid.
    """
    total, count = population.log_total, len(population) if n is None else n
    if total == -math.inf:
        return Population((), np.zeros(0))
    chosen = scheme(population.probabilities, count, rng)
    return Population(tuple(population.items[i] for i in chosen), np.full(count, total - math.log(count)))


def prune(population: Population[T]) -> Population[T]:
    """Without the items of weight 0: mu stays."""
    alive = np.flatnonzero(population.log_weights > -math.inf)
    if len(alive) == len(population):
        return population
    return Population(tuple(population.items[i] for i in alive), population.log_weights[alive])


def merge(population: Population[H]) -> Population[H]:
    """Equal items as one, of their weights' sum, in the order they first come: mu stays."""
    places: dict[H, list[int]] = {}
    for index, item in enumerate(population.items):
        places.setdefault(item, []).append(index)
    sums = [log_sum(population.log_weights[indices]) for indices in places.values()]
    return Population(tuple(places), np.array(sums, dtype=np.float64))


def pool(populations: Sequence[Population[T]]) -> Population[T]:
    """All items of R populations, their weights divided by R: the mean of what they stand for."""
    if not populations:
        raise ValueError("pool() got no population")
    weights = np.concatenate([population.log_weights for population in populations]) - math.log(len(populations))
    return Population(tuple(item for population in populations for item in population.items), weights)


def pick(population: Population[T], rng: np.random.Generator) -> tuple[T, float]:
    """One item drawn by its weight, and log sum w, which is its weight: mu stays.

    Raises:
        ValueError: the population is the zero measure, which has no item to pick.
    """
    one = resample(population, rng, n=1)
    if not one.items:
        raise ValueError("all weights are 0: there is nothing to pick")
    return one.items[0], float(one.log_weights[0])


def _pairs(population: Population[T]) -> list[tuple[T, float]]:
    return list(zip(population.items, population.log_weights.tolist(), strict=True))

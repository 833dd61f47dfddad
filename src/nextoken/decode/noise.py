"""Noise of thoughts: Dirichlet and Gumbel noise on weights, Gaussian noise on vectors, and log-densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.thinking import Thinker


@dataclass(frozen=True)
class DirichletNoise:
    """w' ~ Dirichlet(alpha w)."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")

    def __call__(self, log_weights: Tensor, rows: Sequence[Thinker]) -> Tensor:
        """New log weights [R, K]."""
        concentrations = self.alpha * log_weights.double().exp()
        return log_dirichlet(concentrations, [row.generator for row in rows]).to(log_weights.dtype)


@dataclass(frozen=True)
class GumbelNoise:
    """w' = softmax((log w + g) / temperature), g independent standard Gumbel; towards 0 the sampling of one token."""

    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def __call__(self, log_weights: Tensor, rows: Sequence[Thinker]) -> Tensor:
        """New log weights [R, K]."""
        size = log_weights.shape[-1]
        drawn = [torch.empty(size, dtype=torch.float64).exponential_(generator=row.generator) for row in rows]
        gumbel = -torch.stack(drawn).log().to(log_weights.device)
        return torch.log_softmax((log_weights.double() + gumbel) / self.temperature, -1).to(log_weights.dtype)


def log_gaussian(noise: Tensor, sigma: float) -> Tensor:
    """log N(noise; 0, sigma^2 I) of [..., d], summed over d, in float64."""
    wide = noise.double()
    return -wide.square().sum(-1) / (2 * sigma**2) - wide.shape[-1] / 2 * math.log(2 * math.pi * sigma**2)


def log_dirichlet(concentrations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """log w [R, K], w ~ Dirichlet(concentrations [R, K]), each row from a generator; -inf where the concentration is 0.

    A gamma variable of shape c is one of shape c + 1 times U^(1/c), whose logarithm does not underflow.
    """
    drawn = []
    for row, generator in zip(concentrations.double().cpu(), generators, strict=True):
        gamma = torch._standard_gamma(row + 1, generator=generator)
        uniform = torch.rand(row.shape, dtype=torch.float64, generator=generator).clamp(min=1e-300)
        drawn.append(gamma.log() + uniform.log() / row)
    return torch.log_softmax(torch.stack(drawn), -1).to(concentrations.device)


def dirichlet_log_density(log_weights: Tensor, concentrations: Tensor) -> Tensor:
    """log density [R] of weights [R, K] over the entries whose concentration is above 0."""
    inside = concentrations > 0
    c = torch.where(inside, concentrations, 1.0)
    terms = torch.where(inside, (c - 1) * log_weights.masked_fill(~inside, 0.0) - torch.lgamma(c), 0.0)
    return terms.sum(-1) + torch.lgamma(torch.where(inside, concentrations, 0.0).sum(-1))

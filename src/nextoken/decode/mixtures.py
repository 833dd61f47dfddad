"""Policies of thinking: truncated mixtures, noisy ones, and averages of sampled tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextoken.decode.loop import context_of, is_greedy
from nextoken.decode.noise import DirichletNoise, GumbelNoise, dirichlet_log_density, log_dirichlet, log_gaussian
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.thinking import ColdStop, Step, Thinker, Thinking
from nextoken.decode.transform import REMOVED, Chain, Context, Transform, check_possible, normalise
from nextoken.decode.truncation import MinP, TopK, TopP
from nextoken.methods import method
from nextoken.model.next import invert_cdf
from nextoken.model.soft import Mixtures, SoftModel

_LEAST = 1e-12  # under the logarithm of Soft Thinking's entropy


@method(
    name="Soft Thinking",
    arxiv="2505.15778",
    access="white",
    summary="thinks in mixtures of the most probable tokens' embeddings, until the entropy stays low (decoding only)",
)
@dataclass(frozen=True)
class SoftThinking(Thinking):
    """x = sum_j w_j E[i_j], w the max_topk largest of min_p(top_p(top_k(softmax(l / T)))), renormalised at every stage.

    The token noted is the one of largest weight. Without noise a thought is a function of the prompt: n samples differ
    in their answers only.

    Args:
        temperature: T; 0 feeds the most probable token, as decoding without mixtures would.
        top_k, top_p, min_p: truncations in this order, None for none.
        max_topk: n, the most tokens in a mixture; None for all that are left.
        cold_stop: on the entropy of softmax(l / T), before any truncation.
        noise: `DirichletNoise` or `GumbelNoise` on w; then tokens are ordered anew.

    Raises:
        ValueError: a setting is out of range.

    Source: Zhang et al., arXiv:2505.15778, and its released code, from which come the order of the
        truncations, min_p, max_topk and both kinds of noise. The defaults are those of its runs with QwQ-32B. Of tokens
        tied at the top_k-th place all stay, as everywhere in nextoken; the code keeps the first.
    """

    temperature: float = 0.6
    top_k: int | None = 30
    top_p: float | None = 0.95
    min_p: float | None = 0.001
    max_topk: int | None = 10
    cold_stop: ColdStop | None = field(default_factory=ColdStop)
    noise: DirichletNoise | GumbelNoise | None = None

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.max_topk is not None and self.max_topk < 1:
            raise ValueError(f"max_topk must be at least 1, or None for all tokens; got {self.max_topk}")
        if self.noise is not None and self.temperature == 0:
            raise ValueError("at temperature 0 one token has all the weight, and noise changes nothing: leave it out")
        self._truncations()  # which check their own settings

    @property
    def is_random(self) -> bool:
        return self.noise is not None

    def _truncations(self) -> Chain:
        k, p, m = self.top_k, self.top_p, self.min_p
        chosen = [None if k is None else TopK(k), None if p is None else TopP(p), None if m is None else MinP(m)]
        return Chain(tuple(rule for rule in chosen if rule is not None))

    def step(self, logits: Tensor, rows: Sequence[Thinker], model: SoftModel, scale: float) -> Step:
        logits = _wide(check_possible(logits))
        if self.temperature == 0:
            return _one_hot(logits)
        log_q = torch.log_softmax(logits / self.temperature, -1)
        q = log_q.exp()
        entropies = -(q * q.clamp(min=_LEAST).log()).sum(-1)
        scores = self._truncations()(log_q, Context(vocab=model.vocab))
        ids: Tensor | None = None
        if self.max_topk is not None:
            # Stable: of tied tokens the first, as a greedy choice has it.
            scores, ids = scores.sort(dim=-1, descending=True, stable=True)
            scores, ids = scores[:, : self.max_topk], ids[:, : self.max_topk]
        log_weights = torch.log_softmax(scores, -1)
        if self.noise is not None:
            log_weights = self.noise(log_weights, rows)
            if ids is not None:
                log_weights, order = log_weights.sort(dim=-1, descending=True, stable=True)
                ids = ids.gather(-1, order)
        return _step(Mixtures(None if ids is None else ids[:, None], log_weights.exp()[:, None]), entropies, None)


@method(
    name="Soft tokens",
    arxiv="2509.19170",
    access="white",
    summary="thinks in the mean embedding under the whole distribution plus Gaussian noise (decoding only)",
)
@dataclass(frozen=True)
class NoisySoft(Thinking):
    """x = p E + sigma eps, p = softmax(l / temperature) over the whole vocabulary, eps ~ N(0, I_d).

        sigma = sigma_rel sqrt(mean E[v, j]^2)
        log pi(x) = -|x - p E|^2 / (2 sigma^2) - d / 2 log(2 pi sigma^2)

    Temperature 0.5 is the paper's "soft", 1e-4 its "fuzzy" thinking; 0 is the most probable token itself, and noise.
    The log-density is of x in float32, before it is rounded to the model's precision; it is 0 where sigma_rel is 0.

    Args:
        temperature: of the mixture.
        sigma_rel: size of the noise, relative to the entries of E.
        cold_stop: none by default, as in the paper.

    Raises:
        ValueError: a setting is out of range.

    Source: Butt et al., arXiv:2509.19170. The paper's training is not here. Whether its sigma is relative to
        the root mean square of E or to another norm could not be had from a released code; this is the former.
    """

    temperature: float = 0.5
    sigma_rel: float = 0.33
    cold_stop: ColdStop | None = None

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if not 0 <= self.sigma_rel < math.inf:
            raise ValueError(f"sigma_rel must be at least 0, got {self.sigma_rel}")

    @property
    def is_random(self) -> bool:
        return self.sigma_rel > 0

    def step(self, logits: Tensor, rows: Sequence[Thinker], model: SoftModel, scale: float) -> Step:
        logits = _wide(check_possible(logits))
        if self.temperature == 0:
            plain = _one_hot(logits)
        else:
            # The largest taken away first: divided by 1e-4, float32 would keep little of the differences.
            p = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
            plain = _step(Mixtures(None, p[:, None]), torch.special.entr(p).sum(-1), torch.zeros(len(rows)))
        sigma = self.sigma_rel * scale
        if sigma == 0:
            return plain
        noise = sigma * torch.stack([torch.randn(model.embedding_width, generator=row.generator) for row in rows])
        mixtures = Mixtures(plain.mixtures.ids, plain.mixtures.weights, noise[:, None])
        return Step(mixtures, plain.tokens, plain.entropies, log_gaussian(noise, sigma))


@method(
    name="Continuous chain of thought (CoT2)",
    arxiv="2505.23648",
    access="white",
    summary="thinks in the mean embedding of K sampled tokens, or of Dirichlet weights (decoding only)",
)
@dataclass(frozen=True)
class TokenMixture(Thinking):
    """x = (1/K) sum_k E[i_k], i_1, ..., i_K independent from pi = transform(p); log pi(i) = sum_k log pi(i_k).

    The log-probability is of the ordered tuple, as its ratios between policies are those of the set. The mean of x is
    pi E and its covariance that of one sampled token over K. K = 1 is ordinary sampling, with the random numbers of
    `generate`: the same seed gives the same tokens. The token noted is the most frequent, of equally frequent ones the
    most probable.

    Args:
        k: K, tokens drawn per step.
        change: of the distribution, as of `generate`; `Temperature(K)` gives what the paper's code calls sampling
            normalisation. After a greedy one nothing is drawn.
        cold_stop: on the entropy of pi; none by default, as in the paper.

    Raises:
        ValueError: k is less than 1.

    Source: Gozeten et al., arXiv:2505.23648 (multi-token sampling). The paper's training is not here.
    """

    k: int = 1
    change: Transform | str | None = None
    cold_stop: ColdStop | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if isinstance(self.change, str):
            object.__setattr__(self, "change", parsed(self.change))

    @property
    def transform(self) -> Transform:
        return self.change if isinstance(self.change, Transform) else Chain()

    @property
    def is_random(self) -> bool:
        return not is_greedy(self.transform) or self.transform.is_random

    def step(self, logits: Tensor, rows: Sequence[Thinker], model: SoftModel, scale: float) -> Step:
        scores = self.transform(logits, context_of(rows, model, self.transform))
        if is_greedy(self.transform):
            return _one_hot(check_possible(scores))
        log_pi = normalise(scores)
        uniform = torch.tensor([[row.uniform() for _ in range(self.k)] for row in rows], dtype=torch.float64)
        ids = torch.stack([invert_cdf(log_pi, uniform[:, draw]) for draw in range(self.k)], -1)
        chosen = log_pi.gather(-1, ids)
        counts = (ids[:, :, None] == ids[:, None, :]).sum(-1)
        best = (counts + chosen.exp() / 2).argmax(-1, keepdim=True)
        weights = torch.full(ids.shape, 1 / self.k, dtype=log_pi.dtype, device=ids.device)
        mixtures = Mixtures(ids[:, None], weights[:, None])
        return Step(mixtures, ids.gather(-1, best)[:, 0], _entropies(log_pi), chosen.sum(-1))


@dataclass(frozen=True)
class DirichletMixture(Thinking):
    """x = w E, w ~ Dirichlet(gamma a), a the probabilities p(v) >= least, renormalised.

    The mean of w is a and its variance a (1 - a) / (gamma + 1); log pi(w) is the log-density of the weights over their
    support. Weights are drawn in log space, so that small concentrations give no nan; a density may still be large.

    Args:
        gamma: the concentration in all.
        least: from which probability on a token takes part; the most probable always does.
        cold_stop: on the entropy of p; none by default, as in the paper.

    Raises:
        ValueError: a setting is out of range.

    Source: Gozeten et al., arXiv:2505.23648 (Dirichlet sampling); gamma = 1 and the support are those of its
        released code, which takes the union of the supports of all policies it compares: at decoding there is one.
    """

    gamma: float = 1.0
    least: float = 1e-3
    cold_stop: ColdStop | None = None

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf or not 0 <= self.least <= 1:
            raise ValueError(f"gamma must be above 0 and least from 0 to 1, got {self.gamma} and {self.least}")

    @property
    def is_random(self) -> bool:
        return True

    def step(self, logits: Tensor, rows: Sequence[Thinker], model: SoftModel, scale: float) -> Step:
        log_p = normalise(logits).double()
        removed = (log_p.exp() < self.least) & (log_p < log_p.amax(-1, keepdim=True))
        concentrations = self.gamma * torch.softmax(log_p.masked_fill(removed, REMOVED), -1)
        log_weights = log_dirichlet(concentrations, [row.generator for row in rows])
        mixtures = Mixtures(None, log_weights.exp()[:, None])
        return _step(mixtures, _entropies(log_p), dirichlet_log_density(log_weights, concentrations))


def _one_hot(logits: Tensor) -> Step:
    best = logits.argmax(-1)
    return _step(Mixtures.of(best[:, None]), torch.zeros(len(best)), torch.zeros(len(best)))


def _step(mixtures: Mixtures, entropies: Tensor, log_probs: Tensor | None) -> Step:
    return Step(mixtures, mixtures.tokens[:, 0], entropies, log_probs)


def _entropies(log_probs: Tensor) -> Tensor:
    entropies: Tensor = torch.special.entr(log_probs.exp()).sum(-1)
    return entropies


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_temperature(value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {value}")

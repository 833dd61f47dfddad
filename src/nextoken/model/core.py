"""CoRE: models weighted, token by token, by how far they agree with one another."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model.aligned import AlignedNext
from nextoken.model.base import LanguageModel, State
from nextoken.model.combined import Branch, Branches, Combined
from nextoken.model.ensemble import normalised_weights
from nextoken.model.next import DenseNext, Next

_EPSILON = 1e-12


class Projected(Combined):
    """p = mix(q_0, ..., q_N) / sum, from the top tokens of a main model and N assistants in the main vocabulary.

        p_i = softmax of the `top` largest logits of model i, 0 elsewhere
        q_i = p_i A_i, A_i the alignment of an `Aligned` assistant, else the identity

    q_i sums to 1 less the mass of source tokens without a target; it is not renormalised before it is mixed. A subclass
    gives `mix`. Where an assistant's q_i is 0 throughout, or the mixture is, p = q_0.

    Args:
        main: the model whose vocabulary it is.
        assistants: at least one, over that vocabulary: `Aligned` where their own is another.
        top: how many tokens of each model count, None for all of them. Others have probability 0.
        end_guard: p = q_0 where the main model's best token is an end token.
        substring_guard: p = q_0 where the best token of the mixture and that of the main model differ and the bytes of
            one begin with those of the other. (The released code also does so where they are equal, which leaves its
            greedy choice as it is.)
        name: for display.
    """

    def __init__(
        self,
        main: LanguageModel,
        assistants: Sequence[LanguageModel],
        *,
        top: int | None,
        end_guard: bool,
        substring_guard: bool,
        name: str,
    ) -> None:
        if not assistants:
            raise ValueError(f"{name} needs at least one assistant beside {main.name}")
        if top is not None and top < 1:
            raise ValueError(f"top must be at least 1, or None for all tokens; got {top}")
        super().__init__(
            [Branch(model) for model in (main, *assistants)],
            name=f"{name}({', '.join(model.name for model in (main, *assistants))})",
        )
        self.top, self.end_guard, self.substring_guard = top, end_guard, substring_guard

    @abstractmethod
    def mix(self, shares: Tensor) -> Tensor:
        """Weights [..., V], in any unit, of the tokens from q [N+1, ..., V], the main model's first."""

    def combine(self, log_probs: Sequence[Tensor]) -> Tensor:
        """log of the weights [..., V] from log q_0, ..., log q_N, guards included."""
        shares = torch.stack([each.exp() for each in log_probs])
        mixed = self.mix(shares)
        alone = self._main_alone(shares, mixed)
        return torch.where(alone[..., None], shares[0], mixed).log()

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        memory = state.memory
        assert isinstance(memory, Branches)
        said = [
            branch.model.extend(inner, tokens, parents)
            for branch, inner in zip(self.branches, memory.states, strict=True)
        ]
        shares = [self._share(each) for each in said]
        wide = max((share.dtype for share in shares), key=lambda kind: torch.finfo(kind).bits)
        return DenseNext(self.combine([share.to(shares[0].device, wide).log() for share in shares]))

    def _share(self, said: Next) -> Tensor:
        """q [B, n, V_0]."""
        if isinstance(said, AlignedNext):
            return said.alignment.project(leading(said.source.log_probs(), self.top))
        return leading(said.log_probs(), self.top)

    def _main_alone(self, shares: Tensor, mixed: Tensor) -> Tensor:
        """Where [...] the main model decides by itself."""
        own, chosen = shares[0].argmax(-1), mixed.argmax(-1)
        alone = (shares[1:].sum(-1) == 0).any(0) | (mixed.sum(-1) == 0)
        if self.end_guard and self.vocab.eos_ids:
            alone |= torch.isin(own, torch.tensor(sorted(self.vocab.eos_ids), device=own.device))
        if self.substring_guard:
            differ = chosen != own
            alone[differ] = alone[differ] | self._overlapping(chosen[differ], own[differ])
        return alone

    def _overlapping(self, ones: Tensor, others: Tensor) -> Tensor:
        """Where [M] the bytes of one token begin with those of the other; specials have none."""
        spelled = [
            (self.vocab.token_bytes[a], self.vocab.token_bytes[b])
            for a, b in zip(ones.tolist(), others.tolist(), strict=True)
        ]
        found = [bool(a and b) and (a.startswith(b) or b.startswith(a)) for a, b in spelled]
        return torch.tensor(found, dtype=torch.bool, device=ones.device)

    def _settings(self) -> object:
        return self.top, self.end_guard, self.substring_guard


class ProjectedMean(Projected):
    """p proportional to sum_i w_i q_i: the average with CoRE's projection and guards, which it is to be held against.

    Args:
        main, assistants, top, end_guard, substring_guard: see `Projected`.
        weights: w, the main model's first, at least 0, made to sum to 1; equal by default. CoRE with its anchor gives
            the main model half or more, so the fair control does as well.
    """

    def __init__(
        self,
        main: LanguageModel,
        assistants: Sequence[LanguageModel],
        *,
        weights: Sequence[float] | None = None,
        top: int | None = 10,
        end_guard: bool = True,
        substring_guard: bool = True,
    ) -> None:
        super().__init__(
            main, assistants, top=top, end_guard=end_guard, substring_guard=substring_guard, name="projected mean"
        )
        self.weights = normalised_weights(weights, len(self.branches))

    def mix(self, shares: Tensor) -> Tensor:
        return torch.einsum("m,m...->...", torch.tensor(self.weights, dtype=shares.dtype, device=shares.device), shares)

    def _settings(self) -> object:
        return super()._settings(), self.weights


def _rbf(disparity: Tensor) -> Tensor:
    least = math.exp(-2.0)
    return (torch.exp(-2.0 * disparity) - least) / (1 - least)


def _reciprocal(disparity: Tensor) -> Tensor:
    """1 / (1 + d), stretched to [0, 1] over the models and tokens of a place; 1 where they are all equal."""
    raw = 1 / (1 + disparity)
    low = raw.amin(-1, keepdim=True).amin(0)
    high = raw.amax(-1, keepdim=True).amax(0)
    # Differences as small as rounding would otherwise be stretched to the whole range.
    return torch.where(high - low > 1e-6, (raw - low) / (high - low + 1e-8), torch.ones_like(raw))


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "rbf": _rbf,
    "linear": lambda disparity: 1 - disparity,
    "power": lambda disparity: (1 - disparity) ** 5,
    "reciprocal": _reciprocal,
    "sigmoid": lambda disparity: torch.sigmoid(-5 * (disparity - 0.5)),
}

Filter = Literal["rbf", "linear", "power", "reciprocal", "sigmoid"]


@dataclass(frozen=True)
class Consistency:
    """How far models agree at each place.

    Args:
        tokens: s [N+1, ..., V], each model's filter, with a mean of 1 over the tokens where it is not 0.
        sums: S [N+1, ...], the sum of the filter before that.
        entropies: H [N+1, ...] of the renormalised q_i, nats.
        weights: w [N+1, ...], summing to 1 over the models.
    """

    tokens: Tensor
    sums: Tensor
    entropies: Tensor
    weights: Tensor


@method(
    name="CoRE",
    arxiv="2510.13855",
    access="gray",
    summary="an ensemble that trusts tokens models agree on and models that agree and are sure; tokenizers may differ",
)
class CoRE(Projected):
    """p proportional to w_0 q_0 + sum_{i>=1} w_i q_i s_i, with q_i as in `Projected`.

        d_i = |q_i - q*|, q* = mean_i q_i                       disparity [V]
        f_i = f(d_i) where q_i + q_0 > 1e-12, else 0;  S_i = sum_v f_i(v)
        s_i = f_i / S_i * #{v : f_i(v) > 0}                     token consistency, mean 1 over its support
        m_i = S_i / (H(q_i) + floor)                            model consistency, H in nats
        m_0 = max(m_0, sum_{i>=1} m_i), if `anchor`;  w = m / sum m

    f is one of rbf: (e^-2d - e^-2) / (1 - e^-2); linear: 1 - d; power: (1 - d)^5; reciprocal: 1 / (1 + d) stretched to
    [0, 1] over all models and tokens of the place; sigmoid: 1 / (1 + e^(5(d - 1/2))).

    The released code returns the weights in place of logits, which serves a greedy choice only; here they are
    renormalised. The anchor, the mean of 1, the guards and the settings by task are from that code, not the paper.
    With N assistants d is at most N / (N+1), so for two models the filter is mild. H is computed as there, with
    probabilities of at least 1e-12, so that it never falls below about 3e-11 V and a sure assistant has a weight of
    some 10^6: then the anchor holds the main model at 1/2. A larger `floor` tempers this.

    Args:
        main, assistants, top, end_guard, substring_guard: see `Projected`. The code's early stop strings are `stop` of
            `nextoken.generate` here.
        consistency: f.
        task: "generation"; or "choice", for tasks with one answer token: m_i = 1 / (H(q_i) + floor), s_i = 1 and no
            substring guard.
        anchor: whether the main model has at least half of the weight.
        floor: added to the entropies, nats.

    Source: CoRE, arXiv:2510.13855, and its released code (zhichenz98/CoRE-EACL26).
    """

    def __init__(
        self,
        main: LanguageModel,
        assistants: Sequence[LanguageModel],
        *,
        top: int | None = 10,
        consistency: Filter = "rbf",
        task: Literal["generation", "choice"] = "generation",
        anchor: bool = True,
        floor: float = 1e-12,
        end_guard: bool = True,
        substring_guard: bool = True,
    ) -> None:
        if consistency not in _FILTERS:
            raise ValueError(f"consistency must be one of {', '.join(_FILTERS)}; got {consistency!r}")
        if task not in ("generation", "choice"):
            raise ValueError(f"task must be 'generation' or 'choice', got {task!r}")
        if not floor > 0:
            raise ValueError(f"floor must be above 0, got {floor}")
        super().__init__(
            main,
            assistants,
            top=top,
            end_guard=end_guard,
            substring_guard=substring_guard and task == "generation",
            name="core",
        )
        self.filter, self.task, self.anchor, self.floor = consistency, task, anchor, floor

    def consistency(self, shares: Tensor) -> Consistency:
        """Token and model consistency from q [N+1, ..., V]."""
        supported = shares + shares[0] > _EPSILON
        filtered = _FILTERS[self.filter]((shares - shares.mean(0)).abs()) * supported
        sums = filtered.sum(-1)
        support = (filtered != 0).sum(-1)
        tokens = filtered * (support / sums.clamp(min=_EPSILON))[..., None]
        renormalised = shares / shares.sum(-1, keepdim=True).clamp(min=_EPSILON)
        clamped = renormalised.clamp(min=_EPSILON)
        entropies = -(clamped * clamped.log()).sum(-1)
        scores = (sums if self.task == "generation" else torch.ones_like(sums)) / (entropies + self.floor)
        if self.anchor:
            scores = torch.cat([torch.maximum(scores[:1], scores[1:].sum(0, keepdim=True)), scores[1:]])
        total = scores.sum(0)
        # Where no model agrees with any (the least values of `reciprocal` are 0) nothing but the main model is left.
        nobody = torch.zeros_like(scores)
        nobody[0] = 1.0
        return Consistency(tokens, sums, entropies, torch.where(total > 0, scores / total, nobody))

    def mix(self, shares: Tensor) -> Tensor:
        found = self.consistency(shares)
        assistants = shares[1:] * (found.tokens[1:] if self.task == "generation" else 1.0)
        return found.weights[0, ..., None] * shares[0] + (found.weights[1:, ..., None] * assistants).sum(0)

    def _settings(self) -> object:
        return super()._settings(), self.filter, self.task, self.anchor, self.floor


def leading(log_probs: Tensor, top: int | None) -> Tensor:
    """p [..., V] of the `top` most probable tokens, renormalised over them, 0 elsewhere; of all if `top` is None."""
    if top is None or top >= log_probs.shape[-1]:
        return log_probs.exp()
    values, ids = log_probs.topk(top, -1)
    return torch.zeros_like(log_probs).scatter_(-1, ids, torch.softmax(values, -1))

"""Layers contrasted: what the last layer says less what an early one would have said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.head import Head, Statistics, compare_logits, statistics_from_logits
from nextoken.methods import method
from nextoken.model._derived import Derived, transformers_model
from nextoken.model._network import Network
from nextoken.model._sites import Act, Spot, decoder_layers, residual_stream, trial_tokens, watching
from nextoken.model.hf import HFModel
from nextoken.model.next import Next

Layers: TypeAlias = Literal["low", "high"] | Sequence[int]
_DEEP, _BUCKET = 40, 20  # beyond 40 layers a bucket is of the first or the last 20


@method(
    name="DoLa",
    arxiv="2309.03883",
    access="white",
    summary="the last layer's log-probabilities less those of the early layer that differs most from it",
)
class DoLa(Derived):
    """scores = log p_N - log p_j on {v : p_N(v) >= alpha max p_N}, with j = argmax over candidates of JS(p_N, p_j).

    p_N is the model's own distribution, p_j = softmax(head(norm(h_j))) that of the residual stream after layer j (0 is
    the embeddings), JS the Jensen-Shannon divergence in nats. All of it comes from one forward pass. Each position
    chooses its own j. What the result says is sharper than the model and prone to repetition; the authors decode with a
    repetition penalty of 1.2.

    The code of transformers differs in three ways: it feeds early states to the head without the final norm (as
    `norm=False` does); it takes KL((p + q) / 2 || p) in place of KL(p || (p + q) / 2), which can choose another layer;
    and it takes the mean of the divergences over a batch, so that a text's result depends on its neighbours.

    Args:
        model: a transformers model, or one derived from it, such as `Steered`.
        layers: the candidates: "low", "high" (every second one of the lower or upper half; of the first or last 20
            where there are more than 40 layers; with tied embeddings none before the second), or numbers from 0 to N.
            With N alone the scores are 0 throughout: the uniform distribution over the plausible set.
        alpha: from 0 to 1, how probable a token must be beside the likeliest to stay. At 1 only that one stays.
        norm: apply the final norm to early states. Without it they go to the head as they are.

    Raises:
        ValueError: no candidates, or candidates or an alpha out of range.
        ModelError: the model's head is not linear, or what follows its last layer could not be found.

    Source: Chuang et al., arXiv:2309.03883, sections 2.1 to 2.3.
    """

    def __init__(
        self, model: HFModel | Derived, *, layers: Layers = "low", alpha: float = 0.1, norm: bool = True
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
        network = transformers_model(model).network
        if not network.is_fused:
            raise ModelError(
                f"{model.name} has no linear head over its hidden states: its early layers cannot be read through it"
            )
        stream = residual_stream(network)
        tied = bool(getattr(network.config, "tie_word_embeddings", False))
        self.layers = candidates(layers, len(stream) - 1, tied=tied)
        self.alpha, self.norm = alpha, norm
        finish = _tail(network, stream[-1]) if norm else ()
        early = _EarlyNetwork(network, [stream[number] for number in self.layers], finish, self.layers, alpha)
        super().__init__(model, early, name=f"dola({model.name})")

    def _settings(self) -> object:
        return self.layers, self.alpha, self.norm


def candidates(layers: Layers, depth: int, *, tied: bool) -> tuple[int, ...]:
    """Numbers of the candidate layers of a model of `depth` layers.

    Args:
        layers: as for `DoLa`.
        depth: N.
        tied: whether the head's weights are those of the embeddings. Then the embedding of a token mostly says that
            token again, and the buckets leave it out.

    Raises:
        ValueError: neither a bucket nor numbers from 0 to N.
    """
    if layers == "low":
        first = min(2, depth - 1) if tied else 0
        end = depth // 2 if depth <= _DEEP else _BUCKET
        return tuple(range(first, max(end, first + 1), 2))
    if layers == "high":
        return tuple(range(depth // 2 if depth <= _DEEP else depth - _BUCKET, depth, 2))
    if isinstance(layers, str) or not layers or any(not 0 <= number <= depth for number in layers):
        raise ValueError(f"layers must be 'low', 'high' or numbers from 0 to {depth}, at least one; got {layers!r}")
    return tuple(sorted(set(layers)))


class LayersNext(Next):
    """Distributions of `DoLa`, from the states of the last and of early layers [B, n, 1 + C, H], the last one first."""

    def __init__(self, states: Tensor, head: Head, layers: Sequence[int], alpha: float) -> None:
        self.states, self.head, self.layers, self.alpha = states, head, tuple(layers), alpha
        self.shape = (states.shape[0], states.shape[1])
        self.vocab_size = head.vocab_size

    @property
    def chosen(self) -> Tensor:
        """The early layer that each distribution was contrasted with [B, n]."""
        return torch.tensor(self.layers, device=self.states.device)[self._contrast.choice]

    @property
    def divergence(self) -> Tensor:
        """JS(p_N, p_j) of the chosen layer [B, n], in nats."""
        return self._contrast.divergence

    def log_probs(self) -> Tensor:
        return self._contrast.log_probs

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        return statistics_from_logits(self.log_probs(), targets, top=top)

    def _take(self, rows: Tensor, columns: Tensor) -> LayersNext:
        device = self.states.device
        return LayersNext(self.states[rows.to(device), columns.to(device)], self.head, self.layers, self.alpha)

    @cached_property
    def _contrast(self) -> _Contrast:
        final = self._said(0)
        early, choice = self._said(1), torch.zeros(self.shape, dtype=torch.long, device=final.device)
        divergence = compare_logits(final, early).js
        # One layer after the other: there is room for the logits of a few of them, not of all.
        for number in range(1, len(self.layers)):
            said = self._said(number + 1)
            js = compare_logits(final, said).js
            further = js > divergence
            early = torch.where(further[..., None], said, early)
            choice, divergence = torch.where(further, number, choice), torch.where(further, js, divergence)
        # What only the early layer calls impossible would get an infinite score.
        scores = final - early.clamp(min=-1e4)
        floor: Tensor | float = -math.inf if self.alpha == 0 else final.amax(-1, keepdim=True) + math.log(self.alpha)
        removed = (final < floor) | (final == -torch.inf)
        return _Contrast(torch.log_softmax(scores.masked_fill(removed, -torch.inf), -1), choice, divergence)

    def _said(self, number: int) -> Tensor:
        return torch.log_softmax(self.head.logits(self.states[:, :, number]), -1)


@dataclass(frozen=True)
class _Contrast:
    """log p [B, n, V], and index and divergence [B, n] of the candidate that was chosen."""

    log_probs: Tensor
    choice: Tensor
    divergence: Tensor


class _EarlyNetwork(Network):
    """The passes of a network; raw [B, n, (1 + C) H] is its final hidden states beside those of early layers."""

    def __init__(
        self,
        network: Network,
        early: Sequence[Spot],
        finish: Sequence[nn.Module],
        layers: Sequence[int],
        alpha: float,
    ) -> None:
        vars(self).update(vars(network))
        self._passes, self._early, self._finish = network, tuple(early), tuple(finish)
        self._layers, self._alpha = tuple(layers), alpha
        self.is_fused = False  # what follows is no head over the states that a pass returns
        with torch.no_grad():
            self.run(trial_tokens(network), use_cache=False)

    def run(self, ids: Tensor, **arguments: Any) -> Tensor:
        seen: dict[int, Tensor] = {}
        acts: list[tuple[Spot, Act]] = [(spot, partial(seen.__setitem__, n)) for n, spot in enumerate(self._early)]
        with watching(acts):
            hidden = self._passes.run(ids, **arguments)
        states = [hidden]
        for number in range(len(self._early)):
            early = _through(self._finish, seen[number]).to(hidden.device, hidden.dtype)
            if early.shape != hidden.shape:
                raise ModelError(
                    f"early states of {type(self.module).__name__} are {early.shape[-1]} wide, its head takes "
                    f"{hidden.shape[-1]}: leave norm on, which applies all that follows the last layer"
                )
            states.append(early)
        return torch.cat(states, -1)

    def next(self, raw: Tensor) -> Next:
        head = self.head()
        assert head is not None
        states = raw.view(*raw.shape[:2], 1 + len(self._early), head.hidden_size).to(head.weight.device)
        return LayersNext(states, head, self._layers, self._alpha)

    def blank(self, batch: int, n: int) -> Tensor:
        return self._passes.blank(batch, n).repeat(1, 1, 1 + len(self._early))


@torch.no_grad()
def _tail(network: Network, last: Spot) -> tuple[nn.Module, ...]:
    """What the decoder runs after its last layer, in order: the final norm, in some families a projection too.

    Raises:
        ModelError: it does not make the final hidden states of what the last layer gives.
    """
    owner, layers = decoder_layers(network)
    seen: list[Tensor] = []
    called: list[nn.Module] = []

    def at_last(activations: Tensor) -> None:
        seen.append(activations)
        called.clear()

    parts = [part for part in owner.children() if part is not layers]
    acts: list[tuple[Spot, Act]] = [
        (last, at_last),
        *((Spot(part, "output", "tail"), partial(_called, called, part)) for part in parts),
    ]
    with watching(acts):
        final = network.run(trial_tokens(network), use_cache=False)
    finish = tuple(called)
    if len(seen) != 1 or not torch.allclose(_through(finish, seen[0]), final, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"what {type(network.module).__name__} does after its last layer is not a norm that could be applied to "
            "early layers; pass norm=False"
        )
    return finish


def _called(called: list[nn.Module], part: nn.Module, activations: Tensor) -> None:
    called.append(part)


def _through(modules: Sequence[nn.Module], states: Tensor) -> Tensor:
    for module in modules:
        states = module(states)
    return states

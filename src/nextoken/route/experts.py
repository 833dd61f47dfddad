"""DynaMoE: experts in place of every feed-forward block, of which a token takes as many as its scores call for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.methods import method
from nextoken.model import _saved
from nextoken.model.hf import HFModel
from nextoken.route._feed_forward import FeedForward, depth_of, initial_scale, with_blocks
from nextoken.route._width import AdaptiveWidth

_WHAT = "experts"


@dataclass(frozen=True)
class ExpertRouting(ABC):
    """Which experts a token takes: those whose probability reaches a threshold, at least 1 and at most `max_active`.

    Args:
        tau: the level of the quantile that is the threshold. 0 takes all experts, 1 the best alone.
        max_active: K_max; of more experts the most probable are taken. None for all that a layer has.
    """

    tau: float = 0.5
    max_active: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be from 0 to 1, got {self.tau}")
        if self.max_active is not None and self.max_active < 1:
            raise ValueError(f"max_active must be at least 1, got {self.max_active}")

    @abstractmethod
    def reaches(self, scores: Tensor, threshold: Tensor) -> Tensor:
        """Boolean [N, E]: which probabilities [N, E] reach the threshold; `threshold` is the layer's stored one."""

    def select(self, scores: Tensor, threshold: Tensor) -> Tensor:
        """Boolean [N, E]: the active experts. With probabilities [N, E]; no row depends on another."""
        if self.tau in (0, 1):
            wanted = torch.full_like(scores, self.tau == 0, dtype=torch.bool)
        else:
            wanted = self.reaches(scores, threshold)
        best = torch.zeros_like(wanted).scatter_(-1, scores.argmax(-1, keepdim=True), True)
        active = wanted | best
        if self.max_active is not None and self.max_active < scores.shape[-1]:
            leaders = scores.masked_fill(~active, -1.0).topk(self.max_active, -1).indices
            active = active & torch.zeros_like(active).scatter_(-1, leaders, True)
        return active

    def quantile(self, scores: Tensor) -> Tensor:
        """The tau-quantile of all probabilities [N, E] together: of the sorted ones, number ceil(tau (N E - 1))."""
        ordered = scores.flatten().sort().values
        return ordered[-int(-self.tau * (len(ordered) - 1) // 1)]


@dataclass(frozen=True)
class ThresholdRouting(ExpertRouting):
    """{e : pi_e >= theta}, theta the tau-quantile over tokens AND experts, as a moving average kept from training.

    Probabilities and not raw scores are compared, so that a token of which the router is sure takes few experts. theta
    is a number of the layer by the time the model is used: no text's result depends on another's. About (1 - tau) E of
    the experts are taken on average, more by some tokens and fewer by others. Of two experts the probabilities mirror
    each other, so that at tau = 0.5 every token takes one.
    """

    def reaches(self, scores: Tensor, threshold: Tensor) -> Tensor:
        return scores >= threshold


@dataclass(frozen=True)
class TokenQuantileRouting(ExpertRouting):
    """{e : pi_e >= theta}, theta the tau-quantile of the token's OWN probabilities, linear between neighbours.

    Then every token takes the same number of experts, E - ceil(tau (E - 1)): it is top-K in other words, and here to
    show so.
    """

    def reaches(self, scores: Tensor, threshold: Tensor) -> Tensor:
        return scores >= torch.quantile(scores, self.tau, -1, keepdim=True)


_ROUTINGS: dict[str, type[ExpertRouting]] = {kind.__name__: kind for kind in (ThresholdRouting, TokenQuantileRouting)}


@dataclass(frozen=True, eq=False)
class Routed:
    """What the router of a layer said in a pass: probabilities [..., E] and which experts were active [..., E]."""

    scores: Tensor
    active: Tensor


class ExpertBlock(nn.Module):
    """y = sum_{e in A(x)} pi_e Expert_e(x) / sum_{A(x)} pi_e [..., H], with pi = softmax(W x) [..., E].

    Gradients reach the router through pi of the active experts only.

    Args:
        experts: E of them.
        router: W [E, H].
        routing: A(x).
    """

    threshold: Tensor

    def __init__(self, experts: Sequence[FeedForward], router: Tensor, *, routing: ExpertRouting) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Parameter(router.to(experts[0].gate_proj.weight))
        self.routing = routing
        # The mean of any probabilities over E, until there is a quantile.
        self.register_buffer("threshold", torch.tensor(1 / len(experts), device=self.router.device))
        self.last: Routed | None = None

    @property
    def expert(self) -> FeedForward:
        """One of the experts, which are alike but for their weights."""
        first = self.experts[0]
        assert isinstance(first, FeedForward)
        return first

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores = torch.softmax(nn.functional.linear(flat, self.router).float(), -1)
        active = self.routing.select(scores.detach(), self.threshold)
        shares = scores * active
        shares = (shares / shares.sum(-1, keepdim=True)).to(flat.dtype)
        made = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            where = active[:, number].nonzero()[:, 0]
            if len(where) == len(
                flat
            ):  # in the shape it came in, so that one expert is the dense block to the last bit
                made = made + shares[:, number, None] * expert(hidden).reshape(flat.shape)
            elif len(where):
                made = made.index_add(0, where, shares[where, number, None] * expert(flat[where]))
        self.last = Routed(scores.view(*hidden.shape[:-1], -1), active.view(*hidden.shape[:-1], -1))
        return made.view(hidden.shape)


@method(
    name="DynaMoE",
    arxiv="2603.01697",
    access="white",
    trained=True,
    summary="experts by depth schedule, of which each token takes as many as reach a threshold",
)
class DynaMoE(AdaptiveWidth):
    """The model with x + sum_{e in A_l(x)} pi_e / sum_A pi Expert_{l,e}(norm(x)) in place of x + FFN_l(norm(x)).

        experts = depth_schedule("descending", 5, least=1, most=3)
        moe = DynaMoE.upcycled(load("nano"), experts=experts, routing=ThresholdRouting(0.5))
        fit_experts(moe, rows)

    It has weights of its own, all of them copied: `model` stays as it is. Where a probability falls within rounding of
    the threshold, another batch may decide otherwise.

    Args:
        model: a transformers model built like Llama.
        blocks: made of each layer's feed-forward block, by `upcycled` or `fresh`.

    Raises:
        ModelError: the model is built otherwise.
        ValueError: there is not one number of experts, at least 1, per layer.

    Source: DynaMoE, arXiv:2603.01697; gate, percentile and schedules are reconstructed from its abstract and
    introduction.
    """

    def __init__(
        self,
        model: HFModel,
        *,
        experts: Sequence[int],
        routing: ExpertRouting,
        width: int | None,
        seed: int,
    ) -> None:
        """See `upcycled` (`width` None) and `fresh`."""
        depth = depth_of(model)
        if len(experts) != depth or min(experts) < 1:
            raise ValueError(f"{model.name} has {depth} layers: give as many numbers of experts from 1; got {experts}")
        if width is not None and width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        generator, scale = torch.Generator().manual_seed(seed), initial_scale(model)

        def block(dense: FeedForward, number: int) -> ExpertBlock:
            router = scale * torch.randn(experts[number], dense.hidden, generator=generator)
            some = [
                FeedForward.of(dense) if width is None else dense.new(width, scale=scale, generator=generator)
                for _ in range(experts[number])
            ]
            return ExpertBlock(some, router, routing=routing)

        changed = with_blocks(model, block, name=f"dynamoe({model.name})")
        layers = [part for part in changed.model.modules() if isinstance(part, ExpertBlock)]
        parts = [[("router", part.router.numel()), ("an expert", part.expert.size)] for part in layers]
        super().__init__(changed, layers, parts=parts, base=model.digest)
        self.blocks, self.routing = tuple(layers), routing
        self._made: dict[str, Any] = {"experts": list(experts), "width": width, "seed": seed}

    @classmethod
    def upcycled(
        cls, model: HFModel, *, experts: Sequence[int], routing: ExpertRouting | None = None, seed: int = 0
    ) -> DynaMoE:
        """Every expert a copy of the layer's own block, so that before training all routes say what `model` says.

        Args:
            experts: E_l per layer, see `depth_schedule`.
            routing: `ThresholdRouting()` by default.
            seed: of the routers.
        """
        return cls(model, experts=experts, routing=routing or ThresholdRouting(), width=None, seed=seed)

    @classmethod
    def fresh(
        cls,
        model: HFModel,
        *,
        experts: Sequence[int],
        width: int,
        routing: ExpertRouting | None = None,
        seed: int = 0,
    ) -> DynaMoE:
        """Experts of `width` inner units with new weights, to be trained from scratch.

        Args:
            experts, routing, seed: as of `upcycled`; the seed is that of the experts' weights too.
            width: m of each expert.
        """
        return cls(model, experts=experts, routing=routing or ThresholdRouting(), width=width, seed=seed)

    def save(self, folder: str | Path) -> None:
        """Write weights, thresholds and settings to a folder.

        Raises:
            OutputError: it cannot be written.
        """
        settings = {**self._made, "routing": {"kind": type(self.routing).__name__, **asdict(self.routing)}}
        digests = {"model": self.base, "vocabulary": self.vocab.digest}
        _saved.save(folder, _WHAT, settings=settings, weights=self.inner.model.state_dict(), digests=digests)

    @classmethod
    def load(cls, folder: str | Path, model: HFModel) -> DynaMoE:
        """What `save` wrote.

        Args:
            folder: where.
            model: the one whose blocks were replaced.

        Raises:
            ModelError: there is nothing whole in the folder, or it was made of another model.
        """
        saved = _saved.load(folder, _WHAT)
        saved.check(model=model.digest, vocabulary=model.vocab.digest)
        try:
            settings = dict(saved.settings)
            told = dict(settings.pop("routing"))
            made = cls(model, routing=_ROUTINGS[told.pop("kind")](**told), **settings)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"the settings of the experts in {folder} are not whole ({error}); save them again"
            ) from error
        saved.fill(made.inner.model)
        return made

    def _settings(self) -> object:
        # The thresholds are no weights, and may have changed since those were last looked at.
        return self.routing, [float(block.threshold) for block in self.blocks]

    def _reads(self, present: Tensor) -> Sequence[Sequence[int]]:
        reads = []
        for block in self.blocks:
            assert block.last is not None
            reads.append([int(present.sum()), int(block.last.active[present.to(block.last.active.device)].sum())])
        return reads

"""Contrasts: two contexts or two models, one distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.combined import Branch, Combined

_REMOVED = float("-inf")


def _prefix(model: LanguageModel, text: str) -> tuple[int, ...]:
    begin = () if model.vocab.bos_id is None else (model.vocab.bos_id,)
    return (*begin, *model.vocab.encode(text).ids)


def _plausible(log_probs: Tensor, alpha: float) -> Tensor:
    """{v : p(v) >= alpha max p}, as a mask."""
    if alpha == 0:
        return torch.ones_like(log_probs, dtype=torch.bool)
    return log_probs >= log_probs.amax(-1, keepdim=True) + math.log(alpha)


def _weighted(log_probs: Tensor, weight: float) -> Tensor:
    """weight * log p where an impossible token stays impossible, or is left out at weight 0."""
    return torch.zeros_like(log_probs) if weight == 0 else weight * log_probs


def _check_finite(**settings: float) -> None:
    for name, value in settings.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a number, got {value}")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")


@method(
    name="Contrastive decoding",
    arxiv="2210.15097",
    access="gray",
    summary="an expert's log-probabilities less an amateur's, among the expert's plausible tokens",
)
class Contrastive(Combined):
    """scores = (1 + beta) log p_expert - beta log p_amateur on {v : p_expert(v) >= alpha max p_expert}.

    With beta = 0 and alpha = 0 it is the expert. `beta=None` gives Li et al.'s log p_expert - log p_amateur.

    Args:
        expert, amateur: models over one vocabulary.
        alpha: of the plausible set.
        beta: strength; 0.5 is O'Brien and Lewis' (arXiv:2309.09117).
        temperature: the amateur's.

    Source: Li et al., arXiv:2210.15097.
    """

    def __init__(
        self,
        expert: LanguageModel,
        amateur: LanguageModel,
        *,
        alpha: float = 0.1,
        beta: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        _check_share("alpha", alpha)
        _check_finite(temperature=temperature, beta=0.0 if beta is None else beta)
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        super().__init__([Branch(expert), Branch(amateur)], name=f"contrastive({expert.name}, {amateur.name})")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def combine(self, log_probs: Sequence[Tensor]) -> Tensor:
        expert, amateur = log_probs
        if self.temperature != 1:
            amateur = torch.log_softmax(amateur / self.temperature, -1)
        plus, minus = (1.0, 1.0) if self.beta is None else (1 + self.beta, self.beta)
        # What the expert calls impossible stays so; what only the amateur does would get an infinite score.
        scores = plus * expert - _weighted(amateur.clamp(min=-1e4), minus)
        return scores.masked_fill(~_plausible(expert, self.alpha) | (expert == _REMOVED), _REMOVED)

    def _settings(self) -> object:
        return self.alpha, self.beta, self.temperature


@method(
    name="Classifier-free guidance",
    arxiv="2306.17806",
    access="gray",
    summary="the distribution under a prompt, moved away from that under another",
)
class Guided(Combined):
    """scores = log p_u + scale (log p_c - log p_u), c with the prompt, u with the negative one.

    The texts of this model are continuations: their begin token stands for the prompt. scale 1 is the model under its
    prompt, 0 under the negative one. Context-aware decoding with strength a (arXiv:2305.14739) is scale = 1 + a with
    the prompt without its context as the negative one.

    Source: Sanchez et al., arXiv:2306.17806.
    """

    def __init__(self, model: LanguageModel, prompt: str, *, negative: str = "", scale: float = 1.5) -> None:
        _check_finite(scale=scale)
        branches = [Branch(model, _prefix(model, prompt)), Branch(model, _prefix(model, negative))]
        super().__init__(branches, name=f"guided({model.name})")
        self.scale = scale

    def combine(self, log_probs: Sequence[Tensor]) -> Tensor:
        conditional, other = log_probs
        scores = _weighted(conditional, self.scale) + _weighted(other, 1 - self.scale)
        # An impossible token under either context has an infinite score of one sign or no number: it stays impossible.
        return scores.masked_fill(_impossible(conditional, other, self.scale), _REMOVED)

    def _settings(self) -> object:
        return self.scale


def _impossible(conditional: Tensor, other: Tensor, scale: float) -> Tensor:
    gone = conditional == _REMOVED if scale != 0 else torch.zeros_like(conditional, dtype=torch.bool)
    return gone | (other == _REMOVED) if scale != 1 else gone


@method(
    name="USCD",
    arxiv="2409.05923",
    access="gray",
    summary="contrast with a prompt without its examples, only where the model is unsure",
)
class Selective(Combined):
    """Where sum p^2 > collision: log p. Else log(p - weight n) on {v : p(v) >= kappa / V}, n under the lame prompt.

    The contrast is of probabilities; tokens with p <= weight n are removed. The official gate is the deviation of p's
    entries, std > theta, which is the same as collision > theta^2 (V - 1) + 1 / V and so depends on V: `std_threshold`
    gives it for parity. Both branches follow the tokens drawn from the combined distribution.

    Args:
        model: any.
        prompt: the whole prompt.
        lame: the same without its examples.
        weight: w in (0, 1), 0.7 in the released runs.
        collision: gate; above it the model is sure.
        std_threshold: theta; if given, `collision` plays no part.
        kappa: of the plausible set.

    Source: Wang et al., arXiv:2409.05923, and its released code.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: str,
        *,
        lame: str,
        weight: float = 0.7,
        collision: float = 0.4,
        std_threshold: float | None = None,
        kappa: float = 1 / 3,
    ) -> None:
        if not 0 <= weight < 1:
            raise ValueError(f"weight must be at least 0 and below 1, got {weight}")
        _check_share("collision", collision)
        _check_finite(kappa=kappa, std_threshold=0.0 if std_threshold is None else std_threshold)
        if kappa < 0:
            raise ValueError(f"kappa must be at least 0, got {kappa}")
        branches = [Branch(model, _prefix(model, prompt)), Branch(model, _prefix(model, lame))]
        super().__init__(branches, name=f"uscd({model.name})")
        size = model.vocab.size
        self.weight, self.kappa = weight, kappa
        self.collision = collision if std_threshold is None else std_threshold**2 * (size - 1) + 1 / size

    def combine(self, log_probs: Sequence[Tensor]) -> Tensor:
        full, lame = log_probs
        p, n = full.exp(), lame.exp()
        sure = p.square().sum(-1, keepdim=True) > self.collision
        difference = (p - self.weight * n).clamp(min=0.0)
        contrast = difference.log().masked_fill(p < self.kappa / p.shape[-1], _REMOVED)
        # A token with p >= n always survives the difference, but perhaps not kappa: then the model is left as it is.
        empty = (contrast == _REMOVED).all(-1, keepdim=True)
        return torch.where(sure | empty, full, contrast)

    def _settings(self) -> object:
        return self.weight, self.collision, self.kappa


@method(
    name="RITUAL",
    arxiv="2405.17821",
    access="gray",
    summary="log-probabilities under transformed views of the input, added to the model's own",
)
class Complemented(Combined):
    """scores = log p + alpha mean_i log p_i on {v : p(v) >= beta max p}, p_i under the i-th view of the prompt.

    The paper's views are image transformations; here they are texts of the same meaning (paraphrases, passages in
    another order). With equal views the scores are (1 + alpha) log p: a temperature of 1 / (1 + alpha), the control to
    compare with. `normalised=True` divides by 1 + alpha to take this sharpening out.

    Source: Woo et al., arXiv:2405.17821.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: str,
        *,
        views: Sequence[str],
        alpha: float = 3.0,
        beta: float = 0.1,
        normalised: bool = False,
    ) -> None:
        _check_share("beta", beta)
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        if not views:
            raise ValueError("views needs at least one text of the prompt's meaning")
        branches = [Branch(model, _prefix(model, text)) for text in (prompt, *views)]
        super().__init__(branches, name=f"ritual({model.name})")
        self.alpha, self.beta, self.normalised = alpha, beta, normalised

    def combine(self, log_probs: Sequence[Tensor]) -> Tensor:
        own, *views = log_probs
        scores = own + _weighted(torch.stack(views).mean(0), self.alpha)
        scores = scores / (1 + self.alpha) if self.normalised else scores
        # Where the views leave no token possible, or none that is plausible, the model is left as it is.
        fallback = torch.where(torch.isfinite(scores).any(-1, keepdim=True), scores, own)
        masked = fallback.masked_fill(~_plausible(own, self.beta), _REMOVED)
        return torch.where(torch.isfinite(masked).any(-1, keepdim=True), masked, own)

    def _settings(self) -> object:
        return self.alpha, self.beta, self.normalised

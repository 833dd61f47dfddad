"""Rectified: a model whose every next token is capped by the chance of still ending well after it."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from nextoken.head import Statistics, statistics_from_logits
from nextoken.methods import method
from nextoken.model.base import LanguageModel, State, Tokens
from nextoken.model.combined import InStep
from nextoken.model.next import Next
from nextoken.model.value import ValueModel

Rule = Literal["exact", "two_pass", "reweight"]
FLOOR = 1e-7
"""The least cap, so that a distribution is left where every token is a dead end."""


def caps(values: Tensor, *, eps: float = 0.0) -> Tensor:
    """c = clamp(1 + Q - eps, 1e-7, 1) [..., V] in float64: the most probability each token may have."""
    return (1 + values.double() - eps).clamp(FLOOR, 1.0)


def is_dead_end(log_probs: Tensor, cap: Tensor) -> Tensor:
    """Whether the caps of the possible tokens sum to less than 1 [...], so that no distribution keeps them all."""
    return cap.masked_fill(log_probs == float("-inf"), 0.0).sum(-1) < 1


def rectify(log_probs: Tensor, cap: Tensor, *, rule: Rule = "exact") -> Tensor:
    """log p' [..., V] in float64 from log p and caps c, both [..., V].

    - `exact`: p' = min(k p, c) with the k of sum_a min(k p(a), c(a)) = 1; c / sum c over the possible tokens where
      these sum to less than 1.
    - `two_pass`: p' = min(p, c) renormalised, and the same of that with the same caps, which renormalising exceeds
      again.
    - `reweight`: p' proportional to p c. No cap: a token well below its cap loses by it too.
    """
    log_p, log_c = torch.log_softmax(log_probs.double(), -1), cap.double().log()
    if rule == "reweight":
        return torch.log_softmax(log_p + log_c, -1)
    if rule == "two_pass":
        for _ in range(2):
            log_p = torch.log_softmax(torch.minimum(log_p, log_c), -1)
        return log_p
    capped = torch.minimum(log_p + _log_scale(log_p, log_c), log_c)
    # Impossible tokens stay so where k is infinite. At a dead end this is c; elsewhere it sums to 1 up to rounding.
    return torch.log_softmax(capped.masked_fill(log_p == float("-inf"), float("-inf")), -1)


def _log_scale(log_p: Tensor, log_c: Tensor) -> Tensor:
    """log k [..., 1] with sum min(k p, c) = 1; infinite where the caps of the possible tokens sum to less.

    The sum is concave in k and made of straight pieces, so Newton's steps from k = 1 never pass its root and end at it:
    each caps the tokens that k p has reached and gives the others what is left.
    """
    ratio = torch.where(log_p > float("-inf"), log_c - log_p, float("inf"))
    p, c = log_p.exp(), log_c.exp().masked_fill(ratio == float("inf"), 0.0)
    scale = torch.zeros_like(p[..., :1])
    while True:
        reached = ratio <= scale
        left = 1 - c.masked_fill(~reached, 0.0).sum(-1, keepdim=True)
        others = p.masked_fill(reached, 0.0).sum(-1, keepdim=True)
        # With no token left to scale k has no bound.
        step = torch.where(others > 0, left.clamp(min=0.0) / others, float("inf")).log()
        if not bool((step > scale).any()):
            return scale
        scale = torch.maximum(scale, step)


class RectifiedNext(Next):
    """Distributions of a rectified model, computed when asked for.

    Args:
        base: those of the model.
        values: Q [B, n, V].
        eps, rule: as of `Rectified`.
    """

    def __init__(self, base: Next, values: Tensor, *, eps: float, rule: Rule) -> None:
        self.base, self.values, self.eps, self.rule = base, values, eps, rule
        self.shape, self.vocab_size = base.shape, base.vocab_size

    @cached_property
    def is_dead_end(self) -> Tensor:
        """Whether no distribution keeps the security condition here [B, n]."""
        log_probs = self.base.log_probs()
        return is_dead_end(log_probs, self._caps(log_probs.device))

    def log_probs(self) -> Tensor:
        log_probs = self.base.log_probs()
        return rectify(log_probs, self._caps(log_probs.device), rule=self.rule).to(log_probs.dtype)

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        return statistics_from_logits(self.log_probs(), targets, top=top)

    def _caps(self, device: torch.device) -> Tensor:
        return caps(self.values.to(device), eps=self.eps)

    def _take(self, rows: Tensor, columns: Tensor) -> RectifiedNext:
        values = self.values[rows.to(self.values.device), columns.to(self.values.device)]
        return RectifiedNext(self.base._take(rows, columns), values, eps=self.eps, rule=self.rule)


@method(
    name="Rectification",
    arxiv="2302.14003",
    access="gray",
    trained=True,
    summary="every token's probability capped by the chance of still ending well after it",
)
class Rectified(LanguageModel):
    """p'(a | s) = min(k p(a | s), c(a)) with c = clamp(1 + Q(s, a) - eps, 1e-7, 1) and k such that it sums to 1.

    -Q(s, a) is the probability that a text going on with a ends as it should not. Security condition: a token that
    leads to an undesired ending with probability 1 - x or more is drawn with probability x at most; it holds for every
    x at once just if p'(a | s) <= 1 + Q(s, a). Early in a text this is a soft limit, at its last token a hard one.
    Tokens at less than their cap keep their relative odds. The condition binds single tokens: the chance of an
    undesired ending mostly falls, but need not.

    Where the caps of the possible tokens sum to less than 1 no distribution keeps the condition: c / sum c is used, and
    `is_dead_end` of what `extend` and `predict` return says so. Of a text that has gone wrong already all caps are low,
    so what follows is nearly even over the vocabulary: end such a text there.

    Args:
        model: any language model that gives whole distributions.
        value: over the same vocabulary, from -1 to 0.
        eps: tightens the caps; 0 to 0.3 in the paper. At 1 every token is equally probable.
        rule: `exact` as above. `two_pass` is the released code: min(p, c) renormalised, twice, which leaves a token
            that was far above its cap above it still. `reweight` is not the paper's: p (1 + Q - eps) renormalised,
            which also takes from tokens below their cap; a baseline in the manner of FUDGE (arXiv:2104.05218). With
            the model's own exact values and eps 0 it is the model given that the text ends well, of all ways to rule
            out undesired endings the one of least divergence.

    Raises:
        ValueError: the vocabularies differ, the value has other bounds, the model tells only its top tokens, or an
            argument is out of range.

    Source: Cao et al., arXiv:2302.14003, section 3, and its released code (src/inference.py; earlier versions of it cap
    three times). The exact rule is ours: the paper leaves open how what was taken is given back.
    """

    def __init__(self, model: LanguageModel, value: ValueModel, *, eps: float = 0.0, rule: Rule = "exact") -> None:
        if model.is_partial:
            raise ValueError(f"{model.name} tells only its most probable tokens; whole distributions are needed")
        if value.vocab.digest != model.vocab.digest:
            raise ValueError(
                f"{value.name} and {model.name} have different vocabularies, so the value's tokens are others; train "
                "a value whose body has the model's tokenizer"
            )
        if (value.low, value.high) != (-1.0, 0.0):
            raise ValueError(
                f"{value.name} is from {value.low} to {value.high}; a rectified model needs minus the probability of "
                "an undesired ending, from -1 to 0"
            )
        if not 0 <= eps <= 1:
            raise ValueError(f"eps must be from 0 to 1, got {eps}")
        if rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}; got {rule!r}")
        self.model, self.value, self.eps, self.rule = model, value, eps, rule
        self.name, self.vocab = f"rectified({model.name})", model.vocab
        limits = [part.context_length for part in (model, value) if part.context_length is not None]
        self.context_length = min(limits, default=None)
        self.supports_trees = model.supports_trees and value.supports_trees

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def digest(self) -> str:
        parts = (self.model.digest, self.value.digest, self.eps, self.rule)
        return hashlib.sha256(repr(("Rectified", *parts)).encode()).hexdigest()[:16]

    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> RectifiedNext:
        """As of `LanguageModel.extend`; the result also tells where there is a dead end."""
        following = super().extend(state, tokens, parents)
        assert isinstance(following, RectifiedNext)
        return following

    def predict(self, tokens: Tokens) -> RectifiedNext:
        """As of `LanguageModel.predict`; the result also tells where there is a dead end."""
        following = super().predict(tokens)
        assert isinstance(following, RectifiedNext)
        return following

    def _remember(self, batch: int) -> InStep:
        return InStep([self.model.start(batch), self.value.start(batch)])

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> RectifiedNext:
        memory = state.memory
        assert isinstance(memory, InStep)
        own, valued = memory.states
        following = self.model.extend(own, tokens, parents)
        return RectifiedNext(following, self.value.extend(valued, tokens, parents), eps=self.eps, rule=self.rule)

    def _predict(self, tokens: Tensor) -> RectifiedNext:
        following = self.model.predict(tokens)
        return RectifiedNext(following, self.value.predict(tokens), eps=self.eps, rule=self.rule)

"""R2R: a small model writes, and the tokens that would lead elsewhere are left to a large one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nextoken.head import Statistics, statistics_from_logits
from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.next import Next
from nextoken.route.cost import Cost, Spent
from nextoken.route.switch_rule import LARGE, SMALL, Standing, SwitchRule
from nextoken.route.switched_next import SwitchedNext
from nextoken.route.switching import Switching
from nextoken.route.token_router import TokenRouter, sights


@dataclass(frozen=True)
class Routed:
    """Who answers."""

    active: int


@dataclass(frozen=True)
class RoutingRule(SwitchRule):
    """Large where the router routes one of the `candidates` tokens that the small model holds most probable.

    Its sights are these tokens, y where y is routed and -1 - y where it is kept.
    """

    small: LanguageModel = field(repr=False)
    router: TokenRouter = field(repr=False)
    router_digest: str
    threshold: float
    candidates: int
    watches = False
    looks = True

    def begin(self) -> Routed:
        return Routed(SMALL)

    def look(self, said: Next) -> Tensor:
        found = []
        for sight in sights(said):
            logits = sight.logits
            # Of equal logits argmax names the first, as greedy decoding does; topk names any.
            one = self.candidates == 1
            tokens = logits.argmax(-1, keepdim=True) if one else logits.topk(self.candidates).indices
            scores = self.router.scores(self.small, sight, tokens)
            found.append(torch.where(scores.to(tokens.device) >= self.threshold, tokens, -1 - tokens))
        return torch.cat(found, 1)

    def seen(self, standing: Standing, sight: Sequence[float]) -> Routed:
        return Routed(LARGE if any(token >= 0 for token in sight) else SMALL)


@method(
    name="R2R",
    arxiv="2505.21600",
    access="white",
    trained=True,
    summary="a learned router leaves single tokens that would change the course of a text to a large model",
)
class R2R(Switching):
    """p(v | s) = p_small(v | s) [v not in A] + p_small(A | s) p_large(v | s), A = {y : score(y | s) >= threshold}.

    That is the law of the paper's step: the small model draws y; where the router scores it high, a draw of the large
    model takes its place. The router is asked about the `candidates` tokens that the small model holds most probable,
    and all others share the fate of the last of these:

    - 1, the default: the fate of the small model's best token is that of the place, so that p is wholly the small or
      wholly the large model's. With "greedy" it is the paper's procedure at temperature 0, by which its labels are
      made, and the large model reads nothing where a token is kept.
    - V: the law of sampling, exactly. The large model is needed wherever any token is routed, and the router is asked V
      times per place: for reading and for proofs rather than for speed. A `transform` acts on the mixture, which is
      not what the paper does at a temperature other than 1. Between 1 and V lies an approximation.

    With a threshold above 1 it is the small model and at 0 the large one, to the bit. The small model reads every
    token, and the large one, at its turn, all that it has not seen in one pass. Of a call with many tokens, such as a
    prompt, it reads all if its turn comes anywhere in it.

    `spent` has three parts: the small model, the router (which reads as many tokens as it scores, and gives no
    distribution) and the large model, whose `said` counts the places where it had a share.

    Args:
        small, large: over one vocabulary, giving whole distributions.
        router: a `NeuralRouter` trained for the two by `fit_token_router`, or an `EntropyRouter`.
        threshold: from which score on tokens are routed; the router's own by default.
        candidates: as above.
        parameters: activated per token by each model; counted where they are transformers networks.

    Raises:
        ModelError: the router was trained with other models.
        ValueError: as `Switching`, or a setting is out of range.

    Source: R2R (Roads to Rome), arXiv:2505.21600, section 4. Only the routed token is the large model's: nothing is
    verified, so the law is neither model's. The paper counts the small model's parameters only for the tokens it
    answers (`Cost.answering`); `Cost.activated` has it at every token, with the router and what is read to catch up.
    """

    def __init__(
        self,
        small: LanguageModel,
        large: LanguageModel,
        *,
        router: TokenRouter,
        threshold: float | None = None,
        candidates: int = 1,
        parameters: tuple[int, int] | None = None,
    ) -> None:
        limit = router.threshold if threshold is None else float(threshold)
        if math.isnan(limit):
            raise ValueError("the threshold is NaN; give a score from which on tokens are routed")
        if not 1 <= candidates <= small.vocab.size:
            raise ValueError(f"candidates must be from 1 to the {small.vocab.size} tokens there are, got {candidates}")
        rule = RoutingRule(small, router, router.digest, limit, candidates)
        super().__init__(small, large, rule=rule, parameters=parameters, name=f"r2r({small.name}, {large.name})")
        router.check(small, large)
        self.router, self.threshold, self.candidates = router, limit, candidates

    @property
    def spent(self) -> Cost:
        small, large = super().spent.models
        asked = Spent("router", self.router.parameters, small.passes, small.read * self.candidates)
        return Cost((small, asked, large))

    def _answered(self, said: SwitchedNext, sights: Tensor | None) -> SwitchedNext:
        if self.candidates == 1 or sights is None or len(said.parts) == 1:
            return said
        routed = (sights >= 0).cpu()
        mixed = said.is_large & ~routed.all(-1)
        if not bool(mixed.any()):
            return said
        # The small model has read first, the large one then all rows that need it.
        small, large = said.parts
        choice = torch.where(mixed, len(said.parts), said.choice)
        return SwitchedNext([small, large, MixedNext(small, large, sights)], choice, said.is_large)


class MixedNext(Next):
    """p(v) = p_small(v) [v not in A] + p_small(A) p_large(v).

    Args:
        small, large: of one shape and vocabulary.
        sights: [B, n, m], A as `RoutingRule` tells it: y for a routed candidate, -1 - y for another, and all that are
            no candidates as the last.
    """

    def __init__(self, small: Next, large: Next, sights: Tensor) -> None:
        self.small, self.large, self.sights = small, large, sights
        self.shape, self.vocab_size = small.shape, small.vocab_size

    def log_probs(self) -> Tensor:
        own, routed = self._own
        share = own.masked_fill(~routed, -math.inf).logsumexp(-1, keepdim=True)
        other = self.large.log_probs().to(own.device)
        return torch.logaddexp(own.masked_fill(routed, -math.inf), share + other)

    @property
    def share(self) -> Tensor:
        """p_small(A) [B, n]: how often the large model would be asked, if tokens were drawn one by one."""
        own, routed = self._own
        return own.exp().masked_fill(~routed, 0.0).sum(-1)

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        return statistics_from_logits(self.log_probs(), targets, top=top)

    @cached_property
    def _own(self) -> tuple[Tensor, Tensor]:
        """log p_small [B, n, V], and which tokens are in A."""
        own = self.small.log_probs()
        sights = self.sights.to(own.device)
        routed = (sights[..., -1:] >= 0).expand(own.shape).clone()
        routed.scatter_(-1, torch.where(sights >= 0, sights, -1 - sights), sights >= 0)
        return own, routed

    def _take(self, rows: Tensor, columns: Tensor) -> MixedNext:
        return MixedNext(self.small._take(rows, columns), self.large._take(rows, columns), self.sights[rows, columns])

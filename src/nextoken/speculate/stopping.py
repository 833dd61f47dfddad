"""StoppingDraft: a chain of guesses that ends where one of them has probably failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.next import Next
from nextoken.speculate.acceptance_head import AcceptanceHead, hidden_width
from nextoken.speculate.draft import ROOT
from nextoken.speculate.draft_model import DraftModel
from nextoken.speculate.shapes import Growth, Plan, Shape


@dataclass(frozen=True)
class StoppingRule:
    """Stop once 1 - A >= h, A = prod a_i the predicted chance that all guesses so far stand.

    Args:
        threshold: h; 0 stops after `least` guesses and 1 after `most`. Larger ones draft for longer.
        least, most: guesses per pass.
    """

    threshold: float = 0.3
    least: int = 1
    most: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a probability and must be from 0 to 1, got {self.threshold}")
        if not 1 <= self.least <= self.most:
            raise ValueError(f"1 <= least <= most must hold, got {self.least} and {self.most}")

    def stops(self, guesses: int, log_alive: float) -> bool:
        """Whether to stop after this many guesses, log A in nats being what is known of them."""
        if guesses < self.least:
            return False
        return guesses >= self.most or log_alive <= (math.log1p(-self.threshold) if self.threshold < 1 else -math.inf)


def stopping_bound(discard_cost: float, pass_cost: float, *, saving: float = 0.0) -> float:
    """(c2 + D) / (c1 + c2 + D): where the chance that some guess was rejected is at least this, stopping is best.

    If a guess was rejected, every further one costs c1 and changes nothing; if none was, to go on saves c2 + D at most.
    The bound is one-sided: below it, stopping may be best or not. D depends on the models and is seldom known, which
    is why a threshold is chosen by trial.

    Args:
        discard_cost: c1, of a guess that does not stand, in any unit of time.
        pass_cost: c2, of a pass of the target, in the same unit.
        saving: D, the most that going on can save beyond a pass when all guesses stand.

    Raises:
        ValueError: a cost is not above 0, or the saving is below 0.

    Source: Huang et al., arXiv:2405.19715, theorem 3.1.
    """
    if discard_cost <= 0 or pass_cost <= 0 or saving < 0:
        raise ValueError(
            f"costs must be above 0 and the saving at least 0, got {discard_cost}, {pass_cost} and {saving}"
        )
    return (pass_cost + saving) / (discard_cost + pass_cost + saving)


@method(
    name="SpecDec++",
    arxiv="2405.19715",
    access="white",
    trained=True,
    summary="a head on the draft's hidden states tells when to stop drafting",
)
class StoppingDraft(DraftModel):
    """A chain drawn from q that stops after x_s if 1 - prod_{i < s} a_i >= h, a_i told by the head from the draft's
    hidden state [H] at x_i.

    a_i is the predicted chance that x_i stands given those before it. The newest guess is not judged: its hidden state
    is there only once it was fed, which already gives the distribution of the next one. Whether to go on thus depends
    on the prefix and on guesses that stay in the draft, so that every lossless rule keeps the law, whatever the head
    says. Nothing follows an end token.

    Chances are learnt for sampling at temperature 1; at other settings, and where the best tokens are chosen, the
    stopping is only less apt.

    Args:
        model: the draft, one that gives hidden states.
        head: see `acceptance_fit.fit_acceptance`.
        rule: when to stop.

    Raises:
        ModelError: the model gives no hidden states.
        ValueError: the head is of another width.

    Source: Huang et al., arXiv:2405.19715, section 3, and the released code (specdec_pp/hf_generation.py). There at
    least two guesses are drafted, which follows from h > 0, since the newest is not judged.
    """

    def __init__(self, model: LanguageModel, head: AcceptanceHead, rule: StoppingRule | None = None) -> None:
        width = hidden_width(model)
        if head.hidden_size != width:
            raise ValueError(f"the head is for hidden states of width {head.hidden_size}, {model.name} has {width}")
        self.head, self.rule = head.eval(), rule or StoppingRule()
        super().__init__(model, _Judged(self.rule, self.head))


@dataclass(frozen=True)
class _Judged(Shape):
    """Chains that one rule and one head end."""

    rule: StoppingRule
    head: AcceptanceHead
    is_chain = True
    listens = True

    def begin(self, growth: Growth) -> Plan:
        return _JudgedPlan(self.rule, self.head, growth)


@dataclass
class _JudgedPlan(Plan):
    rule: StoppingRule
    head: AcceptanceHead
    growth: Growth
    log_alive: float = 0.0
    """log A of the guesses that were fed."""

    @torch.no_grad()
    def hear(self, node: int, said: Next) -> None:
        if node != ROOT:
            assert said.hidden is not None
            self.log_alive += float(self.head.log_chances(said.hidden[0, 0]))

    def level(self, laws: Mapping[int, Tensor]) -> Sequence[int]:
        growth = self.growth
        ((node, law),) = laws.items()
        if not growth.can_grow(node):
            return ()
        (token,) = growth.draw(law, 1)
        new = growth.add(node, token, law)
        return () if self.rule.stops(growth.depths[new], self.log_alive) or not growth.can_grow(new) else (new,)

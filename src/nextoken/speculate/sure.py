"""Sure: drafts of any shape that go on only where the draft itself is sure of what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nextoken.model.next import Next
from nextoken.speculate.shapes import Chain, Growth, Plan, Shape


@dataclass
class _Closing(Growth):
    """A growth over the tree of another, in which nothing follows nodes that are closed."""

    closed: set[int] = field(default_factory=set)

    def can_grow(self, node: int) -> bool:
        return node not in self.closed and super().can_grow(node)


@dataclass(frozen=True)
class Sure(Shape):
    """A shape whose nodes get no children where max_v q(v) < floor, q the draft's own distribution there.

    Where that is so of the root there is no draft, and the target makes a plain pass. It is decided before anything is
    drawn, and depends on the prefix alone: whatever the floor, a lossless rule keeps the law of the output. (To take
    back a guess of which q was small would not.) q is as the model says it, before transforms: under a transform the
    draft is drawn from another distribution than the one looked at.

    With `SortedExits` q is what the exit says that was sure, or the deepest; for a floor up to the least threshold this
    is the paper's rule, to give up where even the deepest exit is unsure.

    Args:
        floor: from 0 to 1; at 0 the shape is as it was.
        shape: the one restrained, `Chain()` by default.

    Source: Sorted Speculative Decoding, arXiv:2407.01955. When exactly a draft is given up is not told there.
    """

    floor: float
    shape: Shape = field(default_factory=Chain)
    listens = True

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a probability and must be from 0 to 1, got {self.floor}")

    @property
    def is_chain(self) -> bool:  # type: ignore[override]
        return self.shape.is_chain

    def begin(self, growth: Growth) -> Plan:
        # The lists and mappings are those of the growth given: what is added here is added there.
        closing = _Closing(**vars(growth))
        plan = self.shape.begin(closing)
        growth.room, growth.replacement = closing.room, closing.replacement
        return _SurePlan(self, closing, plan)


@dataclass
class _SurePlan(Plan):
    shape: Sure
    growth: _Closing
    plan: Plan

    def hear(self, node: int, said: Next) -> None:
        logits = said.logits()[0, 0]
        if float((logits.amax() - logits.logsumexp(0)).exp()) < self.shape.floor:
            self.growth.closed.add(node)
        if self.shape.shape.listens:
            self.plan.hear(node, said)

    def level(self, laws: Mapping[int, Tensor]) -> Sequence[int]:
        return self.plan.level(laws)

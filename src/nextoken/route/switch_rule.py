"""SwitchRule: which of two models answers next, as a function of the tokens so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from nextoken.model.next import Next

SMALL, LARGE = 0, 1


class Standing(Protocol):
    """What a rule carries along a text; immutable, so that branches of a tree may share it."""

    @property
    def active(self) -> int:
        """Which model answers: SMALL or LARGE."""


class SwitchRule(ABC):
    """Who answers, as a function of the tokens read and of what the models in turn said of them.

    The standing at the i-th token of a text is at(before, token_i), where `before` is the standing left by the token
    before it, or begin() at the first; its `active` model gives the distribution after that token, and
    after(standing, entropy) is what it leaves. A rule that `looks` has the small model read every token first: the
    standing is then seen(at(before, token_i), sight_i), where sight_i is what `look` tells of its distribution there.
    """

    watches: bool = True
    """Whether `after` looks at the entropy; it is NaN where not."""
    looks: bool = False
    """Whether the small model reads every token before it is settled who answers."""

    @abstractmethod
    def begin(self) -> Standing:
        """Before the first token."""

    def at(self, before: Standing, token: int) -> Standing:
        """At a token that was just read."""
        return before

    def look(self, said: Next) -> Tensor:
        """[B, n, k]: what `seen` is to know of the small model's distributions; whatever it is at absent tokens."""
        raise NotImplementedError(f"{type(self).__name__} looks at the small model, so it must say at what")

    def seen(self, standing: Standing, sight: Sequence[float]) -> Standing:
        """At a token that was just read, when the small model has said what comes next."""
        return standing

    def after(self, standing: Standing, entropy: float) -> Standing:
        """After the active model's distribution, whose entropy in bits this is."""
        return standing

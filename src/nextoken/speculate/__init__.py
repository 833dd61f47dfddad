"""Speculation: the same distribution in fewer passes of the target."""

from __future__ import annotations

from nextoken.speculate.acceptance import Acceptance, Candidates, Follow, KSequential, Recursive, Typical
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row
from nextoken.speculate.draft_model import DraftModel
from nextoken.speculate.lookup import PromptLookup
from nextoken.speculate.loop import Speculation, SpeculativeLoop, Tally
from nextoken.speculate.recycling import Recycling
from nextoken.speculate.shapes import Branching, Chain, Dynamic, Independent, StochasticBeam

__all__ = [
    "ROOT",
    "Acceptance",
    "Branches",
    "Branching",
    "Candidates",
    "Chain",
    "Draft",
    "DraftModel",
    "Drafter",
    "Dynamic",
    "Follow",
    "Independent",
    "KSequential",
    "PromptLookup",
    "Recursive",
    "Recycling",
    "Row",
    "Speculation",
    "SpeculativeLoop",
    "StochasticBeam",
    "Tally",
    "Typical",
    "named",
]


def named(name: str) -> Speculation:
    """A new speculation of this name, with default settings: `lookup` or `recycling`.

    Raises:
        ValueError: there is none of this name.
    """
    makers = {"lookup": PromptLookup, "recycling": Recycling}
    if name not in makers:
        raise ValueError(f"no speculation {name!r}; there are {', '.join(makers)}")
    return Speculation(makers[name]())

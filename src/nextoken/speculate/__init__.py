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
    "NAMES",
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


NAMES: dict[str, type[Drafter]] = {"lookup": PromptLookup, "recycling": Recycling}
"""Drafters that need no model, by the names under which `generate(..., speculate=...)` knows them."""


def named(name: str) -> Speculation:
    """A new speculation of this name, with default settings.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in NAMES:
        raise ValueError(f"no speculation {name!r}; there are {', '.join(NAMES)}")
    return Speculation(NAMES[name]())

"""Speculation: the same distribution in fewer passes of the target."""

from __future__ import annotations

from nextoken.speculate.acceptance import Acceptance, Candidates, Follow, KSequential, Recursive, Typical
from nextoken.speculate.acceptance_fit import (
    AcceptanceExample,
    AcceptanceRecipe,
    acceptance_examples,
    fit_acceptance,
    predicted_chances,
)
from nextoken.speculate.acceptance_head import AcceptanceHead
from nextoken.speculate.auto import Auto
from nextoken.speculate.chimera import Chimera
from nextoken.speculate.chimera_fit import ChimeraRecipe, fit_chimera
from nextoken.speculate.chimera_head import ChimeraHead
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row
from nextoken.speculate.draft_model import DraftModel
from nextoken.speculate.exit_choice import DraftCosts, ExitChoice, ExitReadings, choose_exits, exit_readings
from nextoken.speculate.kangaroo import Kangaroo
from nextoken.speculate.kangaroo_adapter import KangarooAdapter
from nextoken.speculate.kangaroo_fit import KangarooRecipe, fit_kangaroo
from nextoken.speculate.lookup import PromptLookup
from nextoken.speculate.loop import Speculation, SpeculativeLoop, Tally
from nextoken.speculate.multi_token_draft import MultiTokenDraft
from nextoken.speculate.multi_token_fit import MultiTokenRecipe, fit_multi_token
from nextoken.speculate.recycling import Recycling
from nextoken.speculate.reencoded import Reencoded
from nextoken.speculate.reflective import ReflectiveSpeculation
from nextoken.speculate.shapes import Branching, Chain, Dynamic, Independent, StochasticBeam
from nextoken.speculate.sorted_fit import SortedFit, SortedRecipe, exit_losses, fit_sorted
from nextoken.speculate.stand import Stand
from nextoken.speculate.stopping import StoppingDraft, StoppingRule, stopping_bound
from nextoken.speculate.suffix import SuffixAutomaton
from nextoken.speculate.sure import Sure
from nextoken.speculate.tree_template import Census, best_template

__all__ = [
    "NAMES",
    "ROOT",
    "Acceptance",
    "AcceptanceExample",
    "AcceptanceHead",
    "AcceptanceRecipe",
    "Auto",
    "Branches",
    "Branching",
    "Candidates",
    "Census",
    "Chain",
    "Chimera",
    "ChimeraHead",
    "ChimeraRecipe",
    "Draft",
    "DraftCosts",
    "DraftModel",
    "Drafter",
    "Dynamic",
    "ExitChoice",
    "ExitReadings",
    "Follow",
    "Independent",
    "KSequential",
    "Kangaroo",
    "KangarooAdapter",
    "KangarooRecipe",
    "MultiTokenDraft",
    "MultiTokenRecipe",
    "PromptLookup",
    "Recursive",
    "Recycling",
    "Reencoded",
    "ReflectiveSpeculation",
    "Row",
    "SortedFit",
    "SortedRecipe",
    "Speculation",
    "SpeculativeLoop",
    "Stand",
    "StochasticBeam",
    "StoppingDraft",
    "StoppingRule",
    "SuffixAutomaton",
    "Sure",
    "Tally",
    "Typical",
    "acceptance_examples",
    "best_template",
    "choose_exits",
    "exit_losses",
    "exit_readings",
    "fit_acceptance",
    "fit_chimera",
    "fit_kangaroo",
    "fit_multi_token",
    "fit_sorted",
    "named",
    "predicted_chances",
    "stopping_bound",
]


NAMES: dict[str, type[Drafter]] = {
    "auto": Auto,
    "lookup": PromptLookup,
    "recycling": Recycling,
    "stand": Stand,
    "suffix": SuffixAutomaton,
}
"""Drafters that need no model, by the names under which `generate(..., speculate=...)` knows them."""


def named(name: str) -> Speculation:
    """A new speculation of this name, with default settings; its guesses are followed, so that seeds fix texts.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in NAMES:
        raise ValueError(f"no speculation {name!r}; there are {', '.join(NAMES)}")
    return Speculation(NAMES[name](), Follow())

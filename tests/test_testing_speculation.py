"""check_speculation: what holds is proved, and what does not is seen."""

from __future__ import annotations

import pytest
from torch import Tensor

from nextoken.model.table import TableModel
from nextoken.speculate import Acceptance, Candidates, Chain, DraftModel, PromptLookup, Recursive, Speculation
from nextoken.speculate.acceptance import Uniform
from nextoken.testing import Proof, check_speculation

TARGET = TableModel.random(4, order=2, eos=True, seed=1, concentration=0.7)
DRAFT = TableModel.random(4, order=1, eos=True, seed=2)


def test_what_holds_is_proved() -> None:
    seen: list[Proof] = []
    proofs = check_speculation(TARGET, lambda: Speculation(DraftModel(DRAFT)), prompts=2, on_proof=seen.append)
    assert seen == proofs
    assert [proof.name for proof in proofs] == ["greedy", "followed", "law"]
    assert all(proof.holds for proof in proofs)
    check_speculation(TARGET, lambda: Speculation(PromptLookup()), prompts=1, draws=100)


class _Eager(Acceptance):
    """Accepts whatever the draft guesses."""

    def __call__(self, p: Tensor, candidates: Candidates, uniform: Uniform) -> int:
        possible = [token for token in candidates.tokens if p[token] > 0]
        return possible[0] if possible else Recursive()(p, Candidates([]), uniform)


def test_a_rule_that_changes_the_law_is_seen() -> None:
    with pytest.raises(AssertionError, match="NO law"):
        check_speculation(TARGET, lambda: Speculation(DraftModel(DRAFT, Chain(2)), _Eager()), prompts=1)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="draws at least 100"):
        check_speculation(TARGET, lambda: Speculation(PromptLookup()), draws=10)

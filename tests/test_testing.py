"""check_language_model must catch models that break the contract: each class here breaks one promise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nextoken.model.base import LanguageModel, Memory, State
from nextoken.model.next import DenseNext, Next
from nextoken.model.table import TableModel
from nextoken.testing import check_language_model


class Tracking(Memory):
    """A memory that keeps the tokens itself, so that its operations can be broken."""

    def __init__(self, rows: Sequence[Sequence[int]], last: Sequence[Sequence[int]] = ()) -> None:
        self.rows, self.last = [list(row) for row in rows], last

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        for row, fed, chosen in zip(self.rows, self.last, nodes, strict=True):
            row.extend(fed[node] for node in chosen)

    def rewind(self, lengths: Sequence[int]) -> None:
        for row, length in zip(self.rows, lengths, strict=True):
            del row[length:]

    def fork(self, rows: Sequence[int]) -> Memory:
        return type(self)([self.rows[row] for row in rows])

    def join(self, others: Sequence[Memory]) -> Memory:
        return type(self)([*self.rows, *(row for other in others for row in other.rows)])  # type: ignore[attr-defined]


class Model(LanguageModel):
    """A table of order 3 whose memory is its own; nothing is broken yet."""

    memory: type[Tracking] = Tracking

    def __init__(self) -> None:
        self.table = TableModel.random(5, order=3, seed=0)
        self.vocab, self.name = self.table.vocab, type(self).__name__

    @property
    def dtype(self) -> str:
        return "float64"

    def _remember(self, batch: int) -> Memory:
        return self.memory([[] for _ in range(batch)])

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        memory: Tracking = state.memory  # type: ignore[assignment]
        result = self.table._feed(State(memory.rows, memory), tokens, self.seen(parents))
        memory.last = tokens.tolist()
        if parents is None:
            for row, fresh in zip(memory.rows, memory.last, strict=True):
                row.extend(token for token in fresh if token >= 0)
        return DenseNext(self.changed(result.log_probs(), tokens))

    def seen(self, parents: Tensor | None) -> Tensor | None:
        return parents

    def changed(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        return log_probs


class SeesSiblings(Model):
    def seen(self, parents: Tensor | None) -> None:
        return None


class DependsOnTheBatch(Model):
    def changed(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        return torch.log_softmax(log_probs * (1 + 0.1 * (len(tokens) - 1)), -1)


class DependsOnTheWidth(Model):
    def changed(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        return torch.log_softmax(log_probs * (1 + 0.1 * tokens.shape[1]), -1)


class PredictsOtherwise(Model):
    def _predict(self, tokens: Tensor) -> Next:
        return DenseNext(super()._predict(tokens).log_probs().roll(1, -1))


class Unnormalised(Model):
    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        class Doubled(DenseNext):
            def log_probs(self) -> Tensor:
                return super().log_probs() + 0.1

            def _take(self, rows: Tensor, columns: Tensor) -> DenseNext:
                return Doubled(self._logits[rows, columns])

        return Doubled(super()._feed(state, tokens, parents).log_probs())


class LazyStatisticsDiffer(Model):
    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        class Sharper(DenseNext):
            def statistics(self, targets: Tensor | None = None, *, top: int = 0):  # type: ignore[no-untyped-def]
                return DenseNext(self._logits * 1.01).statistics(targets, top=top)

            def _take(self, rows: Tensor, columns: Tensor) -> DenseNext:
                return Sharper(self._logits[rows, columns])

        return Sharper(super()._feed(state, tokens, parents).log_probs())


class KeepsAll(Model):
    class memory(Tracking):
        def keep(self, nodes: Sequence[Sequence[int]]) -> None:
            super().keep([range(len(fed)) for fed in self.last])


class RewindsTooLittle(Model):
    class memory(Tracking):
        def rewind(self, lengths: Sequence[int]) -> None:
            super().rewind([length + 1 for length in lengths])


class ForksInOrder(Model):
    class memory(Tracking):
        def fork(self, rows: Sequence[int]) -> Memory:
            return super().fork(sorted(rows))


class ForksTheSameRows(Model):
    class memory(Tracking):
        def fork(self, rows: Sequence[int]) -> Memory:
            copy = super().fork(rows)
            copy.rows = [self.rows[row] for row in rows]  # type: ignore[attr-defined]
            return copy


class JoinsBackwards(Model):
    class memory(Tracking):
        def join(self, others: Sequence[Memory]) -> Memory:
            joined = super().join(others)
            joined.rows.reverse()  # type: ignore[attr-defined]
            return joined


def test_the_unbroken_model_passes() -> None:
    assert all(proof.holds and proof.skipped is None for proof in check_language_model(Model()))


@pytest.mark.parametrize(
    ("broken", "statement"),
    [
        (SeesSiblings, "tree"),
        (DependsOnTheBatch, "batched"),
        (DependsOnTheWidth, "cached"),
        (PredictsOtherwise, "predicted"),
        (Unnormalised, "normalised"),
        (LazyStatisticsDiffer, "statistics"),
        (KeepsAll, "kept"),
        (RewindsTooLittle, "rewound"),
        (ForksInOrder, "forked"),
        (ForksTheSameRows, "forked"),
        (JoinsBackwards, "joined"),
    ],
)
def test_each_broken_promise_is_named(broken: type[Model], statement: str) -> None:
    with pytest.raises(AssertionError, match=rf"NO {statement}:"):
        check_language_model(broken())


def test_proofs_are_handed_over_as_they_are_done() -> None:
    seen: list[str] = []
    proofs = check_language_model(TableModel.random(3), on_proof=lambda proof: seen.append(proof.name))
    assert seen == [proof.name for proof in proofs]


def test_trees_are_not_asked_of_a_recurrent_model() -> None:
    model = Model()
    model.supports_trees = False
    skipped = {proof.name for proof in check_language_model(model) if proof.skipped}
    assert skipped == {"tree", "trees in a batch"}

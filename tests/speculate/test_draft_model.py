"""The memory of a draft model in step with the rows of a loop."""

from __future__ import annotations

import random

import pytest
import torch

import nextoken
from nextoken.model.base import LanguageModel
from nextoken.model.table import TableModel
from nextoken.speculate.draft_model import Follower


def _fresh(model: LanguageModel, context: list[int]) -> torch.Tensor:
    return model.predict([context]).log_probs()[0, -1]


@pytest.mark.parametrize("spec", ["table", "nano"])
def test_following_equals_reading_anew(spec: str) -> None:
    """Rows that grow, are cut back, join, leave and change places."""
    model: LanguageModel = TableModel.random(4, order=3, seed=1) if spec == "table" else nextoken.load("nano")
    source = random.Random(0)
    symbols = 4 if spec == "table" else 1000
    follower = Follower(model)
    contexts: dict[int, list[int]] = {}
    for step in range(12):
        for ticket in list(contexts):
            row = contexts[ticket]
            del row[len(row) - source.randint(0, min(2, len(row) - 2)) :]
            row += [source.randrange(3, symbols) % symbols for _ in range(source.randint(1, 3))]
        if step % 2 == 0:
            contexts[step] = [model.vocab.bos_id or 0, *(source.randrange(symbols) for _ in range(step + 1))]
        if step % 5 == 4:
            contexts.pop(source.choice(list(contexts)))
        tickets = list(contexts)
        source.shuffle(tickets)
        logits = follower.follow(tickets, [contexts[ticket] for ticket in tickets])
        said = torch.log_softmax(logits, -1)
        for number, ticket in enumerate(tickets):
            torch.testing.assert_close(said[number], _fresh(model, contexts[ticket]), atol=2e-4, rtol=1e-4)
        # What a draft went on with and the target did not take is forgotten at the next call.
        assert follower.state is not None
        model.extend(follower.state, [[source.randrange(symbols)] for _ in tickets])


def test_a_partial_model_cannot_draft() -> None:
    from nextoken.speculate.draft_model import DraftModel

    model = TableModel.random(4)
    model.is_partial = True
    with pytest.raises(ValueError, match="only its most probable"):
        DraftModel(model)

"""Value ranking: finished solutions ordered by a value, and a vote on their answers in which it is the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nextoken.decode.generation import Generation
from nextoken.methods import method
from nextoken.model.base import ABSENT
from nextoken.values.token_value import TokenValue

Answer = Callable[[str], str | None]
"""The final answer of a solution's text, None where there is none."""


def final_values(value: TokenValue, generations: Sequence[Generation]) -> tuple[float, ...]:
    """V of each text after its last token.

    Args:
        value: of the vocabulary of the model that generated.
        generations: of any prompts; from `nextoken.generate` or a search.

    Raises:
        ValueError: another vocabulary, or a text does not fit the context of the value.
    """
    if not generations:
        return ()
    rows = [[*made.request.prompt, *made.tokens] for made in generations]
    for made in generations:
        value.check(made.model)
    width = max(map(len, rows))
    values = value.predict(torch.tensor([row + [ABSENT] * (width - len(row)) for row in rows]))
    return tuple(float(values[i, len(row) - 1]) for i, row in enumerate(rows))


@method(
    name="Best of n by value",
    arxiv="2110.14168",
    access="black",
    summary="of several solutions the one of highest value after its last token",
)
def rank(value: TokenValue, generations: Sequence[Generation]) -> list[tuple[float, Generation]]:
    """(V after the last token, text), the highest first; of equals the first.

    Arguments and errors as of `final_values`. Source: Cobbe et al., arXiv:2110.14168, section 4.
    """
    scored = zip(final_values(value, generations), generations, strict=True)
    return sorted(scored, key=lambda pair: pair[0], reverse=True)


@dataclass(frozen=True)
class WeightedVote:
    """The answer of most weight, None where there is no answer; the weight of each answer; and the values summed."""

    answer: str | None
    weights: dict[str, float]
    values: tuple[float, ...]


@method(
    name="Vote weighted by value",
    arxiv="2407.12863",
    access="black",
    summary="the final answer with the largest sum of values over the solutions that come to it",
)
def weighted_vote(value: TokenValue, generations: Sequence[Generation], *, answer: Answer) -> WeightedVote:
    """argmax_a sum_i V_i [answer_i = a], of equals the one met first; with equal values it is the majority vote.

    Args:
        value, generations: as of `final_values`.
        answer: reads it off a solution's text; solutions without one have no vote.
    """
    values, weights = final_values(value, generations), dict[str, float]()
    for made, v in zip(generations, values, strict=True):
        said = answer(made.text)
        if said is not None:
            weights[said] = weights.get(said, 0.0) + v
    return WeightedVote(max(weights, key=weights.__getitem__) if weights else None, weights, values)

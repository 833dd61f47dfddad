"""Labels of prefixes: how often the sampled solutions that begin so came out right, counted on their common tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextoken.decode.generation import Generation
from nextoken.methods import method


@dataclass(frozen=True)
class Solution:
    """One sampled solution and what came of it.

    Args:
        prompt: token ids, begin token included.
        tokens: the ids that were drawn, the end token included where the solution came to it. Text that is tokenised
            again may have other prefixes, and so other labels.
        outcome: 1 where the final answer is right, 0 where it is wrong, or what else from 0 to 1 it is worth.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    outcome: float

    def __post_init__(self) -> None:
        if not self.prompt or not self.tokens:
            raise ValueError("a solution needs a prompt and at least one drawn token: it has no prefix to value else")
        if not 0 <= self.outcome <= 1:
            raise ValueError(f"an outcome is from 0 (wrong) to 1 (right), got {self.outcome}")

    @classmethod
    def of(cls, made: Generation, outcome: float) -> Solution:
        """A generated text and what came of it."""
        return cls(made.request.prompt, made.tokens, float(outcome))


@dataclass(frozen=True)
class PrefixLabels:
    """Labels y and visits m of every drawn token of every solution, in the order of the solutions.

    Args:
        labels: y[i][k], from 0 to 1, of solution i up to and with its token k.
        visits: m[i][k], how many solutions begin with that prefix; at least 1.
        accuracy: prompt -> mean outcome of its solutions, the label of the empty prefix.
    """

    labels: tuple[tuple[float, ...], ...]
    visits: tuple[tuple[int, ...], ...]
    accuracy: dict[tuple[int, ...], float]

    @property
    def shared(self) -> float:
        """Share of the drawn tokens whose prefix two solutions or more have: where y is more than the own outcome."""
        flat = [count for row in self.visits for count in row]
        return sum(count >= 2 for count in flat) / len(flat)


def prefix_labels(solutions: Sequence[Solution]) -> PrefixLabels:
    """y_ik = sum_j outcome_j [t_j1..k = t_i1..k] / sum_j [t_j1..k = t_i1..k], over solutions j of the same prompt.

    At a prefix fixed beforehand, y is an unbiased estimate of the probability that the sampler's solution comes out
    right from there, from as many draws as solutions passed it. Equal solutions are separate draws and count as such;
    leaving repetitions out would bias y. From the first token that a solution shares with no other, y is its own
    outcome.

    Args:
        solutions: of any prompts, in any order; at least one.

    Raises:
        ValueError: there are none.

    Source: Lee et al., arXiv:2407.12863, section 3.
    """
    if not solutions:
        raise ValueError("there are no solutions to count")
    roots: dict[tuple[int, ...], int] = {}
    children: dict[tuple[int, int], int] = {}
    visits: list[int] = []
    outcomes: list[float] = []
    paths: list[list[int]] = []

    def visited(node: int, outcome: float) -> None:
        if node == len(visits):
            visits.append(0)
            outcomes.append(0.0)
        visits[node] += 1
        outcomes[node] += outcome

    for one in solutions:
        node = roots.setdefault(one.prompt, len(visits))
        visited(node, one.outcome)
        path = []
        for token in one.tokens:
            node = children.setdefault((node, token), len(visits))
            visited(node, one.outcome)
            path.append(node)
        paths.append(path)
    return PrefixLabels(
        labels=tuple(tuple(outcomes[node] / visits[node] for node in path) for path in paths),
        visits=tuple(tuple(visits[node] for node in path) for path in paths),
        accuracy={prompt: outcomes[node] / visits[node] for prompt, node in roots.items()},
    )


@method(
    name="Outcome reward model",
    arxiv="2110.14168",
    access="black",
    trained=True,
    summary="labels for a value after every token: the outcome of the whole solution",
)
def outcome_labels(solutions: Sequence[Solution]) -> PrefixLabels:
    """y_ik = outcome_i: what an outcome reward model is trained on, the control of `prefix_labels`.

    Args:
        solutions: at least one.

    Raises:
        ValueError: there are none.

    Source: Cobbe et al., arXiv:2110.14168, section 4.2 (token-level verifiers).
    """
    counted = prefix_labels(solutions)
    return PrefixLabels(
        labels=tuple((one.outcome,) * len(one.tokens) for one in solutions),
        visits=tuple((1,) * len(one.tokens) for one in solutions),
        accuracy=counted.accuracy,
    )

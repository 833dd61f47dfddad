"""Value search: solutions built step by step, going on from the partial ones that a value thinks best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.generate import Prompt, derived_seed, prompt_tokens
from nextoken.decode.generation import Generation
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.request import Request
from nextoken.decode.transform import Chain, Transform
from nextoken.methods import method
from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.values._continuations import Continuations, Opening
from nextoken.values.token_value import TokenValue


@dataclass(frozen=True)
class Steps:
    """How a search cuts solutions into steps.

    Args:
        end: what ends a step, matched on the bytes of the tokens since the last; it belongs to the step.
        max_tokens: most tokens of a step.
        most: most steps of a solution.
    """

    end: str = "\n"
    max_tokens: int = 128
    most: int = 40

    def __post_init__(self) -> None:
        if not self.end or self.max_tokens < 1 or self.most < 1:
            raise ValueError(
                f"a step needs an end, and max_tokens and most of at least 1; got {self.end!r}, {self.max_tokens} and "
                f"{self.most}"
            )


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        generations: the solutions, of highest value first.
        values: V of each after its last token.
        tokens: drawn in all, those of dropped candidates included.
        steps: taken.
    """

    generations: tuple[Generation, ...]
    values: tuple[float, ...]
    tokens: int
    steps: int

    @property
    def best(self) -> Generation:
        """The solution of highest value."""
        return self.generations[0]


@method(
    name="Beam search by value",
    arxiv="2407.12863",
    access="gray",
    summary="step by step: several candidates for the next step of each beam, of which the most valued are kept",
)
@torch.no_grad()
def value_beam_search(
    model: LanguageModel,
    value: TokenValue,
    prompt: Prompt,
    *,
    beams: int = 4,
    candidates: int = 16,
    steps: Steps | None = None,
    transform: Transform | str | None = None,
    max_tokens: int = 512,
    seed: int = 0,
) -> Found:
    """At each step draw candidates / beams next steps of every beam and keep the `beams` of highest V.

    The first step has `candidates` of them, all from the prompt. A solution that has ended stays a candidate with its
    value and draws nothing. It ends when all beams have ended. One candidate is plain sampling: the same tokens as
    `nextoken.generate` with this seed.

    Args:
        model: draws the steps, from transform(p).
        value: of the same vocabulary; V after the last token of a candidate judges it.
        prompt, transform, max_tokens, seed: as of `nextoken.generate`.
        beams, candidates: b and K; K a multiple of b.
        steps: where one ends.

    Returns:
        The `beams` solutions that are left.

    Raises:
        ValueError: a number is out of range, or model and value have different vocabularies.

    Source: Lee et al., arXiv:2407.12863, section 4 (step-by-step beam search).
    """
    if beams < 1 or candidates < beams or candidates % beams:
        raise ValueError(f"candidates must be a multiple of beams, both at least 1; got {candidates} and {beams}")
    search = _Search(model, value, prompt, candidates, steps, transform, max_tokens, seed)
    for _ in search:
        best = search.ranked()[:beams]
        ended = [i for i in best if search.texts.finishes[i] is not None]
        going = [i for i in best if search.texts.finishes[i] is None]
        # Ended rows draw no more, so a single copy of them is enough.
        search.choose([*ended, *(i for i in going for _ in range(candidates // beams))])
    return search.found(beams)


@method(
    name="REBASE",
    arxiv="2408.00724",
    access="gray",
    summary="step by step: a budget of next steps shared among partial solutions by a softmax of their values",
)
@torch.no_grad()
def reward_balanced_search(
    model: LanguageModel,
    value: TokenValue,
    prompt: Prompt,
    *,
    width: int = 16,
    temperature: float = 0.1,
    steps: Steps | None = None,
    transform: Transform | str | None = None,
    max_tokens: int = 512,
    seed: int = 0,
) -> Found:
    """At each step partial solution i has about B softmax_i(V / temperature) next steps, B = width less those ended.

    Shares are rounded by largest remainders, so that exactly B children are drawn (the paper rounds each by itself).
    All solutions that end are kept, `width` in all; vote over them with `weighted_vote`, or take the best.

    Args:
        model, value, prompt, steps, transform, max_tokens, seed: as of `value_beam_search`.
        width: solutions in the end.
        temperature: inf shares alike; near 0 everything goes on from the best.

    Raises:
        ValueError: a number is out of range, or model and value have different vocabularies.

    Source: Wu et al., arXiv:2408.00724, section 3.2, steered by token values as in arXiv:2407.12863.
    """
    if width < 1 or not temperature > 0:
        raise ValueError(f"width must be at least 1 and temperature above 0, got {width} and {temperature}")
    search = _Search(model, value, prompt, width, steps, transform, max_tokens, seed)
    for _ in search:
        ended = [i for i, finish in enumerate(search.texts.finishes) if finish is not None]
        going = search.texts.open
        shares = torch.softmax(torch.tensor([search.values[i] for i in going]).double() / temperature, 0)
        children = apportioned(shares.tolist(), width - len(ended))
        search.choose([*ended, *(i for i, count in zip(going, children, strict=True) for _ in range(count))])
    return search.found(width)


def apportioned(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers near total * share that sum to `total`: floors, then one more by the largest remainders."""
    exact = [share * total for share in shares]
    whole = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: exact[i] - whole[i], reverse=True)
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


class _Search:
    """Texts that go on step by step, and the value of each; iterating takes a step each time until all have ended."""

    def __init__(
        self,
        model: LanguageModel,
        value: TokenValue,
        prompt: Prompt,
        rows: int,
        steps: Steps | None,
        transform: Transform | str | None,
        max_tokens: int,
        seed: int,
    ) -> None:
        value.check(model)
        rule = parsed(transform) if isinstance(transform, str) else transform or Chain()
        ids, self.steps, self.seed, self.value = prompt_tokens(model, prompt), steps or Steps(), seed, value
        requests = [Request(ids, rule, max_tokens, seed=derived_seed(seed, i)) for i in range(rows)]
        self.texts = Continuations(Opening(model, ids), requests)
        self._seeds, self.taken = rows, 0
        start = value.start()
        self.values = value.extend(start, [ids])[:, -1].repeat(rows)
        self._state: State = start.fork([0] * rows)

    def __iter__(self) -> _Search:
        return self

    def __next__(self) -> None:
        """Take a step and value what it came to; at the last step there is nothing left to choose."""
        if not self.texts.open or self.taken == self.steps.most:
            raise StopIteration
        before = self._state.lengths
        self.texts.advance(until=self.steps.end.encode(), most=self.steps.max_tokens)
        self.taken += 1
        fresh = [kept[length:] for kept, length in zip(self.texts.state.tokens, before, strict=True)]
        width = max(map(len, fresh))
        if width:
            padded = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in fresh])
            said = self.value.extend(self._state, padded)
            at = torch.tensor([len(row) for row in fresh], device=said.device)
            last = said.gather(1, (at - 1).clamp(min=0)[:, None])[:, 0]
            self.values = torch.where(at > 0, last, self.values)
        if not self.texts.open or self.taken == self.steps.most:
            raise StopIteration

    def ranked(self) -> list[int]:
        return _order(self.values)

    def choose(self, rows: Sequence[int]) -> None:
        seeds = [derived_seed(self.seed, self._seeds + place) for place in range(len(rows))]
        self._seeds += len(rows)
        self.texts.choose(rows, seeds)
        self.values, self._state = self.values[list(rows)], self._state.fork(rows)

    def found(self, most: int) -> Found:
        best = self.ranked()[:most]
        return Found(
            tuple(self.texts.generation(i) for i in best),
            tuple(float(self.values[i]) for i in best),
            self.texts.drawn,
            self.taken,
        )


def _order(values: Tensor) -> list[int]:
    """Indices by descending value, of equals the first first."""
    return values.argsort(descending=True, stable=True).tolist()

"""STAND: guesses drawn from the target's own distributions after the same words, averaged over all texts."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextoken.decode.loop import is_greedy
from nextoken.decode.scaling import Temperature
from nextoken.decode.search import gumbels
from nextoken.decode.transform import Transform
from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.next import Next
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row
from nextoken.speculate.recycling import template

CHANCES = (0.6, 0.14, 0.07, 0.04, 0.025, 0.015)
WIDTHS: tuple[tuple[int, ...], ...] = (
    (6,),
    (5, 3, 2, 1, 1),
    (4, 2, 1, 1, 0, 2, 1, 0, 1, 0, 1),
    (3, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1),
    (2, 1, 1, 1, 1, 1, 1, 1, 1),
    (2, 1, 1, 0, 1, 0, 1, 0, 1),
    (1,),
    (1,),
    (1,),
)
"""Children of the nodes of each level, in order: the 60 places likeliest to be reached if the i-th guess at any node
stands with chance CHANCES[i]."""

Law = Mapping[int, float]
"""Probabilities of the tokens that have any."""


class Memory:
    """The mean of the distributions seen after each run of 1 .. `order` tokens: after k visits, sum_i P_i / k.

    Of each P, and of each mean, only the `top` largest entries are kept, renormalised. The runs that were longest not
    looked up or learnt from are forgotten first.

    Args:
        order: longest run.
        top: entries kept of a distribution.
        capacity: most runs kept.
    """

    def __init__(self, *, order: int, top: int, capacity: int) -> None:
        self.order, self.top, self.capacity = order, top, capacity
        self._means: OrderedDict[tuple[int, ...], tuple[int, Law]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._means)

    def learn(self, context: Sequence[int], law: Law) -> None:
        """Take in the distribution that follows `context`, for every run of tokens at its end."""
        seen = _largest(law, self.top)
        for size in range(1, min(self.order, len(context)) + 1):
            run = tuple(context[len(context) - size :])
            visits, mean = self._means.get(run, (0, {}))
            sums = {token: visits * p for token, p in mean.items()}
            for token, p in seen.items():
                sums[token] = sums.get(token, 0.0) + p
            self._means[run] = visits + 1, _largest(sums, self.top)
            self._means.move_to_end(run)
        while len(self._means) > self.capacity:
            self._means.popitem(last=False)

    def recall(self, context: Sequence[int]) -> Law | None:
        """The mean after the longest run at the end of `context` that is known; None if none is."""
        for size in range(min(self.order, len(context)), 0, -1):
            run = tuple(context[len(context) - size :])
            if run in self._means:
                self._means.move_to_end(run)
                return self._means[run][1]
        return None

    def clear(self) -> None:
        """Forget everything."""
        self._means.clear()


@method(
    name="STAND",
    arxiv="2506.04708",
    access="gray",
    summary="draft trees drawn from an n-gram memory of the target's own averaged distributions",
)
class Stand(Drafter):
    """At each place of a fixed tree the children are drawn without replacement from q = norm(m^(1/T)), m [V] the mean
    of the target's distributions after the same last n tokens, n the longest known up to `order`.

    The c largest of log q + Gumbel noise, in falling order, are c such draws. What is remembered is the target's own
    distribution at temperature 1, and T is the product of the temperatures of the row's transform, so that texts of any
    settings share one memory; other steps of the transform change the target only. Any q is legal: the output keeps its
    law whatever is in the memory. Under a greedy transform nothing is drawn and the most probable are chosen. Nothing
    follows an end token, unless it is ignored.

    The memory is shared by all texts and kept between calls (`memory.clear()` empties it). What is drawn therefore
    depends on what was generated before and beside: under `Recursive` a seed no longer fixes a text, only its law;
    under `Follow` it does. The distribution after the prompt itself is not seen by drafters and not learnt.

    Args:
        widths: of the tree, see `recycling.template`; `best_template` finds them from a run.
        order: longest run of tokens looked up.
        top: entries kept of a distribution.
        capacity: most runs remembered, about 1 kB each; the least recently used go first.
        learns_rejected: whether to learn also from guesses that did not stand. Their contexts never occurred but may
            yet: worth it where texts differ from each other, not where the same is said again. The paper does not tell.

    Raises:
        ValueError: an argument is below 1.

    Source: Song et al., arXiv:2506.04708; the longest run and the positions learnt from are not told there.
    """

    def __init__(
        self,
        *,
        widths: Sequence[Sequence[int]] = WIDTHS,
        order: int = 4,
        top: int = 10,
        capacity: int = 1 << 16,
        learns_rejected: bool = True,
    ) -> None:
        if order < 1 or top < 1 or capacity < 1:
            raise ValueError(f"order, top and capacity must be at least 1, got {order}, {top}, {capacity}")
        parents, _ = template(widths)
        self._below: dict[int, list[int]] = {}
        for place, parent in enumerate(parents):
            self._below.setdefault(parent, []).append(place)
        self.needs_trees = any(len(places) > 1 for places in self._below.values())
        self.memory = Memory(order=order, top=top, capacity=capacity)
        self.learns_rejected = learns_rejected
        self._digest: str | None = None
        self._size, self._ends = 0, frozenset[int]()

    def check(self, target: LanguageModel) -> None:
        if self._digest not in (None, target.vocab.digest):
            raise ValueError(f"it remembers tokens of another vocabulary than that of {target.name}")
        self._digest, self._size = target.vocab.digest, target.vocab.size
        self._ends = frozenset(target.vocab.eos_ids)

    def propose(self, rows: Sequence[Row]) -> Draft:
        return Draft(tuple(self._guess(row) for row in rows))

    def _guess(self, row: Row) -> Branches:
        temperature = temperature_of(row.running.request.transform)
        ends = frozenset[int]() if row.running.request.ignore_eos else self._ends
        # Of each place its own noise, once: what a first use has shown would change the law of a second.
        noise = gumbels((len(self._below), self.memory.top), row.generator).tolist()
        tree = _Tree(tuple(row.context[-self.memory.order :]))
        places = [(ROOT, ROOT)]
        for place, node in places:  # grows on the way
            below = self._below.get(place)
            ended = node != ROOT and tree.tokens[node] in ends
            if below is None or ended or tree.depth(node) >= row.room:
                continue
            mean = self.memory.recall(tree.tail(node))
            if mean is None:
                continue
            law = mean if temperature == 0 else tempered(mean, temperature)
            worth = [math.log(p) for p in law.values()]
            if temperature != 0:
                worth = [score + gumbel for score, gumbel in zip(worth, noise.pop(), strict=False)]
                tree.laws[node] = law
            tokens = [token for _, token in sorted(zip(worth, law, strict=True), key=lambda pair: -pair[0])]
            places += [(child, tree.add(node, token)) for child, token in zip(below, tokens, strict=False)]
        laws = None if temperature == 0 else _Spread(tree.laws, self._size)
        return Branches(tuple(tree.tokens), tuple(tree.parents), tree.candidates, laws)

    def observe(self, rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        learnt: list[tuple[int, int]] = []
        for number, (branches, nodes) in enumerate(zip(draft.rows, accepted, strict=True)):
            found = range(len(branches)) if self.learns_rejected else nodes
            learnt += [(number, ROOT), *((number, node) for node in sorted(found))]
        mask = torch.zeros(said.shape, dtype=torch.bool)
        mask[[number for number, _ in learnt], [node + 1 for _, node in learnt]] = True
        best = said[mask].statistics(top=min(self.memory.top, said.vocab_size))
        assert best.top_ids is not None and best.top_logprobs is not None
        ids, probs = best.top_ids[:, 0].tolist(), best.top_logprobs[:, 0].double().exp().tolist()
        for (number, node), tokens, values in zip(learnt, ids, probs, strict=True):
            branches = draft.rows[number]
            path = []
            while node != ROOT:
                path.append(branches.tokens[node])
                node = branches.parents[node]
            context = (*rows[number].context[-self.memory.order :], *path[::-1])
            self.memory.learn(context, {token: p for token, p in zip(tokens, values, strict=True) if p > 0})


@dataclass
class _Tree:
    """The guesses of one row while they are filled in."""

    root: tuple[int, ...]
    """The last tokens of the text."""
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    tails: list[tuple[int, ...]] = field(default_factory=list)
    candidates: dict[int, list[int]] = field(default_factory=dict)
    laws: dict[int, Law] = field(default_factory=dict)
    depths: list[int] = field(default_factory=list)

    def tail(self, node: int) -> tuple[int, ...]:
        """The last tokens of the text and the guesses down to the node."""
        return self.root if node == ROOT else self.tails[node]

    def depth(self, node: int) -> int:
        return 0 if node == ROOT else self.depths[node]

    def add(self, parent: int, token: int) -> int:
        """A new child of `parent`; returns its number."""
        self.tails.append((*self.tail(parent), token))
        self.depths.append(self.depth(parent) + 1)
        self.tokens.append(token)
        self.parents.append(parent)
        self.candidates.setdefault(parent, []).append(len(self.tokens) - 1)
        return len(self.tokens) - 1


class _Spread(Mapping[int, Tensor]):
    """q [V] after each node: spread over the vocabulary only where the verification comes by."""

    def __init__(self, laws: Mapping[int, Law], size: int) -> None:
        self._laws, self._size = laws, size

    def __getitem__(self, node: int) -> Tensor:
        law = self._laws[node]
        spread = torch.zeros(self._size, dtype=torch.float64)
        spread[list(law)] = torch.tensor(list(law.values()), dtype=torch.float64)
        return spread

    def __iter__(self) -> Iterator[int]:
        return iter(self._laws)

    def __len__(self) -> int:
        return len(self._laws)


def temperature_of(transform: Transform) -> float:
    """T of a transform: the product of its temperatures; 0 if it leaves one token."""
    if is_greedy(transform):
        return 0.0
    return math.prod(step.t for step in transform.steps if isinstance(step, Temperature))


def tempered(law: Law, temperature: float) -> dict[int, float]:
    """norm(p^(1/T)), without the tokens of which nothing is left in double precision."""
    highest = max(law.values())
    weights = {token: (p / highest) ** (1 / temperature) for token, p in law.items()}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items() if weight / total > 0}


def _largest(weights: Law, top: int) -> dict[int, float]:
    """The `top` largest, renormalised; of equal ones those known for longer."""
    kept = sorted(weights.items(), key=lambda entry: -entry[1])[:top]
    total = sum(weight for _, weight in kept)
    return {token: weight / total for token, weight in kept}

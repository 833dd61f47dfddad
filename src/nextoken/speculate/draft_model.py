"""DraftModel: guesses drawn from a cheaper model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextoken.decode.loop import is_greedy
from nextoken.decode.transform import Context, normalise
from nextoken.methods import method
from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.model.next import Next
from nextoken.speculate.draft import ROOT, Draft, Drafter, Row
from nextoken.speculate.shapes import Chain, Growth, Shape


class Follower:
    """A model's memory of the rows of a loop, brought up to date by feeding only what is new.

    Args:
        model: any language model over the target's vocabulary.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.state: State | None = None
        self._tickets: list[int] = []

    def follow(self, tickets: Sequence[int], contexts: Sequence[Sequence[int]]) -> Tensor:
        """Read what is new of each row; returns the logits [B, V] after it."""
        return self.read(tickets, contexts).logits()[:, 0]

    def read(self, tickets: Sequence[int], contexts: Sequence[Sequence[int]]) -> Next:
        """Read what is new of each row; returns what follows [B, 1]."""
        state = self.state = self._arranged(tickets)
        shared = []
        for fed, context in zip(state.tokens, contexts, strict=True):
            same = next((i for i, (a, b) in enumerate(zip(fed, context, strict=False)) if a != b), len(fed))
            shared.append(min(same, len(context) - 1))
        state.rewind([length - keep for length, keep in zip(state.lengths, shared, strict=True)])
        rest = [list(context[keep:]) for context, keep in zip(contexts, shared, strict=True)]
        width = max(map(len, rest))
        said = self.model.extend(state, [[*row, *[ABSENT] * (width - len(row))] for row in rest])
        last = torch.zeros(len(rest), width, dtype=torch.bool)
        last[range(len(rest)), [len(row) - 1 for row in rest]] = True
        return said[last]

    def _arranged(self, tickets: Sequence[int]) -> State:
        """A state with these rows: those known, and new ones."""
        known = [ticket for ticket in tickets if ticket in self._tickets]
        parts = []
        if known and self.state is not None:
            rows = [self._tickets.index(ticket) for ticket in known]
            parts.append(self.state if known == self._tickets else self.state.fork(rows))
        if len(known) < len(tickets):
            parts.append(self.model.start(len(tickets) - len(known)))
        state = parts[0].join(*parts[1:]) if len(parts) > 1 else parts[0]
        order = [*known, *(ticket for ticket in tickets if ticket not in known)]
        if order != list(tickets):
            state = state.fork([order.index(ticket) for ticket in tickets])
        self._tickets = list(tickets)
        return state


@method(
    name="Speculative sampling",
    arxiv="2211.17192",
    access="gray",
    summary="a cheaper model guesses, the target verifies all guesses in one pass",
)
class DraftModel(Drafter):
    """Guesses drawn from q, a cheaper model's distribution under the row's own transform, in a tree of some shape.

    Args:
        model: the draft, over the target's vocabulary.
        shape: of the tree; a chain of 4 by default.

    Source: Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318. The shapes name their own.
    """

    def __init__(self, model: LanguageModel, shape: Shape | None = None) -> None:
        if model.is_partial:
            raise ValueError(f"{model.name} tells only its most probable tokens; a draft needs whole distributions")
        self.model, self.shape = model, shape or Chain()
        if not self.shape.is_chain and not model.supports_trees:
            raise ValueError(f"{model.name} takes chains only: use it with the shape Chain")
        self.needs_trees = not self.shape.is_chain
        self._follower = Follower(model)

    def check(self, target: LanguageModel) -> None:
        if target.vocab.digest != self.model.vocab.digest:
            raise ValueError(f"{self.model.name} and {target.name} have different vocabularies")

    def propose(self, rows: Sequence[Row]) -> Draft:
        ends = frozenset(self.model.vocab.eos_ids)
        growths = [
            Growth(
                self._room(row),
                row.generator,
                frozenset() if row.running.request.ignore_eos else ends,
                is_greedy(row.running.request.transform),
            )
            for row in rows
        ]
        plans = [self.shape.begin(growth) for growth in growths]
        # A context beyond the draft's own cannot be followed: such rows do without guesses.
        able = [index for index, growth in enumerate(growths) if growth.room > 0]
        if not able:
            return Draft(tuple(growth.branches() for growth in growths))
        said = self._read([rows[index] for index in able])
        wanted = [(index, ROOT) for index in able]
        while wanted:
            laws = self._laws([(rows[index], growths[index], node) for index, node in wanted], said.logits()[:, 0])
            found: dict[int, dict[int, Tensor]] = {}
            for number, ((index, node), law) in enumerate(zip(wanted, laws, strict=True)):
                found.setdefault(index, {})[node] = law
                if self.shape.listens:
                    plans[index].hear(node, said[number])
            wanted = [(index, node) for index, by_node in found.items() for node in plans[index].level(by_node)]
            if wanted:
                said = self._look([rows[index] for index in able], able, growths, wanted)
        return Draft(tuple(growth.branches() for growth in growths))

    def _read(self, rows: Sequence[Row]) -> Next:
        """What the draft says [B, 1] after the context of each row."""
        return self._follower.read([row.running.ticket for row in rows], [row.context for row in rows])

    def _room(self, row: Row) -> int:
        limit = self.model.context_length
        return row.room if limit is None else min(row.room, limit - len(row.context))

    def _look(
        self, rows: Sequence[Row], able: Sequence[int], growths: Sequence[Growth], wanted: Sequence[tuple[int, int]]
    ) -> Next:
        """What the draft says [M, 1] after these nodes, each a number of `able` and a node of its growth.

        Args:
            rows: those last given to `_read`, in that order.
            able: their numbers among the growths.
        """
        state = self._follower.state
        assert state is not None
        if self.shape.is_chain:
            fed = {index: growths[index].tokens[node] for index, node in wanted}
            said = self.model.extend(state, [[fed.get(index, ABSENT)] for index in able])
            return said[[able.index(index) for index, _ in wanted]]
        # The whole tree is fed anew: one pass for all rows, however their trees differ, and nothing to undo.
        width = max(len(growths[index].tokens) for index in able)
        trees = [growths[index] for index in able]
        tokens = [[*growth.tokens, *[ABSENT] * (width - len(growth.tokens))] for growth in trees]
        parents = [[*growth.parents, *[ROOT] * (width - len(growth.parents))] for growth in trees]
        said = self.model.extend(state, tokens, torch.tensor(parents))
        state.keep([])
        place = {index: number for number, index in enumerate(able)}
        mask = torch.zeros(len(able), width, dtype=torch.bool)
        asked = [(place[index], node) for index, node in wanted]
        mask[[row for row, _ in asked], [node for _, node in asked]] = True
        order = {at: number for number, at in enumerate(map(tuple, mask.nonzero().tolist()))}
        return said[mask][[order[at] for at in asked]]

    def _laws(self, nodes: Sequence[tuple[Row, Growth, int]], logits: Tensor) -> list[Tensor]:
        """q [V] in float64 after each node, under the transform of its row."""
        laws: list[Tensor] = [logits.new_empty(0)] * len(nodes)
        groups: dict[int, list[int]] = {}
        for number, (row, _, _) in enumerate(nodes):
            groups.setdefault(id(row.running.request.transform), []).append(number)
        for members in groups.values():
            some = [nodes[number] for number in members]
            transform = some[0][0].running.request.transform
            scores = logits[members]
            if not some[0][1].is_chosen:
                scores = transform(scores, self._context(some, is_random=transform.is_random))
            found = normalise(scores).double().cpu().softmax(-1)
            for number, law in zip(members, found, strict=True):
                laws[number] = law
        return laws

    def _context(self, nodes: Sequence[tuple[Row, Growth, int]], *, is_random: bool) -> Context:
        paths = [growth.path(node) for _, growth, node in nodes]
        coins = [torch.rand((), dtype=torch.float64, generator=row.generator) for row, _, _ in nodes]
        return Context(
            prompts=[row.running.request.prompt for row, _, _ in nodes],
            outputs=[
                [*row.running.tokens, *(growth.tokens[i] for i in path)]
                for (row, growth, _), path in zip(nodes, paths, strict=True)
            ],
            surprisals=[
                [*row.running.surprisals, *(-growth.log_probs[i] for i in path)]
                for (row, growth, _), path in zip(nodes, paths, strict=True)
            ],
            uniform=torch.stack(coins) if is_random else None,
            seeds=[row.running.request.seed for row, _, _ in nodes],
            vocab=self.model.vocab,
        )

"""Chimera: a tree of guesses from the states that the target made of the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model._kv import KVMemory
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.next import Next
from nextoken.speculate.chimera_head import ChimeraHead
from nextoken.speculate.context_encoder import KeysValues
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row
from nextoken.speculate.recycling import template

WIDTHS: tuple[tuple[int, ...], ...] = ((4,), (3, 2, 2, 1), (3, 2, 2, 1), (3,), (2,))
"""The released tree: 25 nodes in levels of 4, 8, 8, 3 and 2."""


@method(
    name="Chimera",
    arxiv="2402.15758",
    access="white",
    trained=True,
    summary="a trigram encoder and one layer over the target's own states guess the next tokens",
)
class Chimera(Drafter):
    """A tree whose nodes of level j are the best tokens of step j of a `ChimeraHead` after the path that leads there.

    A node reads its own path: siblings have trigrams and paths of their own, and one pass of the layer serves all nodes
    of a level that are gone on from. Of the text so far, keys and values of the target's states are kept, which grow by
    accepted tokens only. Where they are missing (another drafter was at work, say) the target reads the text once more.

    Guesses are chosen and not drawn: `Follow` and `Recursive` are lossless with them, whatever the head says.

    Args:
        head: trained for the target, see `fit_chimera`.
        widths: of the tree, as `recycling.template` has them, at most as many levels as the head has steps; by default
            the beginning of the released tree. `best_template` finds others.

    Raises:
        ValueError: the tree is deeper than the head, or wider than the vocabulary.

    Source: Zeng et al., arXiv:2402.15758. There sampling changes the law; here it does not.
    """

    def __init__(self, head: ChimeraHead, *, widths: Sequence[Sequence[int]] | None = None) -> None:
        chosen = WIDTHS[: head.depth] if widths is None else tuple(widths)
        self.parents, ranks = template(chosen)
        if len(chosen) > head.depth:
            raise ValueError(f"the tree has {len(chosen)} levels and the head {head.depth} steps: cut the tree")
        if max(ranks, default=0) >= head.model.vocab.size:
            raise ValueError(
                f"the tree asks for {max(ranks) + 1} guesses at a node and there are {head.model.vocab.size} tokens"
            )
        self.head = head.eval()
        self.needs_trees = max(ranks, default=0) > 0
        self._levels = _levels(self.parents, ranks)
        self._heard = _Heard(head)

    def check(self, target: LanguageModel) -> None:
        own = self.head.model
        if target is not own and not (own.digest and target.digest == own.digest):
            raise ValueError(f"its head is of {own.name} with other weights than {target.name}: train one for this")
        self._heard = _Heard(self.head)

    def prompted(self, rows: Sequence[Row], said: Next) -> None:
        assert said.hidden is not None
        self._heard.add([row.running.ticket for row in rows], said.hidden, [len(row.context) for row in rows])

    @torch.no_grad()
    def propose(self, rows: Sequence[Row]) -> Draft:
        depth = min(len(self._levels), max(row.room for row in rows))
        if depth < 1:
            return Draft((Branches(),) * len(rows))
        self._complete(rows)
        tokens = self._tree([row.context for row in rows], depth).tolist()
        sizes = [sum(len(level.ranks) for level in self._levels[: min(depth, max(0, row.room))]) for row in rows]
        return Draft(
            tuple(Branches.chosen(own[:size], self.parents[:size]) for own, size in zip(tokens, sizes, strict=True))
        )

    def observe(self, rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        assert said.hidden is not None
        heard = self._heard
        known = [number for number, row in enumerate(rows) if row.running.ticket in heard.tickets]
        if not known:
            return
        heard.arrange([rows[number].running.ticket for number in known])
        paths = [[0, *(node + 1 for node in accepted[number])] for number in known]
        longest = max(map(len, paths))
        places = torch.tensor([[*path, *[0] * (longest - len(path))] for path in paths])
        device = said.hidden.device
        heard.grow(said.hidden[torch.tensor(known, device=device)[:, None], places.to(device)], list(map(len, paths)))

    def leave(self, ticket: int) -> None:
        self._heard.drop(ticket)

    def _complete(self, rows: Sequence[Row]) -> None:
        """Have the states of all rows up to the last token but one, in the order of the rows."""
        heard = self._heard
        lost = [row for row in rows if heard.length(row.running.ticket) != len(row.context) - 1]
        if lost:
            width = max(len(row.context) for row in lost) - 1
            read = [[*row.context[:-1], *[ABSENT] * (width + 1 - len(row.context))] for row in lost]
            hidden = self.head.model.predict(read).hidden
            assert hidden is not None
            heard.add([row.running.ticket for row in lost], hidden, [len(row.context) - 1 for row in lost])
        heard.arrange([row.running.ticket for row in rows])

    def _tree(self, contexts: Sequence[Sequence[int]], depth: int) -> Tensor:
        """Tokens [B, N] of the first `depth` levels."""
        head, heard = self.head, self._heard
        ends = [[*[context[0]] * (head.span - len(context)), *context[-head.span :]] for context in contexts]
        last, device = heard.last[:, None], heard.last.device
        grams = torch.tensor(ends, device=device)[:, None]
        position = torch.tensor([len(context) - 1 for context in contexts], device=device)[:, None]
        context, visible = heard.seen()
        path: KeysValues | None = None
        found = []
        for number, level in enumerate(self._levels[:depth]):
            at = position + number
            guessed = head.look(grams, at, context=context, visible=visible, path=path)
            best = head.said(number, last, guessed).logits().topk(level.width).indices
            tokens = best[:, level.sources.to(device), level.ranks.to(device)]
            found.append(tokens)
            if number + 1 < depth:
                kept, going = level.sources[level.going].to(device), level.going.to(device)
                path = head.onwards(guessed, at, path)
                path = None if path is None else (path[0][:, :, kept], path[1][:, :, kept])
                grams = torch.cat([grams[:, kept, 1:], tokens[:, going, None]], -1)
        return torch.cat(found, 1)


@dataclass(frozen=True)
class _Level:
    """A level of the tree.

    Args:
        sources: for each of its nodes, which of the nodes gone on from, on the level above, it continues.
        ranks: how many guesses there are better.
        going: which of its nodes are gone on from.
    """

    sources: Tensor
    ranks: Tensor
    going: Tensor

    @property
    def width(self) -> int:
        return int(self.ranks.max()) + 1


def _levels(parents: Sequence[int], ranks: Sequence[int]) -> list[_Level]:
    levels, above, inner = list[_Level](), [ROOT], set(parents)
    while nodes := [node for node, parent in enumerate(parents) if parent in above]:
        sources = torch.tensor([above.index(parents[node]) for node in nodes])
        going = [number for number, node in enumerate(nodes) if node in inner]
        levels.append(_Level(sources, torch.tensor([ranks[node] for node in nodes]), torch.tensor(going).long()))
        above = [nodes[number] for number in going]
    return levels


class _Heard:
    """What is kept of the rows: keys and values of the target's states of each, and its last state."""

    def __init__(self, head: ChimeraHead, tickets: Sequence[int] = ()) -> None:
        self.head = head
        self.tickets: list[int | None] = list(tickets)
        """Of each row; None for one that has left."""
        self.memory = KVMemory([0] * len(tickets), head.stack.visibility)
        self.last = torch.empty(0)

    def length(self, ticket: int) -> int:
        """States kept of a row, 0 if it is unknown."""
        return self.memory.lengths[self.tickets.index(ticket)] if ticket in self.tickets else 0

    def add(self, tickets: Sequence[int], hidden: Tensor, counts: Sequence[int]) -> None:
        """New rows, with states [B, n, H] of which `counts` are of tokens; what was known of them is forgotten."""
        for ticket in tickets:
            self.drop(ticket)
        new = _Heard(self.head, tickets)
        new.grow(hidden, counts)
        if self.tickets:
            new.memory, new.last = self.memory.join([new.memory]), torch.cat([self.last, new.last])
        self.tickets, self.memory, self.last = [*self.tickets, *tickets], new.memory, new.last

    def drop(self, ticket: int) -> None:
        """Forget a row: at once if no other is left, else with the next `arrange`."""
        self.tickets = [None if own == ticket else own for own in self.tickets]
        if not any(own is not None for own in self.tickets):
            self.tickets, self.memory, self.last = [], KVMemory([], self.memory.visibility), torch.empty(0)

    def arrange(self, tickets: Sequence[int]) -> None:
        """Have these rows, which are known, in this order and no others."""
        if self.tickets != list(tickets):
            rows = [self.tickets.index(ticket) for ticket in tickets]
            self.memory, self.last, self.tickets = self.memory.fork(rows), self.last[rows], list(tickets)

    @torch.no_grad()
    def grow(self, hidden: Tensor, counts: Sequence[int]) -> None:
        """Add the first counts[b] of the states [B, n, H] to row b; at least one each."""
        memory, n = self.memory, hidden.shape[1]
        slots = torch.tensor(memory.lengths)[:, None] + torch.arange(n)
        slots = slots.to(hidden.device)
        fresh = self.head.remembered(hidden, slots)
        if fresh is not None:
            past = max(memory.lengths)
            memory.cache.reach(1)
            memory.cache.open(past, past + n, slots)
            memory.cache.layers[0].update(*fresh)
        memory.advance(counts)
        self.last = hidden[range(len(counts)), [count - 1 for count in counts]]

    def seen(self) -> tuple[KeysValues | None, Tensor]:
        """Keys and values [B, G, S, D], and which of them are a row's own [B, 1, S]."""
        used = max(self.memory.lengths)
        own = torch.arange(used) < torch.tensor(self.memory.lengths)[:, None]
        buffers = self.memory.cache.layers[0].buffers if self.memory.cache.layers else None
        if buffers is None:
            return None, own[:, None]
        return (buffers[0][:, :, :used], buffers[1][:, :, :used]), own[:, None].to(self.last.device)

"""Several continuations of each row fed at once, as one tree without repetitions, to models with and without trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.model.next import DenseNext, Next


@dataclass
class Trie:
    """Token strings as one tree below the `kept` tokens that they share; each string is the path to its end."""

    kept: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, held: Sequence[int], strings: Sequence[tuple[int, ...] | None]) -> Trie:
        """Of strings, None where there is none (its end is 0), below as much as all of them share with `held`.

        The last token of each string is always a node, for it is the one whose distribution is wanted.
        """
        shared = [min(_common(held, string), len(string) - 1) for string in strings if string is not None]
        trie = cls(min(shared, default=len(held)))
        children: dict[tuple[int, int], int] = {}
        for string in strings:
            node = -1
            for token in () if string is None else string[trie.kept :]:
                child = children.setdefault((node, token), len(trie.tokens))
                if child == len(trie.tokens):
                    trie.tokens.append(token)
                    trie.parents.append(node)
                node = child
            trie.ends.append(max(node, 0))
        return trie

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))

    def path(self, index: int) -> list[int]:
        """Nodes of string number `index`, from the top."""
        nodes = [self.ends[index]]
        while self.parents[nodes[-1]] >= 0:
            nodes.append(self.parents[nodes[-1]])
        return nodes[::-1]


def feed_together(model: LanguageModel, state: State, tries: Sequence[Trie]) -> Next:
    """Feed all tries as one tree, or as chains where they are, and return the Next [B, n] at their ends."""
    width = max(1, *(len(trie.tokens) for trie in tries))
    tokens = torch.tensor([[*trie.tokens, *[ABSENT] * (width - len(trie.tokens))] for trie in tries])
    parents = torch.tensor([[*trie.parents, *[-1] * (width - len(trie.parents))] for trie in tries])
    chains = all(trie.is_chain for trie in tries)
    said = model.extend(state, tokens, None if chains else parents)
    columns = torch.tensor([trie.ends for trie in tries])
    return said._take(torch.arange(len(tries))[:, None].expand_as(columns), columns)


def feed_apart(model: LanguageModel, state: State, tries: Sequence[Trie], last: Sequence[int]) -> tuple[State, Next]:
    """The same for a model that takes chains only, branch by branch; also the state at the end of string last[b].

    A row is as it was where last[b] is -1, or where another string goes on from that end. `state` is left as it was.
    """
    states, rows = [], []
    for row, trie in enumerate(tries):
        own, said = _walk(model, state.fork([row]), trie, trie.ends[last[row]] if last[row] >= 0 else -1)
        states.append(own)
        rows.append([said[end] for end in trie.ends] if said else None)
    # Rows without a token have no distribution: anything of the right size stands in for it.
    like = next((row[0] for row in rows if row), torch.zeros(model.vocab.size))
    dense = [torch.stack(row or [torch.zeros_like(like)] * len(tries[0].ends)) for row in rows]
    return states[0].join(*states[1:]), DenseNext(torch.stack(dense))


def _walk(model: LanguageModel, state: State, trie: Trie, last: int) -> tuple[State, list[Tensor]]:
    """log p [V] at each node of one row's trie, and the state at node `last` or, if no branch ends there, as it was."""
    children: dict[int, list[int]] = {node: [] for node in range(-1, len(trie.tokens))}
    for node, parent in enumerate(trie.parents):
        children[parent].append(node)
    ended, said = state, [torch.empty(0)] * len(trie.tokens)
    waiting = [(state.fork([0]), node) for node in children[-1]]
    while waiting:
        own, node = waiting.pop()
        chain = [node]
        while len(children[chain[-1]]) == 1:
            chain += children[chain[-1]]
        log_probs = model.extend(own, [[trie.tokens[at] for at in chain]]).log_probs()[0]
        for at, told in zip(chain, log_probs, strict=True):
            said[at] = told
        if chain[-1] == last:
            ended = own
        waiting += [(own.fork([0]), child) for child in children[chain[-1]]]
    return ended, said


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two strings share at their beginning."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(i for i in range(size) if left[i] != right[i])

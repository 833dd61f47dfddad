"""Spelling: the tokens of a vocabulary as a tree over their bytes, walked level by level."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from nextoken.constrain._automaton import Automaton
from nextoken.model.vocab import Vocab


@dataclass(frozen=True)
class Level:
    """Tokens' beginnings of one length, each once: what comes before the last byte, that byte, and who ends there."""

    parents: NDArray[np.int64]
    """Which beginning of the level before each goes on from."""
    last: NDArray[np.uint8]
    tokens: NDArray[np.int64]
    """Tokens of this length."""
    ends: NDArray[np.int64]
    """The beginning that each of them is."""


class Spelling:
    """All tokens of a vocabulary that have bytes."""

    def __init__(self, vocab: Vocab) -> None:
        self.size = vocab.size
        spelt = sorted(
            (spelled, token)
            for token, spelled in enumerate(vocab.token_bytes)
            if spelled and token not in vocab.eos_ids
        )
        self.levels: list[Level] = []
        if not spelt:
            return
        tokens = np.array([token for _, token in spelt])
        lengths = np.array([len(spelled) for spelled, _ in spelt])
        longest = int(lengths.max())
        table = np.array([spelled for spelled, _ in spelt], dtype=f"S{longest}")
        matrix = table.view(np.uint8).reshape(len(spelt), longest)
        # In order, tokens with a common beginning are neighbours: `shared` bytes with the one before.
        differs = (matrix[1:] != matrix[:-1]).cumsum(1) == 0
        shared = np.concatenate([[0], np.minimum(differs.sum(1), np.minimum(lengths[1:], lengths[:-1]))])
        above = np.zeros(len(spelt), dtype=np.int64)
        for depth in range(1, longest + 1):
            here = lengths >= depth
            first = here & (shared < depth)
            node = first.cumsum() - 1
            ending = lengths == depth
            self.levels.append(Level(above[first], matrix[first, depth - 1], tokens[ending], node[ending]))
            above = node

    def mask(self, automaton: Automaton, number: int) -> NDArray[np.bool_]:
        """Which tokens lead from state `number` to a state [V]."""
        found = np.zeros(self.size, dtype=np.bool_)
        before = np.array([number], dtype=np.int32)
        for level in self.levels:
            here = before[level.parents]
            alive = (here >= 0).nonzero()[0]
            if not len(alive):
                break
            reached = np.full(len(here), Automaton.DEAD, dtype=np.int32)
            reached[alive] = automaton.moves(here[alive], automaton.classes[level.last[alive]])
            found[level.tokens] = reached[level.ends] >= 0
            before = reached
        return found


_SPELLINGS: WeakKeyDictionary[Vocab, Spelling] = WeakKeyDictionary()


def spelling(vocab: Vocab) -> Spelling:
    """The spelling of a vocabulary, made once and kept as long as the vocabulary is."""
    found = _SPELLINGS.get(vocab)
    if found is None:
        found = _SPELLINGS[vocab] = Spelling(vocab)
    return found

"""Token Recycling: guesses from the successors that the target itself last found likely."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.next import Next
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row

WIDTHS: tuple[tuple[int, ...], ...] = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (6, 3, 2, 1, 3, 2, 1, 2, 1, 1, 1, 1, 1),
    (4, 2, 1, 1, 2, 1, 1, 1, 1, 1),
    (3, 1, 1, 1, 1, 1),
    (2, 1),
)
"""Children of the first nodes of each level, in order: 80 nodes in levels of 8, 21, 25, 15, 8 and 3."""


def template(widths: Sequence[Sequence[int]] = WIDTHS) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parents and ranks of the nodes of a tree whose l-th level gives widths[l][i] children to its i-th node.

    Raises:
        ValueError: a level names more nodes than there are.
    """
    parents: list[int] = []
    ranks: list[int] = []
    level = [ROOT]
    for number, counts in enumerate(widths):
        if len(counts) > len(level):
            raise ValueError(f"level {number} has {len(level)} nodes and widths for {len(counts)}")
        begin = len(parents)
        for node, width in zip(level, counts, strict=False):
            parents += [node] * width
            ranks += range(width)
        level = list(range(begin, len(parents)))
    return tuple(parents), tuple(ranks)


@method(
    name="Token Recycling",
    arxiv="2408.08696",
    access="gray",
    summary="guesses from an adjacency matrix of the target's own likeliest successors",
)
class Recycling(Drafter):
    """M [V, k]: for each token the k likeliest successors when the target last saw it; a fixed tree is filled from it.

    Node (i_1, .., i_d) of the tree is the i_d-th successor of its parent. After each pass the rows of M of all tokens
    fed, accepted or not, are overwritten with the target's top k there. M is shared by all texts and kept between
    calls. Unlike the released code, tokens never seen propose nothing, and siblings never repeat a token.

    Args:
        k: successors kept.
        widths: of the tree, see `template`.

    Source: Luo et al., arXiv:2408.08696.
    """

    needs_trees = True

    def __init__(self, *, k: int = 8, widths: Sequence[Sequence[int]] = WIDTHS) -> None:
        self.parents, self.ranks = template(widths)
        if k < max(self.ranks, default=0) + 1:
            raise ValueError(f"the tree asks for {max(self.ranks) + 1} successors of a token and k is {k}")
        self.k = k
        self.successors: Tensor | None = None
        """M, -1 where nothing is known."""

    def check(self, target: LanguageModel) -> None:
        size = target.vocab.size
        if self.successors is not None and len(self.successors) != size:
            raise ValueError(f"it has recycled {len(self.successors)} tokens, and {target.name} has {size}")
        if self.successors is None:
            self.successors = torch.full((size, min(self.k, size)), -1, dtype=torch.int32)

    def propose(self, rows: Sequence[Row]) -> Draft:
        assert self.successors is not None
        return Draft(tuple(self._guess(row) for row in rows))

    def _guess(self, row: Row) -> Branches:
        assert self.successors is not None
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        number: dict[int, int] = {ROOT: ROOT}
        known: dict[int, list[int]] = {}
        for node, (parent, rank) in enumerate(zip(self.parents, self.ranks, strict=True)):
            if parent not in number:
                continue
            above = number[parent]
            depth = 1 if above == ROOT else depths[above] + 1
            last = row.context[-1] if above == ROOT else tokens[above]
            if last not in known:
                known[last] = self.successors[last].tolist()
            if depth > row.room or rank >= len(known[last]) or known[last][rank] < 0:
                continue
            number[node] = len(tokens)
            tokens.append(known[last][rank])
            parents.append(above)
            depths.append(depth)
        return Branches.chosen(tokens, parents)

    def observe(self, rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        assert self.successors is not None
        best = said.statistics(top=self.successors.shape[1]).top_ids
        assert best is not None
        best = best.cpu().to(torch.int32)
        for number, (row, branches, nodes) in enumerate(zip(rows, draft.rows, accepted, strict=True)):
            # Of a token that stands several times in the tree, what the target said where it was accepted counts.
            order = [*(node for node in range(len(branches)) if node not in nodes), ROOT, *nodes]
            for node in order:
                token = row.context[-1] if node == ROOT else branches.tokens[node]
                self.successors[token] = best[number, node + 1]

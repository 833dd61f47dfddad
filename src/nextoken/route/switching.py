"""Switching: at every token one of two models answers, chosen by a rule from the tokens so far."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nextoken.model import tree
from nextoken.model.base import ABSENT, LanguageModel, Memory, State, Tokens
from nextoken.model.next import Next
from nextoken.route.cost import Cost, Spent, named_parameters
from nextoken.route.switch_rule import LARGE, SMALL, Standing, SwitchRule
from nextoken.route.switched_next import SwitchedNext

_ENTRIES = 1 << 22
"""Probabilities held at once for entropies."""


class Switched(Memory):
    """The states of both models, each of which may lag behind the text, and the standing after every kept token."""

    def __init__(self, rule: SwitchRule, states: Sequence[State], standings: Sequence[list[Standing]]) -> None:
        self.rule, self.states, self.standings = rule, tuple(states), [list(row) for row in standings]
        self._waiting: list[list[Standing | None]] = []

    def last(self, row: int) -> Standing:
        return self.standings[row][-1] if self.standings[row] else self.rule.begin()

    def hold(self, left: Sequence[list[Standing | None]], *, is_tree: bool) -> None:
        """Take the standings left by the tokens of a call: as kept, or as waiting for `keep`."""
        if is_tree:
            self._waiting = list(left)
            return
        for own, fresh in zip(self.standings, left, strict=True):
            own.extend(standing for standing in fresh if standing is not None)

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        for state in self.states:
            if state.is_pending:
                state.keep(nodes)
        for own, left, path in zip(self.standings, self._waiting, nodes, strict=True):
            own.extend(standing for standing in (left[node] for node in path) if standing is not None)
        self._waiting = []

    def rewind(self, lengths: Sequence[int]) -> None:
        for state in self.states:
            if state.is_pending:
                state.keep([])
            state.rewind([max(0, have - want) for have, want in zip(state.lengths, lengths, strict=True)])
        for own, length in zip(self.standings, lengths, strict=True):
            del own[length:]

    def fork(self, rows: Sequence[int]) -> Switched:
        return Switched(self.rule, [state.fork(rows) for state in self.states], [self.standings[row] for row in rows])

    def join(self, others: Sequence[Memory]) -> Switched:
        every = [self, *(other for other in others if isinstance(other, Switched))]
        states = [first.join(*more) for first, *more in zip(*(memory.states for memory in every), strict=True)]
        return Switched(self.rule, states, [row for memory in every for row in memory.standings])


class Switching(LanguageModel):
    """p(. | s) = p_a(. | s), where a = rule(s) is the small or the large model.

    The rule is a function of the tokens alone, the prompt's among them. So a text is read under the distributions it
    would be drawn from, and seeds, batches and trees mean what they mean for any model. (Where a rule watches entropies
    and one falls within rounding of its threshold, another batch may decide otherwise.)

    Each model has a state of its own and reads only when its turn comes: then it catches up with all tokens it has not
    seen in the same pass. Of a call with many tokens (a prompt, a text) a model that has a turn in it reads them all at
    once. `spent` counts both.

    Args:
        small, large: over one vocabulary, giving whole distributions.
        rule: who answers.
        parameters: activated per token by each; counted where the models are transformers networks.

    Raises:
        ValueError: the vocabularies differ, a model tells only its top tokens, or `parameters` are not two.
    """

    def __init__(
        self,
        small: LanguageModel,
        large: LanguageModel,
        *,
        rule: SwitchRule,
        parameters: tuple[int, int] | None = None,
        name: str | None = None,
    ) -> None:
        if small.vocab.digest != large.vocab.digest:
            raise ValueError(
                f"{small.name} and {large.name} have different vocabularies, so one cannot go on where the other "
                "stopped; see them as models over bytes, or defer whole answers with a Cascade"
            )
        for model in (small, large):
            if model.is_partial:
                raise ValueError(f"{model.name} tells only its most probable tokens; whole distributions are needed")
        self.small, self.large, self.rule = small, large, rule
        self.name = name or f"switching({small.name}, {large.name})"
        self.vocab = small.vocab
        limits = [model.context_length for model in (small, large) if model.context_length is not None]
        self.context_length = min(limits, default=None)
        self.supports_trees = small.supports_trees and large.supports_trees
        self._spent = Cost(
            tuple(Spent(model.name, size) for model, size in named_parameters((small, large), parameters))
        )

    @property
    def models(self) -> tuple[LanguageModel, LanguageModel]:
        return self.small, self.large

    @property
    def spent(self) -> Cost:
        """What both models did since this router was made; differences of it are the cost of what lies between."""
        return self._spent

    @property
    def dtype(self) -> str:
        """The coarser of the two precisions."""
        return min((model.dtype for model in self.models), key=lambda kind: torch.finfo(getattr(torch, kind)).bits)

    @property
    def digest(self) -> str:
        if not all(model.digest for model in self.models):
            return ""
        parts = (type(self).__name__, self.small.digest, self.large.digest, repr(self.rule))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> SwitchedNext:
        """As of `LanguageModel.extend`; the result also tells which model answered where."""
        following = super().extend(state, tokens, parents)
        assert isinstance(following, SwitchedNext)
        return following

    def predict(self, tokens: Tokens) -> SwitchedNext:
        """As of `LanguageModel.predict`; the result also tells which model answered where."""
        following = super().predict(tokens)
        assert isinstance(following, SwitchedNext)
        return following

    def _remember(self, batch: int) -> Switched:
        return Switched(self.rule, [model.start(batch) for model in self.models], [[] for _ in range(batch)])

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> SwitchedNext:
        memory = state.memory
        if not isinstance(memory, Switched) or memory.rule != self.rule:
            raise ValueError(f"this state was started by another model than {self.name}; call start() of this one")
        call = _Call(self.models, memory, state.tokens, tokens, parents)
        try:
            call.run()
        except BaseException:
            # One of the models may have read what the text is not to hold.
            memory.rewind(state.lengths)
            raise
        finally:
            self._spent += Cost(
                tuple(
                    Spent(part.model, part.parameters, *counts)
                    for part, counts in zip(self._spent.models, call.counts, strict=True)
                )
            )
        memory.hold(call.left, is_tree=parents is not None)
        return self._answered(SwitchedNext(call.parts, call.choice, call.active == LARGE), call.sights)

    def _answered(self, said: SwitchedNext, sights: Tensor | None) -> SwitchedNext:
        """What a call returns, given what the rule saw [B, n, k], if it looks at all."""
        return said


class _Call:
    """One call: rows are followed until they need a model that has not read them, which then reads them together."""

    def __init__(
        self,
        models: Sequence[LanguageModel],
        memory: Switched,
        kept: Sequence[tuple[int, ...]],
        tokens: Tensor,
        parents: Tensor | None,
    ) -> None:
        self.models, self.memory, self.kept, self.tokens, self.parents = models, memory, kept, tokens, parents
        batch, n = tokens.shape
        self._ids = tokens.tolist()
        self._above = (tree.chain(batch, n) if parents is None else parents).tolist()
        self._next = [0] * batch
        self._part: list[dict[int, int]] = [{}, {}]
        self._entropy: list[dict[int, list[float]]] = [{}, {}]
        self.left: list[list[Standing | None]] = [[None] * n for _ in range(batch)]
        self.sights: Tensor | None = None
        self._seen: list[list[list[float]]] = []
        self.parts: list[Next] = []
        self.choice = torch.zeros(batch, n, dtype=torch.long)
        self.active = torch.full((batch, n), SMALL)
        self.counts = [[0, 0, 0], [0, 0, 0]]

    def run(self) -> None:
        rows = range(len(self._ids))
        while True:
            wanted: list[list[int]] = [[], []]
            for row in rows:
                missing = self._follow(row)
                if missing is not None:
                    wanted[missing].append(row)
            if not any(wanted):
                break
            for number, some in enumerate(wanted):
                if some:
                    # A state takes one tree at a time, so that a tree is read for all rows or for none.
                    self._read(number, some if self.parents is None else rows)
        if not self.parts:
            self._read(SMALL, rows)

    def _follow(self, row: int) -> int | None:
        """Decide for the nodes of a row in turn; the model that must read before it can go on, None at the end."""
        above, left, ids = self._above[row], self.left[row], self._ids[row]
        # A loop over tokens: who answers next depends on what was said before.
        for node in range(self._next[row], len(ids)):
            self._next[row] = node
            if ids[node] == ABSENT:
                continue
            before = self.memory.last(row) if above[node] < 0 else left[above[node]]
            assert before is not None
            standing = self.memory.rule.at(before, ids[node])
            if self.memory.rule.looks:
                if row not in self._part[SMALL]:
                    return SMALL
                standing = self.memory.rule.seen(standing, self._seen[row][node])
            number = standing.active
            if row not in self._part[number]:
                return number
            left[node] = self.memory.rule.after(standing, self._entropy[number][row][node])
            self.choice[row, node] = self._part[number][row]
            self.active[row, node] = number
            self.counts[number][2] += 1
        self._next[row] = len(ids)
        return None

    def _read(self, number: int, rows: Sequence[int]) -> None:
        said = self._tree(number) if self.parents is not None else self._chain(number, rows)
        if number == SMALL and self.memory.rule.looks:
            # Every row that has a token is read at once, for all of them begin by looking.
            self.sights = self.memory.rule.look(said)
            self._seen = self.sights.tolist()
        if self.memory.rule.watches:
            bits = _bits(said[list(rows)]).tolist()
        else:
            bits = [[math.nan] * len(ids) for ids in self._ids]
        for row, entropies in zip(rows, bits, strict=False):
            self._part[number][row] = len(self.parts)
            self._entropy[number][row] = entropies
        self.parts.append(said)

    def _chain(self, number: int, rows: Sequence[int]) -> Next:
        """What follows each token of the call, the tokens not yet seen being read before them in the same pass."""
        gaps = self._gaps(number, rows)
        fed = [[*gaps[row], *self._ids[row]] if row in gaps else [] for row in range(len(self._ids))]
        said = self._extend(number, fed)
        batch, n = self.tokens.shape
        shift = torch.tensor([len(gaps.get(row, ())) for row in range(batch)])
        if not bool(shift.any()) and said.shape[1] == n:
            return said
        columns = (shift[:, None] + torch.arange(n)).clamp(max=said.shape[1] - 1)
        return said._take(torch.arange(batch)[:, None].expand_as(columns), columns)

    def _tree(self, number: int) -> Next:
        gaps = self._gaps(number, range(len(self._ids)))
        if any(gaps.values()):
            self._extend(number, list(gaps.values()))
        self._count(number, self._ids)
        return self.models[number].extend(self.memory.states[number], self.tokens, self.parents)

    def _gaps(self, number: int, rows: Sequence[int]) -> dict[int, list[int]]:
        seen = self.memory.states[number].lengths
        return {row: list(self.kept[row][seen[row] :]) for row in rows}

    def _extend(self, number: int, fed: Sequence[list[int]]) -> Next:
        self._count(number, fed)
        width = max(1, max(map(len, fed)))
        padded = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in fed])
        return self.models[number].extend(self.memory.states[number], padded)

    def _count(self, number: int, fed: Sequence[list[int]]) -> None:
        self.counts[number][0] += 1
        self.counts[number][1] += sum(token != ABSENT for row in fed for token in row)


def _bits(said: Next) -> Tensor:
    """Entropies [B, n] in bits over the whole vocabulary, some positions at a time.

    `statistics` would find them too, with many others, which takes longer than a pass of a small model.
    """
    batch, n = said.shape
    step = max(1, _ENTRIES // (batch * said.vocab_size))
    blocks = (said[:, begin : begin + step] for begin in range(0, n, step))
    return torch.cat([torch.special.entr(block.log_probs().exp()).sum(-1) for block in blocks], 1) / math.log(2)

"""SortedExits: a decoder left, at every token, at the shallowest of several depths that is sure of what follows."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nextoken.errors import ModelError, OutputError
from nextoken.methods import method
from nextoken.model import _saved
from nextoken.model._derived import Derived
from nextoken.model._exit_memory import ExitMemory
from nextoken.model._exit_pass import ExitPass, Stop
from nextoken.model.base import LanguageModel, State, Tokens
from nextoken.model.exit_counts import ExitCounts
from nextoken.model.exit_next import ExitNext
from nextoken.model.hf import HFModel
from nextoken.model.stack import Stack

_WHAT = "sorted exits"


@method(
    name="S2D",
    arxiv="2407.01955",
    access="white",
    trained=True,
    summary="one draft with several exits for many targets; each guess leaves at the shallowest exit that is sure",
)
class SortedExits(LanguageModel):
    """p = softmax(head(norm(h_e))), e the first of e_1 < ... < e_k with max_v p_{e_j}(v) >= t_j, and e_k where none is.

    All exits share embeddings, final norm and head. Which one speaks is a function of the tokens alone, by the model's
    own distributions: a transform of what is told (a temperature, a nucleus) changes nothing of it. So the model is one
    like any other, with chains, trees and seeds; as a draft (`DraftModel`) it leaves the law of the output as it is.
    (Where a probability falls within rounding of its threshold, another batch may choose otherwise.)

    Layers above an exit run when a token first needs them: it takes along all tokens before it that had left below, in
    the same pass, from their states kept there. Their keys and values, and so what a deep exit says, are those of a
    whole pass. In a batch, rows that stay below idle while others go on.

    An exit whose threshold is 1 or more is never asked; one whose threshold is 0 always speaks, and no layer above it
    is run. So thresholds of 1 are the whole model, a first one of 0 is its first e_1 layers, each at its own cost.

    Args:
        model: of the families that `Stack` takes, fine-tuned so that its exits speak well: see
            `nextoken.speculate.fit_sorted`. Any model will do, but the early exits of most say little.
        exits: numbers of layers, rising; the last may be fewer than the model has.
        thresholds: one for each exit but the last, at least 0.
        name: for display.

    Raises:
        ModelError: the model cannot be run layer by layer.
        ValueError: exits out of order or range, or thresholds not one fewer than they.

    Source: Sorted Speculative Decoding, arXiv:2407.01955; the exits are those of sorted fine-tuning, arXiv:2309.08968.
    How states are kept and caught up is not told there.
    """

    def __init__(
        self,
        model: HFModel | Derived,
        exits: Sequence[int],
        *,
        thresholds: Sequence[float],
        name: str | None = None,
    ) -> None:
        self.stack = Stack(model)
        self.model = self.stack.model
        self.exits = _checked_exits(exits, self.stack.depth)
        self.name = name or f"sorted({self.model.name})"
        self.vocab, self.context_length = self.model.vocab, self.model.context_length
        self._choose(thresholds)

    def at(self, thresholds: Sequence[float]) -> SortedExits:
        """The same weights left at other thresholds, with counts of its own.

        Raises:
            ValueError: not one threshold for each exit but the last.
        """
        other = copy.copy(self)
        other._choose(thresholds)
        return other

    def _choose(self, thresholds: Sequence[float]) -> None:
        self.thresholds = tuple(float(threshold) for threshold in thresholds)
        if len(self.thresholds) != len(self.exits) - 1 or not all(t >= 0 for t in self.thresholds):
            raise ValueError(
                f"exits {self.exits} need {len(self.exits) - 1} thresholds of at least 0, one for each but the last; "
                f"got {self.thresholds}"
            )
        last = next((j for j, t in enumerate(self.thresholds) if t == 0), len(self.exits) - 1)
        self._asked = [*(j for j in range(last) if self.thresholds[j] < 1), last]
        self._stops = [Stop(self.exits[j], self.thresholds[j] if j < last else None) for j in self._asked]
        nothing = (0,) * len(self.exits)
        self._spent = ExitCounts(self.exits, nothing, nothing, nothing)

    @property
    def spent(self) -> ExitCounts:
        """What was done so far; differences of it are what lies between."""
        return self._spent

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def digest(self) -> str:
        within = self.model.digest
        parts = (type(self).__name__, within, self.exits, self.thresholds)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16] if within else ""

    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> ExitNext:
        """As of `LanguageModel.extend`; the result also tells `depth` [B, n], the layers below each exit."""
        following = super().extend(state, tokens, parents)
        assert isinstance(following, ExitNext)
        return following

    def predict(self, tokens: Tokens) -> ExitNext:
        """As of `LanguageModel.predict`; the result also tells `depth` [B, n]."""
        following = super().predict(tokens)
        assert isinstance(following, ExitNext)
        return following

    def states(self, ids: Tensor) -> list[Tensor]:
        """h_{e_j} [B, n, H] at every exit along rows of ids [B, n] read from their start, with gradients.

        What stands to the right of a token does not matter.
        """
        stack = self.stack
        call = stack.parallel(torch.arange(ids.shape[1])[None])
        hidden, found = stack.embed(ids), list[Tensor]()
        for below, above in pairwise((0, *self.exits)):
            hidden = stack.run(hidden, range(below, above), call)
            found.append(hidden)
        return found

    def save(self, folder: str | Path) -> None:
        """Write the model and its tokenizer in Hugging Face layout, and exits and thresholds beside them.

        Raises:
            OutputError: the folder cannot be written.
        """
        settings = {"exits": self.exits, "thresholds": self.thresholds, "name": self.name, "dtype": self.dtype}
        try:
            self.model.model.save_pretrained(folder)
            self.model.tokenizer.save_pretrained(folder)
        except OSError as error:
            raise OutputError(f"the {_WHAT} cannot be written to {folder}: {error}") from error
        digests = {"model": self.model.digest, "vocabulary": self.vocab.digest}
        _saved.save(folder, _WHAT, settings=settings, weights={}, digests=digests)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device | None = None) -> SortedExits:
        """Read what `save` wrote.

        Raises:
            ModelError: it is not there or not whole, or weights or tokenizer are not those that were saved.
        """
        saved = _saved.load(folder, _WHAT)
        try:
            exits, thresholds = saved.settings["exits"], saved.settings["thresholds"]
            name, dtype = saved.settings["name"], saved.settings["dtype"]
        except KeyError as error:
            raise ModelError(f"{folder} holds no whole {_WHAT}: {error} is missing; save them again") from error
        model = HFModel.from_pretrained(folder, dtype=dtype, device=device, local_files_only=True)
        saved.check(model=model.digest, vocabulary=model.vocab.digest)
        return cls(model, exits, thresholds=thresholds, name=name)

    def _remember(self, batch: int) -> ExitMemory:
        empty = torch.empty(0, self.stack.width, dtype=self.stack.network.dtype, device=self.stack.network.device)
        waiting = [[empty] * batch for _ in self._stops[1:]]
        return ExitMemory(self, self.stack.memory(batch), [[0] * batch for _ in self._stops], waiting)

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> ExitNext:
        memory = state.memory
        if not isinstance(memory, ExitMemory) or memory.owner is not self:
            raise ValueError(f"this state was started by another model than {self.name}; call start() of this one")
        call = ExitPass(self.stack, self._stops, memory, tokens, parents)
        said = call.run()
        memory.settle(call.reach, call.waiting, call.ran, is_tree=parents is not None)
        self._count(call)
        return said

    def _count(self, call: ExitPass) -> None:
        read, judged, told = ([0] * len(self.exits) for _ in range(3))
        for segment, exit in enumerate(self._asked):
            judged[exit], told[exit] = call.judged[segment], call.told[segment]
            # Exits that are not asked lie within a segment.
            for inner in range(self._asked[segment - 1] + 1 if segment else 0, exit + 1):
                read[inner] = call.read[segment]
        self._spent += ExitCounts(self.exits, tuple(read), tuple(judged), tuple(told))


def _checked_exits(exits: Sequence[int], depth: int) -> tuple[int, ...]:
    rising = tuple(int(number) for number in exits)
    if not rising or list(rising) != sorted(set(rising)) or not 1 <= rising[0] <= rising[-1] <= depth:
        raise ValueError(f"exits must be rising numbers of layers from 1 to {depth}, got {tuple(exits)}")
    return rising

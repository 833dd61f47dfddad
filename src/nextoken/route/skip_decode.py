"""SkipDecode: a decoder that leaves out ever more of its layers the longer the text that it writes."""

from __future__ import annotations

import copy
import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.methods import method
from nextoken.model import _saved, tree
from nextoken.model._kv import KVMemory
from nextoken.model.base import ABSENT, LanguageModel, Memory, State
from nextoken.model.hf import HFModel
from nextoken.model.next import Next
from nextoken.model.stack import Stack
from nextoken.route._begin import Prompt, begins
from nextoken.route._narrow_call import narrowed, spelt_out
from nextoken.route.cost import Cost, Spent, activated_parameters
from nextoken.route.skip_schedule import LayerSchedule, SkipSchedule, TruncationSchedule

_WHAT = "skips"
_SCHEDULES: dict[str, type[LayerSchedule]] = {kind.__name__: kind for kind in (SkipSchedule, TruncationSchedule)}


class _Kept(Memory):
    """Keys and values, and whose they are: another schedule would find tokens without them."""

    def __init__(self, owner: SkipDecode, slots: KVMemory) -> None:
        self.owner, self.slots = owner, slots

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        self.slots.keep(nodes)

    def rewind(self, lengths: Sequence[int]) -> None:
        self.slots.rewind(lengths)

    def fork(self, rows: Sequence[int]) -> _Kept:
        return _Kept(self.owner, self.slots.fork(rows))

    def join(self, others: Sequence[Memory]) -> _Kept:
        return _Kept(self.owner, self.slots.join([self.owner.own(other) for other in others]))


@method(
    name="SkipDecode",
    arxiv="2307.02628",
    access="white",
    trained=True,
    summary="layers left out by a schedule over the generated tokens, the lower and middle ones first",
)
class SkipDecode(LanguageModel):
    """h <- layer_l(h) for the layers l in A_t alone, in their order, then norm and head; t counts generated tokens.

        schedule = SkipSchedule(most=5, least=2, tokens=64)
        skips, losses = fit_skips(model, schedule, rows, prompt=32)

    A token attends to all tokens before it, for A_t lies in all sets before it: each layer has their keys. Nothing is
    run twice or copied from other layers. t = i - P for the i-th token of a text whose prompt has P; the prompt goes
    through A_1. Both are functions of the tokens, so that a text is read as it would be written, and rows of a batch
    whose prompts end elsewhere, or branches of a tree, have each its own t. `spent` counts by layer.

    Without training under the schedule the loss rises steeply with every layer that is left out: see `fit_skips`.

    Args:
        model: a transformers model built like Llama. Its weights are used, not copied.
        schedule: A_t, the sets of layers.
        prompt: P, begin token included; or the ids that end a prompt (of a template, say), P then being the number of
            tokens up to the end of their first occurrence. A text in which they do not occur is all prompt. A number is
            the same for all texts: with prompts of other lengths, t is counted from elsewhere.
        base: digest of the model that was fine-tuned; by default this model's own.
        name: for display.

    Raises:
        ModelError: the model is built otherwise.
        ValueError: sets that do not lie in one another or name layers that are not there, a negative P, no ids, or ids
            outside the vocabulary.

    Source: SkipDecode, arXiv:2307.02628, section 3. How prompts are treated is reconstructed.
    """

    def __init__(
        self,
        model: HFModel,
        schedule: LayerSchedule,
        *,
        prompt: int | Sequence[int],
        base: str | None = None,
        name: str | None = None,
    ) -> None:
        self.stack = Stack(model)
        self.model, self.schedule = self.stack.model, schedule
        self.stages = schedule.stages(self.stack.depth)
        self.prompt = _checked(prompt, model)
        self.base = self.model.digest if base is None else base
        self.name = name or f"skips({model.name})"
        self.vocab, self.context_length = model.vocab, model.context_length
        sizes = self.stack.layer_parameters
        every = activated_parameters(self.model)
        head = None if every is None else every - sum(sizes)
        layers = [Spent(f"layer {number}", size) for number, size in enumerate(sizes)]
        self._parts = Cost((*layers, Spent("head", head)))
        self._spent = self._parts

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def digest(self) -> str:
        within = self.model.digest
        if not within:
            return ""
        parts = (type(self).__name__, within, self.schedule, self.prompt)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def spent(self) -> Cost:
        """What was read since this model was made: per layer the tokens that went through it, then the head.

        `spent.activated` is the number of parameters activated per distribution given.
        """
        return self._spent

    def hidden(self, tokens: Tensor, begin: Tensor) -> Tensor:
        """h [B, n, H] before the final norm, of whole texts at once and with gradients, as trainers want it.

        Args:
            tokens: [B, n], ABSENT at the end of shorter rows; what is said there is undefined.
            begin: [B, n] or [B, 1], P of each token.
        """
        positions = torch.arange(tokens.shape[1])[None]
        return self._parallel(tokens, self._stages(positions, begin, tokens))

    def own(self, memory: Memory) -> KVMemory:
        """The keys and values within, if they are this model's.

        Raises:
            ValueError: another model started the state.
        """
        if not isinstance(memory, _Kept) or memory.owner is not self:
            raise ValueError(f"this state was started by another model than {self.name}; call start() of this one")
        return memory.slots

    def save(self, folder: str | Path) -> None:
        """Write weights, schedule and prompt to a folder.

        All weights, not an adapter: the whole network was trained to do without its layers, and a layer that is run
        should cost what it cost.

        Raises:
            OutputError: the folder cannot be written.
            ValueError: the schedule is of a class of your own, which could not be read back.
        """
        kind = type(self.schedule)
        if _SCHEDULES.get(kind.__name__) is not kind:
            raise ValueError(f"a {kind.__name__} cannot be saved, only {' and '.join(_SCHEDULES)}: keep the weights")
        settings = {
            "schedule": {"kind": kind.__name__, **asdict(self.schedule)},  # type: ignore[call-overload]
            "prompt": self.prompt,
            "dtype": self.dtype,
            "name": self.name,
        }
        digests = {"model": self.base, "vocabulary": self.vocab.digest}
        _saved.save(folder, _WHAT, settings=settings, weights=self.model.model.state_dict(), digests=digests)

    @classmethod
    def load(cls, folder: str | Path, model: HFModel) -> SkipDecode:
        """What `save` wrote, over weights of its own.

        Args:
            folder: where.
            model: the one that was fine-tuned; it stays as it is.

        Raises:
            ModelError: there is nothing whole in the folder, or it was made of another model.
        """
        saved = _saved.load(folder, _WHAT)
        saved.check(model=model.digest, vocabulary=model.vocab.digest)
        try:
            told = dict(saved.settings["schedule"])
            schedule = _SCHEDULES[told.pop("kind")](**told)
            network = copy.deepcopy(model.model).to(getattr(torch, saved.settings["dtype"]))
            saved.fill(network)
            tuned = HFModel(network, model.tokenizer, name=model.name)
            prompt, name = saved.settings["prompt"], saved.settings["name"]
            return cls(tuned, schedule, prompt=prompt, base=saved.digests["model"], name=name)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"the settings of the skips in {folder} are not whole ({error}); save them again"
            ) from error

    def _remember(self, batch: int) -> Memory:
        return _Kept(self, self.stack.memory(batch))

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        memory = self.own(state.memory)
        fed = _trimmed(tokens) if parents is None else tokens
        lengths = torch.tensor(state.lengths)[:, None]
        depths = torch.arange(fed.shape[1]) if parents is None else tree.depths(parents)
        begin = begins(self.prompt, state.tokens, fed, parents)
        stages = self._stages(lengths + depths, begin, fed)
        hidden = self._cached(memory, fed, parents, stages)
        if parents is None:
            memory.advance((fed != ABSENT).sum(1).tolist())
        self._count(stages)
        return self._said(hidden, tokens.shape[1])

    def _predict(self, tokens: Tensor) -> Next:
        fed = _trimmed(tokens)
        stages = self._stages(torch.arange(fed.shape[1])[None], begins(self.prompt, [()] * len(fed), fed, None), fed)
        self._count(stages)
        return self._said(self._parallel(fed, stages), tokens.shape[1])

    def _said(self, hidden: Tensor, n: int) -> Next:
        return self.stack.next(torch.nn.functional.pad(hidden, (0, 0, 0, n - hidden.shape[1])))

    def _stages(self, positions: Tensor, begin: Tensor, tokens: Tensor) -> Tensor:
        """The stage [B, n] of each token; of absent ones that after the last, which no layer has."""
        return self.stages.at(positions - begin + 1).where(tokens != ABSENT, self.stages.count)

    def _runs(self, stages: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Runs of layers and the tokens [B, n] that go through them, the lowest first."""
        told = [stage for stage in torch.unique(stages).tolist() if stage < self.stages.count]
        reach = [bisect_left(told, until) for until in self.stages.until]
        for share, run in groupby((layer for layer in range(self.stack.depth) if reach[layer]), reach.__getitem__):
            yield list(run), stages <= told[share - 1]

    def _count(self, stages: Tensor) -> None:
        through = stages.flatten().bincount(minlength=self.stages.count).cumsum(0).tolist()
        reads = [through[until - 1] if until else 0 for until in self.stages.until]
        said = through[self.stages.count - 1]
        fresh = [
            Spent(part.model, part.parameters, passes=int(read > 0), read=read)
            for part, read in zip(self._parts.models, reads, strict=False)
        ]
        head = self._parts.models[-1]
        self._spent += Cost((*fresh, Spent(head.model, head.parameters, passes=1, read=said, said=said)))

    def _parallel(self, tokens: Tensor, stages: Tensor) -> Tensor:
        """h [B, n, H] of texts from their start. In a chain the tokens that go through a layer are its first ones, and
        these see each other and nothing else, so that no mask is needed."""
        hidden = self.stack.embed(tokens)
        for layers, active in self._runs(stages):
            rows, width = active.any(1).nonzero()[:, 0], int(active.sum(1).max())
            some = hidden[rows, :width]
            made = self.stack.run(some, layers, self.stack.parallel(torch.arange(width)[None]))
            hidden = hidden.clone()
            hidden[rows, :width] = made.where(active[rows, :width, None].to(made.device), some)
        return hidden

    def _cached(self, memory: KVMemory, tokens: Tensor, parents: Tensor | None, stages: Tensor) -> Tensor:
        """h [B, n, H] of tokens that go on from what is remembered."""
        hidden, whole = self.stack.embed(tokens), self.stack.call(memory, tokens, parents)
        absent, device = stages == self.stages.count, hidden.device
        for layers, active in self._runs(stages):
            if bool((active | absent).all()):
                hidden = self.stack.run(hidden, layers, whole)
                continue
            if whole.visible is None:
                whole = spelt_out(whole, memory, tokens, parents)
            # Rows with fewer active tokens than others are filled up with idle ones, which write to slots of their own.
            rows, width = active.any(1).nonzero(), int(active.sum(1).max())
            columns = (~active[rows[:, 0]]).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
            chosen = active[rows, columns][..., None].to(device)
            rows, columns = rows.to(device), columns.to(device)
            some = hidden[rows, columns]
            made = self.stack.run(some, layers, narrowed(whole, rows, columns))
            hidden[rows, columns] = made.where(chosen, some)
        return hidden


def _trimmed(tokens: Tensor) -> Tensor:
    """Without columns in which no row has a token: they could lie beyond the positions that the model knows."""
    return tokens[:, : int((tokens != ABSENT).sum(1).max())]


def _checked(prompt: int | Sequence[int], model: HFModel) -> Prompt:
    if isinstance(prompt, int):
        if prompt < 0:
            raise ValueError(f"prompt must be a number of tokens or the ids that end one, got {prompt}")
        return prompt
    ids = tuple(int(token) for token in prompt)
    if not ids or not 0 <= min(ids) <= max(ids) < model.vocab.size:
        raise ValueError(
            f"prompt must be a number of tokens, or ids below {model.vocab.size} that end one; got {list(prompt)}"
        )
    return ids

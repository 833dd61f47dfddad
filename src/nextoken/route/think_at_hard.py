"""ThinkAtHard: hard tokens go through the model once more, fed what it foresaw."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError, OutputError
from nextoken.head import Head
from nextoken.methods import method
from nextoken.model import _saved
from nextoken.model.base import ABSENT, LanguageModel, State, Tokens
from nextoken.model.hf import HFModel
from nextoken.model.lora import GatedLora
from nextoken.model.next import HeadNext
from nextoken.model.stack import Stack
from nextoken.route._depth_memory import DepthMemory
from nextoken.route._thinker import Pass, Thinker, Thought
from nextoken.route.cost import Cost, Spent
from nextoken.route.think_decider import AlwaysThink, Decider, LearnedDecider, remade, settings_of

_WHAT, _BACKBONE = "thinking", "backbone"


class ThoughtNext(HeadNext):
    """What follows each token, and how often the token went through the model.

    Args:
        hidden: sum over its passes of norm(h) [B, n, H].
        head: linear, so that it makes the sum of the passes' logits.
        passes: [B, n], from 1; 0 at absent tokens.
    """

    def __init__(self, hidden: Tensor, head: Head, passes: Tensor) -> None:
        super().__init__(hidden, head)
        self.passes = passes

    def _take(self, rows: Tensor, columns: Tensor) -> ThoughtNext:
        said = super()._take(rows, columns)
        return ThoughtNext(said.hidden, self.head, self.passes[rows.cpu(), columns.cpu()])


@method(
    name="Think-at-Hard",
    arxiv="2511.08577",
    access="white",
    trained=True,
    summary="a second pass only at tokens that a decider calls hard, fed the mixture of tokens that the first foresaw",
)
class ThinkAtHard(LanguageModel):
    """p(. | s) = softmax(z_d), z_0 = logits_0, z_d = z_{d-1} + logits_d, with d the last pass that the token makes.

        hard = passes_needed(labelling, rows)
        thinking = fit_thinking(model, rows, hard).model
        thinking = fit_decider(thinking, rows, hard).model

    Pass 0 is the model itself. After pass d the decider says c_d; where it is above the threshold, and d < D - 1, the
    token goes through the model again, at its own position and with the adapter on, fed

        e_{d+1} = sum over the K largest of z_d of softmax_K(z_d)_v E[v].

    A token at position p in pass d attends to what was written at positions p' <= p in passes d' <= d. So nobody's
    first pass depends on what others thought: of a text all tokens make it together, then the hard ones the second; and
    where no token is hard the model is the one within to the last bit. z is kept as the sum of the normed states, in
    float32, of which a linear head makes the sum of the logits: a `Next` is as lazy as that of the model within.

    Where c falls within rounding of the threshold, another batch may decide otherwise.

    Args:
        model: a transformers model built like Llama, its head without bias and soft cap. Its weights are shared.
        adapter: additions to its layers, on in later passes only.
        decider: which tokens are hard, those of the prompt among them.
        threshold: c above it means another pass.
        iterations: D, the most passes a token makes, its first included.
        leading: K.
        base: digest of the model that this one was trained from, where it is another than `model`.

    Raises:
        ModelError: the model is built otherwise.
        ValueError: a setting is out of range, or adapter or decider are for another model.

    Source: Think-at-Hard, arXiv:2511.08577, section 4.
    """

    def __init__(
        self,
        model: HFModel,
        adapter: GatedLora,
        *,
        decider: Decider | None = None,
        threshold: float = 0.9,
        iterations: int = 2,
        leading: int = 100,
        base: str | None = None,
    ) -> None:
        self.thinker = Thinker(model, adapter, iterations=iterations, leading=leading)
        self.model, self.decider = model, AlwaysThink() if decider is None else decider
        depth = self.thinker.stack.depth
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be from 0 to below 1, got {threshold}")
        if (self.decider.layers and max(self.decider.layers) > depth) or self.decider.leading > model.vocab.size:
            raise ValueError(
                f"the decider reads layers {list(self.decider.layers)} and {self.decider.leading} logits; {model.name} "
                f"has {depth} layers and {model.vocab.size} logits"
            )
        self.threshold = float(threshold)
        self.base = model.digest if base is None else base
        self.name, self.vocab, self.context_length = f"thinking({model.name})", model.vocab, model.context_length
        layers = [Spent(f"layer {number}", size) for number, size in enumerate(self.thinker.stack.layer_parameters)]
        added = Spent("adapter", sum(weight.numel() for weight in adapter.parameters()))
        head = Spent("head", self.thinker.stack.head.weight.numel())
        self._spent = Cost((*layers, added, Spent("decider", self.decider.parameters), head))

    @property
    def adapter(self) -> GatedLora:
        return self.thinker.adapter

    @property
    def iterations(self) -> int:
        """D."""
        return self.thinker.iterations

    @property
    def spent(self) -> Cost:
        """What was read since this model was made: by layers and head in every pass, by the adapter in later ones.

        `spent.activated` is the number of parameters activated per distribution given.
        """
        return self._spent

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def digest(self) -> str:
        within = self.model.digest
        if not within:
            return ""
        adapter = _saved.fingerprint(self.adapter.state_dict()), self.adapter.rank, self.adapter.alpha
        rest = self.decider.digest, self.threshold, self.iterations, self.thinker.leading
        return hashlib.sha256(repr((type(self).__name__, within, adapter, rest)).encode()).hexdigest()[:16]

    def with_decider(self, decider: Decider, *, threshold: float | None = None) -> ThinkAtHard:
        """This model with another decider; weights are shared, and the threshold stays unless one is given."""
        return ThinkAtHard(
            self.model,
            self.adapter,
            decider=decider,
            threshold=self.threshold if threshold is None else threshold,
            iterations=self.iterations,
            leading=self.thinker.leading,
            base=self.base,
        )

    @torch.no_grad()
    def with_passes(self, tokens: Tokens, passes: Tokens) -> ThoughtNext:
        """What follows each token of known rows if each made the given number of passes, whatever the decider says.

        For analysis: labels that were made with a look at what follows (`passes_needed`) show what a perfect decider
        would give. Nothing can be generated so.

        Args:
            tokens, passes: [B, n]; ABSENT at the end of shorter rows.

        Raises:
            ValueError: as of `predict`, or a number of passes is not from 1 to D.
        """
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
        ids, _ = self._checked((0,) * (ids.shape[0] if ids.ndim == 2 else 1), ids, None)
        wanted = torch.as_tensor(passes, dtype=torch.long, device="cpu").reshape(ids.shape)
        fewest, most = torch.aminmax(wanted[ids != ABSENT])
        if fewest < 1 or most > self.iterations:
            raise ValueError(f"{self.name} makes 1 to {self.iterations} passes; {int(fewest)} to {int(most)} are asked")
        memory = DepthMemory.empty(self, self.thinker.stack, len(ids))
        return self._said(
            self.thinker.run(memory, ids, None, lambda made: wanted.gather(1, made.nodes) > made.depth + 1)
        )

    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> ThoughtNext:
        """As of `LanguageModel.extend`; the result also tells how many passes each token made."""
        said = super().extend(state, tokens, parents)
        assert isinstance(said, ThoughtNext)
        return said

    def predict(self, tokens: Tokens) -> ThoughtNext:
        """As of `LanguageModel.predict`; the result also tells how many passes each token made."""
        said = super().predict(tokens)
        assert isinstance(said, ThoughtNext)
        return said

    def save(self, folder: str | Path) -> None:
        """Write adapter, decider and settings to a folder; and, where the backbone was trained too, the backbone.

        Raises:
            OutputError: the folder cannot be written.
            ValueError: the decider is of a kind of its own.
        """
        changed, adapter = self.base != self.model.digest, self.adapter
        settings = {
            "adapter": {part: getattr(adapter, part) for part in ("rank", "alpha", "targets", "dropout")},
            "decider": settings_of(self.decider),
            "threshold": self.threshold,
            "iterations": self.iterations,
            "leading": self.thinker.leading,
            "backbone": self.model.name if changed else None,
        }
        digests = {"model": self.base, "vocabulary": self.vocab.digest, "backbone": self.model.digest}
        if changed:
            try:
                self.model.model.save_pretrained(Path(folder) / _BACKBONE)
            except OSError as error:
                raise OutputError(f"the backbone cannot be written to {folder}: {error}") from error
        _saved.save(folder, _WHAT, settings=settings, weights=self._weights().state_dict(), digests=digests)

    @classmethod
    def load(cls, folder: str | Path, model: HFModel) -> ThinkAtHard:
        """What `save` wrote.

        Args:
            folder: where.
            model: the one it was trained from. Its weights are shared, unless a trained backbone is in the folder.

        Raises:
            ModelError: there is nothing whole in the folder, or it was trained from another model.
        """
        saved = _saved.load(folder, _WHAT)
        saved.check(model=model.digest, vocabulary=model.vocab.digest)
        base, settings = model.digest, dict(saved.settings)
        try:
            name, adapter, decider = (settings.pop(part) for part in ("backbone", "adapter", "decider"))
            if name is not None:
                model = _backbone(Path(folder) / _BACKBONE, model, name)
                saved.check(backbone=model.digest)
            made = cls(model, GatedLora(Stack(model), **adapter), decider=remade(decider), base=base, **settings)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"the settings of the {_WHAT} in {folder} are not whole ({error}); save it again"
            ) from error
        weights = made._weights()
        saved.fill(weights)
        weights.to(model.network.device)
        return made

    def _weights(self) -> nn.Module:
        parts: dict[str, nn.Module] = {"adapter": self.adapter}
        if isinstance(self.decider, LearnedDecider):
            parts["decider"] = self.decider.network
        return nn.ModuleDict(parts)

    def _remember(self, batch: int) -> DepthMemory:
        return DepthMemory.empty(self, self.thinker.stack, batch)

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> ThoughtNext:
        memory = state.memory
        if not isinstance(memory, DepthMemory) or memory.owner is not self:
            raise ValueError(f"this state was started by another model than {self.name}; call start() of this one")
        batch, n = tokens.shape
        # Columns of a chain in which no row has a token could lie beyond the positions that the model knows.
        width = int((tokens != ABSENT).sum(1).max()) if parents is None else n
        if not width:
            blank = torch.zeros(batch, n, self.thinker.stack.width)
            return self._said(Thought(blank, torch.zeros(batch, n, dtype=torch.long), ()))
        thought = self.thinker.run(memory, tokens[:, :width], parents, self._more, layers=self.decider.layers)
        # After its last pass a token is not decided upon.
        return self._said(thought, missing=n - width, decided=thought.read[: self.iterations - 1])

    def _more(self, made: Pass) -> Tensor:
        """c > threshold [B, k]."""
        said = self.decider.probability(self.thinker.seen(made, self.decider.leading))
        return torch.zeros_like(made.active).masked_scatter(made.active, said.cpu() > self.threshold)

    def _said(self, thought: Thought, *, missing: int = 0, decided: Sequence[int] = ()) -> ThoughtNext:
        head = self.thinker.stack.head
        if thought.read:
            self._count(thought.read, decided)
        total = nn.functional.pad(thought.total, (0, 0, 0, missing))
        return ThoughtNext(total.to(head.weight.device), head, nn.functional.pad(thought.passes, (0, missing)))

    def _count(self, read: Sequence[int], decided: Sequence[int]) -> None:
        """Take account of the tokens in each pass, and of those that were decided upon after it."""
        others = {"adapter": read[1:], "decider": decided}
        self._spent += Cost(
            tuple(
                Spent(part.model, part.parameters, len(some), sum(some), read[0] if part.model == "head" else 0)
                for part in self._spent.models
                for some in [others.get(part.model, read)]
            )
        )


def _backbone(folder: Path, model: HFModel, name: str) -> HFModel:
    found = HFModel.from_pretrained(
        folder, dtype=model.dtype, device=model.network.device, local_files_only=True, tokenizer=model.tokenizer
    )
    return HFModel(found.model, model.tokenizer, name=name)

"""Shaped: a model whose distribution is moved towards what it said itself within a few texts known to be true."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from nextoken.head import Statistics, statistics_from_logits
from nextoken.methods import method
from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.model.combined import InStep
from nextoken.model.grounding import GroundingSpace, prefix_text
from nextoken.model.next import Next

_REMOVED = float("-inf")


@method(
    name="CAAD",
    arxiv="2508.02184",
    access="gray",
    summary="logits retrieved from a few true answers by similarity of the context, added where they are confident",
)
class Shaped(LanguageModel):
    """l' = l + strength (l_bar - c) on S = {v : softmax(l_bar)_v >= threshold}, l elsewhere (`add`).

    l_bar = sum_i w_i l_i over the `neighbours` entries of the space most similar to the prefix text, w the softmax of
    their cosines over `temperature`. `interpolate` instead has (1 - strength) log p + strength log softmax(l_bar) on S.
    With strength 0 or a threshold above 1 it is the model itself, to the bit.

    What is added on S alone must not carry the constant that logits are known up to, so l_bar is centred by c:

    - `threshold` (ours): c such that a token on the edge of S gets nothing. No token of S is demoted, and there is no
      jump between S and the rest.
    - `mean`: the mean of l_bar over the vocabulary. Nearest to adding raw logits, whose mean is near 0 in many models;
      all of S is raised by many nats against the rest.
    - `logsumexp`: log softmax(l_bar) is added: every token of S is demoted, the least confident most.

    Args:
        model: any that gives whole distributions.
        space: of this model.
        neighbours: N; all entries where there are fewer.
        threshold: theta. At 0, S is the whole vocabulary, and what is impossible in a retrieved value becomes so.
        strength: lambda, at least 0; at most 1 to interpolate.
        blend, centre: as above; `centre` plays no part in `interpolate`.
        temperature: of the cosines.
        minimum_similarity: entries with a lower cosine are not used; without any the model is left as it is. None, as
            in the paper, uses the nearest whatever they are.

    Raises:
        ValueError: an argument is out of range.
        ModelError: the space was made with another model.

    Source: Context-Aware Adaptive Decoding, arXiv:2508.02184 (later: Retrieval-augmented Decoding). No code was
    published; weights, threshold and aggregation are the paper's, centre and blend are reconstructed. Texts are
    embedded, not token ids, and a character that is not complete yet is left out of them.
    """

    def __init__(
        self,
        model: LanguageModel,
        space: GroundingSpace,
        *,
        neighbours: int = 5,
        threshold: float = 0.01,
        strength: float = 0.5,
        blend: Literal["add", "interpolate"] = "add",
        centre: Literal["threshold", "mean", "logsumexp"] = "threshold",
        temperature: float = 1.0,
        minimum_similarity: float | None = None,
    ) -> None:
        if blend not in ("add", "interpolate") or centre not in ("threshold", "mean", "logsumexp"):
            raise ValueError(
                f"blend must be 'add' or 'interpolate' and centre 'threshold', 'mean' or 'logsumexp', got {blend!r} "
                f"and {centre!r}"
            )
        if neighbours < 1 or threshold < 0 or temperature <= 0:
            raise ValueError(
                "neighbours must be at least 1, threshold at least 0 and temperature above 0, got "
                f"{neighbours}, {threshold} and {temperature}"
            )
        if not 0 <= strength <= (1 if blend == "interpolate" else math.inf):
            raise ValueError(f"strength must be at least 0, and at most 1 to interpolate, got {strength}")
        if threshold == 0 and blend == "add" and centre == "threshold":
            raise ValueError("a threshold of 0 has no edge to centre on: choose centre='mean' or 'logsumexp'")
        if model.is_partial:
            raise ValueError(f"{model.name} tells only its most probable tokens; whole ones are needed")
        space.check(model)
        self.model, self.space = model, space
        self.neighbours, self.threshold, self.strength = neighbours, threshold, strength
        self.blend, self.centre, self.temperature = blend, centre, temperature
        self.minimum_similarity = minimum_similarity
        self.name, self.vocab = f"shaped({model.name})", model.vocab
        self.context_length, self.supports_trees = model.context_length, model.supports_trees

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def digest(self) -> str:
        settings = (self.neighbours, self.threshold, self.strength, self.blend, self.centre, self.temperature)
        parts = (self.model.digest, self.space.digest, settings, self.minimum_similarity)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def retrieve(self, prefixes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Entries [R, N] nearest to each prefix, best first, and their weights [R, N], 0 for those not used."""
        cosines = self.space.similarities(prefixes)
        ordered, entries = cosines.sort(dim=-1, descending=True, stable=True)
        ordered, entries = ordered[:, : self.neighbours], entries[:, : self.neighbours]
        used = torch.ones_like(ordered, dtype=torch.bool)
        if self.minimum_similarity is not None:
            used = ordered >= self.minimum_similarity
        # nan where none is used.
        weights = (ordered / self.temperature).masked_fill(~used, _REMOVED).softmax(-1)
        return entries, weights.nan_to_num(0.0)

    def shape(self, logits: Tensor, prefixes: Sequence[str]) -> Tensor:
        """l' [R, V] from the model's logits l [R, V] after each prefix."""
        own = logits.to(torch.promote_types(logits.dtype, torch.float32))
        entries, weights = self.retrieve(prefixes)
        weights = weights.to(own.dtype)
        retrieved = torch.zeros(own.shape, dtype=own.dtype)
        mean = (weights * self.space.mean[entries]).sum(-1, keepdim=True)
        # One neighbour at a time: N dense values of size V would be as many times the memory.
        for place in range(entries.shape[1]):
            weight = weights[:, place, None]
            value = self.space.values(entries[:, place]).to(own.dtype)
            retrieved += torch.where(weight > 0, weight * value, 0.0)
        retrieved, mean = retrieved.to(own.device), mean.to(own.device)
        confident = torch.log_softmax(retrieved, -1)
        edge = math.log(self.threshold) if self.threshold > 0 else _REMOVED
        support = (confident >= edge) & (weights.sum(-1, keepdim=True) > 0).to(own.device)
        if self.blend == "interpolate":
            total = own.logsumexp(-1, keepdim=True)
            blended = _share(own, 1 - self.strength) + _share(confident + total, self.strength)
        else:
            added = confident
            if self.centre != "logsumexp":
                added = confident - edge if self.centre == "threshold" else retrieved - mean
            blended = own + self.strength * added
        shaped = torch.where(support, blended, own)
        # With a threshold of 0, model and values may call every token impossible between them.
        return torch.where(torch.isfinite(shaped).any(-1, keepdim=True), shaped, own)

    def _remember(self, batch: int) -> InStep:
        return InStep([self.model.start(batch)])

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        assert isinstance(state.memory, InStep)
        following = self.model.extend(state.memory.states[0], tokens, parents)
        return self._following(following, state.tokens, tokens, parents)

    def _predict(self, tokens: Tensor) -> Next:
        return self._following(self.model.predict(tokens), [()] * tokens.shape[0], tokens, None)

    def _following(self, own: Next, kept: Sequence[Sequence[int]], tokens: Tensor, parents: Tensor | None) -> Next:
        if self.strength == 0 or self.threshold > 1:
            return own
        spelled = self.vocab.token_bytes
        chain = list(range(-1, tokens.shape[1] - 1))
        above: list[list[int]] = [chain] * len(kept) if parents is None else parents.tolist()
        rows = []
        for before, fresh, parent in zip(kept, tokens.tolist(), above, strict=True):
            begun = self.vocab.decode(before)
            texts: list[bytes] = []
            for token, node in zip(fresh, parent, strict=True):
                prefix = begun if node < 0 else texts[node]
                texts.append(prefix if token == ABSENT else prefix + spelled[token])
            rows.append(texts)
        return _ShapedNext(own, rows, self)


class _ShapedNext(Next):
    """The model's own Next and the text before each of its distributions; shaped when asked for."""

    def __init__(self, own: Next, prefixes: Sequence[Sequence[bytes]], shaped: Shaped) -> None:
        self._own, self._prefixes, self._shaped = own, prefixes, shaped
        self.shape, self.vocab_size = own.shape, own.vocab_size

    @cached_property
    def _logits(self) -> Tensor:
        own = self._own.logits()
        texts = [prefix_text(prefix) for row in self._prefixes for prefix in row]
        return self._shaped.shape(own.flatten(0, 1), texts).reshape(own.shape)

    def logits(self) -> Tensor:
        return self._logits

    def log_probs(self) -> Tensor:
        return torch.log_softmax(self._logits, -1)

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        return statistics_from_logits(self._logits, targets, top=top)

    def _take(self, rows: Tensor, columns: Tensor) -> _ShapedNext:
        places = zip(rows.tolist(), columns.tolist(), strict=True)
        prefixes = [[self._prefixes[b][i] for b, i in zip(*place, strict=True)] for place in places]
        return _ShapedNext(self._own._take(rows, columns), prefixes, self._shaped)


def _share(scores: Tensor, weight: float) -> Tensor:
    """weight * scores, where an impossible token stays so, or is left out at weight 0."""
    return torch.zeros_like(scores) if weight == 0 else weight * scores

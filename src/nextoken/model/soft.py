"""Soft input: mixtures of tokens, and vectors at large, in the place of tokens.

    mixtures = Mixtures(ids, weights)                 # [B, n, K] each
    next = model.extend_soft(state, mixtures)         # x = sum_k w_k E[i_k] stands where E[token] would

A soft position is one position: it has a place in the memory as a token has, and no spelling. The state notes a token
for it, the one of largest weight, for display. That token does not tell what was fed, so whoever reads `state.tokens`
anew reads another text; `Recalled` is the model that reads it as it was fed.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.model import tree
from nextoken.model.base import ABSENT, Fed, LanguageModel, Memory, State, Tokens
from nextoken.model.combined import InStep
from nextoken.model.next import Next

_BLOCK = 8192  # tokens whose embeddings are made at once when all are wanted
_OFF = 1e-2  # how far weights, perhaps of half precision, may be from summing to 1


@dataclass(frozen=True, eq=False)
class Mixtures:
    """x[b, i] = sum_k weights[b, i, k] E[ids[b, i, k]] + noise[b, i], with E the input embeddings of the model.

    Args:
        ids: [B, n, K] token ids, any of them more than once, -1 (with weight 0) for none; None means all tokens of the
            vocabulary in order, K = V. A position without any token, at the end of a row, is absent.
        weights: [B, n, K], at least 0, with a sum of 1 at each position that is not absent.
        noise: [B, n, d], added after.

    Raises:
        ValueError: shapes that do not fit, weights that are no distribution.
    """

    ids: Tensor | None
    weights: Tensor
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        weights, ids = self.weights, self.ids
        if weights.ndim != 3 or (ids is not None and ids.shape != weights.shape):
            given = tuple(weights.shape) if ids is None else (tuple(ids.shape), tuple(weights.shape))
            raise ValueError(f"ids and weights must both be [B, n, K], got {given}")
        if self.noise is not None and (self.noise.ndim != 3 or self.noise.shape[:2] != weights.shape[:2]):
            raise ValueError(f"noise must be {list(weights.shape[:2])} and a width, got {list(self.noise.shape)}")
        wide = weights.double()
        total = wide.sum(-1)
        present = torch.ones_like(total, dtype=torch.bool) if ids is None else (ids != ABSENT).any(-1)
        if not bool((wide >= 0).all()) or not bool(((total - 1).abs() <= _OFF)[present].all()):
            raise ValueError("weights must be at least 0 and sum to 1 at every position: normalise them first")
        if ids is not None and bool((weights[ids == ABSENT] != 0).any()):
            raise ValueError("an id of -1 means no token and must have weight 0")

    @classmethod
    def of(cls, tokens: Tensor) -> Mixtures:
        """Tokens [B, n] as mixtures of one."""
        return cls(tokens[..., None], (tokens != ABSENT)[..., None].float())

    @property
    def tokens(self) -> Tensor:
        """[B, n]: the token of the largest single weight, of equal ones the first in `ids`; -1 where absent."""
        best = self.weights.argmax(-1)
        return best if self.ids is None else self.ids.gather(-1, best.to(self.ids.device)[..., None])[..., 0]


class SoftModel(LanguageModel):
    """A language model whose input can be a vector of its embedding space in place of a token.

    A subclass gives `embeddings`, `embedding_width` and `_feed_embedded`, with `extend` equal to `extend_embedded` on
    the embeddings of the tokens.
    """

    @property
    @abstractmethod
    def embedding_width(self) -> int:
        """d, the width of the input embeddings."""

    @abstractmethod
    def embeddings(self, ids: Tensor) -> Tensor:
        """E[ids] [..., d]: what stands for these tokens at the model's input, any scaling of its family included."""

    @abstractmethod
    def _feed_embedded(self, state: State, embedded: Tensor, tokens: Tensor, parents: Tensor | None) -> Next:
        """`_feed` with embedded [B, n, d] in place of the embeddings of the tokens [B, n]."""

    def check_soft(self) -> None:
        """Do nothing where the model can be fed mixtures.

        Raises:
            ModelError: it cannot, and why.
        """

    def extend_soft(self, state: State, mixtures: Mixtures, parents: Tokens | None = None) -> Next:
        """Feed n mixtures to each row and return what follows each; the state notes their `tokens`.

        Arguments and errors else as of `extend_embedded`.
        """
        self.check_soft()
        return self.extend_embedded(state, self.embed(mixtures), mixtures.tokens, parents)

    @torch.no_grad()
    def extend_embedded(self, state: State, embedded: Tensor, tokens: Tokens, parents: Tokens | None = None) -> Next:
        """Feed n vectors to each row and return what follows each.

        Args:
            state: from `start`; it is changed in place.
            embedded: [B, n, d]; rounded to the precision of the model.
            tokens: [B, n], what the state is to note for them; -1 where a row has none, as in `extend`.
            parents: for a tree, as in `extend`.

        Raises:
            ValueError: as of `extend`; or vectors of another width, or that are not finite.
            ModelError: the model takes tokens only.
        """
        self.check_soft()
        state._settled("extend")
        ids, nodes = self._checked(state.lengths, tokens, parents)
        if embedded.shape != (*ids.shape, self.embedding_width):
            raise ValueError(f"vectors must be {[*ids.shape, self.embedding_width]}, got {list(embedded.shape)}")
        if not bool(embedded.isfinite().all()):
            raise ValueError("a vector is not finite: less noise, or a model of wider range, is needed")
        result = self._feed_embedded(state, embedded, ids, nodes)
        state._record(Fed(ids, tree.chain(*ids.shape) if nodes is None else nodes, is_tree=nodes is not None))
        return result

    @torch.no_grad()
    def embed(self, mixtures: Mixtures) -> Tensor:
        """x [B, n, d] of mixtures, in float32 or wider; a mixture of one token is its embedding to the last bit.

        Raises:
            ValueError: an id outside the vocabulary, weights over another vocabulary, noise of another width.
        """
        ids, size, width = mixtures.ids, self.vocab.size, self.embedding_width
        if mixtures.noise is not None and mixtures.noise.shape[-1] != width:
            raise ValueError(
                f"{self.name} has embeddings of width {width}, the noise is {mixtures.noise.shape[-1]} wide"
            )
        if ids is None:
            if mixtures.weights.shape[-1] != size:
                raise ValueError(f"{mixtures.weights.shape[-1]} weights for a vocabulary of {size}")
            found = self._all_mixed(mixtures.weights)
        else:
            if ids.numel() and not ABSENT <= int(ids.amin()) <= int(ids.amax()) < size:
                raise ValueError(f"ids from {int(ids.amin())} to {int(ids.amax())} in a vocabulary of {size}")
            rows = _wide(self.embeddings(ids.clamp(min=0)))
            found = (mixtures.weights.to(rows.device, rows.dtype)[..., None, :] @ rows)[..., 0, :]
        return found if mixtures.noise is None else found + mixtures.noise.to(found.device, found.dtype)

    @torch.no_grad()
    def embedding_scale(self) -> float:
        """sqrt(mean E[v, j]^2) over all tokens v and dimensions j: the unit of relative noise."""
        squares = sum(float(rows.double().square().sum()) for _, rows in self._blocks())
        return float((squares / (self.vocab.size * self.embedding_width)) ** 0.5)

    def _all_mixed(self, weights: Tensor) -> Tensor:
        total: Tensor | None = None
        for begin, rows in self._blocks():
            part = weights[..., begin : begin + len(rows)].to(rows.device, rows.dtype) @ rows
            total = part if total is None else total + part
        assert total is not None
        return total

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """E in blocks of rows, each with the id of its first."""
        for begin in range(0, self.vocab.size, _BLOCK):
            yield begin, _wide(self.embeddings(torch.arange(begin, min(begin + _BLOCK, self.vocab.size))))


class Recalled(SoftModel):
    """A model in whose texts positions start .. start + S - 1 hold given vectors, whatever tokens are noted there.

    So the text of a state that was fed something soft can be read, scored and continued by anything that reads tokens:
    p(. | the first tokens, the vectors, the tokens after them).

    Args:
        model: that takes vectors.
        start: the first of the positions, 0 that of the first token.
        vectors: [S, d], as `SoftModel.embed` made them.

    Raises:
        ModelError: the model takes tokens only.
        ValueError: the vectors have another width.
    """

    def __init__(self, model: SoftModel, start: int, vectors: Tensor) -> None:
        model.check_soft()
        if vectors.ndim != 2 or vectors.shape[1] != model.embedding_width or start < 0:
            raise ValueError(
                f"vectors must be [S, {model.embedding_width}] and stand at 0 or later, got {list(vectors.shape)} at "
                f"{start}"
            )
        self.model, self.first, self.vectors = model, start, vectors
        self.name, self.vocab = f"recalled({model.name})", model.vocab
        self.context_length, self.supports_trees = model.context_length, model.supports_trees

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def digest(self) -> str:
        within = self.model.digest
        held = self.vectors.detach().float().cpu().contiguous().numpy().tobytes()
        return hashlib.sha256(repr((within, self.first)).encode() + held).hexdigest()[:16] if within else ""

    @property
    def embedding_width(self) -> int:
        return self.model.embedding_width

    def embeddings(self, ids: Tensor) -> Tensor:
        return self.model.embeddings(ids)

    def _remember(self, batch: int) -> Memory:
        return InStep([self.model.start(batch)])

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        if not len(self.vectors) or min(state.lengths) >= self.first + len(self.vectors):
            return self.model.extend(self._own(state), tokens, parents)
        return self._feed_embedded(state, _wide(self.embeddings(tokens.clamp(min=0))), tokens, parents)

    def _feed_embedded(self, state: State, embedded: Tensor, tokens: Tensor, parents: Tensor | None) -> Next:
        depth = tree.depths(tree.chain(*tokens.shape) if parents is None else parents)
        held = (torch.tensor(state.lengths)[:, None] + depth - self.first).to(embedded.device)
        inside = (held >= 0) & (held < len(self.vectors))
        vectors = self.vectors.to(embedded.device, embedded.dtype)
        embedded = torch.where(inside[..., None], vectors[held.clamp(0, len(vectors) - 1)], embedded)
        return self.model.extend_embedded(self._own(state), embedded, tokens, parents)

    def _own(self, state: State) -> State:
        if not isinstance(state.memory, InStep):
            raise ValueError(f"this state was started by another model than {self.name}; call start() of this one")
        return state.memory.states[0]


def soft_model(model: LanguageModel) -> SoftModel:
    """The model, if it can be fed mixtures.

    Raises:
        ModelError: it has no input embeddings, or takes tokens only.
    """
    if not isinstance(model, SoftModel):
        raise ModelError(
            f"{model.name} is a {type(model).__name__}, which takes tokens only: mixtures of tokens need a model with "
            "input embeddings that runs here (a transformers model)"
        )
    model.check_soft()
    return model


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

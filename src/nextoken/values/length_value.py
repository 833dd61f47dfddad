"""LengthValue: how many tokens are still to come, after every token of a text."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nextoken.errors import ModelError, OutputError
from nextoken.methods import method
from nextoken.model import tree
from nextoken.model.base import ABSENT, State, Tokens
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab
from nextoken.values.scalar_head import ScalarValue

_FORMAT, _SETTINGS = 1, "length.json"


def value_of(lengths: Tensor, discount: float) -> Tensor:
    """u = 1 - g^l, from 0 (ended) to 1 (never ends), in float64; the longer, the larger."""
    return -torch.expm1(lengths.double() * math.log(discount))


class LengthValue(ABC):
    """l(s) with g^l(s) = E[g^R | s], R the tokens still to come after s, the end token counted; g the discount.

        state = value.start(batch=B)
        lengths = value.extend(state, tokens)         # [B, n] -> l of shape [B, n], tokens, float64

    l(s) is the discounted length: that sure length which is worth as much as the random one, u = 1 - g^l = E[1 - g^R].
    It is NOT the expected length: g^R is convex in R, so l <= E[R] (Jensen), the more so the wider R is spread and the
    smaller g. l and u are one number in two units; l is kept because u near 1 would lose long lengths to rounding.
    After an end token l is 0; where no end is possible it is infinite.

    It is driven as a `LanguageModel` is: chains and trees in `extend`, and a state with `keep`, `rewind`, `fork` and
    `join`.
    """

    name: str
    vocab: Vocab
    discount: float
    """g, between 0 and 1."""
    context_length: int | None = None
    supports_trees: bool = True

    @property
    def digest(self) -> str:
        """A short fingerprint: equal digests give equal values. Empty where unknown."""
        return ""

    @abstractmethod
    def start(self, batch: int = 1) -> State:
        """A state of `batch` rows that have seen no token."""

    @abstractmethod
    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        """Feed n tokens to each row; l [B, n], entry (b, i) after the i-th token of the call in row b.

        Arguments and errors as of `LanguageModel.extend`; what stands at absent tokens is undefined.
        """

    def predict(self, tokens: Tokens) -> Tensor:
        """l [B, n] along rows [B, n] read from their start, remembering nothing."""
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
        return self.extend(self.start(ids.shape[0] if ids.ndim == 2 else 1), ids)

    def lengthening(self, tokens: Sequence[int], *, given: int) -> Tensor:
        """d_t = (1 - g) + g u_t - u_(t-1) of the tokens drawn [T - given]: by how much each lengthened the rest.

        Above 0 a token made the rest longer than it was to be expected before it, below 0 shorter; under the policy of
        the value the mean of each is 0. The released code calls |d| > 0.01 a length token.

        Args:
            tokens: ids of prompt and output.
            given: how many of them are the prompt, at least 1.
        """
        if not 0 < given < len(tokens):
            raise ValueError(f"of {len(tokens)} tokens at least one must be given and one drawn; {given} are given")
        u = value_of(self.predict([list(tokens)])[0, given - 1 :], self.discount)
        return (1 - self.discount) + self.discount * u[1:] - u[:-1]


@method(
    name="LenVM",
    arxiv="2604.27039",
    access="white",
    trained=True,
    summary="a head that foretells at every token how many are still to come, as a discounted value",
)
class HFLengthValue(LengthValue):
    """l(s) = log sigmoid(-z(s)) / log g, z(s) a scalar head on the hidden state after s; so u = sigmoid(z).

    Make one with `fit_length_value`. (The paper's V is -u, and larger where the rest is SHORTER.)

    Args:
        scalar: body and head.
        discount: g.

    Raises:
        ValueError: g is not between 0 and 1.

    Source: Length Value Model, arXiv:2604.27039, section 3, and its released code.
    """

    def __init__(self, scalar: ScalarValue, *, discount: float) -> None:
        if not 0 < discount < 1:
            raise ValueError(f"the discount must be between 0 and 1, got {discount}")
        self.scalar, self.discount = scalar, discount
        self.name, self.vocab = f"length({scalar.body.name})", scalar.vocab
        self.context_length, self.supports_trees = scalar.context_length, scalar.supports_trees
        self._ends = torch.tensor(sorted(scalar.vocab.eos_ids), dtype=torch.long)

    @property
    def digest(self) -> str:
        parts = (self.scalar.digest, self.discount)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16] if parts[0] else ""

    def start(self, batch: int = 1) -> State:
        return self.scalar.start(batch)

    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        return self._lengths(self.scalar.extend(state, tokens, parents), tokens)

    def predict(self, tokens: Tokens) -> Tensor:
        return self._lengths(self.scalar.predict(tokens), tokens)

    def save(self, folder: str | Path) -> None:
        """Write to a folder: what `ScalarValue.save` writes, and the discount as JSON.

        Raises:
            OutputError: the folder cannot be written.
        """
        target = Path(folder) / _SETTINGS
        settings = {"format": _FORMAT, "discount": self.discount, "head": self.scalar.head.digest}
        target.unlink(missing_ok=True)
        self.scalar.save(folder)
        try:
            target.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"the length value cannot be written to {folder}: {error}") from error

    @classmethod
    def load(
        cls, folder: str | Path, *, body: HFModel | None = None, device: str | torch.device | None = None
    ) -> HFLengthValue:
        """Read what `save` wrote; arguments and errors as of `ScalarValue.load`."""
        scalar = ScalarValue.load(folder, body=body, device=device)
        try:
            settings = json.loads((Path(folder) / _SETTINGS).read_text(encoding="utf-8"))
            version, discount, head = settings["format"], float(settings["discount"]), settings["head"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder} holds no length value; give a folder written by save()") from error
        if version != _FORMAT or head != scalar.head.digest:
            raise ModelError(f"the length value in {folder} is of another format or another head; save it again")
        return cls(scalar, discount=discount)

    def _lengths(self, said: Tensor, tokens: Tokens) -> Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.long, device=said.device).reshape(said.shape)
        lengths = F.logsigmoid(-said.double()) / math.log(self.discount)
        return lengths.masked_fill(torch.isin(ids, self._ends.to(said.device)), 0.0)


class ExactLengthValue(LengthValue):
    """l of a table model, exactly: w(s) = g sum_x p(x | s) w(s x), w = 1 after an end token, is solved for w = E[g^R].

    In terms of u = 1 - w: u(s) = (1 - g) + g sum_x p(x | s) u(s x). An oracle, for tables of up to a few thousand
    contexts.

    Args:
        model: a table with an end token.
        discount: g.

    Raises:
        ValueError: g is not between 0 and 1, or there is no end token.
    """

    def __init__(self, model: TableModel, *, discount: float) -> None:
        if not 0 < discount < 1:
            raise ValueError(f"the discount must be between 0 and 1, got {discount}")
        if not model.vocab.eos_ids:
            raise ValueError(f"{model.name} has no end token, so its texts have no length; make it with eos=True")
        self.model, self.discount = model, discount
        self.name, self.vocab = f"length({model.name})", model.vocab
        size, order = model.vocab.size, model.order
        self._contexts = {context: row for row, context in enumerate(product(range(size), repeat=order))}
        # For order 0 "after an end token" is no context of its own: it is told by the last token alone.
        p = torch.stack([model.row(context) for context in self._contexts]).exp()
        ends = torch.zeros(size, dtype=torch.bool)
        ends[sorted(model.vocab.eos_ids)] = True
        into = torch.zeros(len(p), len(p), dtype=torch.float64)
        for context, row in self._contexts.items():
            for token in (~ends).nonzero()[:, 0].tolist():
                into[row, self._contexts[(*context, token)[1:] if order else ()]] += p[row, token]
        self._into, self._ending = into, p[:, ends].sum(-1)
        left = torch.eye(len(p), dtype=torch.float64) - discount * into
        # What is left of rounding below 0 stands for contexts from which no end can be reached.
        self._w = torch.linalg.solve(left, discount * self._ending).clamp(min=0.0)

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.model.digest, self.discount)).encode()).hexdigest()[:16]

    def start(self, batch: int = 1) -> State:
        return self.model.start(batch)

    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        kept = state.tokens
        self.model.extend(state, tokens, parents)
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu").reshape(len(kept), -1)
        above = tree.chain(*ids.shape) if parents is None else torch.as_tensor(parents, device="cpu").expand(ids.shape)
        lengths = torch.zeros(ids.shape, dtype=torch.float64)
        for row, (begun, fed, parent) in enumerate(zip(kept, ids.tolist(), above.tolist(), strict=True)):
            texts: list[tuple[int, ...]] = []
            for node, token in enumerate(fed):
                before = begun if parent[node] < 0 else texts[parent[node]]
                texts.append(before if token == ABSENT else (*before, token))
                if token != ABSENT:
                    lengths[row, node] = self.of(texts[node])
        return lengths

    def of(self, text: Sequence[int]) -> float:
        """l after the tokens of a text."""
        if text and text[-1] in self.vocab.eos_ids:
            return 0.0
        w = float(self._w[self._row(text)])
        return math.log(w) / math.log(self.discount) if w > 0 else math.inf

    def law(self, text: Sequence[int], longest: int) -> Tensor:
        """P(R = 1), ..., P(R = longest) of the tokens still to come after a text [longest]; the rest is longer."""
        reached = torch.zeros(len(self._w), dtype=torch.float64)
        reached[self._row(text)] = 1.0
        chances = []
        for _ in range(longest):
            chances.append(reached @ self._ending)
            reached = reached @ self._into
        return torch.stack(chances)

    def _row(self, text: Sequence[int]) -> int:
        assert self.vocab.bos_id is not None
        order = self.model.order
        padded = [self.vocab.bos_id] * order + list(text)
        return self._contexts[tuple(padded[len(padded) - order :])]

"""Deciders: which tokens are hard, so that they go through the model once more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextoken.model import _saved
from nextoken.model.base import ABSENT, LanguageModel

_BATCH = 16
_LAYERS, _OF = (2, 10, 18, 26), 28
"""Whose states the paper's deciders read, and how many layers that model has."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of N tokens after a pass, for a decider to say whether they need another.

    Args:
        states: [N, T, H], after each of the layers that the decider reads, in this pass.
        leading: [N, K], the largest of the logits so far, the largest first, in float32.
        tokens, positions: [N].
        depth: number of the pass, from 0.
    """

    states: Tensor
    leading: Tensor
    tokens: Tensor
    positions: Tensor
    depth: int


class Decider(ABC):
    """c in [0, 1] of every token, from what a pass made of it and of those before it."""

    layers: tuple[int, ...] = ()
    """After how many layers it reads the hidden states; 0 for the embeddings."""
    leading: int = 0
    """How many of the largest logits it reads."""

    @abstractmethod
    def probability(self, seen: Seen) -> Tensor:
        """c [N]."""

    @property
    def parameters(self) -> int:
        """Weights."""
        return 0

    @property
    def digest(self) -> str:
        """Of all that c depends on."""
        return repr(self)


@dataclass(frozen=True)
class NeverThink(Decider):
    """c = 0: the model itself."""

    def probability(self, seen: Seen) -> Tensor:
        return torch.zeros(len(seen.tokens))


@dataclass(frozen=True)
class AlwaysThink(Decider):
    """c = 1: every token goes through all passes."""

    def probability(self, seen: Seen) -> Tensor:
        return torch.ones(len(seen.tokens))


@dataclass(frozen=True)
class RandomThink(Decider):
    """c = 1 with probability `share`, else 0: what any decider must beat at the same share.

    The coins are a function of seed, position, token and depth, so that a text has the same in every batch.

    Args:
        share: of the tokens that go on.
        seed: of the coins.

    Raises:
        ValueError: the share is no share.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {self.share}")

    def probability(self, seen: Seen) -> Tensor:
        mixed = np.full(len(seen.tokens), self.seed % 2**64, dtype=np.uint64)
        for part in (seen.positions.numpy(), seen.tokens.numpy(), np.full(len(mixed), seen.depth)):
            mixed = _scattered(mixed ^ part.astype(np.uint64))
        # 53 bits, so that the quotient is exact and below 1.
        return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) / 2**53 < self.share).float()


class DeciderNetwork(nn.Module):
    """logit(c) [N] of states [N, T, H] and leading logits [N, K].

        x_0 = W [states; W_K leading],   x_i = x_{i-1} + W_i' dropout(gelu(W_i norm(x_{i-1}))),   logit(c) = w norm(x_B)

    Nothing is normalised on its way in.

    Args:
        layers: of which hidden states, by how many layers they have gone through.
        hidden: H.
        leading: K.
        width, blocks, expansion: of x, how many blocks, and how much wider they are inside.
        dropout: share left out while training.

    Source: Think-at-Hard, arXiv:2511.08577, section 4.2; the last norm is in the released code only.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int],
        hidden: int,
        leading: int = 100,
        width: int = 512,
        blocks: int = 6,
        expansion: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not layers or min(layers) < 0 or min(leading, width, blocks, expansion) < 1:
            raise ValueError(
                "a decider reads at least one layer and one logit, and its sizes are at least 1; got "
                f"layers={list(layers)}, leading={leading}, width={width}, blocks={blocks} and expansion={expansion}"
            )
        self.layers, self.leading = tuple(int(layer) for layer in layers), leading
        self.settings: dict[str, Any] = {
            "layers": list(self.layers),
            "hidden": hidden,
            "leading": leading,
            "width": width,
            "blocks": blocks,
            "expansion": expansion,
            "dropout": dropout,
        }
        self.logits = nn.Linear(leading, hidden)
        self.inwards = nn.Linear((len(self.layers) + 1) * hidden, width)
        self.blocks = nn.ModuleList(_Block(width, expansion, dropout) for _ in range(blocks))
        self.outwards = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, states: Tensor, leading: Tensor) -> Tensor:
        kind = self.inwards.weight.dtype
        x = self.inwards(torch.cat([states.to(kind).flatten(1), self.logits(leading.to(kind))], 1))
        for block in self.blocks:
            x = block(x)
        said: Tensor = self.outwards(x)
        return said[:, 0]


class LearnedDecider(Decider):
    """c = sigmoid(network), made by `fit_decider`.

    Args:
        network: in evaluation mode from here on.
    """

    def __init__(self, network: DeciderNetwork) -> None:
        self.network = network.eval()
        self.layers, self.leading = network.layers, network.leading

    def probability(self, seen: Seen) -> Tensor:
        said: Tensor = self.network(seen.states, seen.leading)
        return torch.sigmoid(said.float())

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.network.parameters())

    @property
    def digest(self) -> str:
        return _saved.fingerprint(self.network.state_dict())


_PLAIN: dict[str, type[Any]] = {kind.__name__: kind for kind in (NeverThink, AlwaysThink, RandomThink)}


def settings_of(decider: Decider) -> dict[str, Any]:
    """What JSON needs to know to make a decider again, but for weights."""
    if isinstance(decider, LearnedDecider):
        return {"kind": "LearnedDecider", **decider.network.settings}
    if type(decider) is _PLAIN.get(type(decider).__name__):
        return {"kind": type(decider).__name__, **asdict(decider)}  # type: ignore[call-overload]
    raise ValueError(f"a decider of the kind {type(decider).__name__} cannot be saved: save the model with another")


def remade(settings: dict[str, Any]) -> Decider:
    """The decider of these settings, weights as they happen to be."""
    given = {key: value for key, value in settings.items() if key != "kind"}
    if settings["kind"] == "LearnedDecider":
        return LearnedDecider(DeciderNetwork(**given))
    made: Decider = _PLAIN[settings["kind"]](**given)
    return made


def layers_to_read(depth: int) -> tuple[int, ...]:
    """The layers 2, 10, 18 and 26 of 28, brought to another depth; those that fall together are taken once."""
    return tuple(sorted({round(depth * layer / _OF) for layer in _LAYERS}))


def passes_needed(
    model: LanguageModel, rows: Sequence[Sequence[int]], *, given: Sequence[int] | int = 1
) -> tuple[tuple[int, ...], ...]:
    """For every token of every row 2 where argmax p(. | s) of the label model is not the token that follows, else 1.

    So the labels of one row belong to its positions, and what is hard at a position is to predict the next. The last
    position, after which nothing is known, has 1.

    Args:
        model: the label model; the paper takes a model of the size to be trained, already trained on like texts. Labels
            of another model than the one to be trained say what is hard for that.
        rows: of tokens, the begin token included.
        given: how many tokens at the beginning of each row are not to be learnt, one number for all rows or one per
            row; they have label 1 up to the last of them, which predicts the first one to be learnt.

    Raises:
        ValueError: no rows, an empty one, or as many numbers in `given` as there are rows are needed.

    Source: Think-at-Hard, arXiv:2511.08577, section 4.3.
    """
    before = [given] * len(rows) if isinstance(given, int) else list(given)
    if not rows or not all(rows) or len(before) != len(rows):
        raise ValueError(
            f"labels are for rows of at least one token, with one number in `given` for each; got {len(rows)} rows and "
            f"{len(before)} numbers"
        )
    labels: list[tuple[int, ...]] = []
    for begin in range(0, len(rows), _BATCH):
        some = rows[begin : begin + _BATCH]
        width = max(map(len, some))
        ids = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in some])
        top = model.predict(ids).statistics(top=1).top_ids
        assert top is not None
        missed = (top[:, :-1, 0].cpu() != ids[:, 1:]).tolist()
        for row, wrong, first in zip(some, missed, before[begin : begin + _BATCH], strict=True):
            hard = [place >= first - 1 and wrong[place] for place in range(len(row) - 1)]
            labels.append((*(1 + is_hard for is_hard in hard), 1))
    return tuple(labels)


class _Block(nn.Module):
    """x + W' dropout(gelu(W norm(x))), with dropout again at the end."""

    def __init__(self, width: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width * expansion),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width * expansion, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.inner(x)
        return x + added


def _scattered(numbers: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The finaliser of SplitMix64: every bit of the result depends on every bit given."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

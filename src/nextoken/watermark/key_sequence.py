"""KeySequenceWatermark: tokens drawn with secret numbers from a fixed sequence, found again by alignment."""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nextoken.decode.transform import REMOVED, Context, Transform, check_possible
from nextoken.watermark.alignment import Costs, lowest
from nextoken.watermark.key import Key
from nextoken.watermark.watermark import Detection, Watermark

_AT_ONCE = 1 << 22
"""Numbers of fresh keys held at a time."""


@dataclass(frozen=True, eq=False)
class Reference:
    """phi of unmarked texts, each under a fresh key: what marked texts of as many tokens are compared with.

    Args:
        length: tokens of every text.
        settings: of the watermark that made it.
        values: phi of each text, ascending [R].
    """

    length: int
    settings: str
    values: NDArray[np.float64]

    def p_value(self, phi: float) -> float:
        """(1 + #{r : phi_r <= phi}) / (R + 1)."""
        return (1 + int(np.searchsorted(self.values, phi, side="right"))) / (len(self.values) + 1)


class KeySequenceWatermark(Watermark):
    """Token t of a text is drawn by xi[(tau + t) mod n] of the key xi[0 .. n-1]; tau is uniform, one per text.

    Over the keys, a text has the model's own law (after temperature and truncation), whatever tau is. The detector
    needs neither model nor tau: with c(y_t, xi_j) the cost of a token at a place of the key,

        phi(y, xi) = min over blocks of k tokens and places to begin of the cost of their alignment,
        p = (1 + #{r : phi(y, xi^r) <= phi(y, xi)}) / (R + 1) with R fresh keys xi^r,

    where the cost of an alignment is the sum over its tokens, or Levenshtein's with edits at gamma each, so that tokens
    put in, left out or replaced are forgiven. p is exact for every text that was made without the key.

    Texts of one key share its numbers: the same prompt under the same tau gives the same text, and texts whose windows
    overlap are dependent. tau comes from the request's seed and prompt, so equal seeds still give equal texts. Tokens
    beyond the n-th are drawn unmarked, with a warning, for numbers used twice in a text would change its law.

    Args:
        key: the secret that all of xi is made of.
        length: n, the number of places; also the longest text that is marked to its end.
        gamma: cost of an edit in units of c; infinity for alignment without edits.
        block: k; None takes the whole text (n tokens of a longer one).
        resamples: R.
        seed: of the fresh keys; verdicts on equal texts are equal.

    Raises:
        ValueError: a number is out of range.

    Source: Kuditipudi et al., arXiv:2307.15593. The helper of the official package leaves out the
    +1 of the p-value, without which it can be 0 and is not valid.
    """

    is_distortion_free = True
    purpose: ClassVar[str]
    """Goes into the key, so that watermarks of different kinds have different numbers."""

    def __init__(
        self,
        key: Key,
        *,
        length: int = 256,
        gamma: float,
        block: int | None = None,
        resamples: int = 199,
        seed: int = 0,
    ) -> None:
        for name, value in (("length", length), ("resamples", resamples), ("block", 1 if block is None else block)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not gamma >= 0:
            raise ValueError(f"gamma is the cost of an edit and at least 0, got {gamma}")
        if block is not None and block > length:
            raise ValueError(f"a block of {block} tokens is longer than the key sequence of {length}")
        self.length, self.gamma, self.block, self.resamples, self.seed = length, gamma, block, resamples, seed
        self._key = key.derive(self.purpose)

    @property
    def settings(self) -> str:
        """What a verdict depends on beside key, text and the fresh keys."""
        return f"length={self.length}, gamma={self.gamma}, block={self.block}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._key!r}, {self.settings})"

    def transform(self) -> Transform:
        return _Marking(self)

    @abstractmethod
    def choose(self, scores: Tensor, place: int) -> int:
        """The token that place j of the key draws from softmax(scores) [V]."""

    @abstractmethod
    def costs(self, tokens: NDArray[np.int64]) -> Costs:
        """c(v, xi_j) of tokens v [U] at every place j: [U, n]."""

    @abstractmethod
    def _fresh_costs(self, tokens: NDArray[np.int64], count: int, rng: np.random.Generator) -> Costs:
        """`costs` under fresh keys [count, U, n]; only the columns of these tokens are made."""

    def shift(self, seed: int, prompt: Sequence[int]) -> int:
        """tau, from 0 to n - 1: of the request, not of the key."""
        told = f"{seed}/{','.join(map(str, prompt))}".encode()
        return int.from_bytes(hashlib.sha256(told).digest()[:16], "big") % self.length

    def detect(self, tokens: Sequence[int], *, reference: Reference | None = None) -> Detection:
        """The verdict on a text; its statistic is -phi, high for marked texts, NaN for an empty one.

        Args:
            tokens: of the text alone.
            reference: of `reference`, in place of fresh keys for this text; then one alignment is all there is to do.

        Raises:
            ValueError: the reference has another length or other settings, the text is shorter than the block, or a
                token is none of the vocabulary.
        """
        text = np.asarray(tokens, dtype=np.int64)
        if not len(text):
            return Detection(1.0, math.nan, 0)
        different, column = np.unique(text, return_inverse=True)
        block = self._block(len(text))
        phi = float(lowest(self.costs(different)[column], block, self.gamma))
        if reference is None:
            found = [lowest(costs[:, column], block, self.gamma) for costs in self._fresh(different, text)]
            reference = Reference(len(text), self.settings, np.sort(np.concatenate(found)))
        if (reference.length, reference.settings) != (len(text), self.settings):
            raise ValueError(
                f"the reference is of texts of {reference.length} tokens with {reference.settings}, this text has "
                f"{len(text)} with {self.settings}: make a reference for it, or cut it"
            )
        return Detection(reference.p_value(phi), -phi, len(text))

    def reference(self, texts: Sequence[Sequence[int]], *, length: int) -> Reference:
        """phi of the first `length` tokens of unmarked texts, each under one fresh key.

        With it, p is valid for texts of that law (the paper's experiments: R = 5,000 texts of people), and detection
        takes one alignment rather than R + 1.

        Args:
            texts: R of them, none shorter than `length`.
            length: tokens of every text to be judged.

        Raises:
            ValueError: there are no texts, or one is too short.
        """
        short = next((i for i, text in enumerate(texts) if len(text) < length), None)
        if length < 1 or not len(texts) or short is not None:
            found = f"text {short} has {len(texts[short])}" if short is not None else f"got {len(texts)} texts"
            raise ValueError(f"a reference needs texts of at least {length} tokens, at least one; {found}")
        values = []
        for number, row in enumerate(texts):
            text = np.asarray(row[:length], dtype=np.int64)
            different, column = np.unique(text, return_inverse=True)
            rng = self._key.generator("reference", self.seed, number)
            costs = self._fresh_costs(different, 1, rng)[0, column]
            values.append(float(lowest(costs, self._block(length), self.gamma)))
        return Reference(length, self.settings, np.sort(np.array(values)))

    def _block(self, length: int) -> int:
        if self.block is None:
            return min(length, self.length)
        if length < self.block:
            raise ValueError(f"a text of {length} tokens is shorter than the block of {self.block}: take block=None")
        return self.block

    def _fresh(self, different: NDArray[np.int64], text: NDArray[np.int64]) -> Iterator[Costs]:
        """Costs under R fresh keys, some at a time."""
        # Made of the key, so that nobody can write a text that suits them; of the text, so that verdicts on different
        # texts are independent and on equal texts equal.
        rng = self._key.generator("fresh", self.seed, text.astype("<i8").tobytes())
        at_once = max(1, _AT_ONCE // (len(text) * self.length))
        for start in range(0, self.resamples, at_once):
            yield self._fresh_costs(different, min(at_once, self.resamples - start), rng)


@dataclass(frozen=True)
class _Marking(Transform):
    """The token that the key draws keeps score 0, all others are removed."""

    mark: KeySequenceWatermark

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        if not len(context.seeds) == len(context.prompts) == len(context.outputs) == len(scores):
            raise ValueError(
                "a key-sequence watermark begins at a place that the seed of each request tells, and these rows have "
                "none: mark texts that are sampled (generate, stream), not those of a search"
            )
        marked = check_possible(scores).clone()
        for row, seed in enumerate(context.seeds):  # each row stands at a place of its own
            step = len(context.outputs[row])
            if step >= self.mark.length:
                _warn(self.mark.length)
                continue
            place = (self.mark.shift(seed, context.prompts[row]) + step) % self.mark.length
            token = self.mark.choose(scores[row], place)
            marked[row] = REMOVED
            marked[row, token] = 0.0
        return marked


def _warn(length: int) -> None:
    warnings.warn(
        f"a text is longer than the key sequence of {length}: what comes after its first {length} tokens is not "
        "marked; a watermark with a longer sequence (length=...) marks all of it",
        stacklevel=2,
    )

"""Samples: several answers to each prompt, and the signatures of what the model said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias, TypeVar

import numpy as np

from nextoken.scores.rows import Rows
from nextoken.signature.signature import Signature

T = TypeVar("T")
Comparison: TypeAlias = Callable[[Sequence[str], Sequence[str]], np.ndarray]


class Samples:
    """M_i sampled answers to the i-th of T prompts, all in one signature.

    Args:
        signature: of all answers, those to the first prompt first.
        counts: M_i, how many answers each prompt has [T].

    Raises:
        ValueError: the counts do not add up to the texts of the signature.
    """

    def __init__(self, signature: Signature, counts: Sequence[int]) -> None:
        self.signature = signature
        self.counts = np.asarray(counts, dtype=np.int64)
        if (self.counts < 0).any() or int(self.counts.sum()) != signature.n_texts:
            raise ValueError(
                f"{signature.n_texts} answers do not divide into groups of {list(counts)}: give the number of answers "
                "of each prompt, in order"
            )
        self._compared: dict[tuple[int, bool], tuple[Comparison, list[np.ndarray]]] = {}

    @property
    def rows(self) -> Rows:
        """The rows of all answers."""
        return Rows(self.signature)

    @cached_property
    def prompt(self) -> np.ndarray:
        """Which prompt each answer belongs to [M]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def texts(self) -> list[list[str]]:
        """The answers to each prompt."""
        return self.grouped([self.signature.text(i) for i in range(self.signature.n_texts)])

    @cached_property
    def logprobs(self) -> np.ndarray:
        """log p of each whole answer [M], nats; NaN for one of which no token was scored, not even its end."""
        rows = self.rows
        return np.where(rows.counts > 0, rows.sum(rows["logprob"]), np.nan)

    @cached_property
    def tokens(self) -> list[list[tuple[int, ...]]]:
        """The tokens of the answers to each prompt."""
        ids, offsets = self.signature.column("token_id").tolist(), self.signature.row_offsets.tolist()
        return self.grouped([tuple(ids[begin:end]) for begin, end in pairwise(offsets)])

    def compared(self, by: Comparison, *, prompted: bool = False) -> list[np.ndarray]:
        """by(answers, answers) [M_i, M_i] for each prompt, computed once for each `by` however many scores ask.

        Args:
            by: a similarity or a relation of texts.
            prompted: compare each answer with its prompt before it, where the signature knows the prompt.

        Raises:
            ValueError: `by` gives something else than a number for each pair.
        """
        key = id(by), prompted  # kept with what it names, which therefore lives as long
        if key not in self._compared:
            infos = self.signature.texts
            before = self.grouped([info.prompt if prompted else "" for info in infos])
            found = []
            for prompts, answers in zip(before, self.texts, strict=True):
                texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
                matrix = np.asarray(by(texts, texts)) if texts else np.zeros((0, 0))
                if matrix.shape != (len(texts), len(texts)):
                    raise ValueError(f"{len(texts)} answers were compared, {matrix.shape} came back: give one per pair")
                found.append(matrix)
            self._compared[key] = by, found
        return self._compared[key][1]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean over the answers of each prompt of values [M]; NaN for a prompt without answers."""
        total = np.bincount(self.prompt, weights=values, minlength=len(self.counts))
        return total / np.where(self.counts > 0, self.counts, np.nan)

    def grouped(self, values: Sequence[T]) -> list[list[T]]:
        """One value per answer [M], as a list for each prompt."""
        ends = np.cumsum(self.counts)
        return [list(values[end - count : end]) for end, count in zip(ends, self.counts, strict=True)]

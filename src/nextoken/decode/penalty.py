"""Penalties: scores lowered for what was already said. They go before temperature and truncation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.transform import REMOVED, Context, Transform
from nextoken.methods import method


def _counts(scores: Tensor, rows: Iterable[Sequence[int]]) -> Tensor:
    """How often each token occurs in each row [B, V]."""
    counts = torch.zeros_like(scores, dtype=torch.float32)
    for row, tokens in enumerate(rows):
        if tokens:
            ids = torch.tensor(tokens, device=scores.device)
            counts[row].index_add_(0, ids, torch.ones(len(tokens), device=scores.device))
    return counts


@method(
    name="Repetition penalty", arxiv="1909.05858", access="gray", summary="scores of tokens already seen, scaled down"
)
@dataclass(frozen=True)
class RepetitionPenalty(Transform):
    """l / r where l > 0, else l r, for every token of prompt and output; r > 1 discourages.

    It depends on the sign of the score, hence on the raw logits' arbitrary constant: put it first. Source: CTRL,
    arXiv:1909.05858.
    """

    r: float

    def __post_init__(self) -> None:
        if self.r <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.r}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        seen = _counts(scores, (context.history(row) for row in range(scores.shape[0]))) > 0
        return torch.where(seen, torch.where(scores < 0, scores * self.r, scores / self.r), scores)


@method(name="Presence penalty", access="gray", summary="a constant off the score of every token already generated")
@dataclass(frozen=True)
class PresencePenalty(Transform):
    """l(v) - a [v in output]."""

    a: float

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return scores - self.a * (_counts(scores, context.outputs) > 0)


@method(
    name="Frequency penalty", access="gray", summary="off the score of a token, a constant for each time it occurred"
)
@dataclass(frozen=True)
class FrequencyPenalty(Transform):
    """l(v) - a count of v in the output."""

    a: float

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return scores - self.a * _counts(scores, context.outputs)


@method(name="No-repeat n-gram", access="gray", summary="no n tokens occur twice in a row")
@dataclass(frozen=True)
class NoRepeatNgram(Transform):
    """Forbid every token that would complete an n-gram already in prompt and output."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"no_repeat_ngram needs n >= 1, got {self.n}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        scores = scores.clone()
        for row in range(scores.shape[0]):
            history = context.history(row)
            if len(history) + 1 < self.n:
                continue
            tail = history[len(history) - self.n + 1 :]
            banned = [
                history[end] for end in range(self.n - 1, len(history)) if history[end - self.n + 1 : end] == tail
            ]
            scores[row, banned] = REMOVED
        return scores


@method(name="DRY", access="gray", summary="a penalty that grows with the length of the repetition it would continue")
@dataclass(frozen=True)
class DRY(Transform):
    """l(v) - multiplier base^(m - allowed) where m >= allowed.

    m is the length of the longest suffix of the history that occurred before, followed by v, and crosses no breaker. A
    token that is itself a breaker is exempt. The exponent is held so that the penalty stays finite.

    Args:
        breakers: texts; a token containing one ends a repetition. They need `context.vocab`.
    """

    multiplier: float = 0.8
    base: float = 1.75
    allowed: int = 2
    breakers: tuple[str, ...] = ("\n", ":", '"', "*")

    def __post_init__(self) -> None:
        if self.base < 1 or self.allowed < 1:
            raise ValueError(f"dry needs base >= 1 and allowed >= 1, got {self.base} and {self.allowed}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        scores = scores.clone()
        for row in range(scores.shape[0]):
            history = context.history(row)
            for token, length in self._matches(history, context).items():
                exponent = min(length - self.allowed, 200)
                scores[row, token] -= min(self.multiplier * self.base**exponent, 1e30)
        return scores

    def _matches(self, history: list[int], context: Context) -> dict[int, int]:
        """Token -> length of the longest repetition it would continue, where that is at least `allowed`."""
        longest: dict[int, int] = {}
        lengths = suffix_matches(history)
        limit = next(
            (back for back, token in enumerate(reversed(history)) if self._breaks(token, context)), len(history)
        )
        for end, length in enumerate(lengths[:-1] if lengths else []):
            token, length = history[end + 1], min(length, limit)
            if length >= self.allowed and not self._breaks(token, context):
                longest[token] = max(longest.get(token, 0), length)
        return longest

    def _breaks(self, token: int, context: Context) -> bool:
        if context.vocab is None:
            return False
        return any(mark.encode() in context.vocab.token_bytes[token] for mark in self.breakers)


def suffix_matches(history: Sequence[int]) -> list[int]:
    """For each end i the length of the longest common suffix of history[: i + 1] and the whole history.

    The Z-function of the reversed history: linear time.
    """
    text = list(reversed(history))
    n = len(text)
    z = [0] * n
    if n:
        z[0] = n
    left = right = 0
    for i in range(1, n):
        if i < right:
            z[i] = min(right - i, z[i - left])
        while i + z[i] < n and text[z[i]] == text[i + z[i]]:
            z[i] += 1
        if i + z[i] > right:
            left, right = i, i + z[i]
    return z[::-1]

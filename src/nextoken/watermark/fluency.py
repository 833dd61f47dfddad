"""Fluency: how well a candidate fits its place, by the probability of the sentence with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from nextoken.model.base import ABSENT, LanguageModel
from nextoken.watermark.places import Place, cased_like

Ranking: TypeAlias = Callable[[Place, Sequence[str]], Sequence[float]]
"""A number for each candidate at a place, the higher the better; -inf for what may not stand there."""


@dataclass(frozen=True)
class Fluency:
    """log p(sentence with the candidate) - log p(sentence as it is), in nats, by a causal language model.

    Both are read together with the sentence before, from the begin token where the model has one. What follows the
    word counts as what precedes it does, so a candidate must fit to both sides.

    Args:
        model: any language model that gives whole distributions.
        most_lost: candidates that cost more nats than this may not stand there.
        sentences: how many are read, the last of them that of the word.
        reach: words at most on either side.

    Raises:
        ValueError: a number is out of range, or the model is partial.
    """

    model: LanguageModel
    most_lost: float = math.inf
    sentences: int = 2
    reach: int = 30

    def __post_init__(self) -> None:
        if self.model.is_partial:
            raise ValueError(
                f"{self.model.name} tells only its most probable tokens; ranking needs whole distributions"
            )
        if not self.most_lost >= 0 or self.sentences < 1 or self.reach < 1:
            raise ValueError(
                f"most_lost must be at least 0, sentences and reach at least 1, got {self.most_lost}, "
                f"{self.sentences} and {self.reach}"
            )

    def __call__(self, place: Place, candidates: Sequence[str]) -> list[float]:
        text, start = place.window(sentences=self.sentences, reach=self.reach)
        end = start + len(place.word)
        variants = [text[:start] + cased_like(place.word, candidate) + text[end:] for candidate in candidates]
        as_it_is, *each = self._log_probs([text, *variants])
        gained = [one - as_it_is if one > -math.inf else -math.inf for one in each]
        return [gain if gain >= -self.most_lost else -math.inf for gain in gained]

    @torch.no_grad()
    def _log_probs(self, texts: Sequence[str]) -> list[float]:
        """log p of each text in nats; its last tokens where the context holds no more."""
        vocab = self.model.vocab
        begin = [] if vocab.bos_id is None else [vocab.bos_id]
        rows = [[*begin, *vocab.encode(text).ids] for text in texts]
        if self.model.context_length is not None:
            rows = [[*row[: len(begin)], *row[len(begin) :][len(begin) - self.model.context_length :]] for row in rows]
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows])
        targets = torch.cat([tokens[:, 1:], torch.full((len(rows), 1), ABSENT)], dim=1)
        found = self.model.predict(tokens).statistics(targets).logprob
        assert found is not None
        return torch.where(targets.to(found.device) == ABSENT, 0.0, found.double()).sum(1).tolist()

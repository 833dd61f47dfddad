"""Thought: what a model thought in mixtures of tokens, and what it answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nextoken.decode.generation import Generation
from nextoken.model.vocab import Vocab

Ended = Literal["marker", "cold stop", "length", "eos"]
"""Why thinking ended: the token noted was the end marker, the entropy stayed low, the limit, or an end token."""


@dataclass(frozen=True, eq=False)
class Thought:
    """A thought of T steps, and the answer after it.

    Args:
        prompt: token ids, begin token included.
        tokens: [T] the token noted at each step; the last is the marker or end token where one ended the thought. They
            are for inspection: no text of them is what the model was fed.
        ids, weights: [T, K] the mixtures, largest weight first, -1 for none; of K sampled tokens in the order they were
            drawn; of a mixture over the whole vocabulary the 10 largest weights, whose sum tells what is left out.
        entropies: [T] nats, of the distribution mixed at each step.
        log_probs: [T], log-probability or density of what was drawn at each step (see the policy), or None.
        vectors: [S, d], float32 or wider, what was fed at the soft steps: all steps but one that ended the thought.
        closing: tokens fed after the soft steps: the marker, if there is one, and the answer's prefix.
        ended: why.
        answer: what was generated after it; None after an end token. Its `request.prompt` is the prompt, the tokens
            noted, and the closing; its `model` is `Recalled`, which reads these as they were fed.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    ids: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    entropies: Tensor = field(repr=False)
    log_probs: Tensor | None = field(repr=False)
    vectors: Tensor = field(repr=False)
    closing: tuple[int, ...]
    ended: Ended
    answer: Generation | None
    vocab: Vocab = field(repr=False)

    @property
    def text(self) -> str:
        """The tokens noted, as text."""
        return self.vocab.decode_text(self.tokens)

    @property
    def log_prob(self) -> float | None:
        """log-probability or density of the whole thought, in nats; 0 where nothing is drawn."""
        return None if self.log_probs is None else float(self.log_probs.sum())

    @property
    def shares(self) -> Tensor:
        """[T] weight of the noted token in its mixture."""
        noted = torch.tensor(self.tokens, dtype=torch.long)[:, None]
        return (self.weights * (self.ids == noted)).sum(-1)

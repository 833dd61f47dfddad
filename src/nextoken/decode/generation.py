"""Generation: a generated text, and the signatures of what the model said of it and of what it was drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from nextoken.decode.request import Finish, Request
from nextoken.decode.transform import Context, normalise
from nextoken.head import Statistics, statistics_from_logits
from nextoken.model.base import LanguageModel
from nextoken.signature.given import signature_of

if TYPE_CHECKING:
    from nextoken.signature import Signature


@dataclass(frozen=True)
class Generation:
    """One generated text.

    Args:
        text: the output, without prompt, specials and stop string.
        tokens: what was drawn, an end token included.
        finish: why it ended.
        surprisals: -log p in nats of each token under the distribution it was drawn from; their sum is -log of the
            probability with which these settings give these tokens.
        request: prompt, transform, seed and limits: with the model, all that is needed to have it again.
        model: the model that generated it.
        coins: the uniform number each step gave to a random transform, if there is one.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    surprisals: tuple[float, ...]
    request: Request
    model: LanguageModel = field(repr=False)
    coins: tuple[float, ...] = field(default=(), repr=False)

    @cached_property
    def signature(self) -> Signature:
        """What the model says of the output given the prompt, before any transform; one forward pass on first use."""
        return signature_of(self.model, self.request.prompt, self.tokens, name="generated")

    @cached_property
    def drawn(self) -> Signature:
        """The signature of the distributions that the tokens were drawn from, after the transform.

        Transforms are functions of the tokens and surprisals before them, so they are applied again to the
        distributions of one forward pass.
        """
        return signature_of(
            self.model, self.request.prompt, self.tokens, name="generated", statistics=self._drawn_statistics
        )

    @torch.no_grad()
    def _drawn_statistics(self, top: int) -> Statistics:
        prompt, output = self.request.prompt, self.tokens
        row = [*prompt, *output[:-1]]
        following = self.model.predict([row])[:, len(prompt) - 1 :]
        logits = following.logits()[0]
        scores = []
        for step in range(len(output)):
            context = Context(
                prompts=[prompt],
                outputs=[output[:step]],
                surprisals=[self.surprisals[:step]],
                uniform=torch.tensor(self.coins[step : step + 1], dtype=torch.float64) if self.coins else None,
                seeds=[self.request.seed],
                vocab=self.model.vocab,
            )
            scores.append(normalise(self.request.transform(logits[step : step + 1], context)))
        return statistics_from_logits(torch.cat(scores), torch.tensor(output), top=top)

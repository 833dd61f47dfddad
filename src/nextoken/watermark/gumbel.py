"""GumbelWatermark: the token whose probability, raised by numbers made of the key and the last tokens, is highest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaincc
from torch import Tensor

from nextoken.decode.transform import REMOVED, Context, Transform, check_possible
from nextoken.methods import method
from nextoken.watermark.key import Key
from nextoken.watermark.watermark import Detection, Watermark


@method(
    name="Gumbel watermark",
    access="gray",
    summary="Aaronson's: argmax log p + Gumbel numbers of key and last tokens; p-values are exact",
)
class GumbelWatermark(Watermark):
    """y_t = argmax_v log p_v - log(-log r_v), r_v = PRF(key, y_{t-h} .. y_{t-1})[v] in (0, 1).

    Over the keys y_t ~ p, for each context of h tokens has numbers of its own; where a context comes again in a text
    its numbers are spent, and the token is drawn from p as if there were no mark. So a whole text has the model's own
    law. The first h tokens of a text are drawn unmarked too: their contexts reach into the prompt, which the detector
    does not see, and texts of one prompt differ with their seeds. Texts with a context in common are dependent.

    Detection: S = sum of -log(1 - r_{y_t}) over the T tokens whose context is the first of its kind in the text; for
    texts made without the key S ~ Gamma(T, 1), p = P(Gamma(T, 1) >= S), exactly. A token of probability q adds
    H_{1/q} = digamma(1/q + 1) + 0.5772 on average in marked texts: 1, as without a mark, where the model is sure.

    An edit costs the h + 1 tokens that look at it; the mark is in any piece of the text that is longer than h.

    Args:
        key: the secret.
        context: h, at least 1; fewer make edits cost less and contexts come again more often.

    Raises:
        ValueError: context is below 1.

    Source: Aaronson, talk of 2022 ("My AI safety lecture for UT effective altruism"); Fernandez et al.,
    arXiv:2308.00113, for the Gamma law and contexts counted once.
    """

    is_distortion_free = True

    def __init__(self, key: Key, *, context: int = 4) -> None:
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        self.context = context
        self._key = key.derive("gumbel")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._key!r}, context={self.context})"

    def transform(self) -> Transform:
        return _Marking(self)

    def numbers(self, context: Sequence[int], size: int) -> NDArray[np.float64]:
        """r after a context of h tokens, of the first `size` tokens of the vocabulary."""
        return self._key.uniform(*map(int, context), size=size)

    def fresh_context(self, text: Sequence[int]) -> tuple[int, ...] | None:
        """The last h tokens of a text, or None where it has fewer or they stood in it before."""
        h, t = self.context, len(text)
        if t < h:
            return None
        last = tuple(text[t - h :])
        return None if any(tuple(text[at : at + h]) == last for at in range(t - h)) else last

    def detect(self, tokens: Sequence[int]) -> Detection:
        """The verdict on a text; its statistic is S, high for marked texts, NaN where no token counts.

        Raises:
            ValueError: a token id is negative.
        """
        if any(token < 0 for token in tokens):
            raise ValueError(f"a token id is at least 0, got {min(tokens)}")
        h, first = self.context, dict[tuple[int, ...], int]()
        for at in range(len(tokens) - h):
            first.setdefault(tuple(tokens[at : at + h]), int(tokens[at + h]))
        found = [self.numbers(context, token + 1)[token] for context, token in first.items()]
        if not found:
            return Detection(1.0, math.nan, 0)
        score = float(-np.log1p(-np.array(found)).sum())
        return Detection(float(gammaincc(len(found), score)), score, len(found))


@dataclass(frozen=True)
class _Marking(Transform):
    """The token that key and context draw keeps score 0, all others are removed; unmarked rows stay as they are."""

    mark: GumbelWatermark

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        if len(context.outputs) != len(scores):
            raise ValueError(
                f"the mark depends on the tokens before: {len(context.outputs)} outputs, {len(scores)} rows"
            )
        marked = check_possible(scores).clone()
        for row, output in enumerate(context.outputs):  # each row has a context of its own
            last = self.mark.fresh_context(output)
            if last is None:
                continue
            gumbel = -np.log(-np.log(self.mark.numbers(last, scores.shape[-1])))
            token = int((scores[row].double() + torch.from_numpy(gumbel).to(scores.device)).argmax())
            marked[row] = REMOVED
            marked[row, token] = 0.0
        return marked

"""SynthID: tokens that won a tournament of draws, layer by layer, under random bits that the key tells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextoken.decode.transform import Context, Transform, normalise
from nextoken.methods import method
from nextoken.watermark._tails import binomial_tail, weighted_tail
from nextoken.watermark._token_words import TokenWords, Words
from nextoken.watermark.key import Key
from nextoken.watermark.watermark import Detection, Watermark

Bits = NDArray[np.bool_]

MOST_LAYERS = 64
"""Bits of the word that each token has after each context."""


def tournament(log_probs: Tensor, bits: Tensor, *, leaves: int = 2) -> Tensor:
    """log p after m layers of a tournament [B, V], from log p [B, V] in nats and g [m, B, V], true for 1.

    In each layer N draws from p meet, and one of those with the highest g wins. With q the mass of p where g = 0,

        p(v) <- p(v) (1 + q + ... + q^(N-1)) where g(v) = 1,    p(v) q^(N-1) where g(v) = 0

    which for N = 2 is p(v) (1 + g(v) - sum_u p(u) g(u)). The whole is the law of the winner among N^m draws.

    Source: Dathathri et al., Scalable watermarking for identifying large language model outputs, Nature 634 (2024),
    and its supplement.
    """
    log_probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    gained = torch.zeros_like(log_probs)
    for layer in bits:
        now = (log_probs + gained).exp()
        # In log space and from the mass of the losers itself: 1 - (mass of the others) would lose what is small.
        losers = now.masked_fill(layer, 0.0).sum(-1, keepdim=True).clamp(max=1.0)
        win = sum((losers**count for count in range(1, leaves)), torch.ones_like(losers)).log()
        gained = gained + torch.where(layer, win, (leaves - 1) * losers.log() if leaves > 1 else win)
    return log_probs + gained


def falling_weights(layers: int) -> tuple[int, ...]:
    """Integers in the proportions of m numbers that fall evenly from 10 to 1: first layers tell the most."""
    if layers == 1:
        return (1,)
    raw = [10 * (layers - 1) - 9 * layer for layer in range(layers)]
    divisor = math.gcd(*raw)
    return tuple(weight // divisor for weight in raw)


@method(
    name="SynthID-Text",
    access="gray",
    summary="tokens are winners of keyed tournaments, the law over keys stays; found by a weighted mean of their bits",
)
class SynthID(Watermark):
    """Each token is drawn from the law of the winner of a tournament of m layers; its m bits then tend to 1.

    The bits g_1 .. g_m of a token are fair coins, a function of the key, the H tokens before, and the token. Where
    these H tokens were a context before, or are not all of the output, the token is drawn from p as it is; so with two
    leaves a text has the model's own law, averaged over keys (`is_distortion_free`). For two texts under one key this
    holds of each alone, not of both together. More leaves mark more strongly, and favour rare tokens.

    A text's score is sum_t sum_i w_i g_i(x_t) / (T sum_i w_i) over the T tokens whose context lies in the text and was
    not there before: 1/2 without a mark; with one layer of two leaves 1/2 + (1 - sum p^2) / 4. The p-value is the exact
    probability that as many fair coins do as well. It holds for every text made without the key, for bits after
    different contexts, and those of one token, are independent.

    Bits depend on neither vocabulary size nor device. They are not those of transformers' processor of this name (a
    table of 65,536 entries) nor of the released package, so neither finds the other's marks.

    Args:
        key: the secret.
        layers: m, at most 64.
        context: H, how many tokens tell the bits of the next; at least 1.
        leaves: draws that meet in each match; 1 leaves the law as it is.
        weights: w_i of the score, positive integers; None takes `falling_weights(m)`, those of the released weighted
            mean, and equal ones give the mean.

    Raises:
        ValueError: a number is out of range.

    Source: Dathathri et al., Scalable watermarking for identifying large language model outputs, Nature 634 (2024),
    818-823.
    """

    def __init__(
        self,
        key: Key,
        *,
        layers: int = 30,
        context: int = 4,
        leaves: int = 2,
        weights: Sequence[int] | None = None,
    ) -> None:
        if not 1 <= layers <= MOST_LAYERS:
            raise ValueError(f"layers must be from 1 to {MOST_LAYERS}, got {layers}")
        if context < 1 or leaves < 1:
            raise ValueError(f"context and leaves must be at least 1, got {context} and {leaves}")
        chosen = falling_weights(layers) if weights is None else tuple(int(weight) for weight in weights)
        if len(chosen) != layers or min(chosen) < 1:
            raise ValueError(f"weights must be {layers} positive integers, one for each layer, got {list(chosen)}")
        self.layers, self.context, self.leaves, self.weights = layers, context, leaves, chosen
        self.is_distortion_free = leaves <= 2
        self._words = TokenWords(key, "tournament")

    def __repr__(self) -> str:
        return f"SynthID(..., layers={self.layers}, context={self.context}, leaves={self.leaves})"

    def transform(self) -> Transform:
        return Tournament(self)

    def bits_after(self, before: Sequence[int], size: int) -> Bits:
        """g [m, size] of tokens 0 .. size - 1 after these H tokens."""
        return self._split(self._words.row(tuple(before), size))

    def bits(self, tokens: Sequence[int]) -> Bits:
        """g [m, T] of the tokens of a text that count: those whose context is whole and came there first."""
        text, width = [int(token) for token in tokens], self.context
        seen: set[tuple[int, ...]] = set()
        words = []
        for at in range(width, len(text)):
            before = tuple(text[at - width : at])
            if before not in seen:
                seen.add(before)
                words.append(self._words.at(before, text[at : at + 1])[0])
        return self._split(np.array(words, dtype=np.uint64))

    def detect(self, tokens: Sequence[int]) -> Detection:
        """The exact p-value of the weighted mean of the bits, which is the statistic; NaN where no token counts."""
        bits = self.bits(tokens)
        ones, scored = bits.sum(1), bits.shape[1]
        if len(set(self.weights)) == 1:
            p_value = binomial_tail(int(ones.sum()), bits.size)
        else:
            p_value = weighted_tail(int(ones @ np.array(self.weights)), scored, self.weights)
        mean = float(np.average(bits.mean(1), weights=self.weights)) if scored else math.nan
        return Detection(p_value, mean, scored)

    def _split(self, words: Words) -> Bits:
        """The lowest m bits of words [n], as [m, n]."""
        octets = words.astype("<u8").view(np.uint8).reshape(len(words), 8)
        return np.ascontiguousarray(np.unpackbits(octets, axis=1, count=self.layers, bitorder="little").T).view(
            np.bool_
        )


@dataclass(frozen=True)
class Tournament(Transform):
    """The law of the winner of the mark's tournament; p itself where the context is short or came before.

    Args:
        mark: whose bits.
    """

    mark: SynthID

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        marked = [row for row in range(scores.shape[0]) if self._is_fresh(context.outputs[row])]
        if not marked:
            return scores
        width, size = self.mark.context, scores.shape[-1]
        bits = np.stack([self.mark.bits_after(context.outputs[row][-width:], size) for row in marked], axis=1)
        law = normalise(scores[marked])
        changed = scores.to(law.dtype, copy=True)
        changed[marked] = tournament(law, torch.from_numpy(bits).to(scores.device), leaves=self.mark.leaves)
        return changed

    def _is_fresh(self, output: Sequence[int]) -> bool:
        """Whether the last H tokens are all of the output and are there for the first time."""
        width = self.mark.context
        tail = output[-width:]
        return len(output) >= width and all(
            output[end - width : end] != tail for end in range(width, len(output)) if output[end - 1] == tail[-1]
        )

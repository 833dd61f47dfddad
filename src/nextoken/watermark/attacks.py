"""Attacks: what is done to a text so that its mark is no longer found, at exact rates and from a seed.

    law = unigram(texts, vocab_size=model.vocab.size)
    attacked = substitute(tokens, 0.3, law, seed=1)

A rate is a share of the n tokens given: exactly floor(rate n + 1/2) of them are changed, chosen uniformly. A law is the
probability of each token [V], or V for the uniform one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Law: TypeAlias = int | Sequence[float] | NDArray[np.float64]


def unigram(texts: Sequence[Sequence[int]], *, vocab_size: int) -> NDArray[np.float64]:
    """Share of each token among all tokens of the texts [V].

    Raises:
        ValueError: there is no token, or one is none of the vocabulary.
    """
    tokens = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts]) if len(texts) else np.empty(0, int)
    if not len(tokens):
        raise ValueError("the texts have no token to count")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"token ids go from {tokens.min()} to {tokens.max()} in a vocabulary of {vocab_size}")
    return np.bincount(tokens, minlength=vocab_size) / len(tokens)


def substitute(tokens: Sequence[int], rate: float, law: Law, *, seed: int) -> list[int]:
    """Exactly floor(rate n + 1/2) tokens replaced, each by another token, drawn from the law without it.

    Raises:
        ValueError: the rate is not from 0 to 1, or the law has no other token than one to be replaced.
    """
    rng = np.random.default_rng(seed)
    attacked = np.array(tokens, dtype=np.int64)
    places = rng.choice(len(attacked), _count(rate, len(attacked), 1.0), replace=False)
    attacked[places] = _others(attacked[places], _probabilities(law), rng)
    return list(map(int, attacked))


def insert(tokens: Sequence[int], rate: float, law: Law, *, seed: int) -> list[int]:
    """Exactly floor(rate n + 1/2) tokens of the law put in, each at one of the n + 1 gaps; the others keep their order.

    Raises:
        ValueError: the rate is negative.
    """
    rng = np.random.default_rng(seed)
    count = _count(rate, len(tokens), math.inf)
    gaps = rng.integers(len(tokens) + 1, size=count)
    fresh = _drawn(_probabilities(law), rng.random(count))
    return list(map(int, np.insert(np.array(tokens, dtype=np.int64), gaps, fresh)))


def delete(tokens: Sequence[int], rate: float, *, seed: int) -> list[int]:
    """Exactly floor(rate n + 1/2) tokens left out; the others keep their order.

    Raises:
        ValueError: the rate is not from 0 to 1.
    """
    rng = np.random.default_rng(seed)
    gone = rng.choice(len(tokens), _count(rate, len(tokens), 1.0), replace=False)
    return list(map(int, np.delete(np.array(tokens, dtype=np.int64), gone)))


def crop(tokens: Sequence[int], length: int, *, seed: int) -> list[int]:
    """`length` consecutive tokens from a place chosen uniformly; the whole text if it is not longer.

    Raises:
        ValueError: length is negative.
    """
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    begin = int(np.random.default_rng(seed).integers(max(0, len(tokens) - length) + 1))
    return list(tokens[begin : begin + length])


def shuffle_blocks(tokens: Sequence[int], size: int, *, seed: int) -> list[int]:
    """The text cut into blocks of `size` tokens (the last may be shorter), in an order drawn uniformly.

    Raises:
        ValueError: size is below 1.
    """
    if size < 1:
        raise ValueError(f"a block has at least 1 token, got size={size}")
    return _shuffled([list(tokens[at : at + size]) for at in range(0, len(tokens), size)], seed)


def shuffle_sentences(tokens: Sequence[int], ends: Collection[int], *, seed: int) -> list[int]:
    """The sentences of a text in an order drawn uniformly; one ends after every token in `ends`, or with the text.

    Args:
        ends: ids of the tokens that end a sentence, e.g. those whose bytes end with a full stop.
    """
    sentences: list[list[int]] = [[]]
    for token in tokens:
        sentences[-1].append(token)
        if token in ends:
            sentences.append([])
    return _shuffled(sentences, seed)


def paste(tokens: Sequence[int], into: Sequence[int], *, pieces: int = 1, seed: int) -> list[int]:
    """The text cut into `pieces` pieces, put in their order between the tokens of another text.

    Cuts and places are drawn uniformly, all different, so that the pieces do not touch; both texts keep their order,
    and the share of the first is len(tokens) / (len(tokens) + len(into)).

    Raises:
        ValueError: there are not so many pieces in the text, or fewer places in the other.
    """
    if not 1 <= pieces <= max(1, len(tokens)) or pieces > len(into) + 1:
        raise ValueError(f"{pieces} pieces of {len(tokens)} tokens cannot be put apart into {len(into)} others")
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(len(tokens) - 1, pieces - 1, replace=False) + 1) if pieces > 1 else np.empty(0, int)
    places = np.sort(rng.choice(len(into) + 1, pieces, replace=False))
    attacked: list[int] = []
    begin = 0
    edges = [0, *cuts.tolist(), len(tokens)]
    for piece, place in enumerate(places.tolist()):
        attacked += [*into[begin:place], *tokens[edges[piece] : edges[piece + 1]]]
        begin = place
    return [*attacked, *into[begin:]]


def _count(rate: float, tokens: int, highest: float) -> int:
    if not 0 <= rate <= highest or math.isinf(rate):
        raise ValueError(f"a rate is from 0 to {highest:g} of the tokens, got {rate}")
    return math.floor(rate * tokens + 0.5)


def _probabilities(law: Law) -> NDArray[np.float64]:
    probs = np.full(law, 1.0) if isinstance(law, int) else np.asarray(law, dtype=np.float64)
    if probs.ndim != 1 or not (probs >= 0).all() or not 0 < probs.sum() < math.inf:
        raise ValueError("a law is a probability per token: at least one number, none negative, not all 0")
    return probs


def _drawn(probs: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """A token of a law, which need not sum to 1, for each number in [0, 1)."""
    sums = probs.cumsum()
    # The first place above the number has probability, for the sum rises there.
    below = np.minimum(uniform * sums[-1], np.nextafter(sums[-1], 0))
    return np.asarray(np.searchsorted(sums, below, side="right"), dtype=np.int64)


def _others(tokens: NDArray[np.int64], probs: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """For each token one of the law given that it is another."""
    uniform, drawn = rng.random(len(tokens)), np.empty_like(tokens)
    for token in np.unique(tokens):
        rest = probs.copy()
        if 0 <= token < len(probs):
            rest[token] = 0.0
        if not rest.any():
            raise ValueError(f"the law has no other token than {token} to put in its place")
        drawn[tokens == token] = _drawn(rest, uniform[tokens == token])
    return drawn


def _shuffled(parts: list[list[int]], seed: int) -> list[int]:
    order = np.random.default_rng(seed).permutation(len(parts))
    return [token for part in order.tolist() for token in parts[part]]

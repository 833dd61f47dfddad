"""GreenList: a part of the vocabulary is made likelier, which part is told by the tokens before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextoken.decode.transform import Context, Transform
from nextoken.methods import method
from nextoken.watermark._tails import binomial_tail, z_score
from nextoken.watermark._token_words import TokenWords, recent
from nextoken.watermark.key import Key
from nextoken.watermark.watermark import Detection, Watermark

Scheme = Literal["lefthash", "minhash", "skipgram", "selfhash"]
CONTEXTS: dict[str, int] = {"lefthash": 1, "minhash": 4, "skipgram": 5, "selfhash": 4}
"""How many tokens each scheme looks at by default."""
Seed = tuple[int, ...]
"""The tokens that a list is made of."""
_LEVELS = 2.0**64


@method(
    name="Unigram watermark",
    arxiv="2306.17439",
    access="gray",
    summary="one green list for all places (`GreenList(key, context=0)`): it survives reordering",
)
@method(
    name="Green list schemes",
    arxiv="2306.04634",
    access="gray",
    summary="which of the tokens before tell the green list: minhash, skipgram, selfhash",
)
@method(
    name="Green list watermark",
    arxiv="2301.10226",
    access="gray",
    summary="add delta to the scores of a keyed share gamma of the vocabulary, count green tokens to find it",
)
class GreenList(Watermark):
    """Scores l(v) + delta [v is green], and z = (g - gamma T) / sqrt(T gamma (1 - gamma)) to find it again.

    A token is green if r(seed, v) < gamma, r uniform under the key and `seed` made of the h tokens before:

        lefthash   all h of them; h = 1 is the first paper's, h = 0 one list for every place (Unigram)
        minhash    the one of them that is least in an order known to the key
        skipgram   the first of them
        selfhash   the least of the h - 1 tokens before and v itself, so that v helps to tell its own list

    Of g green tokens among T the p-value is P(Bin(T, gamma) >= g): exact for every text that was made without the
    key, whatever it says, because each pair of seed and token is counted once and colours of different pairs are
    independent. Tokens whose h predecessors are not in the text are not counted.

    The papers take exactly gamma V tokens of a random permutation. Here colours are independent, so that neither
    the size of the vocabulary nor the kind of device need be known to find the mark; the bound of `expected_share`
    is the same, and all V candidates of selfhash are tried, not the best 40 only. The mark changes the law of the
    text: `is_distortion_free` is False.

    Args:
        key: the secret.
        gamma: share of green tokens.
        delta: nats added to their scores; infinity forbids all others.
        context: h; None takes the scheme's own of `CONTEXTS`. Longer is harder to learn from texts, shorter survives
            more changes.
        scheme: what the seed is made of.

    Raises:
        ValueError: a number is out of range, or there is no such scheme.

    Source: Kirchenbauer et al., arXiv:2301.10226, algorithm 2, and arXiv:2306.04634, section 3; Zhao et al.,
    arXiv:2306.17439, section 3.
    """

    is_distortion_free = False

    def __init__(
        self,
        key: Key,
        *,
        gamma: float = 0.25,
        delta: float = 2.0,
        context: int | None = None,
        scheme: Scheme = "lefthash",
    ) -> None:
        if scheme not in get_args(Scheme):
            raise ValueError(f"no scheme {scheme!r}; there are {', '.join(get_args(Scheme))}")
        if not 0 < gamma < 1:
            raise ValueError(f"gamma is a share above 0 and below 1, got {gamma}")
        if not delta >= 0:
            raise ValueError(f"delta must be at least 0, got {delta}")
        least = 0 if scheme == "lefthash" else 1
        width = CONTEXTS[scheme] if context is None else context
        if width < least:
            raise ValueError(f"{scheme} needs a context of at least {least}, got {width}")
        self.gamma, self.delta, self.context, self.scheme = gamma, delta, width, scheme
        self._before = width - (scheme == "selfhash")
        self._colours = TokenWords(key, f"green list, {scheme}")
        self._order = TokenWords(key, f"green list, {scheme}, order")
        # Kept for single tokens, since the detector of a text asks for the same ones again and again.
        self._rank = lru_cache(maxsize=1 << 16)(lambda token: int(self._order.at((), [token])[0]))
        self._threshold = np.uint64(min(int(gamma * _LEVELS), (1 << 64) - 1))

    def __repr__(self) -> str:
        return f"GreenList(..., gamma={self.gamma}, delta={self.delta}, context={self.context}, scheme={self.scheme!r})"

    def transform(self) -> Transform:
        return Greener(self)

    def green(self, before: tuple[int, ...], size: int) -> NDArray[np.bool_]:
        """Which of `size` tokens are green after these, h of them (h - 1 for selfhash) [size]."""
        if self.scheme != "selfhash":
            return self._colours.row(self._seed(before), size) < self._threshold
        own = self._colours.row((), size) < self._threshold
        if not before:
            return own
        anchor = self._least(before)
        order = self._order.row((), size)
        with_anchor = self._colours.row((anchor,), size) < self._threshold
        return np.where(order <= np.uint64(self._rank(anchor)), own, with_anchor)

    def counts(self, tokens: Sequence[int]) -> tuple[int, int]:
        """How many pairs of seed and token are green, and how many there are, each counted once."""
        tokens = [int(token) for token in tokens]
        pairs: defaultdict[Seed, set[int]] = defaultdict(set)
        for at in range(self._before, len(tokens)):
            before, token = tuple(tokens[at - self._before : at]), tokens[at]
            pairs[self._seed_of(before, token)].add(token)
        green = sum(int(self._are_green(seed, sorted(found)).sum()) for seed, found in pairs.items())
        return green, sum(map(len, pairs.values()))

    def detect(self, tokens: Sequence[int]) -> Detection:
        """p = P(Bin(T, gamma) >= g) and the statistic z = (g - gamma T) / sqrt(T gamma (1 - gamma)), NaN if T = 0."""
        green, scored = self.counts(tokens)
        return Detection(binomial_tail(green, scored, self.gamma), z_score(green, scored, self.gamma), scored)

    def expected_share(self, log_probs: Tensor) -> Tensor:
        """At least this is the probability that a marked draw is green, for each law p [..., V] in nats: [...].

        (gamma alpha / c) sum_k p_k / (1 + z0 p_k), with alpha = e^delta, c = 1 + (alpha - 1) gamma and
        z0 = (1 - gamma) (alpha - 1) / c; the sum is the spike entropy of p. Averaged over keys; summed over the places
        of a text it bounds the expected count.

        Source: arXiv:2301.10226, theorem 4.2.
        """
        # Divided by alpha, so that an infinite delta is a limit as any other.
        inverse = torch.tensor(-self.delta, dtype=torch.float64).exp().item()
        scale = inverse + (1 - inverse) * self.gamma
        spike = (1 - self.gamma) * (1 - inverse) / scale
        p = log_probs.exp()
        return self.gamma / scale * (p / (1 + spike * p)).sum(-1)

    def _seed(self, before: tuple[int, ...]) -> Seed:
        if self.scheme == "lefthash":
            return before
        return (self._least(before),) if self.scheme == "minhash" else before[:1]

    def _seed_of(self, before: tuple[int, ...], token: int) -> Seed:
        """What tells the colour of a token: for selfhash nothing but itself, where it is least."""
        if self.scheme != "selfhash":
            return self._seed(before)
        anchor = self._least((*before, token))
        return () if anchor == token else (anchor,)

    def _are_green(self, seed: Seed, tokens: Sequence[int]) -> NDArray[np.bool_]:
        return self._colours.at(seed, tokens) < self._threshold

    def _least(self, tokens: tuple[int, ...]) -> int:
        return min(tokens, key=self._rank)


@dataclass(frozen=True)
class Greener(Transform):
    """log p(v) + delta [v is green] up to a constant; rows with too few tokens before them stay as they are.

    Args:
        mark: whose lists.
    """

    mark: GreenList

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        size, before = scores.shape[-1], self.mark._before
        green = np.zeros(scores.shape, dtype=bool)
        for row in range(scores.shape[0]):
            tail = recent(context, row, before)
            if tail is not None:
                green[row] = self.mark.green(tail, size)
        mask = torch.from_numpy(green).to(scores.device)
        if np.isinf(self.mark.delta):
            # Where no green token is possible the law stays: a hard list cannot ask for what cannot come.
            possible = (mask & (scores > -torch.inf)).any(-1, keepdim=True)
            return scores.masked_fill(~mask & possible, -torch.inf)
        return scores + self.mark.delta * mask

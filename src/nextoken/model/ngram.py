"""NgramModel: token counts smoothed by modified Kneser-Ney."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nextoken.head import Statistics, statistics_from_logits
from nextoken.methods import method
from nextoken.model import _ngram_files
from nextoken.model._ngram_counts import Level, count, estimated_discounts
from nextoken.model.base import ABSENT, LanguageModel, NoMemory, State
from nextoken.model.next import DenseNext, Next
from nextoken.model.vocab import Vocab

_ENTRIES = 1 << 22
"""Probabilities held at once by `statistics`."""

Discounts = tuple[float, float, float]


@method(
    name="modified Kneser-Ney",
    access="black",
    trained=True,
    summary="n-gram model: counts, discounted by 1, 2 or 3+, interpolated with how many contexts a token completes",
)
class NgramModel(LanguageModel):
    r"""p(w | the last N-1 tokens) by interpolated modified Kneser-Ney smoothing, in float64, normalised over all of V.

    With h the last n-1 tokens, h' = h without its first, and a(h w) the count of h w:

        p_n(w | h) = max(a(h w) - D_n(a(h w)), 0) / a(h) + gamma_n(h) p_{n-1}(w | h'),    a(h) = sum_w a(h w)
        gamma_n(h) = (D_n(1) N_1(h) + D_n(2) N_2(h) + D_n(3+) N_3+(h)) / a(h),          N_c(h) = |{w : a(h w) = c}|
        p_n(w | h) = p_{n-1}(w | h') where h was never seen,                         p_0 uniform over the S tokens

    a is the number of occurrences for n = N and for h w that begin with the begin token, and the number of different
    tokens seen before h w otherwise. S are the tokens that stand for text, and specials that occurred other than at the
    beginning (end tokens); every other special has probability 0. Discounts are estimated per n from the numbers n_c of
    n-grams with a = c: Y = n_1 / (n_1 + 2 n_2), D(c) = c - (c + 1) Y n_{c+1} / n_c; where these are undefined or leave
    [0, c], one discount Y for all; where that is undefined too, 1/2.

    Contexts shorter than N-1 use their own length as n-1. A vocabulary's begin token is put before every text, and is
    never predicted.

    Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling", Harvard TR-10-98,
    1998, section 3; end of text only where asked for.

    Args:
        vocab: of the token ids.
        levels: counts of each n, from `from_text` or `from_tokens`.
        discounts: D(1), D(2), D(3+) of each n.
    """

    def __init__(
        self, vocab: Vocab, levels: Sequence[Level], discounts: Sequence[Discounts], *, name: str = "ngram"
    ) -> None:
        if not levels or len(levels) != len(discounts):
            raise ValueError(f"{len(levels)} levels of counts need as many discounts, got {len(discounts)}")
        if any(not 0 <= d <= c for triple in discounts for c, d in enumerate(triple, start=1)):
            raise ValueError(f"D(1), D(2), D(3+) must lie in [0, 1], [0, 2] and [0, 3], got {list(discounts)}")
        self.vocab = vocab
        self.name = name
        self.order = len(levels)
        self.levels = tuple(levels)
        self.discounts = tuple(discounts)
        self._unigram = self._smoothed_unigram()

    @classmethod
    def from_text(
        cls,
        texts: str | bytes | Iterable[str | bytes],
        vocab: Vocab,
        *,
        order: int = 5,
        discount: float | None = None,
        eos: bool = False,
        name: str = "ngram",
    ) -> NgramModel:
        """Counts of one text or several, tokenised by `vocab`.

        Args:
            order: N, the longest n-gram; contexts have up to N-1 tokens.
            discount: one D in [0, 1] for all counts instead of estimated ones; 0 gives relative frequencies.
            eos: whether an end token (the smallest of `vocab.eos_ids`) is counted after every text.

        Raises:
            ValueError: no token at all, or `eos` without an end token.
        """
        several = [texts] if isinstance(texts, str | bytes) else texts
        sequences = (vocab.encode(text).ids for text in several)
        return cls.from_tokens(sequences, vocab, order=order, discount=discount, eos=eos, name=name)

    @classmethod
    def from_tokens(
        cls,
        sequences: Iterable[Sequence[int]],
        vocab: Vocab,
        *,
        order: int = 5,
        discount: float | None = None,
        eos: bool = False,
        name: str = "ngram",
    ) -> NgramModel:
        """Counts of token sequences; a begin token at their head may be there or not. Arguments as for `from_text`.

        Raises:
            ValueError: no token at all, ids outside the vocabulary, a begin token in the middle.
        """
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        if discount is not None and not 0 <= discount <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {discount}")
        if eos and not vocab.eos_ids:
            raise ValueError("eos=True, but the vocabulary has no end token")
        end = [min(vocab.eos_ids)] if eos else []
        levels = count([[*tokens, *end] for tokens in sequences], vocab, order)
        discounts = [estimated_discounts(level.counts) if discount is None else (discount,) * 3 for level in levels]
        return cls(vocab, levels, discounts, name=name)

    @property
    def dtype(self) -> str:
        return "float64"

    @cached_property
    def digest(self) -> str:
        sha = hashlib.sha256(repr((self.vocab.digest, self.discounts)).encode())
        for level in self.levels:
            for tensor in level.tensors().values():
                sha.update(tensor.numpy().tobytes())
        return sha.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write counts (safetensors), discounts and vocabulary (JSON, or the tokenizer's own files) into a folder."""
        _ngram_files.save(folder, self.vocab, self.levels, self.discounts, self.name)

    @classmethod
    def load(cls, folder: str | Path) -> NgramModel:
        """What `save` wrote.

        Raises:
            ModelError: there is no n-gram model.
        """
        vocab, levels, discounts, name = _ngram_files.load(folder)
        return cls(vocab, levels, discounts, name=name)

    def probs(self, contexts: Tensor) -> Tensor:
        """p(. | context) [M, V] for contexts [M, N-1], oldest first, -1 on the left where shorter."""
        result = self._unigram.expand(contexts.shape[0], -1).clone()
        node = torch.zeros(contexts.shape[0], dtype=torch.long)
        alive = torch.arange(contexts.shape[0])
        for back, (level, discounts) in enumerate(zip(self.levels[1:], self.discounts[1:], strict=True), start=1):
            found = level.child(node[alive], contexts[alive, -back])
            alive, found = alive[found >= 0], found[found >= 0]
            node[alive] = found
            begins, ends = level.starts[found], level.starts[found + 1]
            sizes = ends - begins
            rows = torch.repeat_interleave(alive, sizes)
            offsets = torch.arange(len(rows)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
            entries = torch.repeat_interleave(begins, sizes) + offsets
            counts = level.counts[entries]
            discount = _discount(counts, discounts)
            totals = torch.zeros(contexts.shape[0], dtype=torch.float64).index_add_(0, rows, counts.double())
            taken = torch.zeros_like(totals).index_add_(0, rows, discount)
            result[alive] *= (taken[alive] / totals[alive])[:, None]
            result[rows, level.tokens[entries]] += (counts - discount) / totals[rows]
        return result

    def _smoothed_unigram(self) -> Tensor:
        level, size = self.levels[0], self.vocab.size
        special = torch.zeros(size, dtype=torch.bool)
        special[list(self.vocab.specials)] = True
        special[level.tokens] = False
        uniform = (~special).double() / (~special).sum()
        discount = _discount(level.counts, self.discounts[0])
        total = level.counts.sum()
        result = uniform * (discount.sum() / total)
        result[level.tokens] += (level.counts - discount) / total
        return result

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        batch, n = tokens.shape
        size = self.order - 1
        # One line of memory: the kept tail, then the nodes; `up` leads from each place to the one before it.
        line = torch.cat([torch.full((batch, 1), ABSENT), state.tail(size), tokens], dim=1)
        before = torch.arange(-1, size).clamp(min=0).expand(batch, -1)
        if parents is None:
            parents = torch.arange(-1, n - 1).expand(batch, n)
        up = torch.cat([before, torch.where(parents < 0, size, parents + size + 1)], dim=1)
        node = torch.arange(size + 1, size + 1 + n).expand(batch, n)
        contexts = torch.empty(batch, n, size, dtype=torch.long)
        for back in range(size - 1, -1, -1):
            contexts[:, :, back] = line.gather(1, node)
            node = up.gather(1, node)
        return NgramNext(self.probs, contexts, self.vocab.size)


class NgramNext(Next):
    """Distributions kept as their contexts [B, n, N-1]."""

    def __init__(self, probs: Callable[[Tensor], Tensor], contexts: Tensor, vocab_size: int) -> None:
        self._probs, self._contexts = probs, contexts
        self.shape = (contexts.shape[0], contexts.shape[1])
        self.vocab_size = vocab_size

    def log_probs(self) -> Tensor:
        return self._probs(self._contexts.flatten(0, 1)).log().reshape(*self.shape, self.vocab_size)

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        contexts = self._contexts.flatten(0, 1)
        if not len(contexts):
            return DenseNext(torch.empty(*self.shape, self.vocab_size)).statistics(targets, top=top)
        flat = None if targets is None else targets.reshape(-1)
        rows = max(1, _ENTRIES // self.vocab_size)
        parts = [
            statistics_from_logits(
                self._probs(contexts[at : at + rows]).log(), None if flat is None else flat[at : at + rows], top=top
            )
            for at in range(0, len(contexts), rows)
        ]
        return Statistics.concat(parts).reshape(*self.shape)

    def _take(self, rows: Tensor, columns: Tensor) -> NgramNext:
        return NgramNext(self._probs, self._contexts[rows, columns], self.vocab_size)


def _discount(counts: Tensor, discounts: Discounts) -> Tensor:
    """D(c) of counts, never more than the count."""
    table = torch.tensor((0.0, *discounts), dtype=torch.float64)
    return table[counts.clamp(max=3)]

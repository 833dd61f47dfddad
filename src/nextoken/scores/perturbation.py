"""Perturbation: what a model says of a text beside what it says of texts a few words away from it.

    change = SpanResampler(model, variants=20)
    signature = nextoken.read(model, texts)
    nextoken.score(signature, "detectgpt", variants=read_variants(model, texts, change))

A perturbation is any callable that takes texts and gives a list of variants for each: a mask-filling model, a
thesaurus, or the `SpanResampler` of this file, which needs nothing but a language model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from nextoken.methods import method
from nextoken.scores.samples import Samples
from nextoken.scores.score import Given, register

if TYPE_CHECKING:
    from nextoken.model.base import LanguageModel

Perturbation: TypeAlias = Callable[[Sequence[str]], Sequence[Sequence[str]]]
"""Texts -> variants of each."""
_ROUNDING = 1e-6
"""Nats per token by which variants may differ and still be equally probable."""


def read_variants(model: LanguageModel | str | Path, texts: Sequence[str], perturbation: Perturbation) -> Samples:
    """The variants of each text, read by the model: the option `variants` of these scores.

    Args:
        model: the one that judges; the texts themselves are to be read by it too.
        texts: the texts.
        perturbation: gives one list of variants per text.

    Raises:
        ValueError: it gave more or fewer lists than there are texts.
    """
    from nextoken.signature.reading import read

    made = [list(group) for group in perturbation(texts)]
    if len(made) != len(texts):
        raise ValueError(
            f"the perturbation gave {len(made)} lists of variants for {len(texts)} texts: give one per text"
        )
    return Samples(read(model, [text for group in made for text in group], top=0), [len(group) for group in made])


@register(
    "detectgpt",
    columns=("logprob",),
    high="machine",
    summary="how far the text stands above its variants, in their standard deviations",
    arxiv="2301.11305",
)
def detectgpt(given: Given, *, variants: Samples) -> np.ndarray:
    """(L(x) - mean_k L(x_k)) / std_k L(x_k) [T], L the mean log-probability of a token, x_k the variants.

    std is the population's; where all variants are equally probable the difference is not divided, as in official code.
    The difference alone (DetectGPT's "d") is the score `neighbourhood`. NaN for a text without variants.

    Args:
        variants: from `read_variants`, by the same model.

    Source: DetectGPT, arXiv:2301.11305, section 4, algorithm 1.
    """
    check_variants(given, variants)
    each = variants.rows.mean(variants.rows["logprob"])
    centre = variants.mean(each)
    with np.errstate(invalid="ignore"):
        deviation = np.sqrt(variants.mean((each - centre[variants.prompt]) ** 2))
        gap = given.rows.mean(given.rows["logprob"]) - centre
    found: np.ndarray = gap / np.where(deviation < _ROUNDING, 1.0, deviation)
    return found


@register(
    "npr",
    columns=("rank",),
    high="machine",
    summary="log-rank of the variants over that of the text",
    arxiv="2306.05540",
)
def npr(given: Given, *, variants: Samples) -> np.ndarray:
    """mean_k [mean_t log r_t(x_k)] / mean_t log r_t(x) [T], r counted from 1; inf where all ranks of x are 1.

    Args:
        variants: from `read_variants`, by the same model.

    Source: DetectLLM, arXiv:2306.05540, section 3.
    """
    check_variants(given, variants)
    each = variants.rows.mean(np.log1p(variants.rows["rank"]))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = variants.mean(each) / given.rows.mean(np.log1p(given.rows["rank"]))
    return found


def check_variants(given: Given, variants: Samples) -> None:
    """Raise ValueError unless there is a group of variants for each text."""
    if len(variants.counts) != given.signature.n_texts:
        raise ValueError(
            f"variants are given for {len(variants.counts)} texts and the signature has {given.signature.n_texts}: "
            "give one group per text"
        )


@method(
    name="span resampling",
    access="gray",
    summary="variants of a text: a share of its tokens in spans drawn anew from a language model",
)
@dataclass(frozen=True)
class SpanResampler:
    """Variants in which spans of tokens are drawn anew from p(. | everything before, new spans included).

    Of a text of n tokens, k = round(share n / span) spans (at least one) are chosen, uniformly among the placements
    that leave a token between any two. DetectGPT fills spans of 2 words by T5, which sees both sides; a causal model
    sees the left side only, so a new span fits what follows no better than chance, for human and machine text alike.
    Where the paper's figures matter, give a mask-filling callable instead. DetectGPT's setting of 0.3 masks 0.3 / 4
    spans of 2 per word, hence 15 % of the words, which is the default here.

    The variants of a text depend on it, on the seed and on the settings, not on the texts beside it. Specials are never
    drawn. A text of no token, or of one that nothing predicts, is its own variant.

    Args:
        model: any language model that gives whole distributions.
        variants: per text.
        share: of the tokens that are drawn anew.
        span: tokens of a span.
        seed: of all draws.
        batch: variants at work at once.

    Raises:
        ValueError: a number is out of range, or the model is partial.
    """

    model: LanguageModel
    variants: int = 10
    share: float = 0.15
    span: int = 2
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        if min(self.variants, self.span, self.batch) < 1:
            raise ValueError(
                f"variants, span and batch must be at least 1, got {self.variants}, {self.span}, {self.batch}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        if self.model.is_partial:
            raise ValueError(
                f"{self.model.name} tells only its most probable tokens; drawing needs whole distributions"
            )

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """`variants` texts for each text."""
        vocab = self.model.vocab
        rows = [np.array(vocab.encode(text).ids, dtype=np.int64) for text in texts for _ in range(self.variants)]
        masks, coins = [], []
        for number, row in enumerate(rows):
            text, which = divmod(number, self.variants)
            random = np.random.default_rng([self.seed, zlib.crc32(texts[text].encode("utf-8", "replace")), which])
            masks.append(self._mask(len(row), random))
            coins.append(random.random(len(row)))
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            self._redraw([rows[i] for i in some], [masks[i] for i in some], [coins[i] for i in some])
        made = [
            texts[number // self.variants] if not masks[number].any() else vocab.decode_text(row.tolist())
            for number, row in enumerate(rows)
        ]
        return [made[start : start + self.variants] for start in range(0, len(made), self.variants)]

    def _mask(self, length: int, random: np.random.Generator) -> np.ndarray:
        """Which of a text's tokens are drawn anew [length]."""
        mask = np.zeros(length, dtype=bool)
        first = 0 if self.model.vocab.bos_id is not None else 1
        span = min(self.span, length - first)
        if span < 1:
            return mask
        most = (length - first + 1) // (span + 1)
        count = max(1, min(round(self.share * length / span), most))
        # Placements with a token between spans are subsets of the places left when spans and gaps are shrunk to one.
        free = length - first - (count - 1) * span - (span - 1)
        starts = np.sort(random.choice(free, count, replace=False)) + np.arange(count) * span + first
        mask[(starts[:, None] + np.arange(span)).ravel()] = True
        return mask

    def _redraw(self, rows: Sequence[np.ndarray], masks: Sequence[np.ndarray], coins: Sequence[np.ndarray]) -> None:
        """Overwrite the masked tokens of rows, the longest first, by draws that spend one coin each."""
        import torch

        from nextoken.model.base import ABSENT
        from nextoken.model.next import invert_cdf

        vocab, limit = self.model.vocab, self.model.context_length
        begin = [] if vocab.bos_id is None else [vocab.bos_id]
        width = len(rows[0]) + len(begin)
        tokens = np.full((len(rows), width), ABSENT, dtype=np.int64)
        wanted = np.zeros((len(rows), width), dtype=bool)
        uniform = np.zeros((len(rows), width))
        for number, (row, mask, coin) in enumerate(zip(rows, masks, coins, strict=True)):
            end = len(begin) + len(row)
            tokens[number, :end] = [*begin, *row]
            wanted[number, len(begin) : end], uniform[number, len(begin) : end] = mask, coin
        specials = torch.tensor(sorted(vocab.specials), dtype=torch.long)
        state, fed, begun = None, 0, 0
        # Place by place, since a draw is part of the context of all draws behind it.
        for place in np.flatnonzero(wanted.any(0)).tolist():
            if state is None or (limit is not None and place - begun > limit):
                # The longest first: those that reach this place are a beginning of the rows.
                alive = int((tokens[:, place] != ABSENT).sum())
                begun = fed = 0 if limit is None or place <= limit else place - limit // 2
                state = self.model.start(alive)
            following = self.model.extend(state, torch.from_numpy(tokens[: state.batch, fed:place]))
            fed = place
            chosen = np.flatnonzero(wanted[:, place])
            log_probs = following[torch.from_numpy(chosen), -1].log_probs()[:, 0]
            log_probs = log_probs.index_fill(-1, specials.to(log_probs.device), -torch.inf)
            drawn = invert_cdf(log_probs, torch.from_numpy(uniform[chosen, place])).cpu().numpy()
            possible = (log_probs > -torch.inf).any(-1).cpu().numpy()
            tokens[chosen, place] = np.where(possible, drawn, tokens[chosen, place])
        for number, row in enumerate(rows):
            row[:] = tokens[number, len(begin) : len(begin) + len(row)]

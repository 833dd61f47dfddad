"""DC-PDD: membership by probabilities set against how common the tokens are, and the table that says how common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nextoken.scores.rows import Rows
from nextoken.scores.score import Given, register

if TYPE_CHECKING:
    from nextoken.model.vocab import Vocab
    from nextoken.signature.signature import Signature

_LIMIT = 0.01


@dataclass(frozen=True)
class TokenFrequencies:
    """How often each token occurs in a reference text: q(v) = (c_v + 1) / (N + V), N = sum_v c_v.

    Args:
        counts: c [V].
        vocab_digest: of the vocabulary that cut the text.
    """

    counts: np.ndarray
    vocab_digest: str

    @classmethod
    def from_text(cls, texts: str | bytes | Iterable[str | bytes], vocab: Vocab) -> TokenFrequencies:
        """Counts of one text or several, tokenised by `vocab`; each occurrence counts.

        The text should be general, in the language of those to be judged, and hold none of them.
        """
        several = [texts] if isinstance(texts, str | bytes) else texts
        return cls.from_tokens((vocab.encode(text).ids for text in several), vocab)

    @classmethod
    def from_tokens(cls, sequences: Iterable[Sequence[int]], vocab: Vocab) -> TokenFrequencies:
        """Counts of token sequences.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        counts = np.zeros(vocab.size, dtype=np.int64)
        for sequence in sequences:
            ids = np.asarray(sequence, dtype=np.int64)
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocab.size:
                raise ValueError(f"token ids must lie in [0, {vocab.size}), got {ids.min()} to {ids.max()}")
            counts += np.bincount(ids, minlength=vocab.size)
        return cls(counts, vocab.digest)

    @property
    def total(self) -> int:
        """N, the tokens counted."""
        return int(self.counts.sum())

    @cached_property
    def log_probs(self) -> np.ndarray:
        """log q [V], nats."""
        logs: np.ndarray = np.log(self.counts + 1.0) - np.log(self.total + len(self.counts))
        return logs

    def save(self, path: str | Path) -> None:
        """Write one file (npz), complete or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        from nextoken.signature.output import begun, writing

        target = Path(path)
        with writing(target):
            temporary = begun(target)
            try:
                with temporary.open("wb") as file:
                    np.savez_compressed(file, counts=self.counts, vocab_digest=np.array(self.vocab_digest))
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> TokenFrequencies:
        """What `save` wrote.

        Raises:
            InputError: there is none.
        """
        from zipfile import BadZipFile

        from nextoken.errors import InputError

        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["counts"], str(file["vocab_digest"]))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise InputError(f"{path}: no table of token frequencies ({error})") from error


@register(
    "dc_pdd",
    columns=("logprob", "token_id"),
    high="member",
    summary="probabilities weighted by the rarity of their tokens in a reference text",
    arxiv="2409.14781",
)
def dc_pdd(given: Given, *, frequencies: TokenFrequencies, limit: float = _LIMIT) -> np.ndarray:
    """(1/|F|) sum_{t in F} min(-p_t log q(x_t), limit) [T], F the places where a token occurs in its text first.

    p_t is the probability of the token that came (not its log), q the frequencies of `TokenFrequencies`. Common words
    that any model predicts weigh little, so what is left is what this model knows. -log q is mostly 5 to 15, so at the
    default limit every token of p_t above some 0.001 counts alike: see `saturation`. The first token counts where the
    model's begin token predicts it.

    The formula, not the code, is followed: the code published with the paper does not run as it is, and MIMIR's adds
    one per document rather than per occurrence to its counts.

    Args:
        frequencies: counted on text that holds none of the texts to be judged.
        limit: a of the paper, which tunes it for each model and data set; 0.01 in its code.

    Raises:
        ValueError: the limit is not above 0, or the frequencies are of another vocabulary.

    Source: DC-PDD, arXiv:2409.14781, section 3.
    """
    if limit <= 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    return _mean_of_first(given.rows, np.minimum(_terms(given.signature, frequencies), limit))


def saturation(signature: Signature, frequencies: TokenFrequencies, *, limit: float = _LIMIT) -> np.ndarray:
    """Share of the first occurrences whose -p log q reaches the limit [T]; near 1, `dc_pdd` is blind."""
    return _mean_of_first(Rows(signature), _terms(signature, frequencies) >= limit)


def _terms(signature: Signature, frequencies: TokenFrequencies) -> np.ndarray:
    """-p_t log q(x_t) of every token [N]."""
    if frequencies.vocab_digest != signature.metadata.tokenizer_digest:
        raise ValueError(
            f"the frequencies are of another vocabulary than that of {signature.metadata.model}: "
            "count them with TokenFrequencies.from_text(texts, model.vocab)"
        )
    rarity = -frequencies.log_probs[signature.column("token_id")]
    terms: np.ndarray = np.exp(signature.column("logprob").astype(np.float64)) * rarity
    return terms


def _mean_of_first(rows: Rows, values: np.ndarray) -> np.ndarray:
    """Mean of values [N] over the places where a token occurs in its text first [T]."""
    tokens = rows.signature.column("token_id")
    order = np.lexsort((np.arange(len(tokens)), tokens, rows.text))
    first = np.ones(len(tokens), dtype=bool)
    first[order[1:]] = (np.diff(tokens[order]) != 0) | (np.diff(rows.text[order]) != 0)
    with np.errstate(invalid="ignore"):
        return rows.sum(np.where(first, values, 0.0)) / np.where(rows.counts > 0, rows.sum(first), np.nan)

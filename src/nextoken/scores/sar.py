"""SAR: surprisal shifted to the tokens that carry meaning, and to the answers that others bear out."""

from __future__ import annotations

import math

import numpy as np

from nextoken.scores.rows import Rows
from nextoken.scores.sampled import log_sum
from nextoken.scores.samples import Samples
from nextoken.scores.score import Given, register
from nextoken.scores.similarity import Similarity, character_ngrams
from nextoken.signature.signature import Signature


def relevance(signature: Signature, *, similarity: Similarity = character_ngrams, prompted: bool = False) -> np.ndarray:
    """R_t = 1 - |g(x, x without its token t)| [N], at least 0: how much of the meaning goes with each token.

    Exactly the bytes of the one token are taken out. A token without bytes (an end token) has relevance 0.

    Args:
        signature: N rows.
        similarity: g; the paper's is a cross-encoder trained on semantic similarity.
        prompted: compare with the prompt before the text, as the paper does, where the signature knows it.

    Source: SAR, arXiv:2307.01379, section 4 (the official code takes out every occurrence of the token's text).
    """
    found = np.zeros(len(signature))
    for number, (begin, end) in enumerate(zip(signature.row_offsets[:-1], signature.row_offsets[1:], strict=True)):
        info = signature.texts[number]
        tokens: list[bytes] = signature.table["token"].slice(begin, end - begin).to_pylist()
        there = [t for t, token in enumerate(tokens) if token]
        if not there:
            continue
        before = (info.prompt.encode() if prompted else b"") + info.prefix
        parts = (b"".join([before, *tokens[:t], *tokens[t + 1 :], info.suffix]) for t in there)
        shortened = [part.decode(errors="replace") for part in parts]
        whole = b"".join([before, *tokens, info.suffix]).decode(errors="replace")
        found[begin + np.array(there)] = np.maximum(0.0, 1 - np.abs(similarity([whole], shortened)[0]))
    return found


@register(
    "token_sar",
    columns=("logprob", "token"),
    high="uncertain",
    summary="surprisal of the tokens, weighted by how much of the meaning goes with each",
    arxiv="2307.01379",
)
def token_sar(given: Given, *, similarity: Similarity = character_ngrams, prompted: bool = False) -> np.ndarray:
    """-sum_t w_t log p(x_t | x_<t) [T], nats, w_t = R_t / sum_s R_s, R of `relevance`.

    Where no removal changes the meaning all w are 1 / n: the mean surprisal, where lm-polygraph has NaN.

    Args:
        similarity, prompted: of `relevance`.

    Source: SAR, arXiv:2307.01379, section 4.
    """
    return _token_sar(given.signature, similarity, prompted)


@register(
    "sentence_sar",
    needs=("samples",),
    high="uncertain",
    summary="surprisal of sampled answers, each vouched for by those like it",
    arxiv="2307.01379",
)
def sentence_sar(
    given: Given, *, similarity: Similarity = character_ngrams, t: float = 0.001, prompted: bool = False
) -> np.ndarray:
    """-(1/M) sum_j log(p(s_j) + (1/t) sum_{k != j} g(s_j, s_k) p(s_k)) [T], nats.

    It ranks prompts that have the same number of answers; it can be negative and is no entropy.

    Args:
        similarity: g between whole answers.
        t: how little an answer of its own is worth beside the others.
        prompted: compare answers with the prompt before them, as the paper does.

    Raises:
        ValueError: t is not above 0.

    Source: SAR, arXiv:2307.01379, section 4.
    """
    samples = _samples(given)
    return _vouched(samples, samples.logprobs, similarity, t, prompted)


@register(
    "sar",
    needs=("samples",),
    high="uncertain",
    summary="relevant surprisal of sampled answers, each vouched for by those like it",
    arxiv="2307.01379",
)
def sar(
    given: Given, *, similarity: Similarity = character_ngrams, t: float = 0.001, prompted: bool = False
) -> np.ndarray:
    """`sentence_sar` with exp(-token_sar(s)) in place of p(s) [T], nats; of one answer it is its token_sar.

    Args:
        similarity, t, prompted: of `sentence_sar` and `relevance`.

    Raises:
        ValueError: t is not above 0.

    Source: SAR, arXiv:2307.01379, section 4.
    """
    samples = _samples(given)
    return _vouched(samples, -_token_sar(samples.signature, similarity, prompted), similarity, t, prompted)


def _token_sar(signature: Signature, similarity: Similarity, prompted: bool) -> np.ndarray:
    rows = Rows(signature)
    weight = relevance(signature, similarity=similarity, prompted=prompted)
    total = rows.sum(weight)
    # 0 / 0 where nothing is relevant; a NaN similarity stays NaN.
    weight = np.where(
        (total == 0)[rows.text], 1 / rows.counts[rows.text], weight / np.where(total == 0, 1, total)[rows.text]
    )
    with np.errstate(invalid="ignore"):
        surprisal = np.where(weight == 0, 0.0, weight * -rows["logprob"])
    return np.where(rows.counts > 0, rows.sum(surprisal), np.nan)


def _vouched(samples: Samples, logprobs: np.ndarray, similarity: Similarity, t: float, prompted: bool) -> np.ndarray:
    """-(1/M) sum_j log(e^l_j + (1/t) sum_{k != j} g_jk e^l_k) [T], l of `logprobs` [M]."""
    if not t > 0:
        raise ValueError(f"t must be above 0, got {t}")
    likenesses = samples.compared(similarity, prompted=prompted)
    each: list[float] = []
    for own, likeness in zip(samples.grouped(logprobs.tolist()), likenesses, strict=True):
        if not own:
            each.append(math.nan)
            continue
        with np.errstate(divide="ignore"):
            weight = np.log(np.maximum(likeness, 0.0)) - math.log(t)
        np.fill_diagonal(weight, 0.0)
        each.append(-float(log_sum(weight + np.array(own)).mean()))
    return np.array(each)


def _samples(given: Given) -> Samples:
    assert given.samples is not None
    return given.samples

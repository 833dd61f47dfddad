"""Zero-shot detection of machine text: every score here is high where the text looks machine-made.

l_t is the log-probability of the token that came, r_t its rank counted from 1, H_t the entropy of p(. | x_<t), all in
nats and over the whole vocabulary. The plainest detector, mean l_t, is the score `mean_logprob`. How long a text is
moves all of them: cut both classes to one length before comparing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nextoken.methods import method
from nextoken.scores.score import Given, register
from nextoken.signature.signature import Signature

if TYPE_CHECKING:
    from nextoken.model.base import LanguageModel
    from nextoken.signature.texts import Texts

GLTR_BINS = (10, 100, 1000)
"""Ranks below which the bins of GLTR end, counted from 0."""
_ENTRIES = 1 << 22
"""Log-probabilities of each model held at once."""


@register("rank", columns=("rank",), high="machine", summary="less the mean rank of the tokens", arxiv="1906.04043")
def rank(given: Given) -> np.ndarray:
    """-(1/n) sum_t r_t [T].

    Ranks count the tokens strictly more probable, so tied tokens share the best place; official code sorts, and ties
    fall where they may.

    Source: Gehrmann, Strobelt and Rush, GLTR, arXiv:1906.04043.
    """
    return -given.rows.mean(given.rows["rank"] + 1)


@register("log_rank", columns=("rank",), high="machine", summary="less the mean log-rank of the tokens")
def log_rank(given: Given) -> np.ndarray:
    """-(1/n) sum_t log r_t [T], nats."""
    return -given.rows.mean(np.log1p(given.rows["rank"]))


@register(
    "lrr",
    columns=("logprob", "rank"),
    high="machine",
    summary="log-likelihood over log-rank: surprise that the ranks do not explain",
    arxiv="2306.05540",
)
def lrr(given: Given) -> np.ndarray:
    """-sum_t l_t / sum_t log r_t [T]; inf where every token is the most probable one, its limit as ranks fall to 1.

    NaN where such tokens are certain as well, for 0 / 0 tells nothing.

    Source: DetectLLM, arXiv:2306.05540, section 3.
    """
    rows = given.rows
    surprisal, ranks = -rows.sum(rows["logprob"]), rows.sum(np.log1p(rows["rank"]))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(rows.counts > 0, surprisal / ranks, np.nan)


@register(
    "low_entropy", columns=("entropy",), high="machine", summary="less the mean entropy: the text keeps to sure ground"
)
def low_entropy(given: Given) -> np.ndarray:
    """-(1/n) sum_t H_t [T], nats: `mean_entropy` pointed as a detector.

    Weak alone. Official baselines use +mean H as the machine score, which comes out below chance on texts of chat
    models: those are drawn from sharpened distributions and stay where the judge is sure.
    """
    return -given.rows.mean(given.rows["entropy"])


@register(
    "gltr", columns=("rank",), high="machine", summary="share of tokens among the 10 most probable", arxiv="1906.04043"
)
def gltr(given: Given) -> np.ndarray:
    """The first of the `gltr_bins`: #{t : r_t <= 10} / n [T].

    Source: GLTR, arXiv:1906.04043.
    """
    return gltr_bins(given.signature)[:, 0]


def gltr_bins(signature: Signature, *, edges: Sequence[int] = GLTR_BINS) -> np.ndarray:
    """Shares of the tokens in the top 10, the next 90, the next 900 and the rest [T, 4]; NaN without tokens.

    These are the colours of GLTR's page, and the features that a classifier can be trained on. Ranks that a partial
    model does not tell are beyond its top and count as the rest.

    Args:
        signature: under the model that judges.
        edges: ascending ranks, counted from 0, at which the next bin begins.

    Raises:
        ValueError: the edges do not ascend.

    Source: GLTR, arXiv:1906.04043.
    """
    if any(a >= b for a, b in zip((0, *edges), edges, strict=False)):
        raise ValueError(f"edges must ascend from above 0, got {list(edges)}")
    rows = Given(signature).rows
    place = np.searchsorted(edges, rows["rank"], side="right")  # NaN sorts behind every edge
    return np.stack([rows.mean(place == number) for number in range(len(edges) + 1)], axis=1)


@register(
    "fast_detectgpt",
    columns=("logprob", "entropy", "varentropy"),
    high="machine",
    summary="conditional probability curvature, the judge sampling from itself",
    arxiv="2310.05130",
)
def fast_detectgpt(given: Given) -> np.ndarray:
    """(sum_t l_t + sum_t H_t) / sqrt(sum_t Var_t) [T], with Var_t = sum_v p log^2 p - H_t^2: Fast-DetectGPT for q = p.

    Expectation and variance of each token's log-probability are exact, so nothing is sampled. Over texts drawn from p
    its mean is 0 and its variance about 1. It is the score of `concentration.normal_test` with the other sign. NaN
    where no distribution of the text has any variance.

    Source: Fast-DetectGPT, arXiv:2310.05130, section 3.2 (the analytic form).
    """
    rows = given.rows
    return _curvature(rows.sum(rows["logprob"]), rows.sum(rows["entropy"]), rows.sum(rows["varentropy"]))


@dataclass(frozen=True)
class CrossMoments:
    """Moments of a scoring model's -log p under a sampling model's q, for the N tokens of T texts; nats.

    Args:
        logprob: log p(x_t) [N].
        mean: -sum_v q log p [N].
        square: sum_v q log^2 p [N].
        offsets: where each text's tokens begin, and N [T + 1].
    """

    logprob: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    offsets: np.ndarray

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over the tokens of each text [T], 0 for one without tokens."""
        counts = np.diff(self.offsets)
        return np.bincount(np.repeat(np.arange(len(counts)), counts), weights=values, minlength=len(counts))


@method(
    name="Fast-DetectGPT with a sampling model",
    arxiv="2310.05130",
    access="gray",
    summary="conditional probability curvature under another model's distribution, both read once",
)
def conditional_curvature(
    scoring: LanguageModel | str | Path, texts: Texts, *, sampling: LanguageModel | str | Path
) -> np.ndarray:
    """(sum_t log p(x_t) - sum_t m_t) / sqrt(sum_t s_t) [T], m_t = sum_v q log p, s_t = sum_v q log^2 p - m_t^2.

    High = machine. No signature holds sum q log^2 p, so both models read the texts here, a block of distributions at a
    time. With sampling = scoring it is the score `fast_detectgpt`. NaN for a text without tokens, and where some token
    that q may draw is impossible under p.

    Args:
        scoring: p, the model whose log-probabilities are judged.
        texts: one text, or any iterable of them.
        sampling: q, the model that the tokens might have been drawn from; of the same vocabulary (official code cuts
            the larger of two vocabularies down to the smaller one).

    Raises:
        ModelError: the vocabularies differ, or a model tells only its most probable tokens.

    Source: Fast-DetectGPT, arXiv:2310.05130, section 3.2.
    """
    moments = cross_moments(scoring, texts, sampling=sampling)
    with np.errstate(invalid="ignore"):
        # Clamped: where p is nearly certain, rounding can leave a variance below 0.
        variance = np.maximum(moments.square - moments.mean**2, 0.0)
    return _curvature(moments.sum(moments.logprob), moments.sum(moments.mean), moments.sum(variance))


def cross_moments(
    scoring: LanguageModel | str | Path, texts: Texts, *, sampling: LanguageModel | str | Path, batch_tokens: int = 8192
) -> CrossMoments:
    """log p(x_t), -sum_v q log p and sum_v q log^2 p for every token of the texts, from one pass of each model.

    Windows, begin token and batches are those of `nextoken.read`. Where q has mass and p none, the moments are inf.

    Raises:
        ModelError: the vocabularies differ, or a model tells only its most probable tokens.
    """
    from nextoken.errors import ModelError
    from nextoken.model.loading import load
    from nextoken.signature.forward import Forward, Numbers
    from nextoken.signature.passage import Job, passage
    from nextoken.signature.texts import incoming
    from nextoken.signature.window import windows

    p, q = load(scoring), load(sampling)
    if p.vocab.digest != q.vocab.digest:
        raise ModelError(f"{p.name} and {q.name} have different vocabularies: choose two models that share one")
    if p.is_partial or q.is_partial:
        raise ModelError(
            "expectations over the vocabulary need whole distributions, not a server's most probable tokens"
        )

    class Both(Forward):
        """The batches of a reading, with these moments for its numbers."""

        def _numbers(self, nexts: Sequence[Any], scored: Any, targets: Any) -> Numbers:
            return _moments([following[scored] for following in nexts], targets)

    begin = np.array([] if p.vocab.bos_id is None else [p.vocab.bos_id], dtype=np.int64)
    passages = [passage(number, text, p.vocab, begin) for number, text in enumerate(incoming(texts))]
    limits = [model.context_length for model in (p, q) if model.context_length is not None]
    jobs = [
        Job(each, window)
        for each in passages
        for window in windows(len(each.tokens), min(limits, default=None), given=each.given)
    ]
    forward = Both(p, q, top=0, hidden=False, batch_tokens=batch_tokens)
    nothing = np.zeros(0)
    numbers = forward.run(jobs) if jobs else {"logprob": nothing, "mean": nothing, "square": nothing}
    counts = [each.info.n_rows for each in passages]
    return CrossMoments(**numbers, offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _moments(nexts: Sequence[Any], targets: Any) -> dict[str, np.ndarray]:
    """The moments of Next p, q of shape [N, 1], a block of rows at a time."""
    import torch

    p, q = nexts
    rows = max(1, _ENTRIES // p.vocab_size)
    found: dict[str, list[Any]] = {"logprob": [], "mean": [], "square": []}
    for start in range(0, p.shape[0], rows):
        log_p, log_q = (following[start : start + rows].log_probs()[:, 0] for following in (p, q))
        weight = log_q.exp().to(log_p.device)
        # What q never draws does not count, not even where log p is -inf.
        term = torch.where(weight > 0, weight * log_p, 0.0)
        found["mean"].append(-term.sum(-1, dtype=torch.float64))
        found["square"].append(torch.where(weight > 0, term * log_p, 0.0).sum(-1, dtype=torch.float64))
        wanted = targets[start : start + rows, None].to(log_p.device)
        found["logprob"].append(log_p.gather(-1, wanted)[:, 0].double())
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}


def _curvature(logprob: np.ndarray, entropy: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """(log p + E[-log p]) / deviation [T]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variance > 0, (logprob + entropy) / np.sqrt(variance), np.nan)


@register(
    "binoculars",
    columns=("against_logprob", "cross_entropy"),
    high="machine",
    summary="less perplexity over cross-perplexity of two models that read the text side by side",
    arxiv="2401.12070",
)
def binoculars(given: Given) -> np.ndarray:
    """-B [T], B = [(1/n) sum_t -log p_perf(x_t)] / [(1/n) sum_t -sum_v p_obs log p_perf], of `read(observer, texts,
    against=performer)`: the model that is read observes, the one given as `against` performs.

    Surprise and cross-entropy are both the performer's, over the observer's expectation; swapped, it is another score.
    Official code averages the denominator over one position more than the numerator, the one after the last token; here
    both have the n positions that predict a token of the text. B below 0.9015 (best F1) or 0.8536 (false alarms of 1 in
    10,000) says machine for the published pair falcon-7b, falcon-7b-instruct; other pairs need thresholds of their own.

    Source: Binoculars, arXiv:2401.12070, section 3, and its code for which model is which.
    """
    rows = given.rows
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = rows.mean(rows["against_logprob"]) / rows.mean(rows["cross_entropy"])
    return found

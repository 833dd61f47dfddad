"""Was this text drawn from this model? Tests on the gap between surprisal and entropy, and their errors.

A text y_1 ... y_n drawn from A itself is on average as surprising as A expects: S_t = -log A(y_t | y_<t) less
H_t = H(A(. | y_<t)) has mean 0 given the past, so D = (1/n) sum_t (S_t - H_t) goes to 0, and any deviation is evidence
against A. Three tests of "A drew it", all in nats:

| test | type I error | power |
| --- | --- | --- |
| `bound_test` | at most the level, for every n fixed beforehand | least: it knows only V |
| `betting_test` | at most the level, whenever one cares to stop | good, and looks beyond D at the tails |
| `normal_test` | the level as n grows (a few hundred tokens) | most against a shift of D |

A means the distribution that tokens were drawn from: one drawn at temperature 0.7 or from a nucleus is rejected, as too
predictable, and its prompt must have been read too (or some first tokens skipped). Not being rejected proves nothing:
D is near 0, too, for a text of another model that is on average as surprising to A as A's own.

Source: arXiv:2501.02406 for the statistic and the exponential decay of both errors; the bounds with their constants are
in `nextoken.scores.surprisal_bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.special import logsumexp, ndtr

from nextoken.methods import method
from nextoken.scores.rows import Rows
from nextoken.scores.score import Given, register
from nextoken.scores.surprisal_bounds import type_one_bound
from nextoken.signature.signature import Signature

Alternative = Literal["two-sided", "surprising", "predictable"]
"""What the test is to notice: D away from 0, above it, or below it."""

_KNOWN = {0.75: "quarter_sum", 0.5: "half_sum", -1.0: "collision"}
"""s -> the column sum_v A^(1 - s) = E e^(s S)."""
_TILTS = {0.75: 0.75, 0.5: 0.5, 0.25: 0.5, 0.1: 0.5, -0.1: -1.0, -0.25: -1.0, -0.5: -1.0, -1.0: -1.0}
"""s of each bet -> the next s beyond it of which E e^(s S) is known."""
_DECISIVE = 1e4
"""Nats at which a bet's single step is cut, so that sums stay finite: e^-10000 is no probability of anything."""
_ROUNDING = 1e-5
"""Least standard deviation of a token's surprisal, nats: the rounding of the columns."""


@dataclass(frozen=True)
class Verdict:
    """A test's answer for each of T texts.

    Args:
        statistic: of the test [T]; NaN without tokens.
        p_value: largest probability, were the text drawn from the model, of a statistic so far out [T]; 1 without
            tokens.
        n: tokens tested [T].
    """

    statistic: np.ndarray
    p_value: np.ndarray
    n: np.ndarray


@register(
    "excess_surprisal",
    columns=("logprob", "entropy"),
    high="surprising",
    summary="mean surprisal less mean entropy: 0 for text drawn from the model",
    arxiv="2501.02406",
)
def excess_surprisal(given: Given, *, skip: int = 0) -> np.ndarray:
    """D = (1/n) sum_t (-log A(y_t | y_<t) - H_t) [T], nats per token.

    Near 0 for what A drew; above it for most text of people and of other models, by the mean of CE(B, A) - H(A); below
    it for text drawn from a sharpened A.

    Args:
        skip: tokens at the start of each text that do not count, where what stood before it is not known.

    Source: arXiv:2501.02406, section 3.
    """
    excess, _, n = _excess(given.signature, skip)
    return excess / np.where(n > 0, n, np.nan)


@register(
    "liketropy",
    columns=("logprob", "entropy"),
    high="machine",
    summary="distance of mean surprisal from mean entropy, by a judge that did not write the text",
    arxiv="2501.02406",
)
def liketropy(given: Given, *, skip: int = 0) -> np.ndarray:
    """|D| [T]: the detector of the paper's code, where the judge A is a small stand-in for the unknown writer.

    It points the other way than the theory: by A's own standard machine text is the one with |D| near 0. But a small
    judge finds people's text about as surprising as it expects, and the text of a greedy or truncated decoder far less.
    Where D of people is not near 0, use `fast_detectgpt`, which keeps the sign.

    Args:
        skip: as of `excess_surprisal`.

    Source: arXiv:2501.02406, the detector evaluated on RAID.
    """
    return np.abs(excess_surprisal(given, skip=skip))


@method(
    name="concentration test, asymptotic",
    arxiv="2501.02406",
    access="gray",
    summary="p-value of surprisal less entropy by the martingale central limit theorem",
)
def normal_test(signature: Signature, *, alternative: Alternative = "two-sided", skip: int = 0) -> Verdict:
    """z = sum_t (S_t - H_t) / sqrt(sum_t Var_t), Var_t the varentropy; p-values of the standard normal.

    The score `fast_detectgpt` with the other sign. The type I error comes near the level as n grows;
    at 25 tokens it is above it on the surprising side and below it on the other, for surprisal is skewed.

    Args:
        signature: under the model that may have drawn the texts.
        alternative: what is to be noticed.
        skip: tokens at the start of each text that do not count.
    """
    excess, variance, n = _excess(signature, skip)
    with np.errstate(invalid="ignore", divide="ignore"):
        z: np.ndarray = excess / np.where(n > 0, np.sqrt(np.maximum(variance, n * _ROUNDING**2)), np.nan)
    return _verdict(z, ndtr(-z), ndtr(z), n, alternative)


@method(
    name="concentration test, finite sample",
    arxiv="2501.02406",
    access="gray",
    summary="p-value of surprisal less entropy that holds for every length and every model of V tokens",
)
def bound_test(signature: Signature, *, alternative: Alternative = "two-sided", skip: int = 0) -> Verdict:
    """D, and p = exp(-n B h(+-D / B)) with h(x) = x - log(1 + x) and B = log(V - 1)^2 / 4 + 1.

    It is `surprisal_bounds.type_one_bound` at D, and two-sided p-values are twice the smaller one-sided one. Very safe
    and so very weak: at V = 4096 and n = 100 it takes |D| of 1.2 nats to reject at 5 %.

    Args:
        signature, alternative, skip: as of `normal_test`; the length of the texts must not depend on how they went.
    """
    excess, _, n = _excess(signature, skip)
    gap, size = excess / np.where(n > 0, n, np.nan), signature.metadata.vocab_size
    upper = type_one_bound(n, np.maximum(gap, 0.0), vocab_size=size)
    lower = type_one_bound(n, np.minimum(gap, 0.0), vocab_size=size)
    return _verdict(gap, upper, lower, n, alternative)


@method(
    name="concentration test, by betting",
    arxiv="2501.02406",
    access="gray",
    summary="exact test that may stop at any token: bets on surprisal at odds that are fair under the model",
)
def betting_test(
    signature: Signature, *, alternative: Alternative = "two-sided", skip: int = 0, anytime: bool = True
) -> Verdict:
    """log max_n W_n, W_n the mean over s of prod_t e^(s (S_t - H_t)) / M_t(s); p = 1 / max_n W_n.

    M_t(s) is at least E e^(s (S_t - H_t)), so each factor has a mean of at most 1 under A given the past, whatever the
    past: W starts at 1, is no better than a fair game, and reaches 1 / level with a probability of at most the level
    (Ville). s of 0.75, 0.5, 0.25 and 0.1 bet on too surprising text, -1, -0.5, -0.25 and -0.1 on too predictable text;
    a bet is the likelihood ratio of A at temperature 1 / (1 - s) to A. An impossible token is a proof for the first: p
    = 0.

    At s = 0.75, 0.5 and -1 the signature knows M(s) = e^(-s H) sum_v A^(1 - s) exactly. Between 0 and such an s = a,
    (M(s) - 1) / s^2 = E (S - H)^2 int_0^1 (1 - u) e^(s u (S - H)) du is a mixture of exponentials in s, so its
    logarithm is convex, and it is at most the geometric interpolation of its value at a and of Var_t / 2 at 0.

    Unlike D, large s looks at the tails of surprisal: text that is on average as surprising as A's, but in fewer and
    greater surprises, is seen as well.

    Args:
        signature, alternative, skip: as of `normal_test`.
        anytime: let the best place count, as the test may; else only W at the end of the text, which is a test too.
    """
    _check(alternative)
    chosen = [tilt for tilt in _TILTS if alternative == "two-sided" or (tilt > 0) == (alternative == "surprising")]
    rows = Rows(signature)
    kept, n = _kept(rows, skip)
    steps = np.stack([_steps(rows, tilt, kept) for tilt in chosen])
    unknown = rows.sum(np.isnan(steps).any(0)) > 0
    wealth = logsumexp(_running(rows, np.nan_to_num(steps)), axis=0) - math.log(len(chosen))
    if anytime:
        found = np.maximum(rows.max(wealth), 0.0)
    else:
        last = np.zeros(len(wealth), dtype=bool)
        last[rows.offsets[1:][rows.counts > 0] - 1] = True
        found = rows.sum(np.where(last, wealth, 0.0))
    found = np.where((n > 0) & ~unknown, found, np.nan)
    p = np.exp(-np.maximum(found, 0.0))
    return Verdict(found, np.where(np.isnan(p), 1.0, p), n)


def attributed(signatures: Sequence[Signature]) -> np.ndarray:
    """argmax_m sum_t log A_m(y_t | y_<t) [T]: which of several models gives each text most probability.

    The paper's code compares means per token; sums compare models of different tokenizers as well.

    Args:
        signatures: the same texts under each model.

    Raises:
        ValueError: there is none, or they hold different texts.

    Source: arXiv:2501.02406, the attribution experiments.
    """
    if not signatures or len({tuple(text.digest for text in one.texts) for one in signatures}) > 1:
        raise ValueError("attribution compares several models on the same texts: give one signature per model")
    totals = [rows.sum(rows["logprob"]) for rows in map(Rows, signatures)]
    best: np.ndarray = np.argmax(totals, axis=0)
    return best


def _excess(signature: Signature, skip: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sum (S - H), sum of varentropies, and the number of tokens of each text [T]."""
    rows = Rows(signature)
    kept, n = _kept(rows, skip)
    excess = rows.sum(np.where(kept, -rows["logprob"] - rows["entropy"], 0.0))
    return excess, rows.sum(np.where(kept, rows["varentropy"], 0.0)), n


def _kept(rows: Rows, skip: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are tested [N], and how many of each text [T]."""
    if skip < 0:
        raise ValueError(f"skip must be 0 or more, got {skip}")
    kept = np.arange(len(rows.text)) - rows.offsets[:-1][rows.text] >= skip
    return kept, np.maximum(rows.counts - skip, 0)


def _steps(rows: Rows, tilt: float, kept: np.ndarray) -> np.ndarray:
    """s (S_t - H_t) - log M_t(s), 0 where a token does not count [N]."""
    entropy, known = rows["entropy"], _TILTS[tilt]
    there = np.maximum(np.exp(-known * entropy) * rows[_KNOWN[known]] - 1, 0.0) / known**2
    here = np.maximum(rows["varentropy"], 0.0) / 2
    bound = np.log1p(tilt**2 * here ** (1 - tilt / known) * there ** (tilt / known))
    step = np.clip(tilt * (-rows["logprob"] - entropy) - bound, -_DECISIVE, _DECISIVE)
    return np.where(kept, step, 0.0)


def _running(rows: Rows, values: np.ndarray) -> np.ndarray:
    """Sum of the values [k, N] of a row's text up to it [k, N]."""
    total = np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], axis=1)
    running: np.ndarray = total[:, 1:] - total[:, rows.offsets[:-1][rows.text]]
    return running


def _verdict(
    statistic: np.ndarray, upper: np.ndarray, lower: np.ndarray, n: np.ndarray, alternative: Alternative
) -> Verdict:
    _check(alternative)
    twice = np.minimum(1.0, 2 * np.minimum(upper, lower))
    p = twice if alternative == "two-sided" else upper if alternative == "surprising" else lower
    return Verdict(statistic, np.where(np.isnan(p), 1.0, p), n)


def _check(alternative: str) -> None:
    if alternative not in get_args(Alternative):
        raise ValueError(f"alternative must be one of {', '.join(get_args(Alternative))}, got {alternative!r}")

"""Scores of the log-probabilities of the tokens that came."""

from __future__ import annotations

import math

import numpy as np

from nextoken.scores.score import Given, register


@register("logprob", columns=("logprob",), high="certain", summary="log-probability of the text")
def logprob(given: Given) -> np.ndarray:
    """sum_t log p(x_t | x_<t) [T], nats; NaN for a text without tokens to judge, not 0, which says certain."""
    rows = given.rows
    return np.where(rows.counts > 0, rows.sum(rows["logprob"]), np.nan)


@register("mean_logprob", columns=("logprob",), high="certain", summary="mean log-probability of a token")
def mean_logprob(given: Given) -> np.ndarray:
    """(1/n) sum_t log p(x_t | x_<t) [T], nats per token."""
    rows = given.rows
    return rows.mean(rows["logprob"])


@register("perplexity", columns=("logprob",), high="uncertain", summary="exp of the mean surprisal")
def perplexity(given: Given) -> np.ndarray:
    """exp(-(1/n) sum_t log p(x_t | x_<t)) [T]."""
    return np.exp(-mean_logprob(given))


@register(
    "bits_per_byte",
    columns=("logprob", "byte_start", "byte_end"),
    high="surprising",
    summary="surprisal in bits over the bytes of the text",
)
def bits_per_byte(given: Given) -> np.ndarray:
    """-sum_t log2 p(x_t | x_<t) / bytes of the predicted tokens [T]: comparable between tokenizers."""
    rows = given.rows
    size = rows.sum(rows["byte_end"] - rows["byte_start"])
    return -rows.sum(rows["logprob"]) / math.log(2) / np.where(size > 0, size, np.nan)

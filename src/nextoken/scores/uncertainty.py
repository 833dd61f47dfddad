"""Uncertainty of single texts by one reading: of the tokens that came, and of the distributions they came from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nextoken.scores.rows import Rows
from nextoken.scores.score import Given, register
from nextoken.signature.signature import Signature

_POWER_SUMS = {0.25: "quarter_sum", 0.5: "half_sum", 2.0: "collision", 3.0: "cube_sum", 4.0: "fourth_sum"}
_FLAT = 1e-5
"""V sum p^2 - 1 up to which a distribution counts as uniform: its moments are lost in the rounding of float32."""


@register("sequence_surprisal", columns=("logprob",), high="uncertain", summary="minus the log-probability of the text")
def sequence_surprisal(given: Given) -> np.ndarray:
    """-sum_t log p(x_t | x_<t) [T], nats; NaN for a text without tokens, about which nothing is known.

    Grows with the length of the text. lm-polygraph calls it MaximumSequenceProbability.
    """
    rows = given.rows
    return np.where(rows.counts > 0, 0.0 - rows.sum(rows["logprob"]), np.nan)


@register("token_surprisal", columns=("logprob",), per="token", high="uncertain", summary="-log p of each token")
def token_surprisal(given: Given) -> np.ndarray:
    """-log p(x_t | x_<t) [N], nats; MaximumTokenProbability of lm-polygraph, which leaves out the last token."""
    return 0.0 - given.rows["logprob"]


@register("token_entropy", columns=("entropy",), per="token", high="uncertain", summary="entropy before each token")
def token_entropy(given: Given) -> np.ndarray:
    """H(p(. | x_<t)) [N], nats, over the whole vocabulary."""
    return given.rows["entropy"]


@register("mean_entropy", columns=("entropy",), high="uncertain", summary="mean entropy of the distributions")
def mean_entropy(given: Given) -> np.ndarray:
    """(1/n) sum_t H(p(. | x_<t)) [T], nats; MeanTokenEntropy of lm-polygraph."""
    rows = given.rows
    return rows.mean(rows["entropy"])


@register("max_entropy", columns=("entropy",), high="uncertain", summary="largest entropy of the distributions")
def max_entropy(given: Given) -> np.ndarray:
    """max_t H(p(. | x_<t)) [T], nats: where the text was least determined."""
    rows = given.rows
    return rows.max(rows["entropy"])


@register(
    "logprob_quantile",
    columns=("logprob",),
    high="certain",
    summary="a quantile of the log-probabilities of the tokens (Chow-Quantile)",
    arxiv="2404.10136",
)
def logprob_quantile(given: Given, *, alpha: float = 0.0) -> np.ndarray:
    """The alpha-quantile of log p(x_t | x_<t), t = 1..n [T], nats, linear between order statistics.

    Of n tokens the least falls as n grows and the greatest rises; only central quantiles are free of length.

    Args:
        alpha: 0 for the weakest token (min_probability of uqlm, in logs), 0.5 for the median, 1 for the strongest.

    Raises:
        ValueError: alpha is not from 0 to 1.

    Source: Language Model Cascades, arXiv:2404.10136, section 3.
    """
    rows = given.rows
    return rows.quantile(rows["logprob"], alpha)


def quantile_features(signature: Signature, *, alphas: Sequence[float] = tuple(np.linspace(0, 1, 11))) -> np.ndarray:
    """Features for a learned rule of deferral: the quantiles at `alphas`, then sum and mean, of log p(x_t | x_<t).

    Their number does not depend on the length of a text. The paper does not tell its grid; eleven even steps are ours.

    Args:
        signature: N rows of T texts.
        alphas: A quantiles, each from 0 to 1.

    Returns:
        [T, A + 2] in nats; NaN for a text without tokens.

    Raises:
        ValueError: an alpha is not from 0 to 1.

    Source: Language Model Cascades, arXiv:2404.10136, section 4.
    """
    rows = Rows(signature)
    values = rows["logprob"]
    columns = [rows.quantile(values, float(alpha)) for alpha in alphas]
    return np.stack([*columns, np.where(rows.counts > 0, rows.sum(values), np.nan), rows.mean(values)], axis=1)


@register(
    "geometric_mean_probability",
    columns=("logprob",),
    high="certain",
    summary="geometric mean of the tokens' probabilities: 1 / perplexity",
    arxiv="2501.17187",
)
def geometric_mean_probability(given: Given) -> np.ndarray:
    """exp((1/n) sum_t log p(x_t | x_<t)) [T], in [0, 1].

    Source: Visualizing Uncertainty in Translation Tasks, arXiv:2501.17187.
    """
    rows = given.rows
    found: np.ndarray = np.exp(rows.mean(rows["logprob"]))
    return found


@register(
    "arithmetic_mean_probability",
    columns=("logprob",),
    high="certain",
    summary="arithmetic mean of the tokens' probabilities",
    arxiv="2501.17187",
)
def arithmetic_mean_probability(given: Given) -> np.ndarray:
    """(1/n) sum_t p(x_t | x_<t) [T]; at least the geometric mean, and equal where all tokens are equally probable.

    Source: Visualizing Uncertainty in Translation Tasks, arXiv:2501.17187.
    """
    rows = given.rows
    return rows.mean(np.exp(rows["logprob"]))


@register(
    "mean_probability_kurtosis",
    columns=("collision", "cube_sum", "fourth_sum"),
    high="certain",
    summary="mean kurtosis of the probabilities of the vocabulary",
    arxiv="2501.17187",
)
def mean_probability_kurtosis(given: Given) -> np.ndarray:
    """(1/n) sum_t m4(p_t) / m2(p_t)^2 [T], m_k(p) = (1/V) sum_v (p_v - 1/V)^k: Pearson's, not less 3.

    It tells how few tokens share the top (about V over their number), not how probable they are: mixing p with the
    uniform distribution changes nothing. It grows with V, so models with different vocabularies cannot be compared.
    Where p is uniform, 0/0, it is 1, the least a kurtosis can be. The column `kurtosis` is of -log p under p instead.

    Source: Visualizing Uncertainty in Translation Tasks, arXiv:2501.17187 (which leaves Pearson or Fisher open).
    """
    rows = given.rows
    size = float(given.signature.metadata.vocab_size)
    # Powers of V p, whose mean is 1 whatever V is, so that no moment underflows.
    second, third, fourth = (
        rows[name] * size ** (power - 1) for power, name in ((2, "collision"), (3, "cube_sum"), (4, "fourth_sum"))
    )
    variance = second - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        kurtosis = (fourth - 4 * third + 6 * second - 3) / variance**2
    return rows.mean(np.where(variance <= _FLAT, 1.0, np.maximum(kurtosis, 1.0)))


@register(
    "self_certainty",
    columns=("mean_logprob",),
    high="certain",
    summary="mean divergence of the uniform distribution from the model's",
    arxiv="2502.18581",
)
def self_certainty(given: Given) -> np.ndarray:
    """(1/n) sum_t KL(U || p_t) = (1/n) sum_t [-(1/V) sum_v log p_t(v) - log V] [T], nats.

    Impossible tokens, of which KL would make infinity, are left out of the mean over the vocabulary while V stays the
    whole of it. lm-polygraph reports its negative.

    Source: Scalable Best-of-N Selection via Self-Certainty, arXiv:2502.18581, section 3.
    """
    rows = given.rows
    return rows.mean(-rows["mean_logprob"] - math.log(given.signature.metadata.vocab_size))


@register(
    "renyi_divergence",
    columns=(*_POWER_SUMS.values(), "entropy", "top1_prob"),
    high="certain",
    summary="mean Renyi divergence of the distributions from the uniform one",
    arxiv="2212.09171",
)
def renyi_divergence(given: Given, *, alpha: float = 0.5, temperature: float = 1.0) -> np.ndarray:
    """(1/n) sum_t D_a(P_t || U), D_a = log V + log(sum_v P(v)^a) / (a - 1) [T], nats, P = p^(1/temperature) / Z.

    a = 1 is log V - H, a = inf is log V + log max P. Zero for uniform distributions and log V for certain ones: a high
    value is certain. RenyiNeg of lm-polygraph is this at temperature 2 less 2 log V, said to be uncertainty.

    Args:
        alpha: the order a. It is exact, so a / temperature and 1 / temperature must be powers whose sums a signature
            holds: 1/4, 1/2, 1, 2, 3, 4.
        temperature: 2 for what lm-polygraph computes.

    Raises:
        ValueError: a needed sum of powers is not held.

    Source: Rainproof, arXiv:2212.09171, section 3 (the direction towards the uniform distribution).
    """
    rows, size = given.rows, given.signature.metadata.vocab_size
    log_z = _log_power_sum(rows, 1 / temperature)
    with np.errstate(divide="ignore"):
        if alpha == math.inf:
            divergence = np.log(rows["top1_prob"]) / temperature - log_z
        elif alpha == 1 and temperature == 1:
            divergence = -rows["entropy"]
        elif alpha == 1:
            raise ValueError(
                "alpha = 1 needs the entropy of the tempered distribution, which a signature does not hold"
            )
        else:
            divergence = (_log_power_sum(rows, alpha / temperature) - alpha * log_z) / (alpha - 1)
    return rows.mean(np.maximum(math.log(size) + divergence, 0.0))


@register(
    "fisher_rao",
    columns=("half_sum", "quarter_sum"),
    high="certain",
    summary="mean Fisher-Rao distance of the distributions from the uniform one",
    arxiv="2212.09171",
)
def fisher_rao(given: Given, *, temperature: float = 1.0) -> np.ndarray:
    """(1/n) sum_t (2/pi) arccos(sum_v sqrt(P_t(v) / V)) [T], from 0 (uniform) towards 1, P = p^(1/temperature) / Z.

    A high value is certain; lm-polygraph computes it at temperature 2 and says that it is uncertainty. The columns are
    float32, so that distances below about 3e-4 are rounding.

    Args:
        temperature: 1 or 2, for which a signature holds the sums.

    Raises:
        ValueError: temperature is neither.

    Source: Rainproof, arXiv:2212.09171, section 3.
    """
    if temperature not in (1, 2):
        raise ValueError(f"temperature must be 1 or 2, whose sums of powers a signature holds, got {temperature}")
    rows, size = given.rows, given.signature.metadata.vocab_size
    log_overlap = _log_power_sum(rows, 0.5 / temperature) - 0.5 * _log_power_sum(rows, 1 / temperature)
    overlap = np.exp(log_overlap - 0.5 * math.log(size))
    return rows.mean(2 / math.pi * np.arccos(np.minimum(overlap, 1.0)))


def _log_power_sum(rows: Rows, exponent: float) -> np.ndarray:
    """log sum_v p(v)^exponent [N]."""
    if exponent == 1:
        return np.zeros(len(rows.text))
    if exponent not in _POWER_SUMS:
        raise ValueError(
            f"a signature holds sums of p to the powers 1/4, 1/2, 1, 2, 3 and 4, not {exponent:g}: "
            "choose alpha / temperature and 1 / temperature among them"
        )
    with np.errstate(divide="ignore"):
        found: np.ndarray = np.log(rows[_POWER_SUMS[exponent]])
        return found

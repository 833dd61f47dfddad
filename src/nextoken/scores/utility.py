"""Utility: a model's scores of candidate answers read as a ranking, and what it takes to make probabilities of them.

What is built here is our own, after the view of Huang and Yuan (arXiv:2305.14859) that maximum likelihood fits an
ordinal utility: their transform is not published in a form that could be followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from nextoken.methods import method

Rule = Callable[[np.ndarray], object]
"""Scores [n] of candidates -> a decision, comparable with ==."""


def utility(logprob: np.ndarray, tokens: np.ndarray, *, length_power: float = 0.0) -> np.ndarray:
    """log p(y | x) / |y|^power [M]: 0 is the log-probability of the answer, 1 its mean per token.

    These are different utilities, not one in different units: where lengths differ their orders differ.

    Args:
        logprob: of whole answers, nats [M].
        tokens: their lengths [M]; an answer without tokens has utility 0.
        length_power: of the length.
    """
    length = np.asarray(tokens, dtype=np.float64)
    return np.asarray(logprob, dtype=np.float64) / np.maximum(length, 1.0) ** length_power


@dataclass(frozen=True)
class Candidates:
    """M different answers to T prompts, each prompt's own together.

    Args:
        texts: the answers [M].
        prompt: which prompt each answers [M], ascending from 0.
        utility: of each [M].
    """

    texts: tuple[str, ...]
    prompt: np.ndarray
    utility: np.ndarray

    @classmethod
    def merged(cls, texts: Sequence[Sequence[str]], utility: np.ndarray) -> Candidates:
        """Answers to each prompt with equal texts made one, of the best utility among them.

        Without this, an answer that was drawn twice has two votes.

        Args:
            texts: as `Samples.texts`.
            utility: of all answers in that order.
        """
        values = np.asarray(utility, dtype=np.float64)
        if len(values) != sum(map(len, texts)):
            raise ValueError(f"{sum(map(len, texts))} answers have {len(values)} utilities: give one for each")
        best: dict[tuple[int, str], float] = {}
        flat = [(number, text) for number, group in enumerate(texts) for text in group]
        for key, value in zip(flat, values.tolist(), strict=True):
            best[key] = max(value, best.get(key, value))
        prompt = np.array([number for number, _ in best], dtype=np.int64)
        return cls(tuple(text for _, text in best), prompt, np.array([*best.values()]))

    def __post_init__(self) -> None:
        size = len(self.texts)
        if len(self.prompt) != size or len(self.utility) != size or (np.diff(self.prompt) < 0).any():
            raise ValueError(f"{size} candidates need as many prompts, in ascending order, and utilities")
        if np.isnan(self.utility).any():
            raise ValueError("a utility is NaN: leave that candidate out")

    @property
    def starts(self) -> np.ndarray:
        """Where the candidates of each prompt that has any begin."""
        return np.flatnonzero(np.concatenate([[True], np.diff(self.prompt) > 0]))[: len(self.prompt)]


@method(
    name="Set-relative probability",
    arxiv="2305.14859",
    access="gray",
    trained=True,
    summary="utilities of candidate answers made probabilities within the set, by one fitted scale (a reconstruction)",
)
class SetProbability:
    """Q(y | x) = exp(U(x, y) / tau) / sum_{y' in C(x)} exp(U(x, y') / tau).

    With tau = 1, U = log p and C all answers it is the model's own probability; tau -> 0 leaves the best candidate,
    tau -> inf all alike. It is relative to the set: it says nothing of answers that are not in it, and that it sums to
    1 is no sign of calibration. `fit` chooses tau by the log-loss of known candidates, which no measure of order could:
    order is the same at every tau.

    Args:
        tau: above 0.

    Source: a reconstruction after Huang and Yuan, arXiv:2305.14859; not the transform of the paper.
    """

    def __init__(self, tau: float = 1.0) -> None:
        if not tau > 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        self.tau = tau

    def fit(self, candidates: Candidates, acceptable: np.ndarray) -> SetProbability:
        """Choose tau, from 1e-4 to 1e4, of least mean -log Q(acceptable) over the prompts that have such a candidate.

        Args:
            candidates: of prompts on which it is not judged afterwards.
            acceptable: whether each candidate is right, or the best [M].

        Raises:
            ValueError: no prompt has an acceptable candidate, or one of utility -inf alone.
        """
        good = np.asarray(acceptable, dtype=bool)
        if good.shape != candidates.utility.shape:
            raise ValueError(f"acceptable must be {candidates.utility.shape}, got {good.shape}")
        starts = candidates.starts
        some = np.logical_or.reduceat(good, starts) if len(starts) else np.zeros(0, dtype=bool)
        if not some.any():
            raise ValueError("no prompt has an acceptable candidate, so there is nothing to fit tau to")
        accepted = np.where(good, candidates.utility, -np.inf)
        if (np.maximum.reduceat(accepted, starts)[some] == -np.inf).any():
            raise ValueError("a prompt's acceptable candidates all have utility -inf: no tau makes them possible")

        def loss(log_tau: float) -> float:
            whole = _logsum(candidates.utility / np.exp(log_tau), starts)
            part = _logsum(accepted / np.exp(log_tau), starts)
            return float((whole - part)[some].mean())

        # With several acceptable candidates the loss may have more than one dip: a grid finds the right one first.
        grid = np.linspace(np.log(1e-4), np.log(1e4), 121)
        at = int(np.argmin([loss(value) for value in grid]))
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
        found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
        self.tau = float(np.exp(found.x))
        return self

    def predict(self, candidates: Candidates) -> np.ndarray:
        """Q of each candidate [M]."""
        scaled = candidates.utility / self.tau
        group = np.cumsum(np.isin(np.arange(len(scaled)), candidates.starts)) - 1
        with np.errstate(invalid="ignore"):
            return np.asarray(np.exp(scaled - _logsum(scaled, candidates.starts)[group]))


def choose(candidates: Candidates, probability: np.ndarray, *, at_least: float = 0.0) -> list[str | None]:
    """The most probable candidate of each prompt, the first of equals; None where its probability is below `at_least`.

    Args:
        candidates: of prompts, all of which have some.
        probability: of each [M].
        at_least: threshold of abstention.
    """
    q = np.asarray(probability, dtype=np.float64)
    ends = np.append(candidates.starts[1:], len(q))
    best = [int(start + np.argmax(q[start:end])) for start, end in zip(candidates.starts, ends, strict=True)]
    return [candidates.texts[i] if q[i] >= at_least else None for i in best]


def minimum_bayes_risk(
    candidates: Candidates, probability: np.ndarray, *, similarity: Callable[[str, str], float]
) -> list[str]:
    """argmax_y sum_{y' in C(x)} Q(y' | x) similarity(y, y') for each prompt.

    With equality as the similarity it is the most probable candidate.

    Args:
        candidates, probability: as of `choose`.
        similarity: of a candidate and another.
    """
    q = np.asarray(probability, dtype=np.float64)
    ends, chosen = np.append(candidates.starts[1:], len(q)), []
    for start, end in zip(candidates.starts, ends, strict=True):
        texts = candidates.texts[start:end]
        gains = np.array([[similarity(one, other) for other in texts] for one in texts]) @ q[start:end]
        chosen.append(texts[int(np.argmax(gains))])
    return chosen


def pairwise_accuracy(candidates: Candidates, quality: np.ndarray) -> float:
    """The share of pairs of unequal quality, within a prompt, that the utility orders as the quality does; ties half.

    Pairs of all prompts are pooled; 2 x - 1 is Kendall's tau-a where no two qualities are equal. NaN without a pair.

    Args:
        candidates: at most some thousands per prompt.
        quality: of each, high is good [M].
    """
    good = np.asarray(quality, dtype=np.float64)
    ends, hits, pairs = np.append(candidates.starts[1:], len(good)), 0.0, 0
    for start, end in zip(candidates.starts, ends, strict=True):
        own, truth = candidates.utility[start:end], good[start:end]
        better = truth[:, None] > truth[None]
        hits += float((own[:, None] > own[None])[better].sum() + (own[:, None] == own[None])[better].sum() / 2)
        pairs += int(better.sum())
    return hits / pairs if pairs else float("nan")


def ordinality(
    rule: Rule, scores: Sequence[np.ndarray], *, maps: Sequence[Callable[[np.ndarray], np.ndarray]]
) -> float:
    """The share of (scores, map) for which rule(map(scores)) == rule(scores): 1 for a rule that looks at order alone.

    argmax and top-k are such; nucleus, typical sets, thresholds on entropy and speculative acceptance are not.
    Ordinality at the level of tokens says nothing of sequences: a sum of monotone maps may reorder sums.

    Args:
        rule: a decision from scores [n].
        scores: of several sets of candidates.
        maps: strictly increasing functions of an array.
    """
    if not scores or not maps:
        raise ValueError("ordinality needs at least one set of scores and one map")
    same = [rule(change(one)) == rule(one) for one in scores for change in maps]
    return sum(map(bool, same)) / len(same)


def _logsum(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """log sum exp of each stretch that begins at a start."""
    peak = np.maximum.reduceat(values, starts) if len(starts) else values[:0]
    finite = np.where(np.isfinite(peak), peak, 0.0)
    size = np.diff(np.append(starts, len(values)))
    with np.errstate(divide="ignore"):
        return np.asarray(finite + np.log(np.add.reduceat(np.exp(values - np.repeat(finite, size)), starts)))

"""Property inference: which of two make-ups did a model's training data have, and how much does knowing it leak?

The game: somebody trained a model on data that have a property with ratio a0 (side 0) or a1 (side 1), say 20 % or 50 %
of code, each with probability 1/2. The adversary has data of both kinds of its own, sees the model's losses on them and
says which. For token models a loss is the mean surprisal of a token of held-out text, in nats; data of the victim's own
training set would show membership instead. Keep both sides equal in size, or the attack finds the size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, xlog1py, xlogy

from nextoken.methods import method
from nextoken.scores.reliability import wilson


@dataclass(frozen=True)
class Leakage:
    """What an attack on M victims found.

    Args:
        accuracy: share of the victims whose side was told.
        low, high: Wilson 95 % interval of it.
        advantage: |P(says 1 | side 1) - P(says 1 | side 0)|, from 0 to 1.
        samples: `leaked_samples` of the accuracy.
        samples_low: that of the interval's lower end: what has been shown. With few victims an accuracy of 1 is common,
            and infinitely many samples are not.
    """

    accuracy: float
    low: float
    high: float
    advantage: float
    samples: float
    samples_low: float


@method(
    name="distribution inference by loss",
    arxiv="2109.06024",
    access="gray",
    summary="the side whose data the model finds less surprising",
)
def loss_test(losses: np.ndarray) -> np.ndarray:
    """1 where loss(M, S_1) <= loss(M, S_0), else 0 [M]; no shadow model is needed.

    Args:
        losses: of M victims on the adversary's data of either side [M, 2].

    Source: arXiv:2109.06024, section 5 (its code compares accuracies, and says 1 for a tie).
    """
    found = _pairs(losses, "losses")
    return (found[:, 1] <= found[:, 0]).astype(np.int64)


@method(
    name="distribution inference by threshold",
    arxiv="2109.06024",
    access="gray",
    trained=True,
    summary="a threshold on the loss that tells shadow models apart",
)
def threshold_test(shadow0: np.ndarray, shadow1: np.ndarray, victims: np.ndarray) -> np.ndarray:
    """0 or 1 for each victim [M], by the one threshold on one loss that best separates the shadow models.

    On the data of each side, the threshold and direction are those of the highest accuracy on the shadow models,
    halfway between two of their losses; of the two sides the better one is used. All choices are made on shadow models,
    never on victims. Of equally good thresholds it is the one in the widest gap.

    Args:
        shadow0, shadow1: losses of K shadow models trained on either side, on the data of either side [K, 2].
        victims: losses of M victims on the same data [M, 2].

    Source: arXiv:2109.06024, section 5; its code tries thresholds on a grid of 0.005 of a percent of accuracy.
    """
    zero, one, wanted = _pairs(shadow0, "shadow0"), _pairs(shadow1, "shadow1"), _pairs(victims, "victims")
    rules = [_rule(zero[:, side], one[:, side]) for side in (0, 1)]
    side = int(rules[1].accuracy > rules[0].accuracy)
    return rules[side].says(wanted[:, side])


@method(
    name="distribution inference point by point",
    arxiv="2109.06024",
    access="gray",
    trained=True,
    summary="a threshold on the loss of each text, and a vote of the texts that tell shadow models apart best",
)
def per_point_test(shadow0: np.ndarray, shadow1: np.ndarray, victims: np.ndarray) -> np.ndarray:
    """0 or 1 for each victim [M]: a majority of the k texts whose own thresholds separate the shadow models best.

    k is the number, of 1, 2, 4, ..., P, whose vote is right on most shadow models; the smallest of equals, and texts
    that separate equally well in order of their gap. A tied vote says 1.

    Args:
        shadow0, shadow1: losses of K shadow models of either side on P texts of the adversary's [K, P].
        victims: losses of M victims on the same texts [M, P].

    Raises:
        ValueError: the numbers of texts differ.

    Source: arXiv:2109.06024's code (perpoint_threshold_test), which ranks by summed predictions and tries fractions.
    """
    zero, one, wanted = (np.asarray(values, dtype=np.float64) for values in (shadow0, shadow1, victims))
    if any(v.ndim != 2 or v.shape[1:] != zero.shape[1:] or not v.size for v in (zero, one, wanted)):
        raise ValueError(
            f"losses must be [models, texts] of the same texts, got {zero.shape}, {one.shape}, {wanted.shape}"
        )
    rules = [_rule(zero[:, point], one[:, point]) for point in range(zero.shape[1])]
    order = sorted(range(len(rules)), key=lambda point: (-rules[point].accuracy, -rules[point].gap))

    def votes(values: np.ndarray) -> np.ndarray:
        """The share of the first k texts that say 1, for every k [models, P]."""
        said = np.stack([rules[point].says(values[:, point]) for point in order], axis=1)
        return said.cumsum(1) / np.arange(1, len(order) + 1)

    right = (votes(one) >= 0.5).mean(0) + (votes(zero) < 0.5).mean(0)
    tried = sorted({*(2**power for power in range(len(order).bit_length()) if 2**power <= len(order)), len(order)})
    best = max(tried, key=lambda k: (right[k - 1], -k))
    return (votes(wanted)[:, best - 1] >= 0.5).astype(np.int64)


def leakage(said: np.ndarray, side: np.ndarray, a0: float, a1: float) -> Leakage:
    """Accuracy, advantage and effective samples of an attack's answers.

    Args:
        said: the answer for each victim, 0 or 1 [M].
        side: the truth, 0 or 1 [M]; both must occur, and should equally often.
        a0, a1: the ratios of the property on either side.

    Raises:
        ValueError: shapes differ, or one side has no victim.
    """
    answers, truth = np.asarray(said).astype(bool), np.asarray(side).astype(bool)
    if answers.shape != truth.shape or answers.ndim != 1 or truth.all() or not truth.any():
        raise ValueError(
            f"answers and sides must be two arrays [M] with victims of both sides, got {answers.shape}, {truth.shape}"
        )
    right = answers == truth
    accuracy = float(right.mean())
    low, high = wilson(right.sum(), np.asarray(len(right)))
    advantage = abs(float(answers[truth].mean() - answers[~truth].mean()))
    shown = leaked_samples(float(low), a0, a1)
    return Leakage(accuracy, float(low), float(high), advantage, leaked_samples(accuracy, a0, a1), shown)


def accuracy_bound(n: float, a0: float, a1: float) -> float:
    """1/2 + sqrt(1 - r^n) / 2, r = max(min(a0, a1) / max(a0, a1), (1 - max(a0, a1)) / (1 - min(a0, a1))).

    No adversary that is handed n samples of the data itself, each with or without the property, tells the sides apart
    more often: total variation is at most sqrt(1 - e^-KL) (Bretagnolle and Huber), and n draws have a KL divergence of
    at most n times the greatest log-ratio that draws of either side can show, in the better direction.

    Source: arXiv:2109.06024, section 4.
    """
    return 0.5 + 0.5 * math.sqrt(1 - _ratio(a0, a1) ** n)


def leaked_samples(accuracy: float, a0: float, a1: float) -> float:
    """n = log(1 - (2 accuracy - 1)^2) / log r: samples with which `accuracy_bound` allows this accuracy.

    At least so many samples of the data are worth as much as the model; more, for the bound is loose (`exact_samples`).
    0 for an accuracy of at most 1/2, inf for 1, 0 where a0 = a1 and inf where one sample tells the sides apart for
    sure.

    Source: arXiv:2109.06024, section 4.
    """
    _check_accuracy(accuracy)
    ratio = _ratio(a0, a1)
    if ratio == 1 or accuracy <= 0.5:
        return 0.0
    if accuracy == 1 or ratio == 0:
        return math.inf
    return math.log1p(-((2 * accuracy - 1) ** 2)) / math.log(ratio)


def exact_accuracy(n: int, a0: float, a1: float) -> float:
    """1/2 + TV(Bin(n, a0), Bin(n, a1)) / 2: the best that can be done with n samples, without a bound.

    The better guess is the side of the greater likelihood, which changes once, at the count where both are equal.
    """
    _ratio(a0, a1)
    if a0 == a1 or n == 0:
        return 0.5
    low, high = min(a0, a1), max(a0, a1)
    counts = np.arange(n + 1)
    with np.errstate(invalid="ignore"):  # counts that neither side can show
        gain = xlogy(counts, high) + xlog1py(n - counts, -high) - xlogy(counts, low) - xlog1py(n - counts, -low)
    last = int(np.flatnonzero(gain <= 0)[-1])
    return 0.5 + 0.5 * float(bdtr(last, n, low) - bdtr(last, n, high))


def exact_samples(accuracy: float, a0: float, a1: float, *, most: int = 1 << 20) -> float:
    """The fewest samples of the data with which `exact_accuracy` reaches this accuracy; inf beyond `most`.

    0 for an accuracy of at most 1/2. It is at least `leaked_samples`.
    """
    _check_accuracy(accuracy)
    if accuracy <= 0.5:
        return 0
    if a0 == a1 or (accuracy == 1 and _ratio(a0, a1) > 0):
        return math.inf
    few, many = 0, 1
    # The accuracy never falls with n, for samples can be ignored.
    while exact_accuracy(many, a0, a1) < accuracy:
        if many >= most:
            return math.inf
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if exact_accuracy(middle, a0, a1) >= accuracy else (middle, many)
    return many


@dataclass(frozen=True)
class _Rule:
    """Say 1 where the loss is below the threshold, or above it."""

    accuracy: float
    gap: float
    threshold: float
    below: bool

    def says(self, losses: np.ndarray) -> np.ndarray:
        said: np.ndarray = (losses < self.threshold) == self.below
        return said.astype(np.int64)


def _rule(zero: np.ndarray, one: np.ndarray) -> _Rule:
    """The threshold and direction that separate losses [K0] of side 0 from losses [K1] of side 1 most accurately."""
    places = np.unique(np.concatenate([zero, one]))
    # Beyond both ends lie the thresholds that say the same of all.
    places = np.concatenate([[places[0] - 1], places, [places[-1] + 1]])
    cuts, gaps = (places[1:] + places[:-1]) / 2, np.diff(places)
    gaps[[0, -1]] = 0.0
    share0 = np.searchsorted(np.sort(zero), cuts) / len(zero)
    share1 = np.searchsorted(np.sort(one), cuts) / len(one)
    accuracy = 0.5 + np.abs(share1 - share0) / 2
    best = max(range(len(cuts)), key=lambda cut: (accuracy[cut], gaps[cut]))
    return _Rule(float(accuracy[best]), float(gaps[best]), float(cuts[best]), bool(share1[best] >= share0[best]))


def _pairs(losses: np.ndarray, name: str) -> np.ndarray:
    found = np.asarray(losses, dtype=np.float64)
    if found.ndim != 2 or found.shape[1] != 2 or not len(found):
        raise ValueError(f"{name} must be [models, 2], a loss on the data of either side, got {found.shape}")
    return found


def _ratio(a0: float, a1: float) -> float:
    """r of `accuracy_bound`: 1 for equal ratios, 0 where a single sample can settle it."""
    if not (0 <= a0 <= 1 and 0 <= a1 <= 1):
        raise ValueError(f"ratios must be from 0 to 1, got {a0} and {a1}")
    low, high = min(a0, a1), max(a0, a1)
    return 1.0 if low == high else max(low / high, (1 - high) / (1 - low))


def _check_accuracy(accuracy: float) -> None:
    if not 0 <= accuracy <= 1:
        raise ValueError(f"an accuracy must be from 0 to 1, got {accuracy}")

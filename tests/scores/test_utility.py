"""Utilities of candidates: identities the view stands on, and the set probability by enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import chisquare, kendalltau

from nextoken.model.table import TableModel
from nextoken.scores.reliability import log_loss
from nextoken.scores.utility import (
    Candidates,
    SetProbability,
    choose,
    minimum_bayes_risk,
    ordinality,
    pairwise_accuracy,
    utility,
)

MODEL = TableModel.random(3, order=2, eos=True, seed=2)


def every_answer() -> Candidates:
    strings = MODEL.enumerate(4)
    texts = ["".join(map(MODEL.vocab.label, string)) for string in strings]
    return Candidates(tuple(texts), np.zeros(len(texts), dtype=int), np.log([*strings.values()]))


@pytest.mark.paper("2305.14859")
def test_over_all_answers_it_is_the_models_probability() -> None:
    whole = every_answer()
    assert SetProbability().predict(whole) == pytest.approx(np.exp(whole.utility))


@pytest.mark.paper("2305.14859")
def test_a_step_of_likelihood_prefers_what_came_to_the_rest() -> None:
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(logits[None], torch.tensor([3])).backward()
    p = logits.detach().softmax(0)
    expected = p - torch.nn.functional.one_hot(torch.tensor(3), 7)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected)
    assert -logits.grad[3] > 0 and bool((-logits.grad[torch.arange(7) != 3] < 0).all())


@pytest.mark.paper("2305.14859")
def test_a_utility_with_gumbel_noise_is_chosen_by_its_softmax() -> None:
    """tau is the scale of the noise: chi-square over 200,000 draws, false alarms at a rate of 1e-4."""
    values = np.array([0.3, -1.0, 1.2, 0.0])
    one = Candidates(("a", "b", "c", "d"), np.zeros(4, dtype=int), values)
    for tau in (1.0, 2.5):
        noise = np.random.default_rng(1).gumbel(scale=tau, size=(200_000, 4))
        counts = np.bincount((values + noise).argmax(1), minlength=4)
        assert chisquare(counts, SetProbability(tau).predict(one) * 200_000).pvalue > 1e-4


@given(st.lists(st.lists(st.floats(-20, 5), min_size=1, max_size=5), min_size=1, max_size=4), st.floats(0.05, 50))
def test_it_is_a_softmax_within_each_prompt(groups: list[list[float]], tau: float) -> None:
    texts = [[f"{i}" for i in range(len(group))] for group in groups]
    candidates = Candidates.merged(texts, np.array([value for group in groups for value in group]))
    expected = np.concatenate([softmax(np.array(group) / tau) for group in groups])
    assert SetProbability(tau).predict(candidates) == pytest.approx(expected)


def test_its_ends_are_the_best_and_all_alike() -> None:
    candidates = Candidates.merged([["a", "b", "c"]], np.array([-3.0, -1.0, -2.0]))
    assert SetProbability(1e-4).predict(candidates) == pytest.approx([0, 1, 0])
    assert SetProbability(1e9).predict(candidates) == pytest.approx([1 / 3] * 3)


def test_fitting_cuts_the_loss_and_leaves_the_order() -> None:
    """Utilities four times too sharp; the right tau is 4."""
    rng = np.random.default_rng(2)
    true = rng.normal(size=(3000, 4))
    right = np.array([rng.choice(4, p=row) for row in softmax(true, axis=1)])
    good = np.eye(4, dtype=bool)[right].ravel()
    candidates = Candidates.merged([[*"abcd"]] * 3000, 4 * true.ravel())
    plain = SetProbability().predict(candidates)
    fitted = SetProbability().fit(candidates, good)
    assert fitted.tau == pytest.approx(4, rel=0.1)
    said = fitted.predict(candidates)
    assert log_loss(said, good) < log_loss(plain, good) - 0.1
    assert choose(candidates, said) == choose(candidates, plain)
    losses = [
        -np.log(SetProbability(t).predict(candidates)[good]).mean() for t in (0.98 * fitted.tau, 1.02 * fitted.tau)
    ]
    assert -np.log(said[good]).mean() < min(losses)


def test_fitting_with_several_acceptable_candidates() -> None:
    """-log of their total probability: two good ones of three, against a grid."""
    candidates = Candidates.merged([["a", "b", "c"]] * 2, np.array([0.0, -2.0, 1.0, 0.5, 3.0, -1.0]))
    good = np.array([True, True, False, False, True, True])
    fitted = SetProbability().fit(candidates, good)

    def loss(tau: float) -> float:
        q = SetProbability(tau).predict(candidates).reshape(2, 3)
        return float(-np.log((q * good.reshape(2, 3)).sum(1)).mean())

    assert loss(fitted.tau) <= min(loss(t) for t in np.exp(np.linspace(-6, 6, 500))) + 1e-9


def test_equal_texts_have_one_vote() -> None:
    candidates = Candidates.merged([["yes", "no", "yes"], ["yes"]], np.array([-2.0, -1.5, -1.0, -9.0]))
    assert candidates.texts == ("yes", "no", "yes") and candidates.utility.tolist() == [-1.0, -1.5, -9.0]
    assert candidates.prompt.tolist() == [0, 0, 1]
    q = SetProbability().predict(candidates)
    assert choose(candidates, q) == ["yes", "yes"] and choose(candidates, q, at_least=0.9) == [None, "yes"]


@given(st.lists(st.floats(-9, 0), min_size=1, max_size=6, unique=True))
def test_minimum_bayes_risk_under_equality_is_the_most_probable(values: list[float]) -> None:
    candidates = Candidates.merged([[str(i) for i in range(len(values))]], np.array(values))
    q = SetProbability().predict(candidates)
    assert minimum_bayes_risk(candidates, q, similarity=lambda a, b: float(a == b)) == choose(candidates, q)


def test_minimum_bayes_risk_takes_the_answer_that_others_are_like() -> None:
    candidates = Candidates.merged([["cat", "dog", "dogs"]], np.log([0.4, 0.3, 0.3]))
    q = SetProbability().predict(candidates)
    alike = minimum_bayes_risk(candidates, q, similarity=lambda a, b: float(a[0] == b[0]))
    assert alike == ["dog"] and choose(candidates, q) == ["cat"]


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=8), st.integers(0, 99))
def test_pairwise_accuracy_is_kendalls_tau(values: list[int], seed: int) -> None:
    quality = np.random.default_rng(seed).permutation(len(values))
    candidates = Candidates.merged([[str(i) for i in range(len(values))]], np.array(values))
    n = len(values)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    signs = [np.sign((values[i] - values[j]) * (quality[i] - quality[j])) for i, j in pairs]
    assert 2 * pairwise_accuracy(candidates, quality) - 1 == pytest.approx(np.mean(signs))
    if len({*values}) == n:
        assert 2 * pairwise_accuracy(candidates, quality) - 1 == pytest.approx(kendalltau(values, quality).statistic)


def nucleus(scores: np.ndarray) -> tuple[int, ...]:
    p = softmax(scores)
    order = np.argsort(-p)
    return tuple(sorted(order[: int(np.searchsorted(p[order].cumsum(), 0.8)) + 1]))


@pytest.mark.paper("2305.14859")
def test_argmax_and_top_k_are_ordinal_and_a_nucleus_is_not() -> None:
    rng = np.random.default_rng(3)
    scores = [rng.normal(size=8) for _ in range(50)]
    maps = [lambda z: 3 * z + 1, lambda z: z**3, np.tanh]
    assert ordinality(lambda z: int(z.argmax()), scores, maps=maps) == 1
    assert ordinality(lambda z: tuple(np.sort(np.argsort(z)[-3:])), scores, maps=maps) == 1
    assert ordinality(nucleus, scores, maps=maps) < 0.5
    assert ordinality(nucleus, scores, maps=[lambda z: z + 5]) == 1


def test_utilities_by_length_are_different_orders() -> None:
    logprob, tokens = np.array([-4.0, -5.0, 0.0]), np.array([2, 10, 0])
    assert utility(logprob, tokens).tolist() == [-4, -5, 0]
    assert utility(logprob, tokens, length_power=1).tolist() == [-2, -0.5, 0]


def test_misuse_is_refused() -> None:
    one = Candidates.merged([["a", "b"]], np.array([0.0, -math.inf]))
    assert SetProbability().predict(one).tolist() == [1, 0]
    for wrong, message in (
        (lambda: SetProbability(0.0), "tau"),
        (lambda: Candidates.merged([["a"]], np.array([0.0, 1.0])), "one for each"),
        (lambda: Candidates.merged([["a"]], np.array([math.nan])), "NaN"),
        (lambda: SetProbability().fit(one, np.array([False, False])), "nothing to fit"),
        (lambda: SetProbability().fit(one, np.array([False, True])), "-inf"),
        (lambda: SetProbability().fit(one, np.array([True])), "acceptable must be"),
        (lambda: ordinality(np.argmax, [], maps=[np.tanh]), "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()

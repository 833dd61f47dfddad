"""Tournaments: played out, averaged over bits, drawn under many keys; and the tail of their score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, kstest
from transformers import SynthIDTextWatermarkLogitsProcessor

from nextoken import generate, load
from nextoken.decode.transform import Context
from nextoken.model.table import TableModel
from nextoken.watermark import Key
from nextoken.watermark._tails import weighted_tail
from nextoken.watermark.tournament import SynthID, falling_weights, tournament

KEY = Key(b"a key of the tests")
LAW = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)


def all_bits(layers: int, size: int) -> Iterator[torch.Tensor]:
    for bits in product([False, True], repeat=layers * size):
        yield torch.tensor(bits).reshape(layers, 1, size)


@pytest.mark.parametrize("layers", [1, 2])
def test_over_all_bits_two_leaves_leave_the_law(layers: int) -> None:
    law = LAW[:, :4] if layers == 1 else torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    laws = [tournament(law.log(), bits).exp() for bits in all_bits(layers, law.shape[1])]
    torch.testing.assert_close(torch.stack(laws).mean(0), law, rtol=1e-12, atol=1e-12)


def test_three_leaves_favour_the_rare() -> None:
    mean = torch.stack([tournament(LAW.log(), bits, leaves=3).exp() for bits in all_bits(1, 4)]).mean(0)
    assert mean[0, 3] > LAW[0, 3] * 1.05 and mean.sum().item() == pytest.approx(1)
    assert not SynthID(KEY, leaves=3).is_distortion_free and SynthID(KEY).is_distortion_free


def played(law: list[float], bits: list[list[bool]], leaves: int) -> np.ndarray:
    """Law of the winner, from every outcome of all draws, ties broken evenly."""
    layers, size = len(bits), len(law)

    def winner(entrants: tuple[int, ...], layer: int) -> dict[int, float]:
        if layer == 0:
            return {entrants[0]: 1.0}
        step, found = len(entrants) // leaves, Counter()
        groups = [winner(entrants[at : at + step], layer - 1) for at in range(0, len(entrants), step)]
        for meeting in product(*(group.items() for group in groups)):
            chance = math.prod(p for _, p in meeting)
            best = max(bits[layer - 1][token] for token, _ in meeting)
            among = [token for token, _ in meeting if bits[layer - 1][token] == best]
            for token in among:
                found[token] += chance / len(among)
        return dict(found)

    total = np.zeros(size)
    for entrants in product(range(size), repeat=leaves**layers):
        chance = math.prod(law[token] for token in entrants)
        for token, p in winner(entrants, layers).items():
            total[token] += chance * p
    return total


@pytest.mark.parametrize(("layers", "leaves"), [(1, 2), (2, 2), (3, 2), (1, 3), (1, 5), (1, 1)])
def test_the_closed_form_is_the_tournament_played_out(layers: int, leaves: int) -> None:
    law, random = [0.55, 0.35, 0.1], np.random.default_rng(layers)
    for _ in range(2):
        bits = random.random((layers, 3)) < 0.5
        closed = tournament(torch.tensor([law], dtype=torch.float64).log(), torch.tensor(bits)[:, None], leaves=leaves)
        assert closed.exp()[0].tolist() == pytest.approx(played(law, bits.tolist(), leaves).tolist(), abs=1e-12)


def test_the_update_is_that_of_transformers() -> None:
    theirs = SynthIDTextWatermarkLogitsProcessor(
        5, [1, 2, 3], sampling_table_size=64, sampling_table_seed=0, context_history_size=8, device="cpu"
    )
    scores, bits = torch.randn(3, 50), torch.rand(12, 3, 50) < 0.5
    expected = theirs.update_scores(scores, bits.permute(1, 2, 0).float())
    torch.testing.assert_close(tournament(scores.log_softmax(-1), bits), expected, atol=1e-4, rtol=1e-4)


@given(st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
@settings(max_examples=20)
def test_one_layer_has_its_expectation(weights: list[float]) -> None:
    p = torch.tensor([weights], dtype=torch.float64)
    p = p / p.sum()
    ones = [(tournament(p.log(), bits).exp() * bits[0]).sum().item() for bits in all_bits(1, 5)]
    assert np.mean(ones) == pytest.approx(0.5 + 0.25 * (1 - p.square().sum().item()))


def test_what_is_certain_or_impossible_stays_so() -> None:
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    for bits in all_bits(2, 3):
        assert tournament(certain, bits).exp().tolist() == [[1.0, 0.0, 0.0]]
    peaked = torch.tensor([[50.0, 0.0, -40.0]]).log_softmax(-1)
    for bits in all_bits(4, 3):
        out = tournament(peaked, bits)
        assert not bool(out.isnan().any()) and out.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_texts_over_keys_have_the_models_law() -> None:
    """All strings of four tokens with contexts of one, many of which repeat; chi-square at 1e-4."""
    model, runs, counts = TableModel.random(2, order=1, seed=5), 1500, Counter()
    law = model.enumerate(4)
    for seed in range(runs):
        rule = SynthID(KEY.derive(seed), layers=3, context=1).transform()
        counts[generate(model, "", transform=rule, max_tokens=4, seed=seed).tokens] += 1
    frequent = [text for text in law if law[text] * runs >= 5]
    observed, expected = [counts[text] for text in frequent], [law[text] * runs for text in frequent]
    if runs - sum(expected) > 1:
        observed.append(runs - sum(observed))
        expected.append(runs - sum(expected))
    assert chisquare(observed, expected).pvalue > 1e-4


def test_one_key_tells_one_law_where_a_context_is_new_and_p_where_it_is_not() -> None:
    mark, scores = SynthID(KEY, layers=4, context=2), torch.randn(4, 30)
    outputs = [[1, 2, 3, 1, 2], [5, 1, 2], [1], [7, 7, 7]]
    changed = mark.transform()(scores, Context([[1, 2]] * 4, outputs)).log_softmax(-1)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(changed, scores.log_softmax(-1), strict=True)]
    assert same == [True, False, True, True]
    bits = torch.from_numpy(mark.bits_after([1, 2], 30).copy())[:, None]
    torch.testing.assert_close(changed[1], tournament(scores[1:2].log_softmax(-1), bits)[0])


def test_the_detector_sees_the_bits_that_marked() -> None:
    mark = SynthID(KEY, layers=7, context=3)
    text = np.random.default_rng(0).integers(0, 4, 60).tolist()
    expected, seen = [], set()
    for at in range(3, 60):
        before = tuple(text[at - 3 : at])
        if before not in seen:
            seen.add(before)
            expected.append(mark.bits_after(before, 4)[:, text[at]])
    assert np.array_equal(mark.bits(text), np.stack(expected, 1))
    assert np.array_equal(mark.bits_after((1, 2, 3), 50)[:, :9], mark.bits_after((1, 2, 3), 9))


@pytest.mark.parametrize("weights", [None, [1] * 6])
def test_p_values_of_unmarked_texts_are_uniform(weights: list[int] | None) -> None:
    """Repetitive texts under many keys, ties at random; Kolmogorov-Smirnov, false alarms 1e-4."""
    random = np.random.default_rng(2)
    phrase = random.integers(0, 6, 14).tolist()
    text, found = [*phrase, *phrase, *random.integers(0, 6, 10).tolist()], []
    for number in range(400):
        mark = SynthID(KEY.derive(number), layers=6, context=2, weights=weights)
        bits = mark.bits(text)
        total, n = int(bits.sum(1) @ np.array(mark.weights)), bits.shape[1]
        at_least = mark.detect(text).p_value
        found.append(at_least - random.random() * (at_least - weighted_tail(total + 1, n, mark.weights)))
    assert kstest(found, "uniform").pvalue > 1e-4


@given(st.integers(1, 12), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.floats(-0.1, 1.1))
def test_the_tail_is_exact(n: int, weights: list[int], share: float) -> None:
    law = np.ones(1)
    for weight in weights:
        step = np.zeros(n * weight + 1)
        step[::weight] = binom.pmf(np.arange(n + 1), n, 0.5)
        law = np.convolve(law, step)
    total = round(share * n * sum(weights))
    assert weighted_tail(total, n, weights) == pytest.approx(law[max(total, 0) :].sum(), rel=1e-8)


def test_the_tail_of_equal_weights_is_binomial_however_small() -> None:
    for n, ones in ((50, 290), (400, 2200), (1000, 3800)):
        assert weighted_tail(ones, n, [1] * 6) == pytest.approx(binom.sf(ones - 1, 6 * n, 0.5), rel=1e-8)


def test_weights_fall_as_the_released_ones() -> None:
    for layers in (2, 7, 30):
        ours = np.array(falling_weights(layers), dtype=float)
        assert np.allclose(ours / ours.sum(), np.linspace(10, 1, layers) / np.linspace(10, 1, layers).sum())


def test_marked_texts_are_found_and_only_with_the_key() -> None:
    model, mark = load("nano"), SynthID(KEY)
    made = generate(model, "It was", transform=mark.transform(), max_tokens=120, seed=1, ignore_eos=True)
    found = mark.detect(made.tokens)
    assert found.p_value < 1e-6 and found.statistic > 0.5
    assert SynthID(Key(b"another key of tests")).detect(made.tokens).p_value > 1e-4
    plain = generate(model, "It was", max_tokens=120, seed=1, ignore_eos=True)
    assert mark.detect(plain.tokens).p_value > 1e-4
    none = SynthID(KEY, leaves=1).transform()
    assert generate(model, "It was", transform=none, max_tokens=120, seed=1, ignore_eos=True).tokens == plain.tokens


def test_a_text_is_marked_alike_alone_in_a_batch_and_with_speculation() -> None:
    model, rule = load("nano"), SynthID(KEY, context=2).transform()
    together = generate(model, ["It was", "The old man"], transform=rule, max_tokens=30, seed=5)
    alone = generate(model, "The old man", transform=rule, max_tokens=30, seed=5)
    fast = generate(model, "The old man", transform=rule, max_tokens=30, seed=5, speculate="lookup")
    assert isinstance(together, list)
    assert together[1].tokens == alone.tokens == fast.tokens


def test_nothing_to_count_is_no_evidence() -> None:
    for text in ([], [1, 2, 3, 4]):
        found = SynthID(KEY).detect(text)
        assert (found.p_value, found.scored) == (1.0, 0) and math.isnan(found.statistic)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers"),
        ({"layers": 65}, "layers"),
        ({"context": 0}, "context"),
        ({"leaves": 0}, "leaves"),
        ({"weights": [1, 2]}, "weights"),
        ({"layers": 2, "weights": [1, 0]}, "weights"),
    ],
)
def test_misuse_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthID(KEY, **settings)


def test_the_secret_does_not_show() -> None:
    assert "tests" not in repr(SynthID(KEY)) + repr(SynthID(KEY).transform())

"""GumbelWatermark: the law of marked texts, exact p-values, contexts used once, batches and speculation."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import digamma
from scipy.stats import chisquare, gamma, kstest

import nextoken
from nextoken.decode.scaling import Temperature
from nextoken.decode.transform import Context
from nextoken.decode.truncation import TopP
from nextoken.model.table import TableModel
from nextoken.speculate.acceptance import Follow
from nextoken.speculate.draft_model import DraftModel
from nextoken.speculate.loop import Speculation
from nextoken.watermark import attacks
from nextoken.watermark.gumbel import GumbelWatermark
from nextoken.watermark.key import Key

FLAT = TableModel.random(20, order=1, concentration=20.0, seed=3)


def mark(number: int, width: int = 4) -> GumbelWatermark:
    return GumbelWatermark(Key(f"key of a test {number:6}"), context=width)


def scored(text: list[int], one: GumbelWatermark) -> list[float]:
    """-log(1 - r) of every token whose context of h is the first of its kind, by the definition."""
    h, seen, found = one.context, [], []
    for at in range(h, len(text)):
        context = tuple(text[at - h : at])
        if context not in seen:
            found.append(-math.log1p(-one.numbers(context, 50)[text[at]]))
        seen.append(context)
    return found


@pytest.mark.parametrize("width", [1, 2])
def test_over_the_keys_whole_texts_have_the_models_law(width: int) -> None:
    """All strings of 4 tokens of 2 symbols, contexts repeated; 1,000 keys, chi-square at a false-alarm rate of 1e-4."""
    model, runs = TableModel.random(2, order=1, concentration=3.0, seed=8), 1000
    law = model.enumerate(4, prefix=model.vocab.encode("a").ids)
    counts: Counter[tuple[int, ...]] = Counter()
    for number in range(runs):
        rule = mark(number, width).transform()
        counts[nextoken.generate(model, "a", transform=rule, max_tokens=4, seed=number).tokens] += 1
    assert chisquare([counts[text] for text in law], np.array(list(law.values())) * runs).pvalue > 1e-4


def test_a_repeated_context_is_drawn_from_the_model() -> None:
    """One key, output `aba`: with h = 1 the context `a` has come before, so that the scores stay as they are."""
    rule, scores = mark(1, 1).transform(), torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    left = rule(scores, Context(outputs=[[], [3], [3, 4], [3, 4, 3]]))
    assert torch.equal(left[0], scores[0]) and torch.equal(left[3], scores[3])
    assert (torch.isfinite(left[1:3]).sum(-1) == 1).all()
    again = mark(1, 2).transform()(scores, Context(outputs=[[], [3], [3, 3, 3], [3, 4, 3, 4]]))
    assert (torch.isfinite(again).sum(-1) == 9).all()


@given(st.lists(st.integers(0, 2), max_size=25), st.integers(1, 3))
def test_the_score_is_the_definition(text: list[int], width: int) -> None:
    one = mark(1, width)
    expected, verdict = scored(text, one), one.detect(text)
    assert verdict.scored == len(expected)
    assert verdict.statistic == pytest.approx(sum(expected) if expected else math.nan, nan_ok=True)
    p_value = gamma.sf(sum(expected), len(expected)) if expected else 1.0
    assert verdict.p_value == pytest.approx(p_value)
    assert verdict.scored == sum(one.fresh_context(text[:at]) is not None for at in range(len(text)))


def test_texts_made_without_the_key_have_uniform_p_values() -> None:
    """1,000 repetitive texts, a key each, and 1,000 under one key; Kolmogorov-Smirnov at a false-alarm rate of 1e-4."""
    rng = np.random.default_rng(0)
    texts = rng.choice(5, size=(1000, 15), p=[0.5, 0.2, 0.1, 0.1, 0.1]).tolist()
    assert kstest([mark(n, 2).detect(text).p_value for n, text in enumerate(texts)], "uniform").pvalue > 1e-4
    wide = rng.integers(1000, size=(1000, 15)).tolist()
    assert kstest([mark(1).detect(text).p_value for text in wide], "uniform").pvalue > 1e-4


def test_marked_tokens_score_as_expected_of_their_probability() -> None:
    """r of a token of probability q is Beta(1/q, 1): its score is H_{1/q} on average, within 4.5 standard errors."""
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    one, found = mark(2), dict[int, list[float]]()
    for number in range(8000):
        context = [number, 1, 2, 3]
        token = int(one.transform()(law.log()[None], Context(outputs=[context]))[0].argmax())
        found.setdefault(token, []).append(-math.log1p(-one.numbers(context, 4)[token]))
    assert chisquare([len(found[token]) for token in range(4)], (law * 8000).numpy()).pvalue > 1e-4
    for token, scores in found.items():
        expected = digamma(1 / law[token].item() + 1) + np.euler_gamma
        assert abs(np.mean(scores) - expected) < 4.5 * np.std(scores) / math.sqrt(len(scores))


def test_a_sure_model_cannot_be_marked() -> None:
    """p = 1 over 200 keys: p-values as of any text, Kolmogorov-Smirnov at a false-alarm rate of 1e-4."""
    sure = TableModel.given(
        {(i,): [float(j == (i + 1) % 20) for j in range(20)] for i in range(20)} | {(): [0.05] * 20},
        [chr(97 + i) for i in range(20)],
    )
    found = []
    for number in range(200):
        text = nextoken.generate(sure, "a", transform=mark(number).transform(), max_tokens=15, seed=number).tokens
        assert text == tuple(range(1, 16))
        found.append(mark(number).detect(text).p_value)
    assert kstest(found, "uniform").pvalue > 1e-4


def test_the_mark_is_found_in_pieces_of_the_text() -> None:
    one = mark(7)
    chain = Temperature(0.9) | TopP(0.95) | one.transform()
    for seed in range(3):
        text = nextoken.generate(FLAT, "ab", transform=chain, max_tokens=60, seed=seed).tokens
        human = np.random.default_rng(seed).integers(20, size=60).tolist()
        for piece in (text, text[5:], attacks.crop(text, 30, seed=seed), attacks.shuffle_blocks(text, 15, seed=seed)):
            assert one.detect(piece).p_value < 1e-4
        assert one.detect(attacks.paste(text, human, pieces=3, seed=seed)).p_value < 1e-4
        assert mark(8).detect(text).p_value > 1e-4


def test_seeds_differ_and_batches_do_not() -> None:
    chain = Temperature(0.9) | mark(3, 2).transform()
    together = nextoken.generate(FLAT, ["ab", "c"], transform=chain, max_tokens=30, n=3, seed=4)
    assert isinstance(together, list) and len({text.tokens for text in together[:3]}) == 3
    alone = [nextoken.generate(FLAT, prompt, transform=chain, max_tokens=30, seed=4) for prompt in ("ab", "c")]
    assert [text.tokens for text in alone] == [together[0].tokens, together[3].tokens]


def test_speculation_gives_the_same_marked_text() -> None:
    chain = Temperature(0.9) | mark(3, 1).transform()
    plain = nextoken.generate(FLAT, "ab", transform=chain, max_tokens=40, n=2, seed=4)
    draft = TableModel.random(20, order=1, concentration=5.0, seed=4)
    for way in (Speculation(DraftModel(draft), Follow()), "suffix"):
        fast = nextoken.generate(FLAT, "ab", transform=chain, max_tokens=40, n=2, seed=4, speculate=way)
        assert [text.tokens for text in fast] == [text.tokens for text in plain]  # type: ignore[union-attr]


def test_limits() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        mark(1, 0)
    with pytest.raises(ValueError, match="0 outputs, 1 rows"):
        mark(1).transform()(torch.zeros(1, 5), Context())
    with pytest.raises(ValueError, match="at least 0"):
        mark(1).detect([1, -1])
    for text in ([], [1], [1, 2, 3, 4]):
        assert mark(1).detect(text).p_value == 1 and mark(1).detect(text).scored == 0
    assert mark(1).is_distortion_free

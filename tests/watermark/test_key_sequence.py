"""Key-sequence watermarks: the law of marked texts, p-values, batches, speculation, edits and limits; both kinds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

import nextoken
from nextoken.decode.scaling import Temperature
from nextoken.decode.transform import Context
from nextoken.decode.truncation import TopP
from nextoken.model.table import TableModel
from nextoken.speculate.acceptance import Follow, Recursive
from nextoken.speculate.draft_model import DraftModel
from nextoken.speculate.loop import Speculation
from nextoken.watermark import attacks
from nextoken.watermark.exponential import ExponentialWatermark
from nextoken.watermark.inverse_transform import InverseTransformWatermark
from nextoken.watermark.key import Key
from nextoken.watermark.key_sequence import KeySequenceWatermark, Reference

Make = Callable[..., KeySequenceWatermark]


def key(number: int) -> Key:
    return Key(f"key of a test {number:6}")


def exponential(number: int, size: int, **settings: float | None) -> KeySequenceWatermark:
    return ExponentialWatermark(key(number), **settings)  # type: ignore[arg-type]


def inverse_transform(number: int, size: int, **settings: float | None) -> KeySequenceWatermark:
    return InverseTransformWatermark(key(number), vocab_size=size, **settings)  # type: ignore[arg-type]


BOTH = pytest.mark.parametrize("make", [exponential, inverse_transform])
FLAT = TableModel.random(20, order=1, concentration=20.0, seed=3)
"""A model of high entropy, near 3 nats per token."""


def marked(model: TableModel, mark: KeySequenceWatermark, length: int, *, seed: int, prompt: str = "a") -> list[int]:
    text = nextoken.generate(model, prompt, transform=mark.transform(), max_tokens=length, seed=seed)
    return list(text.tokens)


@pytest.mark.paper("2307.15593")
@BOTH
def test_over_the_keys_whole_texts_have_the_models_law(make: Make) -> None:
    """All strings of 3 tokens after a temperature, 2,000 keys; chi-square at a false-alarm rate of 1e-4."""
    model, runs = TableModel.random(3, order=1, zeros=0.2, seed=5), 2000
    rule, size = Temperature(0.7), model.vocab.size
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        law = {
            (*text, token): p * q
            for text, p in law.items()
            for token, q in enumerate(torch.softmax(model.row(text) / 0.7, -1).tolist())
            if q > 0
        }
    counts: Counter[tuple[int, ...]] = Counter()
    for number in range(runs):
        chain, text = rule | make(number, size, length=3).transform(), []
        for _ in range(3):
            context = Context(prompts=[[3]], outputs=[text], seeds=[number % 7])
            text = [*text, int(chain(model.row(text)[None], context)[0].argmax())]
        counts[tuple(text)] += 1
    assert set(counts) <= set(law)
    assert chisquare([counts[text] for text in law], np.array(list(law.values())) * runs).pvalue > 1e-4


@BOTH
def test_one_token_is_left(make: Make) -> None:
    mark = make(1, FLAT.vocab.size)
    scores = torch.randn(3, FLAT.vocab.size, generator=torch.Generator().manual_seed(0))
    given = scores.clone()
    left = mark.transform()(scores, Context(prompts=[[0]] * 3, outputs=[[], [1], [1, 2]], seeds=[5, 5, 6]))
    assert (torch.isfinite(left).sum(-1) == 1).all() and (left.amax(-1) == 0).all() and torch.equal(scores, given)


@pytest.mark.slow
@pytest.mark.paper("2307.15593")
@BOTH
@pytest.mark.parametrize("gamma", [math.inf, None])
def test_texts_made_without_the_key_have_uniform_p_values(make: Make, gamma: float | None) -> None:
    """1,000 texts of 12 tokens with repeats, one key each; Kolmogorov-Smirnov at a false-alarm rate of 1e-4.

    p is a multiple of 1/100, so its distance to the uniform law is up to 0.01 more than of a continuous one.
    """
    rng, settings = np.random.default_rng(11), {} if gamma is None else {"gamma": gamma}
    found = []
    for number in range(1000):
        text = rng.choice(6, size=12, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
        found.append(make(number, 6, length=20, resamples=99, **settings).detect(text).p_value)
    jitter = np.array(found) - rng.random(1000) / 100
    assert kstest(jitter, "uniform").pvalue > 1e-4
    assert min(found) >= 0.01 and np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.027)


@pytest.mark.paper("2307.15593")
@BOTH
def test_a_reference_gives_uniform_p_values_too(make: Make) -> None:
    """Texts of one law, one key: 400 as reference, 400 judged under their own keys; false-alarm rate 1e-4."""
    rng = np.random.default_rng(2)
    texts = rng.integers(6, size=(800, 10))
    reference = make(10_000, 6, length=16).reference(texts[:400], length=10)
    found = [make(i, 6, length=16).detect(text, reference=reference).p_value for i, text in enumerate(texts[400:])]
    # The distance of two samples of 400 has the law of one of 200.
    assert kstest(found, "uniform").statistic < 2.23 / math.sqrt(200)


@pytest.mark.paper("2307.15593")
def test_equal_values_count_against_the_mark() -> None:
    reference = Reference(4, "", np.array([-3.0, -2.0, -2.0, 0.0]))
    assert [reference.p_value(phi) for phi in (-4.0, -3.0, -2.0, 1.0)] == [0.2, 0.4, 0.8, 1.0]


@BOTH
def test_marks_are_found_without_model_or_place_and_after_edits(make: Make) -> None:
    """40 tokens of high entropy, 5 cut off the front, then a tenth of the rest replaced, put in or left out."""
    mark = make(4, FLAT.vocab.size, resamples=99)
    for seed in range(2):
        text = marked(FLAT, mark, 60, seed=seed)
        cut = text[5:]
        edited = [
            attacks.substitute(cut, 0.1, 20, seed=seed),
            attacks.insert(cut, 0.1, 20, seed=seed),
            attacks.delete(cut, 0.1, seed=seed),
        ]
        assert [mark.detect(one).p_value for one in (text, cut, *edited)] == [0.01] * 5
        assert make(5, FLAT.vocab.size, resamples=99).detect(text).p_value > 0.01


@pytest.mark.paper("2307.15593")
@BOTH
def test_marks_are_found_in_the_text_read_anew(make: Make) -> None:
    """A subword model: 60 tokens as bytes and back, where the tokenizer may cut them otherwise."""
    model = nextoken.load("nano")
    mark = make(8, model.vocab.size, resamples=99)
    text = nextoken.generate(model, "It was", transform=mark.transform(), max_tokens=60, seed=3, ignore_eos=True)
    again = model.vocab.encode(text.text).ids
    assert mark.detect(again).p_value == 0.01


@BOTH
def test_the_statistic_grows_with_length_and_falls_with_edits(make: Make) -> None:
    size = FLAT.vocab.size
    plain = TableModel.random(20, order=1, concentration=20.0, seed=3)
    marks = [make(number, size, gamma=math.inf, resamples=99) for number in range(8)]
    texts = [marked(plain, mark, 30, seed=number) for number, mark in enumerate(marks)]

    def excess(change: Callable[[list[int]], list[int]]) -> float:
        """How far the mean statistic is above that of other keys."""
        found = [mark.detect(change(text)).statistic for mark, text in zip(marks, texts, strict=True)]
        others = [mark.detect(change(text)).statistic for mark, text in zip(marks[1:] + marks[:1], texts, strict=True)]
        return float(np.mean(found) - np.mean(others))

    lengths = [excess(lambda text, n=n: text[:n]) for n in (10, 20, 30)]  # type: ignore[misc]
    rates = [
        excess(lambda text, rate=rate: attacks.substitute(text, rate, 20, seed=1))  # type: ignore[misc]
        for rate in (0.0, 0.3, 1.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2] and rates[0] > rates[1] > rates[2]


@BOTH
def test_a_sure_model_cannot_be_marked(make: Make) -> None:
    """p = 1: the p-value over keys is that of any text; Kolmogorov-Smirnov over 150 keys, false-alarm rate 1e-4."""
    cycle = TableModel.given({(): [1, 0, 0], (0,): [0, 1, 0], (1,): [0, 0, 1], (2,): [1, 0, 0]}, ["a", "b", "c"])
    found = []
    for number in range(150):
        mark = make(number, cycle.vocab.size, length=24, resamples=39)
        text = marked(cycle, mark, 9, seed=number)
        assert text == [1, 2, 0] * 3
        found.append(mark.detect(text).p_value)
    jitter = np.array(found) - np.random.default_rng(0).random(150) / 40
    assert kstest(jitter, "uniform").pvalue > 1e-4


@BOTH
def test_a_text_is_the_same_alone_and_in_a_batch(make: Make) -> None:
    mark = make(2, FLAT.vocab.size)
    chain = Temperature(0.8) | TopP(0.9) | mark.transform()
    prompts = ["a", "bcd", "ab"]
    together = nextoken.generate(FLAT, prompts, transform=chain, max_tokens=14, n=2, seed=5)
    assert isinstance(together, list)
    for number, prompt in enumerate(prompts):
        alone = nextoken.generate(FLAT, prompt, transform=chain, max_tokens=14, seed=5)
        assert alone.tokens == together[2 * number].tokens
    assert len({text.tokens for text in together}) == 6
    # Neither the samples of a prompt nor the prompts of a call begin at the same place of the key.
    places = {mark.shift(text.request.seed, text.request.prompt) for text in together}
    assert len(places) == 6
    again = nextoken.generate(FLAT, prompts, transform=chain, max_tokens=14, n=2, seed=5, max_rows=2)
    assert [text.tokens for text in again] == [text.tokens for text in together]


@BOTH
@pytest.mark.parametrize("acceptance", [Follow(), Recursive()])
def test_speculation_gives_the_same_marked_text(make: Make, acceptance: Follow | Recursive) -> None:
    chain = Temperature(0.8) | make(2, FLAT.vocab.size).transform()
    plain = nextoken.generate(FLAT, "abc", transform=chain, max_tokens=25, n=3, seed=1)
    draft = TableModel.random(20, order=1, concentration=5.0, seed=4)
    ways: Sequence[Speculation | str] = [Speculation(DraftModel(draft), acceptance), "suffix"]
    for way in ways:
        fast = nextoken.generate(FLAT, "abc", transform=chain, max_tokens=25, n=3, seed=1, speculate=way)
        assert [text.tokens for text in fast] == [text.tokens for text in plain]  # type: ignore[union-attr]


@BOTH
def test_generations_can_be_read_again(make: Make) -> None:
    chain = Temperature(0.8) | make(2, FLAT.vocab.size).transform()
    text = nextoken.generate(FLAT, "abc", transform=chain, max_tokens=10, seed=1)
    assert text.surprisals == (0.0,) * 10
    assert text.drawn.column("logprob") == pytest.approx(0) and text.drawn.column("rank").tolist() == [0] * 10
    assert (text.signature.column("entropy") > 1).all()


@BOTH
def test_a_text_follows_the_key_from_its_place_around(make: Make) -> None:
    mark, scores = make(6, 20, length=12), torch.randn(20, generator=torch.Generator().manual_seed(1))
    for seed in range(8):
        place = mark.shift(seed, [4])
        for step in range(12):
            context = Context(prompts=[[4]], outputs=[[0] * step], seeds=[seed])
            chosen = int(mark.transform()(scores[None], context)[0].argmax())
            assert chosen == mark.choose(scores, (place + step) % 12)


@BOTH
def test_each_text_has_fresh_keys_of_its_own(make: Make) -> None:
    """Verdicts of one key on different texts are independent: their fresh keys are not the same ones."""
    mark, tokens = make(1, 20, length=8, resamples=3), np.array([2, 5])
    first, again, other = (
        np.concatenate(list(mark._fresh(tokens, np.array(text)))) for text in ([2, 5, 5], [2, 5, 5], [5, 2, 2])
    )
    assert first.shape == (3, 2, 8) and (first == again).all() and not (first == other).any()


@BOTH
def test_tokens_beyond_the_key_are_drawn_unmarked(make: Make) -> None:
    """The rest of the text depends on the seed's own numbers, so that no number of the key is used twice."""
    mark = make(3, FLAT.vocab.size, length=8)
    with pytest.warns(UserWarning, match="longer than the key sequence of 8"):
        long = nextoken.generate(FLAT, "a", transform=mark.transform(), max_tokens=12, seed=1)
    assert list(long.tokens[:8]) == marked(FLAT, mark, 8, seed=1)
    assert long.surprisals[:8] == (0.0,) * 8 and min(long.surprisals[8:]) > 0
    assert mark.detect(long.tokens).scored == 12


@BOTH
def test_the_place_to_begin_is_uniform_and_not_of_the_key(make: Make) -> None:
    """Chi-square at a false-alarm rate of 1e-4 over 4,000 seeds."""
    mark = make(1, 5, length=16)
    places = [mark.shift(seed, [4, 2]) for seed in range(4000)]
    assert chisquare(np.bincount(places, minlength=16)).pvalue > 1e-4
    assert places == [make(2, 5, length=16).shift(seed, [4, 2]) for seed in range(4000)]


@BOTH
def test_blocks_and_short_texts(make: Make) -> None:
    mark, size = make(1, 20, resamples=19, block=8), 20
    human = np.random.default_rng(0).integers(20, size=30).tolist()
    text = attacks.paste(marked(FLAT, make(1, FLAT.vocab.size), 20, seed=3), human, seed=1)
    assert make(1, FLAT.vocab.size, resamples=19, block=16, length=64).detect(text).scored == 50
    assert make(1, size).detect([]).p_value == 1
    assert 0 < make(1, size, resamples=19).detect([3]).p_value <= 1
    with pytest.raises(ValueError, match="7 tokens is shorter than the block of 8"):
        mark.detect(range(7))
    assert mark.detect(human) == mark.detect(human)
    # The settings of a verdict's own numbers: another seed, other fresh keys.
    verdicts = {make(1, 20, resamples=500, seed=seed).detect(human[:6]).p_value for seed in range(3)}
    assert len(verdicts) > 1


@BOTH
def test_misuse_is_refused(make: Make) -> None:
    for settings in ({"length": 0}, {"resamples": 0}, {"block": 0}, {"gamma": -0.1}, {"gamma": math.nan}):
        with pytest.raises(ValueError, match="at least"):
            make(1, 5, **settings)
    with pytest.raises(ValueError, match="block of 9 tokens is longer than the key sequence of 8"):
        make(1, 5, length=8, block=9)
    mark = make(1, 5)
    with pytest.raises(ValueError, match="not those of a search"):
        mark.transform()(torch.zeros(1, 5), Context(prompts=[[0]], outputs=[[]]))
    with pytest.raises(ValueError, match=r"a token id is at least 0|go from 0 to 4"):
        mark.detect([1, -1])
    reference = mark.reference([[1, 2, 3]], length=3)
    with pytest.raises(ValueError, match="texts of 3 tokens"):
        mark.detect([1, 2], reference=reference)
    with pytest.raises(ValueError, match="make a reference for it"):
        make(1, 5, length=32).detect([1, 2, 3], reference=reference)
    for texts in ([], [[1, 2]]):
        with pytest.raises(ValueError, match="at least 3 tokens"):
            mark.reference(texts, length=3)

"""Green lists: colours, counts and bounds against enumeration, and against transformers given the same lists."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, chisquare, kstest
from transformers import GPT2Config, WatermarkDetector, WatermarkingConfig
from transformers.generation.logits_process import WatermarkLogitsProcessor

from nextoken import generate, load
from nextoken.decode.transform import Context
from nextoken.model.table import TableModel
from nextoken.watermark import Key
from nextoken.watermark.green_list import CONTEXTS, GreenList

KEY = Key(b"a key of the tests")
SCHEMES = ("lefthash", "minhash", "skipgram", "selfhash")
SIZE = 40


def texts(count: int, length: int, size: int = SIZE) -> list[list[int]]:
    return np.random.default_rng(1).integers(0, size, (count, length)).tolist()


def colour(mark: GreenList, before: list[int], token: int) -> bool:
    return bool(mark.green(tuple(before), SIZE)[token])


@pytest.mark.paper("2301.10226")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_green_tokens_gain_delta_and_are_counted(scheme: Any) -> None:
    mark = GreenList(KEY, gamma=0.4, delta=1.5, scheme=scheme)
    width = CONTEXTS[scheme] - (scheme == "selfhash")
    (text,) = texts(1, 60)
    scores = torch.randn(len(text) - width, SIZE)
    context = Context(prompts=[text[:1]] * len(scores), outputs=[text[1:at] for at in range(width, len(text))])
    changed = mark.transform()(scores, context) - scores
    seen: dict[tuple[int, ...], bool] = {}
    for row, at in enumerate(range(width, len(text))):
        green = mark.green(tuple(text[at - width : at]), SIZE)
        assert changed[row].tolist() == pytest.approx([1.5 * is_green for is_green in green], abs=1e-5)
        seen[tuple(text[at - width : at + 1])] = bool(green[text[at]])
    green_count, scored = mark.counts(text)
    assert scored <= len(seen)
    if scheme == "lefthash":
        assert (green_count, scored) == (sum(seen.values()), len(seen))
    assert mark.detect(text).scored == scored


@pytest.mark.paper("2306.04634")
def test_seeds_are_those_of_their_schemes() -> None:
    before = (7, 3, 9, 1)
    order = {v: int(w) for v, w in enumerate(GreenList(KEY, scheme="minhash")._order.row((), SIZE))}
    least = min(before, key=order.__getitem__)
    minhash = GreenList(KEY, gamma=0.5, scheme="minhash")
    assert np.array_equal(minhash.green(before, SIZE), minhash.green((least,) * 4, SIZE))
    assert not np.array_equal(minhash.green(before, SIZE), minhash.green((11,) * 4, SIZE))
    skipgram = GreenList(KEY, gamma=0.5, scheme="skipgram")
    assert np.array_equal(skipgram.green((7, 1, 2, 3, 4), SIZE), skipgram.green((7, 0, 0, 0, 0), SIZE))
    lefthash = GreenList(KEY, gamma=0.5, context=2)
    assert not np.array_equal(lefthash.green((1, 2), SIZE), lefthash.green((2, 1), SIZE))
    selfhash = GreenList(KEY, gamma=0.5, scheme="selfhash")
    order = {v: int(w) for v, w in enumerate(selfhash._order.row((), SIZE))}
    alone = GreenList(KEY, gamma=0.5, context=1, scheme="selfhash").green((), SIZE)
    anchor = min(before[:3], key=order.__getitem__)
    green = selfhash.green(before[:3], SIZE)
    anchored = selfhash._colours.row((anchor,), SIZE) < selfhash._threshold
    for v in range(SIZE):
        assert green[v] == (alone[v] if order[v] <= order[anchor] else anchored[v])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_counting_equals_generating(scheme: Any) -> None:
    """What `green` says of the whole vocabulary is what `counts` finds for single tokens, pairs of minhash included."""
    mark = GreenList(KEY, gamma=0.5, scheme=scheme)
    width = mark._before
    for text in texts(10, 30, 6):
        pairs = {
            (mark._seed_of(tuple(text[at - width : at]), text[at]), text[at]): colour(
                mark, text[at - width : at], text[at]
            )
            for at in range(width, len(text))
        }
        assert mark.counts(text) == (sum(pairs.values()), len(pairs))


def test_the_size_of_the_vocabulary_does_not_matter() -> None:
    for scheme in SCHEMES:
        mark = GreenList(KEY, scheme=scheme)
        before = tuple(range(mark._before))
        assert np.array_equal(mark.green(before, 300)[:77], mark.green(before, 77))


@pytest.mark.paper("2301.10226")
@given(st.lists(st.floats(0.01, 1), min_size=6, max_size=6), st.floats(0.05, 0.95), st.floats(0, 6), st.booleans())
@settings(max_examples=25)
def test_the_expected_share_is_bounded(weights: list[float], gamma: float, delta: float, hard: bool) -> None:
    """Against all 2^6 colourings, each with its probability."""
    p = np.array(weights) / sum(weights)
    exact = 0.0
    for green in product([False, True], repeat=6):
        mass = p[list(green)].sum()
        chance = gamma ** sum(green) * (1 - gamma) ** (6 - sum(green))
        exact += chance * mass * math.exp(delta) / (1 + mass * (math.exp(delta) - 1))
    bound = GreenList(KEY, gamma=gamma, delta=delta).expected_share(torch.tensor(p).log()).item()
    assert gamma * (1 - 1e-9) <= bound <= exact + 1e-9
    if delta == 0:
        assert bound == pytest.approx(exact)


def test_the_bound_at_its_ends() -> None:
    uniform, certain = torch.full((2000,), 1 / 2000).log(), torch.tensor([0.0, -math.inf, -math.inf])
    for gamma, delta in ((0.25, 2.0), (0.5, 4.0), (0.1, math.inf)):
        mark = GreenList(KEY, gamma=gamma, delta=delta)
        odds = gamma * math.exp(min(delta, 50)) / (1 - gamma)
        assert mark.expected_share(uniform).item() == pytest.approx(odds / (1 + odds), rel=0.02)
        assert mark.expected_share(certain).item() == pytest.approx(gamma)


@pytest.mark.paper("2301.10226")
def test_one_step_follows_the_law_of_random_colours() -> None:
    """Over keys the first token has the mean of the marked laws of all colourings; chi-square at 1e-4."""
    model, gamma, delta = TableModel.random(5, order=1, seed=3), 0.4, 1.7
    p = model.row(())[:5].exp().numpy()
    law = np.zeros(5)
    for green in product([0, 1], repeat=5):
        marked = p * np.exp(delta * np.array(green))
        law += gamma ** sum(green) * (1 - gamma) ** (5 - sum(green)) * marked / marked.sum()
    counts = np.zeros(5)
    for seed in range(2000):
        mark = GreenList(KEY.derive(seed), gamma=gamma, delta=delta)
        counts[generate(model, "", transform=mark.transform(), max_tokens=1, seed=seed).tokens[0]] += 1
    assert chisquare(counts, law * 2000).pvalue > 1e-4
    assert chisquare(counts, p * 2000).pvalue > 1e-4  # over keys no token is preferred but by its probability


@pytest.mark.paper("2306.17439")
@pytest.mark.parametrize(("scheme", "context"), [*((scheme, None) for scheme in SCHEMES), ("lefthash", 0)])
def test_p_values_of_unmarked_texts_are_uniform(scheme: Any, context: int | None) -> None:
    """Repetitive texts under many keys, ties at random; Kolmogorov-Smirnov, false alarms 1e-4 each."""
    random = np.random.default_rng(5)
    (phrase,) = texts(1, 12, 9)
    found = []
    for number in range(600):
        text = [*phrase, *phrase, *random.integers(0, 9, 25).tolist()]
        mark = GreenList(KEY.derive(number), scheme=scheme, context=context)
        green, scored = mark.counts(text)
        assert mark.detect(text).p_value == pytest.approx(binom.sf(green - 1, scored, 0.25))
        found.append(binom.sf(green, scored, 0.25) + random.random() * binom.pmf(green, scored, 0.25))
    assert kstest(found, "uniform").pvalue > 1e-4


class Injected(GreenList):
    """The lists of transformers."""

    def __init__(self, theirs: WatermarkLogitsProcessor, **settings: Any) -> None:
        super().__init__(KEY, **settings)
        self.theirs = theirs

    def green(self, before: tuple[int, ...], size: int) -> NDArray[np.bool_]:
        found = np.zeros(size, dtype=bool)
        found[self.theirs._get_greenlist_ids(torch.tensor(before)).numpy()] = True
        return found

    def _are_green(self, seed: tuple[int, ...], tokens: Any) -> NDArray[np.bool_]:
        return self.green(seed, SIZE)[tokens]


def test_with_their_lists_scores_and_statistic_are_those_of_transformers() -> None:
    config = GPT2Config(vocab_size=SIZE, bos_token_id=SIZE - 1)
    theirs = WatermarkDetector(
        config, "cpu", WatermarkingConfig(greenlist_ratio=0.25, bias=2.0), ignore_repeated_ngrams=True
    )
    ours = Injected(theirs.processor)
    for text in texts(5, 80, SIZE - 1):
        said = theirs(torch.tensor([text]), return_dict=True)
        found = ours.detect(text)
        assert found.statistic == pytest.approx(said.z_score[0])
        assert found.scored == said.num_tokens_scored[0]
    rows = torch.tensor(texts(4, 6))
    scores = torch.randn(4, SIZE)
    expected = theirs.processor(rows, scores)
    torch.testing.assert_close(ours.transform()(scores, Context(rows.tolist(), [[]] * 4)), expected)


def test_no_delta_changes_nothing_and_an_infinite_one_leaves_green_tokens_only() -> None:
    model = load("nano")
    plain = generate(model, "It was", max_tokens=40, seed=3)
    none = GreenList(KEY, delta=0.0)
    assert generate(model, "It was", transform=none.transform(), max_tokens=40, seed=3).tokens == plain.tokens
    hard = GreenList(KEY, delta=math.inf, gamma=0.5)
    made = generate(model, "It was", transform=hard.transform(), max_tokens=40, seed=3, ignore_eos=True)
    green, scored = hard.counts(made.tokens)
    assert green == scored > 25
    # A hard list that meets an impossible wish leaves the law as it is.
    certain = torch.full((1, SIZE), -math.inf)
    for token in range(SIZE):
        certain[0, token] = 0.0
        out = hard.transform()(certain, Context([[4]], [[5]]))
        assert torch.isfinite(out[0, token])
        certain[0, token] = -math.inf


@pytest.mark.parametrize("scheme", SCHEMES)
def test_marked_texts_are_found_and_only_with_the_key(scheme: Any) -> None:
    model, mark = load("nano"), GreenList(KEY, delta=4.0, scheme=scheme)
    made = generate(model, "It was", transform=mark.transform(), max_tokens=120, seed=1, ignore_eos=True)
    assert mark.detect(made.tokens).p_value < 1e-6
    assert GreenList(Key(b"another key of tests"), scheme=scheme).detect(made.tokens).p_value > 1e-4


def test_a_text_is_marked_alike_alone_in_a_batch_and_with_speculation() -> None:
    model, rule = load("nano"), GreenList(KEY, scheme="selfhash").transform()
    together = generate(model, ["It was", "The old man"], transform=rule, max_tokens=30, seed=5)
    alone = generate(model, "The old man", transform=rule, max_tokens=30, seed=5)
    fast = generate(model, "The old man", transform=rule, max_tokens=30, seed=5, speculate="lookup")
    assert isinstance(together, list)
    assert together[1].tokens == alone.tokens == fast.tokens


def test_nothing_to_count_is_no_evidence() -> None:
    mark = GreenList(KEY, scheme="skipgram")
    for text in ([], [3], [1, 2, 3, 4, 5]):
        found = mark.detect(text)
        assert (found.p_value, found.scored) == (1.0, 0) and math.isnan(found.statistic)


@given(st.lists(st.integers(0, 8), max_size=40), st.randoms(use_true_random=False))
def test_one_list_for_all_places_knows_no_order(text: list[int], random: Any) -> None:
    mark, other = GreenList(KEY, context=0), list(text)
    random.shuffle(other)
    assert mark.counts(text) == mark.counts(other + text)
    assert mark.counts(text)[1] == len(set(text))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "warped"}, "no scheme"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.0}, "gamma"),
        ({"delta": -1.0}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"context": -1}, "context"),
        ({"context": 0, "scheme": "minhash"}, "context"),
    ],
)
def test_misuse_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GreenList(KEY, **settings)


def test_the_secret_does_not_show() -> None:
    mark = GreenList(KEY)
    assert "tests" not in repr(mark) + repr(mark.transform()) and "gamma=0.25" in repr(mark)

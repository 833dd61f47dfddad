"""Every transform beside transformers' processor of the same name, its own formula, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from nextoken.decode.adaptive import EntropyVarentropy, Mirostat1, Mirostat2
from nextoken.decode.parsing import TRANSFORMS, transform
from nextoken.decode.penalty import (
    DRY,
    FrequencyPenalty,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
    suffix_matches,
)
from nextoken.decode.scaling import DynamicTemperature, Greedy, LogitBias, Temperature
from nextoken.decode.transform import Chain, Context, EmptyDistribution, Transform, normalise
from nextoken.decode.truncation import XTC, Epsilon, Eta, MinP, TopK, TopNSigma, TopP, Typical
from nextoken.model.vocab import Vocab

NONE = Context()


def logits(seed: int, batch: int = 3, size: int = 50, *, scale: float = 3.0, holes: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, size, generator=generator) * scale
    gone = torch.rand(batch, size, generator=generator) < holes
    gone[:, 0] = False
    return scores.masked_fill(gone, float("-inf"))


PAIRS = [
    (Temperature(0.7), hf.TemperatureLogitsWarper(0.7)),
    (TopK(1), hf.TopKLogitsWarper(1)),
    (TopK(7), hf.TopKLogitsWarper(7)),
    (TopK(500), hf.TopKLogitsWarper(500)),
    *((TopP(p), hf.TopPLogitsWarper(p)) for p in (0.05, 0.5, 0.95, 1.0)),
    *((MinP(m), hf.MinPLogitsWarper(m)) for m in (0.01, 0.3, 1.0)),
    *((Typical(tau), hf.TypicalLogitsWarper(tau)) for tau in (0.05, 0.5, 0.95, 0.999)),
    *((Epsilon(e), hf.EpsilonLogitsWarper(e)) for e in (3e-4, 0.05, 0.9)),
    *((Eta(e), hf.EtaLogitsWarper(e)) for e in (3e-4, 0.05, 0.9)),
]


@pytest.mark.paper("2202.00666")
@pytest.mark.paper("1904.09751")
@pytest.mark.paper("2407.01082")
@pytest.mark.paper("2210.15191")
@pytest.mark.parametrize("holes", [0.0, 0.5])
@pytest.mark.parametrize(
    ("ours", "theirs"), PAIRS, ids=lambda value: repr(value) if isinstance(value, Transform) else ""
)
def test_equals_transformers(ours: Transform, theirs: hf.LogitsProcessor, holes: float) -> None:
    for seed in range(20):
        scores = logits(seed, holes=holes)
        expected = theirs(torch.zeros(3, 0, dtype=torch.long), scores.clone())
        torch.testing.assert_close(ours(scores, NONE), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"), PAIRS, ids=lambda value: repr(value) if isinstance(value, Transform) else ""
)
def test_equals_transformers_on_ties(ours: Transform, theirs: hf.LogitsProcessor) -> None:
    for seed in range(10):
        scores = logits(seed).round()
        if isinstance(ours, TopP):
            continue  # which of tied tokens a sort puts last is nobody's promise; the mass is tested below
        expected = theirs(torch.zeros(3, 0, dtype=torch.long), scores.clone())
        torch.testing.assert_close(ours(scores, NONE), expected, rtol=1e-6, atol=1e-6)


def histories(seed: int, batch: int = 3, length: int = 14, size: int = 6) -> list[list[int]]:
    return torch.randint(size, (batch, length), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.paper("1909.05858")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RepetitionPenalty(1.3), hf.RepetitionPenaltyLogitsProcessor(1.3)),
        (RepetitionPenalty(0.8), hf.RepetitionPenaltyLogitsProcessor(0.8)),
        *((NoRepeatNgram(n), hf.NoRepeatNGramLogitsProcessor(n)) for n in (1, 2, 3)),
    ],
)
def test_penalties_equal_transformers(ours: Transform, theirs: hf.LogitsProcessor) -> None:
    for seed in range(20):
        rows, scores = histories(seed), logits(seed, size=6)
        context = Context(prompts=[row[:5] for row in rows], outputs=[row[5:] for row in rows])
        expected = theirs(torch.tensor(rows), scores.clone())
        torch.testing.assert_close(ours(scores, context), expected)


def test_chains_equal_transformers_in_either_order() -> None:
    ids = torch.zeros(3, 0, dtype=torch.long)
    hot, cut = hf.TemperatureLogitsWarper(1.7), hf.TopPLogitsWarper(0.8)
    different = 0
    for seed in range(20):
        scores = logits(seed)
        first, second = (Temperature(1.7) | TopP(0.8))(scores, NONE), (TopP(0.8) | Temperature(1.7))(scores, NONE)
        torch.testing.assert_close(first, cut(ids, hot(ids, scores)))
        torch.testing.assert_close(second, hot(ids, cut(ids, scores)))
        different += not torch.equal(torch.isinf(first), torch.isinf(second))
    assert different > 10


@given(st.integers(0, 10_000), st.floats(0.01, 0.999))
@settings(max_examples=60, deadline=None)
def test_a_nucleus_is_smallest(seed: int, p: float) -> None:
    scores = logits(seed, batch=1, size=12).double()
    kept = TopP(p)(scores, NONE)[0] > float("-inf")
    probs = scores[0].softmax(-1)
    mass, least = float(probs[kept].sum()), float(probs[kept].min())
    assert mass >= p - 1e-12
    assert mass - least < p or int(kept.sum()) == 1
    assert not bool((probs[~kept] > least).any())


def test_typical_drops_the_dull_token() -> None:
    """p = (0.4, 0.06 x 10): the surprisal of 0.4 is further from the entropy; a nucleus of 0.5 would keep it."""
    scores = torch.tensor([[0.4, *[0.06] * 10]], dtype=torch.float64).log()
    kept = Typical(0.5)(scores, NONE)[0] > float("-inf")
    assert not kept[0] and bool(kept[1:].all())
    assert bool((TopP(0.5)(scores, NONE)[0] > float("-inf"))[0])


@pytest.mark.paper("2411.07641")
def test_top_n_sigma_is_its_formula_and_blind_to_temperature() -> None:
    scores = logits(3, holes=0.3)
    for n in (0.0, 0.5, 1.0, 3.0):
        result = TopNSigma(n)(scores, NONE)
        for row, cut in zip(scores, result, strict=True):
            finite = row[torch.isfinite(row)]
            limit = row.max() - n * finite.std(correction=0)
            assert torch.equal(cut > float("-inf"), row >= limit)
        hotter = TopNSigma(n)(scores / 2.5, NONE)
        assert torch.equal(torch.isinf(hotter), torch.isinf(result))


def test_xtc_removes_all_probable_tokens_but_the_least() -> None:
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 3 + [[0.9, 0.05, 0.03, 0.02]]).log()
    context = Context(uniform=torch.tensor([0.0, 0.49, 0.5, 0.0]))
    kept = XTC(0.5, 0.15)(scores, context) > float("-inf")
    assert kept.tolist() == [[False, False, True, True], [False, False, True, True], [True] * 4, [True] * 4]
    with pytest.raises(ValueError, match="uniform"):
        XTC()(scores, NONE)


def test_presence_and_frequency_count_the_output_only() -> None:
    scores = torch.zeros(2, 4)
    context = Context(prompts=[[0, 0], [1]], outputs=[[1, 1, 2], []])
    assert FrequencyPenalty(0.5)(scores, context).tolist() == [[0, -1.0, -0.5, 0], [0, 0, 0, 0]]
    assert PresencePenalty(0.5)(scores, context).tolist() == [[0, -0.5, -0.5, 0], [0, 0, 0, 0]]


@given(st.lists(st.integers(0, 2), max_size=30))
def test_suffix_matches_equal_brute_force(history: list[int]) -> None:
    for end, length in enumerate(suffix_matches(history)):
        head, best = history[: end + 1], 0
        while best < len(head) and head[len(head) - 1 - best] == history[len(history) - 1 - best]:
            best += 1
        assert length == best


@given(st.lists(st.integers(0, 3), max_size=24), st.integers(1, 3))
@settings(deadline=None)
def test_dry_equals_brute_force(history: list[int], allowed: int) -> None:
    """Token 3 breaks repetitions."""
    vocab = Vocab([b"a", b"b", b"c", b"\n"])
    dry = DRY(multiplier=0.7, base=1.5, allowed=allowed, breakers=("\n",))
    result = dry(torch.zeros(1, 4), Context(prompts=[history], outputs=[[]], vocab=vocab))[0]
    for token in range(4):
        longest = 0
        for at in range(1, len(history)):
            if history[at] != token:
                continue
            length = 0
            while (
                length < at
                and history[at - 1 - length] == history[len(history) - 1 - length]
                and history[at - 1 - length] != 3
            ):
                length += 1
            longest = max(longest, length)
        expected = -0.7 * 1.5 ** (longest - allowed) if longest >= allowed and token != 3 else 0.0
        assert result[token].item() == pytest.approx(expected)


@pytest.mark.paper("2007.14966")
def test_mirostat_2_cuts_at_mu_and_follows_the_surprises() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    fresh = Context(prompts=[[]], outputs=[[]], surprisals=[[]])
    assert (Mirostat2(tau=1.0)(scores, fresh) > float("-inf")).tolist() == [[True, True, False, False]]
    # Two tokens of 3 bits under tau = 1, eta = 0.5: mu = 2 - 0.5 (3 - 1) 2 = 0, so only the top token is left.
    spent = Context(prompts=[[]], outputs=[[2, 2]], surprisals=[[3 * math.log(2)] * 2])
    assert (Mirostat2(tau=1.0, eta=0.5)(scores, spent) > float("-inf")).tolist() == [[True, False, False, False]]


@pytest.mark.paper("2007.14966")
def test_mirostat_1_finds_the_exponent_of_a_zipf_law() -> None:
    size, exponent = 1000, 1.4
    scores = -exponent * torch.log(torch.arange(size, dtype=torch.float64) + 1)[None]
    kept = int((Mirostat1(tau=3.0)(scores, Context(surprisals=[[]])) > float("-inf")).sum())
    e = exponent - 1
    assert kept == round((e * 2**6.0 / (1 - size**-e)) ** (1 / exponent))


def test_entropy_varentropy_regimes() -> None:
    size = 256
    sure = torch.full((1, size), -30.0)
    sure[0, 7] = 0.0
    flat = torch.zeros(1, size)
    rule = EntropyVarentropy(temperature=0.5)
    assert rule(sure, NONE).argmax() == 7 and int((rule(sure, NONE) > float("-inf")).sum()) == 1
    sloped = flat + torch.linspace(0, 0.01, size)
    torch.testing.assert_close(rule(sloped, NONE), sloped / (0.5 * 1.3))
    middle = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    torch.testing.assert_close(rule(middle, NONE), middle / 0.5)


def test_dynamic_temperature_spans_its_range() -> None:
    flat, sure = torch.zeros(1, 8), torch.tensor([[0.0, *[-1e4] * 7]])
    rule = DynamicTemperature(0.5, 2.0)
    torch.testing.assert_close(rule(flat + 1, NONE), (flat + 1) / 2.0)
    torch.testing.assert_close(rule(sure, NONE), sure / 0.5)


def test_limits_collapse_to_greedy_or_nothing() -> None:
    scores = logits(1)
    best = scores.argmax(-1)
    for rule in (TopK(1), TopP(0.0), MinP(1.0), TopNSigma(0.0), Temperature(0.0), Greedy(), Epsilon(1.0)):
        assert torch.equal(rule(scores, NONE).softmax(-1).argmax(-1), best)
        assert bool(((rule(scores, NONE) > float("-inf")).sum(-1) == 1).all())
    for rule in (TopK(50), TopP(1.0), MinP(0.0), Typical(1.0), Temperature(1.0), Chain(), LogitBias({})):
        torch.testing.assert_close(rule(scores, NONE), scores)


IDEMPOTENT = [TopK(5), MinP(0.2), Epsilon(0.01)]
NOT_IDEMPOTENT = [TopP(0.7), Typical(0.7), TopNSigma(1.0)]


def test_which_truncations_are_idempotent() -> None:
    def changes(rule: Transform) -> int:
        return sum(not torch.equal(rule(once := rule(logits(s), NONE), NONE), once) for s in range(30))

    assert all(changes(rule) == 0 for rule in IDEMPOTENT)
    assert all(changes(rule) > 0 for rule in NOT_IDEMPOTENT)


@given(st.sampled_from(sorted(TRANSFORMS)), st.integers(0, 1000), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_a_row_does_not_depend_on_its_neighbours(name: str, seed: int, row: int) -> None:
    arguments = {
        "temperature": "0.8", "top_k": "5", "top_p": "0.7", "min_p": "0.1", "repetition_penalty": "1.3",
        "presence_penalty": "1", "frequency_penalty": "1", "no_repeat_ngram": "2", "logit_bias": "{1: 2.5}",
        "dynamic_temperature": "0.5, 1.5",
    }  # fmt: skip
    rule = transform(f"{name}({arguments.get(name, '')})")
    rows, scores = histories(seed, batch=4), logits(seed, batch=4, size=6)
    surprisals = [[0.5 * len(row)] for row in rows]
    uniform = torch.rand(4, generator=torch.Generator().manual_seed(seed))
    vocab = Vocab([b"a", b"b", b"c", b"\n", b"e", b"f"])
    together = rule(scores, Context(rows, [[1]] * 4, surprisals, uniform, vocab))
    alone = rule(scores[row : row + 1], Context([rows[row]], [[1]], [surprisals[row]], uniform[row : row + 1], vocab))
    torch.testing.assert_close(together[row : row + 1], alone)


def test_removing_everything_is_an_error_that_says_so() -> None:
    with pytest.raises(EmptyDistribution, match="row 1"):
        normalise(
            LogitBias(dict.fromkeys(range(4), float("-inf")))(torch.zeros(2, 4), NONE)[[0, 1]].index_fill(
                0, torch.tensor([0]), 0.0
            )
        )


def test_inputs_are_left_as_they_are() -> None:
    rows = histories(0)
    context = Context(rows, [[1]] * 3, [[1.0]] * 3, torch.zeros(3), Vocab([b"a"] * 50))
    for rule in (DRY(), NoRepeatNgram(2), LogitBias({1: 1.0}), Typical(), Mirostat1(), XTC(), RepetitionPenalty(2.0)):
        scores = logits(0)
        before = scores.clone()
        rule(scores, context)
        assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_p(2)", "at most 1"),
        ("foo(1)", "no transform 'foo'; there are dry"),
        ("top_k()", r"it takes \(k\)"),
        ("top_k('a')", r"it takes \(k\)"),
        ("top_k(1", "cannot read"),
        ("__import__('os').system('true')", "cannot read"),
        ("top_k(1) + top_p(0.5)", "joined by |"),
        ("temperature(open)", "not a number"),
        ("top_k(0)", "k >= 1"),
        ("temperature(-1)", "at least 0"),
    ],
)
def test_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transform(text)


def test_text_and_python_say_the_same() -> None:
    assert transform("repetition_penalty(1.1) | temperature(0.8) | top_p(p=0.95)") == (
        RepetitionPenalty(1.1) | Temperature(0.8) | TopP(0.95)
    )
    assert transform("greedy") == Greedy()
    assert transform(" ") == Chain()
    assert transform("logit_bias({3: -inf})") == LogitBias({3: float("-inf")})

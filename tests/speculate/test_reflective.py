"""Reflective verification: the fusion, what one pass reads, the law by enumeration, and that it is called lossy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

import nextoken
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.model.base import LanguageModel
from nextoken.model.table import TableModel
from nextoken.speculate import (
    Acceptance,
    Branches,
    Branching,
    Chain,
    Draft,
    Drafter,
    DraftModel,
    Follow,
    PromptLookup,
    Recursive,
    Recycling,
    ReflectiveSpeculation,
    Row,
    Speculation,
    Typical,
)
from nextoken.speculate.reflective import ReflectiveLoop, fuse
from nextoken.testing import check_speculation

FALSE_ALARM = 1e-4
"""Chance with which a test of a law fails although the law is right; the seeds are fixed."""
TARGET = TableModel.random(3, order=2, seed=1, name="target")
DRAFT = TableModel.random(3, order=1, seed=7, concentration=0.7, name="draft")
BOS = 3
REFLECT = (2, 0)


class _Told(Drafter):
    """Guesses that a function tells."""

    def __init__(self, guess: Callable[[tuple[int, ...]], Sequence[int]]) -> None:
        self.guess = guess

    def propose(self, rows: Sequence[Row]) -> Draft:
        chains = [list(self.guess(row.context))[: row.room] for row in rows]
        return Draft(tuple(Branches.chosen(chain, range(-1, len(chain) - 1)) for chain in chains))


def outputs(
    loop: Loop, count: int, length: int, *, prompt: tuple[int, ...] = (BOS, 0, 1), rule: str = ""
) -> list[tuple[int, ...]]:
    change = transform(rule)
    tickets = [loop.submit(Request(prompt, change, length, seed=500 + number)) for number in range(count)]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [tuple(found[ticket]) for ticket in tickets]


def assert_law(drawn: list[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> None:
    """Chi-square of the frequencies, strings that are expected fewer than five times together."""
    assert sum(law.values()) == pytest.approx(1)
    counts = Counter(drawn)
    assert set(counts) <= set(law), "an impossible string was drawn"
    often = {string: p * len(drawn) for string, p in law.items() if p * len(drawn) >= 5}
    bins = [(counts[string], expected) for string, expected in often.items()]
    seen, expected = len(drawn) - sum(c for c, _ in bins), len(drawn) - sum(e for _, e in bins)
    bins += [(seen, expected)] if expected >= 5 else []
    statistic = sum((count - expected) ** 2 / expected for count, expected in bins)
    assert statistic < chi2.isf(FALSE_ALARM, len(bins) - 1), f"chi-square {statistic:.1f} of {len(bins)} bins"


def hand_fused(context: tuple[int, ...], guesses: Sequence[int], weight: float) -> list[list[float]]:
    """f before each guess, then o after the last, each from separate readings of whole texts and plain sums."""
    laws = []
    for i in range(len(guesses) + 1):
        o = TARGET.row((*context, *guesses[:i])).exp().tolist()
        if i < len(guesses):
            s = TARGET.row((*context, *guesses, *REFLECT, *guesses[:i])).exp().tolist()
            o = [a ** (1 - weight) * b**weight for a, b in zip(o, s, strict=True)]
        laws.append([value / sum(o) for value in o])
    return laws


# The fusion.


def test_fusion_by_hand() -> None:
    o, s = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.125, 0.5, 0.375]).log()
    raw = [math.sqrt(0.5 * 0.125), math.sqrt(0.25 * 0.5), math.sqrt(0.25 * 0.375)]
    told = fuse(o, s, weight=0.5).softmax(-1).tolist()
    assert told == pytest.approx([value / sum(raw) for value in raw], rel=1e-6)


def test_impossible_tokens_stay_so_and_disjoint_thoughts_leave_the_first() -> None:
    o, s = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.0, 0.5, 0.5]).log()
    assert fuse(o, s, weight=0.3).softmax(-1).tolist() == pytest.approx([0, 1, 0])
    never = torch.tensor([0.0, 0.0, 1.0]).log()
    assert torch.equal(fuse(o, never, weight=0.3), o)
    assert torch.equal(fuse(o, s, weight=0.0), o)
    assert torch.equal(fuse(o, s, weight=1.0), s)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.floats(0, 1), st.floats(-9, 9), st.floats(-9, 9))
def test_constants_do_not_matter_and_equal_thoughts_change_nothing(
    values: list[float], weight: float, shift: float, other: float
) -> None:
    o = torch.tensor(values, dtype=torch.float64)
    s = o.flip(0) * 0.7
    one = fuse(o, s, weight=weight).log_softmax(-1)
    torch.testing.assert_close(fuse(o + shift, s + other, weight=weight).log_softmax(-1), one)
    torch.testing.assert_close(fuse(o, o + shift, weight=weight).log_softmax(-1), o.log_softmax(-1))


# One pass.


def fused_of(model: LanguageModel, context: tuple[int, ...], guesses: Sequence[int], weight: float) -> Tensor:
    """log f [g + 1, V] of one row, as the loop sees it."""
    seen: list[Tensor] = []

    class Watching(ReflectiveLoop):
        def _walk(self, draft, said):  # type: ignore[no-untyped-def]
            seen.append(said.log_probs()[0])
            return super()._walk(draft, said)

    speculation = ReflectiveSpeculation(_Told(lambda _: guesses), prompt=REFLECT, weight=weight)
    loop = Watching(model, speculation)
    loop.submit(Request(context, transform("greedy"), len(guesses) + 2))
    loop.step()
    return seen[0]


@pytest.mark.paper("2505.18629")
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_what_is_fused_equals_separate_readings(weight: float) -> None:
    """f of the loop, on a transformers model, against two passes on texts written out."""
    model = nextoken.load("nano")
    context, guesses = (0, 90, 91, 400), (17, 300, 45)
    first = int(model.predict([context]).log_probs()[0, -1].argmax())
    told = fused_of(model, context, guesses, weight)
    line = (*context, first, *guesses)
    o = model.predict([line]).log_probs()[0, len(context) :]
    s = model.predict([(*line, *REFLECT, *guesses)]).log_probs()[0, len(line) + len(REFLECT) - 1 : -1]
    for i in range(len(guesses)):
        expected = ((1 - weight) * o[i] + weight * s[i]).log_softmax(-1)
        torch.testing.assert_close(told[i], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(told[-1], o[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.paper("2505.18629")
def test_what_is_fused_by_hand_on_a_table() -> None:
    context, guesses, weight = (BOS, 0, 1), (2, 2, 0), 0.3
    first = int(TARGET.row(context).argmax())
    told = fused_of(TARGET, context, guesses, weight).exp()
    torch.testing.assert_close(told, torch.tensor(hand_fused((*context, first), guesses, weight), dtype=told.dtype))


def test_what_is_remembered_is_the_text_alone() -> None:
    model = nextoken.load("nano")
    drafter = DraftModel(model, Chain(3))
    loop = ReflectiveSpeculation(drafter, prompt=(300, 301), weight=0.4).loop(model)
    for number in range(3):
        loop.submit(Request((0, 80 + number, 90), transform(""), 30, seed=number))
    for _ in range(4):
        loop.step()
    assert loop._state is not None
    for running, kept in zip(loop._rows, loop._state.tokens, strict=True):
        assert kept == (*running.request.prompt, *running.tokens[:-1])
    last = [[running.tokens[-1]] for running in loop._rows]
    texts = [[*running.request.prompt, *running.tokens] for running in loop._rows]
    said = model.extend(loop._state, last).log_probs()[:, 0]
    for row, text in zip(said, texts, strict=True):
        torch.testing.assert_close(row, model.predict([text]).log_probs()[0, -1], atol=2e-4, rtol=1e-4)


# The law.


@pytest.mark.paper("2505.18629")
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_law_with_guesses_that_are_followed(weight: float) -> None:
    """Every string of four tokens, by walking all draws of f; the guesses are a function of the context."""

    def guess(context: tuple[int, ...]) -> tuple[int, ...]:
        return ((context[-1] + 1) % 3, 2)

    law: dict[tuple[int, ...], float] = {}

    def rounds(output: tuple[int, ...], mass: float) -> None:
        if len(output) == 4:
            law[output] = law.get(output, 0.0) + mass
            return
        context = (BOS, 0, 1, *output)
        guesses = guess(context)[: 4 - len(output) - 1]
        walk(output, guesses, hand_fused(context, guesses, weight), 0, mass)

    def walk(output: tuple[int, ...], guesses: tuple[int, ...], laws: list[list[float]], i: int, mass: float) -> None:
        for token, p in enumerate(laws[i]):
            if p and i < len(guesses) and token == guesses[i]:
                walk((*output, token), guesses, laws, i + 1, mass * p)
            elif p:
                rounds((*output, token), mass * p)

    for first, p in enumerate(TARGET.row((BOS, 0, 1)).exp().tolist()):
        if p:
            rounds((first,), p)
    speculation = ReflectiveSpeculation(_Told(guess), Follow(), prompt=REFLECT, weight=weight)
    drawn = outputs(speculation.loop(TARGET, max_rows=256), 3000, 4)
    assert_law(drawn, law)
    assert speculation.tally.failures == 0


@pytest.mark.paper("2505.18629")
def test_the_law_with_a_drawn_guess_by_hand() -> None:
    """Two tokens after the first, one guess d ~ q: P(y) = sum_d q(d) [accept d, or norm(max(f_d - q, 0))], then o."""
    weight = 0.6
    law: dict[tuple[int, ...], float] = {}
    for first, p in enumerate(TARGET.row((BOS, 0, 1)).exp().tolist()):
        if p == 0:
            continue
        context = (BOS, 0, 1, first)
        q = DRAFT.row(context).exp().tolist()
        for guess in range(3):
            f = hand_fused(context, (guess,), weight)[0]
            stands = min(1.0, f[guess] / q[guess])
            left = [max(a - b, 0.0) for a, b in zip(f, q, strict=True)]
            for y in range(3):
                came = stands * (y == guess) + (1 - stands) * (left[y] / sum(left) if sum(left) else 0.0)
                for z, after in enumerate(TARGET.row((*context, y)).exp().tolist()[:3]):
                    string = (first, y, z)
                    law[string] = law.get(string, 0.0) + p * q[guess] * came * after
    speculation = ReflectiveSpeculation(DraftModel(DRAFT, Chain(1)), Recursive(), prompt=REFLECT, weight=weight)
    drawn = outputs(speculation.loop(TARGET, max_rows=256), 4000, 3)
    assert_law(drawn, law)


@pytest.mark.paper("2505.18629")
@pytest.mark.parametrize("acceptance", [Recursive(), Follow(), Typical()], ids=["recursive", "follow", "typical"])
@pytest.mark.parametrize("rule", ["", "temperature(0.7) | top_p(0.9)", "greedy"])
def test_without_weight_the_tokens_are_those_of_plain_verification(acceptance: Acceptance, rule: str) -> None:
    usual = Speculation(DraftModel(DRAFT, Chain(3)), acceptance)
    reflective = ReflectiveSpeculation(DraftModel(DRAFT, Chain(3)), acceptance, prompt=REFLECT, weight=0.0)
    assert outputs(reflective.loop(TARGET), 30, 20, rule=rule) == outputs(usual.loop(TARGET), 30, 20, rule=rule)
    assert reflective.tally == usual.tally


def test_only_without_weight_the_law_is_kept() -> None:
    """False alarm 1e-4."""

    def speculation(weight: float) -> Callable[[], Speculation]:
        return lambda: ReflectiveSpeculation(DraftModel(DRAFT, Chain(2)), prompt=REFLECT, weight=weight)

    check_speculation(TARGET, speculation(0.0), prompts=2)
    with pytest.raises(AssertionError, match="chi-square"):
        check_speculation(TARGET, speculation(0.7), prompts=2)


def test_it_is_called_lossy() -> None:
    drafter = DraftModel(DRAFT)
    assert not ReflectiveSpeculation(drafter, prompt=REFLECT).acceptance.lossless
    assert ReflectiveSpeculation(drafter, prompt=REFLECT, weight=0.0).acceptance.lossless
    assert not ReflectiveSpeculation(drafter, Typical(), prompt=REFLECT, weight=0.0).acceptance.lossless
    one = ReflectiveSpeculation(drafter, prompt=REFLECT)
    assert not replace(one, prompt=(1,)).acceptance.lossless
    assert replace(one, weight=0.0).acceptance.lossless


# What it is for, and what it is apt to do instead.


def _second_thoughts(after: Callable[[int], Sequence[float]]) -> TableModel:
    """x, y, z, the prompt r: x comes with 0.9, and of a draft d of one token the target thinks `after(d)` again."""
    rows: dict[tuple[int, ...], Sequence[float]] = {(): [0.9, 0.08, 0.02, 0.0]}
    return TableModel.given(rows | {(d, 3): [*after(d), 0.0] for d in range(3)}, ["x", "y", "z", "r"])


def _stands(model: TableModel, guess: int, weight: float) -> float:
    """Chance that a guess stands when it is followed."""
    seen: list[float] = []

    class Watching(ReflectiveLoop):
        def _walk(self, draft, said):  # type: ignore[no-untyped-def]
            seen.append(float(said.log_probs()[0, 0, guess].exp()))
            return super()._walk(draft, said)

    loop = Watching(model, ReflectiveSpeculation(_Told(lambda _: (guess,)), Follow(), prompt=(3,), weight=weight))
    loop.submit(Request((4,), transform("greedy"), 3))
    loop.step()
    return seen[0]


def test_a_synonym_stands_more_often_and_an_error_does_not() -> None:
    """Having seen y, the target finds x and y alike; z stays wrong."""
    model = _second_thoughts(lambda d: (0.49, 0.49, 0.02))
    synonym = [_stands(model, 1, a / 4) for a in range(5)]
    assert synonym == sorted(synonym)
    assert synonym[0] == pytest.approx(0.08)
    assert synonym[-1] == pytest.approx(0.49)
    assert max(_stands(model, 2, a / 4) for a in range(5)) < 0.035


def test_a_target_that_repeats_lets_errors_stand() -> None:
    model = _second_thoughts(lambda d: [0.9 if token == d else 0.05 for token in range(3)])
    wrong = [_stands(model, 2, a / 4) for a in range(5)]
    assert wrong == sorted(wrong)
    assert wrong[0] == pytest.approx(0.02)
    assert wrong[-1] == pytest.approx(0.9)


# Edges.


def test_what_does_not_fit_twice_is_verified_as_usual() -> None:
    target = TableModel.random(3, order=2, seed=1, name="short")
    target.context_length = 12
    calm = ReflectiveSpeculation(DraftModel(DRAFT, Chain(3)), Follow(), prompt=(0,) * 9, weight=0.9)
    assert outputs(calm.loop(target), 20, 9) == outputs(Loop(target), 20, 9)
    assert calm.tally.accepted > 0
    tight = ReflectiveSpeculation(DraftModel(DRAFT, Chain(3)), Follow(), prompt=REFLECT, weight=0.9)
    assert {len(output) for output in outputs(tight.loop(target), 20, 9)} == {9}
    assert tight.tally.failures == 0
    # 3 + 1 tokens, twice three guesses and the prompt are exactly twelve.
    assert outputs(tight.loop(target), 20, 9) != outputs(Loop(target), 20, 9)


def test_rows_of_different_drafts_and_none_go_together() -> None:
    """Tokens do not depend on what else is generated, nor does a row without a guess change."""

    def guess(context: tuple[int, ...]) -> tuple[int, ...]:
        return (0, 1, 2)[: (7 * context[-1] + len(context)) % 4]

    def made(rows: int) -> list[tuple[int, ...]]:
        speculation = ReflectiveSpeculation(_Told(guess), Follow(), prompt=REFLECT, weight=0.5)
        return outputs(speculation.loop(TARGET, max_rows=rows), 12, 15)

    assert made(12) == made(1)
    silent = ReflectiveSpeculation(_Told(lambda _: ()), Follow(), prompt=REFLECT, weight=0.9)
    assert outputs(silent.loop(TARGET), 12, 15) == outputs(Loop(TARGET), 12, 15)


def test_a_text_is_generated() -> None:
    tiny = nextoken.load("nano")
    prompt = tuple(tiny.vocab.encode(" Read again:").ids)
    speculation = ReflectiveSpeculation(PromptLookup(), prompt=prompt, weight=0.3)
    made = nextoken.generate(tiny, "one two three one two", speculate=speculation, max_tokens=12, seed=1)
    assert len(made.tokens) <= 12
    assert speculation.tally.failures == 0


def test_misuse_is_told() -> None:
    drafter = DraftModel(DRAFT)
    with pytest.raises(ValueError, match="needs a prompt"):
        ReflectiveSpeculation(drafter)
    with pytest.raises(ValueError, match="from 0 to 1"):
        ReflectiveSpeculation(drafter, prompt=REFLECT, weight=1.2)
    for trees in (DraftModel(DRAFT, Branching((2, 1))), Recycling()):
        with pytest.raises(ValueError, match="guesses trees"):
            ReflectiveSpeculation(trees, prompt=REFLECT)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        ReflectiveSpeculation(drafter, prompt=(9,)).loop(TARGET)

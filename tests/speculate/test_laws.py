"""Speculation keeps the law of the output: whole strings against enumeration, for every rule, shape and drafter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chi2

from nextoken.decode.generate import derived_seed
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.decode.transform import Context, normalise
from nextoken.model.table import TableModel
from nextoken.speculate import (
    Acceptance,
    Branching,
    Chain,
    Drafter,
    DraftModel,
    Dynamic,
    Follow,
    Independent,
    KSequential,
    PromptLookup,
    Recursive,
    Recycling,
    Speculation,
    Stand,
    StochasticBeam,
    SuffixAutomaton,
    Typical,
)

FALSE_ALARM = 1e-4
"""Chance with which a test of a law fails although the law is right; the seeds are fixed."""
SYMBOLS = 3
TARGET = TableModel.random(SYMBOLS, order=2, eos=True, seed=1, name="target")
BOS, EOS = TARGET.vocab.bos_id, min(TARGET.vocab.eos_ids)
PROMPT = (BOS, 0, 1, 0)
LENGTH = 4

DRAFTS = {
    "good": TableModel.random(SYMBOLS, order=2, eos=True, seed=1, concentration=1.0, name="good"),
    "bad": TableModel.random(SYMBOLS, order=1, eos=True, seed=7, concentration=0.5, name="bad"),
    "sparse": TableModel.random(SYMBOLS, order=2, eos=True, seed=8, zeros=0.6, name="sparse"),
}
SHAPES = {
    "chain": lambda: Chain(3),
    "confident chain": lambda: Chain(3, confidence=0.5),
    "branching": lambda: Branching((2, 2, 1)),
    "beam": lambda: StochasticBeam(3, 3),
    "dynamic": lambda: Dynamic(6),
    "layered": lambda: Dynamic(8, threshold=0.1),
}


def law_of(target: TableModel, rule: str, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every output of sampling `length` tokens at most, by enumeration."""
    change = transform(rule)
    law: dict[tuple[int, ...], float] = {}
    live: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        grown: dict[tuple[int, ...], float] = {}
        for output, mass in live.items():
            logits = target.predict([[*PROMPT, *output]]).logits()[:, -1]
            context = Context(prompts=[PROMPT], outputs=[output], surprisals=[[]], vocab=target.vocab)
            for token, p in enumerate(normalise(change(logits, context))[0].exp().tolist()):
                if p > 0:
                    into = law if token == EOS else grown
                    into[(*output, token)] = into.get((*output, token), 0.0) + mass * p
        live = grown
    return law | live


def outputs(loop: Loop, rule: str, count: int, length: int = LENGTH) -> list[tuple[int, ...]]:
    """`count` outputs drawn in one loop."""
    change = transform(rule)
    tickets = [
        loop.submit(Request(PROMPT, change, length, seed=derived_seed(5, number + 1))) for number in range(count)
    ]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [tuple(found[ticket]) for ticket in tickets]


def assert_law(drawn: list[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> None:
    """Chi-square of the frequencies, strings that are expected fewer than five times together."""
    counts = Counter(drawn)
    assert set(counts) <= set(law), "an impossible string was drawn"
    statistic, degrees, rare, rare_seen = 0.0, -1, 0.0, 0
    for string, p in law.items():
        expected = p * len(drawn)
        if expected < 5:
            rare, rare_seen = rare + expected, rare_seen + counts[string]
            continue
        statistic += (counts[string] - expected) ** 2 / expected
        degrees += 1
    if rare >= 5:
        statistic += (rare_seen - rare) ** 2 / rare
        degrees += 1
    assert statistic < chi2.isf(FALSE_ALARM, degrees), f"chi-square {statistic:.1f} on {degrees} degrees"


def speculative(drafter: Drafter, rule: Acceptance | None = None) -> Loop:
    return Speculation(drafter, rule or Recursive()).loop(TARGET, max_rows=256)


@pytest.mark.slow
@pytest.mark.paper("2211.17192")
@pytest.mark.paper("2402.14160")
@pytest.mark.paper("2410.11744")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draft", DRAFTS)
def test_drafts_of_every_shape_keep_the_law(draft: str, shape: str) -> None:
    loop = speculative(DraftModel(DRAFTS[draft], SHAPES[shape]()))
    assert_law(outputs(loop, "temperature(0.9)", 3000), law_of(TARGET, "temperature(0.9)", LENGTH))


@pytest.mark.slow
@pytest.mark.paper("2310.15141")
@pytest.mark.parametrize("rule", [Recursive(), KSequential()], ids=["recursive", "k-sequential"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_independent_guesses_keep_the_law(draft: str, rule: Acceptance) -> None:
    loop = speculative(DraftModel(DRAFTS[draft], Independent(3, 3)), rule)
    assert_law(outputs(loop, "temperature(0.9)", 3000), law_of(TARGET, "temperature(0.9)", LENGTH))


@pytest.mark.parametrize("rule", ["top_p(0.7)", "repetition_penalty(1.5) | temperature(0.7)", "no_repeat_ngram(2)"])
def test_transforms_are_seen_by_target_and_draft(rule: str) -> None:
    loop = speculative(DraftModel(DRAFTS["bad"], Branching((2, 1))))
    assert_law(outputs(loop, rule, 1500), law_of(TARGET, rule, LENGTH))


def test_a_wrong_law_is_noticed() -> None:
    # The proofs above have the power to see a rule that changes the law.
    loop = speculative(DraftModel(DRAFTS["bad"], Chain(3)), Typical())
    with pytest.raises(AssertionError, match="chi-square"):
        assert_law(outputs(loop, "temperature(0.9)", 1500), law_of(TARGET, "temperature(0.9)", LENGTH))


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "lookup": lambda: PromptLookup(),
    "recycling": lambda: Recycling(k=3, widths=((3,), (2, 1), (1,))),
    "suffix": lambda: SuffixAutomaton(),
    "stand": lambda: Stand(),
    "chain": lambda: DraftModel(DRAFTS["good"], Chain(3)),
    "beam": lambda: DraftModel(DRAFTS["bad"], StochasticBeam(3, 3)),
}


@pytest.mark.paper("2408.08696")
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", ["", "temperature(0.7) | top_k(3)", "xtc(0.5, 0.1)", "mirostat_2(2)", "greedy"])
def test_following_gives_the_very_tokens_of_plain_decoding(drafter: str, rule: str) -> None:
    plain = outputs(Loop(TARGET), rule, 60, length=30)
    speculation = Speculation(DRAFTERS[drafter](), Follow())
    fast = outputs(speculation.loop(TARGET), rule, 60, length=30)
    assert fast == plain
    assert speculation.tally.failures == 0
    assert speculation.tally.accepted > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_output_is_that_of_plain_greedy(draft: str, shape: str) -> None:
    speculation = Speculation(DraftModel(DRAFTS[draft], SHAPES[shape]()))
    plain, fast = outputs(Loop(TARGET), "greedy", 3, length=40), outputs(speculation.loop(TARGET), "greedy", 3, 40)
    assert fast == plain
    assert speculation.tally.failures == 0


@pytest.mark.parametrize("shape", [Chain(3), Branching((2, 1, 1)), StochasticBeam(2, 3), Independent(2, 3)], ids=repr)
def test_the_target_as_its_own_draft_is_always_right(shape: object) -> None:
    speculation = Speculation(DraftModel(TARGET, shape))  # type: ignore[arg-type]
    drawn = outputs(speculation.loop(TARGET), "temperature(0.9)", 40, length=12)
    tally = speculation.tally
    # Every pass gives three guesses and one token more, but for the last of each text, and the first is drawn alone.
    passes = sum(-(-(len(output) - 1) // 4) for output in drawn)
    assert tally.passes == passes
    assert tally.tokens == sum(map(len, drawn)) - len(drawn)


def test_disjoint_drafts_give_one_token_per_pass() -> None:
    size = SYMBOLS + 2
    table = torch.zeros(size, size, dtype=torch.float64)
    table[:, 0] = 1.0
    only_a = TableModel(table, ["a", "b", "c"], eos=True)
    table = torch.zeros(size, size, dtype=torch.float64)
    table[:, 1], table[:, 2] = 0.5, 0.5
    never_a = TableModel(table, ["a", "b", "c"], eos=True)
    speculation = Speculation(DraftModel(only_a, Chain(3)))
    outputs(speculation.loop(never_a), "", 20, length=10)
    assert speculation.tally.tokens_per_pass == 1.0

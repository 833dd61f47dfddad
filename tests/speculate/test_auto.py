"""Auto: plain where guesses do not pay, the fastest arm where they do, never much slower, and the target's own law."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.speculate.test_laws import TARGET, assert_law, law_of, outputs
from torch import Tensor

from nextoken.decode.generate import generate
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.model.base import State
from nextoken.model.next import Next
from nextoken.model.table import TableModel
from nextoken.speculate import (
    Auto,
    Chain,
    Drafter,
    DraftModel,
    Follow,
    PromptLookup,
    Recursive,
    Speculation,
    Stand,
    named,
)
from nextoken.speculate.arms import places_of, plain_families
from nextoken.speculate.auto import _followed
from nextoken.speculate.costs import Costs
from nextoken.speculate.draft import ROOT, Branches
from nextoken.testing import check_speculation


class Clock:
    """Stands still but for what models add."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def timed(model: TableModel, clock: Clock, first: float, more: float) -> TableModel:
    """The model, a pass of which over n tokens of each row takes first + (n - 1) more seconds."""
    untimed = model.extend

    def extend(state: State, tokens: Tensor, parents: Tensor | None = None) -> Next:
        clock.now += first + more * (torch.as_tensor(tokens).shape[1] - 1)
        return untimed(state, tokens, parents)

    model.extend = extend  # type: ignore[method-assign,assignment]
    return model


def noise() -> TableModel:
    """Says hardly anything twice."""
    return TableModel.random(30, order=1, seed=1, concentration=5.0)


def habit() -> TableModel:
    """Says much the same after the same."""
    return TableModel.random(30, order=2, seed=1, concentration=0.02)


def cycle() -> TableModel:
    return TableModel.from_counts([[0, 1, 2, 3, 4] * 9], list("abcde"), order=1)


MODELS = {"noise": noise, "habit": habit, "cycle": cycle}


def run(loop: Loop, clock: Clock, length: int, *, rows: int = 1, seed: int = 0) -> tuple[list[list[int]], list[float]]:
    """Tokens of each text, and when each step was done."""
    for number in range(rows):
        loop.submit(Request((0, 1, 2), transform(""), length, seed=seed + number, ignore_eos=True))
    made: dict[int, list[int]] = {}
    times = []
    while not loop.is_done:
        for piece in loop.step():
            made.setdefault(piece.ticket, []).append(piece.token)
            times.append(clock.now)
    return [made[ticket] for ticket in sorted(made)], times


def both(
    model: str,
    more: float,
    length: int = 200,
    *,
    rows: int = 1,
    seed: int = 0,
    draft: TableModel | None = None,
    price: float = 0.1,
) -> tuple[list[float], list[float], Auto]:
    """When each token came, plainly and with Auto, and what Auto did; the tokens must be the same."""
    clock = Clock()
    plain, before = run(Loop(timed(MODELS[model](), clock, 1.0, more)), clock, length, rows=rows, seed=seed)
    clock = Clock()
    auto = Auto(draft=None if draft is None else timed(draft, clock, price, 0.0), clock=clock)
    speculation = Speculation(auto, Follow())
    fast, after = run(speculation.loop(timed(MODELS[model](), clock, 1.0, more)), clock, length, rows=rows, seed=seed)
    assert fast == plain
    assert speculation.tally.failures == 0
    return before, after, auto


@pytest.mark.parametrize("model", ["noise", "habit"])
def test_plain_where_guesses_never_pay(model: str) -> None:
    before, after, auto = both(model, 1.0)  # a pass over n tokens takes as long as n passes
    assert auto.passes["plain"] > 0.95 * auto.passes.total()
    assert after[-1] <= 1.03 * before[-1]


def test_the_fastest_arm_where_guesses_pay() -> None:
    """On a cycle every chain stands, so with flat costs the longest is best: 17 tokens a pass."""
    before, after, auto = both("cycle", 0.0)
    ((best, passes),) = [entry for entry in auto.passes.most_common(2) if entry[0] != "plain"]
    assert best.split()[1] == "16"
    assert passes >= (200 - 40) // 17 - 1
    assert after[-1] < 0.2 * before[-1]


def test_longer_guesses_only_where_they_cost_little() -> None:
    """A pass over n tokens takes 1 + (n - 1) b seconds and brings n: the best length falls as b rises."""
    sizes = []
    for more in (0.0, 0.9):
        _, _, auto = both("habit", more, draft=habit(), price=0.01)
        played = {name: count for name, count in auto.passes.items() if name != "plain"}
        sizes.append(sum(int(name.split()[1]) * count for name, count in played.items()) / 200)
    assert sizes[0] > 10 * sizes[1]


@pytest.mark.slow
def test_it_comes_near_the_best_fixed_drafter() -> None:
    """Of 500 tokens, a tenth and 50 passes of finding out behind the best of a few fixed drafters."""

    def last(make: Callable[[Clock], Drafter]) -> float:
        clock = Clock()
        loop = Speculation(make(clock), Follow()).loop(timed(habit(), clock, 1.0, 0.05))
        return run(loop, clock, 500)[1][-1]

    fixed = [
        last(lambda _: PromptLookup()),
        last(lambda _: Stand(widths=((2,), (1, 1)))),
        last(lambda clock: DraftModel(timed(habit(), clock, 0.1, 0.0), Chain(4))),
    ]
    _, after, _ = both("habit", 0.05, 500, draft=habit())
    assert after[-1] < 1.1 * min(fixed) + 50
    assert after[-1] < 0.75 * 500


def test_a_draft_dearer_than_the_target_is_left_alone() -> None:
    before, after, auto = both("habit", 0.3, draft=habit(), price=2.0)
    assert sum(count for name, count in auto.passes.items() if name.startswith("draft")) <= 5
    assert after[-1] <= 1.05 * before[-1]


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    model=st.sampled_from(sorted(MODELS)),
    more=st.sampled_from([0.0, 0.02, 0.1, 0.4, 1.0]),
    seed=st.integers(0, 99),
    price=st.sampled_from([None, 0.02, 0.3, 1.0]),
)
def test_no_moment_is_later_than_the_slack_allows(model: str, more: float, seed: int, price: float | None) -> None:
    """Each token of one text comes at most 5 % later than plainly, whenever one stops; two reads for the prompts."""
    draft = None if price is None else TableModel.random(len(MODELS[model]().vocab.token_bytes) - 1, order=1, seed=9)
    before, after, _ = both(model, more, 120, seed=seed, draft=draft, price=price or 0.0)
    read = before[0]
    for plain, fast in zip(before, after, strict=True):
        assert fast - read <= 1.05 * max(plain - read, 0.0) + 1.0 + 1e-9  # plain decoding feeds a token after giving it


def test_batches_lose_no_more_than_the_slack() -> None:
    for more in (0.0, 0.3, 1.0):
        before, after, auto = both("habit", more, 120, rows=5)
        assert auto.seconds <= 1.05 * auto.plain_seconds
        assert after[-1] <= 1.05 * before[-1] + 1.0


@pytest.mark.parametrize("rule", ["", "temperature(0.7) | top_k(3)", "xtc(0.5, 0.1)", "mirostat_2(2)", "greedy"])
def test_a_seed_fixes_the_text_whatever_the_clock_says(rule: str) -> None:
    plain = outputs(Loop(TARGET), rule, 20, length=60)
    played = []
    for more in (0.0, 0.5):
        clock = Clock()
        target = timed(TableModel.random(3, order=2, eos=True, seed=1, name="target"), clock, 1.0, more)
        auto = Auto(draft=TableModel.random(3, order=2, eos=True, seed=1), slack=0.5, clock=clock)
        speculation = Speculation(auto, Follow())
        assert outputs(speculation.loop(target, max_rows=4), rule, 20, length=60) == plain
        assert speculation.tally.failures == 0
        played.append(auto.passes)
    assert played[0] != played[1]
    assert len(played[0]) > 4


@pytest.mark.slow
@pytest.mark.parametrize("draft", [False, True])
def test_the_law_is_kept_under_rejection(draft: bool) -> None:
    """Arms change with what was accepted, and drafts are drawn: the strings keep their law (false alarm 1e-4)."""
    clock = Clock()
    target = timed(TableModel.random(3, order=2, eos=True, seed=1, name="target"), clock, 1.0, 0.01)
    model = TableModel.random(3, order=1, eos=True, seed=7, concentration=0.5) if draft else None
    auto = Auto(draft=model, slack=0.5, clock=clock)
    speculation = Speculation(auto, Recursive())
    drawn = outputs(speculation.loop(target, max_rows=4), "temperature(0.9)", 2000)
    assert_law(drawn, law_of(TARGET, "temperature(0.9)", 4))
    assert speculation.tally.failures == 0
    assert auto.passes["plain"] < 0.5 * auto.passes.total()


def test_the_proofs_hold() -> None:
    target = TableModel.random("abc", order=2, seed=0)
    for draft in (None, TableModel.random("abc", order=1, seed=1)):
        # A warm start, so that the arms are at play in the short strings of the proof.
        clock = Clock()
        auto = Auto(draft=draft, slack=1.0, clock=clock)
        model = timed(TableModel.random("abc", order=2, seed=0), clock, 1.0, 0.01)
        run(Speculation(auto, Follow()).loop(model), clock, 200)
        check_speculation(model, lambda auto=auto: Speculation(auto), draws=400)  # type: ignore[misc]
        assert auto.passes["plain"] < 0.6 * auto.passes.total()
    assert target.vocab.digest == model.vocab.digest


def test_shadows_count_what_following_would_accept() -> None:
    branches = Branches.chosen([5, 6, 7, 8], [ROOT, ROOT, 1, 2])
    assert places_of(branches) == [(0,), (1,), (1, 0), (1, 0, 0)]
    assert _followed(branches, ()) == ([], False)
    assert _followed(branches, (6, 7)) == ([1, 2], False)
    assert _followed(branches, (6, 7, 8)) == ([1, 2, 3], True)
    assert _followed(branches, (6, 9)) == ([1], True)
    assert _followed(branches, (5,)) == ([0], True)
    assert _followed(Branches(), ()) == ([], True)


def test_every_tree_lies_within_the_largest_of_its_family() -> None:
    for family in plain_families():
        assert all(arm.places <= family.arms[-1].places for arm in family.arms), family.name


def test_without_a_model_gains_are_those_of_playing() -> None:
    """Looked at from the side, a drafter's tokens per pass are what it gives when it is played."""
    clock = Clock()
    auto = Auto(slack=0.02, clock=clock)  # never enough for a pass of two tokens within these
    run(Speculation(auto, Follow()).loop(timed(habit(), clock, 1.0, 1.0)), clock, 45)
    (lookup,) = [family for family in auto._families if family.name == "lookup"]
    shown = lookup.arms[-1].gain
    assert set(auto.passes) == {"plain"}
    speculation = Speculation(PromptLookup(length=16), Follow())
    run(speculation.loop(habit()), Clock(), 45)
    # The mean of what was seen, beside the two passes of one token that were supposed.
    seen = (shown.value * shown.count - 2) / (shown.count - 2)
    assert seen == pytest.approx(speculation.tally.tokens_per_pass, rel=0.15)


def test_costs_are_medians_and_bounds() -> None:
    costs = Costs(window=5, memory=50)
    assert costs.plain(1) is None
    for seconds in (1.0, 9.0, 1.0):
        costs.record(1, 1, seconds, trees=False)
    assert costs.plain(1) == 1.0
    assert costs.bounds(1, 16, trees=True) == (1.0, 16.0)
    costs.record(1, 4, 1.3, trees=False)
    assert costs.bounds(1, 4, trees=False) == (1.3, 1.3)
    assert costs.bounds(1, 2, trees=False) == pytest.approx((1.1, 1.1))
    assert costs.bounds(1, 16, trees=False) == pytest.approx((1.3, 1.0 + 0.3 * 15 / 3))
    assert costs.bounds(1, 16, trees=True) == pytest.approx((1.0, 1.0 + 0.3 * 15 / 3))
    costs.record(4, 1, 2.0, trees=False)
    assert costs.bounds(4, 4, trees=False) == pytest.approx((2.6, 2.6))
    for _ in range(50):
        costs.record(1, 1, 1.0, trees=False)
    assert costs.bounds(1, 4, trees=False) == (1.0, 4.0)
    assert costs.plain_age(4) == 50


def test_a_target_without_trees_gets_chains() -> None:
    clock = Clock()
    target = timed(cycle(), clock, 1.0, 0.1)
    target.supports_trees = False
    auto = Auto(clock=clock)
    speculation = Speculation(auto, Follow())
    run(speculation.loop(target), clock, 120)
    assert speculation.tally.failures == 0
    assert speculation.tally.tokens_per_pass > 3


def test_it_keeps_what_it_learnt_and_starts_anew_for_another_target() -> None:
    clock = Clock()
    auto = Auto(clock=clock)
    target = timed(cycle(), clock, 1.0, 0.0)
    run(Speculation(auto, Follow()).loop(target), clock, 100)
    first = auto.passes["plain"]
    run(Speculation(auto, Follow()).loop(target), clock, 100)
    assert auto.passes["plain"] <= first + 2
    assert auto.seconds < 0.5 * auto.plain_seconds
    run(Speculation(auto, Follow()).loop(timed(cycle(), clock, 1.0, 0.0)), clock, 1)
    assert auto.seconds == auto.plain_seconds == 0.0


def test_by_name() -> None:
    model = TableModel.random(4, order=2, eos=True, seed=1, concentration=0.3)
    assert isinstance(named("auto").drafter, Auto)
    fast = generate(model, "ab", n=6, max_tokens=60, seed=3, ignore_eos=True, speculate="auto")
    plain = generate(model, "ab", n=6, max_tokens=60, seed=3, ignore_eos=True)
    assert [one.tokens for one in fast] == [one.tokens for one in plain]


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="slack must be above 0"):
        Auto(slack=0.0)
    with pytest.warns(UserWarning, match="different vocabularies"):
        Speculation(Auto(draft=TableModel.random(5))).loop(TARGET)

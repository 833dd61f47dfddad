"""STAND: the memory is a mean, the draws are those of a known law, and the output keeps the target's."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from tests.speculate.test_laws import BOS, EOS, FALSE_ALARM, LENGTH, SYMBOLS, TARGET, assert_law, law_of, outputs

import nextoken
from nextoken.decode.generate import generate
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request, Running
from nextoken.model.table import TableModel
from nextoken.speculate import stand as stand_module
from nextoken.speculate.acceptance import Acceptance, Follow, Recursive
from nextoken.speculate.draft import ROOT, Branches, Draft, Row
from nextoken.speculate.loop import Speculation
from nextoken.speculate.stand import Memory, Stand, temperature_of, tempered

WIDTHS = ((3,), (2, 1), (1, 1))
SIZE = TARGET.vocab.size


def law(source: random.Random, size: int) -> dict[int, float]:
    weights = {token: source.random() ** 3 for token in source.sample(range(size), source.randint(1, size))}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def arbitrary(memory: Memory) -> None:
    source = random.Random(3)
    for _ in range(60):
        memory.learn([source.randrange(SIZE) for _ in range(3)], law(source, SIZE))


def adversarial(memory: Memory) -> None:
    """Sure of what the target finds least likely, ends and <bos> among it."""
    for first in range(SIZE):
        for second in range(SIZE):
            probs = TARGET.predict([[first, second]]).log_probs()[0, -1].exp()
            memory.learn([first, second], {int(probs.argmin()): 0.9, int(probs.topk(2).indices[1]): 0.1})


def true(memory: Memory, target: TableModel = TARGET) -> None:
    size = target.vocab.size
    for first in range(size):
        for second in range(size):
            probs = target.predict([[first, second]]).log_probs()[0, -1].exp()
            memory.learn([first, second], {token: p for token, p in enumerate(probs.tolist()) if p > 0})


STATES = {"empty": lambda memory: None, "arbitrary": arbitrary, "adversarial": adversarial, "true": true}


class Frozen(Stand):
    """Keeps the memory that it is given."""

    def observe(self, *_: object) -> None:
        return None


def filled(state: str, *, frozen: bool, **options: object) -> Stand:
    drafter = (Frozen if frozen else Stand)(widths=WIDTHS, **options)  # type: ignore[arg-type]
    STATES[state](drafter.memory)
    return drafter


def row(context: tuple[int, ...], rule: str = "", *, room: int = 10, seed: int = 0, ignore_eos: bool = True) -> Row:
    request = Request(context[:1], transform(rule), 50, ignore_eos=ignore_eos)
    running = Running(0, request)
    running.tokens += context[1:]
    return Row(running, context, room, torch.Generator().manual_seed(seed))


def checked(drafter: Stand, target: TableModel = TARGET) -> Stand:
    drafter.check(target)
    return drafter


@pytest.mark.paper("2506.04708")
@pytest.mark.parametrize("rule", ["temperature(0.7)", "top_p(0.8) | temperature(1.3)"])
@pytest.mark.parametrize("state", STATES)
def test_the_law_is_kept_whatever_the_memory_holds(state: str, rule: str) -> None:
    drafter = filled(state, frozen=True)
    speculation = Speculation(drafter, Recursive())
    drawn = outputs(speculation.loop(TARGET, max_rows=256), rule, 2000)
    assert_law(drawn, law_of(TARGET, rule, LENGTH))
    assert speculation.tally.failures == 0
    assert (speculation.tally.drafted == 0) == (state == "empty")


@pytest.mark.slow
@pytest.mark.paper("2506.04708")
@pytest.mark.parametrize("rejected", [False, True])
def test_the_law_is_kept_while_the_memory_learns(rejected: bool) -> None:
    drafter = filled("adversarial", frozen=False, learns_rejected=rejected, capacity=40)
    loop = Speculation(drafter, Recursive()).loop(TARGET, max_rows=64)
    assert_law(outputs(loop, "temperature(0.9)", 3000), law_of(TARGET, "temperature(0.9)", LENGTH))
    assert len(drafter.memory) == 40


@pytest.mark.paper("2506.04708")
def test_noise_used_twice_changes_the_law_and_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise at every node and in every pass, as one cached vector would give."""
    cached = torch.Generator().manual_seed(0)
    pool = stand_module.gumbels((1, 10), cached)
    monkeypatch.setattr(stand_module, "gumbels", lambda shape, _: pool.expand(shape))
    loop = Speculation(filled("true", frozen=True), Recursive()).loop(TARGET, max_rows=256)
    with pytest.raises(AssertionError, match=r"chi-square|impossible"):
        assert_law(outputs(loop, "temperature(0.9)", 1000), law_of(TARGET, "temperature(0.9)", LENGTH))


@pytest.mark.paper("2506.04708")
def test_noise_shared_by_the_nodes_of_one_pass_changes_the_law_and_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first node of a path has accepted tells of the noise at the second."""
    fresh = stand_module.gumbels
    monkeypatch.setattr(stand_module, "gumbels", lambda shape, g: fresh((1, shape[1]), g).expand(shape))
    loop = Speculation(filled("true", frozen=True), Recursive()).loop(TARGET, max_rows=256)
    with pytest.raises(AssertionError, match=r"chi-square|impossible"):
        assert_law(outputs(loop, "temperature(0.9)", 3000), law_of(TARGET, "temperature(0.9)", LENGTH))


@pytest.mark.paper("2506.04708")
def test_siblings_are_draws_without_replacement_of_the_tempered_mean() -> None:
    drafter = checked(Stand(widths=((2,),)))
    drafter.memory.learn([0], {0: 0.5, 1: 0.3, 2: 0.2})
    q = tempered({0: 0.5, 1: 0.3, 2: 0.2}, 0.8)
    assert q[0] == pytest.approx(0.5**1.25 / (0.5**1.25 + 0.3**1.25 + 0.2**1.25))
    generator = torch.Generator().manual_seed(1)
    again = row((0,), "temperature(0.8)")
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(6000):
        (branches,) = drafter.propose([Row(again.running, again.context, 5, generator)]).rows
        counts[branches.tokens] += 1
        assert branches.laws is not None
    assert branches.laws is not None and list(branches.laws) == [ROOT]
    assert branches.laws[ROOT].tolist() == pytest.approx([q[0], q[1], q[2], 0.0, 0.0])
    pairs = {(a, b): q[a] * q[b] / (1 - q[a]) for a in q for b in q if a != b}
    statistic = sum((counts[pair] - 6000 * p) ** 2 / (6000 * p) for pair, p in pairs.items())
    assert set(counts) == set(pairs)
    assert statistic < chi2.isf(FALSE_ALARM, len(pairs) - 1)


@pytest.mark.paper("2506.04708")
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_what_is_remembered_is_the_arithmetic_mean(seed: int, visits: int) -> None:
    source = random.Random(seed)
    memory = Memory(order=2, top=5, capacity=100)
    laws = [law(source, 5) for _ in range(visits)]
    for given_law in laws:
        memory.learn([source.randrange(5), 3, 1], given_law)
    found = memory.recall([4, 3, 1])
    assert found is not None
    for token in range(5):
        assert found.get(token, 0.0) == pytest.approx(sum(one.get(token, 0.0) for one in laws) / visits)


def test_the_longest_known_run_is_recalled_and_the_least_used_forgotten() -> None:
    memory = Memory(order=3, top=2, capacity=6)
    assert memory.recall([1, 2]) is None
    memory.learn([1, 2], {0: 1.0})
    memory.learn([3, 2], {1: 1.0})
    assert memory.recall([9, 1, 2]) == {0: 1.0}
    assert memory.recall([9, 9, 2]) == {0: 0.5, 1: 0.5}
    assert memory.recall([2, 9]) is None
    memory.learn([7, 8, 9], {0: 0.2, 1: 0.5, 2: 0.3})  # six runs: full
    assert memory.recall([7, 8, 9]) == pytest.approx({1: 0.625, 2: 0.375})
    assert memory.recall([1, 2]) == {0: 1.0}
    memory.learn([5], {0: 1.0})
    assert len(memory) == 6
    assert memory.recall([0, 3, 2]) == {0: 0.5, 1: 0.5}  # (3, 2) was used longest ago
    assert memory.recall([1, 2]) == {0: 1.0}
    memory.clear()
    assert len(memory) == 0 and memory.recall([5]) is None


@pytest.mark.paper("2506.04708")
@pytest.mark.parametrize("rule", ["", "temperature(0.7)"])
def test_a_memory_of_the_truth_is_always_right(rule: str) -> None:
    """Three guesses and one token more per pass; the tree has a path of three below its first nodes only."""
    drafter = Frozen(widths=((1,), (1,), (1,)))
    target = TableModel.random(SYMBOLS, order=2, seed=1)
    true(drafter.memory, target)
    speculation = Speculation(drafter)
    drawn = outputs(speculation.loop(target), rule, 40, length=13)
    assert all(len(output) == 13 for output in drawn)
    assert speculation.tally.passes == 40 * 3


@pytest.mark.paper("2506.04708")
def test_an_empty_memory_gives_one_token_per_pass() -> None:
    speculation = Speculation(filled("empty", frozen=True))
    outputs(speculation.loop(TARGET), "", 20, length=10)
    assert speculation.tally.tokens_per_pass == 1.0


@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize(
    ("rule", "acceptance"),
    [
        ("", Follow()),
        ("temperature(0.7) | top_k(3)", Follow()),
        ("xtc(0.5, 0.1)", Follow()),
        ("greedy", Follow()),
        ("greedy", Recursive()),
        ("temperature(0)", Recursive()),
    ],
)
def test_the_tokens_are_those_of_plain_decoding(rule: str, acceptance: Acceptance, rejected: bool) -> None:
    plain = outputs(Loop(TARGET), rule, 40, length=30)
    speculation = Speculation(filled("adversarial", frozen=False, learns_rejected=rejected), acceptance)
    assert outputs(speculation.loop(TARGET), rule, 40, length=30) == plain
    assert speculation.tally.failures == 0
    assert speculation.tally.accepted > 0


def test_the_most_probable_are_chosen_where_nothing_is_drawn() -> None:
    drafter = checked(Stand(widths=((2,), (1, 1))))
    drafter.memory.learn([0], {1: 0.3, 2: 0.6, 0: 0.1})
    drafter.memory.learn([0, 2], {2: 1.0})
    (branches,) = drafter.propose([row((BOS, 0), "greedy")]).rows
    assert branches == Branches((2, 1, 2), (ROOT, ROOT, 0), {ROOT: [0, 1], 0: [2]})


def test_nothing_follows_an_end_or_goes_beyond_the_room() -> None:
    drafter = checked(Stand(widths=((2,), (2, 2), (1, 1, 1, 1))))
    drafter.memory.learn([0], {0: 0.5, EOS: 0.5})
    drafter.memory.learn([EOS], {0: 1.0})
    for seed in range(5):
        for ignore, room in ((False, 9), (True, 9), (False, 1), (False, 0)):
            (branches,) = drafter.propose([row((0,), seed=seed, room=room, ignore_eos=ignore)]).rows
            ends = [node for node, token in enumerate(branches.tokens) if token == EOS]
            assert any(node in branches.parents for node in ends) == ignore
            depths: list[int] = []
            for parent in branches.parents:
                depths.append(1 + (depths[parent] if parent != ROOT else 0))
            assert max(depths, default=0) == min(room, 3)


@pytest.mark.paper("2506.04708")
@pytest.mark.parametrize("rejected", [False, True])
def test_learnt_are_the_distributions_after_what_stood(rejected: bool) -> None:
    drafter = checked(Stand(widths=WIDTHS, order=3, learns_rejected=rejected))
    branches = Branches.chosen([0, 1, 2, 0], [ROOT, ROOT, 0, 2])
    fed = Draft((branches, Branches()))
    rows = [row((BOS, 1)), row((BOS, 2, 2))]
    state = TARGET.start(2)
    TARGET.extend(state, [[BOS, -1], [BOS, 2]])
    said = TARGET.extend(state, fed.tokens([1, 2]), fed.parents())
    drafter.observe(rows, fed, said, [[0, 2], []])
    kept = {(BOS, 1), (BOS, 1, 0), (1, 0, 2), (BOS, 2, 2)}
    if rejected:
        kept |= {(BOS, 1, 1), (0, 2, 0)}
    assert {run for run in drafter.memory._means if len(run) == 3 or run == (BOS, 1)} == kept
    for run in kept:
        found = drafter.memory.recall(run)
        probs = TARGET.predict([list(run)]).log_probs()[0, -1].exp().tolist()
        assert found == pytest.approx({token: p for token, p in enumerate(probs) if p > 0}, rel=1e-5)


@pytest.mark.paper("2506.04708")
def test_more_texts_of_a_prompt_take_fewer_passes() -> None:
    """nano, the same prompt again and again: tokens per pass rise with what is remembered."""
    nano, drafter = nextoken.load("nano"), Stand()
    rates = []
    for seed in range(6):
        speculation = Speculation(drafter)
        generate(
            nano, "Once upon a time", transform="temperature(0.5)", max_tokens=40, seed=seed, speculate=speculation
        )
        assert speculation.tally.failures == 0
        rates.append(speculation.tally.tokens_per_pass)
    assert sum(rates[3:]) > sum(rates[:3])
    plain = generate(nano, "Once upon a time", transform="greedy", max_tokens=24)
    assert generate(
        nano, "Once upon a time", transform="greedy", max_tokens=24, speculate=Speculation(drafter)
    ).tokens == (plain.tokens)


def test_a_template_without_branches_suits_targets_without_trees() -> None:
    target = TableModel.random(4, order=2, eos=True, seed=1, concentration=0.3)
    target.supports_trees = False
    plain = generate(target, "ab", max_tokens=30, seed=1, ignore_eos=True)
    speculation = Speculation(Stand(widths=((1,), (1,), (1,))), Follow())
    assert generate(target, "ab", max_tokens=30, seed=1, ignore_eos=True, speculate=speculation).tokens == plain.tokens
    assert speculation.tally.failures == 0 and speculation.tally.accepted > 0
    assert Stand().needs_trees


def test_temperatures_of_transforms() -> None:
    assert temperature_of(transform("")) == 1.0
    assert temperature_of(transform("temperature(0.5) | top_p(0.9) | temperature(3)")) == 1.5
    assert temperature_of(transform("temperature(0) | top_p(0.9)")) == 0.0
    assert temperature_of(transform("greedy")) == 0.0
    assert tempered({4: 0.9, 2: 0.1}, 1e-3) == {4: 1.0}
    assert tempered({4: 0.75, 2: 0.25}, 1.0) == pytest.approx({4: 0.75, 2: 0.25})


def test_arguments_and_targets_that_do_not_fit() -> None:
    for options in ({"order": 0}, {"top": 0}, {"capacity": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Stand(**options)  # type: ignore[arg-type]
    drafter = checked(Stand())
    with pytest.raises(ValueError, match="another vocabulary"):
        drafter.check(TableModel.random(5))

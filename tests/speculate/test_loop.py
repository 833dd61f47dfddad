"""The speculative loop as a user meets it: batches, stops, streams, limits, drafters that fail."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import nextoken
from nextoken.decode.generate import generate, stream
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.model.next import Next
from nextoken.model.ngram import NgramModel
from nextoken.model.table import TableModel
from nextoken.speculate import (
    Branches,
    Branching,
    Census,
    Chain,
    Draft,
    Drafter,
    DraftModel,
    Follow,
    PromptLookup,
    Recycling,
    Row,
    Speculation,
    StochasticBeam,
    named,
)

TARGET = TableModel.random(4, order=2, eos=True, seed=1, concentration=0.3)
DRAFT = TableModel.random(4, order=1, eos=True, seed=2)


def test_generate_draws_with_speculation() -> None:
    speculation = Speculation(DraftModel(DRAFT, Branching((2, 2))))
    made = generate(TARGET, "ab", n=20, max_tokens=15, seed=3, speculate=speculation)
    assert isinstance(made, list)
    assert speculation.tally.tokens == sum(len(g.tokens) for g in made) - len(made)
    for one in made:
        assert one.finish in ("eos", "length")
        # The surprisals are the target's: those of a signature of the same tokens.
        assert -sum(one.signature.column("logprob")) == pytest.approx(sum(one.surprisals), abs=1e-5)


def test_a_text_does_not_depend_on_its_batch() -> None:
    def tokens(prompts: list[str], **options: object) -> list[tuple[int, ...]]:
        drafter = DraftModel(DRAFT, StochasticBeam(2, 3))
        made = generate(TARGET, prompts, max_tokens=20, seed=4, speculate=Speculation(drafter), **options)  # type: ignore[call-overload]
        return [g.tokens for g in made]

    together = tokens(["ab", "ab", "cab", "d"])
    assert together == [tokens([prompt])[0] for prompt in ["ab", "ab", "cab", "d"]]
    assert together == tokens(["ab", "ab", "cab", "d"], max_rows=2)


@pytest.mark.parametrize("rule", ["temperature(0.8)", "greedy"])
def test_stops_and_streams_are_those_of_plain_decoding(rule: str) -> None:
    for seed in range(8):
        options = {"transform": rule, "max_tokens": 40, "seed": seed, "stop": ["ab", "dd"]}
        plain = generate(TARGET, "c", **options)  # type: ignore[call-overload]
        fast = generate(TARGET, "c", speculate=Speculation(PromptLookup(), Follow()), **options)  # type: ignore[call-overload]
        assert (fast.text, fast.tokens, fast.finish) == (plain.text, plain.tokens, plain.finish)
        pieces = list(stream(TARGET, "c", speculate="lookup", **options))  # type: ignore[arg-type]
        assert "".join(piece.text for piece in pieces) == plain.text
        assert pieces[-1].finish == plain.finish


def test_entropies_are_the_targets() -> None:
    plain = list(stream(TARGET, "a", seed=1, max_tokens=12, entropies=True))
    fast = list(stream(TARGET, "a", seed=1, max_tokens=12, entropies=True, speculate=Speculation(PromptLookup())))
    assert [p.entropy for p in fast] == pytest.approx([p.entropy for p in plain])


def test_a_full_context_ends_the_text() -> None:
    target = TableModel.random(4, order=2, seed=1)
    target.context_length = 10
    plain = generate(target, "ab", max_tokens=50, seed=1)
    speculation = Speculation(DraftModel(target, Chain(4)), Follow())
    fast = generate(target, "ab", max_tokens=50, seed=1, speculate=speculation)
    assert fast.finish == plain.finish == "context"
    assert fast.tokens == plain.tokens
    assert speculation.tally.failures == 0


def test_a_draft_with_a_shorter_context_stops_guessing() -> None:
    draft = TableModel.random(4, order=2, eos=True, seed=1, concentration=0.3)
    draft.context_length = 8
    speculation = Speculation(DraftModel(draft, Chain(4)), Follow())
    fast = generate(TARGET, "ab", max_tokens=30, seed=2, speculate=speculation, ignore_eos=True)
    assert fast.tokens == generate(TARGET, "ab", max_tokens=30, seed=2, ignore_eos=True).tokens
    assert speculation.tally.failures == 0
    assert 0 < speculation.tally.drafted <= 8


class _Broken(Drafter):
    """Guesses well twice, then does what it is told."""

    def __init__(self, then: Draft | Exception) -> None:
        self.then, self.calls = then, 0

    def propose(self, rows: Sequence[Row]) -> Draft:
        self.calls += 1
        if self.calls <= 2:
            return Draft(tuple(Branches.chosen([0], [-1]) if row.room else Branches() for row in rows))
        if isinstance(self.then, Exception):
            raise self.then
        return self.then


@pytest.mark.parametrize(
    ("then", "says"),
    [
        (RuntimeError("out of memory"), "out of memory"),
        (Draft((Branches.chosen([99], [-1]),)), "outside the vocabulary"),
        (Draft((Branches.chosen([0, 0], [1, -1]),)), "before its parent"),
        (Draft((Branches.chosen([0] * 99, range(-1, 98)),)), "99 tokens where"),
        (Draft(()), "0 trees for 1 rows"),
    ],
)
def test_a_drafter_that_fails_is_given_up_and_nothing_is_lost(then: Draft | Exception, says: str) -> None:
    speculation = Speculation(_Broken(then), Follow())
    with pytest.warns(UserWarning, match=says):
        fast = generate(TARGET, "ab", max_tokens=40, seed=2, speculate=speculation, ignore_eos=True)
    assert fast.tokens == generate(TARGET, "ab", max_tokens=40, seed=2, ignore_eos=True).tokens
    assert speculation.tally.failures == 1


def test_a_draft_over_another_vocabulary_is_given_up() -> None:
    with pytest.warns(UserWarning, match="different vocabularies"):
        made = generate(TARGET, "ab", seed=1, speculate=Speculation(DraftModel(TableModel.random(5, eos=True))))
    assert made.tokens == generate(TARGET, "ab", seed=1).tokens


def test_a_target_without_trees_takes_chains() -> None:
    target = TableModel.random(4, order=2, eos=True, seed=1, concentration=0.3)
    target.supports_trees = False
    plain = generate(target, "ab", max_tokens=20, seed=1, ignore_eos=True)
    speculation = Speculation(DraftModel(DRAFT, Chain(3)), Follow())
    assert generate(target, "ab", max_tokens=20, seed=1, ignore_eos=True, speculate=speculation).tokens == plain.tokens
    assert speculation.tally.accepted > 0
    with pytest.warns(UserWarning, match="takes chains only"):
        assert (
            generate(target, "ab", max_tokens=20, seed=1, ignore_eos=True, speculate="recycling").tokens == plain.tokens
        )


def test_cancelling_frees_what_the_drafter_remembers() -> None:
    drafter = PromptLookup()
    pieces = stream(TARGET, "ab", speculate=Speculation(drafter), ignore_eos=True, max_tokens=50)
    next(pieces)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert not drafter._seen


@pytest.mark.parametrize("rule", ["greedy", "temperature(0.9)"])
def test_the_bundled_pair(rule: str) -> None:
    """Everything at once on a network: a tree of nano's guesses and an n-gram's, verified by nano itself."""
    nano = nextoken.load("nano")
    plain = generate(nano, "It was the best of times", transform=rule, max_tokens=24, seed=5)
    drafts = [DraftModel(nano, Branching((3, 2, 1))), Recycling(), PromptLookup()]
    for drafter in drafts:
        speculation = Speculation(drafter, Follow())
        fast = generate(nano, "It was the best of times", transform=rule, max_tokens=24, seed=5, speculate=speculation)
        assert fast.tokens == plain.tokens
        assert speculation.tally.failures == 0
    ngram = NgramModel.from_text("It was the best of times, it was the worst of times.", nano.vocab, order=3)
    speculation = Speculation(DraftModel(ngram, Chain(4)))
    generate(nano, "It was the best of times", transform=rule, max_tokens=24, seed=5, speculate=speculation)
    assert speculation.tally.failures == 0


def test_lookup_guesses_what_followed_before() -> None:
    speculation = Speculation(PromptLookup(length=3, longest=2), Follow())
    cycle = TableModel.from_counts([[0, 1, 2, 3] * 5], ["a", "b", "c", "d"], order=1)
    generate(cycle, "abcdab", max_tokens=13, transform="greedy", speculate=speculation)
    tally = speculation.tally
    assert (tally.drafted, tally.accepted, tally.passes) == (9, 9, 3)


def test_recycling_learns_the_targets_successors() -> None:
    cycle = TableModel.from_counts([[0, 1, 2, 3] * 5], ["a", "b", "c", "d"], order=1)
    drafter = Recycling(k=2, widths=((2,), (1,), (1,)))
    speculation = Speculation(drafter)
    generate(cycle, "a", max_tokens=30, transform="greedy", speculate=speculation)
    assert drafter.successors is not None
    assert drafter.successors[:4, 0].tolist() == [1, 2, 3, 0]
    before = speculation.tally.passes
    generate(cycle, "a", max_tokens=29, transform="greedy", speculate=speculation)
    assert speculation.tally.passes - before == 7  # 28 tokens after the first, four a pass
    with pytest.raises(ValueError, match="asks for 3 successors"):
        Recycling(k=2, widths=((3,),))


def test_names() -> None:
    assert isinstance(named("recycling").drafter, Recycling)
    with pytest.raises(ValueError, match="no speculation 'medusa'"):
        named("medusa")


class Listening(Drafter):
    """Guesses nothing, and notes what it is told."""

    def __init__(self) -> None:
        self.prompts: dict[tuple[int, ...], list[float]] = {}
        self.states: set[int] = set()

    def propose(self, rows: Sequence[Row]) -> Draft:
        for row in rows:
            assert row.state is not None
            assert (*row.state.tokens[row.place], row.context[-1]) == row.context
        return Draft((Branches(),) * len(rows))

    def prompted(self, rows: Sequence[Row], said: Next) -> None:
        for number, row in enumerate(rows):
            assert row.state is None
            self.prompts[row.context] = said[number, len(row.context) - 1].log_probs()[0, 0].tolist()


def test_drafters_are_told_of_prompts_and_see_the_state_of_their_row() -> None:
    target = TableModel.random("abc", order=2, seed=0)
    drafter = Listening()
    speculation = Speculation(Census(drafter), Follow())
    loop = speculation.loop(target)
    asked = [(0, 1), (2,), (0, 1), (1, 1, 2)]
    for seed, prompt in enumerate(asked):
        loop.submit(Request(prompt, transform("temperature(1.0)"), 4, seed=seed))
    list(loop.run())
    assert speculation.tally.failures == 0
    assert set(drafter.prompts) == set(asked)
    for prompt, said in drafter.prompts.items():
        assert said == pytest.approx(target.predict([list(prompt)])[0, -1].log_probs()[0, 0].tolist())

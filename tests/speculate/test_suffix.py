"""The suffix automaton against a search of every suffix, and its guesses in the loop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.speculate.test_laws import EOS, LENGTH, TARGET, assert_law, law_of, outputs

import nextoken
from nextoken.decode.generate import generate
from nextoken.decode.loop import Loop
from nextoken.decode.request import Request, Running
from nextoken.model.table import TableModel
from nextoken.speculate.acceptance import Follow
from nextoken.speculate.draft import ROOT, Row
from nextoken.speculate.loop import Speculation
from nextoken.speculate.suffix import NOTHING, Automaton, SuffixAutomaton

texts = st.lists(st.integers(0, 2), max_size=14)


def ends(text: Sequence[int], run: Sequence[int]) -> list[int]:
    """Where the run ends in the text."""
    return [end for end in range(len(run), len(text) + 1) if list(text[end - len(run) : end]) == list(run)]


def guesses(text: Sequence[int], corpus: Sequence[Sequence[int]], length: int, shortest: int) -> list[int]:
    """What the drafter should guess, every suffix looked for everywhere."""
    found: list[int] = []
    flat = [token for number, row in enumerate(corpus) for token in (*row, -1 - number)]
    while len(found) < length:
        grown = [*text, *found]
        for size in range(len(grown), shortest - 1, -1):
            run = grown[len(grown) - size :]
            votes: dict[int, list[int]] = {}
            for end in ends(text, run):
                if end < len(text):
                    vote = votes.setdefault(text[end], [0, -1, -1])
                    vote[0], vote[1] = vote[0] + 1, end
            for end in ends(flat, run):
                if end < len(flat) and flat[end] >= 0:
                    vote = votes.setdefault(flat[end], [0, -1, -1])
                    vote[0], vote[2] = vote[0] + 1, end
            if votes:
                found.append(max(votes, key=lambda token: votes[token]))
                break
        else:
            break
    return found


def row(context: Sequence[int], *, room: int = 50, ticket: int = 0, ignore_eos: bool = True) -> Row:
    running = Running(ticket, Request((context[0],), max_tokens=100, ignore_eos=ignore_eos))
    return Row(running, tuple(context), room, torch.Generator())


@pytest.mark.paper("2411.10666")
@given(texts, texts)
def test_the_automaton_knows_every_run_and_where_it_occurs(text: list[int], probe: list[int]) -> None:
    automaton = Automaton()
    for token in text:
        automaton.read(token)
    assert len(automaton._next) <= max(2 * len(text), 2)
    match = NOTHING
    for end, token in enumerate(probe, 1):
        match = automaton.advance(match, token)
        longest = max(size for size in range(end + 1) if size == 0 or ends(text, probe[end - size : end]))
        assert match.length == longest
        run = probe[end - longest : end]
        if longest:
            after = [(text[at], at) for at in ends(text, run) if at < len(text)]
            assert set(automaton.following(match)) == {token for token, _ in after}
            for token in range(3):
                where = [at for other, at in after if other == token]
                assert automaton.occurrences(match, token) == (len(where), max(where, default=-1))


@pytest.mark.paper("2411.10666")
@given(st.lists(st.integers(0, 2), min_size=1, max_size=16), st.lists(texts, max_size=3), st.integers(1, 3), st.data())
def test_guesses_are_those_of_the_longest_suffix(
    text: list[int], corpus: list[list[int]], shortest: int, data: st.DataObject
) -> None:
    drafter = SuffixAutomaton(corpus=corpus, length=5, shortest=shortest)
    cuts = [*sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=3))), len(text)]
    for cut in cuts:  # the row grows between the calls
        (branches,) = drafter.propose([row(text[:cut])]).rows
        assert list(branches.tokens) == guesses(text[:cut], corpus, 5, shortest)
        assert branches.is_chain and branches.laws is None


def test_reading_takes_a_few_steps_a_token() -> None:
    """Steps, not seconds: transitions and links that are followed, over texts that are hard on naive search."""

    class Counted(list[int]):
        reads = 0

        def __getitem__(self, key):  # type: ignore[no-untyped-def,override]
            Counted.reads += 1
            return super().__getitem__(key)

    for text in ([0] * 3000, [0, 1] * 1500, [0] * 1500 + [1] + [0] * 1499, [n * n % 7 for n in range(3000)]):
        automaton = Automaton()
        automaton._link = Counted(automaton._link)
        Counted.reads = 0
        for token in text:
            automaton.read(token)
        assert Counted.reads <= 3 * len(text)


def test_a_text_that_repeats_itself_is_guessed_to_the_full_length() -> None:
    (branches,) = SuffixAutomaton(length=20).propose([row([5, 1, 2, 3, 1, 2, 3, 1])]).rows
    assert branches.tokens == (2, 3, 1) * 6 + (2, 3)
    assert branches.parents == tuple(range(ROOT, 19))


def test_the_text_and_the_corpus_vote_together() -> None:
    def first(corpus: list[list[int]], text: list[int]) -> int:
        (branches,) = SuffixAutomaton(corpus=corpus, length=1).propose([row(text)]).rows
        return branches.tokens[0]

    assert first([[1, 7], [1, 7]], [1, 4, 1]) == 7  # twice against once
    assert first([[1, 7]], [1, 4, 1]) == 4  # the text decides
    assert first([[1, 7], [1, 8]], [0, 1]) == 8  # else the later row
    assert first([[3, 1, 7]], [1, 4, 1, 4, 3, 1]) == 7  # a longer suffix above all
    assert not SuffixAutomaton(corpus=[[1], [2]]).propose([row([1])]).rows[0].tokens  # rows do not run into each other


def test_counts_go_on_with_the_text() -> None:
    drafter = SuffixAutomaton(length=1)
    assert drafter.propose([row([1, 4, 1, 7, 1])]).rows[0].tokens == (7,)  # once each, 7 the later
    assert drafter.propose([row([1, 4, 1, 7, 1, 4, 2, 1])]).rows[0].tokens == (4,)


def test_limits() -> None:
    drafter = SuffixAutomaton(length=9)
    drafter.check(TARGET)
    text = [0, EOS, 1, 0]
    assert drafter.propose([row(text, ignore_eos=False)]).rows[0].tokens == (EOS,)
    assert drafter.propose([row(text, ticket=1)]).rows[0].tokens[:3] == (EOS, 1, 0)
    assert drafter.propose([row(text, ticket=2, room=2)]).rows[0].tokens == (EOS, 1)
    assert not drafter.propose([row(text, ticket=3, room=0)]).rows[0].tokens
    drafter.leave(1)
    assert set(drafter._readers) == {0, 2, 3}
    for options in ({"length": 0}, {"shortest": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            SuffixAutomaton(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token ids, got -1"):
        SuffixAutomaton(corpus=[[1, -1]])
    with pytest.raises(ValueError, match="token 99"):
        SuffixAutomaton(corpus=[[1, 99], []]).check(TARGET)


@pytest.mark.paper("2411.10666")
@pytest.mark.parametrize("rule", ["", "temperature(0.7) | top_k(3)", "xtc(0.5, 0.1)", "greedy"])
def test_following_gives_the_very_tokens_of_plain_decoding(rule: str) -> None:
    plain = outputs(Loop(TARGET), rule, 40, length=30)
    for acceptance in ({}, {"acceptance": Follow()}):  # guesses are chosen, so that both rules follow them
        speculation = Speculation(SuffixAutomaton(corpus=[plain[0], plain[1]]), **acceptance)
        assert outputs(speculation.loop(TARGET), rule, 40, length=30) == plain
        assert speculation.tally.failures == 0
        assert speculation.tally.accepted > 0


@pytest.mark.paper("2411.10666")
def test_the_law_is_kept() -> None:
    speculation = Speculation(SuffixAutomaton(corpus=[[0, 1, 2, EOS, 0, 0, 1, 1, 2, 2]]))
    drawn = outputs(speculation.loop(TARGET, max_rows=256), "temperature(0.9)", 1500)
    assert_law(drawn, law_of(TARGET, "temperature(0.9)", LENGTH))


@pytest.mark.paper("2411.10666")
def test_a_corpus_of_the_answer_is_followed_to_its_end() -> None:
    target = TableModel.random(4, order=3, seed=1, concentration=0.2)
    (answer,) = outputs(Loop(target), "greedy", 1, length=41)
    speculation = Speculation(SuffixAutomaton(corpus=[(target.vocab.bos_id or 0, 0, 1, 0, *answer)], length=9))
    assert outputs(speculation.loop(target), "greedy", 1, length=41) == [answer]
    assert speculation.tally.passes == 4  # after the first token forty, ten a pass


def test_on_a_network() -> None:
    nano = nextoken.load("nano")
    plain = generate(nano, "one two one two one", transform="greedy", max_tokens=24)
    speculation = Speculation(SuffixAutomaton(corpus=[plain.tokens]))
    assert not speculation.drafter.needs_trees
    fast = generate(nano, "one two one two one", transform="greedy", max_tokens=24, speculate=speculation)
    assert fast.tokens == plain.tokens
    assert speculation.tally.failures == 0 and speculation.tally.tokens_per_pass > 3

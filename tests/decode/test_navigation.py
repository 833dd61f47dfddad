"""In-context navigation: brute force on a table, its control, and a model that listing moves and banning does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextoken.decode.generate import generate
from nextoken.decode.navigation import Listing, ban_only, navigate
from nextoken.head import Head
from nextoken.model.base import ABSENT, LanguageModel, Memory, NoMemory, State
from nextoken.model.next import HeadNext, Next
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab

BARE = Listing(opening="{instruction}", item="{answer}.", open_item="", stops=(".",))


class Attracted(LanguageModel):
    """Tokens a b c d, w x y z and a stop, with keys in two tight groups and a query that leaves what was listed.

    q = (3 - away * (listed ones of the first group), 2, 0), so that every listed one lowers the first group by `away`.
    After a letter comes the stop.
    """

    name = "attracted"
    supports_trees = False

    def __init__(self, away: float = 1.5) -> None:
        self.away = away
        self.vocab = Vocab([*(letter.encode() for letter in "abcdwxyz."), b""], bos_id=9)
        small = torch.arange(4) * 0.01
        keys = torch.zeros(10, 3)
        keys[:4, 0], keys[4:8, 1], keys[8, 2], keys[9, 2] = 1 - small, 1 - small, 9.0, -9.0
        self.head = Head(keys)

    def _remember(self, batch: int) -> Memory:
        return NoMemory()

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        hidden = torch.zeros(*tokens.shape, 3)
        for b, (before, fresh) in enumerate(zip(state.tokens, tokens.tolist(), strict=True)):
            for i, token in enumerate(fresh):
                if token != ABSENT and token < 8:
                    hidden[b, i, 2] = 9.0
                else:
                    listed = sum(0 <= t < 4 for t in (*before, *fresh[:i]))
                    hidden[b, i] = torch.tensor([3 - self.away * listed, 2.0, 0.0])
        return HeadNext(hidden, self.head)


def greedy(model: TableModel, context: tuple[int, ...], first: int, most: int) -> tuple[tuple[int, ...], str]:
    """The greedy continuation up to the stop, and its text, a token at a time."""
    stop, row = model.vocab.token_bytes.index(b"."), [first]
    while row[-1] != stop and row[-1] not in model.vocab.eos_ids and len(row) < most:
        row.append(int(model.row((*context, *row)).argmax()))
    return tuple(row), model.vocab.decode_text(row).partition(".")[0]


def by_hand(model: TableModel, runs: int, k: int, clean: bool, memory: int | None) -> list[tuple[tuple[int, ...], int]]:
    """(tokens, run) of every answer, from the definition."""
    found: list[tuple[tuple[int, ...], int]] = []
    listed: list[str] = []
    taken: set[int] = set()
    specials = model.vocab.specials
    for run in range(runs):
        told = listed if memory is None else listed[len(listed) - memory :] if memory < len(listed) else listed
        prompt = model.vocab.encode("a" + "".join(f"{answer}." for answer in told)).ids
        said = model.row(prompt).tolist()
        ranked = sorted(range(len(said)), key=lambda v: (-said[v], v))
        firsts = [v for v in ranked if v not in taken and v not in specials][:k]
        taken |= set(firsts)
        for first in firsts:
            tokens, text = greedy(model, model.vocab.encode("a").ids if clean else prompt, first, 6)
            found.append((tokens, run))
            if tokens[-1] == model.vocab.token_bytes.index(b".") and text:
                listed.append(text)
    return found


@pytest.mark.paper("2410.02284")
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("memory", [None, 2])
def test_equals_the_definition(clean: bool, memory: int | None) -> None:
    differs = 0
    for seed in range(12):
        model = TableModel.random(["a", "b", "c", "d", "e", "f", "."], order=3, eos=True, seed=seed)
        found = navigate(
            model, "a", runs=3, k=2, complete="clean" if clean else "navigated", listing=BARE, max_tokens=6,
            memory=memory,
        )  # fmt: skip
        assert [(a.tokens, a.run) for a in found.answers] == by_hand(model, 3, 2, clean, memory)
        control = ban_only(model, "a", runs=3, k=2, listing=BARE, max_tokens=6)
        differs += found.answers != control.answers
    assert differs > 6  # the listing is read


@pytest.mark.paper("2410.02284")
@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 4))
def test_the_first_run_is_plain_branching_and_first_tokens_never_repeat(seed: int, k: int, runs: int) -> None:
    model = TableModel.random(["a", "b", "c", "d", "."], order=2, eos=True, seed=seed)
    found = navigate(model, "a", runs=runs, k=k, listing=BARE, max_tokens=5)
    plain = ban_only(model, "a", runs=1, k=k, listing=BARE, max_tokens=5)
    assert tuple(a for a in found.answers if a.run == 0) == plain.answers
    firsts = [a.tokens[0] for a in found.answers]
    assert len(set(firsts)) == len(firsts) == min(5, runs * k)
    if runs * k >= 5:
        assert sorted(firsts) == [0, 1, 2, 3, 4]  # every token that is text


@given(st.integers(0, 50), st.integers(1, 3), st.integers(1, 3))
def test_the_control_is_branching_over_all_the_best_first_tokens(seed: int, k: int, runs: int) -> None:
    model = TableModel.random(["a", "b", "c", "d", "."], order=2, eos=True, seed=seed)
    control = ban_only(model, "b", runs=runs, k=k, listing=BARE, max_tokens=5)
    once = ban_only(model, "b", runs=1, k=runs * k, listing=BARE, max_tokens=5)
    assert [a.tokens for a in control.answers] == [a.tokens for a in once.answers]
    assert control.shifts == () and control.mean_shift is None
    ranks = [a.rank for a in control.answers]
    assert ranks == sorted(ranks) and all(a.rank == a.clean_rank for a in control.answers)


@pytest.mark.paper("2410.02284")
def test_listing_finds_what_banning_cannot() -> None:
    """Half of the first group is listed: then the second, which no ban brings forward, comes first."""
    model = Attracted(away=1.5)
    navigated = navigate(model, "", runs=3, k=2, listing=BARE).texts
    banned = ban_only(model, "", runs=3, k=2, listing=BARE).texts
    assert navigated == ("a", "b", "w", "x", "y", "z")
    assert banned == ("a", "b", "c", "d", "w", "x")


def test_shifts_are_the_difference_of_the_two_prompts() -> None:
    model = Attracted(away=1.5)
    found = navigate(model, "", runs=2, k=2, listing=BARE)
    logits = torch.tensor([[(3 - 1.5 * n) * (1 - 0.01 * i) for i in range(4)] for n in (0, 2)])
    other = torch.tensor([2 * (1 - 0.01 * i) for i in range(4)])
    both = torch.cat([logits, other.expand(2, 4), torch.zeros(2, 2)], 1).log_softmax(-1)
    (shift,) = found.shifts
    assert shift.run == 1
    assert shift.log_prob == pytest.approx(float((both[1, :2] - both[0, :2]).mean()), abs=1e-5)
    assert found.mean_shift == (shift.log_prob, shift.rank)
    # q = (0, 2, 0): a and b, first before, are tied with all but the second group, and ids break ties.
    assert shift.rank == 4.0
    assert navigate(Attracted(away=-1.0), "", runs=2, k=2, listing=BARE).shifts[0].log_prob > 0


def test_ids_are_appended_and_never_spelt_anew() -> None:
    """A forced `a` before `b` stays two tokens where a tokenizer would make one of them."""
    rows = {
        (): [0.6, 0.1, 0.2, 0.1],
        (0,): [0.1, 0.7, 0.1, 0.1],
        (1,): [0.1, 0.1, 0.1, 0.7],
        (2,): [0.1, 0.1, 0.1, 0.7],
    }
    model = TableModel.given(rows, ["a", "b", "ab", "."])
    found = navigate(model, "", runs=1, k=1, listing=BARE)
    assert [(a.tokens, a.text, a.finish) for a in found.answers] == [((0, 1, 3), "ab", "stop")]


def test_a_stop_is_found_within_tokens_and_may_be_the_first() -> None:
    rows = {(): [0.5, 0.3, 0.2], (0, 0): [0.1, 0.8, 0.1]}
    model = TableModel.given(rows, ["a", 'b"c', 'd"'])
    (first, second, third) = navigate(model, "a", runs=1, k=3, listing=Listing("", "", "a")).answers
    assert (first.text, first.tokens, first.finish) == ("ab", (0, 1), "stop")
    assert (second.text, second.tokens) == ("b", (1,)) and (third.text, third.tokens) == ("d", (2,))


def test_answers_without_an_end_are_not_listed() -> None:
    model = TableModel.given({(): [0.9, 0.1]}, ["a", "b"])
    found = navigate(model, "", runs=2, k=1, listing=Listing("a", "{answer}", "", ("!",)), max_tokens=3)
    assert [(a.text, a.finish) for a in found.answers] == [("aaa", "length"), ("baa", "length")]
    assert found.shifts == ()
    told = Listing("a", "{answer}", "", ("!",), lists_unfinished=True)
    assert len(navigate(model, "", runs=2, k=1, listing=told, max_tokens=3).shifts) == 1


def test_ends_and_full_contexts() -> None:
    model = TableModel.given({(): [0.6, 0.4, 0.0], (0,): [0.0, 0.0, 1.0]}, ["a", "b"], eos=True)
    first, second = navigate(model, "b", runs=1, k=5, listing=BARE, max_tokens=9).answers
    assert (first.tokens, first.finish) == ((0, 3), "eos")  # impossible tokens are not taken
    assert (second.tokens, second.finish) == ((1, 0, 3), "eos")
    model.context_length = 4
    endless = TableModel.given({(): [1.0]}, ["a"])
    endless.context_length = 4
    (answer,) = navigate(endless, "a", runs=1, k=1, listing=BARE).answers
    assert (len(answer.tokens), answer.finish) == (3, "context")
    assert generate(endless, "a", transform="greedy", max_tokens=9).tokens == answer.tokens
    with pytest.raises(ValueError, match="memory"):
        navigate(endless, "aaaa", listing=BARE)


def test_tokens_of_equal_bytes_are_one() -> None:
    model = TableModel.given({(): [0.4, 0.35, 0.25]}, ["a", "a", "."])
    assert [a.tokens[0] for a in navigate(model, "", runs=1, k=3, listing=BARE, max_tokens=1).answers] == [0, 2]


def test_the_default_listing_is_that_of_the_paper() -> None:
    assert Listing().prompt("Some leagues:", ["NBA", "NFL"]) == 'Some leagues:\n\nAnswer:\n1. "NBA"\n2. "NFL"\n3. "'


@pytest.mark.parametrize("options", [{"runs": 0}, {"k": 0}, {"max_tokens": 0}, {"memory": -1}, {"complete": "both"}])
def test_misuse_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        navigate(TableModel.random(3, seed=0), "a", listing=BARE, **options)  # type: ignore[arg-type]

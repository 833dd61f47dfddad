"""Reencoded: whatever the two vocabularies, the target's law; settled tokens are those that more text leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.speculate.test_laws import assert_law, law_of, outputs

import nextoken
from nextoken.decode.generate import generate
from nextoken.decode.loop import Loop
from nextoken.decode.request import Request, Running
from nextoken.model.aligned import Aligned
from nextoken.model.alignment import Alignment
from nextoken.model.table import TableModel
from nextoken.model.vocab import Encoding, Vocab
from nextoken.speculate import Chain, DraftModel, Follow, Recursive, Reencoded, Row, Speculation
from nextoken.speculate.draft import Branches
from nextoken.speculate.reencoded import _complete
from nextoken.testing import check_speculation

LETTERS = TableModel.random(["a", "b", "c"], order=2, eos=True, seed=1, name="letters")
"""The target of `test_laws`."""
PIECES = ["a", "b", "c", "ab", "bca", "cc"]


def pieces(seed: int = 3, **options: float) -> TableModel:
    return TableModel.random(PIECES, order=1, eos=True, seed=seed, name="pieces", **options)


@pytest.mark.paper("2502.05202")
@pytest.mark.parametrize("rule", [Recursive(), Follow()], ids=["recursive", "follow"])
def test_the_law_is_kept_across_vocabularies(rule: Recursive | Follow) -> None:
    """Strings against enumeration, false alarm 1e-4; the prompts of `test_laws`."""
    speculation = Speculation(Reencoded(pieces()), rule)
    drawn = outputs(speculation.loop(LETTERS, max_rows=256), "temperature(0.9)", 2000)
    assert_law(drawn, law_of(LETTERS, "temperature(0.9)", 4))
    assert speculation.tally.failures == 0
    assert speculation.tally.accepted > 0


@pytest.mark.paper("2502.05202")
@pytest.mark.parametrize("swapped", [False, True])
def test_the_proofs_hold(swapped: bool) -> None:
    target, draft = (pieces(), LETTERS) if swapped else (LETTERS, pieces())
    made: list[Speculation] = []

    def speculation() -> Speculation:
        made.append(Speculation(Reencoded(draft, length=4)))
        return made[-1]

    check_speculation(target, speculation, draws=300, prompts=2)
    assert sum(one.tally.failures for one in made) == 0


@pytest.mark.parametrize("rule", ["", "temperature(0.7) | top_k(3)", "greedy"])
def test_the_tokens_are_those_of_plain_decoding(rule: str) -> None:
    for draft in (pieces(), TableModel.random(["x", "y"], order=1, seed=0), LETTERS):
        speculation = Speculation(Reencoded(draft), Follow())
        plain = outputs(Loop(LETTERS), rule, 20, length=25)
        assert outputs(speculation.loop(LETTERS), rule, 20, length=25) == plain
        assert speculation.tally.failures == 0


def cycle(symbols: list[str], text: str) -> TableModel:
    """Says the text again and again, greedily, in its own tokens."""
    vocab = Vocab([symbol.encode() for symbol in symbols])
    return TableModel.from_counts([list(vocab.encode(text * 12).ids)], symbols, order=2)


@pytest.mark.paper("2502.05202")
def test_a_draft_that_says_the_same_in_other_pieces_is_mostly_right() -> None:
    """Of abcde, in letters and in pieces that cross: it goes wrong only where a text ends within a piece."""
    in_letters, in_pieces = cycle(list("abcde"), "abcde"), cycle(["a", "b", "c", "d", "e", "ab", "cde"], "abcde")
    for target, draft, each in ((in_letters, in_pieces, 3), (in_pieces, in_letters, 1.5)):
        speculation = Speculation(Reencoded(draft, length=4), Follow())
        made = generate(target, "abcde", max_tokens=40, transform="greedy", speculate=speculation)
        assert made.text.startswith("abcdeabcde")
        assert speculation.tally.accepted > 0.6 * speculation.tally.drafted
        assert speculation.tally.tokens_per_pass > each


@pytest.mark.paper("2502.05202")
def test_it_guesses_where_alignment_has_no_counterpart() -> None:
    """The draft speaks in pairs, of which the target has none: aligned by equal bytes it has nothing to say."""
    target, draft = cycle(list("abcd"), "abcd"), cycle(["ab", "cd", *"abcd"], "abcd")
    again = Speculation(Reencoded(draft, length=3), Follow())
    generate(target, "abcd", max_tokens=41, transform="greedy", speculate=again)
    aligned = Aligned(draft, target.vocab, Alignment.exact(draft.vocab, target.vocab))
    brought = Speculation(DraftModel(aligned, Chain(6)), Follow())
    generate(target, "abcd", max_tokens=41, transform="greedy", speculate=brought)
    assert again.tally.tokens_per_pass > 1.5 * brought.tally.tokens_per_pass
    assert brought.tally.failures == 0


def test_with_one_vocabulary_it_is_a_greedy_chain() -> None:
    target = TableModel.random(4, order=2, eos=True, seed=1, concentration=0.3)
    draft = TableModel.random(4, order=1, eos=True, seed=2, concentration=0.3)
    ours, chain = Speculation(Reencoded(draft, length=4), Follow()), Speculation(DraftModel(draft, Chain(4)), Follow())
    for speculation in (ours, chain):
        generate(target, "ab", n=5, max_tokens=30, transform="greedy", ignore_eos=False, speculate=speculation)
    assert ours.tally == chain.tally


WORDS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)


@given(words=WORDS, text=st.text("abc", max_size=8), more=st.text("abc", max_size=6))
def test_settled_tokens_stay_whatever_follows(words: list[str], text: str, more: str) -> None:
    """For a vocabulary that spells by longest tokens: exactly those that no continuation changes."""
    symbols = sorted({*"abc", *words})
    target = TableModel.random(symbols, order=0)
    drafter = Reencoded(LETTERS)
    drafter.check(target)
    settled = drafter._encoded((target.vocab.bos_id or 0,), text.encode(), is_over=False)
    assert settled is not None
    assert list(target.vocab.encode(text + more).ids[: len(settled)]) == settled
    whole = list(target.vocab.encode(text).ids)
    if len(settled) < len(whole):  # the next could have become another token
        rest = text.encode()[len(target.vocab.decode(settled)) :]
        assert any(spelled.startswith(rest) and spelled != rest for spelled in target.vocab.token_bytes)
    assert drafter._encoded((target.vocab.bos_id or 0,), text.encode(), is_over=True) == whole


def test_the_last_tokens_of_the_text_keep_their_boundary() -> None:
    target = TableModel.random(["a", "b", "c", "ab"], order=0)
    drafter = Reencoded(LETTERS)
    drafter.check(target)
    assert drafter._encoded((2, 3), b"cab", is_over=True) == [2, 3]  # c, ab | c, ab
    assert drafter._encoded((2, 0), b"bcab", is_over=True) == [1, 2, 3]  # c, a | b: not the ab that it would be
    assert drafter._encoded((2, 0), b"bca", is_over=False) == [1, 2]  # the last a may become ab
    assert drafter._encoded((2, 0), b"xx", is_over=True) is None


class _WordBegins(Vocab):
    """Spells b at the beginning of what is encoded by another token than elsewhere, as many tokenizers do."""

    def encode(self, text: str | bytes) -> Encoding:
        found = super().encode(text)
        ids = tuple(2 if token == 1 and number else token for number, token in enumerate(found.ids))
        return Encoding(ids, found.starts, found.ends)


def test_guesses_are_encoded_with_what_stands_before() -> None:
    target = TableModel.random(["a", "b", "b"], order=0)
    target.vocab = _WordBegins(target.vocab.token_bytes, bos_id=target.vocab.bos_id)
    drafter = Reencoded(LETTERS)
    drafter.check(target)
    assert drafter._encoded((0,), b"bb", is_over=True) == [2, 2]


def test_characters_in_pieces() -> None:
    whole = "é€😀".encode()
    for end in range(len(whole) + 1):
        text = _complete(whole[:end])
        assert whole.startswith(text) and len(whole[:end]) - len(text) < 4
        text.decode()
    bytewise = TableModel.random([bytes([b]) for b in sorted(set("é€ab".encode()))], order=0, seed=1)
    target = TableModel.random(["é", "€", "a", "b"], order=1, seed=2)
    for one, other in ((bytewise, target), (target, bytewise)):
        speculation = Speculation(Reencoded(other), Follow())
        plain = generate(one, "aé€", n=4, max_tokens=20, seed=1)
        fast = generate(one, "aé€", n=4, max_tokens=20, seed=1, speculate=speculation)
        assert [each.tokens for each in fast] == [each.tokens for each in plain]
        assert speculation.tally.failures == 0


def test_an_end_of_the_draft_is_an_end_of_the_target() -> None:
    table = torch.zeros(4, 4, dtype=torch.float64)
    table[:, 1], table[1, 3], table[1, 1] = 1.0, 1.0, 0.0  # b, then the end
    draft, target = TableModel(table, ["a", "b"], eos=True), TableModel.random(["b", "a", "bb"], eos=True)
    drafter = Reencoded(draft)
    drafter.check(target)
    for ignore, expected in ((False, (0, 4)), (True, (0,))):
        request = Request((3, 1), ignore_eos=ignore)
        row = Row(Running(0, request), (3, 1), 9, torch.Generator())
        (branches,) = drafter.propose([row]).rows
        assert branches == Branches.chosen(expected, range(-1, len(expected) - 1))


def test_a_full_context_of_the_draft_is_read_from_a_later_place() -> None:
    draft = cycle(["a", "b", "c", "d", "ab"], "abcd")
    draft.context_length = 12
    speculation = Speculation(Reencoded(draft, length=4), Follow())
    generate(cycle(list("abcd"), "abcd"), "abcd", max_tokens=60, transform="greedy", speculate=speculation)
    assert speculation.tally.failures == 0
    assert speculation.tally.accepted > 30


def test_the_bundled_model_drafts_for_another_vocabulary() -> None:
    nano = nextoken.load("nano")
    target = TableModel.random(list("abcdefghijklmnopqrstuvwxyz ,."), order=1, seed=0, concentration=0.2)
    speculation = Speculation(Reencoded(nano, length=4), Follow())
    plain = generate(target, "it was the", max_tokens=20, seed=2)
    assert generate(target, "it was the", max_tokens=20, seed=2, speculate=speculation).tokens == plain.tokens
    assert speculation.tally.failures == 0
    back = Speculation(Reencoded(target, length=6), Follow())
    told = generate(nano, "it was the", max_tokens=16, seed=2, speculate=back)
    assert told.tokens == generate(nano, "it was the", max_tokens=16, seed=2).tokens
    assert back.tally.failures == 0


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        Reencoded(LETTERS, length=0)
    with pytest.raises(ValueError, match="how texts begin"):
        Reencoded(LETTERS, begin=())

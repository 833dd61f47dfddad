"""What holds of every constraint, and the conjunction of any two."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextoken.constrain import Constraint, JsonSchema, Lark, Place, Predicate, Regex
from nextoken.model.vocab import Vocab

pytest.importorskip("llguidance")
TEXTS = ["".join(letters) for size in range(7) for letters in itertools.product("ab", repeat=size)]
VOCAB = Vocab([b"a", b"b", b"ab", b"ba", b"aab", b"", b"", b"bbbb"], bos_id=5, eos_ids=[6])


def one_by_one(place: Place, vocab: Vocab) -> torch.Tensor:
    return torch.tensor([place.allows(token, vocab) for token in range(vocab.size)])


def few(text: str) -> bool:
    return len(text) <= 4


KINDS: dict[str, Constraint] = {
    "regex": Regex("(ab|b)*a?"),
    "other regex": Regex("a*b*|(ba)+"),
    "predicate": Predicate(lambda text: text.count("a") == 2, viable=lambda text: text.count("a") <= 2),
    "no viable": Predicate(lambda text: text.endswith("b")),
    "grammar": Lark('start: | "a" start "b"'),
}


@pytest.mark.parametrize(("first", "second"), itertools.product(KINDS, repeat=2))
def test_a_conjunction_holds_what_both_hold(first: str, second: str) -> None:
    both = KINDS[first] & KINDS[second]
    for text in TEXTS:
        assert both.complete(text) == (KINDS[first].complete(text) and KINDS[second].complete(text))
        assert both.viable(text) == (KINDS[first].viable(text) and KINDS[second].viable(text))
    for text in ("", "a", "ab", "abb"):
        place = both.start().advance(text.encode())
        if place is not None:
            assert torch.equal(place.allowed(VOCAB), one_by_one(place, VOCAB))


def test_a_conjunction_of_three_asks_the_last_only_about_what_is_left() -> None:
    asked: list[str] = []

    def viable(text: str) -> bool:
        asked.append(text)
        return True

    three = Regex("a*b") & Lark('start: "a" "a" "b"') & Predicate(lambda text: True, viable=viable)
    place = three.start().advance(b"a")
    assert place is not None
    asked.clear()
    assert place.allowed(VOCAB).nonzero()[:, 0].tolist() == [0, 2]
    assert asked == ["aa", "aab"]
    asked.clear()
    assert place.allows(0, VOCAB) and not place.allows(1, VOCAB) and asked == ["aa"]
    assert repr(three) == (
        'Regex(\'a*b\') & Lark(\'start: "a" "a" "b"\') & '
        "Predicate(test_a_conjunction_of_three_asks_the_last_only_about_what_is_left.<locals>.<lambda>, "
        "viable=test_a_conjunction_of_three_asks_the_last_only_about_what_is_left.<locals>.viable)"
    )


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_a_constraint_is_decided_byte_by_byte(kind: str, data: st.DataObject) -> None:
    """Completeness implies viable beginnings; cutting the bytes elsewhere changes nothing; old places stay."""
    constraint, text = KINDS[kind], data.draw(st.sampled_from(TEXTS)).encode()
    if constraint.complete(text):
        assert all(constraint.viable(text[:size]) for size in range(len(text)))
    cut = data.draw(st.integers(0, len(text)))
    start = constraint.start()
    half, whole = start.advance(text[:cut]), start.advance(text)
    again = None if half is None else half.advance(text[cut:])
    assert (again is None) == (whole is None)
    if again is not None and whole is not None and half is not None:
        assert again.is_complete == whole.is_complete
        mask = whole.allowed(VOCAB)
        assert torch.equal(again.allowed(VOCAB), mask)
        assert [whole.allows(token, VOCAB) for token in range(VOCAB.size)] == mask.tolist()
        again.advance(b"a"), again.advance(b"b")
        assert torch.equal(again.allowed(VOCAB), mask) and again.is_complete == whole.is_complete
    assert start.is_complete == constraint.complete("")


def test_specials_are_never_allowed_and_ends_where_it_is_complete() -> None:
    for constraint in (
        Regex("a*"),
        Predicate(few),
        Lark('start: "a"*'),
        JsonSchema({"const": 1}),
        Regex("a") & Regex("a|"),
    ):
        place = constraint.start()
        for narrowed in (place.allowed(VOCAB), place.narrow(torch.ones(VOCAB.size, dtype=torch.bool), VOCAB)):
            assert not narrowed[5] and bool(narrowed[6]) == constraint.complete("")

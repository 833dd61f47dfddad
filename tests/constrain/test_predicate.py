"""Predicate: text is asked about only where it is text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextoken.constrain import Predicate, Regex
from nextoken.model.vocab import Vocab

PALINDROME = Predicate(lambda text: text == text[::-1])


def test_it_is_the_function_on_every_text() -> None:
    for size in range(6):
        for letters in itertools.product("ab", repeat=size):
            text = "".join(letters)
            assert PALINDROME.complete(text) == (text == text[::-1])
            assert PALINDROME.viable(text)


def test_a_predicate_of_a_regex_is_that_regex() -> None:
    regex = Regex("(aé)*b?")
    predicate = Predicate(regex.complete, viable=regex.viable)
    for size in range(5):
        for letters in itertools.product("aéb", repeat=size):
            text = "".join(letters)
            assert (predicate.complete(text), predicate.viable(text)) == (regex.complete(text), regex.viable(text))


# One character of each 64, which differ in their last byte.
SOME = [chr(c).encode() for c in (*range(0x80), *range(0x80, 0x110000, 64)) if not 0xD800 <= c < 0xE000]
STARTS = {spelled[:size] for spelled in SOME for size in range(len(spelled) + 1)}


def test_bytes_of_a_character_are_viable_if_some_character_has_them() -> None:
    asked: list[str] = []
    predicate = Predicate(lambda text: True, viable=lambda text: asked.append(text) or True)
    pairs = {bytes([lead, second]) for lead in range(0xC0, 256) for second in (*range(0x40), *range(0xC0, 256))}
    pairs |= {bytes([lead, second]) for lead in range(0xE0, 256) for second in range(0x80, 0xC0)}
    threes = {bytes([lead, second, 0x80]) for lead in range(0xE0, 256) for second in range(0x70, 0xD0)}
    for some in [*({bytes([b]) for b in range(256)} | pairs | threes)]:
        assert predicate.viable(some) == (some in STARTS or _ends_a_character(some)), some
    assert "\ufffd" not in "".join(asked)


def _ends_a_character(some: bytes) -> bool:
    return any(
        some[:size] in STARTS and _whole(some[:size]) and some[size:] in STARTS for size in range(1, len(some) + 1)
    )


def _whole(some: bytes) -> bool:
    try:
        return len(some.decode()) == 1
    except UnicodeDecodeError:
        return False


@given(st.text(max_size=6), st.data())
def test_functions_see_whole_characters_only(text: str, data: st.DataObject) -> None:
    asked: list[str] = []
    predicate = Predicate(
        lambda t: asked.append(t) or t == text, viable=lambda t: asked.append(t) or text.startswith(t)
    )
    place, left = predicate.start(), text.encode()
    while left:
        size = data.draw(st.integers(1, len(left)))
        following = place.advance(left[:size])
        assert following is not None
        place, left = following, left[size:]
        assert place.is_complete == (not left)
    assert all(text.startswith(t) for t in asked)
    # Once for each text: what a byte within a character adds is nothing to ask about.
    assert len(asked) <= 2 * (len(text) + 1)


def test_exceptions_tell_which_text_was_asked_about() -> None:
    def viable(text: str) -> bool:
        raise KeyError(text)

    with pytest.raises(KeyError) as caught:
        Predicate(bool, viable=viable).viable("ab")
    (note,) = caught.value.__notes__
    assert "`viable`" in note and "'ab'" in note and "viable=" in note
    with pytest.raises(ZeroDivisionError) as divided:
        Predicate(lambda text: 1 / len(text) > 0).complete("")
    assert "`complete`" in divided.value.__notes__[0]


def test_any_truth_value_will_do() -> None:
    assert Predicate(len).complete("a") and not Predicate(len).complete("")
    vocab = Vocab([b"a", b""], eos_ids=[1])
    assert Predicate(len, viable=len).start().allowed(vocab).tolist() == [True, False]


def test_misuse_is_refused() -> None:
    for settings in ((None, None), ("a", None), (len, "a")):
        with pytest.raises(ValueError, match="is a function of a text"):
            Predicate(settings[0], viable=settings[1])  # type: ignore[arg-type]

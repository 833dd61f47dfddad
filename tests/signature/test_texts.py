"""Texts on their way in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextoken.errors import InputError
from nextoken.signature.texts import TextInfo, decoded, incoming


@given(st.binary(max_size=40))
def test_replaced_bytes_are_counted(data: bytes) -> None:
    """Oracle: bytes that Python's decoder would have dropped."""
    text = decoded(data, "x")
    text.data.decode()
    assert text.replaced == len(data) - len(data.decode(errors="ignore").encode())
    assert (text.replaced == 0) == (text.data == data)


def test_a_replacement_character_in_the_text_is_not_an_error() -> None:
    assert decoded("a\ufffdb".encode(), "x").replaced == 0
    assert decoded("a\ufffd".encode() + b"\xff", "x").replaced == 1


def test_unpaired_surrogates() -> None:
    text = decoded("a\ud800b", "x")
    assert (text.data, text.replaced) == ("a\ufffdb".encode(), 1)
    with pytest.raises(InputError, match="x: not valid Unicode, an unpaired surrogate at character 1"):
        decoded("a\ud800b", "x", strict=True)


def test_strict_names_the_byte() -> None:
    with pytest.raises(InputError, match="page: not UTF-8, byte 0xff at 2"):
        list(incoming([b"ab\xff"], ["page"], strict=True))


def test_one_text_or_many() -> None:
    assert [text.name for text in incoming("abc")] == ["text-0"]
    assert [text.data for text in incoming(b"abc")] == [b"abc"]
    assert [text.data for text in incoming(iter(["a", b"b"]))] == [b"a", b"b"]
    assert [text.name for text in incoming("abc", "poem")] == ["poem"]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_as_many_names_as_texts(names: list[str], lazy: bool) -> None:
    with pytest.raises(ValueError, match="one name per text"):
        list(incoming(iter(["x", "y"]) if lazy else ["x", "y"], iter(names) if lazy else names))


def test_only_text_is_text() -> None:
    with pytest.raises(TypeError, match="text-1: a text is str or bytes, got int"):
        list(incoming(["a", 3]))  # type: ignore[list-item]


@given(st.text(), st.binary(), st.binary())
def test_infos_survive_json(name: str, prefix: bytes, suffix: bytes) -> None:
    info = TextInfo(name, prefix, suffix, size=3, replaced=1, n_rows=2, digest="ab")
    assert TextInfo.from_dict(info.as_dict()) == info

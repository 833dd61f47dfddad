"""Vocab: spelling by longest match, specials, labels, digest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextoken.model.vocab import Encoding, Vocab

SYMBOLS = [b"a", b"b", b"ab", b"abb", " é".encode(), b"\xc3", b"\xa9", b" ", b"", b""]


@pytest.fixture
def vocab() -> Vocab:
    return Vocab(SYMBOLS, labels={8: "<bos>"}, bos_id=8, eos_ids=[9])


def test_the_longest_token_wins(vocab: Vocab) -> None:
    assert vocab.encode("abbab é") == Encoding((3, 2, 4), (0, 3, 5), (3, 5, 8))
    assert vocab.encode("aé").ids == (0, 5, 6)
    assert len(vocab.encode("")) == 0


def test_bytes_without_a_token_are_refused(vocab: Vocab) -> None:
    with pytest.raises(ValueError, match=r"byte b'x' at 2 has no token"):
        vocab.encode("abx")


def test_labels_and_decoding(vocab: Vocab) -> None:
    assert vocab.size == 10 and vocab.specials == {8, 9}
    assert [vocab.label(i) for i in (0, 4, 5, 8, 9)] == ["a", " é", "\\xc3", "<bos>", "<9>"]
    assert vocab.decode([8, 2, 5, 6, 9]) == "abé".encode()
    assert vocab.decode_text([0, 5, 1]) == "a\ufffdb"


def test_chat_needs_a_template(vocab: Vocab) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        vocab.chat([{"role": "user", "content": "hello"}])


@given(st.lists(st.sampled_from([b"a", b"b", b" ", " é".encode()]), max_size=20).map(b"".join))
def test_decoding_undoes_encoding(data: bytes) -> None:
    vocab = Vocab(SYMBOLS, bos_id=8)
    encoding = vocab.encode(data)
    assert vocab.decode(encoding.ids) == data
    assert b"".join(data[s:e] for s, e in zip(encoding.starts, encoding.ends, strict=True)) == data


def test_digest_covers_bytes_and_begin_and_end() -> None:
    digests = {
        Vocab([b"a", b"b", b""], bos_id=2).digest,
        Vocab([b"a", b"b", b""], bos_id=2, eos_ids=[2]).digest,
        Vocab([b"a", b"b", b""]).digest,
        Vocab([b"ab", b"", b""], bos_id=2).digest,
        Vocab([b"b", b"a", b""], bos_id=2).digest,
    }
    assert len(digests) == 5
    assert Vocab([b"a", b"b", b""], bos_id=2, labels={2: "<s>"}).digest in digests

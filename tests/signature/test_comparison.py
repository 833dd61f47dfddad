"""compare(): two tokenizers, the same bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.model.base import LanguageModel, NoMemory, State
from nextoken.model.next import DenseNext, Next
from nextoken.model.vocab import Vocab


class _Bytes(LanguageModel):
    """Tokens are strings over four letters, and p(token | before) is the product of the probabilities of its letters.

    What is left goes to a token that never comes, so that any vocabulary gives a text the same probability.
    """

    def __init__(self, name: str, tokens: list[str], letters: list[float], bos: bool = True) -> None:
        self.name = name
        spelled = [token.encode() for token in tokens]
        self.vocab = Vocab([*spelled, b"", b""], bos_id=len(spelled) + 1 if bos else None)
        self.logp = [sum(math.log(letters["abcd".index(c)]) for c in token) for token in tokens]

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: torch.Tensor, parents: torch.Tensor | None) -> Next:
        rest = math.log(1 - sum(map(math.exp, self.logp)))
        row = torch.tensor([*self.logp, rest, -math.inf], dtype=torch.float64)
        return DenseNext(row.expand(*tokens.shape, -1))


LETTERS = [0.2, 0.15, 0.1, 0.05]
FINE = _Bytes("fine", ["a", "b", "c", "d", "ab"], LETTERS)
COARSE = _Bytes("coarse", ["a", "b", "c", "d", "abc", "bc", "cd", "dd"], LETTERS)
OTHER = _Bytes("other", ["a", "b", "c", "d", "da"], [0.1, 0.1, 0.1, 0.1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("abcd", max_size=20), max_size=5))
def test_equivalent_models_have_equal_totals(texts: list[str]) -> None:
    a, b = nextoken.read(FINE, texts), nextoken.read(COARSE, texts)
    found = nextoken.compare(a, b)
    np.testing.assert_allclose(found.column("difference"), 0, atol=1e-5)
    figures = found.summary()
    assert figures["nats_a"] == pytest.approx(a.summary()["nats"], rel=1e-6)
    assert figures["nats_b"] == pytest.approx(b.summary()["nats"], rel=1e-6)
    assert (figures["tokens_a"], figures["tokens_b"]) == (len(a), len(b))
    assert figures["bytes"] == sum(map(len, texts)) and figures["skipped"] == 0


@settings(max_examples=40, deadline=None)
@given(st.text("abcd", max_size=30), st.booleans(), st.booleans())
def test_the_segments_are_the_finest_common_ones(text: str, bos_a: bool, bos_b: bool) -> None:
    """Oracle: walk along the bytes with sets of token ends."""
    a, b = nextoken.read(COARSE, text, bos=bos_a), nextoken.read(OTHER, text, bos=bos_b)
    ends = [{len(s.texts[0].prefix), *s.column("byte_end").tolist()} for s in (a, b)]
    common = [place for place in range(len(text) + 1) if all(place in side for side in ends)]
    found = nextoken.compare(a, b)
    assert found.column("byte_start").tolist() == common[:-1]
    assert found.column("byte_end").tolist() == common[1:]
    for row in found.table.to_pylist():
        assert row["bytes"] == text.encode()[row["byte_start"] : row["byte_end"]]
        for side, signature in (("a", a), ("b", b)):
            inside = [r for r in signature.table.to_pylist() if row["byte_start"] < r["byte_end"] <= row["byte_end"]]
            assert row[f"tokens_{side}"] == len(inside)
            assert row[f"nats_{side}"] == pytest.approx(-sum(r["logprob"] for r in inside))
        assert row["difference"] == row["nats_a"] - row["nats_b"]
    assert found.summary()["skipped"] == (common[0] if common else len(text))


def test_by_hand() -> None:
    found = nextoken.compare(nextoken.read(FINE, "abcda"), nextoken.read(COARSE, "abcda"))
    assert found.column("bytes").tolist() == [b"abc", b"d", b"a"]
    assert found.column("tokens_a").tolist() == [2, 1, 1] and found.column("tokens_b").tolist() == [1, 1, 1]
    assert found.models == ("fine", "coarse") and found.names == ("text-0",)
    with pytest.raises(KeyError, match="there are text_id"):
        found.column("kl")


def test_a_better_model_is_seen_to_be_better() -> None:
    found = nextoken.compare(nextoken.read(OTHER, "aaaa"), nextoken.read(FINE, "aaaa")).summary()
    assert found["bits_per_byte_a"] == pytest.approx(math.log2(10))
    assert found["bits_per_byte_b"] == pytest.approx(math.log2(5))
    assert found["difference"] == pytest.approx(1.0) and found["b_better"] == 1.0


def test_the_same_signature_differs_by_nothing() -> None:
    signature = nextoken.read(FINE, ["abcd", "", "dd"])
    found = nextoken.compare(signature, signature)
    assert len(found) == len(signature) and (found.column("difference") == 0).all()


def test_tokens_without_bytes_count_with_those_before() -> None:
    """As a tokenizer gives that has several tokens for one character, or one for a space it adds in front."""

    class Odd(Vocab):
        def encode(self, text: str | bytes) -> object:  # type: ignore[override]
            from nextoken.model.vocab import Encoding

            return Encoding((0, 1, 2, 3, 3), (0, 0, 0, 1, 1), (0, 1, 1, 2, 2))

    odd = _Bytes("odd", ["a", "b", "c", "d"], LETTERS)
    odd.vocab = Odd(odd.vocab.token_bytes, bos_id=5)
    signature = nextoken.read(odd, "dd")
    assert signature.text() == "dd" and signature.column("token").tolist() == [b"", b"d", b"", b"d", b""]
    found = nextoken.compare(signature, nextoken.read(FINE, "dd"))
    assert found.column("tokens_a").tolist() == [3, 2] and found.column("tokens_b").tolist() == [1, 1]
    assert found.summary()["nats_a"] == pytest.approx(signature.summary()["nats"])


def test_different_texts_are_told_apart() -> None:
    a = nextoken.read(FINE, ["ab", "abcd"])
    with pytest.raises(ValueError, match=r"text 1 \('text-1'\) differs at byte 2, b'cd' in the first and b'dd'"):
        nextoken.compare(a, nextoken.read(COARSE, ["ab", "abdd"]))
    with pytest.raises(ValueError, match=r"differs at byte 3, b'd' in the first and b'' in the second"):
        nextoken.compare(a, nextoken.read(COARSE, ["ab", "abc"]))
    with pytest.raises(ValueError, match="2 in the first and 1 in the second"):
        nextoken.compare(a, nextoken.read(COARSE, ["ab"]))

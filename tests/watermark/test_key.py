"""Key: what it gives is uniform, stable and separate for each purpose; its secret shows nowhere."""

from __future__ import annotations

import base64
import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

import nextoken
from nextoken.decode.scaling import Temperature
from nextoken.model.table import TableModel
from nextoken.watermark.exponential import ExponentialWatermark
from nextoken.watermark.gumbel import GumbelWatermark
from nextoken.watermark.inverse_transform import InverseTransformWatermark
from nextoken.watermark.key import Key
from nextoken.watermark.watermark import Watermark

SECRET = b"\x8f\x1a\xe3Zq\x07 not to be told \xd2\x90\x05"
MARKS: list[Callable[[Key], Watermark]] = [
    ExponentialWatermark,
    lambda key: InverseTransformWatermark(key, vocab_size=5),
    GumbelWatermark,
]


def test_numbers_are_uniform() -> None:
    """Kolmogorov-Smirnov at a false-alarm rate of 1e-4, along one label and across labels."""
    key = Key(b"a key of sixteen")
    assert kstest(key.uniform("x", size=5000), "uniform").pvalue > 1e-4
    assert kstest([key.uniform("x", i, size=1)[0] for i in range(5000)], "uniform").pvalue > 1e-4


def test_numbers_are_those_of_the_first_release() -> None:
    """Marks made with these numbers must be found for ever: the values are fixed."""
    key = Key(b"a key of sixteen")
    assert key.seed("x", 1, b"y") == 131895808215126971425017179076405266305
    assert key.uniform("x", 1, b"y", size=3).tolist() == [0.676106482215265, 0.02273659048184762, 0.9420349519522707]


def test_the_interval_is_open() -> None:
    lowest, highest = 2.0**-53, 1 - 2.0**-53
    assert np.isfinite(np.log(-np.log([lowest, highest]))).all() and np.isfinite(np.log1p([-highest])).all()


@given(st.lists(st.one_of(st.integers(), st.text(), st.binary()), max_size=4), st.integers(1, 20))
def test_more_numbers_begin_with_the_same(labels: list[int | str | bytes], size: int) -> None:
    key = Key(SECRET)
    assert (key.uniform(*labels, size=size) == key.uniform(*labels, size=50)[:size]).all()
    assert key.uniform(*labels, size=(2, size)).ravel().tolist() == key.uniform(*labels, size=2 * size).tolist()


@given(st.lists(st.one_of(st.integers(), st.text(), st.binary()), max_size=4), st.data())
def test_different_labels_give_different_seeds(labels: list[int | str | bytes], data: st.DataObject) -> None:
    key = Key(SECRET)
    others = data.draw(st.lists(st.one_of(st.integers(), st.text(), st.binary()), max_size=4))
    same = [(type(x), x) for x in labels] == [(type(x), x) for x in others]
    assert (key.seed(*labels) == key.seed(*others)) == same
    assert (key.derive(*labels) == key.derive(*others)) == same


def test_a_key_has_enough_bytes_and_is_no_number() -> None:
    with pytest.raises(ValueError, match="15 bytes can be guessed"):
        Key(b"x" * 15)
    with pytest.raises(TypeError, match="not of int"):
        Key(20)  # type: ignore[arg-type]
    assert Key("é" * 8) == Key(("é" * 8).encode()) and Key.new() != Key.new()
    assert Key(SECRET).reveal() == SECRET


def spellings(secret: bytes) -> list[str]:
    number = int.from_bytes(secret, "big")
    raw = [secret.decode("latin-1"), repr(secret)[2:-1], str(list(secret))[1:-1]]
    return [*raw, secret.hex(), secret.hex().upper(), base64.b64encode(secret).decode(), str(number), hex(number)]


def assert_untold(told: str | bytes) -> None:
    text = told.decode("latin-1") if isinstance(told, bytes) else told
    derived = [Key(SECRET).derive(purpose).reveal() for purpose in ("exponential", "inverse transform", "gumbel")]
    for secret in (SECRET, *derived):
        for spelling in spellings(secret):
            assert spelling not in text


@pytest.mark.parametrize("made", MARKS)
def test_the_secret_is_in_no_output(made: Callable[[Key], Watermark], tmp_path: Path) -> None:
    """Reprs of watermark, transform, request and generation, what errors say, signatures and their files."""
    key = Key(SECRET)
    mark = made(key)
    model = TableModel.random(["a", "b", "c", "d"], order=1, seed=0)
    text = nextoken.generate(model, "ab", transform=Temperature(0.9) | mark.transform(), max_tokens=12, seed=3)
    told = [repr(x) for x in (key, mark, mark.transform(), text, text.request, mark.detect(text.tokens))]
    told += [str(dataclasses.asdict(text.request)), str(copy.deepcopy(mark))]
    for number, signature in enumerate((text.signature, text.drawn)):
        path = tmp_path / f"{number}.parquet"
        signature.to_parquet(path)
        told += [
            repr(signature),
            repr(signature.metadata),
            str(signature.schema.metadata),
            str(signature.table.to_pylist()),
        ]
        assert_untold(path.read_bytes())
    for part in told:
        assert_untold(part)
    for thing in (key, mark, text.request):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(thing)
    with pytest.raises(ValueError) as error:
        Key(SECRET[:12])
    assert SECRET.hex()[:24] not in str(error.value) and repr(SECRET[:12])[2:-1] not in str(error.value)

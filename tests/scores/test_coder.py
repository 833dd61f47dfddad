"""Compression: every file comes back, at the cost of its surprisal; other models and damage are refused."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.errors import InputError, ModelError, OutputError
from nextoken.model.base import LanguageModel
from nextoken.model.table import TableModel
from nextoken.model.vocab import Encoding, Vocab
from nextoken.scores._arithmetic import Decoder, Encoder
from nextoken.scores._container import Header, Part, read_round
from nextoken.scores._spelled import spell
from nextoken.scores.coder import compress, compress_file, decompress, decompress_file

TEXT = (Path(__file__).parents[1] / "data" / "alice.txt").read_bytes()
TABLE = TableModel.random(4, order=2, seed=1)
SPARSE = TableModel.random(["a", "b", "ab", "é"], order=1, zeros=0.4, seed=2)


@pytest.fixture(scope="module")
def nano() -> LanguageModel:
    return nextoken.load("nano")


def payload(code: bytes) -> int:
    """Bytes of the codes of all parts, without header and frames."""
    return sum(len(part.code) for part in parts_of(code))


def parts_of(code: bytes) -> list[Part]:
    source, found = io.BytesIO(code), []
    Header.read(source)
    while parts := read_round(source):
        found += parts
    return found


@given(st.lists(st.tuples(st.integers(0, 2**64), st.integers(1, 2**64), st.integers(1, 32)), max_size=60))
def test_arithmetic_coding_gives_symbols_back_at_their_cost(numbers: list[tuple[int, int, int]]) -> None:
    symbols = []
    for start, size, bits in numbers:
        begin = start % (1 << bits)
        symbols.append((begin, 1 + size % ((1 << bits) - begin), bits))
    encoder = Encoder()
    for symbol in symbols:
        encoder.put(*symbol)
    code = encoder.finish()
    cost = sum(bits - math.log2(size) for _, size, bits in symbols)
    assert 8 * len(code) <= cost + 16 + 1e-6 * len(symbols)
    decoder = Decoder(code)
    for begin, size, bits in symbols:
        assert begin <= decoder.peek(bits) < begin + size
        decoder.take(begin, size, bits)


def test_carries_run_through_the_whole_code() -> None:
    """Stretches at the upper end fill the code with 255s, until one symbol more turns them all over."""
    encoder, symbols = Encoder(), [((1 << 32) - 1, 1, 32)] * 20
    for begin, size, bits in [(0, 1, 1), *symbols, (1, 1, 1)]:
        encoder.put(begin, size, bits)
    decoder = Decoder(encoder.finish())
    for begin, size, bits in [(0, 1, 1), *symbols, (1, 1, 1)]:
        assert begin <= decoder.peek(bits) < begin + size
        decoder.take(begin, size, bits)


BYTES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(str.encode),
    st.lists(st.sampled_from([b"abcd", b"ab", b"dddddddddd", b"\xff", "é".encode(), b"\xc3", b"z"]), max_size=20).map(
        b"".join
    ),
)


@pytest.mark.paper("2309.10668")
@given(BYTES, st.integers(1, 4), st.integers(1, 40))
@settings(max_examples=150)
@example(b"", 1, 1)
@example(b"\x00" * 300, 2, 7)
def test_any_bytes_come_back_from_a_table(data: bytes, streams: int, part_bytes: int) -> None:
    for model in (TABLE, SPARSE):
        code = compress(model, data, streams=streams, part_bytes=part_bytes)
        assert decompress(model, code) == data
        # No part becomes longer than it was, whatever it holds.
        parts = -(-len(data) // max(1, part_bytes - 100)) + 1
        assert payload(code) <= len(data) and len(code) <= len(data) + 90 + 12 * parts * (1 + len(data))


@pytest.mark.paper("2309.10668")
@given(BYTES.map(lambda data: data + b" It was the\r\n\t" + data), st.integers(1, 3))
@settings(max_examples=6)
def test_any_bytes_come_back_from_nano(data: bytes, streams: int) -> None:
    model = nextoken.load("nano") if not _LOADED else _LOADED[0]
    _LOADED[:] = [model]
    assert decompress(model, compress(model, data, streams=streams, part_bytes=70)) == data


_LOADED: list[LanguageModel] = []


@pytest.mark.paper("2309.10668")
def test_the_cost_is_the_surprisal_that_reading_finds(nano: LanguageModel) -> None:
    data = TEXT[:800]
    bits = nextoken.read(nano, data.decode(), progress=False).summary()["bits"]
    code = compress(nano, data)
    assert bits / 8 - 1 <= payload(code) <= 1.0001 * bits / 8 + 3
    assert len(code) - payload(code) < 110
    assert decompress(nano, code) == data


def test_texts_beyond_the_context_cost_what_windows_say() -> None:
    """The same windows as reading: also the last one, which is moved to the left until it is full."""
    model = TableModel.random(4, order=6, concentration=0.3, seed=3)
    rng = np.random.default_rng(0)
    data = bytes(rng.choice([*b"abcd"], 200).tolist())
    unlimited = nextoken.read(model, data.decode(), progress=False).summary()["bits"]
    for context, overlap in ((8, None), (8, 1), (50, 20), (199, None), (202, None)):
        model.context_length = context
        bits = nextoken.read(model, data.decode(), overlap=overlap, progress=False).summary()["bits"]
        code = compress(model, data, overlap=overlap)
        assert payload(code) == pytest.approx(bits / 8, abs=2)
        assert decompress(model, code) == data
        assert (bits == pytest.approx(unlimited)) == (context > 8)


@pytest.mark.paper("2309.10668")
def test_the_length_of_a_models_own_texts_is_its_entropy() -> None:
    """Mean bits of 2,000 symbols drawn from a table, against its entropy rate: within 4 standard errors (6e-5)."""
    model = TableModel.random(4, order=1, concentration=0.4, seed=5)
    p = torch.stack([model.row([s]) for s in range(4)]).exp()[:, :4].numpy()
    values, vectors = np.linalg.eig(p.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    rate = float(-(stationary[:, None] * p * np.log2(np.maximum(p, 1e-300))).sum())
    rng = np.random.default_rng(1)
    state, symbols = 0, []
    for draw in rng.random(2000):
        state = int(np.searchsorted(p[state].cumsum(), draw * p[state].sum()))
        symbols.append(state)
    surprisals = -np.log2(p[symbols[:-1], symbols[1:]])
    blocks = surprisals[: len(surprisals) // 40 * 40].reshape(-1, 40).mean(1)
    error = blocks.std(ddof=1) / math.sqrt(len(blocks))
    code = compress(model, bytes(b"abcd"[s] for s in symbols))
    assert 8 * payload(code) / 2000 == pytest.approx(rate, abs=4 * error + 0.01)


def test_streams_cost_a_fresh_start_each_and_change_nothing_else(nano: LanguageModel) -> None:
    data = TEXT[:1200]
    split = compress(nano, data, streams=4)
    assert decompress(nano, split) == data
    source = io.BytesIO(split)
    Header.read(source)
    parts = read_round(source)
    assert len(parts) == 4 and read_round(source) == []
    ends = np.cumsum([part.length for part in parts])
    pieces = [data[end - part.length : end].decode() for end, part in zip(ends, parts, strict=True)]
    alone = nextoken.read(nano, pieces, progress=False)
    for number, part in enumerate(parts):
        assert len(part.code) == pytest.approx(alone[number].summary()["bits"] / 8, abs=2)


def test_impossible_tokens_can_be_coded() -> None:
    """What the model calls impossible costs 32 bits, not infinitely many."""
    model = TableModel.given({(): [1.0, 0.0], (1,): [0.5, 0.5]}, ["a", "b"])
    data = b"a" * 200 + b"b" + b"a" * 200
    code = compress(model, data)
    assert decompress(model, code) == data and payload(code) in (4, 5, 6)


def test_raw_bytes_cost_little_where_they_are_few(nano: LanguageModel) -> None:
    text = (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
    )
    latin = text.replace("e", "é", 5).encode("latin-1")
    plain = text.replace("e", "", 5).encode()
    code = compress(nano, latin)
    assert decompress(nano, code) == latin
    assert payload(code) < payload(compress(nano, plain)) + 5 * 9


def test_noise_is_stored() -> None:
    data = np.random.default_rng(0).bytes(500)
    code = compress(TABLE, data)
    assert payload(code) == 500 and decompress(TABLE, code) == data
    # Beside a part that is not: rows of one batch.
    both = data + b"abcd" * 200
    code = compress(TABLE, both, streams=2)
    assert decompress(TABLE, code) == both and payload(code) < 1300


def test_decoding_makes_the_very_calls_of_coding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal numbers need equal calls: rows that have ended or are stored are fed the same tokens both times."""
    fed: list[list[list[int]]] = []
    feed = TableModel._feed

    def recorded(self, state, tokens, parents):  # type: ignore[no-untyped-def]
        fed.append(tokens.tolist())
        return feed(self, state, tokens, parents)

    model = TableModel(torch.tensor([1 - 3e-4, 1e-4, 1e-4, 1e-4, 0.0]).double(), "abcd")
    model.context_length = 20
    monkeypatch.setattr(TableModel, "_feed", recorded)
    data = b"bcdb" * 60 + b"a" * 240
    code = compress(model, data, streams=2)
    coding, fed[:] = list(fed), []
    assert decompress(model, code) == data
    assert fed == coding and [part.is_stored for part in parts_of(code)] == [True, False]


class Changing(Vocab):
    """A tokenizer that lowers letters and puts a space in front, as some do, with the spans of what it read."""

    def encode(self, text: str | bytes) -> Encoding:
        data = text if isinstance(text, str) else text.decode()
        found = super().encode(" " + data.lower())
        size = len(data.encode())
        starts = tuple(min(max(start - 1, 0), size) for start in found.starts)
        return Encoding(found.ids, starts, tuple(min(max(end - 1, 0), size) for end in found.ends))


@given(st.text("abAB z", max_size=20))
def test_tokenizers_that_change_the_text_lose_nothing(text: str) -> None:
    vocab = Changing([b"a", b"b", b" ", b"A", b" a", b"ab", b""], bos_id=6)
    spelled = spell(vocab, text.encode())
    assert spelled.joined(vocab) == text.encode()
    assert b"".join(spelled.raw.values()).replace(b"a", b"").strip(b"BzabA ") == b""


def test_spelling_uses_the_tokenizers_own_tokens(nano: LanguageModel) -> None:
    text = "Alice was beginning to get very tired, naïve — 12345\n\n"
    spelled = spell(nano.vocab, text.encode())
    assert tuple(spelled.ids) == nano.vocab.encode(text).ids and not spelled.raw
    broken = spell(nano.vocab, text.encode() + b"\xff\xfe" + text.encode())
    assert broken.raw == {len(spelled.ids): b"\xff\xfe"} and broken.joined(nano.vocab).count(b"\xff") == 1


def test_models_without_a_begin_token_predict_the_first_from_nothing() -> None:
    table = TableModel.random(4, order=0, seed=7)
    table.vocab = Vocab(table.vocab.token_bytes)
    for data in (b"", b"a", b"abcdabcd" * 20):
        assert decompress(table, compress(table, data, streams=2)) == data


def test_files(tmp_path: Path) -> None:
    source, target, back = tmp_path / "a.txt", tmp_path / "a.nxtc", tmp_path / "b.txt"
    source.write_bytes(b"abcd" * 300 + b"!")
    done = compress_file(TABLE, source, target, streams=3, progress=True)
    assert (done.length, done.size, done.tokens) == (1201, target.stat().st_size, 1200)
    assert done.bits_per_byte == 8 * done.size / 1201
    assert decompress_file(TABLE, target, back) == 1201 and back.read_bytes() == source.read_bytes()
    assert target.read_bytes() == compress(TABLE, source.read_bytes(), streams=3)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "a.nxtc", "b.txt"}


def test_an_interrupted_file_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a.txt", tmp_path / "a.nxtc"
    source.write_bytes(b"abcd" * 100)
    target.write_bytes(b"as it was")
    calls = 0
    feed = TableModel._feed

    def interrupted(self, state, tokens, parents):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 50:
            raise KeyboardInterrupt
        return feed(self, state, tokens, parents)

    monkeypatch.setattr(TableModel, "_feed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress_file(TABLE, source, target)
    assert target.read_bytes() == b"as it was" and len([*tmp_path.iterdir()]) == 2


def test_other_models_are_refused(tmp_path: Path) -> None:
    code = compress(TABLE, b"abcd" * 10)
    with pytest.raises(ModelError, match="the same weights"):
        decompress(TableModel.random(4, order=2, seed=9), code)
    with pytest.raises(ModelError, match="the same vocabulary"):
        decompress(TableModel.random(5, order=2, seed=1), code)
    limited = TableModel.random(4, order=2, seed=1)
    limited.context_length = 9
    with pytest.raises(ModelError, match="context of any tokens"):
        decompress(limited, code)
    nameless = TableModel.random(4, seed=0)
    with pytest.raises(ModelError, match="no digest"):
        compress(
            type("Nameless", (TableModel,), {"digest": ""})(nameless._log_table.exp().reshape(5, 5, 5), "abcd"), b""
        )
    nameless.is_partial = True
    with pytest.raises(ModelError, match="only its most probable tokens"):
        compress(nameless, b"abc")


def test_damage_is_noticed(tmp_path: Path) -> None:
    data = b"abcdabdbcdbadcbadbcadbcbadbcbd" * 3 + b"\xff" * 3 + b"abc"
    code = compress(TABLE, data)
    for cut in (0, 3, 20, len(code) // 2, len(code) - 1):
        with pytest.raises(InputError):
            decompress(TABLE, code[:cut])
    source = io.BytesIO(code)
    Header.read(source)
    wrong = 0
    for at in range(source.tell(), len(code), 2):
        damaged = bytearray(code)
        damaged[at] ^= 0x40
        try:
            wrong += decompress(TABLE, bytes(damaged)) != data
        except InputError:
            continue
    assert wrong == 0
    bad = tmp_path / "bad"
    bad.write_bytes(code[:-9] + b"\0" * 9)
    with pytest.raises(InputError):
        decompress_file(TABLE, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_misuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        compress_file(TABLE, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(InputError, match="cannot read"):
        decompress_file(TABLE, tmp_path, tmp_path / "out")
    (tmp_path / "in").write_bytes(b"ab")
    with pytest.raises(OutputError):
        compress_file(TABLE, tmp_path / "in", tmp_path / "no" / "folder")
    for options in ({"streams": 0}, {"part_bytes": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            compress(TABLE, b"ab", **options)  # type: ignore[arg-type]
    limited = TableModel.random(4, order=2, seed=1)
    limited.context_length = 9
    with pytest.raises(ValueError, match="overlap"):
        compress(limited, b"ab", overlap=9)

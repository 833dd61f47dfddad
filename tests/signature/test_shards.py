"""Corpus mode: finished shards survive whatever happens, and none is written twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

import nextoken
from nextoken.errors import InputError, OutputError
from nextoken.model.base import LanguageModel, NoMemory, State
from nextoken.model.next import Next
from nextoken.model.table import TableModel
from nextoken.signature import ShardedSignature, Signature
from nextoken.signature import shard_writer as writing

MODEL = TableModel.random(4, order=2, seed=7)
TEXTS = ["abcd" * (n % 7) for n in range(60)]
SETTINGS = {"top": 2, "shard_rows": 100, "batch_tokens": 32}
WHOLE = nextoken.read(MODEL, TEXTS, top=2)


class _Failing(LanguageModel):
    """MODEL, which fails at the n-th call."""

    def __init__(self, calls: int, error: type[BaseException]) -> None:
        self.name, self.vocab, self.calls, self.error = MODEL.name, MODEL.vocab, calls, error

    @property
    def digest(self) -> str:
        return MODEL.digest

    @property
    def dtype(self) -> str:
        return MODEL.dtype

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: torch.Tensor, parents: torch.Tensor | None) -> Next:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return MODEL._feed(state, tokens, parents)


def _shards(folder: Path) -> dict[str, int]:
    """Finished shards with the times they were written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("part-*.parquet"))}


def _leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


def test_shards_hold_what_one_reading_would(tmp_path: Path) -> None:
    found = nextoken.read(MODEL, iter(TEXTS), shards=tmp_path / "new" / "folder", **SETTINGS)
    assert isinstance(found, ShardedSignature) and found.is_complete
    assert found.equals(WHOLE, tolerance=1e-6)
    parts = _shards(tmp_path / "new" / "folder")
    assert list(parts) == [f"part-{n:05d}.parquet" for n in range(len(parts))] and len(parts) > 3
    assert Signature.from_parquet(tmp_path / "new" / "folder").equals(found)


def test_it_is_used_like_any_signature(tmp_path: Path) -> None:
    found = nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
    assert len(found) == len(WHOLE) and found.n_texts == 60 and found.columns == WHOLE.columns
    for key in (5, -1, slice(10, 40), [59, 0, 13]):
        assert found[key].equals(WHOLE[key], tolerance=1e-6)  # type: ignore[index]
    assert [found.text(i) for i in range(60)] == TEXTS
    assert found.summary() == pytest.approx(WHOLE.summary())
    assert found.vocab_labels == WHOLE.vocab_labels
    assert Signature.concat(found.shards()).equals(WHOLE, tolerance=1e-6)
    assert Signature.concat([found, WHOLE]).n_texts == 120
    found.to_parquet(tmp_path / "all.parquet")
    assert Signature.from_parquet(tmp_path / "all.parquet").equals(WHOLE, tolerance=1e-6)
    with pytest.raises(KeyError, match="no column"):
        found.column("nothing")


def test_one_column_does_not_load_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
    read: list[object] = []
    original = pa.parquet.read_table

    def watched(path: Path, **options: object) -> pa.Table:
        read.append(options["columns"])
        return original(path, **options)

    monkeypatch.setattr("pyarrow.parquet.read_table", watched)
    assert (found.column("entropy") == WHOLE.column("entropy")).all()
    assert read and all(names == ["entropy"] for names in read)
    read.clear()
    _ = found[30]
    assert len(read) == 1


def test_any_file_is_a_signature_of_its_texts(tmp_path: Path) -> None:
    found = nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
    first = len(next(found.shards()).texts)
    second = Signature.from_parquet(tmp_path / "part-00001.parquet")
    assert second.equals(WHOLE[first : first + second.n_texts], tolerance=1e-6)
    assert second.column("text_id").min() == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 6, 15, 25])
def test_an_interrupted_reading_goes_on(tmp_path: Path, calls: int, error: type[BaseException]) -> None:
    with pytest.raises(error):
        nextoken.read(_Failing(calls, error), TEXTS, shards=tmp_path, **SETTINGS)
    kept = _shards(tmp_path)
    assert not _leftovers(tmp_path)
    partial = ShardedSignature(tmp_path)
    assert not partial.is_complete
    assert partial.equals(WHOLE[: partial.n_texts], tolerance=1e-6)
    found = nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
    assert found.equals(WHOLE, tolerance=1e-6)
    # Shards that were finished are not touched again.
    assert {name: when for name, when in _shards(tmp_path).items() if name in kept} == kept
    assert calls < 15 or kept


def test_a_finished_reading_is_not_done_again(tmp_path: Path) -> None:
    nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
    before = _shards(tmp_path)
    found = nextoken.read(_Failing(0, RuntimeError), TEXTS, shards=tmp_path, **SETTINGS)
    assert found.equals(WHOLE, tolerance=1e-6) and _shards(tmp_path) == before


def test_a_corpus_may_grow(tmp_path: Path) -> None:
    nextoken.read(MODEL, TEXTS[:25], shards=tmp_path, **SETTINGS)
    assert nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS).equals(WHOLE, tolerance=1e-6)


def test_a_text_longer_than_a_shard_stays_in_one(tmp_path: Path) -> None:
    texts = ["ab", "abcd" * 300, "cd", ""]
    found = nextoken.read(MODEL, texts, shards=tmp_path, **SETTINGS)
    assert found.equals(nextoken.read(MODEL, texts, top=2), tolerance=1e-6)
    assert max(len(part) for part in found.shards()) >= 1200


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_corpus_without_rows(tmp_path: Path, texts: list[str]) -> None:
    found = nextoken.read(MODEL, texts, shards=tmp_path)
    assert found.equals(nextoken.read(MODEL, texts)) and found.is_complete
    assert found.column("entropy").shape == (0,)
    assert nextoken.read(MODEL, texts, shards=tmp_path).n_texts == len(texts)


def test_another_reading_is_refused(tmp_path: Path) -> None:
    nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
    before = _shards(tmp_path)
    with pytest.raises(OutputError, match="model_digest is"):
        nextoken.read(TableModel.random(4, order=2, seed=8), TEXTS, shards=tmp_path, **SETTINGS)
    with pytest.raises(OutputError, match="top is 2 in one and 3 in the other"):
        nextoken.read(MODEL, TEXTS, shards=tmp_path, **{**SETTINGS, "top": 3})
    with pytest.raises(OutputError, match="against is None"):
        nextoken.read(MODEL, TEXTS, shards=tmp_path, against=MODEL, **SETTINGS)
    with pytest.raises(OutputError, match="only one has hidden"):
        nextoken.read(MODEL, TEXTS, shards=tmp_path, hidden=True, **SETTINGS)
    with pytest.raises(OutputError, match="shards of other texts: text 2 is 'text-2', 8 bytes"):
        nextoken.read(MODEL, [*TEXTS[:2], "dd", *TEXTS[3:]], shards=tmp_path, **SETTINGS)
    with pytest.raises(OutputError, match="shards of 60 texts, and 10 were given"):
        nextoken.read(MODEL, TEXTS[:10], shards=tmp_path, **SETTINGS)
    assert _shards(tmp_path) == before


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(InputError, match=r"part-00001\.parquet is missing"):
        Signature.from_parquet(tmp_path)
    with pytest.raises(InputError, match=r"part-00001\.parquet is missing"):
        nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    WHOLE.to_parquet(tmp_path / "part-00000.parquet")
    with pytest.raises(OutputError, match="not of a reading"):
        nextoken.read(MODEL, TEXTS, shards=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        nextoken.read(MODEL, TEXTS, shards=tmp_path / "file")


def test_a_shard_that_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    written = 0
    original = writing.parquet.pq.ParquetWriter.write_table

    def write(self: object, table: pa.Table) -> None:
        nonlocal written
        written += 1
        if written == 4:
            full()
        original(self, table)

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", write)
    with pytest.raises(OutputError, match=r"cannot write .*part-0000\d\.parquet: No space left on device"):
        nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
    assert _shards(tmp_path) and not _leftovers(tmp_path)
    monkeypatch.undo()
    assert nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS).equals(WHOLE, tolerance=1e-6)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locks")
def test_two_readings_do_not_share_a_folder(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS[:30]
        with pytest.raises(OutputError, match="another reading is writing"):
            nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
        yield from TEXTS[30:]

    assert nextoken.read(MODEL, texts(), shards=tmp_path, **SETTINGS).equals(WHOLE, tolerance=1e-6)


_KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import nextoken
from signature.test_shards import MODEL, SETTINGS, TEXTS

def slowly():
    for number, text in enumerate(TEXTS):
        if number > 40:
            time.sleep(60)
        yield text

nextoken.read(MODEL, slowly(), shards={folder!r}, **SETTINGS)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills as a POSIX system does")
def test_a_killed_process_leaves_its_finished_shards(tmp_path: Path) -> None:
    """Killed in the middle of a shard: nothing is cleaned up, and the next reading still gets it right."""
    script = _KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 120
        while len(_shards(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = _shards(tmp_path)
    assert len(kept) >= 3
    (tmp_path / f".part-{len(kept):05d}.parquet.0123abcd.partial").write_bytes(b"half a shard")
    partial = ShardedSignature(tmp_path)
    assert partial.equals(WHOLE[: partial.n_texts], tolerance=1e-6) and 0 < partial.n_texts < 60
    found = nextoken.read(MODEL, TEXTS, shards=tmp_path, **SETTINGS)
    assert found.equals(WHOLE, tolerance=1e-6) and not _leftovers(tmp_path)
    assert {name: when for name, when in _shards(tmp_path).items() if name in kept} == kept


def test_a_damaged_run_is_said_so(tmp_path: Path) -> None:
    nextoken.read(MODEL, TEXTS[:3], shards=tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"metadata": {}}))
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        Signature.from_parquet(tmp_path)

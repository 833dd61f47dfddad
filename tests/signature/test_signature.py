"""Signature: slicing, joining, figures, conversion and files."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nextoken
from nextoken.errors import InputError, OutputError
from nextoken.model.base import LanguageModel, NoMemory, State
from nextoken.model.next import Next
from nextoken.model.partial import PartialNext
from nextoken.model.table import TableModel
from nextoken.signature import Metadata, Signature, parquet

TEXTS = ["abab", "", "cé", "ba"]
MODEL = TableModel.random(["a", "b", "ab", "c", b"\xc3", b"\xa9"], order=2, seed=5)


@pytest.fixture(scope="module")
def signature() -> Signature:
    return nextoken.read(MODEL, TEXTS, names=["one", "none", "three", "four"], top=2)


def test_it_counts_rows_and_texts(signature: Signature) -> None:
    assert (len(signature), signature.n_texts) == (7, 4)
    assert signature.row_offsets.tolist() == [0, 2, 2, 5, 7]
    assert [signature.text(i) for i in range(4)] == TEXTS
    assert signature.text(-1) == "ba"
    assert repr(signature) == "Signature('table', 4 texts, 7 tokens)"


@pytest.mark.parametrize(
    ("key", "chosen"),
    [(2, [2]), (-1, [3]), (slice(1, 3), [1, 2]), ([3, 0, 3], [3, 0, 3]), (slice(0, 0), []), ([], [])],
)
def test_slices_are_readings_of_those_texts(signature: Signature, key: object, chosen: list[int]) -> None:
    part = signature[key]  # type: ignore[index]
    alone = nextoken.read(MODEL, [TEXTS[i] for i in chosen], names=[signature.texts[i].name for i in chosen], top=2)
    assert part.equals(alone, tolerance=1e-6)
    assert part.column("text_id").tolist() == alone.column("text_id").tolist()


def test_a_mask_chooses_texts(signature: Signature) -> None:
    assert [text.name for text in signature[np.array([True, False, False, True])].texts] == ["one", "four"]


def test_what_is_not_there(signature: Signature) -> None:
    with pytest.raises(IndexError, match="no text 4 in a signature of 4"):
        signature[4]
    with pytest.raises(TypeError, match="chosen by number"):
        signature["one"]  # type: ignore[index]
    with pytest.raises(KeyError, match="hidden=True"):
        signature.column("hidden")
    with pytest.raises(KeyError, match="against="):
        signature.column("kl")
    with pytest.raises(KeyError, match="there are text_id"):
        signature.column("surprise")


def test_concat_undoes_slicing(signature: Signature) -> None:
    assert Signature.concat([signature[i] for i in range(4)]).equals(signature)
    assert Signature.concat([signature[:1], signature[1:]]).table["text_id"].to_pylist() == [0, 0, 2, 2, 2, 3, 3]


def test_concat_refuses_what_does_not_belong(signature: Signature) -> None:
    other = nextoken.read(TableModel.random(6, seed=1, order=2), "ab", top=2)
    with pytest.raises(ValueError, match="signatures 0 and 1 do not belong together: model_digest is"):
        Signature.concat([signature, other])
    with pytest.raises(ValueError, match="top is 2 in one and 3 in the other"):
        Signature.concat([signature, nextoken.read(MODEL, "ab", top=3)])
    with pytest.raises(ValueError, match="bos_text is"):
        Signature.concat([signature, nextoken.read(MODEL, "ab", top=2, bos=False)])
    with pytest.raises(ValueError, match="at least one"):
        Signature.concat([])


def test_names_of_models_do_not_matter_where_digests_agree(signature: Signature) -> None:
    renamed = Signature(
        signature.table, replace(signature.metadata, model="else"), signature.texts, signature.vocab_labels
    )
    assert Signature.concat([signature, renamed]).n_texts == 8
    unknown = [replace(signature.metadata, model=name, model_digest="") for name in ("a", "b")]
    assert unknown[0].disagreement(unknown[1]) is not None


def test_the_summary_by_hand(signature: Signature) -> None:
    found = signature.summary()
    rows = signature.table.to_pylist()
    nats = -sum(row["logprob"] for row in rows)
    assert found["tokens"] == 7 and found["texts"] == 4
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert found["nats"] == pytest.approx(nats)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"])
    assert found["perplexity"] == pytest.approx(math.exp(nats / 7))
    assert found["mean_entropy"] == pytest.approx(np.mean([row["entropy"] for row in rows]))
    assert found["mean_rank"] == pytest.approx(np.mean([row["rank"] for row in rows]))
    assert found["top1"] == pytest.approx(np.mean([row["rank"] == 0 for row in rows]))


def test_the_summary_counts_predicted_bytes_only() -> None:
    found = nextoken.read(MODEL, "abc", bos=False).summary()
    assert (found["tokens"], found["bytes"]) == (1, 1)


def test_the_summary_of_nothing() -> None:
    found = nextoken.read(MODEL, []).summary()
    assert (found["texts"], found["tokens"], found["nats"]) == (0, 0, 0.0)
    assert math.isnan(found["bits_per_byte"]) and math.isnan(found["perplexity"]) and math.isnan(found["top1"])


def test_an_impossible_token_costs_infinitely_much() -> None:
    certain = TableModel.given({(): [1.0, 0.0]}, ["a", "b"])
    found = nextoken.read(certain, "ab").summary()
    assert found["nats"] == found["perplexity"] == math.inf


def test_equals_sees_every_difference(signature: Signature) -> None:
    for name in signature.columns:
        if pa.types.is_floating(signature.schema.field(name).type):
            values = signature.column(name).copy()
            values[3] += 0.5
            place = signature.schema.get_field_index(name)
            changed = signature.table.set_column(place, name, pa.array(values, type=pa.float32()))
            other = Signature(changed, signature.metadata, signature.texts, signature.vocab_labels)
            assert not signature.equals(other, tolerance=1e-3), name
            assert signature.equals(other, tolerance=1.0)
    assert not signature.equals(signature[:3])


def test_columns_are_checked(signature: Signature) -> None:
    def made(table: pa.Table) -> Signature:
        return Signature(table, signature.metadata, signature.texts, {})

    with pytest.raises(ValueError, match="not a signature: rank is missing"):
        made(signature.table.drop_columns(["rank"]))
    with pytest.raises(ValueError, match="extra is unknown"):
        made(signature.table.append_column("extra", pa.nulls(7)))
    with pytest.raises(ValueError, match="entropy is double, not float"):
        place = signature.schema.get_field_index("entropy")
        made(signature.table.set_column(place, "entropy", pa.array(np.zeros(7))))
    with pytest.raises(ValueError, match="not in order"):
        made(signature.table.select(list(reversed(signature.columns))))
    with pytest.raises(ValueError, match="text_id should count the 4 texts, 7 rows"):
        made(signature.table.slice(1))


def test_pandas_and_polars(signature: Signature, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = signature.to_pandas()
    assert list(frame.columns) == list(signature.columns)
    np.testing.assert_array_equal(frame["entropy"], signature.column("entropy"))
    other = signature.to_polars()
    assert other.columns == list(signature.columns) and other.height == 7
    assert other["token"].to_list() == frame["token"].to_list()
    assert signature.to_arrow() is signature.table
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"to_polars\(\) needs polars: pip install polars"):
        signature.to_polars()


def test_a_file_holds_all_of_it(signature: Signature, tmp_path: Path) -> None:
    signature.to_parquet(tmp_path / "s.parquet")
    found = Signature.from_parquet(tmp_path / "s.parquet")
    assert found.equals(signature)
    assert (found.metadata, found.texts, found.vocab_labels) == (
        signature.metadata,
        signature.texts,
        signature.vocab_labels,
    )
    # Any reader of Parquet finds plain columns.
    assert pq.read_table(tmp_path / "s.parquet")["logprob"].to_pylist() == signature.table["logprob"].to_pylist()
    assert os.listdir(tmp_path) == ["s.parquet"]


def test_files_of_two_models_and_hidden_states(tmp_path: Path) -> None:
    table = nextoken.read(MODEL, TEXTS, against=MODEL).table
    width = pa.list_(pa.float32(), 2)
    hidden = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(14, dtype=np.float32)), 2)
    made = Signature(
        table.append_column(pa.field("hidden", width), hidden),
        nextoken.read(MODEL, TEXTS, against=MODEL).metadata,
        nextoken.read(MODEL, TEXTS).texts,
        {},
    )
    made.to_parquet(tmp_path / "s.parquet")
    found = Signature.from_parquet(tmp_path / "s.parquet")
    assert found.equals(made)
    np.testing.assert_array_equal(found[2].column("hidden"), np.arange(4, 10).reshape(3, 2))


def test_what_is_no_signature_is_said_so(tmp_path: Path, signature: Signature) -> None:
    with pytest.raises(InputError, match="no such file"):
        Signature.from_parquet(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(InputError, match=r"text\.parquet is not a Parquet file"):
        Signature.from_parquet(tmp_path / "text.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="no signature"):
        Signature.from_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="holds no shards"):
        Signature.from_parquet(tmp_path)
    signature.to_parquet(tmp_path / "s.parquet")
    whole = (tmp_path / "s.parquet").read_bytes()
    (tmp_path / "s.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a Parquet file"):
        Signature.from_parquet(tmp_path / "s.parquet")


def test_a_later_format_is_refused(tmp_path: Path, signature: Signature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "FORMAT", 99)
    signature.to_parquet(tmp_path / "s.parquet")
    monkeypatch.undo()
    with pytest.raises(InputError, match="format 99"):
        Signature.from_parquet(tmp_path / "s.parquet")


@pytest.mark.parametrize("target", ["no/such/folder/s.parquet", "."])
def test_a_file_that_cannot_be_written(tmp_path: Path, signature: Signature, target: str) -> None:
    with pytest.raises(OutputError, match="cannot write") as caught:
        signature.to_parquet(tmp_path / target)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as a POSIX system does")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails in the middle, as it would there."""
    path, source = tmp_path / "s.parquet", tmp_path / "large.parquet"
    old = nextoken.read(MODEL, "ab")
    old.to_parquet(path)
    nextoken.read(MODEL, ["abcab" * 4_000]).to_parquet(source)
    # In a process of its own, for the limit would also be that of a file the test report is written to.
    done = subprocess.run(
        [sys.executable, "-c", WRITE_LIMITED, source, path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"OutputError cannot write {path}: ") and done.stdout.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["large.parquet", "s.parquet"]
    assert Signature.from_parquet(path).equals(old)


WRITE_LIMITED = """
import resource, sys
import nextoken
source, path = sys.argv[1:]
signature = nextoken.Signature.from_parquet(source)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
try:
    signature.to_parquet(path)
except nextoken.OutputError as error:
    print("OutputError", error)
"""


def test_a_page_is_written_whole_or_not_at_all(
    tmp_path: Path, signature: Signature, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextoken.signature import html

    monkeypatch.setattr(html, "render", lambda *args, **options: "<html>")
    assert signature.to_html(tmp_path / "page.html") == "<html>"
    assert (tmp_path / "page.html").read_text() == "<html>"

    def full(self: Path, *args: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"page\.html: No space left on device"):
        signature.to_html(tmp_path / "page.html")
    assert os.listdir(tmp_path) == ["page.html"]
    with open(tmp_path / "page.html") as file:
        assert file.read() == "<html>"


class _TopTwo(LanguageModel):
    """A table of which only the two most probable tokens are told."""

    is_partial = True
    name = "top-two"
    vocab = MODEL.vocab

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: object, parents: object) -> Next:
        whole = MODEL._feed(state, tokens, parents).log_probs()  # type: ignore[arg-type]
        top = whole.topk(2, dim=-1)
        return PartialNext(top.indices, top.values, vocab_size=MODEL.vocab.size)


def test_what_a_partial_model_does_not_tell_is_null(tmp_path: Path) -> None:
    text = "abcabé" * 3
    partial, whole = nextoken.read(_TopTwo(), text, top=2), nextoken.read(MODEL, text, top=2)
    known = whole.column("rank") < 2
    assert 0 < known.sum() < len(whole)
    for name in ("logprob", "rank", "mass_above"):
        assert partial.table[name].is_null().to_numpy().tolist() == (~known).tolist(), name
        np.testing.assert_allclose(partial.column(name)[known], whole.column(name)[known], atol=1e-6)
    for name in ("entropy", "kurtosis", "half_sum", "log_normalizer"):
        assert partial.table[name].null_count == len(whole)
    for name in ("top_ids", "top_logprobs", "rest_mass", "top1_prob", "margin"):
        np.testing.assert_allclose(partial.column(name), whole.column(name), atol=1e-6)
    assert (partial.column("entropy_lower") <= whole.column("entropy") + 1e-6).all()
    assert (partial.column("entropy_upper") >= whole.column("entropy") - 1e-6).all()
    figures = partial.summary()
    assert figures["unknown"] == (~known).sum() and math.isnan(figures["nats"])
    assert figures["mean_entropy_lower"] <= whole.summary()["mean_entropy"] <= figures["mean_entropy_upper"]
    partial.to_parquet(tmp_path / "s.parquet")
    assert Signature.from_parquet(tmp_path / "s.parquet").equals(partial)


def test_lists_of_partial_models_may_differ_in_length() -> None:
    class Short(_TopTwo):
        def _feed(self, state: State, tokens: object, parents: object) -> Next:
            found = MODEL._feed(state, tokens, parents).log_probs().topk(2, dim=-1)  # type: ignore[arg-type]
            ids, values = found.indices.clone(), found.values.clone()
            ids[:, ::2, 1], values[:, ::2, 1] = -1, float("nan")  # one token only
            ids[:, 1, 0] = -1  # a token whose id is not known
            return PartialNext(ids, values, vocab_size=MODEL.vocab.size)

    signature = nextoken.read(Short(), "abcab", top=2)
    assert [len(row) for row in signature.column("top_logprobs")] == [1, 2, 1]
    assert signature.table["top_ids"].to_pylist()[1][0] is None
    assert -1 not in signature.vocab_labels


def test_metadata_is_plain() -> None:
    metadata = Metadata("m", "d", "t", 5, "float32")
    assert Metadata(**metadata.as_dict()) == metadata

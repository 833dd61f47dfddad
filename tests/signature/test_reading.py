"""read(): every column by brute force, whatever the batches and windows."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.errors import InputError, ModelError
from nextoken.model.base import LanguageModel, NoMemory, State
from nextoken.model.next import HeadNext, Next
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab
from nextoken.signature import Signature, windows
from nextoken.signature.forward import batches
from signature import brute

SYMBOLS = ["a", "b", "ab", "c", b"\xf0\x9f", b"\x98\x80", "é"]
TOP = 3


def _table(*, order: int = 3, context: int | None = None, bos: bool = True, **options: object) -> TableModel:
    model = TableModel.random(SYMBOLS, order=order, seed=3, **options)  # type: ignore[arg-type]
    model.context_length = context
    if not bos:
        model.vocab = Vocab(model.vocab.token_bytes)
        model._feed = lambda *args: TableModel._feed(with_bos, *args)  # type: ignore[method-assign]
        with_bos = TableModel.random(SYMBOLS, order=order, seed=3, **options)  # type: ignore[arg-type]
    return model


def _assert_rows(
    signature: Signature, model: TableModel, texts: list[str], *, bos: bool, overlap: int | None, zeros: bool = False
) -> None:
    """Each row against its own distribution, found by looking through the window plan for the token."""
    column = {name: signature.column(name) for name in signature.columns}
    row = 0
    for number, text in enumerate(texts):
        own = model.vocab.encode(text)
        length = len(own) + bos
        for place in range(0 if bos else 1, len(own)):
            plan = windows(length, model.context_length, overlap)
            window = next(w for w in plan if w.first <= place + bos < w.end)
            expected = brute.columns_of(brute.distribution(model, own.ids, place, window, bos), own.ids[place], TOP)
            assert (column["text_id"][row], column["position"][row]) == (number, place)
            assert column["token_id"][row] == own.ids[place]
            assert (column["byte_start"][row], column["byte_end"][row]) == (own.starts[place], own.ends[place])
            assert column["token"][row] == text.encode()[own.starts[place] : own.ends[place]]
            for name, value in expected.items():
                np.testing.assert_allclose(column[name][row], value, rtol=2e-5, atol=2e-5, err_msg=name)
            row += 1
    assert row == len(signature)


def test_every_column_by_brute_force() -> None:
    model, texts = _table(zeros=0.2), ["abcab", "aé😀b", "", "c"]
    _assert_rows(nextoken.read(model, texts, top=TOP), model, texts, bos=True, overlap=None)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text("abcé😀", max_size=14), max_size=6),
    st.integers(1, 40),
    st.sampled_from([None, (2, None), (4, None), (5, 1), (6, 5)]),
    st.booleans(),
)
def test_whatever_the_batches_and_windows(
    texts: list[str], batch_tokens: int, window: tuple[int, int | None] | None, bos: bool
) -> None:
    context, overlap = window or (None, None)
    model = _table(context=context, bos=bos)
    signature = nextoken.read(model, texts, top=TOP, batch_tokens=batch_tokens, overlap=overlap)
    _assert_rows(signature, model, texts, bos=bos, overlap=overlap)
    assert [signature.text(number) for number in range(len(texts))] == texts
    assert signature.texts == nextoken.read(model, texts, top=TOP).texts


def test_windows_matter_here() -> None:
    """Else the test above would prove nothing about them."""
    texts = ["abcabcabcabc"]
    whole, cut = (nextoken.read(_table(context=context), texts) for context in (None, 4))
    assert not np.allclose(whole.column("logprob"), cut.column("logprob"))


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 64))
def test_batches_hold_each_once_and_are_full(lengths: list[int], most: int) -> None:
    groups = list(batches(lengths, lambda: most))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group, following in zip_longest(groups, groups[1:]):
        longest = lengths[group[0]]
        assert len(group) == 1 or len(group) * longest <= most
        assert longest == max(lengths[index] for index in group)
        assert following is None or (len(group) + 1) * longest > most


class _Watched(LanguageModel):
    """A table model that says how it was fed."""

    def __init__(self, model: TableModel) -> None:
        self.name, self.vocab, self._model = model.name, model.vocab, model
        self.fed: list[tuple[int, int]] = []

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: torch.Tensor, parents: torch.Tensor | None) -> Next:
        self.fed.append((tokens.shape[0], tokens.shape[1]))
        return self._model._feed(state, tokens, parents)


def test_no_more_is_fed_at_once_than_asked_for() -> None:
    model = _Watched(_table())
    nextoken.read(model, ["abc" * n for n in (1, 30, 2, 5, 200, 7)], batch_tokens=32)
    assert max(rows * width for rows, width in model.fed) <= 32
    # The last token of a text predicts nothing that is asked, so begin token and all but it are fed.
    assert sum(rows * width for rows, width in model.fed) < 1.4 * sum(2 * n for n in (1, 30, 2, 5, 200, 7))


def test_a_cpu_is_given_what_its_caches_hold() -> None:
    model = _Watched(_table())
    nextoken.read(model, ["abc" * 20] * 200)
    assert 900 < max(rows * width for rows, width in model.fed) <= 1024


def test_without_a_begin_token_the_first_token_has_no_row() -> None:
    signature = nextoken.read(_table(bos=False), ["abca", "c", ""])
    assert [text.n_rows for text in signature.texts] == [2, 0, 0]
    assert [text.prefix for text in signature.texts] == [b"ab", b"c", b""]
    assert signature.column("position").tolist() == [1, 2]
    assert [signature.text(i) for i in range(3)] == ["abca", "c", ""]
    model = _table()
    assert nextoken.read(model, ["abca"], bos=False).texts[0].prefix == b"ab"


def test_a_text_may_stand_before() -> None:
    model = _table(order=2)
    signature = nextoken.read(model, ["ca"], bos_text="bé")
    expected = [model.row([1, 6])[3], model.row([6, 3])[0]]
    np.testing.assert_allclose(signature.column("logprob"), expected, atol=1e-6)
    assert signature.metadata.bos_text == "<bos>bé"
    assert signature.texts[0].prefix == b""
    assert signature.column("byte_start").tolist() == [0, 1]


def test_each_text_may_have_a_prompt_of_its_own() -> None:
    model = _table(order=2)
    signature = nextoken.read(model, ["ca", "b", "c"], prompts=["bé", "", "ab"], top=TOP)
    assert [text.prompt for text in signature.texts] == ["bé", "", "ab"]
    # "ab" and "c" are two texts: their tokens never merge across the seam.
    rows = [model.row([1, 6])[3], model.row([6, 3])[0], model.row([])[1], model.row([2])[3]]
    np.testing.assert_allclose(signature.column("logprob"), rows, atol=1e-6)
    assert signature.column("position").tolist() == [0, 1, 0, 0]
    assert signature.column("byte_start").tolist() == [0, 1, 0, 0]
    assert [signature.text(i) for i in range(3)] == ["ca", "b", "c"]
    alone = nextoken.read(model, "ca", prompts="bé", top=TOP)
    assert alone.texts[0].digest == signature.texts[0].digest != nextoken.read(model, "ca").texts[0].digest


def test_of_a_prompt_beyond_the_context_the_end_is_seen() -> None:
    model = _table(order=3, context=4)
    signature = nextoken.read(model, ["abca"], prompts=["bcbc"], overlap=2)
    # <bos> b c b c | ab c a in windows of four: [b c ab c], then [c ab c a].
    rows = [model.row([1, 3])[2], model.row([1, 3, 2])[3], model.row([3, 2, 3])[0]]
    np.testing.assert_allclose(signature.column("logprob"), rows, atol=1e-6)


def test_one_prompt_per_text() -> None:
    with pytest.raises(ValueError, match="2 prompts for 1 texts"):
        nextoken.read(_table(), ["a"], prompts=["b", "c"])
    with pytest.raises(ValueError, match="1 prompts for more texts"):
        nextoken.read(_table(), iter(["a", "b"]), prompts=iter(["b"]))
    with pytest.raises(ValueError, match="more prompts than the 1 texts"):
        nextoken.read(_table(), iter(["a"]), prompts=iter(["b", "c"]))


def test_a_special_token_may_stand_before() -> None:
    model = TableModel.random(3, order=1, eos=True, seed=1)
    signature = nextoken.read(model, "ab", bos_text="<eos>")
    assert signature.metadata.bos_text == "<eos>"
    np.testing.assert_allclose(signature.column("logprob")[0], model.row([4])[0], atol=1e-6)


def test_metadata_says_how_it_was_made() -> None:
    model = _table(context=6)
    metadata = nextoken.read(model, ["abc"], top=2).metadata
    assert (metadata.model, metadata.model_digest, metadata.tokenizer_digest) == (
        "table",
        model.digest,
        model.vocab.digest,
    )
    assert (metadata.vocab_size, metadata.dtype, metadata.top) == (8, "float64", 2)
    assert (metadata.context_length, metadata.overlap, metadata.bos_text) == (6, 3, "<bos>")
    assert set(metadata.versions) == {"nextoken", "torch", "transformers"}


def test_labels_name_every_token_that_occurs() -> None:
    signature = nextoken.read(_table(), ["a😀"], top=2)
    occurring = {*signature.column("token_id").tolist(), *signature.column("top_ids").flatten().tolist()}
    assert set(signature.vocab_labels) == occurring
    assert signature.vocab_labels[4] == "\\xf0\\x9f"


class _Bowed(LanguageModel):
    """Hidden states with a head: the embedding of the last token, so that they can be checked."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.name = f"bowed-{seed}"
        self.vocab = Vocab([b"a", b"b", b"c", b"d", b""], bos_id=4)
        self.embedding = torch.randn(5, 6, generator=generator)
        self.weight = torch.randn(5, 6, generator=generator)

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: torch.Tensor, parents: torch.Tensor | None) -> Next:
        from nextoken.head import Head

        return HeadNext(self.embedding[tokens.clamp(min=0)], Head(self.weight))


def test_hidden_states_are_kept_on_request() -> None:
    model = _Bowed()
    signature = nextoken.read(model, ["abc", "d", ""], hidden=True)
    expected = model.embedding[torch.tensor([4, 0, 1, 4])]
    np.testing.assert_array_equal(signature.column("hidden"), expected.numpy())
    assert "hidden" not in nextoken.read(model, ["abc"]).columns
    with pytest.raises(ModelError, match="table has no hidden states"):
        nextoken.read(_table(), ["abc"], hidden=True)


@pytest.mark.parametrize("batch_tokens", [3, 100])
def test_a_second_model_by_brute_force(batch_tokens: int) -> None:
    p, q = TableModel.random(4, order=2, seed=1, zeros=0.2), TableModel.random(4, order=2, seed=2)
    texts = ["abcdabcd", "d", "cc"]
    signature = nextoken.read(p, texts, against=q, batch_tokens=batch_tokens)
    row = 0
    for text in texts:
        own = p.vocab.encode(text).ids
        for place, token in enumerate(own):
            left, right = p.row(own[:place]), q.row(own[:place])
            expected = brute.compared(left, right) | {"against_logprob": right[token].item()}
            for name, value in expected.items():
                np.testing.assert_allclose(signature.column(name)[row], value, atol=2e-5, rtol=2e-5, err_msg=name)
            row += 1
    assert signature.metadata.against == "table" and signature.metadata.against_digest == q.digest
    assert signature.summary()["mean_kl"] == pytest.approx(signature.column("kl").mean())


def test_a_second_model_with_heads_by_brute_force() -> None:
    p, q = _Bowed(1), _Bowed(2)
    signature = nextoken.read(p, ["abcdd"], against=q)
    fed = torch.tensor([4, 0, 1, 2, 3])
    for row in range(5):
        left, right = (torch.log_softmax(m.weight.double() @ m.embedding[fed[row]].double(), 0) for m in (p, q))
        for name, value in brute.compared(left, right).items():
            np.testing.assert_allclose(signature.column(name)[row], value, atol=2e-5, rtol=2e-5, err_msg=name)
        assert signature.column("against_logprob")[row] == pytest.approx(right[[0, 1, 2, 3, 3][row]].item(), abs=1e-5)


def test_the_same_model_twice_differs_by_nothing() -> None:
    model = _table()
    signature = nextoken.read(model, ["abcab"], against=model)
    for name in ("kl", "reverse_kl", "js"):
        np.testing.assert_allclose(signature.column(name), 0, atol=1e-6)
    np.testing.assert_allclose(signature.column("cross_entropy"), signature.column("entropy"), atol=1e-6)


def test_another_vocabulary_is_sent_to_compare() -> None:
    with pytest.raises(ModelError, match=r"different vocabularies.*nextoken\.compare"):
        nextoken.read(TableModel.random(3), "ab", against=TableModel.random(4))


def test_bytes_and_names() -> None:
    signature = nextoken.read(_table(), [b"ab\xc3\xa9", "c"], names=["first", "second"])
    assert [text.name for text in signature.texts] == ["first", "second"]
    with pytest.raises(InputError, match="first: not UTF-8"):
        nextoken.read(_table(), [b"\xff"], names=["first"], strict=True)


def test_what_cannot_be_spelled_is_named() -> None:
    with pytest.raises(InputError, match="text-1: byte b'z' at 1 has no token"):
        nextoken.read(_table(), ["a", "bz"])


def test_texts_are_taken_as_they_are_needed() -> None:
    """A generator is never ahead by more than what is sorted together."""
    taken, scored = 0, 0

    def texts() -> object:
        nonlocal taken
        for _ in range(400):
            taken += 1
            yield "abcabc"

    from nextoken.signature.blocks import Reading
    from nextoken.signature.passage import passage
    from nextoken.signature.texts import incoming

    model = _table()
    before = np.array([model.vocab.bos_id])
    reading = Reading(model, None, top=1, hidden=False, overlap=None, batch_tokens=8)
    passages = (passage(i, text, model.vocab, before) for i, text in enumerate(incoming(texts())))  # type: ignore[arg-type]
    for block in reading.blocks(passages):
        scored += len(block.finished)
        assert taken - scored <= 1
        assert len(block.finished) <= 16 * 8
    assert scored == 400


def test_a_long_text_comes_in_pieces() -> None:
    from nextoken.signature.blocks import Reading
    from nextoken.signature.passage import passage
    from nextoken.signature.texts import Text

    model = _table()
    reading = Reading(model, None, top=1, hidden=False, overlap=None, batch_tokens=50)
    text = passage(0, Text("x", b"c" * 1000), model.vocab, np.array([model.vocab.bos_id]))
    sizes = [len(block.table) for block in reading.blocks([text])]
    assert max(sizes) == 50 and sum(sizes) == 1000


@pytest.mark.parametrize(("option", "value"), [("top", -1), ("batch_tokens", 0), ("overlap", 9)])
def test_arguments_out_of_range(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=option):
        nextoken.read(_table(context=6), "abc", **{option: value})


def test_the_top_may_be_empty_or_everything() -> None:
    nothing = nextoken.read(_table(), "abc", top=0)
    assert nothing.column("top_ids").shape == (2, 0)
    np.testing.assert_allclose(nothing.column("rest_mass"), 1, atol=1e-6)
    everything = nextoken.read(_table(), "abc", top=100)
    assert everything.column("top_ids").shape == (2, 8)
    np.testing.assert_allclose(everything.column("rest_mass"), 0, atol=1e-6)


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    nextoken.read(_table(), ["abc"] * 3, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "tokens" in captured.err
    nextoken.read(_table(), ["abc"] * 3)
    assert capsys.readouterr().err == ""

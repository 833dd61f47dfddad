"""Vocabularies aligned, and models seen through that: brute force over whole prefixes, the contract, limits, misuse."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextoken.decode.generate import generate
from nextoken.model import load
from nextoken.model.aligned import Aligned, AlignedNext, spell
from nextoken.model.alignment import Alignment, counterparts
from nextoken.model.base import LanguageModel
from nextoken.model.ensemble import Ensemble
from nextoken.model.hf import HFModel
from nextoken.model.ngram import NgramModel
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab
from nextoken.testing import check_language_model

TEXT = (Path(__file__).parents[1] / "data" / "alice.txt").read_text(encoding="utf-8")

LETTERS = TableModel.random(["a", "b", "c"], order=2, seed=1, name="letters")
PIECES = TableModel.random(["a", "b", "c", "ab", "bc", "abc", "cca"], order=2, seed=2, name="pieces")
ENDING = TableModel.random(["a", "b", "c", "ba", "cab"], order=1, eos=True, seed=3, name="ending")
SPARSE = TableModel.random(["b", "a", "c", "aa"], order=2, eos=True, zeros=0.3, seed=4, name="sparse")


class Recurrent(TableModel):
    supports_trees = False


class Short(TableModel):
    context_length = 7


def chains_only(table: TableModel) -> TableModel:
    return Recurrent(table._log_table.exp().reshape((table.vocab.size,) * (table.order + 1)), ["a", "b", "c"])


def short(table: TableModel) -> TableModel:
    return Short(table._log_table.exp().reshape((table.vocab.size,) * (table.order + 1)), ["a", "b", "c"])


def exactly(model: LanguageModel, target: LanguageModel) -> Aligned:
    return Aligned(model, target.vocab, Alignment.exact(model.vocab, target.vocab))


def nearly(model: LanguageModel, target: LanguageModel, **options: object) -> Aligned:
    return Aligned(model, target.vocab, Alignment.minimum_edit(model.vocab, target.vocab), **options)  # type: ignore[arg-type]


@cache
def small_bpe() -> object:
    """A byte-level BPE of 400 tokens that shares neither ids nor merges with that of the bundled models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT[:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@cache
def stranger() -> HFModel:
    """A Llama model of random weights over `small_bpe`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    return HFModel(LlamaForCausalLM(config), small_bpe(), name="stranger")  # type: ignore[arg-type]


@cache
def nano() -> LanguageModel:
    return load("nano")


def counted() -> NgramModel:
    """An n-gram model without a begin token."""
    vocab = Vocab([b"a", b"b", b"c", b"aab", b"cb", b""], eos_ids=[5])
    texts = [vocab.encode(text).ids for text in ("abcaabcb", "cbcbaaba", "ccabab")]
    return NgramModel.from_tokens(texts, vocab, order=3, discount=0.5)


MODELS = {
    "pieces over letters": lambda: exactly(PIECES, LETTERS),
    "letters over pieces": lambda: exactly(LETTERS, PIECES),
    "ends to nothing": lambda: nearly(ENDING, PIECES),
    "ends to ends, some impossible": lambda: nearly(SPARSE, ENDING),
    "chains only": lambda: nearly(chains_only(LETTERS), PIECES),
    "short context": lambda: nearly(short(LETTERS), PIECES),
    "no begin token": lambda: nearly(counted(), PIECES, begin=[5]),
    "aligned twice": lambda: nearly(nearly(ENDING, PIECES), LETTERS),
    "in an ensemble": lambda: Ensemble([PIECES, exactly(LETTERS, PIECES), nearly(ENDING, PIECES)]),
    "network over nano's tokens": lambda: nearly(stranger(), nano()),
    "nano over another's tokens": lambda: nearly(nano(), stranger()),
}


@pytest.mark.parametrize("name", MODELS)
def test_keeps_the_contract(name: str) -> None:
    length = 8 if "nano" in name else 12
    assert all(proof.skipped is None for proof in check_language_model(MODELS[name](), length=length))


def brute(source: TableModel, alignment: Alignment, text: str) -> Tensor:
    """log p after a text, from the dense matrix and the source's table."""
    projected = source.row(source.vocab.encode(text).ids).exp() @ alignment.dense()
    return (projected / projected.sum()).log()


@pytest.mark.parametrize(
    ("source", "target"), [(PIECES, LETTERS), (LETTERS, PIECES), (ENDING, SPARSE), (SPARSE, ENDING)]
)
@given(data=st.data())
@settings(max_examples=25)
def test_every_prefix_is_encoded_by_itself(source: TableModel, target: TableModel, data: st.DataObject) -> None:
    """However the tokens are fed, what follows each is what the source, started anew on the text so far, says."""
    alignment = Alignment.minimum_edit(source.vocab, target.vocab)
    model = Aligned(source, target.vocab, alignment)
    ordinary = [i for i in range(target.vocab.size) if target.vocab.token_bytes[i]]
    tokens = data.draw(st.lists(st.sampled_from(ordinary), min_size=1, max_size=12))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=4)) | {len(tokens)})
    state = model.start()
    said = [model.extend(state, [[target.vocab.bos_id]]).log_probs()[0]]
    for begin, end in zip((0, *cuts), cuts, strict=False):
        said.append(model.extend(state, [tokens[begin:end]]).log_probs()[0])
    expected = [brute(source, alignment, target.vocab.decode_text(tokens[:n])) for n in range(len(tokens) + 1)]
    torch.testing.assert_close(torch.cat(said), torch.stack(expected), atol=1e-9, rtol=0)


@given(data=st.data())
@settings(max_examples=25)
def test_every_node_of_a_tree_is_encoded_by_itself(data: st.DataObject) -> None:
    alignment = Alignment.minimum_edit(ENDING.vocab, PIECES.vocab)
    tokens = data.draw(st.lists(st.integers(0, 6), min_size=2, max_size=7))
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(len(tokens))]
    for source in (ENDING, Recurrent(ENDING._log_table.exp().reshape(7, 7), ["a", "b", "c", "ba", "cab"], eos=True)):
        model = Aligned(source, PIECES.vocab, alignment)
        state = model.start()
        model.extend(state, [[PIECES.vocab.bos_id, 3, 2]])
        said = model.extend(state, [tokens], parents).log_probs()[0]
        path: list[int] = []
        for node in range(len(tokens)):
            path, at = [], node
            while at >= 0:
                path.insert(0, at)
                at = parents[at]
            text = "abc" + PIECES.vocab.decode_text(tokens[i] for i in path)
            torch.testing.assert_close(said[node], brute(ENDING, alignment, text), atol=1e-9, rtol=0)
        state.keep(path)
        after = model.extend(state, [[1]]).log_probs()[0, 0]
        torch.testing.assert_close(after, brute(ENDING, alignment, text + "b"), atol=1e-9, rtol=0)


def test_two_networks_with_their_own_tokenizers() -> None:
    """nano's tokens of a text, each prefix encoded by the other's tokenizer and read from its start."""
    model = nearly(stranger(), nano())
    text = "Alice was beginning to get very tired — of sitting by her sister"
    ids = nano().vocab.encode(text).ids
    said = model.predict([[nano().vocab.bos_id, *ids]])
    for n in range(len(ids) + 1):
        try:
            prefix = nano().vocab.decode(ids[:n]).decode()
        except UnicodeDecodeError:  # within the dash
            continue
        own = [0, *stranger().vocab.encode(prefix).ids]
        raw = stranger().predict([own]).log_probs()[0, -1].double().exp() @ model.alignment.dense()
        torch.testing.assert_close(said[0, n].projected()[0, 0].double(), raw, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(said[0, n].log_probs()[0, 0].double(), (raw / raw.sum()).log(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("trees", [True, False])
def test_only_what_is_new_is_fed(trees: bool) -> None:
    """A text decoded token by token costs the source little more than its own tokens."""
    fed: list[int] = []

    class Watched(TableModel):
        supports_trees = trees

        def _feed(self, state, tokens, parents):  # type: ignore[no-untyped-def]
            fed.append(int((tokens >= 0).sum()))
            return super()._feed(state, tokens, parents)

    table = PIECES._log_table.exp().reshape(8, 8, 8)
    model = exactly(Watched(table, ["a", "b", "c", "ab", "bc", "abc", "cca"]), LETTERS)
    state = model.start()
    tokens = [LETTERS.vocab.bos_id, *LETTERS.vocab.encode("abcccabcabbcabccaab" * 3).ids]
    for token in tokens:
        model.extend(state, [[token]])
    assert sum(fed) <= 1.5 * len(tokens) and max(fed) <= 3
    state.rewind(4)
    before = sum(fed)
    model.extend(state, [tokens[-4:]])
    assert sum(fed) - before <= 8
    fed.clear()
    model.predict([tokens])  # one pass over the tree of all prefixes
    assert sum(fed) <= 1.5 * len(tokens) and (not trees or len(fed) == 1)
    state = model.start()
    model.extend(state, [tokens])
    fed.clear()
    model.extend(state, [tokens[1:2]])
    assert sum(fed) <= 3
    if trees:
        # The path kept of a tree is not fed again.
        model.extend(state, [tokens[1:9]], parents=list(range(-1, 7)))
        state.keep(list(range(8)))
        fed.clear()
        model.extend(state, [tokens[9:10]])
        assert fed[0] <= 3


@pytest.mark.parametrize("source", [LETTERS, chains_only(LETTERS)], ids=["trees", "chains"])
def test_the_source_remembers_the_text(source: TableModel) -> None:
    model = exactly(source, LETTERS)
    state = model.start(2)
    model.extend(state, [[3, 0, 1, 2, 2], [3, 1, -1, -1, -1]])
    assert state.memory.inner.tokens == ((3, 0, 1, 2, 2), (3, 1))  # type: ignore[attr-defined]


def test_incomplete_characters() -> None:
    """The beginning of a character is spelled by the source's tokens for its bytes, or not at all."""
    target = Vocab([b"a", b"\xe2", b"\x82", b"\xac", b""], bos_id=4)
    bytewise = stranger()
    model = Aligned(bytewise, target, Alignment.exact(bytewise.vocab, target))
    by_bytes = {bytewise.vocab.token_bytes[i]: i for i in range(3, 259)}
    a, first, second = by_bytes[b"a"], by_bytes[b"\xe2"], by_bytes[b"\x82"]
    assert model.encode([4, 0, 1]) == (0, a, first)
    assert model.encode([4, 0, 1, 2]) == (0, a, first, second)
    assert model.encode([4, 0, 1, 2, 3, 0]) == (0, *bytewise.vocab.encode("a€a").ids)
    assert model.encode([4, 2, 0, 2, 2]) == (0, second, a, second, second)
    # A tokenizer of words has no such bytes: the distribution stays that of the last complete character.

    class Worded(Vocab):
        def encode(self, text):  # type: ignore[no-untyped-def]
            return super().encode(text.decode() if isinstance(text, bytes) else text)

    words = Worded([b"a", "€".encode(), b""], bos_id=2)
    assert spell(words, b"a\xe2\x82") == (0,)
    assert spell(words, b"a\xe2\x82\xac") == (0, 1)
    assert spell(words, b"\xaca\xff\xffa") == (0, 0)


def test_marks_become_the_sources_own() -> None:
    source = Vocab([b"a", b"b", b"", b"", b""], labels={2: "<s>", 3: "</s>", 4: "<tool>"}, bos_id=2, eos_ids=[3])
    target = Vocab(
        [b"", b"ab", b"", b"", b"", b""],
        labels={0: "<tool>", 2: "<end>", 3: "</s>", 4: "<begin>", 5: "<mine>"},
        bos_id=4,
        eos_ids=[2, 3],
    )
    assert counterparts(target, source) == {0: 4, 2: 3, 3: 3, 4: 2}
    assert counterparts(source, target) == {2: 4, 3: 3, 4: 0}
    table = TableModel.random(["a", "b"], seed=0)
    model = Aligned(_With(table, source), target, Alignment.exact(source, target))
    assert model.encode([4, 1, 0, 1, 5, 1, 2, 4]) == (2, 0, 1, 4, 0, 1, 0, 1, 3, 2)
    assert model.encode([1]) == (2, 0, 1) and model.encode([4]) == (2,)


class _With(LanguageModel):
    """Nothing but a vocabulary."""

    def __init__(self, model: TableModel, vocab: Vocab) -> None:
        self.vocab, self.name = vocab, model.name

    def _remember(self, batch):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def _feed(self, state, tokens, parents):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def test_long_texts_are_seen_from_a_later_place() -> None:
    model = nearly(short(LETTERS), LETTERS)
    text = "abcabcbacbacabcbbbaacbac"
    tokens = [3, *LETTERS.vocab.encode(text).ids]
    for n in range(1, len(tokens) + 1):
        own = model.encode(tokens[:n])
        assert len(own) <= 7 and own[0] == 3
        # The place moves on by half a context at a time, so that what was read can mostly be gone on from.
        start = n - len(own)
        assert list(own[1:]) == tokens[1 + start : n] and start % 3 == 0 and len(own) - 1 >= min(n - 1, 3)
    assert model.predict([tokens]).log_probs().isfinite()[..., :3].all()


def lengths(left: bytes, right: bytes) -> int:
    """Levenshtein's distance by its recursion."""
    row = list(range(len(right) + 1))
    for i, letter in enumerate(left, 1):
        above, row = row, [i]
        for j, other in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return row[-1]


words = st.lists(st.text("abcX é", min_size=1, max_size=7).map(str.encode), min_size=1, max_size=25)


@pytest.mark.paper("2401.10491")
@given(words, words)
@settings(max_examples=150)
def test_minimum_edit_is_the_minimum(sources: list[bytes], targets: list[bytes]) -> None:
    source, target = Vocab([*sources, b""], eos_ids=[len(sources)]), Vocab([b"", *targets], eos_ids=[0])
    alignment = Alignment.minimum_edit(source, target)
    assert not len(alignment.lost) and alignment.weights.eq(1).all()
    choices = dict(zip(alignment.sources.tolist(), alignment.targets.tolist(), strict=True))
    for i, spelled in enumerate(sources):
        best = min((lengths(spelled, other), j) for j, other in enumerate(targets, 1))
        if best[0]:
            assert choices[i] == best[1]
        else:
            assert targets[choices[i] - 1] == spelled
    assert choices[len(sources)] == 0


@pytest.mark.paper("2401.10491")
def test_minimum_edit_between_two_tokenizers() -> None:
    source, target = nano().vocab, stranger().vocab
    alignment = Alignment.minimum_edit(source, target)
    exact = Alignment.exact(source, target)
    kept = dict(zip(exact.sources.tolist(), exact.targets.tolist(), strict=True))
    found = dict(zip(alignment.sources.tolist(), alignment.targets.tolist(), strict=True))
    assert kept.items() <= found.items() and len(found) == source.size
    ordinary = [i for i in range(target.size) if target.token_bytes[i]]
    for i in range(5, source.size, 97):
        if i not in kept:
            own = source.token_bytes[i]
            assert found[i] == min(ordinary, key=lambda j: (lengths(own, target.token_bytes[j]), j))


def test_a_vocabulary_to_itself_is_the_identity() -> None:
    for vocab in (nano().vocab, stranger().vocab, ENDING.vocab, Vocab([b"a", b"a", b"", b""], eos_ids=[3])):
        for alignment in (Alignment.exact(vocab, vocab), Alignment.minimum_edit(vocab, vocab)):
            assert alignment.sources.tolist() == alignment.targets.tolist() == list(range(vocab.size))
    said = exactly(PIECES, PIECES).predict([[7, 0, 3, 5]]).log_probs()
    # Not PIECES' own distribution after these tokens, but after those in which it would spell the text.
    torch.testing.assert_close(said[0, -1], PIECES.row(PIECES.vocab.encode("aababc").ids))


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=60)
def test_projection_is_the_matrix_product(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    matrix *= torch.rand(rows, columns, generator=generator) < 0.5
    matrix = matrix / matrix.sum(-1, keepdim=True).clamp(min=1e-9)
    probs = torch.softmax(torch.randn(2, 3, rows, generator=generator, dtype=torch.float64), -1)
    alignment = Alignment.given(matrix)
    torch.testing.assert_close(alignment.project(probs), probs @ matrix)
    torch.testing.assert_close(alignment.dense(), matrix)
    assert alignment.lost.tolist() == (matrix.sum(-1) == 0).nonzero()[:, 0].tolist()
    assert alignment.unreached.tolist() == (matrix.sum(0) == 0).nonzero()[:, 0].tolist()
    total = alignment.project(probs).sum(-1)
    torch.testing.assert_close(total, 1 - probs[..., alignment.lost].sum(-1))
    assert Alignment.given(matrix.to_sparse()).digest == alignment.digest


def test_lost_mass() -> None:
    """What has no target is made up for; where nothing is left, the tokens that can be reached are equally probable."""
    matrix = torch.zeros(4, 8, dtype=torch.float64)
    matrix[0, 2], matrix[1, 5] = 1.0, 1.0
    model = Aligned(LETTERS, PIECES.vocab, Alignment.given(matrix))
    p = LETTERS.row(LETTERS.vocab.encode("ab").ids).exp().tolist()
    said = model.predict([[7, 3]])[0, -1]
    assert isinstance(said, AlignedNext)
    assert said.projected()[0, 0].tolist() == pytest.approx([0, 0, p[0], 0, 0, p[1], 0, 0])
    assert said.log_probs()[0, 0].exp()[[2, 5]].tolist() == pytest.approx([p[i] / (p[0] + p[1]) for i in (0, 1)])
    never = TableModel.given({(): [0.0, 0.0, 1.0]}, ["a", "b", "c"])
    flat = Aligned(never, PIECES.vocab, Alignment.given(matrix)).predict([[7, 3]])
    assert flat.log_probs()[0, -1].exp().tolist() == pytest.approx([0, 0, 0.5, 0, 0, 0.5, 0, 0])
    check_language_model(model)


def test_an_ensemble_across_tokenizers_generates() -> None:
    mixed = Ensemble([PIECES, exactly(LETTERS, PIECES)])
    assert generate(mixed, "ab", max_tokens=10, seed=1).text
    tokens = [7, *PIECES.vocab.encode("abcab").ids]
    expected = (
        0.5 * PIECES.row(tokens[1:]).exp()
        + 0.5 * brute(LETTERS, Alignment.exact(LETTERS.vocab, PIECES.vocab), "abcab").exp()
    )
    torch.testing.assert_close(mixed.predict([tokens]).log_probs()[0, -1].exp(), expected)
    assert generate(nearly(stranger(), nano()), "Down the ", max_tokens=8, seed=0).text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Aligned(LETTERS, ENDING.vocab, Alignment.exact(LETTERS.vocab, PIECES.vocab)), "must be"),
        (lambda: Aligned(LETTERS, PIECES.vocab, Alignment.given(torch.zeros(4, 8))), "empty"),
        (lambda: nearly(counted(), PIECES), "begin="),
        (lambda: nearly(counted(), PIECES, begin=[9]), "begin="),
        (lambda: nearly(short(LETTERS), PIECES, begin=[3] * 7), "context"),
        (lambda: Alignment.given(torch.tensor([[0.5, 0.4]])), "row 0 sums to 0.9"),
        (lambda: Alignment.given(torch.tensor([[1.5, -0.5]])), "at least 0"),
        (lambda: Alignment.given(torch.ones(3)), "matrix"),
        (lambda: Alignment(torch.tensor([0]), torch.tensor([2]), torch.ones(1), (1, 2)), "target id"),
        (lambda: Alignment.given(torch.eye(3)).project(torch.ones(4)), "over 4"),
    ],
)
def test_misuse_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_text_the_source_cannot_spell_leaves_the_state_as_it_was() -> None:
    target = Vocab([b"a", b"b", b"z", b""], bos_id=3)
    model = Aligned(LETTERS, target, Alignment.exact(LETTERS.vocab, target))
    state = model.start()
    model.extend(state, [[3, 0]])
    with pytest.raises(ValueError, match="no token"):
        model.extend(state, [[2]])
    assert state.tokens == ((3, 0),)
    after = model.extend(state, [[1]]).log_probs()[0, 0]
    torch.testing.assert_close(after, model.predict([[3, 0, 1]]).log_probs()[0, -1])


def test_digests_tell_settings_apart() -> None:
    models = [
        exactly(LETTERS, PIECES),
        exactly(PIECES, LETTERS),
        nearly(PIECES, LETTERS),
        nearly(PIECES, LETTERS, begin=[7, 0]),
    ]
    assert len({model.digest for model in models}) == len(models)

"""NgramModel against Kneser-Ney done by plain counting, its limits, and its use on real text."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextoken.errors import ModelError
from nextoken.model import bundled_path
from nextoken.model._ngram_counts import estimated_discounts
from nextoken.model.ngram import NgramModel
from nextoken.model.table import TableModel
from nextoken.model.tokenizer import TokenizerVocab
from nextoken.model.vocab import Vocab
from nextoken.testing import check_language_model

ALICE = (Path(__file__).parents[1] / "data" / "alice.txt").read_bytes()
LETTERS = Vocab([b"a", b"b", b"c", b"d", b"", b""], labels={4: "<bos>", 5: "<eos>"}, bos_id=4, eos_ids=[5])
PLAIN = Vocab([b"a", b"b", b"c", b"d"])
BYTES = Vocab([bytes([b]) for b in range(256)] + [b""], labels={256: "<bos>"}, bos_id=256)

corpora = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=4)


def brute_force(
    sequences: Sequence[Sequence[int]], vocab: Vocab, order: int, discount: float | None
) -> Callable[[Sequence[int]], list[float]]:
    """p(. | context) by the formula of NgramModel's docstring, over dictionaries of tuples."""
    begin = "begin" if vocab.bos_id is None else vocab.bos_id
    padded = [(begin, *row) for row in sequences]
    occurrences: Counter[tuple[object, ...]] = Counter()
    lefts: dict[tuple[object, ...], set[object]] = {}
    for row in padded:
        for end in range(1, len(row)):
            for n in range(1, order + 1):
                if end - n + 1 >= 0:
                    gram = row[end - n + 1 : end + 1]
                    occurrences[gram] += 1
                    if end - n >= 0:
                        lefts.setdefault(gram, set()).add(row[end - n])
    a = {g: c if len(g) == order or g[0] == begin else len(lefts[g]) for g, c in occurrences.items()}

    def discounts(n: int) -> tuple[float, float, float]:
        if discount is not None:
            return (discount,) * 3
        n1, n2, n3, n4 = (sum(1 for g, c in a.items() if len(g) == n and c == k) for k in (1, 2, 3, 4))
        if n1 == 0 or n2 == 0:
            return (0.5, 0.5, 0.5)
        y = n1 / (n1 + 2 * n2)
        if n3 and n4:
            d1, d2, d3 = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
            if 0 <= d1 <= 1 and 0 <= d2 <= 2 and 0 <= d3 <= 3:
                return (d1, d2, d3)
        return (y, y, y)

    cuts = {n: discounts(n) for n in range(1, order + 1)}
    predictable = {w for w in range(vocab.size) if w not in vocab.specials} | {row[-1] for row in sequences if row}

    def p(context: tuple[object, ...], w: int) -> float:
        n = len(context) + 1
        shorter = p(context[1:], w) if context else (w in predictable) / len(predictable)
        seen = {g[-1]: c for g, c in a.items() if len(g) == n and g[:-1] == context}
        if not seen:
            return shorter
        total = sum(seen.values())
        taken = {word: cuts[n][min(c, 3) - 1] for word, c in seen.items()}
        own = (seen[w] - taken[w]) / total if w in seen else 0.0
        return own + sum(taken.values()) / total * shorter

    return lambda context: [p(tuple(context)[-(order - 1) :] if order > 1 else (), w) for w in range(vocab.size)]


@given(corpora, st.integers(1, 4), st.sampled_from([None, 0.0, 0.6]), st.booleans(), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_equals_plain_counting(
    sequences: list[list[int]], order: int, discount: float | None, has_bos: bool, eos: bool, data: st.DataObject
) -> None:
    vocab = LETTERS if has_bos else PLAIN
    eos = eos and has_bos
    model = NgramModel.from_tokens(sequences, vocab, order=order, discount=discount, eos=eos)
    oracle = brute_force([[*row, 5] if eos else row for row in sequences], vocab, order, discount)
    contexts = [[4] if has_bos else [0], *sequences, data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))]
    for context in contexts:
        row = model.predict([context]).log_probs()[0, -1].exp().tolist()
        assert row == pytest.approx(oracle(context), abs=1e-12)


@given(corpora, st.integers(1, 5), st.one_of(st.none(), st.floats(0, 1)), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_every_row_is_a_distribution(sequences: list[list[int]], order: int, discount: float | None, seed: int) -> None:
    model = NgramModel.from_tokens(sequences, LETTERS, order=order, discount=discount)
    tokens = torch.randint(0, 5, (2, 9), generator=torch.Generator().manual_seed(seed))
    probs = model.predict(tokens).log_probs().exp()
    assert torch.allclose(probs.sum(-1), torch.ones(2, 9, dtype=torch.float64), atol=1e-12)
    assert (probs[..., 4] == 0).all()  # <bos> comes nowhere, and no end was counted
    assert (probs[..., 5] == 0).all()
    if discount is None:
        assert (probs[..., :4] > 0).all()


def test_order_1_without_discount_is_relative_frequencies() -> None:
    sequences = [[0, 1, 1, 2], [1, 1]]
    model = NgramModel.from_tokens(sequences, Vocab([b"a", b"b", b"c", b"d", b""], bos_id=4), order=1, discount=0)
    table = TableModel.from_counts(sequences, ["a", "b", "c", "d"], order=0)
    assert torch.allclose(model.predict([[4, 0]]).log_probs().exp()[0, 1], table.row().exp(), atol=1e-12)


def test_without_discount_contexts_that_occurred_have_relative_frequencies() -> None:
    sequences = [[0, 1, 1, 2, 0, 1, 3], [1, 1, 0], [2, 0, 1, 1]]
    model = NgramModel.from_tokens(sequences, Vocab([b"a", b"b", b"c", b"d", b""], bos_id=4), order=3, discount=0)
    table = TableModel.from_counts(sequences, ["a", "b", "c", "d"], order=2)
    for context in ([0, 1], [1, 1], [2, 0]):
        read = model.predict([[4, *context]]).log_probs()[0, -1]
        assert torch.allclose(read.exp(), table.row(context).exp(), atol=1e-12)


def test_a_context_never_seen_backs_off_to_its_end() -> None:
    model = NgramModel.from_tokens([[0, 1, 2, 0, 1, 3, 1, 2]], LETTERS, order=3)
    rows = model.predict([[4, 3, 3, 0]]).log_probs()[0].exp()
    after_3, after_0, nothing = model.probs(torch.tensor([[-1, 3], [-1, 0], [-1, -1]]))
    assert torch.allclose(rows[2], after_3, atol=1e-15)
    assert torch.allclose(rows[3], after_0, atol=1e-15)
    assert not torch.allclose(rows[3], nothing)
    assert torch.allclose(model.predict([[4, 5]]).log_probs()[0, 1].exp(), nothing, atol=1e-15)  # nothing follows <eos>


def test_discounts_follow_the_counts_of_counts() -> None:
    counts = torch.tensor([1] * 40 + [2] * 18 + [3] * 9 + [4] * 5 + [7, 20])
    y = 40 / (40 + 36)
    expected = (1 - 2 * y * 18 / 40, 2 - 3 * y * 9 / 18, 3 - 4 * y * 5 / 9)
    assert estimated_discounts(counts) == pytest.approx(expected)
    assert estimated_discounts(torch.tensor([1, 1, 2])) == pytest.approx((0.5, 0.5, 0.5))  # y = 2 / 4, no 3s
    assert estimated_discounts(torch.tensor([1, 1, 1, 2])) == pytest.approx((0.6, 0.6, 0.6))
    assert estimated_discounts(torch.tensor([5, 9])) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("order", "has_bos"), [(1, True), (2, False), (4, True)])
def test_keeps_the_contract(order: int, has_bos: bool) -> None:
    text = ALICE[:3000]
    vocab = BYTES if has_bos else Vocab(BYTES.token_bytes[:256])
    proofs = check_language_model(NgramModel.from_text(text, vocab, order=order))
    assert all(proof.skipped is None for proof in proofs)


@pytest.fixture(scope="module")
def alice() -> NgramModel:
    return NgramModel.from_text(ALICE[:32_000], BYTES, order=5)


def held_out_bits(model: NgramModel, text: bytes) -> float:
    tokens = torch.tensor([list(text)])
    fed = torch.cat([torch.tensor([[256]]), tokens[:, :-1]], 1)
    logprob = model.predict(fed).statistics(tokens).logprob
    assert logprob is not None
    return -float(logprob.double().mean()) / math.log(2)


def test_beats_add_one_on_real_text(alice: NgramModel) -> None:
    held_out = ALICE[32_000:38_000]
    seen: Counter[bytes] = Counter()
    contexts: Counter[bytes] = Counter()
    train = ALICE[:32_000]
    for end in range(4, len(train)):
        seen[train[end - 4 : end + 1]] += 1
        contexts[train[end - 4 : end]] += 1
    bits = [
        -math.log2((seen[held_out[i - 4 : i + 1]] + 1) / (contexts[held_out[i - 4 : i]] + 256))
        for i in range(4, len(held_out))
    ]
    add_one = sum(bits) / len(bits)
    ours = held_out_bits(alice, held_out)
    assert ours < 2.3 < 6 < add_one  # bits per byte: 2.24 against 6.19
    by_order = [held_out_bits(NgramModel.from_text(train, BYTES, order=order), held_out) for order in (1, 2, 3)]
    assert ours < by_order[2] < by_order[1] < by_order[0]


def test_statistics_in_blocks_are_those_of_the_whole(alice: NgramModel, monkeypatch: pytest.MonkeyPatch) -> None:
    following = alice.predict([[256, *ALICE[100:140]]])
    targets = torch.tensor([[*ALICE[100:141]]])
    whole = following.statistics(targets, top=3)
    monkeypatch.setattr("nextoken.model.ngram._ENTRIES", 7 * 257)
    parts = following.statistics(targets, top=3)
    for name, values in whole.as_dict().items():
        assert torch.equal(values, parts.as_dict()[name]), name


def test_what_is_saved_is_what_is_loaded(alice: NgramModel, tmp_path: Path) -> None:
    alice.save(tmp_path / "model")
    again = NgramModel.load(tmp_path / "model")
    assert (again.name, again.order, again.digest, again.discounts) == ("ngram", 5, alice.digest, alice.discounts)
    assert again.vocab.digest == BYTES.digest
    fed = [[256, *b"Alice was "]]
    assert torch.equal(again.predict(fed).log_probs(), alice.predict(fed).log_probs())
    other = NgramModel.from_text(ALICE[:31_999], BYTES, order=5)
    assert other.digest != alice.digest
    with pytest.raises(ModelError, match="no n-gram model in"):
        NgramModel.load(tmp_path)


def test_a_tokenizer_is_saved_with_the_counts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocab = TokenizerVocab(AutoTokenizer.from_pretrained(bundled_path("nano")))
    model = NgramModel.from_text([ALICE[:4000].decode(), "No more."], vocab, order=3, eos=True)
    model.save(tmp_path)
    again = NgramModel.load(tmp_path)
    text = "the Rabbit sighed"
    assert again.vocab.encode(text) == vocab.encode(text)
    fed = [[vocab.bos_id, *vocab.encode(text).ids]]
    assert torch.equal(again.predict(fed).log_probs(), model.predict(fed).log_probs())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no token in the text"):
        NgramModel.from_text("", LETTERS)
    with pytest.raises(ValueError, match="order must be at least 1"):
        NgramModel.from_text("ab", LETTERS, order=0)
    with pytest.raises(ValueError, match="discount must lie"):
        NgramModel.from_text("ab", LETTERS, discount=1.5)
    with pytest.raises(ValueError, match=r"must lie in \[0, 6\)"):
        NgramModel.from_tokens([[0, 6]], LETTERS)
    with pytest.raises(ValueError, match="in the middle"):
        NgramModel.from_tokens([[0, 4, 1]], LETTERS)
    with pytest.raises(ValueError, match="no end token"):
        NgramModel.from_text("ab", PLAIN, eos=True)
    # A begin token at the head is taken once.
    assert NgramModel.from_tokens([[4, 0, 1]], LETTERS).digest == NgramModel.from_tokens([[0, 1]], LETTERS).digest

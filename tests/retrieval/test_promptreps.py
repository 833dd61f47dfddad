"""PromptReps and the index over its representations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import nextoken
from nextoken.retrieval.fusion import Index, Ranking, fuse, ndcg
from nextoken.retrieval.promptreps import PASSAGE, QUERY, Representations, WordPrompt, represent

TEXTS = [
    "The whale swam under the ship and the sailors were afraid.",
    "A doctor made a creature.",
    "Alice followed the white rabbit down the hole, and {nobody} saw her.",
    "the and of",
]


@pytest.fixture(scope="module")
def model():
    return nextoken.load("nano")


@pytest.fixture(scope="module")
def represented(model):
    return represent(model, TEXTS, batch=3)


def by_hand(model, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Hidden state and raw logits at the end of one prompt, fed alone and token by token."""
    asked = PASSAGE.asked.replace("{text}", text)
    ids = [model.vocab.bos_id, *model.vocab.encode(asked + "\n").ids, *model.vocab.encode('The word is: "').ids]
    state = model.start()
    for token in ids:
        following = model.extend(state, [[token]])
    return following.hidden[0, 0].numpy(), following.logits()[0, 0].numpy()


@pytest.mark.paper("2404.18424")
def test_both_views_are_what_a_model_read_alone_says(model, represented):
    for number, text in enumerate(TEXTS):
        hidden, logits = by_hand(model, text)
        assert represented.dense[number] == pytest.approx(hidden / np.linalg.norm(hidden), abs=1e-4)
        row = represented.sparse[number].toarray()[0]
        for token in row.nonzero()[0]:
            assert row[token] == pytest.approx(round(100 * math.log1p(max(0.0, float(logits[token])))), abs=1)


def test_words_are_the_texts_own_without_stop_words(model, represented):
    own = {token for word in ("doctor", "made", "creature") for token in model.vocab.encode(word).ids}
    assert {*represented.sparse[1].indices.tolist()} <= own
    # A text of stop words only has the ten strongest tokens there are.
    _, logits = by_hand(model, TEXTS[3])
    assert {*represented.sparse[3].indices.tolist()} <= {*np.argsort(-logits)[:10].tolist()}
    assert represented.sparse.data.min() > 0


def test_the_strongest_terms_are_kept(model):
    whole = represent(model, TEXTS[:1]).sparse.toarray()[0]
    kept = represent(model, TEXTS[:1], terms=2).sparse.toarray()[0]
    assert (kept > 0).sum() == min(2, (whole > 0).sum())
    assert kept[kept > 0].min() >= np.sort(whole)[-2]


def test_expansion_adds_words_and_changes_none(model, represented):
    wider = represent(model, TEXTS, expansion=5).sparse.toarray()
    plain = represented.sparse.toarray()
    for number in range(3):
        own = plain[number] > 0
        assert (wider[number][own] == plain[number][own]).all()
        added = (wider[number] > 0) & ~own
        assert added.sum() <= 5
        assert all(model.vocab.token_bytes[token].isalnum() for token in added.nonzero()[0])


def test_the_first_word_is_the_one_that_greedy_decoding_says(model):
    prompt = PASSAGE.asked.replace("{text}", TEXTS[0]) + "\n" + PASSAGE.begun
    said = nextoken.generate(model, prompt, transform="greedy", max_tokens=1, ignore_eos=True)
    _, logits = by_hand(model, TEXTS[0])
    assert said.tokens[0] == int(logits.argmax())


def test_long_texts_are_cut(model):
    cut = TEXTS[0].encode()[: model.vocab.encode(TEXTS[0]).ends[3]].decode()
    one, other = represent(model, [TEXTS[0]], max_tokens=4), represent(model, [cut])
    assert one.dense == pytest.approx(other.dense, abs=1e-5)


def test_bad_input(model):
    with pytest.raises(ValueError, match="text 1 is empty"):
        represent(model, ["a", " "])
    with pytest.raises(ValueError, match="there is no text"):
        represent(model, [])
    with pytest.raises(ValueError, match="no place for the text"):
        WordPrompt("a word, please")
    with pytest.raises(ValueError, match="lower max_tokens"):
        represent(model, ["word " * 2000], max_tokens=2000)
    ngram = nextoken.model.NgramModel.from_text("a b c", model.vocab, order=2)
    with pytest.raises(ValueError, match="no hidden states"):
        represent(ngram, ["a"])


def made(dense: np.ndarray, words: np.ndarray) -> Representations:
    return Representations(dense.astype(np.float32), sparse.csr_matrix(words))


@pytest.mark.paper("2404.18424")
def test_the_index_equals_brute_force():
    rng = np.random.default_rng(0)
    texts = made(rng.normal(size=(30, 8)), rng.integers(0, 50, (30, 40)) * (rng.random((30, 40)) < 0.2))
    queries = made(rng.normal(size=(5, 8)), rng.integers(0, 50, (5, 40)) * (rng.random((5, 40)) < 0.2))
    for alpha, scores in (
        (1.0, queries.dense @ texts.dense.T),
        (0.0, queries.sparse.toarray() @ texts.sparse.toarray().T),
    ):
        found = Index(texts).search(queries, k=5, alpha=alpha)
        for number in range(5):
            best = [text for text in np.argsort(-scores[number], kind="stable")[:5] if alpha or scores[number][text]]
            assert found.texts[number][: len(best)].tolist() == best
            assert found.scores[number][: len(best)] == pytest.approx(scores[number][best])


@pytest.mark.paper("2404.18424")
@settings(max_examples=60)
@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=8, unique=True),
    st.lists(st.integers(1, 1000), min_size=2, max_size=8, unique=True),
    st.floats(0.1, 0.9),
    st.integers(-100, 100),
    st.floats(0.1, 10),
)
def test_fusion_does_not_see_scale_and_offset(dense, words, alpha, offset, factor):
    dense, words = (np.array(sorted(scores, reverse=True), dtype=float) for scores in (dense, words))
    runs = (np.arange(len(dense)), dense), (np.arange(len(words)) + 3, words)
    texts, scores = fuse(*runs, alpha=alpha)
    moved = fuse((runs[0][0], factor * dense + offset), runs[1], alpha=alpha)
    assert dict(zip(moved[0], moved[1], strict=True)) == pytest.approx(dict(zip(texts, scores, strict=True)), abs=1e-6)
    assert {*texts.tolist()} == {*range(len(dense)), *range(3, 3 + len(words))}
    assert scores.max() <= 1 + 1e-9 and scores.min() >= 0


def test_fusion_by_hand_and_at_its_ends():
    dense, words = (np.array([4, 1]), np.array([0.9, 0.5])), (np.array([1, 2]), np.array([30.0, 10.0]))
    texts, scores = fuse(dense, words, alpha=0.25)
    assert (texts.tolist(), scores.tolist()) == ([1, 4, 2], [0.75, 0.25, 0.0])
    assert fuse(dense, words, alpha=1)[0].tolist() == [4, 1] and fuse(dense, words, alpha=0)[0].tolist() == [1, 2]
    empty = (np.array([], dtype=int), np.array([]))
    assert fuse(dense, empty, alpha=0.5)[0].tolist() == [4, 1]


def test_ndcg_by_hand():
    ranking = Ranking(np.array([[2, 0, -1]]), np.array([[2.0, 1.0, -np.inf]]))
    gained = (2**1 - 1) / math.log2(2) + (2**2 - 1) / math.log2(3)
    ideal = (2**2 - 1) / math.log2(2) + (2**1 - 1) / math.log2(3)
    assert ndcg(ranking, np.array([[2, 0, 1]]), k=3)[0] == pytest.approx(gained / ideal)
    assert math.isnan(ndcg(ranking, np.zeros((1, 3)))[0])
    with pytest.raises(ValueError, match="queries"):
        ndcg(ranking, np.zeros((2, 3)))


def test_bad_searches(represented, model):
    queries = represent(model, ["a whale"], prompt=QUERY)
    with pytest.raises(ValueError, match="alpha"):
        Index(represented).search(queries, alpha=2)
    other = made(np.ones((1, 3)), np.ones((1, 4)))
    with pytest.raises(ValueError, match="different models"):
        Index(represented).search(other)
    found = Index(represented).search(queries, k=9)
    assert found.texts.shape == (1, 9) and (found.texts[0, 4:] == -1).all()
    assert torch.tensor(found.scores[0, :4]).isfinite().all()

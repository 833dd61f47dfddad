"""DC-PDD: by hand, its limits, what leaves it alone, and the table of frequencies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.errors import InputError, OutputError
from nextoken.model.table import TableModel
from nextoken.scores.dc_pdd import TokenFrequencies, saturation

MODEL = TableModel.random(4, order=2, seed=1)
COUNTED = TokenFrequencies.from_text(["aaaab", "ac", "a"], MODEL.vocab)


def by_hand(text: str, limit: float, counts: list[int], model: TableModel = MODEL) -> float:
    total, seen, terms = sum(counts) + len(counts), set(), []
    ids = model.vocab.encode(text).ids
    for place, token in enumerate(ids):
        if token not in seen:
            p = model.row(ids[:place])[token].exp().item()
            terms.append(min(-p * math.log((counts[token] + 1) / total), limit))
            seen.add(token)
    return sum(terms) / len(terms)


@pytest.mark.paper("2409.14781")
def test_a_text_worked_by_hand() -> None:
    """p = 1/2, 1/4, 1/8, 1/8 at every place, q = 5/10, 2/10, 1/10, 1/10, 1/10; the second a is no first occurrence."""
    model = TableModel.given({(): [0.5, 0.25, 0.125, 0.125]}, [*"abcd"])
    frequencies = TokenFrequencies.from_text("aaaab", model.vocab)
    np.testing.assert_allclose(np.exp(frequencies.log_probs), [0.5, 0.2, 0.1, 0.1, 0.1])
    terms = [0.5 * math.log(2), 0.25 * math.log(5), 0.125 * math.log(10)]
    signature = nextoken.read(model, ["abac"])
    whole = nextoken.score(signature, "dc_pdd", frequencies=frequencies, limit=9.0)
    assert whole[0] == pytest.approx(sum(terms) / 3, rel=1e-6)
    clipped = nextoken.score(signature, "dc_pdd", frequencies=frequencies, limit=0.35)
    assert clipped[0] == pytest.approx((terms[0] + 0.35 + terms[2]) / 3, rel=1e-6)
    assert saturation(signature, frequencies, limit=0.35)[0] == pytest.approx(1 / 3)


@pytest.mark.paper("2409.14781")
@given(st.lists(st.text("abcd", min_size=1, max_size=12), min_size=1, max_size=5), st.floats(0.001, 2.0))
@settings(max_examples=40)
def test_the_score_is_its_formula(texts: list[str], limit: float) -> None:
    found = nextoken.score(nextoken.read(MODEL, texts), "dc_pdd", frequencies=COUNTED, limit=limit)
    expected = [by_hand(text, limit, [6, 1, 1, 0, 0]) for text in texts]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.paper("2409.14781")
def test_limits() -> None:
    """With q uniform and no limit: log V times the mean probability of first occurrences. At limit 0: blind."""
    signature = nextoken.read(MODEL, ["abcd", "dca", "bbbb"])
    even = TokenFrequencies(np.full(5, 7), MODEL.vocab.digest)
    first = [
        np.mean(
            [MODEL.row(ids[:place])[token].exp().item() for place, token in enumerate(ids) if token not in ids[:place]]
        )
        for ids in ([0, 1, 2, 3], [3, 2, 0], [1, 1, 1, 1])
    ]
    found = nextoken.score(signature, "dc_pdd", frequencies=even, limit=math.inf)
    np.testing.assert_allclose(found, math.log(5) * np.array(first), rtol=1e-5)
    blind = nextoken.score(signature, "dc_pdd", frequencies=COUNTED, limit=1e-7)
    np.testing.assert_allclose(blind / 1e-7, 1)
    assert saturation(signature, COUNTED, limit=1e-7).tolist() == [1, 1, 1]


@pytest.mark.paper("2409.14781")
@given(st.permutations(range(4)), st.lists(st.text("abcd", min_size=1, max_size=9), min_size=1, max_size=3))
@settings(max_examples=20)
def test_the_numbers_of_the_tokens_do_not_matter(order: list[int], texts: list[str]) -> None:
    places = torch.tensor([*order, 4])
    table = MODEL._log_table.exp().reshape(5, 5, 5)[places][:, places][:, :, places]
    renamed = TableModel(table, ["abcd"[token] for token in order])
    counts = TokenFrequencies(COUNTED.counts[places.numpy()], renamed.vocab.digest)
    found = nextoken.score(nextoken.read(renamed, texts), "dc_pdd", frequencies=counts, limit=0.3)
    expected = nextoken.score(nextoken.read(MODEL, texts), "dc_pdd", frequencies=COUNTED, limit=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.paper("2409.14781")
def test_repeats_change_nothing_and_texts_do_not_see_each_other() -> None:
    """Without memory the second copy of a sentence has no first occurrence."""
    model = TableModel.given({(): [0.4, 0.3, 0.2, 0.1]}, [*"abcd"])
    counted = TokenFrequencies.from_text("aab", model.vocab)
    found = nextoken.score(nextoken.read(model, ["abd", "abdabd", "abd"]), "dc_pdd", frequencies=counted, limit=9.0)
    np.testing.assert_allclose(found, found[0])


@pytest.mark.paper("2409.14781")
def test_common_words_do_not_make_a_member() -> None:
    """The paper's case: what every model predicts is no sign of membership, what only this one predicts is."""
    model = TableModel.given({(): [0.45, 0.45, 0.06, 0.04], (0, 2): [0.1, 0.1, 0.1, 0.7]}, [*"abcd"])
    frequencies = TokenFrequencies(np.array([5000, 5000, 20, 20, 0]), model.vocab.digest)
    signature = nextoken.read(model, ["acd", "aba"])  # learnt by heart, and merely common
    known, common = nextoken.score(signature, "dc_pdd", frequencies=frequencies, limit=9.0)
    assert known > common
    by_loss = nextoken.score(signature, "mean_logprob")
    assert by_loss[0] < by_loss[1]


def test_every_occurrence_is_counted() -> None:
    assert COUNTED.counts.tolist() == [6, 1, 1, 0, 0] and COUNTED.total == 8
    assert np.exp(COUNTED.log_probs).sum() == pytest.approx(1)
    nothing = TokenFrequencies.from_tokens([], MODEL.vocab)
    np.testing.assert_allclose(np.exp(nothing.log_probs), 0.2)
    with pytest.raises(ValueError, match="token ids"):
        TokenFrequencies.from_tokens([[0, 5]], MODEL.vocab)


def test_frequencies_are_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "counts.npz"
    COUNTED.save(path)
    again = TokenFrequencies.load(path)
    assert again.counts.tolist() == COUNTED.counts.tolist() and again.vocab_digest == COUNTED.vocab_digest
    assert [file.name for file in tmp_path.iterdir()] == ["counts.npz"]
    (tmp_path / "other").write_text("text")
    for wrong in ("other", "none"):
        with pytest.raises(InputError, match=wrong):
            TokenFrequencies.load(tmp_path / wrong)
    with pytest.raises(OutputError, match="cannot write"):
        COUNTED.save(tmp_path / "no" / "such" / "folder.npz")


def test_misuse_and_empty_texts() -> None:
    signature = nextoken.read(MODEL, ["", "abc"])
    found = nextoken.score(signature, "dc_pdd", frequencies=COUNTED)
    assert math.isnan(found[0]) and math.isfinite(found[1])
    assert math.isnan(nextoken.score(nextoken.read(MODEL, ""), "dc_pdd", frequencies=COUNTED)[0])
    with pytest.raises(ValueError, match="limit"):
        nextoken.score(signature, "dc_pdd", frequencies=COUNTED, limit=0.0)
    with pytest.raises(ValueError, match="another vocabulary"):
        nextoken.score(nextoken.read(TableModel.random(3), "abc"), "dc_pdd", frequencies=COUNTED)
    with pytest.raises(nextoken.scores.MissingInput, match="frequencies"):
        nextoken.score(signature, "dc_pdd")

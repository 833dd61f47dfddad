"""Which answers mean the same, and the sets they form."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextoken.scores import meaning
from nextoken.scores.similarity import jaccard

CHANCES = {"a": [0.7, 0.2, 0.1], "b": [0.1, 0.6, 0.3], "c": [0.3, 0.5, 0.2], "d": [0.0, 1.0, 0.0]}


def nli(pairs: list[tuple[str, str]]) -> np.ndarray:
    """By the premise; of a text and itself, entailment."""
    return np.array([[1.0, 0.0, 0.0] if x == y else CHANCES[x] for x, y in pairs])


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Paris", " paris. ", True),
        ("The Eiffel Tower", "eiffel tower!", True),
        ("Paris", "Lyon", False),
        ("-5", "5", False),
        ("3.5", "35", False),
        ("It is 5.", "it is 5", True),
        ("the", "The", True),
        ("the", "a", False),
        ("?", "!", False),
        ("", " ", True),
        ("", "a", False),
    ],
)
def test_same_words(a: str, b: str, same: bool) -> None:
    assert meaning.same_words([a], [b]).tolist() == [[same]]
    assert meaning.same_words([b, a], [a]).tolist() == [[same], [True]]


def test_relations_read_the_judge_as_they_say() -> None:
    a, b = ["a", "b", "c", "d"], ["a", "z"]
    assert meaning.entailing(nli)(a, b)[:, 1].tolist() == [True, False, False, False]
    assert meaning.consistent(nli)(a, b)[:, 1].tolist() == [True, False, True, False]
    np.testing.assert_allclose(meaning.graded(nli)(a, b)[:, 1], [0.8, 0.4, 0.55, 0.5])
    np.testing.assert_allclose(meaning.graded(nli, neutral=1)(a, b)[:, 1], [0.9, 0.7, 0.8, 1.0])
    np.testing.assert_allclose(meaning.supported(nli)(a, b)[:, 1], [0.875, 0.25, 0.6, 0.5])
    assert meaning.entailing(nli)(a, b)[:, 0].tolist() == [True, False, False, False]
    assert meaning.within(jaccard, threshold=0.4)(["a b", "c"], ["a", "c d"]).tolist() == [[True, False], [False, True]]
    assert meaning.judged(nli, [], b).shape == (0, 2, 3)


def test_a_judge_is_asked_once_about_each_pair() -> None:
    asked: list[tuple[str, str]] = []

    def counting(pairs: list[tuple[str, str]]) -> np.ndarray:
        asked.extend(pairs)
        return nli(pairs)

    meaning.judged(counting, ["a", "b", "a"], ["a", "a"])
    assert asked == [("a", "a"), ("b", "a")]


@pytest.mark.parametrize(
    ("chances", "message"),
    [
        (lambda pairs: np.zeros(len(pairs)), r"\[2, 3\]"),
        (lambda pairs: np.full((len(pairs), 3), 2.0), "softmax"),
        (lambda pairs: np.tile([1.5, -0.5, 0.0], (len(pairs), 1)), "softmax"),
    ],
)
def test_a_judge_that_gives_something_else(chances, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        meaning.judged(chances, ["a", "b"], ["c"])


@pytest.mark.paper("2302.09664")
@given(st.integers(0, 6), st.integers(0, 10_000))
def test_sets_are_those_of_the_algorithm(size: int, seed: int) -> None:
    related = np.random.default_rng(seed).random((size, size)) < 0.6
    found: list[list[int]] = []
    for answer in range(size):
        for members in found:
            if related[members[0], answer] and related[answer, members[0]]:
                members.append(answer)
                break
        else:
            found.append([answer])
    assert meaning.sets(related) == found
    assert sorted(answer for members in found for answer in members) == [*range(size)]


@pytest.mark.paper("2305.19187")
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_components_are_those_of_mutual_relations(size: int, seed: int) -> None:
    related = np.random.default_rng(seed).random((size, size)) < 0.5
    label = [*range(size)]
    for _ in range(size):
        for i, j in product(range(size), repeat=2):
            if related[i, j] and related[j, i]:
                label[i] = label[j] = min(label[i], label[j])
    assert meaning.components(related) == len({*label}) <= len(meaning.sets(related))


class Told(dict):
    def to(self, device: object) -> Told:
        return self


def tokenizer(a: list[str], b: list[str], **options: object) -> Told:
    assert options == {"padding": True, "truncation": True, "return_tensors": "pt"}
    return Told(input_ids=torch.tensor([[len(x) % 7, len(y) % 7 + 7] for x, y in zip(a, b, strict=True)]))


@pytest.mark.parametrize(
    "labels", [["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], ["entailment", "neutral", "contradiction"]]
)
def test_a_classifier_is_read_by_the_names_of_its_labels(labels: list[str]) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=16, id2label=dict(enumerate(labels)), **shape)
    model = BertForSequenceClassification(config).train()
    pairs = [("a", "bb"), ("cc", ""), ("", "d")]
    found = meaning.classifier(model, tokenizer, batch=2)(pairs)
    with torch.no_grad():
        logits = model(
            **tokenizer(
                [x for x, _ in pairs], [y for _, y in pairs], padding=True, truncation=True, return_tensors="pt"
            )
        ).logits
    chances = logits.softmax(-1)
    for column, name in enumerate(("entailment", "neutral", "contradiction")):
        expected = chances[:, [label.lower() for label in labels].index(name)]
        np.testing.assert_allclose(found[:, column], expected, atol=1e-6)


def test_a_classifier_of_something_else_is_refused() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=16, id2label={0: "good", 1: "bad"}, **shape))
    with pytest.raises(ValueError, match=r"this has \['bad', 'good'\]"):
        meaning.classifier(model, tokenizer)

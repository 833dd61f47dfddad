"""Meaning: which answers say the same, by their words or by a judge of entailment, and the sets that they form.

A relation is a function (texts_a [A], texts_b [B]) -> [A, B] of truth values, as a similarity is one of numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from scipy.sparse.csgraph import connected_components

from nextoken.scores.similarity import Similarity, Texts

Relation: TypeAlias = Callable[[Texts, Texts], np.ndarray]
"""(A texts, B texts) -> [A, B], true where a says what b says, or entails it."""
Nli: TypeAlias = Callable[[list[tuple[str, str]]], np.ndarray]
"""P pairs (premise, hypothesis) -> [P, 3], probabilities of entailment, neutral and contradiction."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = re.compile(r"(?![-+.,]\d)[^\w\s]|_")
"""Punctuation, but not the sign or the point of a number."""


def same_words(a: Texts, b: Texts) -> np.ndarray:
    """True where texts are equal without case, punctuation, English articles and white space [A, B].

    What is left of an answer that is nothing else, such as "-5" or "A", is kept as it is.
    """
    left, right = np.array([_bare(text) for text in a]), np.array([_bare(text) for text in b])
    return left[:, None] == right[None] if len(a) and len(b) else np.zeros((len(a), len(b)), dtype=bool)


def within(similarity: Similarity, *, threshold: float = 0.5) -> Relation:
    """True where the similarity is above the threshold."""

    def relation(a: Texts, b: Texts) -> np.ndarray:
        found: np.ndarray = similarity(a, b) > threshold
        return found

    return relation


def entailing(nli: Nli) -> Relation:
    """True where entailment is the most probable of the three [A, B], premise a and hypothesis b.

    Source: Semantic Uncertainty, arXiv:2302.09664, section 4 (equivalent are texts that entail each other).
    """

    def relation(a: Texts, b: Texts) -> np.ndarray:
        found: np.ndarray = judged(nli, a, b).argmax(-1) == 0
        return found

    return relation


def consistent(nli: Nli) -> Relation:
    """True where entailment is more probable than contradiction [A, B].

    Source: Generating with Confidence, arXiv:2305.19187, section 4 (the number of semantic sets).
    """

    def relation(a: Texts, b: Texts) -> np.ndarray:
        chances = judged(nli, a, b)
        found: np.ndarray = chances[..., 0] > chances[..., 2]
        return found

    return relation


def graded(nli: Nli, *, neutral: float = 0.5) -> Similarity:
    """P(entailment) + neutral * P(neutral) [A, B], premise a and hypothesis b.

    Args:
        neutral: 0 for P(entailment) alone, 1 for 1 - P(contradiction), 1/2 for kernel language entropy.
    """

    def similarity(a: Texts, b: Texts) -> np.ndarray:
        chances = judged(nli, a, b)
        found: np.ndarray = chances[..., 0] + neutral * chances[..., 1]
        return found

    return similarity


def supported(nli: Nli) -> Similarity:
    """P(entailment) / (P(entailment) + P(contradiction)) [A, B]; 1/2 where both are 0."""

    def similarity(a: Texts, b: Texts) -> np.ndarray:
        chances = judged(nli, a, b)
        decided = chances[..., 0] + chances[..., 2]
        found: np.ndarray = np.where(decided > 0, chances[..., 0] / np.where(decided > 0, decided, 1.0), 0.5)
        return found

    return similarity


def judged(nli: Nli, a: Texts, b: Texts) -> np.ndarray:
    """Probabilities [A, B, 3] of every pair, each different pair judged once.

    Raises:
        ValueError: the judge gives something else than three probabilities per pair.
    """
    pairs = [(x, y) for x in a for y in b]
    number = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    if not pairs:
        return np.zeros((len(a), len(b), 3))
    chances = np.asarray(nli(list(number)), dtype=np.float64)
    if chances.shape != (len(number), 3):
        raise ValueError(f"the judge gave {chances.shape} for {len(number)} pairs: it must give [{len(number)}, 3]")
    if (chances < -1e-6).any() or (np.abs(chances.sum(1) - 1) > 1e-3).any():
        raise ValueError(
            "the judge's three numbers per pair are no probabilities: give softmax of the logits, in the order "
            "entailment, neutral, contradiction"
        )
    return chances[[number[pair] for pair in pairs]].reshape(len(a), len(b), 3)


def sets(related: np.ndarray) -> list[list[int]]:
    """Sets of answers of one meaning: each joins the first set whose first member it is related to in both directions.

    Args:
        related: truth values [M, M].

    Source: Semantic Uncertainty, arXiv:2302.09664, algorithm 1.
    """
    both = related & related.T
    found: list[list[int]] = []
    for answer in range(len(both)):
        home = next((members for members in found if both[members[0], answer]), None)
        if home is None:
            found.append([answer])
        else:
            home.append(answer)
    return found


def components(related: np.ndarray) -> int:
    """How many connected parts the graph of mutual relations [M, M] has."""
    return int(connected_components(related & related.T, directed=False, return_labels=False))


def classifier(model: object, tokenizer: object, *, batch: int = 16) -> Nli:
    """A sequence classifier of transformers, trained on NLI, as a judge; its labels are found by their names.

    Args:
        model: such as `AutoModelForSequenceClassification.from_pretrained("microsoft/deberta-large-mnli")`.
        tokenizer: its own.
        batch: pairs at a time.

    Raises:
        ValueError: its labels are not entailment, neutral and contradiction.
    """
    import torch

    names = {str(label).lower(): int(i) for i, label in model.config.id2label.items()}  # type: ignore[attr-defined]
    order = [next((i for name, i in names.items() if name.startswith(kind)), None) for kind in ("ent", "neu", "con")]
    if None in order:
        raise ValueError(f"an NLI model has labels entailment, neutral and contradiction; this has {sorted(names)}")

    @torch.no_grad()
    def nli(pairs: list[tuple[str, str]]) -> np.ndarray:
        model.eval()  # type: ignore[attr-defined]
        found = []
        for begin in range(0, len(pairs), batch):
            some: Sequence[tuple[str, str]] = pairs[begin : begin + batch]
            fed = tokenizer(  # type: ignore[operator]
                [x for x, _ in some], [y for _, y in some], padding=True, truncation=True, return_tensors="pt"
            )
            logits = model(**fed.to(model.device)).logits[:, order]  # type: ignore[attr-defined,operator]
            found.append(logits.double().softmax(-1).cpu().numpy())
        return np.concatenate(found)

    return nli


def _bare(text: str) -> str:
    folded = text.casefold()
    bare = " ".join(_ARTICLES.sub(" ", _MARKS.sub(" ", folded)).split())
    return bare or " ".join(folded.split())

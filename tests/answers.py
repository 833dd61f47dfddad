"""Answers to look at: table models, what they say of strings by brute force, and samples read or enumerated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

import nextoken
from nextoken.model.table import TableModel
from nextoken.scores import Samples
from nextoken.signature import Signature
from nextoken.signature.given import signature_of


def distributions(model: TableModel, text: str, prompt: str = "") -> list[tuple[int, list[float]]]:
    """The tokens of a text, each with the distribution [V] it was drawn from, by looking up the table."""
    before, own = list(model.vocab.encode(prompt).ids) if prompt else [], list(model.vocab.encode(text).ids)
    return [(token, model.row([*before, *own[:t]]).exp().tolist()) for t, token in enumerate(own)]


def surprisals(model: TableModel, text: str, prompt: str = "") -> list[float]:
    """-log p of each token, nats."""
    return [-math.log(p[token]) if p[token] > 0 else math.inf for token, p in distributions(model, text, prompt)]


def samples_of(model: TableModel, groups: Sequence[Sequence[str]], prompts: Sequence[str] | None = None) -> Samples:
    """Answers without their ends, read after one prompt per group."""
    texts = [text for group in groups for text in group]
    before = None if prompts is None else [p for p, group in zip(prompts, groups, strict=True) for _ in group]
    return Samples(nextoken.read(model, texts, prompts=before, top=0), [len(group) for group in groups])


def drawn(model: TableModel, strings: Sequence[Sequence[int]], counts: Sequence[int]) -> Samples:
    """Answers as token strings, their end tokens scored."""
    begin = [model.vocab.bos_id or 0]
    made = {tuple(string): signature_of(model, begin, string) for string in {tuple(string) for string in strings}}
    return Samples(Signature.concat(made[tuple(string)] for string in strings), counts)


def blank(model: TableModel, texts: int) -> Signature:
    """A signature of any texts, for scores that look at samples only."""
    return nextoken.read(model, [model.vocab.label(0)] * texts, top=0)


def matrix_similarity(values: np.ndarray):  # type: ignore[no-untyped-def]
    """A similarity that knows texts "0", "1", ... and looks them up."""

    def similarity(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        return np.array([[values[int(x), int(y)] for y in b] for x in a]).reshape(len(a), len(b))

    return similarity


DIGITS = TableModel.random([str(i) for i in range(9)], order=1, seed=11, name="digits")
"""Its texts are names of rows of a matrix."""

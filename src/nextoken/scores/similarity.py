"""Similarity: how alike texts are, as a function (texts_a [A], texts_b [B]) -> [A, B].

Any such function will do wherever a score takes a `similarity`. Those here need no download; `embedded`,
`token_matched` and `paired` make one of a sentence encoder, of an encoder of tokens and of a model that judges pairs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from scipy import sparse

Texts: TypeAlias = Sequence[str]
Similarity: TypeAlias = Callable[[Texts, Texts], np.ndarray]
"""(A texts, B texts) -> [A, B], 1 for the same meaning and 0 for nothing in common."""

_WORD = re.compile(r"\w+")
_SIZES = (2, 3, 4)
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """The words of a text, without case or punctuation."""
    return _WORD.findall(text.casefold())


def exact(a: Texts, b: Texts) -> np.ndarray:
    """1 where the texts are equal but for white space around them, else 0 [A, B]."""
    return np.array([[float(x.strip() == y.strip()) for y in b] for x in a]).reshape(len(a), len(b))


def character_ngrams(a: Texts, b: Texts) -> np.ndarray:
    """cos(f(a), f(b)) [A, B], f_g = 1 + log(count of g) over the 2-, 3- and 4-grams of characters.

    Without case, white space counting as one blank and a blank at each end, so that words and their ends are features
    too. The number of a pair depends on no other text. Texts of nothing but white space are like each other only.
    """
    every, place = _distinct([" ".join(text.casefold().split()) for text in (*a, *b)])
    features = _counted(every)
    row = np.repeat(np.arange(len(every)), np.diff(features.indptr))
    features.data = 1 + np.log(features.data)
    length = np.sqrt(np.bincount(row, weights=features.data**2, minlength=len(every)))
    features.data /= length[row]
    blank = (length == 0).astype(float)
    left, right = place[: len(a)], place[len(a) :]
    cosine = (features[left] @ features[right].T).toarray() + np.outer(blank[left], blank[right])
    # Exactly 1 for equal texts, not but for rounding: a token whose removal changes nothing has relevance 0.
    return np.where(left[:, None] == right[None], 1.0, np.clip(cosine, 0.0, 1.0))


def jaccard(a: Texts, b: Texts) -> np.ndarray:
    """|words of a and b| / |words of a or b| [A, B]; texts without words are like each other only."""
    return _over_pairs(a, b, lambda text: frozenset(words(text)), _jaccard)


def rouge_1(a: Texts, b: Texts) -> np.ndarray:
    """ROUGE-1 [A, B]: 2 |common words, repetitions counted| / (|a| + |b|), symmetric; no stemming."""
    return _over_pairs(a, b, lambda text: Counter(words(text)), _overlap)


def rouge_2(a: Texts, b: Texts) -> np.ndarray:
    """ROUGE-2 [A, B]: as ROUGE-1, of pairs of neighbouring words; texts of less than two are like each other only."""
    return _over_pairs(a, b, lambda text: Counter(zip(found := words(text), found[1:], strict=False)), _overlap)


def rouge_l(a: Texts, b: Texts) -> np.ndarray:
    """ROUGE-L [A, B]: 2 LCS(a, b) / (|a| + |b|) over words, symmetric; no stemming."""
    return _over_pairs(a, b, lambda text: tuple(words(text)), _subsequence)


def embedded(encode: Callable[[list[str]], np.ndarray]) -> Similarity:
    """max(0, cos(e(a), e(b))) [A, B] of an encoder of sentences, n texts -> [n, d]: `SentenceTransformer.encode`."""

    def similarity(a: Texts, b: Texts) -> np.ndarray:
        every, place = _distinct([*a, *b])
        vectors = _directions(np.asarray(encode(every), dtype=np.float64))
        left, right = place[: len(a)], place[len(a) :]
        cosine: np.ndarray = np.clip(vectors[left] @ vectors[right].T, 0.0, 1.0)
        return cosine

    return similarity


def token_matched(encode: Callable[[list[str]], Sequence[np.ndarray]]) -> Similarity:
    """BERTScore F1 [A, B] of an encoder of tokens: n texts -> n arrays [tokens, d].

    F = 2 P R / (P + R), R the mean over the tokens of a of the greatest cosine with one of b, P the same of b with a;
    without weights or baseline. A text without tokens has nothing in common with any.

    Source: BERTScore, arXiv:1904.09675, section 3.
    """

    def similarity(a: Texts, b: Texts) -> np.ndarray:
        every, place = _distinct([*a, *b])
        vectors = [_directions(np.asarray(found, dtype=np.float64)) for found in encode(every)]
        found = np.zeros((len(a), len(b)))
        for i, x in enumerate(place[: len(a)]):
            for j, y in enumerate(place[len(a) :]):
                if len(vectors[x]) and len(vectors[y]):
                    cosine = vectors[x] @ vectors[y].T
                    recall, precision = cosine.max(1).mean(), cosine.max(0).mean()
                    found[i, j] = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
        return np.clip(found, 0.0, 1.0)

    return similarity


def paired(judge: Callable[[list[tuple[str, str]]], np.ndarray]) -> Similarity:
    """A judge of pairs [P] -> [P], such as `CrossEncoder.predict`, as a similarity; each pair is judged once."""

    def similarity(a: Texts, b: Texts) -> np.ndarray:
        pairs = [(x, y) for x in a for y in b]
        number = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        judged = np.asarray(judge(list(number)), dtype=np.float64) if pairs else np.zeros(0)
        if judged.shape != (len(number),):
            raise ValueError(f"the judge gave {judged.shape} for {len(number)} pairs: it must give one number per pair")
        return judged[[number[pair] for pair in pairs]].reshape(len(a), len(b)) if pairs else np.zeros((len(a), len(b)))

    return similarity


def _distinct(texts: Texts) -> tuple[list[str], np.ndarray]:
    """The different texts, and which of them each text is."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(number), np.array([number[text] for text in texts], dtype=np.int64)


def _counted(texts: list[str]) -> sparse.csr_matrix:
    """Counts of the n-grams of characters of each text [T, distinct n-grams], a blank put at each end."""
    padded = [f" {text} " if text else "" for text in texts]
    sizes = np.array([len(text) for text in padded])
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    owner = np.repeat(np.arange(len(texts)), sizes)
    keys, owners = [], []
    with np.errstate(over="ignore"):
        for size in _SIZES:
            begins = np.arange(max(0, len(codes) - size + 1))
            begins = begins[owner[begins] == owner[begins + size - 1]]
            # A polynomial modulo 2^64, begun with the size: grams that differ share a value once in 2^64.
            hashed = np.full(len(begins), size, dtype=np.uint64)
            for offset in range(size):
                hashed = (hashed + codes[begins + offset]) * _BASE
                hashed ^= hashed >> np.uint64(29)
            keys.append(hashed)
            owners.append(owner[begins])
    distinct, column = np.unique(np.concatenate(keys), return_inverse=True)
    row = np.concatenate(owners)
    shape = (len(texts), max(1, len(distinct)))
    found = sparse.coo_matrix((np.ones(len(row)), (row, column.reshape(-1))), shape=shape).tocsr()
    found.sum_duplicates()
    return found


def _over_pairs(a: Texts, b: Texts, units: Callable[[str], object], measure: Callable[..., float]) -> np.ndarray:
    """A symmetric measure of every pair [A, B], computed once per pair of different texts."""
    every, place = _distinct([*a, *b])
    parts = [units(text) for text in every]
    known: dict[tuple[int, int], float] = {}
    found = np.empty((len(a), len(b)))
    for i, x in enumerate(place[: len(a)].tolist()):
        for j, y in enumerate(place[len(a) :].tolist()):
            pair = (x, y) if x < y else (y, x)
            if pair not in known:
                known[pair] = 1.0 if x == y else measure(parts[x], parts[y])
            found[i, j] = known[pair]
    return found


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def _overlap(a: Counter[object], b: Counter[object]) -> float:
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def _subsequence(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    """2 LCS / (|a| + |b|), the longest common subsequence by bits: one row of its table is one integer."""
    if not a and not b:
        return 1.0
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for word in b:
        hit = row & where.get(word, 0)
        row = (row + hit | row - hit) & full
    return 2 * (len(a) - row.bit_count()) / (len(a) + len(b))


def _directions(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1 [n, d]; rows of zeros stay."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)

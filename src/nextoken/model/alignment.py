"""Alignment: which token of one vocabulary stands for which of another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextoken.methods import method
from nextoken.model.vocab import Vocab

Bytes = NDArray[np.uint8]

_ROWS = 256
"""Source tokens compared with a block of target tokens at once."""
_CLASSES = 64
"""Classes of bytes (by remainder) in which two strings are compared before their distance is computed."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """p~ = p A with A [V_s, V_t] sparse, from distributions p [V_s] over a source vocabulary to a target one.

    Each row of A sums to 1, or is empty: such a source token has no target, its probability is lost, and p~ sums to 1
    less the lost mass. Made by `exact`, `minimum_edit` or `given`.

    Args:
        sources, targets: [E] ids of the entries above 0.
        weights: [E] their values.
        shape: (V_s, V_t).

    Raises:
        ValueError: ids outside the vocabularies, weights below 0, or a row that sums to neither 0 nor 1.
    """

    sources: Tensor
    targets: Tensor
    weights: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if not self.sources.shape == self.targets.shape == self.weights.shape or self.sources.ndim != 1:
            raise ValueError("sources, targets and weights must be three lists of one length")
        for what, ids, size in zip(("source", "target"), (self.sources, self.targets), self.shape, strict=True):
            if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= size):
                raise ValueError(f"a {what} id lies outside the vocabulary of {size}")
        sums = torch.zeros(self.shape[0], dtype=torch.float64).index_add_(0, self.sources, self.weights.double())
        if not bool((self.weights >= 0).all()) or not bool(((sums == 0) | ((sums - 1).abs() < 1e-6)).all()):
            worst = int((sums - 1).abs().masked_fill(sums == 0, 0.0).argmax())
            raise ValueError(
                f"weights must be at least 0, and each row sum to 1 or, without a target, to 0; row {worst} sums to "
                f"{float(sums[worst]):g}"
            )

    @classmethod
    def exact(cls, source: Vocab, target: Vocab) -> Alignment:
        """Each token to the one of equal bytes, end tokens to end tokens, other specials to those of their name.

        A vocabulary to itself is the identity. Of several targets with equal bytes it is the one of the same id, else
        the lowest; of several end tokens the one of the same name, else the lowest.
        """
        return cls._from_choices(_exact(source, target), target)

    @classmethod
    @method(
        name="MinED alignment",
        arxiv="2401.10491",
        access="black",
        summary="each token to the one of another vocabulary whose spelling is nearest by edit distance",
    )
    def minimum_edit(cls, source: Vocab, target: Vocab) -> Alignment:
        """`exact`, and each ordinary token that has no equal to the one of least edit distance; the lowest id of those.

        The distance is Levenshtein's on bytes, with spaces as spaces whatever marks them in the tokenizer, and case
        counts. For ASCII it is that of the characters. Targets are searched by length, the nearest lengths first, until
        the difference of length alone exceeds the best distance; within a length, those whose sets of bytes already
        differ by more are passed over. Both are bounds, so the result is the true minimum.

        Specials and end tokens are never the nearest of an ordinary token. CoRE's released code folds case, so that of
        tokens that differ only in it one is never reached; this does not.

        Source: Wan et al. (FuseLLM), arXiv:2401.10491, token alignment by MinED.
        """
        choices = _exact(source, target)
        open_ids = [i for i in _ordinary(source) if choices[i] < 0]
        if open_ids and (candidates := _ordinary(target)):
            found = _nearest(
                [source.token_bytes[i] for i in open_ids], candidates, [target.token_bytes[i] for i in candidates]
            )
            for i, choice in zip(open_ids, found, strict=True):
                choices[i] = choice
        return cls._from_choices(choices, target)

    @classmethod
    def given(cls, matrix: Tensor) -> Alignment:
        """From a matrix A [V_s, V_t], dense or sparse."""
        if matrix.ndim != 2:
            raise ValueError(f"an alignment is a matrix [source size, target size], got {tuple(matrix.shape)}")
        entries = (matrix if matrix.is_sparse else matrix.to_sparse()).detach().cpu().coalesce()
        present = entries.values() != 0
        sources, targets = entries.indices()[:, present]
        return cls(sources, targets, entries.values()[present].double(), (matrix.shape[0], matrix.shape[1]))

    @classmethod
    def _from_choices(cls, choices: Sequence[int], target: Vocab) -> Alignment:
        """Row i has a 1 at choices[i], or nothing where that is -1."""
        chosen = torch.tensor(choices, dtype=torch.long)
        sources = (chosen >= 0).nonzero()[:, 0]
        weights = torch.ones(len(sources), dtype=torch.float64)
        return cls(sources, chosen[sources], weights, (len(choices), target.size))

    @cached_property
    def lost(self) -> Tensor:
        """Source ids [L] without a target."""
        return self._without(self.sources, self.shape[0])

    @cached_property
    def unreached(self) -> Tensor:
        """Target ids [U] that no source token stands for: p~ is 0 there."""
        return self._without(self.targets, self.shape[1])

    @cached_property
    def digest(self) -> str:
        """Fingerprint of A: 16 hexadecimal digits."""
        sha = hashlib.sha256(repr(self.shape).encode())
        for tensor in (self.sources, self.targets, self.weights.double()):
            sha.update(tensor.cpu().numpy().tobytes())
        return sha.hexdigest()[:16]

    def project(self, probs: Tensor) -> Tensor:
        """p A [..., V_t] for p [..., V_s]."""
        if probs.shape[-1] != self.shape[0]:
            raise ValueError(
                f"probabilities over {probs.shape[-1]} tokens, but the alignment's source has {self.shape[0]}"
            )
        entries = probs.index_select(-1, self.sources.to(probs.device)) * self.weights.to(probs.device, probs.dtype)
        result = probs.new_zeros(*probs.shape[:-1], self.shape[1])
        return result.index_add_(-1, self.targets.to(probs.device), entries)

    def dense(self) -> Tensor:
        """A [V_s, V_t] as a dense matrix, float64."""
        return torch.zeros(self.shape, dtype=torch.float64).index_put_(
            (self.sources, self.targets), self.weights.double(), accumulate=True
        )

    @staticmethod
    def _without(ids: Tensor, size: int) -> Tensor:
        missing = torch.ones(size, dtype=torch.bool)
        missing[ids] = False
        return missing.nonzero()[:, 0]


def marks(vocab: Vocab) -> frozenset[int]:
    """Ids that are no part of a text: specials, begin and end tokens."""
    begin = frozenset() if vocab.bos_id is None else frozenset({vocab.bos_id})
    return vocab.specials | vocab.eos_ids | begin


def counterparts(source: Vocab, target: Vocab) -> Mapping[int, int]:
    """For marks of the source those of the target: an end for an end, the begin for the begin, else the same name."""
    named = {target.label(i): i for i in sorted(target.specials, reverse=True)}
    ends = {target.label(i): i for i in sorted(target.eos_ids, reverse=True)}
    found: dict[int, int] = {}
    for i in marks(source):
        name = source.label(i)
        if i in source.eos_ids:
            if ends:
                found[i] = i if i in target.eos_ids and target.label(i) == name else ends.get(name, min(ends.values()))
        elif i == source.bos_id and target.bos_id is not None:
            found[i] = target.bos_id
        elif i in target.specials and target.label(i) == name:
            found[i] = i
        elif name in named:
            found[i] = named[name]
    return found


def _ordinary(vocab: Vocab) -> list[int]:
    apart = marks(vocab)
    return [i for i in range(vocab.size) if i not in apart]


def _exact(source: Vocab, target: Vocab) -> list[int]:
    """For each source id the target id, -1 where there is none."""
    ordinary = _ordinary(target)
    spelled = {target.token_bytes[i]: i for i in reversed(ordinary)}
    same = set(ordinary)
    choices = [-1] * source.size
    for i in _ordinary(source):
        own = source.token_bytes[i]
        choices[i] = i if i in same and target.token_bytes[i] == own else spelled.get(own, -1)
    for i, mark in counterparts(source, target).items():
        choices[i] = mark
    return choices


def _nearest(strings: Sequence[bytes], ids: Sequence[int], candidates: Sequence[bytes]) -> list[int]:
    """For each string the id of the candidate of least (edit distance, id)."""
    blocks = _by_length(candidates)
    numbers = np.asarray(ids, dtype=np.int64)
    width = int(numbers.max()) + 1
    result = np.empty(len(strings), dtype=np.int64)
    for length, (members, letters, classes) in _by_length(strings).items():
        order = sorted(blocks, key=lambda size: (abs(size - length), size))
        for at in range(0, len(members), _ROWS):
            rows = slice(at, at + _ROWS)
            # One number that orders by distance, then by id.
            best = np.full(len(members[rows]), np.iinfo(np.int64).max)
            for size in order:
                reach = best // width
                if bool((reach < abs(size - length)).all()):
                    break
                _improve(best, letters[:, rows], classes[rows], *blocks[size], numbers, width)
            result[members[rows]] = best % width
    return result.tolist()


def _improve(
    best: NDArray[np.int64],
    letters: Bytes,
    classes: NDArray[np.float32],
    members: NDArray[np.int64],
    others: Bytes,
    other_classes: NDArray[np.float32],
    numbers: NDArray[np.int64],
    width: int,
) -> None:
    """Lower `best` [S] to the least distance * width + id over a block of candidates of one length."""
    common = classes @ other_classes.T
    # A byte that the other string lacks costs at least one edit, and one edit gets rid of one byte at most.
    bound = np.maximum(classes.sum(1)[:, None], other_classes.sum(1)[None]) - common
    bound = np.maximum(bound, abs(letters.shape[0] - others.shape[0]))
    likely = bound.argmin(1)
    rows = np.arange(len(best))
    for _ in range(2):  # the likeliest one first: its distance rules out most of the others
        distance = _distances(letters[:, rows], others[:, likely])
        np.minimum.at(best, rows, distance.astype(np.int64) * width + numbers[members[likely]])
        rows, likely = np.nonzero(bound <= (best // width)[:, None])


def _distances(left: Bytes, right: Bytes) -> NDArray[np.unsignedinteger]:
    """Levenshtein distances [P] of the columns of left [L, P] and right [M, P]."""
    kind = np.min_scalar_type(len(left) + len(right))
    above = [np.full(left.shape[1], j, dtype=kind) for j in range(len(right) + 1)]
    for i, letter in enumerate(left):
        diagonal, above[0] = above[0], np.full(left.shape[1], i + 1, dtype=kind)
        for j, other in enumerate(right):
            moved = np.minimum(above[j], above[j + 1]) + kind.type(1)
            diagonal, above[j + 1] = above[j + 1], np.minimum(moved, diagonal + (letter != other))
    return above[-1]


def _by_length(strings: Sequence[bytes]) -> dict[int, tuple[NDArray[np.int64], Bytes, NDArray[np.float32]]]:
    """Length L -> (places [T] of the strings of that length, their bytes [L, T], which classes they have [T, C])."""
    lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
    blocks = {}
    for length in sorted(set(lengths.tolist())):
        members = np.flatnonzero(lengths == length)
        letters = np.frombuffer(b"".join(strings[i] for i in members.tolist()), dtype=np.uint8).reshape(
            len(members), length
        )
        classes = np.zeros((len(members), _CLASSES), dtype=np.float32)
        classes[np.arange(len(members))[:, None], letters % _CLASSES] = 1
        blocks[length] = (members, np.ascontiguousarray(letters.T), classes)
    return blocks

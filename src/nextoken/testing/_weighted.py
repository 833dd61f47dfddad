"""Proofs that a kernel is properly weighted, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm

from nextoken.constrain import Kernel, NextToken, Place
from nextoken.model.vocab import Vocab
from nextoken.testing._proof import Proof

_COMMON = 0.02
"""Tokens of less probability are judged together: their hits are too few for a normal law."""


@dataclass(frozen=True)
class _Case:
    """p over the next token, and which tokens are allowed; the last is the end token."""

    name: str
    p: tuple[float, ...]
    c: tuple[bool, ...]


_CASES = (
    _Case("two of four allowed", (0.4, 0.3, 0.2, 0.1), (False, True, False, True)),
    _Case("the likeliest forbidden", (0.8, 0.1, 0.06, 0.04), (False, True, True, True)),
    _Case("the likeliest allowed", (0.75, 0.1, 0.1, 0.05), (True, False, True, False)),
    _Case("one unlikely token allowed", (0.5, 0.25, 0.2, 0.05), (False, False, False, True)),
    _Case("all allowed", (0.1, 0.2, 0.3, 0.4), (True, True, True, True)),
    _Case("impossible tokens between", (0.0, 0.5, 0.0, 0.2, 0.3), (True, True, True, False, True)),
    _Case("flat, every third allowed", (0.05,) * 20, tuple(i % 3 == 0 for i in range(20))),
)
_NOTHING = _Case("nothing allowed", (0.6, 0.3, 0.1), (False, False, False))


class _Tokens(Place):
    """Allows a given set of single tokens, and counts how often it is asked."""

    def __init__(self, allowed: frozenset[bytes], ends: bool) -> None:
        self._allowed, self._ends = allowed, ends
        self.asked = 0

    def advance(self, data: bytes) -> Place | None:
        self.asked += 1
        return self if data in self._allowed else None

    @property
    def is_complete(self) -> bool:
        self.asked += 1
        return self._ends


def check_properly_weighted(
    kernel: Kernel,
    *,
    draws: int = 4000,
    seed: int = 0,
    false_alarm: float = 1e-4,
    on_proof: Callable[[Proof], None] | None = None,
) -> list[Proof]:
    """Prove by many draws that E[w 1{token = x}] = p(x) c(x) for every token x, on distributions p and constraints c.

    Token by token, since a kernel whose mean weight is right may still have the wrong law of tokens. Proved too: a
    token that is not allowed has weight 0 always, nothing allowed gives weight 0 and an end, and the tests that a draw
    tells are those that were made (a whole mask as V of them).

    Args:
        kernel: ours or one of your own.
        draws: for each of the seven cases.
        seed: of the draws.
        false_alarm: chance, over all cases together, with which a right kernel is called wrong (by a normal law for the
            mean of the weights, which is close for weights that are bounded as those of the library's kernels are).
        on_proof: called with each proof as it is done.

    Returns:
        One `Proof` per case; its `error` is the largest deviation in relation to what chance allows, less 1.

    Raises:
        AssertionError: at least one statement does not hold; the message names each.
        ValueError: an argument is out of range.
    """
    if draws < 500 or not 0 < false_alarm < 1:
        raise ValueError(f"draws must be at least 500 and false_alarm between 0 and 1, got {draws} and {false_alarm}")
    compared = sum(1 + sum(p >= _COMMON for p in case.p) for case in _CASES)
    bound = float(norm.isf(false_alarm / compared / 2))
    rng = np.random.default_rng(seed)
    proofs: list[Proof] = []

    def prove(name: str, statement: str, error: float) -> None:
        proofs.append(Proof(name, statement, error))
        if on_proof is not None:
            on_proof(proofs[-1])

    counted = 0.0
    for case in _CASES:
        weights, miscounted = _weights(kernel, case, draws, rng)
        counted = max(counted, miscounted)
        prove(case.name, "E[w 1{x}] = p(x) c(x) for every token x", _excess(weights, case, bound))
    weights, miscounted = _weights(kernel, _NOTHING, 20, rng)
    prove(_NOTHING.name, "the weight is 0", float(weights.max()))
    prove("tests", "as many as the draw tells", max(counted, miscounted))
    broken = [str(proof) for proof in proofs if not proof.holds]
    if broken:
        raise AssertionError(f"{kernel} is not properly weighted:\n" + "\n".join(broken))
    return proofs


def _weights(kernel: Kernel, case: _Case, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """w 1{token = x} of every draw [draws, V], and the largest difference between tests told and tests made."""
    size = len(case.p)
    spelled = [bytes([ord("a") + i]) for i in range(size - 1)]
    vocab = Vocab([*spelled, b""], labels={size - 1: "<eos>"}, eos_ids=[size - 1])
    allowed = frozenset(token for token, c in zip(spelled, case.c, strict=False) if c)
    log_probs = torch.tensor(case.p, dtype=torch.float64).log()
    found, miscounted = np.zeros((draws, size)), 0.0
    for row in found:
        place = _Tokens(allowed, case.c[-1])
        here = NextToken(log_probs, place, vocab)
        draw = kernel(here, rng)
        if not draw.is_dead:
            row[draw.token] = math.exp(draw.log_weight)
        miscounted = max(miscounted, abs(draw.checks - place.asked))
    return found, miscounted


def _excess(weights: np.ndarray, case: _Case, bound: float) -> float:
    """How far the largest deviation of a mean is above `bound` standard errors, in relation to it; 0 if it is not."""
    p, c = np.array(case.p), np.array(case.c)
    if bool((weights[:, (p == 0) | ~c] > 0).any()):
        return math.inf
    common = p >= _COMMON
    seen = np.column_stack([weights[:, common], weights[:, ~common].sum(1)])
    expected = np.append((p * c)[common], (p * c)[~common].sum())
    error = np.abs(seen.mean(0) - expected)
    # Weights that never vary have no error but rounding.
    allowed = bound * seen.std(0, ddof=1) / math.sqrt(len(seen)) + 1e-9
    return max(0.0, float((error / allowed).max()) - 1)

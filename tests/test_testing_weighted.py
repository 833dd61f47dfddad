"""check_properly_weighted: what holds is proved, and a wrong weight or a wrong law of tokens is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from nextoken.constrain import AWRS, FullMask, Kernel, NextToken
from nextoken.constrain.awrs import Urn
from nextoken.testing import Proof, check_properly_weighted


def test_what_holds_is_proved() -> None:
    seen: list[Proof] = []
    proofs = check_properly_weighted(AWRS(), draws=500, on_proof=seen.append)
    assert seen == proofs and len(proofs) == 9 and all(proof.holds for proof in proofs)


@dataclass(frozen=True)
class _Changed(Kernel):
    """A mask, then something wrong."""

    change: Callable[[NextToken, int, float, Any], tuple[int, float]]

    def _draw(self, here: NextToken, rng: Any) -> tuple[int, float]:
        token, log_weight = FullMask()._draw(here, rng)
        return (token, log_weight) if log_weight == -math.inf else self.change(here, token, log_weight, rng)


def _swapped(here: NextToken, token: int, log_weight: float, rng: Any) -> tuple[int, float]:
    """The law of tokens is flattened, their total weight is right."""
    allowed = [x for x in here.allowed().nonzero()[0].tolist() if here.probs[x] > 0]
    return allowed[int(rng.random() * len(allowed))], log_weight


@pytest.mark.parametrize(
    "change",
    [
        lambda here, token, log_weight, rng: (token, 0.0),
        _swapped,
        lambda here, token, log_weight, rng: (token, log_weight + math.log(1.15)),
        lambda here, token, log_weight, rng: (0, log_weight),
    ],
    ids=["no weight", "wrong law of tokens", "weight too large", "forbidden token"],
)
def test_what_is_wrong_is_seen(change: Any) -> None:
    with pytest.raises(AssertionError, match="not properly weighted"):
        check_properly_weighted(_Changed(change), draws=1000)


class _Naive(Kernel):
    """AWRS whose weight is taken for the share of tests that passed."""

    def _draw(self, here: NextToken, rng: Any) -> tuple[int, float]:
        urn, rejected = Urn(here.probs, here.cumulative, rng), 0
        while urn.left > 0:
            token = urn.draw()
            if here.allows(token):
                return token, -math.log(1 + rejected)
            urn.remove(token)
            rejected += 1
        return -1, -math.inf


class _Secret(Kernel):
    """Right, but asks the constraint behind the back of the count."""

    def _draw(self, here: NextToken, rng: Any) -> tuple[int, float]:
        here.place.advance(b"a")
        return AWRS()._draw(here, rng)


def test_a_plausible_weight_and_uncounted_tests_are_seen() -> None:
    with pytest.raises(AssertionError, match="NO one unlikely token"):
        check_properly_weighted(_Naive(), draws=500)
    with pytest.raises(AssertionError, match="NO tests"):
        check_properly_weighted(_Secret(), draws=500)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="draws must be at least 500"):
        check_properly_weighted(AWRS(), draws=10)

"""RandomSwitching: the large model answers a given share of the tokens, chosen by coins."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.route.switch_rule import LARGE, SMALL, Standing, SwitchRule
from nextoken.route.switching import Switching


@dataclass(frozen=True)
class Tossed:
    """Who is active, the number of tokens read, and a digest of the seed and of all of them."""

    active: int
    place: int
    digest: bytes


@dataclass(frozen=True)
class RandomRule(SwitchRule):
    """At every `stay`-th token u(seed, prefix), uniform in [0, 1), chooses: large if u < share."""

    share: float
    stay: int
    seed: int
    watches = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.stay < 1:
            raise ValueError(f"share must be from 0 to 1 and stay at least 1, got {self.share} and {self.stay}")

    def begin(self) -> Tossed:
        return Tossed(SMALL, 0, hashlib.sha256(f"random switching {self.seed}".encode()).digest())

    def at(self, before: Standing, token: int) -> Tossed:
        assert isinstance(before, Tossed)
        digest = hashlib.sha256(before.digest + token.to_bytes(8, "big")).digest()
        active = before.active
        if before.place % self.stay == 0:
            # 53 bits, so that the quotient is exact and below 1.
            active = LARGE if (int.from_bytes(digest[:8], "big") >> 11) / 2**53 < self.share else SMALL
        return Tossed(active, before.place + 1, digest)


@method(
    name="Random switching",
    access="gray",
    summary="a small or a large model answers by coins: what any router must beat at the same share",
)
class RandomSwitching(Switching):
    """p(. | s) = p_large with probability `share`, else p_small, by a coin that is a function of the seed and s.

    The control of any router: over many texts its log-loss is (1 - share) of the small model's and share of the
    large one's, whatever is hard or easy. The coins are hashed from the prefix, so that a text has the same in every
    batch and however it is fed.

    Args:
        small, large: over one vocabulary, giving whole distributions.
        share: of the tokens that the large model answers, on average. 0 and 1 are the pure models.
        stay: tokens per coin, for stretches like those of a router with a minimum stay.
        seed: of the coins.
        parameters: activated per token by each; counted where the models are transformers networks.

    Raises:
        ValueError: as `Switching`, or a setting is out of range.
    """

    def __init__(
        self,
        small: LanguageModel,
        large: LanguageModel,
        *,
        share: float,
        stay: int = 1,
        seed: int = 0,
        parameters: tuple[int, int] | None = None,
    ) -> None:
        name = f"random_switching({small.name}, {large.name})"
        super().__init__(small, large, rule=RandomRule(share, stay, seed), parameters=parameters, name=name)

"""EntropySwitching: the large model answers while the answers of late have been uncertain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.route.switch_rule import LARGE, SMALL, Standing, SwitchRule
from nextoken.route.switching import Switching


@dataclass(frozen=True)
class Uncertainty:
    """Who is active, how many tokens it has answered since the last switch, and the latest entropies in bits."""

    active: int
    stay: int = 0
    recent: tuple[float, ...] = ()


@dataclass(frozen=True)
class EntropyRule(SwitchRule):
    """Large if mean > threshold, small if mean <= lower, else as before; only after min_stay answers of one model.

    mean is that of the last `window` entropies in bits, of those there are at the beginning of a text. Before there is
    one it counts as 0. See `EntropySwitching` for the arguments.
    """

    threshold: float
    lower: float
    window: int
    min_stay: int

    def __post_init__(self) -> None:
        if math.isnan(self.threshold) or math.isnan(self.lower) or self.lower > self.threshold:
            raise ValueError(
                f"lower must be at most threshold, in bits; got lower {self.lower} and threshold {self.threshold}"
            )
        if self.window < 1 or self.min_stay < 0:
            raise ValueError(
                f"window must be at least 1 token and min_stay at least 0, got {self.window} and {self.min_stay}"
            )

    def begin(self) -> Uncertainty:
        return Uncertainty(LARGE if self.threshold < 0 else SMALL)

    def after(self, standing: Standing, entropy: float) -> Uncertainty:
        assert isinstance(standing, Uncertainty)
        recent = (*standing.recent, entropy)[-self.window :]
        active, stay = standing.active, standing.stay + 1
        # Summed anew each time: a running sum would depend on how the text was fed.
        mean = math.fsum(recent) / len(recent)
        if stay >= self.min_stay:
            if mean > self.threshold:
                active = LARGE
            elif mean <= self.lower:
                active = SMALL
        return Uncertainty(active, stay if active == standing.active else 0, recent)


@method(
    name="EAD",
    arxiv="2502.06833",
    access="gray",
    summary="a small or a large model answers, by the rolling entropy of the answers so far",
)
class EntropySwitching(Switching):
    """p(. | s) = p_large if the mean entropy of the last w answers exceeds tau, p_small if not, with a minimum stay.

    After t tokens the active model a_t answers with entropy H_t = -sum_v p(v) log2 p(v), in bits, over the whole
    vocabulary; Hbar_t = mean(H_(t-w+1), ..., H_t). The next is a_(t+1) = large if Hbar_t > tau, small if Hbar_t <= tau,
    and a_t as long as the active model has answered fewer than `min_stay` times since the last switch. A text begins
    with the small model, unless tau < 0, at which the large one always answers; at tau = inf the small one does.

    The text's first tokens count as any others, so that reading and decoding agree: after a prompt the window is full
    and the model that answers first has been chosen by the prompt. (The paper counts from the first token generated.)
    Entropies are those of the models' own distributions, whatever transform is used in decoding.

    Args:
        small, large: over one vocabulary, giving whole distributions.
        threshold: tau, in bits (a nat is 1.443 bits). The knob of quality against cost: choose it from the rolling
            entropies of the small model on texts that are not the test's.
        lower: the small model returns at or below this mean only; `threshold` by default, as in the paper. The large
            model is mostly the surer of the two, so that the mean falls when it takes over.
        window: w.
        min_stay: the paper gives no values for either; 5 to 10 tokens are sensible.
        parameters: activated per token by each; counted where the models are transformers networks.

    Raises:
        ValueError: as `Switching`, or a setting is out of range.

    Source: Entropy Adaptive Decoding, arXiv:2502.06833. Its cost is parameters times tokens answered
    (`Cost.answering`), without what a model reads to catch up. With that (`Cost.activated`) a router that goes back and
    forth saves no arithmetic: in the end the large model reads nearly every token. What it saves is passes of the large
    model, each over several tokens, which is time where a pass takes as long for a few tokens as for one.
    """

    def __init__(
        self,
        small: LanguageModel,
        large: LanguageModel,
        *,
        threshold: float,
        lower: float | None = None,
        window: int = 5,
        min_stay: int = 5,
        parameters: tuple[int, int] | None = None,
    ) -> None:
        rule = EntropyRule(float(threshold), float(threshold if lower is None else lower), window, min_stay)
        name = f"entropy_switching({small.name}, {large.name})"
        super().__init__(small, large, rule=rule, parameters=parameters, name=name)

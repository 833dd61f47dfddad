"""Cascade: a small model answers first, and a large one where the small was not sure."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from nextoken.decode.generate import Prompt, generate, listed
from nextoken.decode.generation import Generation
from nextoken.decode.transform import Transform
from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.route.confidence import Answer, DeferralRule
from nextoken.route.cost import Cost, Spent, named_parameters


@dataclass(frozen=True)
class Cascaded:
    """The answers of a cascade.

    Args:
        generations: one per prompt, of the model whose answer stands.
        deferred: whether that is the large model.
        confidences: of the small model's answers, by the cascade's rule.
        small: the small model's answers, those that were replaced among them.
        cost: what both models read to answer; `said` counts the tokens of the answers that stand.
    """

    generations: tuple[Generation, ...]
    deferred: tuple[bool, ...]
    confidences: tuple[float, ...]
    small: tuple[Generation, ...]
    cost: Cost

    @property
    def rate(self) -> float:
        """The share of the answers that was deferred."""
        return sum(self.deferred) / len(self.deferred)


@method(
    name="LM cascade",
    arxiv="2404.10136",
    access="gray",
    summary="answers that a small model is not sure of are left to a large one",
)
class Cascade:
    """y = y_S if rule(y_S) >= threshold, else y_L: the large model answers anew where the small one was not sure.

        cascade = Cascade(small, large, rule=ChowQuantile(0.0), threshold=-1.5)
        cascade.generate(["2+2=", "17+85="]).generations

    The models may have different vocabularies: nothing but the prompt is passed on. A cascade costs the small model's
    answer in any case, so that it is dearer than the large model alone where nearly everything is deferred.

    Args:
        small, large: any models that generate.
        rule: the small model's confidence in its answer, from its log-probabilities before any transform; a learnt one
            must be of this small model.
        threshold: answers below it are deferred, in the rule's units: see `threshold_for`. At -inf all answers are the
            small model's, at inf the large one's.
        end_token: whether the end token counts as part of an answer.
        parameters: activated per token by each; counted where the models are transformers networks.

    Raises:
        ModelError: the rule was learnt on another model.
        ValueError: the threshold is NaN, or `parameters` are not two.

    Source: Language Model Cascades: Token-level uncertainty and beyond, arXiv:2404.10136, section 3.
    """

    def __init__(
        self,
        small: LanguageModel,
        large: LanguageModel,
        *,
        rule: DeferralRule,
        threshold: float,
        end_token: bool = True,
        parameters: tuple[int, int] | None = None,
    ) -> None:
        if math.isnan(threshold):
            raise ValueError("the threshold is NaN; take one from threshold_for()")
        rule.check(small.digest, small.vocab.digest)
        self.small, self.large, self.rule = small, large, rule
        self.threshold, self.end_token = float(threshold), end_token
        self._parameters = tuple(size for _, size in named_parameters((small, large), parameters))

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        transform: Transform | str | None = "greedy",
        max_tokens: int = 128,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        ignore_eos: bool = False,
        max_rows: int = 64,
    ) -> Cascaded:
        """Answer each prompt.

        Args:
            prompt: as of `nextoken.generate`; one answer for each.
            transform: for both models, the best token of each by default, as in the paper.
            max_tokens, stop, seed, ignore_eos, max_rows: for both models, as of `nextoken.generate`.

        Raises:
            ValueError: as of `nextoken.generate`, or there is no prompt.
        """
        prompts, _ = listed(prompt)
        if not prompts:
            raise ValueError("there is no prompt to answer")
        root = secrets.randbits(63) if seed is None else seed

        def drawn(model: LanguageModel, some: Sequence[Prompt]) -> list[Generation]:
            made = generate(
                model,
                list(some),
                transform=transform,
                max_tokens=max_tokens,
                stop=stop,
                seed=root,
                ignore_eos=ignore_eos,
                max_rows=max_rows,
            )
            return made if isinstance(made, list) else [made]

        own = drawn(self.small, prompts)
        answers = self.answers(own)
        confidences = self.rule.confidence(answers).tolist()
        # At inf everything is deferred, whatever the confidence.
        deferred = [sure < self.threshold or self.threshold == math.inf for sure in confidences]
        doubtful = [place for place, handed in enumerate(deferred) if handed]
        other = drawn(self.large, [prompts[place] for place in doubtful]) if doubtful else []
        standing = dict(enumerate(own)) | dict(zip(doubtful, other, strict=True))
        return Cascaded(
            generations=tuple(standing[place] for place in range(len(prompts))),
            deferred=tuple(deferred),
            confidences=tuple(confidences),
            small=tuple(own),
            cost=self._cost(own, other, deferred),
        )

    def answers(self, generations: Sequence[Generation]) -> list[Answer]:
        """What the small model says of its answers, with all that the rule wants to know."""
        return [Answer.of(made, end_token=self.end_token, embedding=self.rule.wants_embedding) for made in generations]

    def _cost(self, own: Sequence[Generation], other: Sequence[Generation], deferred: Sequence[bool]) -> Cost:
        """Each text as if it were alone: a pass for the prompt and one for each token but the last."""
        said = sum(len(made.tokens) for made, handed in zip(own, deferred, strict=True) if not handed)
        reviews = 2 if self.rule.wants_embedding else 1
        small = Spent(
            self.small.name,
            self._parameters[0],
            passes=sum(len(made.tokens) + reviews for made in own),
            read=sum((1 + reviews) * _read(made) for made in own),
            said=said,
        )
        large = Spent(
            self.large.name,
            self._parameters[1],
            passes=sum(len(made.tokens) for made in other),
            read=sum(map(_read, other)),
            said=sum(len(made.tokens) for made in other),
        )
        return Cost((small, large))


def _read(made: Generation) -> int:
    return len(made.request.prompt) + len(made.tokens) - 1

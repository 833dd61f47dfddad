"""Learning a length value from a model's own texts: rollouts, the discount that fits them, the regression."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nextoken.decode.generate import Prompt, derived_seed, prompt_tokens
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.request import Request
from nextoken.decode.transform import Chain, Transform
from nextoken.model.base import LanguageModel
from nextoken.model.hf import HFModel
from nextoken.model.loading import load
from nextoken.model.sarsa import FitStep
from nextoken.values._descent import Schedule, descend
from nextoken.values.length_value import HFLengthValue
from nextoken.values.scalar_head import ScalarValue


@dataclass(frozen=True)
class Rollout:
    """A text that a model drew, and what is known of its length.

    Args:
        tokens: ids of prompt and output, the end token included where the text came to it.
        given: how many of them are the prompt.
        remaining: tokens after the last of these, the end token counted: 0 where the text ended, their number where it
            was cut off and that is known, None where it was cut off and it is not.
    """

    tokens: tuple[int, ...]
    given: int
    remaining: int | None = 0

    def __post_init__(self) -> None:
        if not 0 < self.given < len(self.tokens):
            raise ValueError(
                f"of {len(self.tokens)} tokens at least one must be given and one drawn; {self.given} are given"
            )
        if self.remaining is not None and self.remaining < 0:
            raise ValueError(f"what remains must be at least 0 tokens, or None; got {self.remaining}")

    @property
    def length(self) -> int:
        """Tokens drawn, and those known to follow; where it is not known how many follow, at least this."""
        return len(self.tokens) - self.given + (self.remaining or 0)


def rollouts(
    model: LanguageModel | str | Path,
    prompts: Sequence[Prompt],
    *,
    n: int = 16,
    max_tokens: int = 512,
    transform: Transform | str | None = None,
    seed: int = 0,
    max_rows: int = 64,
) -> list[Rollout]:
    """n texts after each prompt, drawn by the model; those cut off at `max_tokens` or by the context are marked so.

    The lengths are those of this transform: a value learnt from these texts foretells texts drawn in the same way.

    Args:
        model, transform, max_tokens, max_rows: as of `nextoken.generate`; by default plain sampling.
        prompts: at least one.
        n: texts of each.
        seed: of all; every text has random numbers of its own, whatever its prompt.

    Raises:
        ValueError: there are no prompts, or as of `nextoken.generate`.
    """
    if not prompts or n < 1:
        raise ValueError(f"give at least one prompt and n of at least 1; got {len(prompts)} prompts and n = {n}")
    policy = load(model)
    rule = parsed(transform) if isinstance(transform, str) else transform or Chain()
    loop = Loop(policy, max_rows=max_rows)
    requests = []
    for place, prompt in enumerate(prompts):
        ids = prompt_tokens(policy, prompt)
        requests += [Request(ids, rule, max_tokens, seed=derived_seed(seed, place * n + sample)) for sample in range(n)]
    drawn: dict[int, list[int]] = {loop.submit(request): [] for request in requests}
    for piece in loop.run():
        drawn[piece.ticket].append(piece.token)
    return [_rolled(request.prompt, tokens, policy) for request, tokens in zip(requests, drawn.values(), strict=True)]


def _rolled(prompt: tuple[int, ...], tokens: Sequence[int], model: LanguageModel) -> Rollout:
    if tokens[-1] in model.vocab.eos_ids:
        return Rollout((*prompt, *tokens), len(prompt))
    # The last token of a text that filled the context cannot be read, and a cut is as good one token earlier.
    kept = tokens if model.context_length is None else tokens[: max(1, model.context_length - len(prompt))]
    return Rollout((*prompt, *kept), len(prompt), None)


def discount_for(lengths: Sequence[int], *, quantile: float = 0.99, left: float = 0.01) -> float:
    """g = left^(1 / L), L the `quantile` of the lengths: at that length u is 1 - left.

    A smaller g tells short lengths apart more finely and long ones not at all.

    Raises:
        ValueError: there are no lengths, or quantile or left are not between 0 and 1.
    """
    if not lengths or not 0 < quantile < 1 or not 0 < left < 1:
        raise ValueError(f"give lengths, and quantile and left between 0 and 1; got {quantile} and {left}")
    longest = torch.tensor(list(lengths), dtype=torch.float64).quantile(quantile)
    return float(left ** (1 / max(float(longest), 1.0)))


def fit_length_value(
    body: HFModel | ScalarValue,
    texts: Sequence[Rollout],
    *,
    discount: float | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> HFLengthValue:
    """Minimise the mean over all tokens of (u(s_t) - (1 - g^(R_t)))^2, R_t the tokens still to come, the end counted.

    t runs from the last token of the prompt to the last before the end; after the end u is 0 by definition. Each token
    weighs the same, whatever the length of its text: a mean per text would learn another, shorter length. Where a text
    was cut off after s_T and nobody knows when it would have ended, its target is 1 - g^(T - t) (1 - u(s_T)) with what
    u says of s_T at the time; to drop such texts would teach that texts are short.

    Args:
        body: a model, of which a copy is trained along with the head, as in the paper; or `ScalarValue.on(model)`, the
            head of which is trained on the hidden states of the model as it is.
        texts: see `rollouts`; some of them ended.
        discount: g; by default that of `discount_for` from their lengths.
        schedule: how to train. The paper trains whole models of billions of weights at a rate of 2e-5; a head alone or
            a small body wants more.
        seed: of the head's first weights and of the order of the texts.
        on_step: called after each step.

    Raises:
        ValueError: no text ended, or one does not fit the vocabulary or the context.

    Source: Length Value Model, arXiv:2604.27039, sections 3 and 4 (Monte Carlo targets, lambda 1, which it finds best).
    """
    scalar = body if isinstance(body, ScalarValue) else ScalarValue.on_copy(body, seed=seed)
    _check(scalar, texts)
    g = discount_for([text.length for text in texts]) if discount is None else discount
    value = HFLengthValue(scalar, discount=g)
    labels = [_labels(text, g) for text in texts]
    _begin_at_the_mean(scalar, texts, labels)
    mean_count = sum(map(len, labels)) / len(labels)

    def loss_of(chosen: list[int]) -> Tensor:
        squares = _squares(scalar, [texts[i] for i in chosen], [labels[i] for i in chosen])
        # By the mean number of tokens, not by that of this batch: else the tokens of short texts would weigh more.
        return squares / (len(chosen) * mean_count)

    descend(
        scalar.parameters(), loss_of, len(texts), schedule=schedule or Schedule(rate=1e-3), seed=seed, on_step=on_step
    )
    return value


def _labels(text: Rollout, discount: float) -> Tensor:
    """g^(R_t) for t = given - 1, ..., the last token before the end, or before the cut."""
    drawn = len(text.tokens) - text.given
    left = torch.arange(drawn, 0, -1, dtype=torch.float64) + (text.remaining or 0)
    return torch.exp(left * math.log(discount)).float()


def _squares(scalar: ScalarValue, texts: Sequence[Rollout], labels: Sequence[Tensor]) -> Tensor:
    """Sum over the tokens of some texts of (u - target)^2."""
    # Padded to the right, where a causal body does not look.
    width = max(len(text.tokens) - (text.remaining == 0) for text in texts)
    ids = torch.tensor([[*text.tokens, *[0] * (width - len(text.tokens))][:width] for text in texts])
    said = scalar.head(scalar.hidden(ids))
    survival = torch.zeros(len(texts), width)
    learnt = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        span = slice(text.given - 1, len(text.tokens) - 1)
        survival[row, span], learnt[row, span] = label, True
    survival, learnt = survival.to(said.device), learnt.to(said.device)
    last = torch.tensor([min(len(text.tokens), width) - 1 for text in texts], device=said.device)
    cut = torch.tensor([text.remaining is None for text in texts], device=said.device)
    at_the_cut = torch.sigmoid(-said.detach().gather(1, last[:, None]))
    survival = torch.where(cut[:, None], survival * at_the_cut, survival)
    return (torch.sigmoid(-said)[learnt] - survival[learnt]).square().sum()


@torch.no_grad()
def _begin_at_the_mean(scalar: ScalarValue, texts: Sequence[Rollout], labels: Sequence[Tensor]) -> None:
    """Let a new head say the mean of the targets; one that was trained already is left as it is."""
    if bool(scalar.head.outer.weight.any()) or bool(scalar.head.outer.bias.any()):
        return
    known = torch.cat([label for text, label in zip(texts, labels, strict=True) if text.remaining is not None])
    scalar.head.outer.bias.fill_(-float(torch.logit(known.double().mean(), eps=1e-6)))


def _check(scalar: ScalarValue, texts: Sequence[Rollout]) -> None:
    if not any(text.remaining is not None for text in texts):
        raise ValueError(
            f"none of {len(texts)} texts came to an end, so nothing is known of their length: raise max_tokens, or "
            "take a model that ends its texts"
        )
    for number, text in enumerate(texts):
        if not 0 <= min(text.tokens) <= max(text.tokens) < scalar.vocab.size:
            raise ValueError(f"text {number} has token ids outside the vocabulary of {scalar.vocab.size}")
        # The end token itself need not be read.
        read = len(text.tokens) - (text.remaining == 0)
        if scalar.context_length is not None and read > scalar.context_length:
            raise ValueError(
                f"text {number} has {read} tokens to be read and the context of {scalar.name} holds "
                f"{scalar.context_length}: shorten it"
            )

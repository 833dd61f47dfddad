"""How an acceptance head is learnt: guesses along the target's texts, and how likely each of them stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.next import invert_cdf
from nextoken.model.sarsa import FitStep
from nextoken.speculate.acceptance_head import AcceptanceHead, hidden_width

_BATCH = 16


@dataclass(frozen=True)
class AcceptanceExample:
    """A row that the draft reads, and how likely its guesses in it stand.

    Args:
        tokens: the prompt, then at each place a token of the target's text or the draft's guess there.
        chances: min(1, p / q) of each token that is a guess, None for every other.
    """

    tokens: tuple[int, ...]
    chances: tuple[float | None, ...]


@torch.no_grad()
def acceptance_examples(
    target: LanguageModel,
    draft: LanguageModel,
    responses: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    mixing: float = 0.15,
    seed: int = 0,
) -> list[AcceptanceExample]:
    """Of every response X one example Z: at each place Z_i = X_i with probability r, else a guess Y_i ~ q(. | X_<i),
    whose label is min(1, p(Y_i | X_<i) / q(Y_i | X_<i)).

    p and q are the distributions themselves, without a transform; one pass of each model per sixteen responses. So the
    draft reads its own guesses, as it does when it drafts, while the label is that after the target's text.

    Args:
        target, draft: over one vocabulary.
        responses: pairs of a prompt and the text that followed, token ids, drawn from the target at temperature 1.
        mixing: r.
        seed: of the guesses and the mixing; equal seeds give equal examples, however many responses there are.

    Raises:
        ValueError: the vocabularies differ, mixing is not in [0, 1), or a prompt or response is empty.

    Source: Huang et al., arXiv:2405.19715, section 3.3; r and the order of mixing as in the released code
    (specdec_pp/train.py).
    """
    if target.vocab.digest != draft.vocab.digest:
        raise ValueError(f"{draft.name} and {target.name} have different vocabularies")
    if not 0 <= mixing < 1:
        raise ValueError(f"mixing is the share of the target's own tokens and must be in [0, 1), got {mixing}")
    if any(not prompt or not output for prompt, output in responses):
        raise ValueError("every prompt and every response needs at least one token")
    generator = torch.Generator().manual_seed(seed)
    examples: list[AcceptanceExample] = []
    for start in range(0, len(responses), _BATCH):
        some = responses[start : start + _BATCH]
        ids = _padded([[*prompt, *output] for prompt, output in some])
        asked = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (prompt, output) in enumerate(some):
            asked[row, len(prompt) - 1 : len(prompt) + len(output) - 1] = True
        log_q = draft.predict(ids)[asked].log_probs()[:, 0].cpu()
        log_p = target.predict(ids)[asked].log_probs()[:, 0].cpu()
        coins = torch.cat([torch.rand(len(output), 2, dtype=torch.float64, generator=generator) for _, output in some])
        guesses = invert_cdf(log_q, coins[:, 0])
        gaps = log_p.gather(-1, guesses[:, None]).double() - log_q.gather(-1, guesses[:, None]).double()
        chances, is_own = gaps.clamp(max=0).exp()[:, 0].tolist(), (coins[:, 1] < mixing).tolist()
        drawn, place = guesses.tolist(), 0
        for prompt, output in some:
            tokens, labels = list(prompt), list[float | None]([None] * len(prompt))
            for token in output:
                tokens.append(token if is_own[place] else drawn[place])
                labels.append(None if is_own[place] else chances[place])
                place += 1
            examples.append(AcceptanceExample(tuple(tokens), tuple(labels)))
    return examples


@dataclass(frozen=True)
class AcceptanceRecipe:
    """How to train a head.

    Args:
        epochs, batch: passes over the guesses, and guesses per step.
        rate: AdamW's; it falls to 0 by half a cosine after it has risen for 3 % of the steps.
        reject_weight: w of a rejection, 1 being that of a guess that stands. With w above 1 the head finds rejections
            and tells chances that are too low: where the chance is y it tends to y / (y + w (1 - y)).
        weight_decay: AdamW's.
    """

    epochs: int = 3
    batch: int = 512
    rate: float = 1e-3
    reject_weight: float = 6.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"epochs and batch must be at least 1, got {self.epochs} and {self.batch}")
        if self.rate <= 0 or self.reject_weight <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"rate and reject_weight must be above 0 and weight_decay at least 0, got {self.rate}, "
                f"{self.reject_weight} and {self.weight_decay}"
            )

    def rate_at(self, step: int, steps: int) -> float:
        """The rate of step number `step` (from 0) of `steps`."""
        rising = (step + 1) / max(1.0, 0.03 * steps)
        return self.rate * min(1.0, rising) * (1 + math.cos(math.pi * step / steps)) / 2


def weighted_loss(log_probs: Tensor, chances: Tensor, *, reject_weight: float) -> Tensor:
    """sum_i (w (1 - y_i) (-log f_0) + y_i (-log f_1)) / (w sum_i (1 - y_i) + sum_i y_i), in nats.

    Args:
        log_probs: log f [N, 2], rejected and stands.
        chances: y [N].
        reject_weight: w.
    """
    weights = torch.stack([reject_weight * (1 - chances), chances], -1)
    return -(weights * log_probs).sum() / weights.sum()


def fit_acceptance(
    head: AcceptanceHead,
    draft: LanguageModel,
    examples: Sequence[AcceptanceExample],
    *,
    recipe: AcceptanceRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> tuple[float, ...]:
    """Minimise `weighted_loss` over all guesses, from the draft's hidden state at each guess's own place.

    The draft reads every example once and is not changed; the head is trained in place. Equal seeds give equal weights
    on one machine.

    Args:
        head: see `AcceptanceHead.on`.
        draft: whose hidden states it reads.
        examples: see `acceptance_examples`.
        recipe: how to train.
        seed: of the order of the guesses.
        on_step: called after each step.

    Returns:
        The loss of every step.

    Raises:
        ValueError: there is no guess among the examples.

    Source: Huang et al., arXiv:2405.19715, section 3.3. There a batch is of whole texts; here it is of guesses.
    """
    how = recipe or AcceptanceRecipe()
    hidden, chances = _read(draft, examples)
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=how.rate, weight_decay=how.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    steps, losses = how.epochs * math.ceil(len(chances) / how.batch), list[float]()
    for _ in range(how.epochs):
        order = torch.randperm(len(chances), generator=generator)
        for start in range(0, len(order), how.batch):
            chosen = order[start : start + how.batch]
            loss = weighted_loss(head(hidden[chosen]), chances[chosen], reject_weight=how.reject_weight)
            optimizer.param_groups[0]["lr"] = how.rate_at(len(losses), steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(FitStep(len(losses), steps, losses[-1]))
    head.eval()
    return tuple(losses)


@torch.no_grad()
def predicted_chances(
    head: AcceptanceHead, draft: LanguageModel, examples: Sequence[AcceptanceExample]
) -> tuple[Tensor, Tensor]:
    """log a [N] that the head tells of every guess of the examples, and the chances y [N] that they had.

    Raises:
        ValueError: there is no guess among the examples.
    """
    hidden, chances = _read(draft, examples)
    return head.log_chances(hidden), chances


@torch.no_grad()
def _read(draft: LanguageModel, examples: Sequence[AcceptanceExample]) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] at the guesses, and their chances [N]."""
    hidden_width(draft)
    states, chances = list[Tensor](), list[float]()
    for start in range(0, len(examples), _BATCH):
        some = examples[start : start + _BATCH]
        hidden = draft.predict(_padded([example.tokens for example in some])).hidden
        assert hidden is not None
        for row, example in enumerate(some):
            places = [place for place, chance in enumerate(example.chances) if chance is not None]
            states.append(hidden[row, places].float().cpu())
            chances += [chance for chance in example.chances if chance is not None]
    if not chances:
        raise ValueError("there is no guess to learn from: give examples made by acceptance_examples()")
    return torch.cat(states), torch.tensor(chances)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows])

"""Learning a token router from the places at which the small model's token diverges."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from nextoken.model.base import LanguageModel
from nextoken.model.sarsa import FitStep
from nextoken.route.divergence import Divergences
from nextoken.route.neural_router import NeuralRouter, RouterSizes
from nextoken.route.token_router import sights


@dataclass(frozen=True)
class TokenRouterRecipe:
    """How to train; the defaults are the paper's.

    Args:
        sizes: of the network.
        epochs, batch: passes over the labelled tokens, and tokens per step.
        rate, weight_decay: AdamW's, the same at every step.
        recall_factor: a token of label 1 weighs recall_factor n_0 / n_1, with n_0 and n_1 those of either label.
        patience: epochs without a lower loss on what is held out after which training ends.
        held_out: share of the answers by which weights and threshold are chosen.
        recall: share of the divergent tokens that the threshold must catch there.
    """

    sizes: RouterSizes = field(default_factory=RouterSizes)
    epochs: int = 50
    batch: int = 1024
    rate: float = 5e-5
    weight_decay: float = 5e-4
    recall_factor: float = 1.0
    patience: int = 10
    held_out: float = 0.1
    recall: float = 0.95

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.patience) < 1:
            raise ValueError(
                f"epochs, batch and patience must be at least 1, got {self.epochs}, {self.batch} and {self.patience}"
            )
        if self.rate <= 0 or self.weight_decay < 0 or self.recall_factor <= 0:
            raise ValueError(
                f"rate and recall_factor must be above 0 and weight_decay at least 0, got {self.rate}, "
                f"{self.recall_factor} and {self.weight_decay}"
            )
        if not 0 < self.held_out < 1 or not 0 < self.recall <= 1:
            raise ValueError(
                f"held_out must be between 0 and 1 and recall above 0 and at most 1, got {self.held_out} and "
                f"{self.recall}"
            )


@dataclass(frozen=True)
class Examples:
    """What the small model showed before each of its tokens, and where these lead.

    Args:
        hidden, logits: features [N, H] and [N, K], as `NeuralRouter.features` makes them.
        tokens: [N], the small model's.
        differs: [N], whether the large model wrote another.
        divergent: [N], label 1.
        answer: [N], number of the answer.
    """

    hidden: Tensor
    logits: Tensor
    tokens: Tensor
    differs: Tensor
    divergent: Tensor
    answer: Tensor


@dataclass(frozen=True)
class FittedTokenRouter:
    """What training gives.

    Args:
        router: with the threshold chosen.
        losses: of every step, weighted, in nats per token.
        held_out_losses: of every epoch, on the answers held out.
        recall: share of the divergent tokens of these that the threshold routes.
        positive_rate: share of the tokens that differ in these that it routes.
    """

    router: NeuralRouter
    losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    recall: float
    positive_rate: float


def recall_threshold(scores: ArrayLike, divergent: ArrayLike, *, recall: float = 0.95) -> tuple[float, float, float]:
    """The threshold, of 100 from 0.01 to 0.99, that routes least while it catches `recall` of what diverges.

    Args:
        scores, divergent: [N] of tokens in which the two models differ.
        recall: share of the divergent ones whose score must be at least the threshold.

    Returns:
        The threshold, its recall, and the share of the tokens that it routes. Where even the lowest catches too
        little, that one.

    Raises:
        ValueError: none diverges.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(divergent, dtype=bool)
    if not labels.any():
        raise ValueError("no token diverges, so there is no recall to choose a threshold by; give more answers")
    grid = np.linspace(0.01, 0.99, 100)
    caught = (values[labels][:, None] >= grid).mean(0)
    # Both shares fall with the threshold, so that the highest that catches enough routes least.
    best = int(np.flatnonzero(caught >= recall).max(initial=0))
    return float(grid[best]), float(caught[best]), float((values >= grid[best]).mean())


@torch.no_grad()
def examples_of(router: NeuralRouter, small: LanguageModel, divergences: Divergences) -> Examples:
    """Features and labels of every place of the answers but those that the verifier could not decide.

    The features of the token at position t are of what the small model says after position t - 1. They are held in
    memory, 4 (H + K) bytes per token.
    """
    verdicts = {(found.answer, found.position): found.divergent for found in divergences.differences}
    hidden, logits, tokens, differs, labels, numbers = [], [], [], [], [], []
    for number, (answer, own) in enumerate(zip(divergences.answers, divergences.own, strict=True)):
        said = small.predict([answer.tokens[:-1]])[:, answer.given - 1 :]
        parts = [router.features(sight) for sight in sights(said)]
        places = range(answer.given, len(answer.tokens))
        known = [index for index, t in enumerate(places) if verdicts.get((number, t), False) is not None]
        hidden.append(torch.cat([part[0][0] for part in parts])[known])
        logits.append(torch.cat([part[1][0] for part in parts])[known])
        tokens += [own[index] for index in known]
        differs += [own[index] != answer.tokens[places[index]] for index in known]
        labels += [verdicts.get((number, places[index]), False) is True for index in known]
        numbers += [number] * len(known)
    return Examples(
        hidden=torch.cat(hidden),
        logits=torch.cat(logits),
        tokens=torch.tensor(tokens),
        differs=torch.tensor(differs),
        divergent=torch.tensor(labels),
        answer=torch.tensor(numbers),
    )


def fit_token_router(
    small: LanguageModel,
    divergences: Divergences,
    *,
    recipe: TokenRouterRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> FittedTokenRouter:
    """Minimise the mean over tokens of -w_1 d log sigma(z) - (1 - d) log sigma(-z), and choose a threshold.

    d is a token's label and w_1 what makes up for few being divergent. Of the answers a share is held out; the weights
    of the epoch with the least loss on these are kept, and the threshold is the one by which they are routed least
    among those that catch `recall` of what diverges in them. Equal seeds give equal weights on one machine.

    Args:
        small: the model whose tokens are labelled; its weights are not trained.
        divergences: from `find_divergences` with this model.
        recipe: how to train.
        seed: of the first weights, of the answers held out, of the batches and of dropout.
        on_step: called after each step.

    Raises:
        ValueError: the labels are of another model, or so few that nothing divergent is learnt from or held out.

    Source: R2R, arXiv:2505.21600, section 4.2 and appendix, and its released code (script/train, r2r/train/optimizer).
    """
    how = recipe or TokenRouterRecipe()
    if small.digest and divergences.digests.get("small model", small.digest) != small.digest:
        raise ValueError(f"these divergences are of another small model than {small.name}; find those of this one")
    router = NeuralRouter.untrained(small, sizes=how.sizes, seed=seed)
    seen = examples_of(router, small, divergences)
    learnt, apart = _split(seen, len(divergences.answers), how.held_out, seed)
    losses, held_out_losses = _descend(router, small, seen, learnt, apart, how, seed, on_step)
    judged = apart[seen.differs[apart]]
    with torch.no_grad():
        scores = _logits(router, small, seen, judged).sigmoid().cpu()
    threshold, caught, routed = recall_threshold(scores, seen.divergent[judged], recall=how.recall)
    fitted = NeuralRouter(router.network, threshold=threshold, digests=divergences.digests)
    return FittedTokenRouter(fitted, losses, held_out_losses, caught, routed)


def _split(seen: Examples, answers: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places to learn from and places held out, of different answers."""
    order = torch.randperm(answers, generator=_generator(seed, "held out"))
    held = torch.zeros(answers, dtype=torch.bool)
    held[order[: max(1, round(share * answers))]] = True
    apart = held[seen.answer]
    parts = (~apart).nonzero()[:, 0], apart.nonzero()[:, 0]
    if not all(bool(seen.divergent[part].any()) for part in parts):
        raise ValueError(
            f"of {len(seen.tokens)} tokens {int(seen.divergent.sum())} diverge, too few to learn from some and to hold "
            f"others out; label more answers than {answers}"
        )
    return parts


def _descend(
    router: NeuralRouter,
    small: LanguageModel,
    seen: Examples,
    learnt: Tensor,
    apart: Tensor,
    how: TokenRouterRecipe,
    seed: int,
    on_step: Callable[[FitStep], object] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    network = router.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=how.rate, weight_decay=how.weight_decay)
    ones = int(seen.divergent[learnt].sum())
    weight = torch.tensor(how.recall_factor * (len(learnt) - ones) / ones)
    per_epoch = math.ceil(len(learnt) / how.batch)
    losses, held_out = list[float](), list[float]()
    best = copy.deepcopy(network.state_dict())
    for epoch in range(how.epochs):
        order = learnt[torch.randperm(len(learnt), generator=_generator(seed, f"epoch {epoch}"))]
        network.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=_generator(seed, f"dropout {epoch}"))))
            for chosen in torch.split(order, how.batch):
                loss = _loss(router, small, seen, chosen, weight)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(loss.item())
                if on_step is not None:
                    on_step(FitStep(len(losses), how.epochs * per_epoch, losses[-1]))
        network.eval()
        with torch.no_grad():
            parts = [
                (len(some), float(_loss(router, small, seen, some, weight))) for some in torch.split(apart, how.batch)
            ]
        held_out.append(sum(count * part for count, part in parts) / len(apart))
        if held_out[-1] <= min(held_out):
            best = copy.deepcopy(network.state_dict())
        if epoch - int(np.argmin(held_out)) >= how.patience:
            break
    network.load_state_dict(best)
    return tuple(losses), tuple(held_out)


def _loss(router: NeuralRouter, small: LanguageModel, seen: Examples, chosen: Tensor, weight: Tensor) -> Tensor:
    said = _logits(router, small, seen, chosen)
    labels = seen.divergent[chosen].to(said)
    return F.binary_cross_entropy_with_logits(said, labels, pos_weight=weight.to(said))


def _logits(router: NeuralRouter, small: LanguageModel, seen: Examples, chosen: Tensor) -> Tensor:
    embedded = router.embedded(small, seen.tokens[chosen])
    said: Tensor = router.network(seen.hidden[chosen], embedded, seen.logits[chosen])
    return said


def _generator(seed: int, what: str) -> torch.Generator:
    derived = int.from_bytes(hashlib.sha256(f"{seed}/{what}".encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(derived)

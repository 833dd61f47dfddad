"""How thinking is learnt: first to make use of a second pass where it is needed, then to tell where that is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nextoken.model._descent import TextRecipe, seed_of
from nextoken.model.hf import HFModel
from nextoken.model.lora import GatedLora
from nextoken.model.sarsa import FitStep
from nextoken.model.stack import Stack
from nextoken.route._depth_memory import DepthMemory
from nextoken.route._pass_descent import NONE, check_passes, descend_with_passes
from nextoken.route._thinker import Pass
from nextoken.route.think_at_hard import ThinkAtHard
from nextoken.route.think_decider import AlwaysThink, DeciderNetwork, LearnedDecider, layers_to_read


@dataclass(frozen=True, kw_only=True)
class ThinkRecipe(TextRecipe):
    """How to train with second passes.

    Rate, decay, warm-up, floor and clip are the paper's for models of 0.6 and 1.7 billion weights; a small one wants
    rates near 1e-3.

    Args:
        rate, clip, warm_up, floor, betas: see `TextRecipe`, as are steps, batch and weight_decay.
        rank, alpha, dropout, targets: of the adapter, see `GatedLora`.
        body: whether the backbone learns too, of which a copy is made; else only the adapter.
    """

    rate: float = 4e-5
    clip: float = 0.2
    warm_up: float = 0.03
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.1
    targets: tuple[str, ...] | None = None
    body: bool = True


@dataclass(frozen=True, kw_only=True)
class DeciderRecipe(TextRecipe):
    """How to train a decider.

    Args:
        rate, clip, warm_up, floor, betas: see `TextRecipe`, as are steps, batch and weight_decay.
        positive_weight: in the loss, of tokens that go on, for there are few.
        layers: of which hidden states it reads, see `DeciderNetwork`; None for `layers_to_read`.
        leading: how many logits it reads; all where there are fewer.
        width, blocks, expansion, dropout: of its network.
    """

    rate: float = 3e-5
    clip: float = 0.2
    warm_up: float = 0.03
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    positive_weight: float = 5.4
    layers: tuple[int, ...] | None = None
    leading: int = 100
    width: int = 512
    blocks: int = 6
    expansion: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_weight <= 0:
            raise ValueError(f"positive_weight must be above 0, got {self.positive_weight}")


@dataclass(frozen=True, eq=False)
class FittedThinking:
    """What training made.

    Args:
        model: ready for use.
        losses: of every step.
    """

    model: ThinkAtHard
    losses: tuple[float, ...]


def fit_thinking(
    model: HFModel,
    rows: Sequence[Sequence[int]],
    passes: Sequence[Sequence[int]],
    *,
    given: Sequence[int] | int = 1,
    recipe: ThinkRecipe | None = None,
    iterations: int = 2,
    leading: int = 100,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> FittedThinking:
    """Stage 1: minimise the mean of -log softmax(z_d)(next token), d + 1 being the passes that the labels give a token.

    Gradients pass through everything: from the second pass through the mixture it was fed and through attention to the
    first. What is learnt with the passes given beforehand needs a decider afterwards; the model returned has
    `AlwaysThink` until then.

    Args:
        model: left as it is; where only the adapter learns, its weights are shared.
        rows: token ids, at least two in each.
        passes: for every token of every row, from 1 to `iterations`; see `passes_needed`.
        given: tokens at the beginning of each row that are not to be learnt, one number for all rows or one per row.
        recipe: how to train.
        iterations, leading: of `ThinkAtHard`.
        seed: of the adapter, of the order of the rows and of dropout.
        on_step: called after each step.

    Raises:
        ModelError: the model is built otherwise than `ThinkAtHard` needs.
        ValueError: there are no rows, or rows or passes do not fit.

    Source: Think-at-Hard, arXiv:2511.08577, section 4.3, stage 1.
    """
    how = recipe or ThinkRecipe()
    body = HFModel(copy.deepcopy(model.model), model.tokenizer, name=model.name) if how.body else model
    drawn = seed_of(seed, "adapter")
    adapter = GatedLora(
        Stack(body), rank=how.rank, alpha=how.alpha, targets=how.targets, dropout=how.dropout, seed=drawn
    )
    thinking = ThinkAtHard(
        body, adapter, decider=AlwaysThink(), iterations=iterations, leading=leading, base=model.digest
    )
    check_passes(thinking, rows, passes, given=given, most=iterations)
    thinker = thinking.thinker
    learnt = [
        *adapter.parameters(),
        *(weight for weight in body.model.parameters() if how.body and weight.requires_grad),
    ]

    def loss_of(ids: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
        memory = DepthMemory.empty(thinking, thinker.stack, len(ids))
        thought = thinker.run(memory, ids, None, lambda made: wanted.gather(1, made.nodes) > made.depth + 1)
        z = thinker.logits(thought.total)
        return F.cross_entropy(z.flatten(0, 1), targets.to(z.device).flatten(), ignore_index=NONE)

    adapter.train()
    try:
        losses = descend_with_passes(learnt, loss_of, rows, passes, given=given, recipe=how, seed=seed, on_step=on_step)
    finally:
        adapter.eval()
    return FittedThinking(thinking, losses)


def fit_decider(
    model: ThinkAtHard,
    rows: Sequence[Sequence[int]],
    passes: Sequence[Sequence[int]],
    *,
    given: Sequence[int] | int = 1,
    recipe: DeciderRecipe | None = None,
    threshold: float | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> FittedThinking:
    """Stage 2: minimise the mean of w BCE(c_d, [passes > d + 1]) over the tokens in every pass d < D - 1.

    The tokens make the passes that their labels say, and all else is fixed. w is `positive_weight` where the label
    asks for another pass, else 1.

    Args:
        model: of stage 1; left as it is.
        rows, passes, given: as of `fit_thinking`; what is given is not decided upon either.
        recipe: how to train, and how large the decider is.
        threshold: of the model returned, by default that of `model`.
        seed: of the decider's first weights, of the order of the rows and of dropout.
        on_step: called after each step.

    Raises:
        ValueError: there are no rows, or rows or passes do not fit; the model makes one pass only.

    Source: Think-at-Hard, arXiv:2511.08577, section 4.3, stage 2.
    """
    how = recipe or DeciderRecipe()
    thinker = model.thinker
    if model.iterations < 2:
        raise ValueError(f"{model.name} makes one pass, so that there is nothing to decide: give it iterations=2")
    check_passes(model, rows, passes, given=given, most=model.iterations)
    layers = layers_to_read(thinker.stack.depth) if how.layers is None else how.layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "decider"))
        network = DeciderNetwork(
            layers=layers,
            hidden=thinker.stack.width,
            leading=min(how.leading, model.vocab.size),
            width=how.width,
            blocks=how.blocks,
            expansion=how.expansion,
            dropout=how.dropout,
        ).to(model.model.network.device)
    fitted = model.with_decider(LearnedDecider(network), threshold=threshold)
    weight = torch.tensor(how.positive_weight, device=model.model.network.device)

    def loss_of(ids: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
        said, asked = list[Tensor](), list[Tensor]()

        def more(made: Pass) -> Tensor:
            onwards = wanted.gather(1, made.nodes) > made.depth + 1
            seen = thinker.seen(made, network.leading)
            # Where it is not known what follows, as after the last token of a row, nobody can say what is hard.
            known = targets.gather(1, made.nodes)[made.active] >= 0
            with torch.enable_grad():
                said.append(network(seen.states, seen.leading).float()[known.to(seen.states.device)])
            asked.append(onwards[made.active][known])
            return onwards

        with torch.no_grad():
            memory = DepthMemory.empty(model, thinker.stack, len(ids))
            thinker.run(memory, ids, None, more, layers=network.layers)
        logits = torch.cat(said)
        return F.binary_cross_entropy_with_logits(logits, torch.cat(asked).to(logits), pos_weight=weight)

    network.train()
    try:
        losses = descend_with_passes(
            list(network.parameters()), loss_of, rows, passes, given=given, recipe=how, seed=seed, on_step=on_step
        )
    finally:
        network.eval()
    return FittedThinking(fitted, losses)

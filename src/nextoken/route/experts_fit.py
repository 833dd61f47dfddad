"""How experts are learnt: the loss of the next token, the balance of the experts, and the thresholds that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.model._descent import TextRecipe, batch_of, check_rows, descend, next_token_loss
from nextoken.model.sarsa import FitStep
from nextoken.route.experts import DynaMoE, ExpertBlock

_BATCH = 16


@dataclass(frozen=True)
class ExpertsRecipe(TextRecipe):
    """How to train; further than `TextRecipe`:

    Args:
        balance: weight of the load-balancing loss, which is 1 where all experts are used alike.
        momentum: of the thresholds; each step brings them nearer to the quantile of its batch by 1 - momentum.
        body: whether the rest of the network learns too, and not only experts and routers.
    """

    balance: float = 0.01
    momentum: float = 0.9
    body: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance < 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"balance must be at least 0 and momentum from 0 to below 1, got {self.balance} and {self.momentum}"
            )


def balance_loss(scores: Tensor, active: Tensor) -> Tensor:
    """E sum_e f_e P_e: f_e the share of all activations that are of expert e, P_e its mean probability.

    1 where both are uniform, E where one expert has all. Gradients flow through P.

    Args:
        scores: probabilities [N, E].
        active: boolean [N, E].

    Source: Fedus et al., arXiv:2101.03961, section 2.2, where a token has one expert; here f is over activations.
    """
    counts = active.sum(0).to(scores.dtype)
    return scores.shape[-1] * (counts / counts.sum() * scores.mean(0)).sum()


def fit_experts(
    model: DynaMoE,
    rows: Sequence[Sequence[int]],
    *,
    recipe: ExpertsRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> tuple[float, ...]:
    """Minimise the mean of -log p(next token) plus balance * mean over layers of `balance_loss`.

    Each step routes by the thresholds that the steps before it left: a batch's own quantile would let every token see
    the scores of all others, those to its right among them. After the step the thresholds follow.

    Args:
        model: trained in place.
        rows: token ids, at least two in each.
        recipe: how to train.
        seed: of the order of the rows.
        on_step: called after each step.

    Returns:
        The loss of every step.

    Raises:
        ValueError: there are no rows, or one does not fit.
    """
    how = recipe or ExpertsRecipe()
    check_rows(model, rows)
    network = model.inner.network
    some = model.inner.model if how.body else torch.nn.ModuleList(model.blocks)

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        loss = next_token_loss(network, ids, targets)
        told = targets >= 0
        balances = []
        for block in model.blocks:
            scores, active = _said(block, told)
            balances.append(balance_loss(scores, active))
            block.threshold.lerp_(model.routing.quantile(scores.detach()), 1 - how.momentum)
        return loss + how.balance * torch.stack(balances).mean()

    return descend(list(some.parameters()), loss_of, rows, recipe=how, seed=seed, on_step=on_step)


@torch.no_grad()
def calibrate_experts(model: DynaMoE, rows: Sequence[Sequence[int]]) -> None:
    """Set each layer's threshold to the tau-quantile over all tokens of the rows, the lowest layer first.

    For thresholds without training, or for another text than that of the training.

    Raises:
        ValueError: there are no rows, or one does not fit.
    """
    check_rows(model, rows)
    for block in model.blocks:
        found = []
        for begin in range(0, len(rows), _BATCH):
            ids, targets = batch_of(rows[begin : begin + _BATCH])
            model.inner.network.run(ids, use_cache=False)
            found.append(_said(block, targets >= 0)[0])
        block.threshold.copy_(model.routing.quantile(torch.cat(found)))


def _said(block: ExpertBlock, told: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and activity [N, E] of the last pass, of the tokens that count."""
    assert block.last is not None
    told = told.to(block.last.scores.device)
    return block.last.scores[told], block.last.active[told]

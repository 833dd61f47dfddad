"""How a model learns to do without its layers: the loss of the next token under the schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nextoken.head import cross_entropy
from nextoken.model._descent import TextRecipe, check_rows, descend, generator_of
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.sarsa import FitStep
from nextoken.route._begin import begins
from nextoken.route.skip_decode import SkipDecode
from nextoken.route.skip_schedule import LayerSchedule


@dataclass(frozen=True)
class SkipRecipe(TextRecipe):
    """How to fine-tune; `rate` is 3e-4 by default, and further than `TextRecipe`:

    Args:
        prompts: the fewest and the most tokens of a prompt; of each row in each step the number is drawn from these,
            so that the model serves prompts of all such lengths. None for what the model itself takes for the prompt.
    """

    rate: float = 3e-4
    prompts: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and not 0 <= self.prompts[0] <= self.prompts[1]:
            raise ValueError(f"prompts must be the fewest and the most tokens of one, got {self.prompts}")


def fit_skips(
    model: HFModel,
    schedule: LayerSchedule,
    rows: Sequence[Sequence[int]],
    *,
    prompt: int | Sequence[int],
    recipe: SkipRecipe | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> tuple[SkipDecode, tuple[float, ...]]:
    """Fine-tune a copy of the model to minimise the mean over all tokens of -log p(next token), p under the schedule.

    All positions are learnt in parallel: each layer is run on the tokens whose set has it, which see each other only,
    and those that left it out keep their hidden state. So a step costs as many layer evaluations as the schedule has.
    All weights are trained, without dropout and in float32. Equal seeds give equal weights on one machine.

    Args:
        model: stays as it is.
        schedule, prompt: as of `SkipDecode`.
        rows: token ids of whole texts, begin token included, at least two in each.
        recipe: how to train.
        seed: of the order of the rows and the prompts drawn.
        on_step: called after each step.

    Returns:
        The fine-tuned model, and the loss of every step in nats.

    Raises:
        ValueError: there are no rows, one does not fit, or as of `SkipDecode`.
        ModelError: as of `SkipDecode`.

    Source: SkipDecode, arXiv:2307.02628, section 3; the recipe is reconstructed.
    """
    how = recipe or SkipRecipe()
    check_rows(model, rows)
    tuned = HFModel(copy.deepcopy(model.model).to(torch.float32), model.tokenizer, name=model.name)
    skips = SkipDecode(tuned, schedule, prompt=prompt, base=model.digest)
    output, generator = tuned.model.get_output_embeddings(), generator_of(seed, "prompts")

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        told = targets >= 0
        # What is last in a row predicts nothing, and nothing sees it.
        fed = ids.where(told, ABSENT)
        if how.prompts is None:
            begin = begins(skips.prompt, [()] * len(fed), fed, None)
        else:
            least, most = how.prompts
            begin = torch.randint(least, most + 1, (len(fed), 1), generator=generator)
        hidden = skips.stack.finish(skips.hidden(fed, begin))
        # The stack's own head passes no gradient to its weights.
        head = replace(skips.stack.head, weight=output.weight, bias=output.bias)
        return cross_entropy(hidden, head, targets.to(hidden.device))

    losses = descend(list(tuned.model.parameters()), loss_of, rows, recipe=how, seed=seed, on_step=on_step)
    return skips, losses

"""Cost: what a router spent, model by model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nextoken.model.base import LanguageModel


@dataclass(frozen=True)
class Spent:
    """What one model of a router did.

    Args:
        model: its name.
        parameters: weights that a token activates; None where they cannot be counted.
        passes: forward passes, each of them for the whole batch.
        read: tokens fed to it, summed over rows.
        said: next-token distributions of the router that are this model's, summed over rows.
    """

    model: str
    parameters: int | None
    passes: int = 0
    read: int = 0
    said: int = 0

    def __add__(self, other: Spent) -> Spent:
        return self._with(other, 1)

    def __sub__(self, other: Spent) -> Spent:
        return self._with(other, -1)

    def _with(self, other: Spent, sign: int) -> Spent:
        if (self.model, self.parameters) != (other.model, other.parameters):
            raise ValueError(f"costs of {self.model} and of {other.model} cannot be taken together")
        return Spent(
            self.model,
            self.parameters,
            self.passes + sign * other.passes,
            self.read + sign * other.read,
            self.said + sign * other.said,
        )


@dataclass(frozen=True)
class Cost:
    """What the models of a router did, the small one first.

        before = router.spent
        generate(router, "Once")
        cost = router.spent - before

    Args:
        models: one entry per model.
    """

    models: tuple[Spent, ...]

    @property
    def said(self) -> int:
        """Distributions given in all."""
        return sum(part.said for part in self.models)

    @property
    def large_share(self) -> float:
        """f: the share of the distributions that the last, largest model gave; 0 where nothing was asked."""
        return self.models[-1].said / self.said if self.said else 0.0

    @property
    def activated(self) -> float:
        """sum_m P_m read_m / sum_m said_m: parameters activated per token, what is read without an answer included.

        Raises:
            ValueError: the parameters of a model are not known, or nothing was asked.
        """
        return sum(self._parameters(part) * part.read for part in self.models) / self._asked()

    @property
    def answering(self) -> float:
        """sum_m P_m said_m / sum_m said_m: the same if a model had to read only the tokens that it answers.

        The papers of switching count so. It leaves out what a model must read to catch up when its turn comes.

        Raises:
            ValueError: as `activated`.
        """
        return sum(self._parameters(part) * part.said for part in self.models) / self._asked()

    def __add__(self, other: Cost) -> Cost:
        return Cost(tuple(a + b for a, b in zip(self.models, other.models, strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(tuple(a - b for a, b in zip(self.models, other.models, strict=True)))

    def _asked(self) -> int:
        if not self.said:
            raise ValueError("no distribution was asked for, so there is no cost per token")
        return self.said

    @staticmethod
    def _parameters(part: Spent) -> int:
        if part.parameters is None:
            raise ValueError(
                f"the parameters of {part.model} are not known: give parameters=(small, large) to the router"
            )
        return part.parameters


def activated_parameters(model: LanguageModel) -> int | None:
    """Weights that take part in the computation of every token, where the model is a transformers network.

    An embedding table that is not the unembedding as well is left out, for a token looks up one row of it. Weights of
    experts that a token skips are counted. None for other models.
    """
    network: Any = getattr(getattr(model, "inner", model), "model", None)
    if not callable(getattr(network, "parameters", None)):
        return None
    count = sum(int(weight.numel()) for weight in network.parameters())
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    if table is not None and (head is None or head.weight is not table.weight):
        count -= int(table.weight.numel())
    return count


def named_parameters(
    models: Sequence[LanguageModel], given: Sequence[int] | None
) -> tuple[tuple[LanguageModel, int | None], ...]:
    """Each model with the parameters given for it, or those that can be counted.

    Raises:
        ValueError: there are not as many numbers as models, or one is not positive.
    """
    if given is None:
        return tuple((model, activated_parameters(model)) for model in models)
    if len(given) != len(models) or any(number < 1 for number in given):
        raise ValueError(f"parameters must be {len(models)} numbers above 0, one per model; got {list(given)}")
    return tuple(zip(models, given, strict=True))

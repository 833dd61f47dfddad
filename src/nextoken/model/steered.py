"""Steered: a model that runs with its activations edited."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextoken.errors import InputError, ModelError
from nextoken.model._derived import Derived, transformers_model
from nextoken.model._network import Network
from nextoken.model._sites import Site, Sites, Spot, editing
from nextoken.model.base import ABSENT, State
from nextoken.model.hf import HFModel
from nextoken.model.next import Next

Mode = Literal["scale", "shift"]


@dataclass(frozen=True, eq=False)
class Edit:
    """a[l, i] <- a[l, i] (1 + amounts[l, i]), or with mode "shift" a[l, i] + amounts[l, i], at every position.

    Args:
        site: where: "attention" (what goes into the attention output projection), "ffn" (what the feed-forward block
            gives) or "layer" (the residual stream after the layer).
        amounts: [L, D], 0 where nothing is edited; kept as float32.
        mode: "scale" makes of each activation a multiple of itself, so an activation of the other sign is moved the
            other way, and one with an amount below -1 changes sign; "shift" moves it by a constant.

    Raises:
        ValueError: amounts that are no table of finite numbers, or an unknown mode.
    """

    site: Site
    amounts: Tensor
    mode: Mode = "scale"

    def __post_init__(self) -> None:
        amounts = self.amounts.detach().to("cpu", torch.float32)
        if amounts.ndim != 2 or not bool(amounts.isfinite().all()):
            raise ValueError(f"amounts must be a table [L, D] of finite numbers, got shape {tuple(amounts.shape)}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be 'scale' or 'shift', got {self.mode!r}")
        object.__setattr__(self, "amounts", amounts)

    @property
    def count(self) -> int:
        """How many activations per token are edited."""
        return int((self.amounts != 0).sum())

    def scaled(self, alpha: float) -> Edit:
        """The same with alpha times the amounts."""
        return replace(self, amounts=alpha * self.amounts)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` reads."""
        write_table(path, "edit", {"amounts": self.amounts}, {"site": self.site, "mode": self.mode})

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """One that `save` wrote.

        Raises:
            InputError: there is no such file, or it holds something else.
        """
        tensors, settings = read_table(path, "edit", ("amounts",))
        return cls(settings["site"], tensors["amounts"], settings["mode"])


class Steered(Derived):
    """p(. | text) of a transformers model whose activations are edited in every pass and at every position.

    Of several edits at one place the first comes first. The model itself is untouched: outside a call of this one
    nothing of it is changed, and any number of steered models can share it. Without edits, or with amounts of 0
    throughout, the logits are the model's own to the last bit. Edits are computed in float32 and rounded to the model's
    precision. What a state remembers was computed under this model's edits, so it is of no use to another.

    Args:
        model: a transformers model, or one steered already, whose edits then come first.
        edits: as many as wanted, from `nextoken.model.steering` or made by hand.

    Raises:
        ValueError: an edit has another shape than the model's activations, or the model is not of transformers.
        ModelError: the site is not found in a model of this family; at a call, the edited activations leave the range
            of the model's precision.

    Source: the "scale" edits are those of AUSteer, arXiv:2602.04428; with mode "shift" and site "layer" they are the
        addition of a vector to the residual stream, arXiv:2312.06681.
    """

    def __init__(self, model: HFModel | Derived, edits: Sequence[Edit]) -> None:
        network = _EditedNetwork(transformers_model(model).network, edits)
        super().__init__(model, network, name=f"steered({model.name})")
        self.edits = tuple(edits)

    def _settings(self) -> object:
        return [
            (edit.site, edit.mode, hashlib.sha256(edit.amounts.contiguous().numpy().tobytes()).hexdigest())
            for edit in self.edits
            if edit.count
        ]

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        result = super()._feed(state, tokens, parents)
        if not _is_finite(result, tokens):
            self.own(state.memory).keep([])  # the call has failed: the state within forgets it, as the one without does
            raise self._overflow()
        return result

    def _predict(self, tokens: Tensor) -> Next:
        result = super()._predict(tokens)
        if not _is_finite(result, tokens):
            raise self._overflow()
        return result

    def _overflow(self) -> ModelError:
        return ModelError(
            f"{self.name}: the edited activations leave the range of {self.dtype}; use smaller amounts, or load the "
            'model with dtype="bfloat16" or "float32"'
        )


class _Change:
    """One edit at one spot: only the columns that it changes."""

    def __init__(self, edit: Edit, layer: int) -> None:
        self.columns = edit.amounts[layer].nonzero()[:, 0]
        self.amounts = edit.amounts[layer, self.columns]
        self.scales = edit.mode == "scale"

    def __call__(self, activations: Tensor) -> Tensor:
        if self.columns.device != activations.device:
            self.columns, self.amounts = self.columns.to(activations.device), self.amounts.to(activations.device)
        wide = torch.promote_types(activations.dtype, torch.float32)
        old = activations.index_select(-1, self.columns).to(wide)
        new = old * (1 + self.amounts) if self.scales else old + self.amounts
        return activations.index_copy(-1, self.columns, new.to(activations.dtype))


class _EditedNetwork(Network):
    """The passes of a network with its activations edited."""

    def __init__(self, network: Network, edits: Sequence[Edit]) -> None:
        vars(self).update(vars(network))
        self._passes = network
        sites: dict[Site, Sites] = {}
        changes: dict[Spot, list[_Change]] = {}
        for edit in edits:
            if edit.site not in sites:
                sites[edit.site] = Sites.find(network, edit.site)
            found = sites[edit.site]
            if edit.amounts.shape != (found.depth, found.width):
                raise ValueError(
                    f"{type(network.module).__name__} has {found.width} activations in each of {found.depth} layers at "
                    f"{edit.site!r}, the edit is for {list(edit.amounts.shape)}: it was made for another model or site"
                )
            for layer in edit.amounts.any(1).nonzero()[:, 0].tolist():
                changes.setdefault(found.spots[layer], []).append(_Change(edit, layer))
        self._acts = [(spot, _in_turn(those)) for spot, those in changes.items()]

    def run(self, ids: Tensor, **arguments: Any) -> Tensor:
        with self._editing():
            return self._passes.run(ids, **arguments)

    def logits(self, ids: Tensor, **arguments: Any) -> Tensor:
        with self._editing():
            return self._passes.logits(ids, **arguments)

    def next(self, raw: Tensor) -> Next:
        return self._passes.next(raw)

    def blank(self, batch: int, n: int) -> Tensor:
        return self._passes.blank(batch, n)

    def _editing(self) -> AbstractContextManager[None]:
        return editing(self._acts)


def _in_turn(changes: Sequence[_Change]) -> Callable[[Tensor], Tensor]:
    def act(activations: Tensor) -> Tensor:
        for change in changes:
            activations = change(activations)
        return activations

    return act


def _is_finite(result: Next, tokens: Tensor) -> bool:
    """Whether every distribution after a token is computed from finite numbers."""
    values = result.logits() if result.hidden is None else result.hidden
    # The largest of each is nan or infinite where any is nan or overflows; -inf alone is an impossible token.
    return bool((values.amax(-1) < torch.inf).cpu()[tokens != ABSENT].all())


def write_table(path: str | Path, kind: str, tensors: Mapping[str, Tensor], settings: Mapping[str, str]) -> None:
    """A safetensors file of tensors, with settings and what kind of thing it is."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": f"nextoken-{kind}", **settings})


def read_table(path: str | Path, kind: str, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a file that `write_table` made.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            settings = dict(file.metadata() or {})
            if settings.pop("format", None) != f"nextoken-{kind}":
                raise InputError(f"{path} holds no {kind} of nextoken")
            return {name: file.get_tensor(name) for name in names}, settings
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from error

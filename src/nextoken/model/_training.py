"""The state of a training run: weights, target head, optimiser, losses; written to one file and read from it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextoken.errors import InputError, OutputError
from nextoken.model.value_head import HFValue

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Training:
    """A value under training.

    Args:
        value: body and head are changed in place.
        weight_decay: AdamW's.
    """

    def __init__(self, value: HFValue, *, weight_decay: float) -> None:
        self.value = value
        self.target = copy.deepcopy(value.head).requires_grad_(False).eval()
        self.losses: list[float] = []
        named = [*value.body.model.named_parameters(prefix="body"), *value.head.named_parameters(prefix="head")]
        self._weights = {name: weight for name, weight in named if weight.requires_grad}
        self._optimizer = torch.optim.AdamW(self._weights.values(), weight_decay=weight_decay)

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    @contextmanager
    def randomness(self, seed: int) -> Iterator[None]:
        """The head in training mode, its dropout from `seed`; torch's own random numbers are left as they were."""
        device = self.value.body.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.value.head.train()
            try:
                yield
            finally:
                self.value.head.eval()

    def descend(self, loss: Tensor, *, rate: float, polyak: float) -> None:
        """One step of AdamW, after which the target head moves by a share `polyak` towards the head."""
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        with torch.no_grad():
            for slow, weight in zip(self.target.parameters(), self.value.head.parameters(), strict=True):
                slow.lerp_(weight, polyak)
        self.losses.append(loss.item())

    def save(self, path: Path, run: str) -> None:
        """Write everything to one file, which is whole or not there; `run` says what it belongs to.

        Raises:
            OutputError: it cannot be written.
        """
        temporary = path.with_name(path.name + ".partial")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"run": run})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"the checkpoint cannot be written to {path}: {error}") from error

    @torch.no_grad()
    def restore(self, path: Path, run: str) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            InputError: it belongs to another run, or is broken.
        """
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("run") != run:
                    raise InputError(
                        f"the checkpoint {path} is of another run (other texts, recipe, seed or first weights); delete "
                        "it, or give another path"
                    )
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            for name, weight in self._weights.items():
                weight.copy_(found[name])
                moments = {key: found[f"{key} {name}"] for key in _MOMENTS if f"{key} {name}" in found}
                if moments:
                    count = moments.pop("step")
                    self._optimizer.state[weight] = {
                        "step": count,
                        **{key: moment.to(weight.device) for key, moment in moments.items()},
                    }
            for name, weight in self.target.named_parameters(prefix="target"):
                weight.copy_(found[name])
            self.losses = found["losses"].tolist()
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise InputError(f"the checkpoint {path} cannot be read ({error}); delete it to begin anew") from error

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, weight in self._weights.items():
            tensors[name] = weight
            for key, moment in self._optimizer.state.get(weight, {}).items():
                tensors[f"{key} {name}"] = moment
        return tensors | dict(self.target.named_parameters(prefix="target"))

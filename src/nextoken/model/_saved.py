"""Trained parts on disk: weights as safetensors beside a JSON file of settings, and the digests of what they belong to.

save(folder, "router", settings={"width": 64}, weights=router.state_dict(), digests={"small": small.digest})
saved = load(folder, "router")
router = Router(**saved.settings)
saved.fill(router)
saved.check(small=small.digest)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextoken.errors import ModelError, OutputError

_FORMAT = 1
Part = TypeVar("Part", bound=nn.Module)
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Saved:
    """What `load` found in a folder.

    Args:
        folder: where.
        what: the kind of part, as people call it.
        settings: as given to `save`.
        weights: as given to `save`, on the CPU.
        digests: as given to `save`.
    """

    folder: Path
    what: str
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    digests: dict[str, str]

    def build(self, kind: Callable[..., Part], name: str | None = None) -> Part:
        """A module of this kind made of the settings, or of those under a name, with the weights filled in.

        Raises:
            ModelError: it takes other settings, or has other weights.
        """
        module = self.built(kind, name)
        self.fill(module)
        return module

    def built(self, kind: Callable[..., Thing], name: str | None = None) -> Thing:
        """Whatever is made of the settings, or of those under a name.

        Raises:
            ModelError: it takes others.
        """
        try:
            return kind(**(self.settings if name is None else self.settings[name]))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self.folder} holds no whole {self.what}: {error}; save it again") from error

    def fill(self, module: nn.Module) -> None:
        """Put the weights into a module of the same parts and shapes, in evaluation mode.

        Raises:
            ModelError: it has others.
        """
        try:
            module.load_state_dict(self.weights)
        except RuntimeError as error:
            raise ModelError(
                f"{self.folder} holds no whole {self.what}: {str(error).splitlines()[-1].strip()}; save it again"
            ) from error
        module.eval()

    def check(self, **digests: str) -> None:
        """Refuse to serve another model than the one trained for.

        Raises:
            ModelError: a digest is known on both sides and differs.
        """
        wrong = [part for part, found in digests.items() if found and self.digests.get(part, found) != found]
        if wrong:
            raise ModelError(
                f"the {self.what} in {self.folder} was trained with another {' and another '.join(wrong)}; give the "
                "one it was trained with, or train one for this"
            )


def save(
    folder: str | Path,
    what: str,
    *,
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    digests: Mapping[str, str],
) -> None:
    """Write a part to a folder, which is made if need be. Without its settings, written last, a folder is not whole.

    Args:
        folder: where; what a part of this kind left there is replaced.
        what: the kind of part, such as "router"; it names the two files.
        settings: whatever JSON holds; what is needed to build the part.
        weights: by name.
        digests: of the models and vocabularies it belongs to, by names that `Saved.check` is given again.

    Raises:
        OutputError: the folder cannot be written.
    """
    target = Path(folder)
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    record = {"format": _FORMAT, "settings": dict(settings), "digests": dict(digests), "weights": fingerprint(held)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        _described(target, what).unlink(missing_ok=True)
        # A tensor that shares its memory with another would be refused.
        save_file({key: tensor.clone() for key, tensor in held.items()}, _weighed(target, what))
        _described(target, what).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OutputError(f"the {what} cannot be written to {target}: {error}") from error


def load(folder: str | Path, what: str) -> Saved:
    """Read what `save` wrote.

    Raises:
        ModelError: there is no whole part of this kind in the folder, or its weights are not those that were saved.
    """
    source = Path(folder)
    path = _described(source, what)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{source} holds no {path.name} that can be read; give a folder written by save()") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ModelError(f"the {what} in {source} is of another format than {_FORMAT}; load it with its own version")
    try:
        weights = load_file(_weighed(source, what))
        saved = Saved(source, what, dict(record["settings"]), weights, dict(record["digests"]))
        intact = fingerprint(weights) == record["weights"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{source} holds no whole {what}: {str(error).splitlines()[0]}; save it again") from error
    if not intact:
        raise ModelError(f"the weights of the {what} in {source} are not those it was saved with; save it again")
    return saved


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A short digest of names, types, shapes and values of tensors."""
    sha = hashlib.sha256()
    for key, tensor in sorted(weights.items()):
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(dtype=torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def _described(folder: Path, what: str) -> Path:
    return folder / f"{what.replace(' ', '_')}.json"


def _weighed(folder: Path, what: str) -> Path:
    return folder / f"{what.replace(' ', '_')}.safetensors"

"""The registry of methods: which paper, what it needs, where it lives.

An entry is made by a decorator on the thing itself, so it cannot drift from the code:

    @method(name="CCE", arxiv="2411.09009", access="white", summary="cross-entropy without logits")
    def cross_entropy(...): ...

`all_methods()` imports every room and returns the entries; the command `nextoken methods` prints them and the catalogue
of the documentation is generated from them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

Access = Literal["white", "gray", "black"]
T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """One registered method.

    `access` is what it must see of a model: `white` weights or hidden states, `gray` probabilities, `black` text only.
    `arxiv` is None for a method that is common knowledge rather than one paper's.
    """

    name: str
    arxiv: str | None
    room: str
    access: Access
    trained: bool
    entry_point: str
    summary: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_REGISTRY: dict[str, Method] = {}


def method(
    *, name: str, access: Access, summary: str, arxiv: str | None = None, trained: bool = False, room: str | None = None
) -> Callable[[T], T]:
    """Register the decorated class or function; it is returned unchanged.

    The entry point is read off the object (`module:qualname`), the room off its module (`nextoken.decode.x` is in
    `decode`) unless given.

    Raises:
        ValueError: another object is registered under the same name.
    """

    def register(thing: T) -> T:
        module, qualname = thing.__module__, thing.__qualname__  # type: ignore[attr-defined]
        entry = Method(
            name=name,
            arxiv=arxiv,
            room=room or module.split(".")[1],
            access=access,
            trained=trained,
            entry_point=f"{module}:{qualname}",
            summary=summary,
        )
        known = _REGISTRY.get(name)
        if known is not None and known.entry_point != entry.entry_point:
            raise ValueError(f"method {name!r} is registered by {known.entry_point} and again by {entry.entry_point}")
        _REGISTRY[name] = entry
        return thing

    return register


def is_registered(name: str) -> bool:
    """Whether a method of this name is known so far, from the rooms that were imported."""
    return name in _REGISTRY


def all_methods() -> tuple[Method, ...]:
    """Every registered method, ordered by room and name. Imports all rooms, hence torch."""
    package = importlib.import_module("nextoken")
    for module in pkgutil.walk_packages(package.__path__, prefix="nextoken."):
        if not module.name.startswith("nextoken.app") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return tuple(sorted(_REGISTRY.values(), key=lambda entry: (entry.room, entry.name.lower())))

"""What `--speculate` names: a drafter that needs no model, or a model that drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextoken.app._loading import load_quietly

if TYPE_CHECKING:
    from nextoken.speculate import Speculation


def speculation(name: str) -> Speculation:
    """A new speculation: by its name (`lookup`, `recycling`, ...), else of a chain that the model of this name drafts.

    Raises:
        ModelError: it is no name and no model.
    """
    from nextoken.speculate import NAMES, DraftModel, Speculation, named

    return named(name) if name in NAMES else Speculation(DraftModel(load_quietly(name)))

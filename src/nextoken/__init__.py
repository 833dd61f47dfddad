"""nextoken: the next-token distribution of a generative token model, read, steered, sped up, learned from, judged.

    import nextoken

    signature = nextoken.read("tiny", "It was the best of times, it was the worst of times.")
    print(signature.summary())

Importing this package is quick: torch and transformers are imported by the first thing that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nextoken.errors import InputError, ModelError, NextokenError, OutputError
from nextoken.methods import Method, all_methods

if TYPE_CHECKING:
    from nextoken.decode.generate import generate, stream
    from nextoken.decode.generation import Generation
    from nextoken.model.base import LanguageModel
    from nextoken.model.loading import load
    from nextoken.model.table import TableModel
    from nextoken.scores.score import score
    from nextoken.signature import Signature, compare, read

__version__ = "0.1.0"

_LAZY = {
    "Generation": "nextoken.decode.generation",
    "LanguageModel": "nextoken.model.base",
    "Signature": "nextoken.signature",
    "TableModel": "nextoken.model.table",
    "compare": "nextoken.signature",
    "generate": "nextoken.decode.generate",
    "load": "nextoken.model.loading",
    "read": "nextoken.signature",
    "score": "nextoken.scores.score",
    "stream": "nextoken.decode.generate",
}

__all__ = [
    "Generation",
    "InputError",
    "LanguageModel",
    "Method",
    "ModelError",
    "NextokenError",
    "OutputError",
    "Signature",
    "TableModel",
    "__version__",
    "all_methods",
    "compare",
    "generate",
    "load",
    "read",
    "score",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nextoken' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

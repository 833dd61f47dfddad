"""What a model says about a text: one row per predicted token, and the reading that fills it.

Signatures are opened and looked at without torch; only `read` imports it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextoken.signature.columns import COLUMNS
    from nextoken.signature.comparison import Comparison, compare
    from nextoken.signature.metadata import Metadata
    from nextoken.signature.reading import read
    from nextoken.signature.shards import ShardedSignature
    from nextoken.signature.signature import Signature
    from nextoken.signature.texts import TextInfo
    from nextoken.signature.window import Window, windows

_HOME = {
    "columns": ("COLUMNS",),
    "comparison": ("Comparison", "compare"),
    "metadata": ("Metadata",),
    "reading": ("read",),
    "shards": ("ShardedSignature",),
    "signature": ("Signature",),
    "texts": ("TextInfo",),
    "window": ("Window", "windows"),
}
_LAZY = {name: f"nextoken.signature.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "COLUMNS",
    "Comparison",
    "Metadata",
    "ShardedSignature",
    "Signature",
    "TextInfo",
    "Window",
    "compare",
    "read",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nextoken.signature' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)

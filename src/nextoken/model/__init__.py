"""Sources of next-token distributions, and operators that build a source from sources."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextoken.model.base import ABSENT, LanguageModel, Memory, NoMemory, State, TreesNotSupported
    from nextoken.model.hf import HFModel
    from nextoken.model.loading import bundled_names, bundled_path, load
    from nextoken.model.multi_token import MultiToken
    from nextoken.model.multi_token_adapter import MultiTokenAdapter
    from nextoken.model.next import DenseNext, HeadNext, Next
    from nextoken.model.ngram import NgramModel
    from nextoken.model.partial import PartialNext
    from nextoken.model.server import ServerModel
    from nextoken.model.soft import Mixtures, Recalled, SoftModel
    from nextoken.model.table import TableModel
    from nextoken.model.tokenizer import TokenizerVocab
    from nextoken.model.vocab import Encoding, Vocab

_HOME = {
    "base": ("ABSENT", "LanguageModel", "Memory", "NoMemory", "State", "TreesNotSupported"),
    "hf": ("HFModel",),
    "loading": ("bundled_names", "bundled_path", "load"),
    "multi_token": ("MultiToken",),
    "multi_token_adapter": ("MultiTokenAdapter",),
    "next": ("DenseNext", "HeadNext", "Next"),
    "ngram": ("NgramModel",),
    "partial": ("PartialNext",),
    "server": ("ServerModel",),
    "soft": ("Mixtures", "Recalled", "SoftModel"),
    "table": ("TableModel",),
    "tokenizer": ("TokenizerVocab",),
    "vocab": ("Encoding", "Vocab"),
}
_LAZY = {name: f"nextoken.model.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "ABSENT",
    "DenseNext",
    "Encoding",
    "HFModel",
    "HeadNext",
    "LanguageModel",
    "Memory",
    "Mixtures",
    "MultiToken",
    "MultiTokenAdapter",
    "Next",
    "NgramModel",
    "NoMemory",
    "PartialNext",
    "Recalled",
    "ServerModel",
    "SoftModel",
    "State",
    "TableModel",
    "TokenizerVocab",
    "TreesNotSupported",
    "Vocab",
    "bundled_names",
    "bundled_path",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nextoken.model' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)

"""Loading a model for a command, with nothing on stderr that the person did not ask for."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextoken.model.base import LanguageModel


def load_quietly(spec: str) -> LanguageModel:
    """`nextoken.load`, without the library notes of transformers; progress bars only for a download at a terminal."""
    from nextoken.model.loading import bundled_names, load

    # Read by the libraries when they are imported, which is why it is the environment that is set, and before load().
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if spec in bundled_names() or os.path.isdir(spec) or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return load(spec)

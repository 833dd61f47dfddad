"""load(): a model from one word, path, hub id or address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nextoken.errors import ModelError
from nextoken.model.base import LanguageModel

_BUNDLED = Path(__file__).parent / "bundled"


def bundled_names() -> tuple[str, ...]:
    """Names of the models that ship with the package."""
    return tuple(sorted(path.parent.name for path in _BUNDLED.glob("*/config.json")))


def bundled_path(name: str) -> Path:
    """Folder of a bundled model, in Hugging Face layout.

    Raises:
        ModelError: there is no such model.
    """
    if name not in bundled_names():
        raise ModelError(f"no bundled model {name!r}; there are {', '.join(bundled_names()) or 'none'}")
    return _BUNDLED / name


def load(spec: str | Path | LanguageModel, **options: Any) -> LanguageModel:
    """A language model from what a person would write.

    Args:
        spec: `tiny` or `nano` (bundled), `http://...` or `https://...` (an OpenAI-compatible server), a folder, or an
            id on the Hugging Face hub. A `LanguageModel` is returned as it is.
        options: passed to `ServerModel` or `HFModel.from_pretrained`, whichever it is. A folder of the working
            directory comes before a bundled model of that name only when written as a path (`./tiny`).

    Raises:
        ModelError: it cannot be found, reached or loaded.
    """
    if isinstance(spec, LanguageModel):
        return spec
    name = str(spec)
    if name.startswith(("http://", "https://")):
        from nextoken.model.server import ServerModel

        return ServerModel(name, **options)
    from nextoken.model.hf import HFModel

    if isinstance(spec, str) and name in bundled_names():
        model = HFModel.from_pretrained(bundled_path(name), **{"local_files_only": True, **options})
        model.name = name
        return model
    return HFModel.from_pretrained(name, **options)

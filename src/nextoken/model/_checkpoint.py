"""A transformers model and its tokenizer from a folder or the hub, with errors for the person."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from nextoken.errors import ModelError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?\Z")


def load(
    spec: str,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    device_map: str | dict[str, Any] | None,
    revision: str | None,
    trust_remote_code: bool,
    local_files_only: bool,
    tokenizer: Any,
) -> tuple[Any, Any]:
    """(model, tokenizer) as `HFModel.from_pretrained` describes.

    Raises:
        ModelError: one line for each way it can fail.
    """
    if device is not None and device_map is not None:
        raise ValueError("pass device or device_map, not both")
    _check_spec(spec)
    source = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    with _quiet():
        config = _attempt(spec, lambda: AutoConfig.from_pretrained(spec, **source))
        _check_causal(spec, config)
        if device is None and device_map is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        on_cpu = device is not None and torch.device(device).type == "cpu"
        chosen = _precision(dtype, default="float32" if on_cpu else "auto")
        placement = {} if device_map is None else {"device_map": device_map}
        model, report = _attempt(
            spec,
            lambda: AutoModelForCausalLM.from_pretrained(
                spec, config=config, dtype=chosen, use_safetensors=True, output_loading_info=True, **placement, **source
            ),
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelError(
                f"{spec} lacks {len(missing)} weights of a {type(model).__name__} ({missing[0]} ...), which would be "
                "random; give a checkpoint of the whole language model"
            )
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            tokenizer = _load_tokenizer(spec, tokenizer, source)
    if device is not None:
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"{spec} cannot be put on {device}: {_line(error)}; choose another device or dtype"
            ) from error
    return model, tokenizer


def _load_tokenizer(spec: str, other: str | Path | None, source: dict[str, Any]) -> Any:
    origin = spec if other is None else str(other)
    if other is not None:
        source = {**source, "revision": None}
        _check_spec(origin)
    try:
        return AutoTokenizer.from_pretrained(origin, **source)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{origin} has no tokenizer that transformers can load ({_line(error)}); pass tokenizer=..., a folder, "
            "a hub id or a live tokenizer"
        ) from error


def _check_spec(spec: str) -> None:
    path = Path(spec).expanduser()
    if path.is_file():
        raise ModelError(
            f"{spec} is a file; give the folder that holds config.json, model.safetensors and tokenizer.json"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {spec} holds no config.json, so it is no model in Hugging Face format")
    elif not _HUB_ID.match(spec) or spec.startswith("."):
        raise ModelError(f"there is no folder {spec}, and it is not the form of a hub id (owner/name)")


def _check_causal(spec: str, config: Any) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{spec} is an encoder-decoder model ({kind}); nextoken reads models that only decode")
    built = list(getattr(config, "architectures", None) or [])
    causal = {*_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *(name for name in built if "CausalLM" in name)}
    masked = set(_names(MODEL_FOR_MASKED_LM_MAPPING_NAMES)) - causal
    if any(name in masked for name in built) and not getattr(config, "is_decoder", False):
        raise ModelError(f"{spec} is a masked language model ({built[0]}); give one that predicts the next token")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise ModelError(f"{spec} is no causal language model: transformers has none of type {kind!r}")


def _names(mapping: Any) -> list[str]:
    return [name for entry in mapping.values() for name in ([entry] if isinstance(entry, str) else entry)]


def _precision(dtype: str | torch.dtype | None, *, default: str) -> Any:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = (dtype or default).removeprefix("torch.")
    if name == "auto":
        return name
    chosen = getattr(torch, name, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is none that models compute in; give float32, bfloat16, float16 or auto")
    return chosen


def _attempt(spec: str, action: Any) -> Any:
    """Run a loading step; turn what can go wrong in it into a ModelError."""
    try:
        return action()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(_explain(spec, error)) from error


def _explain(spec: str, error: BaseException) -> str:
    names, cause = set(), error
    while cause is not None:
        names.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    text = str(error)
    if "trust_remote_code" in text:
        return f"{spec} needs Python code of its own to run; pass trust_remote_code=True if you trust its authors"
    if "safetensors" in text and (
        "no file named" in text or "does not appear to have" in text or "necessarily" in text
    ):
        return (
            f"{spec} has no safetensors weights (pickle files are not loaded, for they can run code); convert them "
            "with model.save_pretrained(folder), or choose a revision that has them"
        )
    if "GatedRepoError" in names:
        return f"{spec} is gated: ask for access on its hub page and log in with `hf auth login`"
    if "RevisionNotFoundError" in names:
        return f"{spec} has no such revision; see its hub page for branches and tags"
    if "RepositoryNotFoundError" in names:
        return (
            f"there is no model {spec} on the hub (or it is private: log in with `hf auth login`), and no such folder"
        )
    if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ConnectTimeout"}:
        return (
            f"{spec} is not in the local cache and the hub cannot be reached; give a folder, or connect and try again"
        )
    if "EntryNotFoundError" in names or "does not appear to have a file named" in text:
        return f"{spec} lacks a file that a model needs: {_line(error)}"
    if "accelerate" in text:
        return "device_map needs the package accelerate: install it with `pip install accelerate`"
    return f"{spec} cannot be loaded: {_line(error)}"


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(". ")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar over weights in memory, and the warnings and retries that become errors here."""
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    hub_level = huggingface_hub.utils.logging.get_verbosity()
    logs.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity(logging.ERROR)
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        huggingface_hub.utils.logging.set_verbosity(hub_level)
        if bars:
            logs.enable_progress_bar()

"""A fingerprint of a model's weights and of the settings that change what they compute."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

_WHOLE = 1 << 28  # bytes up to which every byte is hashed
_SAMPLE = 1 << 14  # elements per tensor in the sample of larger models

# Settings that say how a model was stored or is run, not what it computes.
_IRRELEVANT = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"),
}


def fingerprint(module: Any) -> str:
    """16 hexadecimal digits of sha256 over the configuration and, of every weight, name, precision, shape and content.

    Content is every byte for models up to 256 MiB. For larger ones it is, per tensor, 16,384 evenly spaced elements
    and the exact integer sum of all, so that a change anywhere shows but an exchange of two weights outside the sample
    does not. The same on every device. Empty where weights are not in memory (offloaded).
    """
    tensors = dict(sorted([*module.named_parameters(), *_stored_buffers(module)]))
    if any(tensor.is_meta for tensor in tensors.values()):
        return ""
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= _WHOLE
    sha = hashlib.sha256(type(module).__name__.encode())
    sha.update(json.dumps(_settings(module.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = _as_integers(tensor.detach().contiguous().flatten())
        if whole:
            sha.update(flat.cpu().numpy().tobytes())
        elif flat.numel():
            sha.update(str(int(flat.sum(dtype=torch.int64))).encode())
            sha.update(flat[:: max(1, flat.numel() // _SAMPLE)].cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _stored_buffers(module: Any) -> list[tuple[str, Tensor]]:
    stored = module.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in module.named_buffers() if name in stored]


def _as_integers(flat: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.to(torch.uint8) if flat.dtype == torch.bool else flat.view(kinds.get(flat.element_size(), torch.uint8))


def _settings(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            str(key): _settings(value)
            for key, value in config.items()
            if not str(key).startswith("_") and key not in _IRRELEVANT and not str(key).startswith("output_")
        }
    return config

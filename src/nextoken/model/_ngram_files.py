"""N-gram models on disk: counts as safetensors, the rest as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from nextoken.errors import ModelError
from nextoken.model._ngram_counts import Level
from nextoken.model.tokenizer import TokenizerVocab
from nextoken.model.vocab import Vocab

_FORMAT = "nextoken-ngram"
_CONFIG, _COUNTS, _TOKENIZER = "config.json", "counts.safetensors", "tokenizer"


def save(
    folder: str | Path,
    vocab: Vocab,
    levels: Sequence[Level],
    discounts: Sequence[tuple[float, float, float]],
    name: str,
) -> None:
    """Write a folder that `load` reads."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"{n}.{key}": t.contiguous() for n, level in enumerate(levels, 1) for key, t in level.tensors().items()}
    save_file(tensors, path / _COUNTS)
    spelled: list[str] | None = None
    if isinstance(vocab, TokenizerVocab):
        vocab.tokenizer.save_pretrained(path / _TOKENIZER)
    else:
        spelled = [piece.hex() for piece in vocab.token_bytes]
    config = {
        "model_type": _FORMAT,
        "name": name,
        "order": len(levels),
        "discounts": list(discounts),
        "vocab_digest": vocab.digest,
        "vocab": {
            "size": vocab.size,
            "token_bytes": spelled,
            "labels": {str(i): vocab.label(i) for i in sorted(vocab.specials)},
            "bos_id": vocab.bos_id,
            "eos_ids": sorted(vocab.eos_ids),
        },
    }
    (path / _CONFIG).write_text(json.dumps(config, indent=1))


def load(folder: str | Path) -> tuple[Vocab, list[Level], list[tuple[float, float, float]], str]:
    """Vocabulary, levels, discounts and name.

    Raises:
        ModelError: there is no n-gram model, or its parts do not belong together.
    """
    path = Path(folder)
    try:
        config = json.loads((path / _CONFIG).read_text())
        tensors = load_file(path / _COUNTS)
    except (OSError, ValueError) as error:
        raise ModelError(f"no n-gram model in {path}: {error}") from error
    if config.get("model_type") != _FORMAT:
        raise ModelError(f"{path} holds a model of type {config.get('model_type')!r}, not {_FORMAT!r}")
    vocab = _vocab(path, config["vocab"])
    if vocab.digest != config["vocab_digest"]:
        raise ModelError(f"the vocabulary in {path} is not the one that the counts were made with")
    width = vocab.size + 1
    levels = [
        Level(width, *(tensors[f"{n}.{key}"] for key in ("keys", "starts", "tokens", "counts")))
        for n in range(1, config["order"] + 1)
    ]
    discounts = [(float(one), float(two), float(more)) for one, two, more in config["discounts"]]
    return vocab, levels, discounts, config["name"]


def _vocab(path: Path, saved: dict) -> Vocab:  # type: ignore[type-arg]
    if saved["token_bytes"] is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path / _TOKENIZER, local_files_only=True)
        return TokenizerVocab(tokenizer, size=saved["size"], eos_ids=saved["eos_ids"])
    return Vocab(
        [bytes.fromhex(piece) for piece in saved["token_bytes"]],
        labels={int(i): label for i, label in saved["labels"].items()},
        bos_id=saved["bos_id"],
        eos_ids=saved["eos_ids"],
    )

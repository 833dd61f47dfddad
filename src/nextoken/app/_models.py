"""`nextoken models`: what can be named after `--model` without a download."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Listed:
    """A model on this machine: bundled with nextoken, or in the cache of the Hugging Face hub."""

    name: str
    parameters: int | None
    context_length: int | None
    megabytes: float
    bits_per_byte: dict[str, float]
    """On texts never seen in training, from the model card; empty where it gives none."""


def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models on this machine: those that ship with nextoken and those in the Hugging Face cache.

    Bits per byte are from the model cards of the bundled models, on texts never seen in training. Any other Hugging
    Face id, folder or server address works too.

    Examples:

        nextoken models
        nextoken models --json
    """
    bundled, cached = bundled_models(), cached_models()
    if as_json:
        found = {"bundled": [asdict(entry) for entry in bundled], "cached": [asdict(entry) for entry in cached]}
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return

    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, entries in (("Bundled with nextoken", bundled), ("In the Hugging Face cache", cached)):
        if not entries:
            console.print(f"{title}: none")
            continue
        table = Table("model", box=None, header_style="bold", title=title, title_justify="left", title_style="")
        for heading in ("parameters", "context", "MB"):
            table.add_column(heading, justify="right")
        table.add_column("bits per byte of texts never seen")
        for entry in entries:
            table.add_row(
                entry.name,
                "-" if entry.parameters is None else f"{entry.parameters:,}",
                "-" if entry.context_length is None else f"{entry.context_length:,}",
                f"{entry.megabytes:,.1f}",
                "\n".join(f"{value:.3f} {text}" for text, value in entry.bits_per_byte.items()) or "-",
            )
        console.print(table)
        console.print()


def bundled_models() -> list[Listed]:
    """The models that ship with the package."""
    from nextoken.model.loading import bundled_names, bundled_path

    return [_listed(name, bundled_path(name)) for name in bundled_names()]


def cached_models() -> list[Listed]:
    """Causal language models in the cache of the Hugging Face hub, the latest revision of each."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = []
    for repository in sorted(repositories, key=lambda repository: repository.repo_id.lower()):
        if repository.repo_type != "model" or not repository.revisions:
            continue
        latest = max(repository.revisions, key=lambda revision: revision.last_modified)
        entry = _listed(repository.repo_id, latest.snapshot_path)
        if _is_causal(latest.snapshot_path) and entry.megabytes:
            found.append(entry)
    return found


def _is_causal(folder: Path) -> bool:
    architectures = _config(folder).get("architectures") or []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)


def _listed(name: str, folder: Path) -> Listed:
    weights = sorted(folder.glob("*.safetensors"))
    config = _config(folder)
    context = config.get("max_position_embeddings") or config.get("n_positions")
    return Listed(
        name=name,
        parameters=sum(map(_count_parameters, weights)) if weights else None,
        context_length=int(context) if context else None,
        megabytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6,
        bits_per_byte=_figures(folder / "README.md"),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _count_parameters(weights: Path) -> int:
    """Read off the header of a safetensors file: eight bytes of length, then JSON with a shape for each tensor."""
    with weights.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _figures(card: Path) -> dict[str, float]:
    """The table `| text never seen | bits per byte |` of a model card of ours."""
    if not card.is_file():
        return {}
    _, _, table = card.read_text(encoding="utf-8").partition("| bits per byte |\n")
    rows = re.match(r"(?:\|.*\|\n)*", table)
    found = re.findall(r"^\| (\S.*?) \| ([0-9.]+) \|$", rows[0] if rows else "", flags=re.MULTILINE)
    return {text: float(value) for text, value in found}

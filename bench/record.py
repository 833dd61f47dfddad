"""What every benchmark writes: its figures, the machine, the versions and the command that made them."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator, operating system and the versions that matter."""
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version()}
        | {name: found for name in ("torch", "transformers", "nextoken") if (found := _version(name))},
    }


def write(path: str | Path, figures: Any, *, note: str = "") -> None:
    """Write a result: `figures`, with the machine, the date and the command line of this process."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    result = {"command": command, "date": date.today().isoformat(), "machine": machine(), "figures": figures}
    if note:
        result["note"] = note
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".partial")
    temporary.write_text(laid_out(result), encoding="utf-8")
    os.replace(temporary, target)


def laid_out(result: Any) -> str:
    """JSON with a line for every value, and lists of numbers on one."""
    spread = json.dumps(result, indent=2, ensure_ascii=False)
    return re.sub(r"\[[\s\d.,eE+-]*\]", lambda numbers: " ".join(numbers[0].split()), spread) + "\n"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

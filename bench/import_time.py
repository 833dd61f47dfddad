"""How long an import takes, each in processes of its own.

    python bench/import_time.py --out bench/results/import_time.json

Imported: nextoken, its command line, torch, transformers, and of minicons and lm_polygraph those that are installed.
The clock runs inside each process around the import alone, so the start of the interpreter does not count. The first
import of each is not counted either: it fills the caches of the file system and of compiled modules.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys

import record

OURS = ("nextoken", "nextoken.app.cli")
OTHERS = ("torch", "transformers", "minicons.scorer", "lm_polygraph")
CLOCK = "import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    """Wall-clock seconds of `import module` in a new process."""
    program = [sys.executable, "-c", CLOCK.format(module=module)]
    return float(subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=7, help="imports counted of each")
    parser.add_argument("--out", default="bench/results/import_time.json")
    arguments = parser.parse_args()
    figures = {}
    for module in (*OURS, *OTHERS):
        if importlib.util.find_spec(module.split(".")[0]) is None:
            print(f"{module}: not installed")
            continue
        try:
            seconds(module)
        except subprocess.CalledProcessError as error:
            print(f"{module}: cannot be imported here: {error.stderr.strip().splitlines()[-1]}")
            continue
        taken = [seconds(module) for _ in range(arguments.times)]
        figures[module] = {
            "median_seconds": round(statistics.median(taken), 3),
            "least_seconds": round(min(taken), 3),
            "most_seconds": round(max(taken), 3),
            "times": arguments.times,
        }
        print(module, figures[module], flush=True)
    record.write(arguments.out, figures)


if __name__ == "__main__":
    main()

"""Time and memory of the head's sweep beside the bare matmul, the usual log_softmax route and cut-cross-entropy.

    python bench/head.py                                      # CPU, GPT-2's head and Qwen's vocabulary
    python bench/head.py --device cuda --dtype bfloat16 --sizes 8192x4096x128256
    python bench/head.py --json bench/results/head.json

Every variant runs in turn, `--repeats` times; the table gives the fastest round (what the machine can do), its ratio to
the matmul, and the median. `--clock cpu` counts processor time instead of wall time: with `--threads 1` that is what to
use on a machine that is busy with something else. Memory is what a variant adds to the peak of a process of its own:
the resident set's high-water mark on a CPU (reset before the call), the allocator's on CUDA.
"""

from __future__ import annotations

import argparse
import os
import statistics as medians
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from nextoken.head import Head, cross_entropy, statistics
from record import write

TOP = 10
COLUMNS = ("size", "variant", "fastest_ms", "to_matmul", "median_ms", "median_to_matmul", "added_mb")


def problem(
    size: str, device: str, dtype: torch.dtype, targets: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and a head whose logits have a standard deviation of 3; targets drawn from it, or at random."""
    n, width, vocab = (int(part) for part in size.split("x"))
    torch.manual_seed(0)
    hidden = torch.randn(n, width)
    weight = torch.randn(vocab, width) * 3 / width**0.5
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    if targets == "random":
        ids = torch.randint(0, vocab, (n,), device=device)
    else:
        rows = hidden.split(64)
        ids = torch.cat([torch.multinomial((row @ weight.T).float().softmax(1), 1).squeeze(1) for row in rows])
    return hidden, weight, ids


def usual(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same statistics from a materialised log_softmax, as one would write them."""
    logits = (hidden @ weight.T).float()
    normalizer = logits.logsumexp(-1)
    logp = logits - normalizer[:, None]
    p = logp.exp()
    entropy = -(p * logp).sum(-1)
    deviation = logp + entropy[:, None]
    variance = (p * deviation**2).sum(-1)
    own = logp.gather(-1, ids[:, None])
    larger = logp > own
    best = logp.topk(TOP, dim=-1)
    probabilities = best.values.exp()
    return {
        "logprob": own.squeeze(-1),
        "rank": larger.sum(-1),
        "mass_above": (p * larger).sum(-1),
        "entropy": entropy,
        "varentropy": variance,
        "skewness": -(p * deviation**3).sum(-1) / variance**1.5,
        "kurtosis": (p * deviation**4).sum(-1) / variance**2,
        "collision": (p * p).sum(-1),
        "mean_logprob": logp.mean(-1),
        "std_logprob": logp.std(-1, unbiased=False),
        "margin": probabilities[:, 0] - probabilities[:, 1],
        "log_normalizer": normalizer,
        "half_sum": p.sqrt().sum(-1),
        "quarter_sum": p.sqrt().sqrt().sum(-1),
        "cube_sum": (p * p * p).sum(-1),
        "fourth_sum": (p * p * p * p).sum(-1),
        "top_ids": best.indices,
        "top_logprobs": best.values,
        "rest_mass": 1 - probabilities.sum(-1),
    }


def variants(device: str, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Name -> call(hidden, weight, ids)."""
    calls: dict[str, Callable[..., Any]] = {
        "matmul": lambda h, w, y: h @ w.T,
        "nextoken statistics": lambda h, w, y: statistics(h, Head(w), y, top=TOP),
        "log_softmax statistics": usual,
    }
    if device == "cuda":
        calls["nextoken statistics, torch"] = lambda h, w, y: statistics(h, Head(w), y, top=TOP, impl="torch")
        calls["torch.compile statistics"] = torch.compile(usual)
    calls["nextoken loss"] = lambda h, w, y: cross_entropy(h, Head(w), y)
    calls["F.cross_entropy"] = lambda h, w, y: functional.cross_entropy((h @ w.T).float(), y)
    if compiled and find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        calls["cut-cross-entropy"] = lambda h, w, y: linear_cross_entropy(h, w, y, impl="torch_compile")
    return calls


@torch.no_grad()
def added_memory(name: str, arguments: argparse.Namespace, size: str) -> int:
    """Bytes that one call adds to the peak of this process."""
    dtype = getattr(torch, arguments.dtype)
    call = variants(arguments.device, compiled=True)[name]
    call(
        *problem("8x16x100", arguments.device, dtype, "random")
    )  # libraries and thread pools are not the method's memory
    given = problem(size, arguments.device, dtype, "random")
    if arguments.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*given)
        return torch.cuda.max_memory_allocated() - before
    given[0][:1] @ given[1].T  # touches the weights
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    result = call(*given)
    added = _resident("VmHWM") - before
    del result
    return added


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def timed(call: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


@torch.no_grad()
def measure(size: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant."""
    given = problem(size, arguments.device, getattr(torch, arguments.dtype), arguments.targets)
    calls = variants(arguments.device, compiled=arguments.clock == "wall")
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    for name in list(calls):
        try:
            timed(lambda name=name: calls[name](*given), arguments.device, clock)
        except Exception as error:  # a peer that does not run here is left out, and said to be
            print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            del calls[name]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.repeats):
        for name, call in calls.items():
            times[name].append(timed(lambda call=call: call(*given), arguments.device, clock))
    rows = []
    for name, taken in times.items():
        command = [sys.executable, __file__, "--memory-of", name, "--sizes", size, "--threads", str(arguments.threads)]
        command += ["--device", arguments.device, "--dtype", arguments.dtype]
        done = subprocess.run(command, capture_output=True, text=True)
        rows.append(
            {
                "size": size,
                "variant": name,
                "fastest_ms": round(1e3 * min(taken), 1),
                "median_ms": round(1e3 * medians.median(taken), 1),
                "to_matmul": round(min(taken) / min(times["matmul"]), 2),
                "median_to_matmul": round(medians.median(taken) / medians.median(times["matmul"]), 2),
                "added_mb": round(int(done.stdout) / 1e6, 1) if done.returncode == 0 else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["512x768x50257", "512x768x151936"], help="NxHxV")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--targets", choices=["drawn", "random"], default="drawn", help="from the model, or worst case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(added_memory(arguments.memory_of, arguments, arguments.sizes[0]))
        return
    rows = [row for size in arguments.sizes for row in measure(size, arguments)]
    layout = "{:>18} {:<28} {:>10} {:>8} {:>10} {:>8} {:>9}"
    print(layout.format("size", "variant", "fastest ms", "x matmul", "median ms", "x matmul", "added MB"))
    for row in rows:
        print(layout.format(*(str(row[name]) for name in COLUMNS)))
    if arguments.json:
        figures = {
            f"{row['size']}, {row['variant']}": {n: v for n, v in row.items() if n not in ("size", "variant")}
            for row in rows
        }
        note = f"{arguments.threads} threads, {arguments.clock} clock, targets {arguments.targets}"
        write(arguments.json, figures, note=note)


if __name__ == "__main__":
    main()

"""Passes of a model on a CPU with its weights packed and as they lie, by the number of tokens in a pass.

    python bench/pack.py --json bench/results/pack.json

The model is the bundled `tiny` inside a network of `--times` its weights (see speculate.py), and `tiny` as it ships.
Milliseconds of processor time per pass after 150 tokens, the least of `--rounds`, interleaved; `ratio` is plain over
packed. `reading` is one text of 1,000 tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import nextoken
from nextoken.model.hf import HFModel
from record import write
from speculate import inflated

SIZES = (1, 2, 4, 8, 16, 32, 64)


def least(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least processor time of each call in milliseconds, one after the other in every round."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.process_time()
            call()
            found[name] = min(found[name], 1e3 * (time.process_time() - begun))
    return found


def feeding(model: HFModel, n: int) -> Callable[[], object]:
    """A pass of n tokens as a tree that is then forgotten."""
    state = model.start()
    ids = torch.randint(2, model.vocab.size, (1, 150 + n), generator=torch.Generator().manual_seed(n))
    model.extend(state, ids[:, :150])
    parents = torch.arange(-1, n - 1)[None]

    def call() -> None:
        model.extend(state, ids[:, 150:], parents)
        state.keep([])

    return call


def compared(model: HFModel, rounds: int) -> dict[str, Any]:
    packed = model.packed()
    rows: dict[str, Any] = {}
    text = torch.randint(2, model.vocab.size, (1, 1000), generator=torch.Generator().manual_seed(0))
    both = {"plain": model, "packed": packed}
    for n in SIZES:
        rows[f"{n} tokens"] = least({name: feeding(one, n) for name, one in both.items()}, rounds)
    rows["reading"] = least(
        {name: lambda one=one: one.predict(text) for name, one in both.items()}, max(2, rounds // 3)
    )
    for name, row in rows.items():
        rows[name] = {
            **{key: round(value, 2) for key, value in row.items()},
            "ratio": round(row["plain"] / row["packed"], 2),
        }
        print(f"{model.name:12} {name:12} {rows[name]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", default="bench/results/pack.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny = nextoken.load("tiny")
    assert isinstance(tiny, HFModel)
    figures = {model.name: compared(model, arguments.rounds) for model in (tiny, inflated(tiny, arguments.times))}
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

"""Greedy speculation against greedy decoding, token by token, on many prompts: every drafter, one run.

    python bench/identity.py --data ../shared/data --json bench/results/identity.json

The target is `tiny`, the draft model `nano`, prompts are the first turns of Spec-Bench, evenly spaced. A batched pass
adds in another order than a pass of one token, so that near ties may fall otherwise: where tokens differ, `gap` is how
much less the target's logit of the other token is, in plain decoding, at the first place.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import nextoken
from nextoken.decode.generate import prompt_tokens
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.model.hf import HFModel
from nextoken.speculate import (
    Auto,
    Branching,
    Chain,
    DraftModel,
    Dynamic,
    Follow,
    Independent,
    KSequential,
    PromptLookup,
    Recycling,
    Reencoded,
    Speculation,
    Stand,
    StochasticBeam,
    SuffixAutomaton,
)
from record import write


def systems(draft: HFModel) -> dict[str, Callable[[], Speculation]]:
    """What makes each of them anew."""
    return {
        "chain": lambda: Speculation(DraftModel(draft, Chain(4))),
        "branching (RSD-C)": lambda: Speculation(DraftModel(draft, Branching((3, 2, 1)))),
        "stochastic beam (RSD-S)": lambda: Speculation(DraftModel(draft, StochasticBeam(3, 4))),
        "DySpec, by worth": lambda: Speculation(DraftModel(draft, Dynamic(12))),
        "DySpec, by layers": lambda: Speculation(DraftModel(draft, Dynamic(12, threshold=0.08))),
        "SpecTr": lambda: Speculation(DraftModel(draft, Independent(3, 4)), KSequential()),
        "re-encoded text": lambda: Speculation(Reencoded(draft)),
        "prompt lookup": lambda: Speculation(PromptLookup()),
        "suffix automaton": lambda: Speculation(SuffixAutomaton()),
        "token recycling": lambda: Speculation(Recycling()),
        "STAND": lambda: Speculation(Stand()),
        "auto": lambda: Speculation(Auto(draft=draft), Follow()),
    }


def decoded(loop: Loop, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The greedy continuations of all prompts, decoded in batches."""
    greedy = transform("greedy")
    tickets = [loop.submit(Request(tuple(prompt), greedy, tokens, seed=0)) for prompt in prompts]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [found[ticket] for ticket in tickets]


def gap(model: HFModel, prompt: Sequence[int], ours: Sequence[int], plain: Sequence[int]) -> float:
    """How much less the logit of our token is than that of the plain one, where they first part."""
    at = next(i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b)
    logits = model.predict([[*prompt, *plain[:at]]])[:, -1].logits()[0, 0]
    return float(logits[plain[at]] - logits[ours[at]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=8, help="decoded together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="bench/results/identity.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target, draft = nextoken.load("tiny"), nextoken.load("nano")
    assert isinstance(target, HFModel) and isinstance(draft, HFModel)
    lines = (arguments.data / "specbench" / "question.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["turns"][0] for line in lines]
    spaced = texts[:: max(1, len(texts) // arguments.prompts)][: arguments.prompts]
    prompts = [prompt_tokens(target, text)[:200] for text in spaced]
    plain = decoded(Loop(target, max_rows=arguments.rows), prompts, arguments.tokens)
    figures: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(map(len, plain)), "rows": arguments.rows}
    for name, make in track(systems(draft).items(), description="drafters"):
        speculation = make()
        ours = decoded(speculation.loop(target, max_rows=arguments.rows), prompts, arguments.tokens)
        differing = [i for i, (a, b) in enumerate(zip(ours, plain, strict=True)) if a != b]
        gaps = [gap(target, prompts[i], ours[i], plain[i]) for i in differing]
        figures[name] = {
            "identical": len(prompts) - len(differing),
            "largest gap": max(gaps, default=0.0),
            "tokens per pass": round(speculation.tally.tokens_per_pass, 2),
            "failures": speculation.tally.failures,
        }
        print(f"{name:26} {figures[name]}", flush=True)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

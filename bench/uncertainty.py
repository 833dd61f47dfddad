"""Does the model know when it is wrong? Every uncertainty score on sums, by a small model trained to add.

    python bench/uncertainty.py --json bench/results/uncertainty.json

A Llama model of some 0.2 M parameters learns sums of two numbers of two digits, character by character, and is stopped
while it still errs. Then for sums it has not seen: its greedy answer, ten sampled answers, and from one reading of
them every score of `nextoken.scores` that speaks of uncertainty or certainty. AUROC for "the answer is right" and PRR
(half of the answers rejected at most), with 95 % bootstrap intervals over sums. All sums are of one length, which would
otherwise tell the hard from the easy; the control "carries" is how hard a sum is, without any model.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nextoken
from nextoken.scores import Samples, all_scores, table
from nextoken.scores.quality import auroc, bootstrap, prr
from record import write
from training import character_tokenizer, train


def problem(a: int, b: int) -> tuple[str, str, int]:
    """Question, answer, and how many digits are carried."""
    return f"{a}+{b}=", str(a + b), (a % 10 + b % 10 > 9) + (a + b > 99)


def measured(uncertainty: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """AUROC and PRR with intervals; items without a verdict count as the most uncertain."""
    filled = np.where(np.isnan(uncertainty), np.inf, uncertainty)
    found = {
        "auroc": bootstrap(auroc, -filled, correct),
        "prr": bootstrap(partial(prr, max_rejection=0.5), filled, correct),
    }
    return {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="not needed: the task is made here")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(0)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    draw.shuffle(pairs)
    unseen, learnt = pairs[: given.problems], pairs[given.problems :]
    texts = ["".join(problem(*pair)[:2]) for pair in learnt]
    model = train(
        texts,
        tokenizer=character_tokenizer("0123456789+="),
        steps=given.steps,
        batch=64,
        context=32,
        seed=0,
        name="adder",
    )
    problems = [problem(*pair) for pair in unseen]
    questions = [question for question, _, _ in problems]
    greedy = nextoken.generate(model, questions, transform="greedy", max_tokens=8, seed=0)
    drawn = nextoken.generate(model, questions, max_tokens=8, n=given.samples, seed=0)
    own, sampled = [one.text for one in greedy], [one.text for one in drawn]
    correct = np.array([said == right for said, (_, right, _) in zip(own, problems, strict=True)], dtype=float)
    before = questions + [question for question in questions for _ in range(given.samples)]
    every = nextoken.read(model, own + sampled, prompts=before, top=10, progress=False)
    samples = Samples(every[len(own) :], [given.samples] * len(own))
    found = table(every[: len(own)], samples=samples)

    entries = all_scores()
    uncertain = {
        name: values if entries[name].high == "uncertain" else -values
        for name, values in found.items()
        if entries[name].high in ("uncertain", "certain")
    }
    uncertain["carries"] = np.array([carried for *_, carried in problems], dtype=float)
    print(f"{correct.mean():.1%} of {len(correct)} answers are right")
    scores = {name: measured(values, correct) for name, values in uncertain.items()}
    for name, record in sorted(scores.items(), key=lambda item: -item[1]["auroc"]["value"]):
        cells = [f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in record.values()]
        print(f"{name:32} AUROC {cells[0]:24} PRR {cells[1]}")
    if given.json:
        figures = {"problems": len(correct), "samples": given.samples, "share right": float(correct.mean())}
        write(given.json, {**figures, "scores": scores})


if __name__ == "__main__":
    main()

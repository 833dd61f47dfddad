"""Cautious next-token prediction on sums done step by step: right answers and tokens spent.

    python bench/cautious.py --json bench/results/cautious.json

A small model learns to add five digits, of each sum only the last digit kept: 7+5+9+4+8:7+5=2,2+9=1,1+4=5,5+8=3. One
in ten sums of its texts is wrong, so it samples wrong ones now and then. In the world `one way` all solutions are of
this form. In `two ways` three of five texts state the result at once (=3.), which the model can hardly do: the
likeliest first token is then a bad one, and only what follows it tells.

Beside CNTP: greedy decoding, plain sampling under the same transform, the answer most frequent among n samples
(self-consistency) with n such that it costs about as much as CNTP, the least perplexed of n whole samples (the choice
of CNTP made once, at the end), and CNTP with the number of trials of the released code.

Cost is counted in tokens fed to the model beyond the prompt: those of every trial, kept or not, and the path kept,
which CNTP feeds again. Intervals are 95 % bootstrap intervals over problems, drawn anew within every seed.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nextoken.decode.cautious import Caution, cautious
from nextoken.decode.generate import derived_seed, prompt_tokens
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.request import Piece, Request
from nextoken.model.base import ABSENT, State
from nextoken.model.hf import HFModel
from nextoken.model.next import Next
from record import write
from training import character_tokenizer, continue_training, train

MOST_TOKENS = 40
AT_ONCE = {"one way": 0.0, "two ways": 0.6}
"""The share of texts that state the result at once."""
SLIPS = 0.1
"""The share of sums of the training texts that are wrong."""
TRANSFORMS = ("temperature(1.0)", "temperature(0.6) | top_p(0.9)")


class Counted(HFModel):
    """A model that counts the tokens it is fed beyond the prompts."""

    fed = 0

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        self.fed += int((tokens[[length > 0 for length in state.lengths]] != ABSENT).sum())
        return super()._feed(state, tokens, parents)


Rule: TypeAlias = Callable[[Counted, list[str]], list[str]]
"""The results that a rule finds for questions."""


def problem(rng: random.Random, slips: float = 0.0) -> tuple[str, str, str]:
    """A question, its solution step by step, each sum wrong with this probability, and what it comes to."""
    digits = [rng.randrange(10) for _ in range(5)]
    total, steps = digits[0], []
    for digit in digits[1:]:
        following = (total + digit + (rng.randrange(1, 10) if rng.random() < slips else 0)) % 10
        steps.append(f"{total}+{digit}={following}")
        total = following
    return "+".join(map(str, digits)) + ":", ",".join(steps) + ".", str(total)


def texts(rng: random.Random, share: float) -> tuple[list[str], list[list[bool]]]:
    """Texts, and which of their tokens are to be learnt: solutions alone, for a question follows from nothing."""
    told = []
    for _ in range(10_000):
        question, solution, outcome = problem(rng, SLIPS)
        told.append(question + (f"={outcome}." if rng.random() < share else solution))
    return told, [[at > text.index(":") + 1 for at in range(len(text) + 2)] for text in told]


def learnt(seed: int) -> dict[str, Counted]:
    """The model of each world; that of two ways has first learnt the one, or it would not learn to add in this time."""
    rng, tokenizer = random.Random(seed), character_tokenizer("0123456789+=:,.")
    told, masks = texts(rng, AT_ONCE["one way"])
    first = train(told, tokenizer=tokenizer, steps=1000, batch=32, lr=3e-3, seed=seed, loss_mask=masks)
    told, masks = texts(rng, AT_ONCE["two ways"])
    second = continue_training(first, told, steps=300, batch=32, lr=1e-3, seed=seed, loss_mask=masks)
    return {
        world: Counted(model.model, tokenizer, name=world)
        for world, model in zip(AT_ONCE, (first, second), strict=True)
    }


def result(text: str) -> str:
    """The digit before the full stop, or nothing."""
    return text.split(".")[0][-1:] if "." in text else ""


@dataclass(frozen=True)
class Sample:
    result: str
    perplexity: float


def sampled(model: Counted, questions: list[str], transform: str, n: int) -> list[list[Sample]]:
    """n samples for each question, every one with a seed of its own: `generate` gives all prompts the same seeds."""
    loop, rule = Loop(model), parsed(transform)
    for number, question in enumerate(questions):
        for i in range(n):
            seed = derived_seed(number, i + 1)
            loop.submit(Request(prompt_tokens(model, question), rule, MOST_TOKENS, seed=seed))
    pieces: list[list[Piece]] = [[] for _ in range(n * len(questions))]
    for piece in loop.run():
        pieces[piece.ticket].append(piece)
    made = [
        Sample(result("".join(piece.text for piece in text)), math.exp(np.mean([piece.surprisal for piece in text])))
        for text in pieces
    ]
    return [made[at : at + n] for at in range(0, len(made), n)]


def plainly(transform: str) -> Rule:
    return lambda model, questions: [sample.result for (sample,) in sampled(model, questions, transform, 1)]


def voted(transform: str, n: int) -> Rule:
    """The most frequent answer of n samples; of equally frequent ones the first drawn."""

    def vote(samples: Sequence[Sample]) -> str:
        answers = Counter(sample.result for sample in samples if sample.result)
        return answers.most_common(1)[0][0] if answers else ""

    return lambda model, questions: [vote(samples) for samples in sampled(model, questions, transform, n)]


def least_perplexed(transform: str, n: int) -> Rule:
    def choice(samples: Sequence[Sample]) -> str:
        return min(samples, key=lambda sample: sample.perplexity).result

    return lambda model, questions: [choice(samples) for samples in sampled(model, questions, transform, n)]


def carefully(transform: str, caution: Caution) -> Rule:
    def one(model: Counted, question: str, seed: int) -> str:
        made = cautious(model, question, transform=transform, max_tokens=MOST_TOKENS, caution=caution, seed=seed)
        return result(made.text)

    return lambda model, questions: [one(model, question, seed) for seed, question in enumerate(questions)]


@dataclass(frozen=True)
class Run:
    """One rule on the problems of every seed: which answers are right, [Q] for each seed, and tokens per problem."""

    right: list[np.ndarray]
    cost: float


def tried(rule: Rule, models: Sequence[Counted], problems: int) -> Run:
    right, cost = [], []
    for seed, model in enumerate(models):
        rng = random.Random(10_000 + seed)
        questions, _, results = zip(*(problem(rng) for _ in range(problems)), strict=True)
        before = model.fed
        answers = rule(model, list(questions))
        right.append(np.array([a == b for a, b in zip(answers, results, strict=True)], float))
        cost.append((model.fed - before) / problems)
    return Run(right, float(np.mean(cost)))


def resampled(groups: Sequence[np.ndarray], draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean, problems drawn anew within each seed."""
    rng = np.random.default_rng(0)
    means = [g[rng.integers(len(g), size=(draws, len(g)))].mean(1) for g in groups]
    return [round(float(x), 4) for x in np.percentile(np.mean(means, 0), [2.5, 97.5])]


def described(run: Run, plain: Run) -> dict[str, Any]:
    gains = [mine - other for mine, other in zip(run.right, plain.right, strict=True)]
    return {
        "right": round(float(np.mean([r.mean() for r in run.right])), 4),
        "right_interval": resampled(run.right),
        "gain_over_plain": round(float(np.mean([g.mean() for g in gains])), 4),
        "gain_interval": resampled(gains),
        "gain_by_seed": [round(float(g.mean()), 4) for g in gains],
        "tokens_fed": round(run.cost, 2),
    }


def rules(models: Sequence[Counted], transform: str, problems: int) -> dict[str, Run]:
    """Every rule on every problem; how many samples cost as much as CNTP is told by what it took."""
    runs = {
        "plain": tried(plainly(transform), models, problems),
        "greedy": tried(plainly("greedy"), models, problems),
        "CNTP": tried(carefully(transform, Caution()), models, problems),
        "CNTP, trials of the code": tried(carefully(transform, Caution(rule="code")), models, problems),
    }
    equal = max(2, round(runs["CNTP"].cost / runs["plain"].cost))
    for n in sorted({equal, 10}):
        runs[f"vote of {n}"] = tried(voted(transform, n), models, problems)
        runs[f"least perplexed of {n}"] = tried(least_perplexed(transform, n), models, problems)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each world")
    parser.add_argument("--problems", type=int, default=100, help="of each training")
    parser.add_argument("--json", default="bench/results/cautious.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    trained = [learnt(seed) for seed in range(arguments.seeds)]
    print(f"trained in {time.process_time() - begun:.0f} s of processor", flush=True)
    rows = []
    for world in AT_ONCE:
        models = [worlds[world] for worlds in trained]
        for transform in TRANSFORMS:
            runs = rules(models, transform, arguments.problems)
            print(f"\n{world}, {transform} ({arguments.seeds} x {arguments.problems} problems)")
            for name, run in runs.items():
                row = described(run, runs["plain"])
                rows.append({"world": world, "transform": transform, "rule": name, **row})
                low, high = (100 * x for x in row["right_interval"])
                below, above = (100 * x for x in row["gain_interval"])
                gain = f"{100 * row['gain_over_plain']:+.1f} [{below:+.1f}, {above:+.1f}]"
                right = f"{row['right']:.1%} [{low:.1f}, {high:.1f}]"
                print(f"    {name:28}{right:>21}  {gain:>22}  {run.cost:6.1f} tokens", flush=True)
    write(arguments.json, {"seeds": arguments.seeds, "problems": arguments.problems, "rows": rows})


if __name__ == "__main__":
    main()

"""Values after every token, and predictions that a restart would help, on sums done step by step.

    python bench/values.py --json bench/results/values.json

A small model learns lists in which every digit is the sum of the two before it, modulo 10; each line has the last two
digits as one token, after a letter that counts the lines down: after d74 come the lines c41, b15, a56. It samples at
temperature 0.8. For some pairs of digits its texts have a wrong sum, always the same, in a share of the cases. In the
world `slips` that share is below a half, so that a vote can mend it; in `misconceptions` it is above, so that most
samples agree on a wrong answer, and only something learnt from outcomes can know better. There are 700 questions, three
to nine lines long; those tested are used for nothing but the training of the sampler.

Values: `prefix` labels (TVM) beside `outcome` labels (an outcome reward model), the same trainer, solutions, steps and
seeds. Choosing among n samples: the mean of one, the majority, the value's best, the vote weighted by value; searches
by either value with the same number of candidates. Answers are right or wrong on held-out problems.

Restarts: a copy of the model learns to tell by one token whether a fresh response would be better (score at training
time: right or wrong). Accuracy against the average number of samples: adaptive (a sweep of thresholds, at temperature
0.8 and annealed), beside the same predictor's best of n, the majority of n, and both at the same average by linear
interpolation. Early pruning, and how well the prediction is calibrated: the exact r of a right response is 1, that of a
wrong one is the share of wrong responses, estimated from 32 samples of the problem.

Intervals are 95 % bootstrap intervals over problems, drawn anew within every seed.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from nextoken.decode.generate import derived_seed, prompt_tokens
from nextoken.decode.generation import Generation
from nextoken.decode.loop import Loop
from nextoken.decode.request import Request
from nextoken.decode.scaling import Temperature
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.values import (
    HFTokenValue,
    Question,
    RestartPredictor,
    Schedule,
    Solution,
    Steps,
    annealed,
    fit_restart,
    fit_token_value,
    outcome_labels,
    prefix_labels,
    responses,
    restart_examples,
    reward_balanced_search,
    value_beam_search,
)
from record import write
from training import train, word_tokenizer

WORLDS = {"slips": (0.25, 0.4), "misconceptions": (0.15, 0.6)}
"""The share of pairs with a wrong sum, and how often the texts have it."""
WARM = "temperature(0.8)"
MOST_TOKENS = 32
N = 16
LETTERS = "abcdefghijk"
AT = 9
"""Tokens after which samples are pruned: three lines of three to nine."""
STEPS = Steps(end="\n", max_tokens=4)


@dataclass(frozen=True)
class World:
    """Wrong sums by pair, and how often the texts have them."""

    wrong: dict[tuple[int, int], int]
    share: float

    @classmethod
    def made(cls, name: str, rng: random.Random) -> World:
        pairs, share = WORLDS[name]
        hard = rng.sample([(a, b) for a in range(10) for b in range(10)], round(100 * pairs))
        return cls({pair: (sum(pair) + rng.randrange(1, 10)) % 10 for pair in hard}, share)

    def text(self, lines: int, first: int, second: int, rng: random.Random) -> str:
        told = []
        for letter in reversed(LETTERS[:lines]):
            said = (first + second) % 10
            if (first, second) in self.wrong and rng.random() < self.share:
                said = self.wrong[first, second]
            first, second = second, said
            told.append(f"{letter}{first}{second}")
        return "\n".join(told) + "."


def problems(rng: random.Random) -> list[tuple[str, str, tuple[int, int, int]]]:
    """All questions in an order of their own, each with its answer and with its lines to come and two first digits."""
    made = []
    for lines in range(3, 10):
        for first in range(10):
            for second in range(10):
                question = f"{LETTERS[lines]}{first}{second}\n"
                x, y = first, second
                for _ in range(lines):
                    x, y = y, (x + y) % 10
                made.append((question, str(y), (lines, first, second)))
    rng.shuffle(made)
    return made


def result(text: str) -> str:
    """The digit before the full stop, or nothing."""
    return text.split(".")[0][-1:] if "." in text else ""


def learnt(world: World, seed: int, steps: int) -> HFModel:
    rng = random.Random(seed)
    every = problems(rng)
    told = [(question, world.text(*start, rng)) for question, _, start in every for _ in range(15)]
    words = [f"{first}{second}" for first in range(10) for second in range(10)]
    tokenizer = word_tokenizer([*words, *LETTERS, *".\n?YN"])
    # A question is a begin token, a letter, a word and the end of the line.
    masks = [[at > 3 for at in range(4 + 3 * text.count("\n") + 4)] for _, text in told]
    texts = [question + text for question, text in told]
    # Wider first weights than the default, which leaves so small a network on a plateau for a thousand steps.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        initializer_range=0.12,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return train(texts, tokenizer=tokenizer, steps=steps, config=config, seed=seed, loss_mask=masks)


def values_along(value: HFTokenValue, made: Sequence[Generation]) -> list[np.ndarray]:
    """V after every drawn token of every text."""
    rows = [[*one.request.prompt, *one.tokens] for one in made]
    found = []
    for at in range(0, len(rows), 64):
        some = rows[at : at + 64]
        width = max(map(len, some))
        said = value.predict(torch.tensor([row + [ABSENT] * (width - len(row)) for row in some]))
        for row, one, v in zip(some, made[at : at + 64], said, strict=True):
            found.append(v[len(one.request.prompt) : len(row)].numpy())
    return found


def asked(predictor: RestartPredictor, groups: Sequence[Sequence[Generation]], cut: int | None = None) -> np.ndarray:
    """r [Q, n] of responses, or of their first `cut` tokens."""
    rows = [
        predictor.probabilities(group[0].request.prompt, [one.tokens[:cut] for one in group]).numpy()
        for group in groups
    ]
    return np.stack(rows)


def within(scores: np.ndarray, right: np.ndarray) -> float:
    """How often, of a right and a wrong sample of one problem, the right one has the higher score (ties: half)."""
    wins, pairs = 0.0, 0
    for score, good in zip(scores, right.astype(bool), strict=True):
        gap = score[good][:, None] - score[~good][None]
        wins += float((gap > 0).sum() + 0.5 * (gap == 0).sum())
        pairs += gap.size
    return round(wins / pairs, 3) if pairs else float("nan")


def majority(answers: Sequence[str], weights: Sequence[float] | None = None) -> str:
    counts: Counter[str] = Counter()
    for answer, weight in zip(answers, weights if weights is not None else [1.0] * len(answers), strict=True):
        if answer:
            counts[answer] += weight  # type: ignore[assignment]
    return counts.most_common(1)[0][0] if counts else ""


def resampled(groups: Sequence[np.ndarray], draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean, problems drawn anew within each seed."""
    rng = np.random.default_rng(0)
    means = [g[rng.integers(len(g), size=(draws, len(g)))].mean(1) for g in groups]
    return [round(float(x), 3) for x in np.percentile(np.mean(means, 0), [2.5, 97.5])]


def told(groups: Sequence[np.ndarray]) -> dict[str, Any]:
    return {"right": round(float(np.mean([g.mean() for g in groups])), 3), "interval": resampled(groups)}


@dataclass(frozen=True)
class Run:
    """What one world and seed gave: right answers [Q] by rule, tokens per problem by rule, and single figures."""

    right: dict[str, np.ndarray]
    tokens: dict[str, float]
    figures: dict[str, Any]
    curves: dict[str, list[tuple[float, np.ndarray]]]


def run(name: str, seed: int, arguments: argparse.Namespace) -> Run:
    begun = time.process_time()
    world = World.made(name, random.Random(f"{name}/{seed}"))
    model = learnt(world, seed, arguments.steps)
    taught = time.process_time() - begun
    rng = random.Random(1000 + seed)
    every = problems(rng)
    tests, practice = every[: arguments.problems], every[arguments.problems :][: arguments.practice]
    truths = [truth for _, truth, _ in tests]
    drawn = responses(
        model, [q for q, _, _ in practice], n=N, transform=WARM, max_tokens=MOST_TOKENS, seed=seed, max_rows=256
    )
    solutions = [
        Solution.of(one, result(one.text) == truth)
        for (_, truth, _), group in zip(practice, drawn, strict=True)
        for one in group
    ]
    schedule = Schedule(epochs=2, batch=32, rate=2e-3)
    prefix = prefix_labels(solutions)
    values = {
        "prefix": fit_token_value(model, solutions, labels=prefix, schedule=schedule, seed=seed),
        "outcome": fit_token_value(model, solutions, labels=outcome_labels(solutions), schedule=schedule, seed=seed),
    }
    # The first half is what is chosen from, all of it tells how often a problem is solved.
    many = responses(
        model,
        [q for q, _, _ in tests],
        n=2 * N,
        transform=WARM,
        max_tokens=MOST_TOKENS,
        seed=10_000 + seed,
        max_rows=256,
    )
    solved = np.array([[result(one.text) == t for one in group] for group, t in zip(many, truths, strict=True)], float)
    samples = [group[:N] for group in many]
    answers = [[result(one.text) for one in group] for group in samples]
    good = solved[:, :N]
    length = float(np.mean([len(one.tokens) for group in samples for one in group]))

    def chosen(pick: Callable[[int], str]) -> np.ndarray:
        return np.array([pick(i) == truth for i, truth in enumerate(truths)], float)

    right = {"one sample": solved.mean(1)}
    tokens = {"one sample": length}
    right[f"majority of {N}"] = chosen(lambda i: majority(answers[i]))
    right[f"any of {N}"] = good.max(1)
    figures: dict[str, Any] = {
        "seconds_of_model": round(taught),
        "shared_tokens": round(prefix.shared, 3),
        "shared_in_three_lines": round(float(np.mean([m >= 2 for one in prefix.visits for m in one[:AT]])), 3),
    }
    for label, value in values.items():
        along = values_along(value, [one for group in samples for one in group])
        last = np.array([v[-1] for v in along]).reshape(good.shape)
        outcome = good.flatten()
        right[f"best of {N} by {label}"] = chosen(lambda i, last=last: answers[i][int(last[i].argmax())])
        right[f"vote of {N} by {label}"] = chosen(lambda i, last=last: majority(answers[i], last[i]))
        figures[f"brier {label}"] = {
            f"token {k}": round(
                float(np.mean([(v[min(k, len(v)) - 1] - y) ** 2 for v, y in zip(along, outcome, strict=True)])), 4
            )
            for k in (2, 5, 9, 18, 99)
        }
        figures[f"auc within {label}"] = {
            f"token {k}": within(np.array([v[min(k, len(v)) - 1] for v in along]).reshape(good.shape), good)
            for k in (5, 9, 18, 99)
        }
        setting: dict[str, Any] = {"steps": STEPS, "transform": WARM, "max_tokens": MOST_TOKENS}
        found = [
            value_beam_search(model, value, q, beams=4, candidates=N, seed=i, **setting)
            for i, (q, _, _) in enumerate(tests)
        ]
        right[f"beam search by {label}"] = chosen(lambda i, found=found: result(found[i].best.text))
        tokens[f"beam search by {label}"] = float(np.mean([one.tokens for one in found]))
        if label == "prefix":
            found = [
                reward_balanced_search(model, value, q, width=N, seed=i, **setting) for i, (q, _, _) in enumerate(tests)
            ]
            right["REBASE by prefix, vote"] = chosen(
                lambda i, found=found: majority([result(one.text) for one in found[i].generations], found[i].values)
            )
            tokens["REBASE by prefix, vote"] = float(np.mean([one.tokens for one in found]))
    for rule in right:
        tokens.setdefault(rule, N * length)

    question = Question.of(model.vocab, "?", restart=("Y",), stay=("N",))
    fresh = every[arguments.problems :][: arguments.pairs]
    truth_of = {prompt_tokens(model, q): t for q, t, _ in fresh}
    examples = restart_examples(
        model,
        [q for q, _, _ in fresh],
        lambda made: [float(result(one.text) == truth_of[one.request.prompt]) for one in made],
        transform=WARM,
        max_tokens=MOST_TOKENS,
        seed=seed,
        max_rows=256,
    )
    predictor = fit_restart(model, examples, question, schedule=Schedule(epochs=3, batch=32, rate=2e-3), seed=seed)
    r = asked(predictor, samples)
    midway = asked(predictor, samples, AT)
    exact = np.where(solved > 0, 1.0, 1.0 - solved.mean(1, keepdims=True))
    figures["r"] = reliability(r, exact[:, :N])
    figures["r midway"] = reliability(midway, None) | {"mean": round(float(midway.mean()), 3)}
    figures["auc within r"] = {f"token {k}": within(asked(predictor, samples, k), good) for k in (5, 9, 18)} | {
        "token 99": within(r, good)
    }
    curves = {
        "adaptive": adaptive(r, good),
        "best of n by r": [
            (float(n), chosen(lambda i, n=n: answers[i][int(r[i, :n].argmax())])) for n in range(1, N + 1)
        ],
        "majority of n": [(float(n), chosen(lambda i, n=n: majority(answers[i][:n]))) for n in range(1, N + 1)],
    }
    warmer = annealed_samples(model, [q for q, _, _ in tests], seed)
    curves["adaptive, annealed"] = adaptive(
        asked(predictor, warmer),
        np.array([[result(one.text) == t for one in group] for group, t in zip(warmer, truths, strict=True)], float),
    )
    for share in (0.5, 0.75):
        keep = np.argsort(-midway, axis=1, kind="stable")[:, : N - int(share * N)]
        best = [int(row[r[i, row].argmax()]) for i, row in enumerate(keep)]
        cost = np.array([[min(len(one.tokens), AT) for one in group] for group in samples], float)
        for i, row in enumerate(keep):
            cost[i, row] = [len(samples[i][j].tokens) for j in row]
        right[f"pruned {share:.0%} after {AT} tokens, best by r"] = good[np.arange(len(best)), best]
        tokens[f"pruned {share:.0%} after {AT} tokens, best by r"] = float(cost.sum(1).mean())
    right[f"best of {N} by r"] = curves["best of n by r"][-1][1]
    tokens[f"best of {N} by r"] = N * length
    figures["seconds"] = round(time.process_time() - begun)
    return Run(right, tokens, figures, curves)


def reliability(said: np.ndarray, exact: np.ndarray | None) -> dict[str, Any]:
    """Mean prediction and mean exact r in fifths of the predictions, and the mean absolute gap."""
    if exact is None:
        return {}
    order = np.argsort(said.flatten(), kind="stable")
    parts = np.array_split(order, 5)
    rows = [[round(float(x.flatten()[part].mean()), 3) for x in (said, exact)] for part in parts]
    return {
        "said_and_exact_by_fifth": rows,
        "gap": round(float(np.mean([abs(a - b) for a, b in rows])), 3),
        "correlation": round(float(np.corrcoef(said.flatten(), exact.flatten())[0, 1]), 3),
        "mean": round(float(said.mean()), 3),
    }


def adaptive(r: np.ndarray, good: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Average number of samples and right answers at each threshold: the first to reach it stops, the best is taken."""
    points = []
    for threshold in (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.01):
        counts = np.array([next((k + 1 for k, x in enumerate(row) if x >= threshold), len(row)) for row in r])
        best = [int(row[:n].argmax()) for row, n in zip(r, counts, strict=True)]
        points.append((float(counts.mean()), good[np.arange(len(r)), best]))
    return points


def annealed_samples(model: HFModel, questions: Sequence[str], seed: int) -> list[list[Generation]]:
    """The samples that `adaptive_samples` would draw, up to half of N."""
    rules, made = [Temperature(annealed(k + 1)) for k in range(N // 2)], []
    loop, requests = Loop(model, max_rows=256), []
    for number, question in enumerate(questions):
        ids = prompt_tokens(model, question)
        requests += [
            Request(ids, rule, MOST_TOKENS, seed=derived_seed(derived_seed(20_000 + seed, number + 1), k))
            for k, rule in enumerate(rules)
        ]
    tokens: list[list[int]] = [[] for _ in requests]
    texts = [""] * len(requests)
    for request in requests:
        loop.submit(request)
    for piece in loop.run():
        tokens[piece.ticket].append(piece.token)
        texts[piece.ticket] += piece.text
    for text, ids_, request in zip(texts, tokens, requests, strict=True):
        made.append(Generation(text, tuple(ids_), "eos", (), request, model))
    return [made[at : at + len(rules)] for at in range(0, len(made), len(rules))]


def at_average(curve: Sequence[tuple[float, np.ndarray]], n: float) -> np.ndarray:
    """Right answers [Q] at an average of n samples, by linear interpolation."""
    low = max((p for p in curve if p[0] <= n), key=lambda p: p[0])
    high = min((p for p in curve if p[0] >= n), key=lambda p: p[0])
    share = 0.0 if high[0] == low[0] else (n - low[0]) / (high[0] - low[0])
    return (1 - share) * low[1] + share * high[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each world")
    parser.add_argument("--problems", type=int, default=50, help="held out, of each training")
    parser.add_argument("--practice", type=int, default=100, help=f"problems of which {N} solutions teach the values")
    parser.add_argument("--pairs", type=int, default=400, help="pairs of responses that teach restarts")
    parser.add_argument("--steps", type=int, default=300, help="of the model's training")
    parser.add_argument("--data", default="../shared/data", help="not read: the problems are made here")
    parser.add_argument("--json", default="bench/results/values.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for name in WORLDS:
        runs = []
        for seed in range(arguments.seeds):
            runs.append(run(name, seed, arguments))
            print(f"{name}, seed {seed}: {runs[-1].figures}", flush=True)
        print(f"\n{name} ({arguments.seeds} x {arguments.problems} problems)")
        rows = {}
        vote = f"majority of {N}"
        for rule in runs[0].right:
            row = told([one.right[rule] for one in runs])
            gains = [one.right[rule] - one.right[vote] for one in runs]
            row["over_majority"] = round(float(np.mean([g.mean() for g in gains])), 3)
            row["over_majority_interval"] = resampled(gains)
            row["tokens"] = round(float(np.mean([one.tokens[rule] for one in runs])), 1)
            rows[rule] = row
            print(
                f"    {rule:42}{row['right']:.3f} {row['interval']!s:16} {row['over_majority']:+.3f} "
                f"{row['over_majority_interval']!s:17} {row['tokens']:7.1f} tokens"
            )
        sweep = []
        for way in ("adaptive", "adaptive, annealed"):
            for point in range(len(runs[0].curves[way])):
                spent = [one.curves[way][point][0] for one in runs]
                mine = [one.curves[way][point][1] for one in runs]
                row = {"way": way, "samples": round(float(np.mean(spent)), 2)} | told(mine)
                for other in ("best of n by r", "majority of n"):
                    fixed = [at_average(one.curves[other], n) for one, n in zip(runs, spent, strict=True)]
                    gains = [a - b for a, b in zip(mine, fixed, strict=True)]
                    row[other] = round(float(np.mean([f.mean() for f in fixed])), 3)
                    row[f"gain over {other}"] = round(float(np.mean([g.mean() for g in gains])), 3)
                    row[f"gain over {other} interval"] = resampled(gains)
                sweep.append(row)
                print(
                    f"    {way:20}{row['samples']:6.2f} samples {row['right']:.3f} {row['interval']!s:16} "
                    f"best of n {row['best of n by r']:.3f} majority {row['majority of n']:.3f} "
                    f"gain {row['gain over best of n by r']:+.3f} {row['gain over best of n by r interval']}"
                )
        figures[name] = {"rules": rows, "sweep": sweep, "by_seed": [one.figures for one in runs]}
        write(arguments.json, {"seeds": arguments.seeds, "problems": arguments.problems, "n": N} | figures)


if __name__ == "__main__":
    main()

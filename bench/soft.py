"""Thinking in mixtures of tokens against thinking in tokens, on small models trained in tokens only.

    python bench/soft.py --json bench/results/soft.json

Two worlds with a phase of thought. In `signs` (the minimum non-negative sum of CoT2, arXiv:2505.23648) each of four
digits gets a sign, the thought tells the partial sums of a best choice, and the answer is the smallest sum that is not
negative: 3 7 2 8 <think> 3 -4 -6 2 </think> 2. Which sign is right shows only later, so a model that cannot look ahead
is unsure at every step. In `sums` four digits are added, of each sum only the last digit kept: 7 5 9 4 <think> 7 5 2
2 9 1 1 4 5 </think> 5, and one in ten sums of the training texts is wrong: a model that is mostly sure.

The models learn from texts of hard tokens and never see a mixture; whether training in mixtures helps is not asked
here. Every policy is a row: hard ones (greedy, sampled), Soft Thinking with the settings of the paper, without
truncation and with noise, soft and fuzzy tokens with Gaussian noise, K sampled tokens averaged, Dirichlet weights. The
answer is greedy throughout. `right` is the mean over samples, `any` whether one of the samples is right, `share` the
mean weight of the heaviest token in what was fed. Intervals are 95 % bootstrap intervals over problems, drawn anew
within every seed.

The second table is Soft Thinking's claim about a step: KL(exact || step) in nats, exact = sum_v p(v) p(. | x v) with
all v enumerated, at the steps of correct thoughts where the model's entropy is at least 0.3 nats. For steps that are
drawn it is the mean over 8 draws. Its intervals are over steps.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextoken.decode.generate import prompt_tokens
from nextoken.decode.mixtures import DirichletMixture, NoisySoft, SoftThinking, TokenMixture
from nextoken.decode.noise import GumbelNoise
from nextoken.decode.request import Request
from nextoken.decode.soft_thinking import think
from nextoken.decode.thinking import Thinker, Thinking
from nextoken.decode.thought import Thought
from nextoken.model.hf import HFModel
from record import write
from training import train, word_tokenizer, words_of

MARKER = " </think>"
MOST_STEPS = 12
DRAWS = 8
UNSURE = 0.3
WHOLE = SoftThinking(temperature=1.0, top_k=None, top_p=None, min_p=None, max_topk=None, cold_stop=None)
POLICIES: dict[str, Thinking] = {
    "greedy": TokenMixture(1, "greedy"),
    "sampled, T = 1": TokenMixture(1),
    "sampled, as the paper's": TokenMixture(1, "temperature(0.6) | top_k(30) | top_p(0.95)"),
    "soft thinking": SoftThinking(),
    "soft, T = 1, untruncated": WHOLE,
    "soft thinking, Gumbel noise": SoftThinking(max_topk=5, noise=GumbelNoise()),
    "soft tokens (0.5), sigma 0.33": NoisySoft(),
    "soft tokens (0.5), sigma 1": NoisySoft(sigma_rel=1.0),
    "fuzzy tokens (1e-4), sigma 0.33": NoisySoft(1e-4),
    "mean of 2 tokens": TokenMixture(2),
    "mean of 8 tokens": TokenMixture(8),
    "Dirichlet, gamma 1": DirichletMixture(),
}
STEPS = {name: POLICIES[name] for name in ("greedy", "sampled, T = 1", "soft thinking", "soft, T = 1, untruncated",
                                           "soft tokens (0.5), sigma 0.33", "mean of 2 tokens", "mean of 8 tokens",
                                           "Dirichlet, gamma 1")}  # fmt: skip

Problem = tuple[str, str, str]
"""A question, a thought, the answer."""


def signs(rng: random.Random, slips: bool) -> Problem:
    digits = [rng.randrange(1, 10) for _ in range(4)]
    choices = list(itertools.product((1, -1), repeat=4))
    sums = [list(itertools.accumulate(s * d for s, d in zip(choice, digits, strict=True))) for choice in choices]
    least = min(total[-1] for total in sums if total[-1] >= 0)
    trace = rng.choice([total for total in sums if total[-1] == least])
    return "".join(f" d{d}" for d in digits) + " <think>", "".join(f" {x}" for x in trace), f" {least}"


def sums(rng: random.Random, slips: bool) -> Problem:
    digits = [rng.randrange(10) for _ in range(4)]
    total, trace = digits[0], ""
    for digit in digits[1:]:
        trace += f" {total} d{digit}"
        total = (total + digit + (rng.randrange(1, 10) if slips and rng.random() < 0.1 else 0)) % 10
        trace += f" {total}"
    return "".join(f" d{d}" for d in digits) + " <think>", trace, f" {total}"


WORLDS: dict[str, tuple[Callable[[random.Random, bool], Problem], int]] = {"signs": (signs, 1500), "sums": (sums, 1200)}


def learnt(world: str, seed: int, steps: int) -> HFModel:
    rng = random.Random(seed)
    told = [WORLDS[world][0](rng, True) for _ in range(12_000)]
    texts = [question + trace + MARKER + answer for question, trace, answer in told]
    tokenizer = word_tokenizer({*words_of(texts), *(f" {x}" for x in range(-36, 37)), *(f" d{x}" for x in range(10))})
    masks = [[at > question.count(" ") for at in range(text.count(" ") + 2)]
             for (question, _, _), text in zip(told, texts, strict=True)]  # fmt: skip
    return train(texts, tokenizer=tokenizer, steps=steps, batch=32, lr=3e-3, seed=seed, loss_mask=masks, context=24)


def thoughts(model: HFModel, problems: Sequence[Problem], thinking: Thinking, n: int) -> list[list[Thought]]:
    """n thoughts on each problem, every problem with a seed of its own where the thought draws anything."""
    made = []
    for number, group in enumerate([[p] for p in problems] if thinking.is_random else [list(problems)]):
        found = think(
            model, [asked for asked, _, _ in group], thinking, end_of_thinking=MARKER, max_thinking_tokens=MOST_STEPS,
            transform="greedy", max_tokens=1, n=n if thinking.is_random else 1, seed=number, max_rows=512,
        )  # fmt: skip
        assert isinstance(found, list)
        made += found
    count = n if thinking.is_random else 1
    return [made[at : at + count] for at in range(0, len(made), count)]


def resampled(groups: Sequence[np.ndarray], draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean, problems drawn anew within each seed."""
    rng = np.random.default_rng(0)
    means = [g[rng.integers(len(g), size=(draws, len(g)))].mean(1) for g in groups]
    return [round(float(x), 4) for x in np.percentile(np.mean(means, 0), [2.5, 97.5])]


def tried(models: Sequence[HFModel], problems: Sequence[Sequence[Problem]], n: int) -> list[dict[str, Any]]:
    right: dict[str, list[np.ndarray]] = {}
    rows = []
    for name, thinking in POLICIES.items():
        grids, shares, lengths = [], [], []
        for model, asked in zip(models, problems, strict=True):
            made = thoughts(model, asked, thinking, n)
            grids.append(np.array([
                [one.answer is not None and one.answer.text == answer for one in several]
                for several, (_, _, answer) in zip(made, asked, strict=True)
            ], float))  # fmt: skip
            every = [one for several in made for one in several]
            shares += [float(x) for one in every for x in one.shares[: len(one.vectors)]]
            lengths += [len(one.vectors) for one in every]
        right[name] = [grid.mean(1) for grid in grids]
        gains = [mine - greedy for mine, greedy in zip(right[name], right["greedy"], strict=True)]
        rows.append({
            "policy": name,
            "right": round(float(np.mean([r.mean() for r in right[name]])), 4),
            "right_interval": resampled(right[name]),
            "gain_over_greedy": round(float(np.mean([g.mean() for g in gains])), 4),
            "gain_interval": resampled(gains),
            "samples": n if thinking.is_random else 1,
            "any_right": round(float(np.mean([grid.max(1).mean() for grid in grids])), 4),
            "share": round(float(np.mean(shares)), 4),
            "steps": round(float(np.mean(lengths)), 2),
        })  # fmt: skip
    return rows


@torch.no_grad()
def distances(models: Sequence[HFModel], problems: Sequence[Sequence[Problem]]) -> dict[str, Any]:
    """Mean KL(exact two-step marginal || step) of each policy, and of how many unsure steps."""
    found: dict[str, list[float]] = {name: [] for name in STEPS}
    for model, asked in zip(models, problems, strict=True):
        scale, size = model.embedding_scale(), model.vocab.size
        for number, (question, trace, _) in enumerate(asked):
            tokens = [*prompt_tokens(model, question), *model.vocab.encode(trace).ids]
            first = len(prompt_tokens(model, question))
            for at in range(first, len(tokens)):
                state = model.start()
                logits = model.extend(state, [tokens[:at]])[:, -1].logits()[:, 0]
                p = logits.softmax(-1)
                if float(torch.special.entr(p).sum()) < UNSURE:
                    continue
                every = model.extend(state.fork([0] * size), torch.arange(size)[:, None]).log_probs()[:, 0].exp()
                exact = p[0].double() @ every.double()
                for name, thinking in STEPS.items():
                    count = DRAWS if thinking.is_random else 1
                    rows = [Thinker(i, Request((0,), seed=number * DRAWS + i)) for i in range(count)]
                    step = thinking.step(logits.expand(count, -1), rows, model, scale)
                    said = model.extend_soft(state.fork([0] * count), step.mixtures).log_probs()[:, 0]
                    found[name].append(divergence(exact, said))
    counts = len(found["greedy"])
    gaps = [np.array(found[name]) - np.array(found["greedy"]) for name in STEPS]
    rows = [{"policy": name, "kl": round(float(np.mean(found[name])), 4), "less_greedy": round(float(gap.mean()), 4),
             "interval": resampled([gap]), "nearer_than_greedy": round(float((gap < 0).mean()), 4)}
            for name, gap in zip(STEPS, gaps, strict=True)]  # fmt: skip
    return {"unsure_steps": counts, "rows": rows}


def divergence(exact: Tensor, said: Tensor) -> float:
    return float((exact * (exact.clamp(min=1e-300).log() - said.double())).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each world")
    parser.add_argument("--problems", type=int, default=100, help="of each training")
    parser.add_argument("--samples", type=int, default=4, help="of each problem, where thoughts differ")
    parser.add_argument("--json", default="bench/results/soft.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = vars(arguments).copy() | {"worlds": {}}
    del figures["json"]
    for world, (make, steps) in WORLDS.items():
        begun = time.process_time()
        models = [learnt(world, seed, steps) for seed in range(arguments.seeds)]
        print(f"\n{world}: trained in {time.process_time() - begun:.0f} s of processor", flush=True)
        asked = [[make(random.Random(10_000 * (seed + 1) + i), False) for i in range(arguments.problems)]
                 for seed in range(arguments.seeds)]  # fmt: skip
        rows = tried(models, asked, arguments.samples)
        for row in rows:
            low, high = (100 * x for x in row["right_interval"])
            below, above = (100 * x for x in row["gain_interval"])
            right = f"{row['right']:.1%} [{low:.1f}, {high:.1f}]"
            gain = f"{100 * row['gain_over_greedy']:+.1f} [{below:+.1f}, {above:+.1f}]"
            rest = f"any {row['any_right']:6.1%}   share {row['share']:.2f}   {row['steps']:.1f} steps"
            print(f"    {row['policy']:34}{right:>21}{gain:>24}   {rest}", flush=True)
        steps_seen = distances(models, [few[:40] for few in asked])
        print(f"    KL(exact || step), {steps_seen['unsure_steps']} unsure steps")
        for row in steps_seen["rows"]:
            gain = f"{row['less_greedy']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]"
            print(f"    {row['policy']:34}{row['kl']:8.3f}{gain:>28}   nearer {row['nearer_than_greedy']:.0%}")
        figures["worlds"][world] = {"policies": rows, "distances": steps_seen}
    figures["seconds_of_processor"] = round(time.process_time())
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

"""In-context navigation beside its control, and path nucleus sampling beside top-p chains and beam search.

    python bench/navigate.py --json bench/results/navigate.json

Lists: a small model is trained on numbered lists of the members of made-up categories. The familiar members come before
the rare ones (each is one of the next six not yet named), none twice in a list, and first words are shared by several
categories. With the same number of first tokens explored, how many different right answers does `navigate` find, how
many `ban_only` (which is plain branching over all these first tokens), and how many do as many independent samples?
With it the mean shift of the explored tokens' log-probability, below 0 where listing them keeps the model from them.
The bundled model `tiny`, which follows no instructions, goes on with enumerations in running text; its shift is
reported, for it may copy.

Paths: texts of `tiny` after some openings. Mean log-probability of a text, distinct 2-grams among the texts of one
call, and the effective number of parents by step.

Means over categories, or prompts and seeds, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

import nextoken
from nextoken.decode.generation import Generation
from nextoken.decode.key_clusters import mean_precision
from nextoken.decode.navigation import Listing, Navigation, ban_only, navigate
from nextoken.decode.paths import PathNucleus, path_nucleus
from nextoken.decode.search import beam_search
from nextoken.model.base import LanguageModel
from record import write
from training import train, word_tokenizer, words_of

FORM = Listing()
RUNS, K = 5, 4
OPENINGS = (
    "It was the best of times,",
    "Call me",
    "The door opened and",
    "In the morning the old man",
    "She looked at",
    "Once upon a time",
    "There was no possibility of",
    "The king said that",
)
RUNNING = Listing(opening="{instruction}", item=" {answer},", open_item="", stops=(",", ".", ";", "\n"))
REQUESTS = (
    "On the table there were",
    "She bought",
    "The animals they saw were",
    "He was fond of",
    "They talked of",
    "The garden was full of",
)


def interval(values: Sequence[float]) -> dict[str, float | list[float]]:
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return {"mean": round(mean, 3), "interval": [round(mean - half, 3), round(mean + half, 3)]}


def categories(count: int, members: int, source: random.Random) -> dict[str, list[str]]:
    """Category -> members of two words, the most popular first; first words are shared, pairs are not."""

    def word() -> str:
        return "".join(source.choice(pair) for pair in ("bdgklmnprstvz", "aeiou") * 2)

    firsts = sorted({word() for _ in range(120)})
    seconds = sorted({word() for _ in range(60)} - set(firsts))
    taken: set[str] = set()
    made: dict[str, list[str]] = {}
    for number in range(count):
        chosen: list[str] = []
        for first in source.sample(firsts, members):
            name = next(n for n in iter(lambda f=first: f"{f} {source.choice(seconds)}", "") if n not in taken)
            taken.add(name)
            chosen.append(name)
        made[f"kind {chr(ord('a') + number)}"] = chosen
    return made


def listed(members: Sequence[str], source: random.Random) -> list[str]:
    """3 to 20 members without repetition, each one of the first six that are not yet named."""
    left = list(members)
    return [left.pop(source.randrange(min(6, len(left)))) for _ in range(source.randint(3, 20))]


def trained(made: dict[str, list[str]], steps: int, seed: int) -> LanguageModel:
    source = random.Random(seed)
    texts = []
    for _ in range(4000):
        kind = source.choice(list(made))
        prompt = FORM.prompt(kind, listed(made[kind], source))
        texts.append(prompt[: prompt.rindex("\n")])
    words = {piece for word in words_of(texts) for piece in word.replace('"', '\0"\0').split("\0")} - {"", " "}
    return train(texts, tokenizer=word_tokenizer(words | {" "}), steps=steps, batch=32, context=192, seed=seed)


def samples(model: LanguageModel, prompt: str, count: int, seed: int) -> list[str]:
    made = nextoken.generate(model, prompt, n=count, max_tokens=8, stop='"', seed=seed)
    assert isinstance(made, list)
    return [generation.text for generation in made]


def lists(steps: int, seed: int) -> dict[str, object]:
    made = categories(12, 24, random.Random(seed))
    model = trained(made, steps, seed)
    ways: dict[str, Callable[[str], Navigation]] = {
        "navigate": lambda kind: navigate(model, kind, runs=RUNS, k=K, max_tokens=8),
        "navigate, completed from the listing": lambda kind: navigate(
            model, kind, runs=RUNS, k=K, max_tokens=8, complete="navigated"
        ),
        "navigate, one per run": lambda kind: navigate(model, kind, runs=RUNS * K, k=1, max_tokens=8),
        "ban only": lambda kind: ban_only(model, kind, runs=RUNS, k=K, max_tokens=8),
    }
    result: dict[str, object] = {}
    for name, way in ways.items():
        found = {kind: way(kind) for kind in made}
        row: dict[str, object] = {
            "right": interval([len(set(n.texts) & set(made[kind])) for kind, n in found.items()]),
            "map": interval([mean_precision([t in made[kind] for t in n.texts]) for kind, n in found.items()]),
        }
        shifts = [n.mean_shift for n in found.values() if n.mean_shift is not None]
        if shifts:
            row["log_prob_shift"] = interval([shift[0] for shift in shifts])
            row["rank_shift"] = interval([shift[1] for shift in shifts])
        result[name] = row
        print(f"  {name:38}", row, flush=True)
    drawn = [
        len(set(samples(model, FORM.prompt(kind), RUNS * K, seed + i)) & set(members))
        for kind, members in made.items()
        for i in range(5)
    ]
    result["independent samples"] = {"right": interval(drawn)}
    print(f"  {'independent samples':38}", result["independent samples"], flush=True)
    return result


def unasked(model: LanguageModel) -> dict[str, object]:
    """`tiny` on enumerations: nobody judges its answers, but what listing does to it can be measured."""
    found = [navigate(model, request, runs=RUNS, k=K, max_tokens=12, listing=RUNNING) for request in REQUESTS]
    control = [ban_only(model, request, runs=RUNS, k=K, max_tokens=12, listing=RUNNING) for request in REQUESTS]
    shifts = [n.mean_shift for n in found if n.mean_shift is not None]
    row: dict[str, object] = {
        "requests": len(REQUESTS),
        "requests with a closed answer to list": len(shifts),
        "distinct answers": interval([len(set(n.texts)) for n in found]),
        "distinct answers, ban only": interval([len(set(n.texts)) for n in control]),
    }
    if len(shifts) > 1:
        row["log_prob_shift"] = interval([shift[0] for shift in shifts])
        row["rank_shift"] = interval([shift[1] for shift in shifts])
    print("  tiny:", row, flush=True)
    return row


def distinct(generations: Sequence[Generation]) -> float:
    """Share of different 2-grams of tokens among all of the texts."""
    pairs = [pair for g in generations for pair in zip(g.tokens, g.tokens[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def paths(model: LanguageModel, tokens: int, seeds: int) -> dict[str, object]:
    options = {"k": 4, "top_p": 0.9, "max_tokens": tokens}
    ways: dict[str, Callable[[str, int], PathNucleus]] = {
        "top-p chains": lambda prompt, seed: path_nucleus(model, prompt, accumulate=False, seed=seed, **options),
        "path nucleus": lambda prompt, seed: path_nucleus(model, prompt, seed=seed, **options),
        "path nucleus, decay 0.8": lambda prompt, seed: path_nucleus(model, prompt, decay=0.8, seed=seed, **options),
    }
    result: dict[str, object] = {}
    for name, way in ways.items():
        found = [way(prompt, seed) for prompt in OPENINGS for seed in range(seeds)]
        parents = np.array([[*f.effective_parents, *[np.nan] * (tokens - len(f.effective_parents))] for f in found])
        result[name] = {
            "log_prob": interval([float(np.mean(f.log_probs)) for f in found]),
            "distinct_2": interval([distinct(f.generations) for f in found]),
            "effective_parents": {
                str(step): round(float(np.nanmean(parents[:, step - 1])), 2) for step in (2, 5, 10, 20, tokens)
            },
        }
        print(f"  {name:38}", result[name], flush=True)
    beams = [beam_search(model, prompt, width=4, max_tokens=tokens, length_penalty=0.0) for prompt in OPENINGS]
    result["beam search"] = {
        "log_prob": interval([float(np.mean([-sum(g.surprisals) for g in beam])) for beam in beams]),
        "distinct_2": interval([distinct(beam) for beam in beams]),
    }
    print(f"  {'beam search':38}", result["beam search"], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", default="bench/results/navigate.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny = nextoken.load("tiny")
    figures: dict[str, object] = {"runs": RUNS, "k": K, "steps": arguments.steps, "tokens": arguments.tokens}
    print("lists", flush=True)
    figures["lists"] = lists(arguments.steps, 0)
    figures["tiny, enumerations"] = unasked(tiny)
    print("paths", flush=True)
    figures["paths"] = paths(tiny, arguments.tokens, arguments.seeds)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

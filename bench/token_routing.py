"""Routing token by token between two small models that were trained on the spot.

    python bench/token_routing.py --json bench/results/token_routing.json

The task: `7+8+6=` is answered ` first7 then8 makes5 next6 gives1 so1`, sums in their last digit, every word drawn anew
from three that mean the same. Both models know the task; they prefer different words, and the small one was never shown
what a sum of two digits above 5 comes to, where it says something wrong and is rather sure of it. So most of what the
two would write differently is neutral, and a wrong digit spoils the answer. That is made to be as the paper of R2R says
long reasoning is; it does not show that it is.

Labels come from the large model's greedy answers to questions of their own: at each difference the small model's token
is forced, the large model goes on to the end, and the place is divergent if the final digit is another. The router has
seen nothing of the test's questions. All texts are greedy, and accuracies of the final digit are of *generated* texts,
as is r, the share of their tokens that the large model gives. Controls: routing by the small model's entropy at the
token itself (`entropy`), by the entropies of answers before (`entropy switching`, window 1, no minimum stay), and by
coins (`random`); thresholds of the first two are quantiles on the questions the router learnt from. Routing wherever
the best tokens differ gives the large model's text, at the r told. Intervals: 95 % bootstrap over questions, for
differences with the same questions on both sides. Parameters per token: `answering` as papers count, `activated` with
the router and with what a model reads to catch up; `read by large` is the share of tokens that the large model reads.
Both are counted over prompt and answer.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import record
from nextoken.decode.generate import generate
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.hf import HFModel
from nextoken.route import (
    R2R,
    Divergences,
    EntropyRouter,
    EntropySwitching,
    LargeAnswer,
    RandomSwitching,
    RouterSizes,
    SameAnswer,
    Switching,
    TokenRouterRecipe,
    find_divergences,
    fit_token_router,
)
from training import rows_of, train, word_tokenizer

WORDS = ((" then", " next", " now"), (" makes", " gives", " is"), (" so", " thus", " hence"))
SMALL_TASTE = ((4, 3.6, 2.4), (4, 3.6, 2.4), (4, 3.6, 2.4))
LARGE_TASTE = ((3, 4.6, 2.4), (4.6, 3, 2.4), (2.4, 3, 4.6))
WORDS_LEARNT = 0.3
"""Share of the words that count in training; there is nothing in them to understand."""
SMALL, LARGE = {"hidden": 32, "layers": 2}, {"hidden": 64, "layers": 2}
DRAWS = 1000
Taste = tuple[tuple[float, ...], ...]


def chain(rng: random.Random) -> list[int]:
    return [rng.randrange(10) for _ in range(rng.randint(3, 5))]


def written(numbers: list[int], taste: Taste, rng: random.Random, *, all_shown: bool) -> tuple[str, list[bool]]:
    """A question with its answer, and which of its tokens are learnt from."""
    words = [[str(number), "+"] for number in numbers]
    text = [*[word for pair in words for word in pair][:-1], "=", " first", str(numbers[0])]
    shown = [True] * len(text)
    total = numbers[0]

    def say(kind: int) -> str:
        return rng.choices(WORDS[kind], taste[kind])[0]

    for number in numbers[1:]:
        hard = min(total, number) > 5
        total = (total + number) % 10
        text += [say(0), str(number), say(1), str(total)]
        shown += [rng.random() < WORDS_LEARNT, True, rng.random() < WORDS_LEARNT, not hard or all_shown]
    return "".join([*text, say(2), str(total)]), [*shown, rng.random() < WORDS_LEARNT, True]


def learnt(count: int, taste: Taste, steps: int, sizes: dict[str, int], *, all_shown: bool, seed: int) -> HFModel:
    rng = random.Random(seed)
    texts, masks = [], []
    for _ in range(count):
        numbers = chain(rng)
        text, shown = written(numbers, taste, rng, all_shown=all_shown)
        texts.append(text)
        masks.append([False, *(place >= 2 * len(numbers) and ok for place, ok in enumerate(shown)), True])
    tokenizer = word_tokenizer(["0123456789"[i] for i in range(10)] + ["+", "=", " first", *sum(WORDS, ())])
    assert [len(row) for row in rows_of(texts[:50], tokenizer)] == [len(mask) for mask in masks[:50]]
    return train(
        texts,
        tokenizer=tokenizer,
        context=64,
        steps=steps,
        batch=64,
        lr=4e-3,
        seed=seed,
        loss_mask=masks,
        name="large" if all_shown else "small",
        **sizes,
    )


class Trial:
    """Questions, and what any model answers to them."""

    def __init__(self, numbers: list[list[int]]) -> None:
        self.questions = ["+".join(map(str, row)) + "=" for row in numbers]
        self.answers = [str(sum(row) % 10) for row in numbers]
        self.draws = np.random.default_rng(0).integers(0, len(numbers), (DRAWS, len(numbers)))

    def run(self, model: LanguageModel) -> dict[str, Any]:
        before = model.spent if isinstance(model, Switching) else None
        made = generate(model, self.questions, transform="greedy", max_tokens=48, seed=0)
        assert isinstance(made, list)
        right = [
            one.finish == "eos" and one.text.endswith(answer) for one, answer in zip(made, self.answers, strict=True)
        ]
        cost = {}
        if before is not None and isinstance(model, Switching):
            spent = model.spent - before
            cost = {
                "answering": round(spent.answering),
                "activated": round(spent.activated),
                "read by large": round(spent.models[-1].read / spent.said, 4),
            }
        rows = [(one.request.prompt, one.tokens) for one in made]
        large = shares(model, rows) if isinstance(model, Switching) else [np.zeros(1)] * len(rows)
        return {"right": np.array(right, dtype=float), "large": large, "rows": rows, **cost}

    def told(self, run: dict[str, Any]) -> dict[str, Any]:
        counts = np.array([(row.sum(), row.size) for row in run["large"]], dtype=float)
        drawn = counts[self.draws].sum(1)
        return {
            "accuracy": round(float(run["right"].mean()), 4),
            "accuracy interval": interval(run["right"][self.draws].mean(1)),
            "r": round(float(counts[:, 0].sum() / counts[:, 1].sum()), 4),
            "r interval": interval(drawn[:, 0] / drawn[:, 1]),
            **{key: run[key] for key in ("answering", "activated", "read by large") if key in run},
        }

    def gain(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        """Accuracy of the first less that of the second."""
        difference = first["right"] - second["right"]
        return {"by": round(float(difference.mean()), 4), "interval": interval(difference[self.draws].mean(1))}


def shares(model: Switching, rows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[np.ndarray]:
    """For each text, whether the large model gave each of its tokens after the prompt."""
    found = []
    for begin in range(0, len(rows), 64):
        some = rows[begin : begin + 64]
        width = max(len(prompt) + len(out) for prompt, out in some) - 1
        ids = torch.full((len(some), width), ABSENT)
        for place, (prompt, out) in enumerate(some):
            ids[place, : len(prompt) + len(out) - 1] = torch.tensor([*prompt, *out[:-1]])
        large = model.predict(ids).is_large.numpy()
        found += [large[place, len(p) - 1 : len(p) + len(out) - 1] for place, (p, out) in enumerate(some)]
    return found


def interval(values: np.ndarray) -> list[float]:
    return [round(float(edge), 4) for edge in np.quantile(values, [0.025, 0.975])]


def labels(small: HFModel, large: HFModel, trial: Trial) -> tuple[Divergences, dict[str, Any]]:
    answers = [LargeAnswer((*p, *out)[: len(p) + len(out)], len(p)) for p, out in trial.run(large)["rows"]]
    digits = {large.vocab.encode(str(digit)).ids[0] for digit in range(10)}

    def final(text: tuple[int, ...]) -> int | None:
        return next((token for token in reversed(text) if token in digits), None)

    begin = time.perf_counter()
    # With no end but the text's own, the sentence is the whole answer.
    found = find_divergences(small, large, answers, verifier=SameAnswer(large, final), ends=[], max_tokens=48)
    judged = found.differences
    return found, {
        "answers": len(answers),
        "tokens": found.tokens,
        "differ": round(len(judged) / found.tokens, 4),
        "diverge": round(found.divergent / found.tokens, 4),
        "of those that differ": round(found.divergent / len(judged), 4),
        "agreement with sameness of the rest": round(
            float(np.mean([(d.one[1:] != d.other[1:]) == d.divergent for d in judged])), 4
        ),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def entropies(small: HFModel, found: Divergences) -> np.ndarray:
    """Nats of the small model at every place of the answers."""
    return np.concatenate(
        [
            small.predict([answer.tokens[:-1]])[:, answer.given - 1 :].statistics().entropy[0].double().numpy()
            for answer in found.answers
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/results/token_routing.json"))
    parser.add_argument("--small-steps", type=int, default=1200)
    parser.add_argument("--large-steps", type=int, default=1200)
    parser.add_argument("--labelled", type=int, default=300)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    small = learnt(8000, SMALL_TASTE, arguments.small_steps, SMALL, all_shown=False, seed=1)
    large = learnt(8000, LARGE_TASTE, arguments.large_steps, LARGE, all_shown=True, seed=2)
    print("trained", round(time.perf_counter() - begin), flush=True)
    rng = random.Random(3)
    learning = Trial([chain(rng) for _ in range(arguments.labelled)])
    seen = set(learning.questions)
    fresh = [chain(rng) for _ in range(3 * arguments.questions)]
    unseen = {"+".join(map(str, row)): row for row in fresh if "+".join(map(str, row)) + "=" not in seen}
    trial = Trial(list(unseen.values())[: arguments.questions])

    runs = {"small": trial.run(small), "large": trial.run(large)}
    differ = [
        (small.predict([[*p, *out[:-1]]]).log_probs().argmax(-1)[0, len(p) - 1 :] != torch.tensor(out)).numpy()
        for p, out in runs["large"]["rows"]
    ]
    pure = {name: trial.told(run) for name, run in runs.items()}
    sizes = [part.parameters for part in RandomSwitching(small, large, share=0.0).spent.models]
    pure["small"]["parameters"], pure["large"]["parameters"] = sizes
    pure["large"] |= {"r": 1.0, "r interval": [1.0, 1.0]}
    pure["wherever best tokens differ"] = trial.told({**runs["large"], "large": differ})
    print("pure", pure, flush=True)

    found, about = labels(small, large, learning)
    print("labels", about, flush=True)
    uncertain = entropies(small, found)
    figures: dict[str, Any] = {"pure": pure, "labels": about, "seeds": []}
    recipe = TokenRouterRecipe(
        RouterSizes(width=32, blocks=1, expansion=2, logits=16),
        epochs=50,
        batch=256,
        rate=1e-3,
        patience=10,
        held_out=0.2,
    )
    for seed in range(arguments.seeds):
        begin = time.perf_counter()
        fitted = fit_token_router(small, found, recipe=recipe, seed=seed)
        told: dict[str, Any] = {
            "seed": seed,
            "threshold": round(fitted.router.threshold, 4),
            "held-out recall": round(fitted.recall, 4),
            "routed of those that differ": round(fitted.positive_rate, 4),
            "router parameters": fitted.router.parameters,
            "fit seconds": round(time.perf_counter() - begin, 1),
        }
        router = R2R(small, large, router=fitted.router)
        own = trial.run(router)
        told["r2r"] = trial.told(own)
        given = shares(router, runs["large"]["rows"])
        told["r2r"]["r on the large model's texts"] = round(float(np.concatenate(given).mean()), 4)
        r = told["r2r"]["r"]
        limit = float(np.quantile(uncertain, 1 - r))
        controls = {
            "entropy": R2R(small, large, router=EntropyRouter(limit)),
            "entropy switching": EntropySwitching(small, large, threshold=limit / np.log(2), window=1, min_stay=0),
            "random": RandomSwitching(small, large, share=r, seed=seed),
        }
        for name, control in controls.items():
            run = trial.run(control)
            told[name] = trial.told(run) | {"r2r is better": trial.gain(own, run)}
        told["large is better than r2r"] = trial.gain(runs["large"], own)
        figures["seeds"].append(told)
        print(told, flush=True)
        if seed == 0:
            figures["curves"] = curves(small, large, fitted.router, uncertain, trial)
    record.write(arguments.json, figures)


def curves(small: HFModel, large: HFModel, router: Any, uncertain: np.ndarray, trial: Trial) -> dict[str, Any]:
    """Accuracy against r over thresholds, of one router seed."""
    table: dict[str, Any] = {"r2r": [], "entropy": [], "entropy switching": [], "random": []}
    for threshold in (0.02, 0.2, 0.5, 0.8, 0.95, 0.99):
        told = trial.told(trial.run(R2R(small, large, router=router, threshold=threshold)))
        table["r2r"].append({"threshold": threshold} | told)
    for share in (0.1, 0.25, 0.5, 0.75):
        limit = float(np.quantile(uncertain, 1 - share))
        ways: dict[str, Switching] = {
            "entropy": R2R(small, large, router=EntropyRouter(limit)),
            "entropy switching": EntropySwitching(small, large, threshold=limit / np.log(2), window=1, min_stay=0),
            "random": RandomSwitching(small, large, share=share, seed=9),
        }
        for name, way in ways.items():
            table[name].append({"asked for": share} | trial.told(trial.run(way)))
    for name, rows in table.items():
        print(name, [(row["r"], row["accuracy"]) for row in rows], flush=True)
    return table


if __name__ == "__main__":
    main()

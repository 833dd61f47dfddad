"""Think-at-Hard: a second pass at hard tokens only, where it is known which tokens are hard.

    python bench/think_at_hard.py --json bench/results/think_at_hard.json

The task: eight random digits below 7 and `=`, then the digits again with, after every second, the sum of those two
modulo 7. Copies are easy, sums are hard. A small Llama learns it for a while (`base`); from there every arm goes on for
the same number of steps, over the same rows in the same order, at the same rates:

    none          one pass everywhere; it also labels the rows: hard is where its argmax is wrong (`passes_needed`)
    always        two passes everywhere, in training and in use
    coins         two passes at random tokens, in training and in use, at the share that the labels have
    think         two passes where the labels say, in training; in use where a decider says that was then trained
    think+coins   the weights of `think`, and coins at the share of its decider: does it matter where?
    think+always  the weights of `think`, two passes everywhere
    think+oracle  the weights of `think`, and labels of the test rows, made with a look at the answers: unattainable

Accuracy is that of the argmax, on fresh rows, with the right text before it. 95 % intervals are bootstraps over seeds
and rows (seeds are drawn, and then rows of each). `fixed` and `broken` are tokens per 1,000 that the second pass turns
from wrong to right and from right to wrong, against the first pass of the same weights. `passes` is per token of the
answer part, `activated` parameters per token with all that is read. AUC is that of the decider's c against the labels
of the test rows, against being a sum, and against the labels among sums.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import record
from nextoken.model.hf import HFModel
from nextoken.model.next import Next
from nextoken.route import (
    AlwaysThink,
    Decider,
    DeciderRecipe,
    NeverThink,
    Seen,
    ThinkAtHard,
    ThinkRecipe,
    fit_decider,
    fit_thinking,
    passes_needed,
)
from training import character_tokenizer, train

MODULUS, DIGITS, GROUP = 7, 8, 2
GIVEN = 2 + DIGITS
"""Begin token, digits and `=`."""
SIZES = {"hidden": 64, "layers": 2, "heads": 4, "context": 32}
DRAWS = 2000


def task(count: int, seed: int) -> list[str]:
    """Texts. Of 8,000 with one seed and those of another, 0.14 % of the latter are among the former."""
    rng = np.random.default_rng(seed)
    texts = []
    for digits in rng.integers(0, MODULUS, (count, DIGITS)):
        groups = digits.reshape(-1, GROUP)
        answer = "".join("".join(map(str, group)) + str(group.sum() % MODULUS) for group in groups)
        texts.append("".join(map(str, digits)) + "=" + answer)
    return texts


class Noted(Decider):
    """Another decider, whose c is noted."""

    def __init__(self, decider: Decider) -> None:
        self.decider, self.layers, self.leading = decider, decider.layers, decider.leading
        self.said: list[torch.Tensor] = []

    @property
    def parameters(self) -> int:
        return self.decider.parameters

    def probability(self, seen: Seen) -> torch.Tensor:
        self.said.append(self.decider.probability(seen))
        return self.said[-1]


def right(said: Next, ids: torch.Tensor) -> np.ndarray:
    """Whether the argmax at each position of the answer part is the token that follows [rows, positions]."""
    found: np.ndarray = (said.log_probs().argmax(-1)[:, GIVEN - 1 : -1] == ids[:, GIVEN:]).numpy()
    return found


def is_sum() -> np.ndarray:
    """Which positions of the answer part have a sum next; the end token is left out."""
    place = np.arange(DIGITS + DIGITS // GROUP)
    found: np.ndarray = place % (GROUP + 1) == GROUP
    return found


def one_seed(seed: int, args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    rows = [[0, *tokenizer.encode(text, add_special_tokens=False)] for text in task(args.rows, 1000 + seed)]
    fresh = [[0, *tokenizer.encode(text, add_special_tokens=False)] for text in task(args.tests, 2000 + seed)]
    mask = [[place >= GIVEN for place in range(len(row))] for row in rows]
    base = train(
        rows, tokenizer=tokenizer, steps=args.base_steps, batch=32, lr=3e-3, seed=seed, loss_mask=mask, **SIZES
    )
    recipe = ThinkRecipe(steps=args.steps, batch=32, rate=1.5e-3, clip=1.0, rank=8, alpha=16.0, dropout=0.0)
    ones = [[1] * len(row) for row in rows]

    def trained(model: HFModel, passes: Any) -> ThinkAtHard:
        return fit_thinking(model, rows, passes, given=GIVEN, recipe=recipe, seed=seed).model

    none = trained(base, ones).with_decider(NeverThink())
    labels = passes_needed(none, rows, given=GIVEN)
    share = float(np.mean([label - 1 for row in labels for label in row[GIVEN - 1 : -1]]))
    coin = np.random.default_rng(seed)
    tossed = [[1] * (GIVEN - 1) + [1 + int(coin.random() < share) for _ in row[GIVEN - 1 :]] for row in rows]
    always = trained(base, [[2] * len(row) for row in rows]).with_decider(AlwaysThink())
    coins = trained(base, tossed)
    first = trained(base, labels)
    learning = DeciderRecipe(
        steps=args.decider_steps, batch=32, rate=2e-3, clip=1.0, width=64, blocks=2, dropout=0.1, leading=10
    )
    think = fit_decider(first, rows, labels, given=GIVEN, recipe=learning, seed=seed).model
    noted = Noted(think.decider)

    ids = torch.tensor(fresh)
    truth = torch.tensor(passes_needed(none, fresh, given=GIVEN))
    n = ids.shape[1]
    answered = torch.zeros(n, dtype=torch.bool)
    answered[GIVEN - 1 : -1] = True

    def drawn(chance: float, number: int) -> torch.Tensor:
        toss = torch.rand(ids.shape, generator=torch.Generator().manual_seed(number)) < chance
        return 1 + (toss & answered).long()

    def measured(model: ThinkAtHard, passes: torch.Tensor | None = None) -> dict[str, Any]:
        before = model.spent
        said = model.predict(ids) if passes is None else model.with_passes(ids, passes)
        cost = (model.spent - before).activated
        return {
            "right": right(said, ids),
            "first": right(model.with_passes(ids, torch.ones_like(ids)), ids),
            "passes": said.passes[:, GIVEN - 1 : -1].double().numpy(),
            "activated": cost,
        }

    arms = {
        "none": measured(none),
        "always": measured(always),
        "coins": measured(coins, drawn(share, seed)),
        "think": measured(think.with_decider(noted)),
    }
    used = float(arms["think"]["passes"].mean()) - 1
    arms["think+coins"] = measured(think, drawn(used, seed))
    arms["think+always"] = measured(think.with_decider(AlwaysThink()))
    arms["think+oracle"] = measured(think, truth)
    said_of_base = right(base.predict(ids), ids)
    arms = {"base": {**arms["none"], "right": said_of_base, "first": said_of_base}, **arms}
    return {
        "arms": arms,
        "share": share,
        "c": torch.cat(noted.said).view(ids.shape)[:, GIVEN - 1 : -1].double().numpy(),
        "hard": (truth[:, GIVEN - 1 : -1] == 2).numpy(),
    }


def interval(values: list[np.ndarray], others: list[np.ndarray] | None = None) -> dict[str, float]:
    """Mean over seeds and rows of values [rows, some], less the others', with a 95 % bootstrap interval over both."""
    per_row = [v.astype(float).mean(1) for v in values]
    if others is not None:
        per_row = [v - o.astype(float).mean(1) for v, o in zip(per_row, others, strict=True)]
    rng = np.random.default_rng(0)
    means = []
    for _ in range(DRAWS):
        seeds = rng.integers(0, len(per_row), len(per_row))
        means.append(np.mean([rng.choice(per_row[s], len(per_row[s])).mean() for s in seeds]))
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": round(float(np.mean(per_row)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def areas(labels: list[np.ndarray], c: list[np.ndarray]) -> list[float | None]:
    """Area under the ROC curve for each seed, None where all labels are alike."""
    pairs = zip(labels, c, strict=True)
    return [round(float(roc_auc_score(y.ravel(), x.ravel())), 4) if 0 < y.mean() < 1 else None for y, x in pairs]


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    sums = is_sum()
    figures: dict[str, Any] = {"arms": {}}
    think = [one["arms"]["think"]["right"] for one in found]
    for name in found[0]["arms"]:
        arms = [one["arms"][name] for one in found]
        said, first = ([arm[part] for arm in arms] for part in ("right", "first"))
        figures["arms"][name] = {
            "hard": interval([s[:, sums] for s in said]),
            "easy": interval([s[:, ~sums] for s in said]),
            "hard_of_think_less_this": interval([t[:, sums] for t in think], [s[:, sums] for s in said]),
            "fixed_per_1000": round(
                1000 * float(np.mean([(s & ~f).mean() for s, f in zip(said, first, strict=True)])), 1
            ),
            "broken_per_1000": round(
                1000 * float(np.mean([(f & ~s).mean() for s, f in zip(said, first, strict=True)])), 1
            ),
            "passes": round(float(np.mean([arm["passes"].mean() for arm in arms])), 3),
            "passes_at_sums": round(float(np.mean([arm["passes"][:, sums].mean() for arm in arms])), 3),
            "activated": round(float(np.mean([arm["activated"] for arm in arms]))),
            "hard_by_seed": [round(float(s[:, sums].mean()), 4) for s in said],
        }
    figures["share_of_hard_labels"] = [round(one["share"], 4) for one in found]
    hard, c = ([one[part] for one in found] for part in ("hard", "c"))
    figures["auc"] = {
        "labels": areas(hard, c),
        "sums": areas([np.broadcast_to(sums, x.shape) for x in c], c),
        "labels_among_sums": areas([y[:, sums] for y in hard], [x[:, sums] for x in c]),
    }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/results/think_at_hard.json"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8000, help="to learn from")
    parser.add_argument("--tests", type=int, default=400)
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--decider-steps", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = character_tokenizer("0123456789=")
    begin, found = time.process_time(), []
    for seed in range(args.seeds):
        found.append(one_seed(seed, args, tokenizer))
        seen = {name: round(float(arm["right"][:, is_sum()].mean()), 3) for name, arm in found[-1]["arms"].items()}
        print(f"seed {seed}, {time.process_time() - begin:.0f} s of processor time, sums right: {seen}", flush=True)
    figures = summary(found)
    figures["settings"] = {key: value for key, value in vars(args).items() if key != "json"}
    figures["processor_seconds"] = round(time.process_time() - begin)
    print(
        f"{'arm':14}{'hard':>24}{'easy':>9}{'think - this, hard':>27}{'fixed':>7}{'broken':>7}{'passes':>8}"
        f"{'activated':>11}"
    )
    for name, arm in figures["arms"].items():
        hard, less = (
            f"{part['mean']:.3f} [{part['low']:.3f}, {part['high']:.3f}]"
            for part in (arm["hard"], arm["hard_of_think_less_this"])
        )
        print(
            f"{name:14}{hard:>24}{arm['easy']['mean']:9.3f}{less:>27}{arm['fixed_per_1000']:7.1f}"
            f"{arm['broken_per_1000']:7.1f}{arm['passes']:8.3f}{arm['activated']:11,}"
        )
    print("AUC of c:", figures["auc"], "share of hard labels:", figures["share_of_hard_labels"])
    record.write(args.json, figures)


if __name__ == "__main__":
    main()

"""One draft with several exits (S2D) for two targets, beside drafts of fixed depth, fine-tuned sorted or plainly.

    python bench/sorted_draft.py --json bench/results/sorted_draft.json

`nano` (5 layers) is fine-tuned with exits after 1, 3 and 5 layers on passages of books and on sums with their answers,
and, as the control, with its last exit alone on the same rows in as many steps. Targets: `tiny` as it ships, and `tiny`
trained further on sums. No target is seen while the draft is trained.

Every system's length, floor and thresholds are chosen for its target by `choose_exits` on texts that the target wrote
after other passages and sums than those it is then asked; `sorted, adaptive` may also choose to leave at one depth
always, `sorted, exits that mix` may not. The costs it is given are measured here: of the draft's layers, heads and of
the rest of a guess, beside a pass of the target inside a network of `--times` its weights (see speculate.py), packed,
so that verifying costs little more than a plain pass. Systems of fixed depth have a floor too, so that what exits give
is told apart from what giving up gives.

Reported of every system, for prompts of both kinds: tokens per pass of the target; guesses per pass; mean depth of the
exit that a guess left at, layers run and products with the head per guess (catching up included, prompts left out), and
the weights that these activate; `cost`, passes of the target that a token cost by these counts at the measured prices,
with the 95 % bootstrap interval of its ratio to the whole sorted draft (`fixed 5`) over groups of prompts. At
temperature 0 every system must give the tokens of plain decoding. `depth_repetitive` is the mean depth of exits along
the quarter of the target's greedy texts that repeat themselves most, `depth_other` along the others, at thresholds of
0.3 and 0.4 whatever was chosen.

Wall-clock: the first target, large, alone and with the drafts, one row at a time, greedy; medians of three rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nextoken
from nextoken.decode.generate import prompt_tokens
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.model.base import ABSENT
from nextoken.model.exit_counts import ExitCounts
from nextoken.model.hf import HFModel
from nextoken.model.sorted_exits import SortedExits
from nextoken.speculate import (
    Chain,
    DraftCosts,
    DraftModel,
    ExitChoice,
    ExitReadings,
    SortedRecipe,
    Speculation,
    Tally,
    choose_exits,
    exit_losses,
    exit_readings,
    fit_sorted,
)
from record import write
from speculate import inflated, plain, repetitiveness, speculated, timed
from stopping import HELD_OUT, LEARNT, passages
from training import continue_training

EXITS = (1, 3, 5)
FIXED = {1: (0.0, 1.0), 3: (1.0, 0.0), 5: (1.0, 1.0)}
RULES = {"0": "greedy", "1": ""}
LENGTHS, FLOORS = range(1, 7), (0.0, 0.1, 0.2, 0.3, 0.5)
ALONG = (0.3, 0.4)
"""Thresholds for the depth along texts; where leaving early does not pay, those chosen would tell nothing of it."""
UNTIMED = ("plain, fixed 1", "plain, fixed 3", "sorted, fixed 3")
ROW = 64
"""Tokens of a row that is learnt from."""
MIXING = [(low, high) for low in (0.2, 0.4, 0.6, 0.8) for high in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
"""Thresholds with which some tokens may leave early and others not."""
Tokens = tuple[int, ...]


def sums(model: HFModel, data: Path, part: str, count: int) -> list[tuple[Tokens, Tokens]]:
    """Questions, and their answers with a line end before, as token ids."""
    lines = (data / "gsm8k" / f"{part}.jsonl").read_text().splitlines()[:count]
    entries = [json.loads(line) for line in lines]
    return [
        (prompt_tokens(model, entry["question"] + "\n"), tuple(model.vocab.encode(entry["answer"]).ids))
        for entry in entries
    ]


def books(model: HFModel, data: Path, names: Sequence[str], each: int, length: int) -> list[list[int]]:
    """Rows of `length` tokens from the middle of books."""
    rows = []
    for name in names:
        text = (data / "books" / f"{name}.txt").read_text()
        ids = model.vocab.encode(text[len(text) // 4 : len(text) // 4 + 8 * each * length]).ids
        cuts = range(0, len(ids) - length, length - 1)
        rows += [[model.vocab.bos_id, *ids[at : at + length - 1]] for at in cuts][:each]
    return rows


def pieces(texts: Sequence[tuple[Tokens, Tokens]], length: int) -> list[list[int]]:
    """Prompts and answers one after the other, cut into rows of at most `length` tokens; short ends are left out."""
    joined = [[*prompt, *answer] for prompt, answer in texts]
    cuts = [row[at : at + length] for row in joined for at in range(0, len(row), length - 1)]
    return [row for row in cuts if len(row) >= length // 4]


def written(model: HFModel, prompts: Sequence[Tokens], rule: str, tokens: int) -> list[Tokens]:
    """What a model says after each prompt."""
    return _said(Loop(model, max_rows=64), prompts, rule, tokens)


def _said(loop: Loop, prompts: Sequence[Tokens], rule: str, tokens: int) -> list[Tokens]:
    change = transform(rule)
    tickets = [
        loop.submit(Request(prompt, change, tokens, seed=seed, ignore_eos=True)) for seed, prompt in enumerate(prompts)
    ]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [tuple(found[ticket]) for ticket in tickets]


@dataclass(frozen=True)
class System:
    """A draft in a setting, and what was expected of it."""

    draft: SortedExits
    choice: ExitChoice

    def drafter(self) -> DraftModel:
        return self.choice.drafter(self.draft)


@dataclass(frozen=True)
class Counted:
    """What speculation did for a group of prompts."""

    tally: Tally
    spent: ExitCounts

    def cost(self, costs: DraftCosts) -> float:
        spent, tally = self.spent, self.tally
        drafting = costs.layer * spent.layers + costs.head * spent.heads + costs.look * sum(spent.told)
        return (tally.passes + costs.guess * tally.drafted + drafting) / tally.tokens


def counted(
    system: System, target: HFModel, group: Sequence[Tokens], rule: str, tokens: int, expected: Sequence[Tokens] | None
) -> Counted:
    drafter = system.drafter()
    model = drafter.model
    assert isinstance(model, SortedExits)
    speculation = Speculation(drafter)
    made = _said(speculation.loop(target), group, rule, tokens)
    assert speculation.tally.failures == 0
    assert expected is None or made == list(expected), "greedy decoding gave other tokens"
    alone = system.draft.at(model.thresholds)
    width = max(map(len, group))
    alone.predict([[*prompt, *[ABSENT] * (width - len(prompt))] for prompt in group])
    return Counted(speculation.tally, model.spent - alone.spent)


def figures_of(runs: Sequence[Counted], costs: DraftCosts, sizes: tuple[int, int]) -> dict[str, Any]:
    tally, spent = runs[0].tally, runs[0].spent
    for run in runs[1:]:
        spent = spent + run.spent
        tally = Tally(*(getattr(tally, part) + getattr(run.tally, part) for part in vars(tally)))
    looks = sum(spent.told)
    return {
        "tokens_per_pass": round(tally.tokens_per_pass, 3),
        "guesses_per_pass": round(tally.drafted / tally.passes, 2),
        "accepted_of_guesses": round(tally.accepted / max(1, tally.drafted), 3),
        "mean_depth": round(spent.mean_depth, 2),
        "layers_per_guess": round(spent.layers / looks, 2),
        "heads_per_guess": round(spent.heads / looks, 2),
        "weights_per_guess": round((spent.layers * sizes[0] + spent.heads * sizes[1]) / looks),
        "cost": round(Counted(tally, spent).cost(costs), 4),
    }


def ratio(runs: Sequence[Counted], base: Sequence[Counted], costs: DraftCosts) -> list[float]:
    """95 % bootstrap interval of the ratio of mean costs over groups, and the ratio."""
    ours, theirs = (np.array([run.cost(costs) for run in some]) for some in (runs, base))
    drawn_groups = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    drawn = ours[drawn_groups].mean(1) / theirs[drawn_groups].mean(1)
    return [round(float(x), 4) for x in (ours.mean() / theirs.mean(), *np.quantile(drawn, (0.025, 0.975)))]


def prices(draft: SortedExits, target: HFModel, large: HFModel, prompt: Tokens) -> DraftCosts:
    """Costs of the draft in passes of the large target, on the clock, one row at a time."""

    def guess(thresholds: tuple[float, float]) -> float:
        drafter = DraftModel(draft.at(thresholds), Chain(4))
        seconds = []
        for number in range(12):
            loop = Speculation(drafter).loop(target)
            loop.submit(Request(prompt[:60], transform("greedy"), 6, seed=number, ignore_eos=True))
            loop.step()
            row = loop._row(loop._rows[0], 0)
            seconds.append(timed(partial(drafter.propose, [row]))[0] / 4)
        return statistics.median(seconds)

    def passes(width: int) -> float:
        state, seconds = large.start(), []
        large.extend(state, [list(prompt[:60])])
        for _ in range(9):
            seconds.append(timed(lambda: large.extend(state, [list(prompt[:width])]).logits())[0])
            state.rewind(width)
        return statistics.median(seconds)

    unit, wide = passes(1), passes(5)
    first, whole, every = guess(FIXED[1]), guess(FIXED[5]), guess((1 - 1e-9, 1 - 1e-9))
    layer, head = (whole - first) / 4, max(0.0, (every - whole) / 2)
    look = max(0.0, first - layer - head)
    return DraftCosts(*(round(part / unit, 5) for part in (layer, head, look, max(0.0, (wide - unit) / 4))))


def systems_of(
    drafts: dict[str, SortedExits], target: HFModel, learnt: Sequence[Tokens], rule: str, tokens: int, costs: DraftCosts
) -> dict[str, System]:
    temperature = 0.0 if rule == "greedy" else 1.0
    texts = list(zip(learnt, written(target, learnt, rule, tokens), strict=True))
    readings: dict[str, ExitReadings] = {
        name: exit_readings(draft, target, texts, temperature=temperature) for name, draft in drafts.items()
    }
    choose = partial(choose_exits, costs=costs, lengths=LENGTHS, floors=FLOORS)
    found = {}
    for name, draft in drafts.items():
        for depth, thresholds in FIXED.items():
            if rule == "greedy" or depth == EXITS[-1]:
                found[f"{name}, fixed {depth}"] = System(draft, choose(readings[name], thresholds=[thresholds]))
    adaptive = choose(readings["sorted"], thresholds=[*FIXED.values(), *MIXING])
    found["sorted, adaptive"] = System(drafts["sorted"], adaptive)
    found["sorted, exits that mix"] = System(drafts["sorted"], choose(readings["sorted"], thresholds=MIXING))
    return found


def judged(
    drafts: dict[str, SortedExits],
    target: HFModel,
    learnt: Sequence[Tokens],
    groups: Sequence[Sequence[Tokens]],
    tokens: int,
    costs: DraftCosts,
    sizes: tuple[int, int],
) -> tuple[dict[str, Any], dict[str, System]]:
    """Figures of every system at each temperature, and the systems of greedy decoding."""
    found: dict[str, Any] = {}
    greedy: dict[str, System] = {}
    for temperature, rule in RULES.items():
        systems = systems_of(drafts, target, learnt, rule, tokens, costs)
        texts = [written(target, group, rule, tokens) for group in groups] if rule == "greedy" else [None] * len(groups)
        runs = {
            name: [counted(system, target, *pair) for pair in _paired(groups, rule, tokens, texts)]
            for name, system in systems.items()
        }
        rows: dict[str, Any] = {}
        for name, system in systems.items():
            choice = system.choice
            rows[name] = {
                "thresholds": list(choice.thresholds),
                "length": choice.length,
                "floor": choice.floor,
                "expected": {"cost": round(choice.cost, 4), "tokens_per_pass": round(choice.tokens_per_pass, 3)},
                **figures_of(runs[name], costs, sizes),
                "cost_to_fixed_5": ratio(runs[name], runs["sorted, fixed 5"], costs),
            }
            print(f"temperature {temperature} {name:34} {rows[name]}", flush=True)
        found[f"temperature {temperature}"] = rows
        if rule == "greedy":
            greedy = systems
            said = [pair for group, text in zip(groups, texts, strict=True) for pair in zip(group, text, strict=True)]
            found["depth_along_texts"] = depths(drafts["sorted"], said)
            print(found["depth_along_texts"], flush=True)
    return found, greedy


def _paired(groups: Sequence[Any], rule: str, tokens: int, texts: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(group, rule, tokens, text) for group, text in zip(groups, texts, strict=True)]


def depths(sorted_draft: SortedExits, said: Sequence[tuple[Tokens, Tokens]]) -> dict[str, Any]:
    """Mean depth of exits along texts, those that repeat themselves most apart."""
    draft = sorted_draft.at(ALONG)
    means = []
    for prompt, output in said:
        depth = draft.predict([[*prompt, *output[:-1]]]).depth[0, len(prompt) - 1 :]
        means.append(float(depth.float().mean()))
    order = np.argsort([-repetitiveness(output) for _, output in said], kind="stable")
    quarter = max(1, len(order) // 4)
    drawn = np.array(means)
    return {
        "thresholds": list(draft.thresholds),
        "depth_repetitive": round(float(drawn[order[:quarter]].mean()), 3),
        "depth_other": round(float(drawn[order[quarter:]].mean()), 3),
        "repetitive": round(float(np.mean([repetitiveness(said[i][1]) for i in order[:quarter]])), 3),
        "other": round(float(np.mean([repetitiveness(said[i][1]) for i in order[quarter:]])), 3),
        "correlation": round(float(np.corrcoef(means, [repetitiveness(output) for _, output in said])[0, 1]), 3),
    }


def clocked(large: HFModel, systems: dict[str, System], asked: Sequence[Tokens], tokens: int) -> dict[str, Any]:
    """Greedy tokens per second, medians of three rounds over all prompts."""
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *systems)}
    said = [plain(large, prompt, "greedy", tokens) for prompt in asked]
    for _ in range(3):
        seconds["plain"].append(sum(timed(partial(plain, large, prompt, "greedy", tokens))[0] for prompt in asked))
        for name, system in systems.items():
            speculation = Speculation(system.drafter())
            trials = [timed(partial(speculated, speculation, large, prompt, "greedy", tokens)) for prompt in asked]
            assert [made for _, made in trials] == said, f"{name} gave other tokens"
            seconds[name].append(sum(spent for spent, _ in trials))
    base = statistics.median(seconds["plain"])
    return {
        name: {
            "tokens_per_second": round(len(asked) * tokens / statistics.median(runs), 1),
            "speedup": round(base / statistics.median(runs), 3),
            "range": [round(base / edge, 3) for edge in (max(runs), min(runs))],
        }
        for name, runs in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=160, help="of fine-tuning the draft, sorted and plain")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--groups", type=int, default=4, help="groups of 8 prompts, half of them sums")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clock", type=int, default=2, help="prompts for wall-clock times")
    parser.add_argument("--json", default="bench/results/sorted_draft.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, tokens = arguments.data, arguments.tokens
    tiny, nano = nextoken.load("tiny"), nextoken.load("nano")
    assert isinstance(tiny, HFModel) and isinstance(nano, HFModel)

    answers = sums(nano, data, "train", 900)
    rows = [*books(nano, data, LEARNT, 200, ROW), *pieces(answers[:400], ROW)]
    held_out = [*books(nano, data, HELD_OUT, 12, ROW), *pieces(answers[-24:], ROW)]
    recipe = SortedRecipe(steps=arguments.steps, batch=8, rate=1e-3)
    drafts, figures = dict[str, SortedExits](), dict[str, Any](rows=len(rows), steps=recipe.steps)
    for name, exits in (("sorted", EXITS), ("plain", EXITS[-1:])):
        seconds, fit = timed(partial(fit_sorted, nano, rows, exits=exits, recipe=recipe, seed=0))
        model = fit.draft if name == "sorted" else SortedExits(fit.draft.model, EXITS, thresholds=FIXED[5])
        drafts[name] = model
        figures[f"{name}, nats by exit"] = [round(x, 3) for x in exit_losses(model, held_out)]
        figures[f"{name}, seconds_training"] = round(seconds, 1)
    before = SortedExits(nano, EXITS, thresholds=FIXED[5])
    figures["untrained, nats by exit"] = [round(x, 3) for x in exit_losses(before, held_out)]
    sizes = drafts["sorted"].stack.layer_parameters[0], drafts["sorted"].stack.head.weight.numel()
    figures["weights"] = {"layer": sizes[0], "head": sizes[1]}
    print(figures, flush=True)

    begun = time.perf_counter()
    further = continue_training(tiny, pieces(answers[:600], 96), steps=20, batch=4, name="tiny, on sums")
    figures["seconds_second_target"] = round(time.perf_counter() - begun, 1)

    learnt = [*passages(tiny, data, LEARNT, 16, 0), *(prompt for prompt, _ in answers[600:616])]
    tests = [prompt for prompt, _ in sums(tiny, data, "test", 4 * arguments.groups)]
    pages = passages(tiny, data, HELD_OUT, 4 * arguments.groups, 1)
    groups = [[*pages[at : at + 4], *tests[at : at + 4]] for at in range(0, len(tests), 4)]
    asked = [groups[at % len(groups)][(3 * at) % 8] for at in range(arguments.clock)]
    for target in (tiny, further):
        large = inflated(target, arguments.times).packed()
        costs = prices(drafts["sorted"], target, large, pages[0])
        print(target.name, costs, flush=True)
        found, systems = judged(drafts, target, learnt, groups, tokens, costs, sizes)
        figures[target.name] = {"costs": vars(costs), **found}
        if target is tiny:
            chosen = {name: system for name, system in systems.items() if name not in UNTIMED}
            figures[target.name]["clock"] = clocked(large, chosen, asked, tokens)
            print(figures[target.name]["clock"], flush=True)
        del large
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

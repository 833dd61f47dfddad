"""SkipDecode on `tiny`: held-out log-loss against layers per token, and the clock, beside what else leaves out layers.

    python bench/skip_decode.py --data ../shared/data --json bench/results/skip_decode.json

Passages of two held-out books: a prompt, then tokens whose loss counts, in nats per token. All rows of one budget go
through the same numbers of layers L_t; they differ in which:

    skip        the first layer and the top ones (SkipDecode), or with w = 0 the top ones alone
    cut         the lowest ones: an early exit that comes earlier and earlier
    coin        the first of a random order of all layers that is none of these; tuned, another for each budget

`layers` is the mean over the tokens that are said something after; `tuned` after so many steps under the schedule on
books that tiny was made from, the same steps, rows and rate for all, `whole` among them, so that what training on
such text does by itself is in the comparison. `gain` is the loss of another less that of `skip, tuned`, with a 95 %
bootstrap interval over passages; each was trained once, and the spread between trainings is not in it. tiny has
five layers and few to spare: with two of five a speed-up is 2.5 at most, and a fifth of its weights is the head. Some
seconds of training are far from what the paper's models had.

Clock: tiny with wide feed-forward blocks whose extra units add nothing, so that layers cost what they cost in larger
models. One text at a time is drawn greedily, prompt and overhead included: the median over repetitions that take turns.
`counted` is layer evaluations of the whole model over those of the schedule; `weights` the same with the head.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import record
from nextoken.decode.generate import generate
from nextoken.model.base import LanguageModel
from nextoken.model.hf import HFModel
from nextoken.model.loading import load
from nextoken.route.skip_decode import SkipDecode
from nextoken.route.skip_fit import SkipRecipe, fit_skips
from nextoken.route.skip_schedule import LayerSchedule, SkipSchedule, TruncationSchedule

HELD_OUT = ("frankenstein", "the-time-machine")
LEARNT = ("dracula", "emma", "great-expectations", "little-women", "the-war-of-the-worlds", "treasure-island")
PROMPT, TOKENS = 32, 64
BUDGETS = ((5, 3), (5, 1), (3, 1))
"""L_max and L_min."""
ORDERS, DRAWS = 3, 2000


@dataclass(frozen=True)
class CoinSchedule(LayerSchedule):
    """The first L_t layers of an order drawn by `seed`."""

    most: int
    least: int
    tokens: int
    seed: int

    def layers(self, t: int, depth: int) -> tuple[int, ...]:
        order = random.Random(self.seed).sample(range(depth), depth)
        return tuple(sorted(order[: SkipSchedule(self.most, self.least, self.tokens, warm=0).count(t)]))


def coins_unlike(others: tuple[LayerSchedule, ...], budget: tuple[int, int], depth: int) -> list[CoinSchedule]:
    """ORDERS coins, without those that happen to choose as another way does: of five layers there are few orders."""
    taken = [schedule.stages(depth) for schedule in others]
    drawn = (CoinSchedule(*budget, TOKENS, seed=seed) for seed in count())
    return list(islice((coin for coin in drawn if coin.stages(depth) not in taken), ORDERS))


def passages(model: HFModel, data: Path, books: tuple[str, ...], each: int) -> list[list[int]]:
    """Rows of the begin token and PROMPT + TOKENS - 1 tokens, evenly over the books."""
    rows = []
    for name in books:
        text = (data / "books" / f"{name}.txt").read_text(encoding="utf-8")
        for place in range(each):
            begin = len(text) * (place + 1) // (each + 2)
            ids = model.vocab.encode(text[begin : begin + 8 * (PROMPT + TOKENS)]).ids[1 : PROMPT + TOKENS]
            rows.append([model.vocab.bos_id or 0, *ids])
    return rows


def losses(model: LanguageModel, rows: list[list[int]]) -> np.ndarray:
    """Mean nats per token after the prompt, of each row."""
    ids = torch.tensor(rows)
    nats = model.predict(ids[:, :-1])[:, PROMPT - 1 :].statistics(ids[:, PROMPT:]).logprob
    assert nats is not None
    return -nats.double().mean(1).numpy()


def mean_layers(schedule: LayerSchedule, depth: int) -> float:
    """Over the last token of the prompt and all but the last of the others."""
    return depth / schedule.speedup(depth, prompt=1, generated=TOKENS - 1)


def told(row: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    chosen = np.random.default_rng(0).integers(0, len(row), (DRAWS, len(row)))

    def interval(values: np.ndarray) -> list[float]:
        return [round(float(edge), 3) for edge in np.quantile(values[chosen].mean(1), [0.025, 0.975])]

    gain = row - baseline
    return {
        "nats": round(float(row.mean()), 3),
        "interval": interval(row),
        "gain": round(float(gain.mean()), 3),
        "gain_interval": interval(gain),
    }


def quality(model: HFModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    test = passages(model, arguments.data, HELD_OUT, arguments.passages // len(HELD_OUT))
    rows = passages(model, arguments.data, LEARNT, -(-arguments.steps * arguments.batch // len(LEARNT)))
    recipe = SkipRecipe(steps=arguments.steps, batch=arguments.batch, rate=arguments.rate, prompts=(8, PROMPT + 8))
    depth = len(model.model.model.layers)

    def tuned(schedule: LayerSchedule) -> np.ndarray:
        return losses(fit_skips(model, schedule, rows, prompt=PROMPT, recipe=recipe)[0], test)

    def untuned(schedule: LayerSchedule) -> np.ndarray:
        return losses(SkipDecode(model, schedule, prompt=PROMPT), test)

    table = []
    every = SkipSchedule(depth, depth, TOKENS)
    for budget in (None, *BUDGETS):
        if budget is None:
            layers, found = float(depth), {"whole": untuned(every), "whole, tuned": tuned(every)}
            baseline = found["whole, tuned"]
        else:
            skip, alone = (SkipSchedule(*budget, TOKENS, warm=warm) for warm in (1, 0))
            cut = TruncationSchedule(*budget, TOKENS)
            coins = coins_unlike((skip, cut), budget, depth)
            layers = mean_layers(skip, depth)
            baseline = tuned(skip)
            found = {
                "skip": untuned(skip),
                "skip, w = 0": untuned(alone),
                "cut": untuned(cut),
                f"coin, mean of {ORDERS}": np.mean([untuned(coin) for coin in coins], 0),
                "skip, tuned": baseline,
                "skip, w = 0, tuned": tuned(alone),
                "cut, tuned": tuned(cut),
                "coin, tuned": tuned(coins[BUDGETS.index(budget)]),
            }
        print(f"\n{layers:.2f} layers of {depth}" + (f", from {budget[0]} to {budget[1]}" if budget else ""))
        for name, row in found.items():
            line = {"layers": round(layers, 2), "budget": budget, "way": name, **told(row, baseline)}
            table.append(line)
            print(
                f"    {name:26}{line['nats']:7.3f} {line['interval']!s:16}  gain {line['gain']:+.3f} "
                f"{line['gain_interval']}",
                flush=True,
            )
    return table


@torch.no_grad()
def widened(small: HFModel, width: int) -> HFModel:
    """The same distribution with feed-forward blocks of `width` units, of which the further ones add exactly zero."""
    large = LlamaForCausalLM(LlamaConfig(**small.model.config.to_dict() | {"intermediate_size": width})).float().eval()
    own, state = small.model.state_dict(), large.state_dict()
    for name, tensor in state.items():
        if "down_proj" in name:
            tensor.zero_()
        tensor[tuple(slice(size) for size in own[name].shape)] = own[name]
    large.load_state_dict(state)
    model = HFModel(large, small.tokenizer, name=f"{small.name}, {width} wide")
    ids = torch.randint(2, small.vocab.size, (1, 40), generator=torch.Generator().manual_seed(1))
    gap = float((model.predict(ids).log_probs() - small.predict(ids).log_probs()).abs().max())
    assert gap < 1e-3, f"the wide model says something else, by {gap}"
    return model


def clock(small: HFModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    wide = widened(small, arguments.width)
    depth = len(wide.model.model.layers)
    text = small.vocab.decode(passages(small, arguments.data, HELD_OUT[:1], 1)[0][1:PROMPT]).decode()
    schedules = [SkipSchedule(most, least, TOKENS) for most, least in ((depth, depth), *BUDGETS)]
    models: list[LanguageModel] = [wide, *(SkipDecode(wide, schedule, prompt=PROMPT) for schedule in schedules)]
    seconds: list[list[float]] = [[] for _ in models]
    for repetition in range(arguments.repetitions + 1):
        for model, times in zip(models, seconds, strict=True):
            begun = time.perf_counter()
            generate(model, text, max_tokens=TOKENS, transform="greedy", ignore_eos=True)
            if repetition:  # the first warms up
                times.append(time.perf_counter() - begun)
    table, full = [], statistics.median(seconds[0])
    print(
        f"\n{wide.name}: {PROMPT} tokens of prompt, {TOKENS} drawn, one text at a time, {arguments.repetitions} times"
    )
    for model, times in zip(models, seconds, strict=True):
        line: dict[str, Any] = {"model": model.name, "seconds": round(statistics.median(times), 3)}
        line["clock"] = round(full / line["seconds"], 2)
        line["clock_range"] = [round(full / edge, 2) for edge in (max(times), min(times))]
        if isinstance(model, SkipDecode):
            evaluations = sum(part.read for part in model.spent.models[:-1])
            line["budget"] = [model.schedule.most, model.schedule.least]  # type: ignore[attr-defined]
            line["counted"] = round(depth * model.spent.models[-1].read / evaluations, 2)
            line["weights"] = round(sum(part.parameters or 0 for part in model.spent.models) / model.spent.activated, 2)
        table.append(line)
        print(
            f"    {line['model']:30}{line.get('budget', '')!s:8}{line['seconds']:7.3f} s  clock x{line['clock']:.2f} "
            f"{line['clock_range']}  counted x{line.get('counted', 1.0):.2f}  weights x{line.get('weights', 1.0):.2f}"
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--passages", type=int, default=40, help="held out, of two books")
    parser.add_argument("--steps", type=int, default=40, help="of each fine-tuning")
    parser.add_argument("--batch", type=int, default=4, help="rows of each step")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--width", type=int, default=8192, help="of the feed-forward blocks that are timed")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", default="bench/results/skip_decode.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load("tiny")
    assert isinstance(model, HFModel)
    figures = {
        "setting": {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "data")}
        | {"prompt": PROMPT, "tokens": TOKENS},
        "quality": quality(model, arguments),
        "clock": clock(model, arguments),
    }
    record.write(arguments.json, figures)


if __name__ == "__main__":
    main()

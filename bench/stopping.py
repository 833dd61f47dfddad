"""Drafts that stop by a learnt head (SpecDec++) beside drafts of fixed length and drafts that stop by confidence.

    python bench/stopping.py --json bench/results/stopping.json

`nano` drafts for `tiny` at temperature 1. The head is trained on texts that `tiny` wrote after passages of some books;
all drafting is done after passages of others. Reported of the head: how far its chances are from those that guesses
had (KL in nats, beside the best constant), and its calibration, as trained and with the weight of rejections undone.

Reported of every setting: tokens and accepted guesses per pass of the target, guesses per pass, and discarded guesses
per token. A token costs (guesses c + passes) / tokens, c being a guess's cost in passes of the target. For each c the
best setting of each family is chosen on one half of the passages and measured on the other, so that a family gains
nothing from having more settings; intervals are 95 % bootstrap intervals over groups of passages, of the ratio to the
chosen fixed length on the same groups. Drafts that stop where the draft itself was not sure of its last token
(`Chain(8, confidence=...)`) need no training and are the control.

Wall-clock: the target is `tiny` inside a network of twenty times its weights (see speculate.py), one row at a time, by
the settings chosen for the c measured there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
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
from nextoken.model.hf import HFModel
from nextoken.speculate import (
    AcceptanceExample,
    AcceptanceHead,
    AcceptanceRecipe,
    Chain,
    Drafter,
    DraftModel,
    Speculation,
    StoppingDraft,
    StoppingRule,
    acceptance_examples,
    fit_acceptance,
    predicted_chances,
)
from record import write
from speculate import inflated, plain, speculated, timed

LEARNT = ("dracula", "emma", "jane-eyre", "moby-dick-or-the-whale", "treasure-island", "war-and-peace")
HELD_OUT = ("frankenstein", "great-expectations", "middlemarch", "the-time-machine")
LENGTHS = range(1, 9)
THRESHOLDS = {6.0: (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.997), 1.0: (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)}
"""By the weight of rejections: with 6 the chances told are too low, so that long drafts need a high threshold."""
CONFIDENCES = (0.001, 0.003, 0.01, 0.03, 0.1)
COSTS = (0.02, 0.05, 0.1, 0.2)
MOST = 8


def passages(model: HFModel, data: Path, books: Sequence[str], count: int, seed: int) -> list[tuple[int, ...]]:
    """Token ids of `count` passages of 200 characters, from places drawn at random."""
    source = np.random.default_rng(seed)
    found = []
    for number in range(count):
        text = (data / "books" / f"{books[number % len(books)]}.txt").read_text()
        place = int(source.integers(len(text) // 10, len(text) - 1000))
        found.append(prompt_tokens(model, text[place : place + 200]))
    return found


def written(model: HFModel, prompts: Sequence[tuple[int, ...]], tokens: int, seed: int) -> list[tuple[Any, Any]]:
    """Prompts and what the model says after them, at temperature 1."""
    loop = Loop(model, max_rows=64)
    requests = [Request(prompt, transform(""), tokens, seed=seed + number) for number, prompt in enumerate(prompts)]
    tickets = [loop.submit(request) for request in requests]
    said: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        said[piece.ticket].append(piece.token)
    return [(prompt, tuple(said[ticket])) for prompt, ticket in zip(prompts, tickets, strict=True)]


def judged(
    head: AcceptanceHead, draft: HFModel, examples: Sequence[AcceptanceExample], weight: float
) -> dict[str, Any]:
    """How far the head's chances on these examples are from those that the guesses had."""
    told, chances = predicted_chances(head, draft, examples)
    odds = told.double() - torch.log(-torch.expm1(told.double()))
    undone = torch.sigmoid(odds + np.log(weight))

    def divergence(a: torch.Tensor) -> float:
        y = chances.double()
        cross = -(torch.special.xlogy(y, a) + torch.special.xlogy(1 - y, 1 - a))
        return float((cross - torch.special.entr(y) - torch.special.entr(1 - y)).mean())

    mean = chances.double().mean().expand(len(chances))
    figures = {
        "guesses": len(chances),
        "mean_chance": round(float(mean[0]), 4),
        "kl_constant": round(divergence(mean), 4),
        "kl_as_trained": round(divergence(told.double().exp()), 4),
        "kl_weight_undone": round(divergence(undone), 4),
    }
    for name, values in (("as_trained", told.double().exp()), ("weight_undone", undone)):
        bins = torch.argsort(values).chunk(5)
        figures[f"told_{name}"] = [round(float(values[some].mean()), 3) for some in bins]
        figures[f"was_{name}"] = [round(float(chances[some].mean()), 3) for some in bins]
    return figures


@dataclass(frozen=True)
class Counts:
    """Of each group of passages: passes, tokens, guesses, accepted guesses, all [G]."""

    passes: np.ndarray
    tokens: np.ndarray
    guesses: np.ndarray
    accepted: np.ndarray

    def cost(self, price: float, groups: np.ndarray) -> float:
        """Of a token, in passes of the target."""
        return float((self.guesses[groups].sum() * price + self.passes[groups].sum()) / self.tokens[groups].sum())

    def figures(self) -> dict[str, float]:
        passes, tokens = self.passes.sum(), self.tokens.sum()
        return {
            "tokens_per_pass": round(float(tokens / passes), 3),
            "accepted_per_pass": round(float(self.accepted.sum() / passes), 3),
            "guesses_per_pass": round(float(self.guesses.sum() / passes), 3),
            "discarded_per_token": round(float((self.guesses - self.accepted).sum() / tokens), 3),
        }


def counted(
    target: HFModel, drafter: Callable[[], Drafter], groups: Sequence[Sequence[tuple[int, ...]]], tokens: int
) -> Counts:
    rows = []
    for number, prompts in enumerate(groups):
        speculation = Speculation(drafter())
        loop = speculation.loop(target)
        for place, prompt in enumerate(prompts):
            loop.submit(Request(prompt, transform(""), tokens, seed=1000 * number + place, ignore_eos=True))
        for _ in loop.run():
            pass
        tally = speculation.tally
        assert tally.failures == 0
        rows.append((tally.passes, tally.tokens, tally.drafted, tally.accepted))
    return Counts(*np.array(rows, dtype=float).T)


def chosen(families: dict[str, dict[str, Counts]], price: float, halves: Sequence[np.ndarray]) -> dict[str, Any]:
    """The best setting of each family on the first half, and its cost on the second."""
    first, second = halves
    best = {
        name: min(settings, key=lambda one: settings[one].cost(price, first)) for name, settings in families.items()
    }
    source = np.random.default_rng(0)
    draws = [source.choice(second, len(second)) for _ in range(2000)]
    fixed = families["fixed"][best["fixed"]]
    found: dict[str, Any] = {}
    for name, setting in best.items():
        counts = families[name][setting]
        ratios = [counts.cost(price, some) / fixed.cost(price, some) for some in draws]
        found[name] = {
            "setting": setting,
            "cost_per_token": round(counts.cost(price, second), 4),
            "ratio_to_fixed": round(counts.cost(price, second) / fixed.cost(price, second), 4),
            "interval": [round(float(edge), 4) for edge in np.quantile(ratios, (0.025, 0.975))],
        }
    return found


def clocked(
    target: HFModel, drafters: dict[str, Callable[[], Drafter]], asked: Sequence[tuple[int, ...]], tokens: int
) -> dict[str, Any]:
    """Tokens per second at temperature 1, medians of three runs over all prompts."""
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *drafters)}
    for _ in range(3):
        seconds["plain"].append(sum(timed(partial(plain, target, p, "", tokens))[0] for p in asked))
        for name, make in drafters.items():
            speculation = Speculation(make())
            seconds[name].append(sum(timed(partial(speculated, speculation, target, p, "", tokens))[0] for p in asked))
    middle = {name: statistics.median(runs) for name, runs in seconds.items()}
    return {
        name: {
            "tokens_per_second": round(len(asked) * tokens / value, 1),
            "speedup": round(middle["plain"] / value, 3),
            "range": [round(middle["plain"] / edge, 3) for edge in (max(seconds[name]), min(seconds[name]))],
        }
        for name, value in middle.items()
    }


def price_of(target: HFModel, draft: HFModel, prompt: tuple[int, ...]) -> float:
    """Seconds of a guess over seconds of a pass that verifies four."""

    def pass_time(model: HFModel, width: int) -> float:
        state, times = model.start(), []
        model.extend(state, [list(prompt)])
        for _ in range(30):
            begun = time.perf_counter()
            model.extend(state, [list(prompt[:width])]).logits()
            times.append(time.perf_counter() - begun)
            state.rewind(width)
        return statistics.median(times)

    return pass_time(draft, 1) / pass_time(target, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--texts", type=int, default=320, help="texts that the head learns from")
    parser.add_argument("--groups", type=int, default=10, help="groups of 24 held-out passages")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--json", default="bench/results/stopping.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target, draft = nextoken.load("tiny"), nextoken.load("nano")
    assert isinstance(target, HFModel) and isinstance(draft, HFModel)

    begun = time.perf_counter()
    texts = written(target, passages(target, arguments.data, LEARNT, arguments.texts, 0), 64, 0)
    examples = acceptance_examples(target, draft, texts, seed=0)
    made = time.perf_counter() - begun
    fresh = written(target, passages(target, arguments.data, HELD_OUT, 96, 5), 64, 7)
    held_out = acceptance_examples(target, draft, fresh, seed=9)
    figures: dict[str, Any] = {"texts": len(texts), "seconds_examples": round(made, 1)}
    heads: dict[float, AcceptanceHead] = {}
    for weight in THRESHOLDS:
        recipe, head = AcceptanceRecipe(epochs=6, reject_weight=weight), AcceptanceHead.on(draft, seed=0)
        spent, losses = timed(partial(fit_acceptance, head, draft, examples, recipe=recipe, seed=0))
        figures[f"head, weight {weight:g}"] = {
            "seconds_training": round(spent, 1),
            "steps": len(losses),
            "held_out": judged(head, draft, held_out, weight),
        }
        heads[weight] = head
    print(figures, flush=True)

    prompts = passages(target, arguments.data, HELD_OUT, 24 * arguments.groups, 1)
    groups = [prompts[start : start + 24] for start in range(0, len(prompts), 24)]
    families: dict[str, dict[str, Callable[[], Drafter]]] = {
        "fixed": {f"K={k}": partial(DraftModel, draft, Chain(k)) for k in LENGTHS},
        "confidence": {f"c={c}": partial(DraftModel, draft, Chain(MOST, confidence=c)) for c in CONFIDENCES},
    }
    for weight, head in heads.items():
        families[f"head, weight {weight:g}"] = {
            f"h={h}": partial(StoppingDraft, draft, head, StoppingRule(h, most=MOST)) for h in THRESHOLDS[weight]
        }
    found: dict[str, dict[str, Counts]] = {}
    figures["settings"] = {}
    for name, settings in families.items():
        found[name] = {key: counted(target, make, groups, arguments.tokens) for key, make in settings.items()}
        for key, counts in found[name].items():
            figures["settings"][f"{name}, {key}"] = counts.figures()
            print(f"{name:16} {key:8} {counts.figures()}", flush=True)
    order = np.random.default_rng(2).permutation(len(groups))
    halves = [np.sort(order[: len(groups) // 2]), np.sort(order[len(groups) // 2 :])]
    figures["at_cost"] = {str(price): chosen(found, price, halves) for price in COSTS}

    large = inflated(target, arguments.times)
    price = price_of(large, draft, prompts[0])
    picks = chosen(found, price, halves)
    drafters = {f"{name}, {pick['setting']}": families[name][pick["setting"]] for name, pick in picks.items()}
    figures["clock"] = {
        "price_of_a_guess": round(price, 4),
        "expected": picks,
        **clocked(large, drafters, prompts[::60][:3], arguments.tokens),
    }
    for price_told, picks in (*figures["at_cost"].items(), ("clock", figures["clock"])):
        print(price_told, picks, flush=True)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

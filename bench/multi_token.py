"""Multi-token prediction with gated LoRA: what one pass of the target gives, and what it costs.

    python bench/multi_token.py --json bench/results/multi_token.json

An adapter for the bundled `tiny` is trained on the spot, in `--steps` steps, on what `tiny` itself writes at
temperature 0 after beginnings of passages (books, and the valid part of wikitext2); a second one likewise without the
consistency loss, a third one with it on the passages themselves. None sees the prompts: Spec-Bench, GSM8K, and passages
of a book that is left out of training. Each prompt is continued by `--tokens` tokens at temperature 0.

Reported for k = 2 and 4 and both expansions: tokens per pass of the target, with a 95 % interval from a bootstrap over
prompts; how often the guess at place j stands where those before it stood; the same with the sampler head left out and
for the other adapters; and, as controls that take no training, prompt lookup and the bundled `nano` as a draft.
Then the clock, on a network of `--times` the weights that says the same (see bench/speculate.py). Every system must
give the tokens of plain decoding.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nextoken
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.model.base import LanguageModel
from nextoken.model.hf import HFModel
from nextoken.model.multi_token import MultiToken
from nextoken.model.multi_token_adapter import MultiTokenAdapter
from nextoken.model.next import Next
from nextoken.speculate import Chain, Draft, Drafter, DraftModel, PromptLookup, Row, Speculation
from nextoken.speculate.multi_token_draft import MultiTokenDraft
from nextoken.speculate.multi_token_fit import MultiTokenRecipe, fit_multi_token
from record import write
from speculate import inflated, plain, prompts, speculated, timed

BOOKS = ("emma", "dracula", "moby-dick-or-the-whale", "middlemarch", "great-expectations", "jane-eyre")
MASKS, RANK = 4, 16
KINDS = ("Spec-Bench", "GSM8K", "book")


class Counted(Drafter):
    """A drafter of chains; for each place of a chain, how often a guess there was verified and how often it stood, and
    for each row how many passes it took.

    A guess after one that fell counts as not verified.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.needs_trees = drafter, drafter.needs_trees
        self.verified, self.stood, self.passes = [0] * 16, [0] * 16, Counter[int]()

    def check(self, target: LanguageModel) -> None:
        self.drafter.check(target)

    def prompted(self, rows: Sequence[Row], said: Next) -> None:
        self.drafter.prompted(rows, said)

    def propose(self, rows: Sequence[Row]) -> Draft:
        return self.drafter.propose(rows)

    def observe(self, rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        for row, branches, nodes in zip(rows, draft.rows, accepted, strict=True):
            self.passes[row.running.ticket] += 1
            for place in range(min(len(branches), len(nodes) + 1)):
                self.verified[place] += 1
                self.stood[place] += place < len(nodes)
        self.drafter.observe(rows, draft, said, accepted)

    def leave(self, ticket: int) -> None:
        self.drafter.leave(ticket)


class Unsampled(MultiTokenDraft):
    """Guesses straight from the masks, without the sampler head: none knows the one before it."""

    def told(self, previous: Tensor, states: Tensor) -> Tensor:
        return states


def texts(model: HFModel, data: Path, length: int) -> list[list[int]]:
    """Rows of `length` tokens, begin token included."""
    passages = [(data / "books" / f"{name}.txt").read_text()[5_000:205_000] for name in BOOKS]
    passages.append((data / "wikitext2" / "valid.txt").read_text())
    rows = []
    for passage in passages:
        ids = list(model.vocab.encode(passage).ids)
        rows += [[0, *ids[start : start + length - 1]] for start in range(0, len(ids) - length, length)]
    return rows


def continued(model: HFModel, starts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Rows, each with the tokens that the model puts after it at temperature 0."""
    loop = Loop(model, max_rows=128)
    rows = {loop.submit(Request(tuple(row), transform("greedy"), tokens, ignore_eos=True)): list(row) for row in starts}
    for piece in loop.run():
        rows[piece.ticket].append(piece.token)
    return list(rows.values())


def fitted(model: HFModel, rows: Sequence[Sequence[int]], recipe: MultiTokenRecipe) -> tuple[MultiTokenAdapter, Any]:
    adapter = MultiTokenAdapter(model, masks=MASKS, rank=RANK)
    begun, spent = time.perf_counter(), time.process_time()
    losses = fit_multi_token(
        adapter, rows, recipe=recipe, on_step=lambda step: step.step % 20 == 0 and print(step, flush=True)
    )
    edge = max(1, len(losses) // 10)
    return adapter, {
        "steps": recipe.steps,
        "processor_seconds": round(time.process_time() - spent, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "loss_first_and_last_tenth": [round(statistics.mean(part), 2) for part in (losses[:edge], losses[-edge:])],
    }


def judged(
    target: LanguageModel, make: Callable[[], Drafter], asked: Sequence[Sequence[int]], said: Sequence[list[int]]
) -> dict[str, Any]:
    """Tokens per pass over all prompts and by kind, and acceptance by place; the tokens must be those of `said`."""
    counted = Counted(make())
    speculation = Speculation(counted)
    loop = speculation.loop(target)
    made: dict[int, list[int]] = {
        loop.submit(Request(tuple(prompt), transform("greedy"), len(expected), ignore_eos=True)): []
        for prompt, expected in zip(asked, said, strict=True)
    }
    for piece in loop.run():
        made[piece.ticket].append(piece.token)
    assert list(made.values()) == list(said), "not the model's tokens"
    assert speculation.tally.failures == 0
    # The first token of each comes of reading its prompt.
    tallies = [(len(tokens) - 1, counted.passes[ticket]) for ticket, tokens in made.items()]
    draw, rates = random.Random(0), []
    for _ in range(2000):
        some = draw.choices(tallies, k=len(tallies))
        rates.append(sum(tokens for tokens, _ in some) / sum(passes for _, passes in some))
    rates.sort()
    each = len(asked) // len(KINDS)
    kinds = {kind: tallies[each * number : each * (number + 1)] for number, kind in enumerate(KINDS)}
    return {
        "tokens_per_pass": round(sum(t for t, _ in tallies) / sum(p for _, p in tallies), 3),
        "interval": [round(rates[50], 3), round(rates[-51], 3)],
        "by_kind": {kind: round(sum(t for t, _ in some) / sum(p for _, p in some), 2) for kind, some in kinds.items()},
        "stands_at_place": [
            round(stood / verified, 3)
            for stood, verified in zip(counted.stood, counted.verified, strict=True)
            if verified
        ],
        "verified_at_place": [verified for verified in counted.verified if verified],
    }


@torch.no_grad()
def transplanted(adapter: MultiTokenAdapter, target: HFModel) -> MultiTokenAdapter:
    """The same adapter on an inflated model: nothing is added at the units and layers that add nothing."""
    large = MultiTokenAdapter(target, masks=MASKS, rank=RANK)
    given = adapter.state_dict()
    for name, weight in large.state_dict().items():
        if name not in given:
            weight.zero_()
        elif weight.shape == given[name].shape:
            weight.copy_(given[name])
        else:
            weight.zero_()
            weight[tuple(slice(0, size) for size in given[name].shape)] = given[name]
    tokens, nodes = torch.arange(2, 22)[None], torch.tensor([[3, 10, 19]])
    gap = (large.ahead(tokens, nodes)[1] - adapter.ahead(tokens, nodes)[1]).abs().max()
    assert float(gap) < 1e-2, f"the masks say something else on the inflated model, by {float(gap)}"
    return large.eval()


def clocked(
    target: HFModel, adapter: MultiTokenAdapter, draft: HFModel, asked: Sequence[Sequence[int]], tokens: int
) -> dict[str, Any]:
    """Tokens per second of each system for the same prompts, one after the other.

    Passes of several tokens are made with packed weights, which do nothing for plain decoding.
    """
    packed = target.packed()
    adapter = transplanted(adapter, packed)
    systems: dict[str, tuple[LanguageModel, Callable[[], Drafter] | None]] = {"plain": (target, None)}
    for k in (2, 4):
        for expansion in ("quadratic", "linear"):
            one = MultiToken(adapter, masks=k, expansion=expansion)  # type: ignore[arg-type]
            systems[f"{expansion}, k = {k}"] = one, lambda one=one: MultiTokenDraft(one)  # type: ignore[misc]
    systems["prompt lookup"] = packed, PromptLookup
    systems["nano, chain of 4"] = packed, lambda: DraftModel(draft, Chain(4))
    plain(target, asked[0], "greedy", 4)
    seconds: dict[str, float] = dict.fromkeys(systems, 0.0)
    for prompt in asked:
        expected: list[int] = []
        for name, (model, make) in systems.items():
            if make is None:
                spent, expected = timed(lambda prompt=prompt: plain(target, prompt, "greedy", tokens))
            else:
                speculation = Speculation(make())
                spent, made = timed(
                    lambda prompt=prompt, model=model, speculation=speculation: speculated(
                        speculation, model, prompt, "greedy", tokens
                    )
                )
                assert made == expected, name
            seconds[name] += spent
    return {
        name: {
            "tokens_per_second": round(len(asked) * tokens / spent, 1),
            "speedup": round(seconds["plain"] / spent, 2),
        }
        for name, spent in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--each", type=int, default=6, help="prompts of each of the three kinds")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--times", type=int, default=12)
    parser.add_argument("--json", default="bench/results/multi_token.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny, nano = nextoken.load("tiny"), nextoken.load("nano")
    assert isinstance(tiny, HFModel) and isinstance(nano, HFModel)
    passages = texts(tiny, arguments.data, 96)
    begun = time.process_time()
    starts = random.Random(0).sample([row[:17] for row in passages], 8 * arguments.steps)
    own_words = continued(tiny, starts, 79)
    written = round(time.process_time() - begun, 1)
    recipe = MultiTokenRecipe(steps=arguments.steps, batch=8, blocks=24, rate=5e-3)
    whole, trained = fitted(tiny, own_words, recipe)
    inconsistent, second = fitted(tiny, own_words, replace(recipe, consistency=0))
    bookish, third = fitted(tiny, passages, recipe)
    asked = prompts(tiny, arguments.data, arguments.each, 160)
    said = [plain(tiny, prompt, "greedy", arguments.tokens) for prompt in asked]

    def own(adapter: MultiTokenAdapter, k: int, expansion: str, kind: type[MultiTokenDraft]) -> dict[str, Any]:
        target = MultiToken(adapter, masks=k, expansion=expansion)  # type: ignore[arg-type]
        return judged(target, lambda: kind(target), asked, said)

    rates: dict[str, Any] = {}
    for k in (2, 4):
        for expansion in ("quadratic", "linear"):
            rates[f"{expansion}, k = {k}"] = own(whole, k, expansion, MultiTokenDraft)
    rates["quadratic, k = 4, sampler head left out"] = own(whole, 4, "quadratic", Unsampled)
    rates["quadratic, k = 4, no consistency loss"] = own(inconsistent, 4, "quadratic", MultiTokenDraft)
    rates["quadratic, k = 4, neither"] = own(inconsistent, 4, "quadratic", Unsampled)
    rates["quadratic, k = 4, trained on passages"] = own(bookish, 4, "quadratic", MultiTokenDraft)
    rates["quadratic, k = 4, not trained"] = own(
        MultiTokenAdapter(tiny, masks=MASKS, rank=RANK).eval(), 4, "quadratic", MultiTokenDraft
    )
    rates["prompt lookup"] = judged(tiny, PromptLookup, asked, said)
    rates["nano, chain of 4"] = judged(tiny, lambda: DraftModel(nano, Chain(4)), asked, said)
    for name, row in rates.items():
        print(f"{name:42} {row['tokens_per_pass']:.3f} {row['interval']} {row['by_kind']} {row['stands_at_place']}")
    target = inflated(tiny, arguments.times)
    some = asked[:: arguments.each]
    clock = clocked(target, whole, nano, some, arguments.tokens)
    for name, row in clock.items():
        print(f"{name:42} {row}")
    figures = {
        "adapter_parameters": sum(weight.numel() for weight in whole.parameters()),
        "model_parameters": sum(weight.numel() for weight in tiny.model.parameters()),
        "prompts": len(asked),
        "tokens": arguments.tokens,
        "same_tokens_as_plain_decoding": "all",
        "training": {
            "processor_seconds_of_writing": written,
            "whole": trained,
            "no consistency loss": second,
            "on passages": third,
        },
        "rates": rates,
        "clock": {"parameters": sum(p.numel() for p in target.model.parameters()), "prompts": len(some)} | clock,
    }
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

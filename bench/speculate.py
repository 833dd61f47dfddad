"""Speculative decoding beside plain decoding and beside transformers' own, on one target in one run.

    python bench/speculate.py --json bench/results/speculate.json

The target is the bundled `tiny` inside a network of `--times` its weights: its layers have more intermediate units and
there are more layers, all of which add exactly zero, so that the distribution is that of `tiny` at the cost of a larger
model. Equality is checked first. Drafts are `nano`, and what needs no model. Prompts: Spec-Bench, GSM8K, and the
beginnings of passages of books; each is continued by `--tokens` tokens at temperature 0 and 1.

Speculation runs on the target with packed weights (`HFModel.packed`), with which a pass of several tokens costs little
more than one; plain decoding gains nothing from it. Rows of weights as they lie say so, and transformers is measured
both ways too, with our packing lent to it.

Reported per system: tokens per pass of the target, tokens per second, and the speed-up over plain decoding of the same
prompts (medians over `--rounds`); `repetitive` is the same for the prompts in which the continuation at temperature 0
repeats itself most. At temperature 0 every system must give the tokens of plain decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nextoken
from nextoken.decode.generate import prompt_tokens
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.model.hf import HFModel
from nextoken.speculate import (
    Auto,
    Branching,
    Chain,
    DraftModel,
    Dynamic,
    Follow,
    PromptLookup,
    Recycling,
    Speculation,
    Stand,
    StochasticBeam,
    SuffixAutomaton,
)
from record import write

SMALL_TREE = ((6,), (3, 2, 1), (2, 1, 1), (1, 1), (1,))
"""A tree for recycling of 18 nodes: on a processor a pass of 81 tokens costs several of one."""
LEAST_TREE = ((3,), (2, 1), (1, 1), (1,))
"""One of 9 nodes."""


@torch.no_grad()
def inflated(small: HFModel, times: int) -> HFModel:
    """The same distribution from about `times` the weights: units and layers that add exactly zero."""
    source = small.model
    config = source.config
    weights = sum(parameter.numel() for parameter in source.parameters())
    layers = 2 * config.num_hidden_layers
    wide = int(times * weights / (3 * config.hidden_size * layers)) // 16 * 16
    settings = config.to_dict() | {"intermediate_size": wide, "num_hidden_layers": layers}
    torch.manual_seed(0)
    large = LlamaForCausalLM(LlamaConfig(**settings)).float().eval()
    own = source.state_dict()
    state = large.state_dict()
    for name, tensor in state.items():
        known = own.get(name)
        if known is not None and known.shape == tensor.shape:
            tensor.copy_(known)
        elif known is not None and "down_proj" in name:
            tensor.zero_()
            tensor[:, : known.shape[1]] = known
        elif known is not None:
            tensor[: known.shape[0]] = known
        elif "down_proj" in name or "o_proj" in name:
            tensor.zero_()
    large.load_state_dict(state)
    model = HFModel(large, small.tokenizer, name=f"{small.name} x {times}")
    ids = torch.randint(2, small.vocab.size, (1, 40), generator=torch.Generator().manual_seed(1))
    gap = (model.predict(ids).log_probs() - small.predict(ids).log_probs()).abs().max()
    assert float(gap) < 1e-3, f"the inflated model says something else, by {float(gap)}"
    return model


def prompts(model: HFModel, data: Path, each: int, room: int) -> list[tuple[int, ...]]:
    """Token ids of `each` prompts of each kind."""
    bench = [json.loads(line) for line in (data / "specbench" / "question.jsonl").read_text().splitlines()]
    bench = [entry["turns"][0] for entry in bench]
    sums = [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    book = (data / "books" / "frankenstein.txt").read_text()
    texts = bench[:: max(1, len(bench) // each)][:each]
    texts += [entry["question"] + "\n" for entry in sums[:each]]
    texts += [book[place : place + 400] for place in range(20_000, len(book), len(book) // each)][:each]
    return [prompt_tokens(model, text)[:room] for text in texts]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = call()
    return time.perf_counter() - begun, result


def plain(model: HFModel, prompt: Sequence[int], rule: str, tokens: int) -> list[int]:
    loop = Loop(model)
    loop.submit(Request(tuple(prompt), transform(rule), tokens, seed=0, ignore_eos=True))
    return [piece.token for piece in loop.run()]


def speculated(speculation: Speculation, model: HFModel, prompt: Sequence[int], rule: str, tokens: int) -> list[int]:
    loop = speculation.loop(model)
    loop.submit(Request(tuple(prompt), transform(rule), tokens, seed=0, ignore_eos=True))
    return [piece.token for piece in loop.run()]


@torch.no_grad()
def theirs(model: HFModel, prompt: Sequence[int], rule: str, tokens: int, **options: Any) -> list[int]:
    ids = torch.tensor([list(prompt)])
    settings = {"do_sample": False} if rule == "greedy" else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    torch.manual_seed(0)
    with model.network.running():
        made = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=1,
            **settings,
            **options,
        )
    return made[0, len(prompt) :].tolist()


def repetitiveness(tokens: Sequence[int]) -> float:
    """Share of the 3-grams that came before."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return 1 - len(set(grams)) / max(1, len(grams))


def measured(
    rule: str, target: HFModel, draft: HFModel, asked: Sequence[Sequence[int]], tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Figures of every system for prompts continued by `tokens` tokens under `rule`."""
    makers: dict[str, Callable[[], Speculation]] = {
        "nano, chain of 4": lambda: Speculation(DraftModel(draft, Chain(4))),
        "nano, chain of at most 8, confidence 0.3": lambda: Speculation(DraftModel(draft, Chain(8, confidence=0.3))),
        "nano, branching 3-2-1": lambda: Speculation(DraftModel(draft, Branching((3, 2, 1)))),
        "nano, beam 3 x 4": lambda: Speculation(DraftModel(draft, StochasticBeam(3, 4))),
        "nano, DySpec, 12 nodes by layers": lambda: Speculation(DraftModel(draft, Dynamic(12, threshold=0.08))),
        "prompt lookup": lambda: Speculation(PromptLookup()),
        "suffix automaton": lambda: Speculation(SuffixAutomaton()),
        "token recycling, 9 nodes": lambda: Speculation(Recycling(widths=LEAST_TREE)),
        "token recycling, 18 nodes": lambda: Speculation(Recycling(widths=SMALL_TREE)),
        "token recycling, 80 nodes": lambda: Speculation(Recycling()),
        "STAND, 9 nodes": lambda: Speculation(Stand(widths=LEAST_TREE)),
        "STAND, 18 nodes": lambda: Speculation(Stand(widths=SMALL_TREE)),
        "auto": lambda: Speculation(Auto(), Follow()),
        "auto, with nano": lambda: Speculation(Auto(draft=draft), Follow()),
    }
    packed = target.packed()
    speculations = {name: (make(), packed) for name, make in makers.items()}
    for name in ("nano, chain of 4", "token recycling, 18 nodes"):
        speculations[f"{name}, weights as they lie"] = makers[name](), target
    systems: dict[str, Callable[[Sequence[int]], list[int]]] = {
        "plain": lambda p: plain(target, p, rule, tokens),
        **{name: partial(_speculated, one, on, rule, tokens) for name, (one, on) in speculations.items()},
    }
    their_ways: dict[str, dict[str, Any]] = {
        "transformers, plain": {},
        "transformers, assisted by nano": {"assistant_model": draft.model},
        "transformers, prompt lookup": {"prompt_lookup_num_tokens": 8},
    }
    for name, options in their_ways.items():
        systems[name] = lambda p, options=options: theirs(target, p, rule, tokens, **options)
        if options:
            systems[f"{name}, our packing"] = lambda p, options=options: theirs(packed, p, rule, tokens, **options)
    seconds: dict[str, list[list[float]]] = {name: [] for name in systems}
    made: dict[str, list[list[int]]] = {name: [] for name in systems}
    for prompt in asked:
        for name, run in systems.items():
            trials = [timed(partial(run, prompt)) for _ in range(rounds)]
            seconds[name].append([trial[0] for trial in trials])
            made[name].append(trials[0][1])
    said = made["plain"]
    ranked = sorted(range(len(asked)), key=lambda i: repetitiveness(said[i]), reverse=True)
    repeating = ranked[: max(1, len(asked) // 4)]
    own = {name: [statistics.median(trial) for trial in trials] for name, trials in seconds.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name in systems:
        row = {
            "tokens_per_second": round(len(asked) * tokens / sum(own[name]), 1),
            "speedup": round(sum(own["plain"]) / sum(own[name]), 2),
            "speedup_repetitive": round(
                sum(own["plain"][i] for i in repeating) / sum(own[name][i] for i in repeating), 2
            ),
        }
        if name in speculations:
            tally = speculations[name][0].tally
            assert tally.failures == 0, name
            row["tokens_per_pass"] = round(tally.tokens_per_pass, 2)
            row["accepted_of_guesses"] = round(tally.accepted / max(1, tally.drafted), 3)
        if rule == "greedy":
            row["same_as_plain"] = f"{sum(a == b for a, b in zip(made[name], said, strict=True))} of {len(asked)}"
        rows[name] = row
        print(f"{rule:15} {name:42} {row}", flush=True)
    return rows


def _speculated(speculation: Speculation, model: HFModel, rule: str, tokens: int, prompt: Sequence[int]) -> list[int]:
    return speculated(speculation, model, prompt, rule, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--each", type=int, default=4, help="prompts of each of the three kinds")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default="bench/results/speculate.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    small, draft = nextoken.load("tiny"), nextoken.load("nano")
    assert isinstance(small, HFModel) and isinstance(draft, HFModel)
    target = inflated(small, arguments.times)
    asked = prompts(target, arguments.data, arguments.each, 200)
    figures: dict[str, Any] = {
        "target_parameters": sum(p.numel() for p in target.model.parameters()),
        "draft_parameters": sum(p.numel() for p in draft.model.parameters()),
        "prompts": len(asked),
        "tokens": arguments.tokens,
        "threads": arguments.threads,
    }
    plain(target, asked[0], "greedy", 8)
    for temperature, rule in ((0, "greedy"), (1, "temperature(1)")):
        figures[f"temperature {temperature}"] = measured(rule, target, draft, asked, arguments.tokens, arguments.rounds)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

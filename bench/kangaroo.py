"""Kangaroo: drafting with the target's own first layers, beside the bare exit, another draft model and plain decoding.

    python bench/kangaroo.py --json bench/results/kangaroo.json

The target is the bundled `tiny` of 5 layers, left after layer 1 or 2. The adapters are trained on the spot on texts
that `tiny` wrote at temperature 1 after passages of some books and of WikiText; everything is measured on prompts of
Spec-Bench and GSM8K and on passages of another book, continued by `--tokens` tokens. `bare` is the exit without
training: norm and head on the exit state.

Reported per system: accepted guesses and tokens per pass of the target, and three costs per token in relation to plain
decoding (1): `work` is the number of tokens that layers are run on, the adapter by its share of a layer's weights;
`calls` is the number of times that a layer is called, which is the time where weights are read for one sequence at a
time; the time itself. Speculation always costs more work and is to save calls. Draft models count by their weights in
layers of the target. Intervals are 95 % bootstrap intervals over prompts. Overlap is the mean of sum_v min(p, q) at
temperature 1, on texts of `tiny` after the same prompts.

Greedy tokens must be those of plain decoding on every prompt, also for `--identity` prompts of Spec-Bench.

Wall-clock: `tiny` with feed-forward blocks of `--times` their width, whose new units add exactly zero: the same
distribution and the same exit states from larger layers, one sequence at a time, with packed weights
(`HFModel.packed`). Beside it stands what a pass of n tokens costs in passes of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nextoken
from nextoken.decode.generate import prompt_tokens
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.model.base import LanguageModel
from nextoken.model.early_exit import EarlyExit
from nextoken.model.hf import HFModel
from nextoken.model.next import Next
from nextoken.speculate import Chain, Draft, Drafter, DraftModel, Row, Speculation
from nextoken.speculate.kangaroo import Kangaroo
from nextoken.speculate.kangaroo_adapter import KangarooAdapter
from nextoken.speculate.kangaroo_fit import KangarooRecipe, fit_kangaroo, overlap
from record import write
from speculate import plain, prompts, speculated, timed

LEARNT = ("dracula", "emma", "jane-eyre", "moby-dick-or-the-whale", "treasure-island", "war-and-peace")
THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
EXITS = (1, 2)
Prompt = tuple[int, ...]


@torch.no_grad()
def widened(small: HFModel, times: int) -> HFModel:
    """The same distribution and the same residual streams from feed-forward blocks of `times` the width."""
    settings = small.model.config.to_dict()
    torch.manual_seed(0)
    wide = LlamaConfig(**(settings | {"intermediate_size": settings["intermediate_size"] * times}))
    large = LlamaForCausalLM(wide).float().eval()
    own, state = small.model.state_dict(), large.state_dict()
    for name, tensor in state.items():
        if "down_proj" in name:
            tensor.zero_()
            tensor[:, : own[name].shape[1]] = own[name]
        else:
            tensor[: own[name].shape[0]] = own[name]
    large.load_state_dict(state)
    model = HFModel(large, small.tokenizer, name=f"{small.name}, {times} times as wide")
    ids = torch.randint(2, small.vocab.size, (1, 40), generator=torch.Generator().manual_seed(1))
    gap = (model.predict(ids).log_probs() - small.predict(ids).log_probs()).abs().max()
    assert float(gap) < 1e-3, f"the wide model says something else, by {float(gap)}"
    return model


def decoded(loop: Loop, asked: Sequence[Prompt], rule: str, tokens: int) -> list[list[int]]:
    change = transform(rule)
    tickets = [
        loop.submit(Request(prompt, change, tokens, seed=number, ignore_eos=True))
        for number, prompt in enumerate(asked)
    ]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [found[ticket] for ticket in tickets]


def learnt_texts(model: HFModel, data: Path, count: int, tokens: int) -> list[tuple[Prompt, list[int]]]:
    """Passages of 24 tokens of books and of WikiText, and what the model made of them."""
    sources = [(data / "books" / f"{name}.txt").read_text() for name in LEARNT]
    sources.append((data / "wikitext2" / "valid.txt").read_text())
    each = -(-count // len(sources))
    asked = [
        prompt_tokens(model, text[place : place + 200])[:24]
        for text in sources
        for place in range(10_000, len(text), (len(text) - 10_000) // each)[:each]
    ][:count]
    return list(zip(asked, decoded(Loop(model), asked, "temperature(1)", tokens), strict=True))


@dataclass
class Run:
    """Of one prompt: passes of the target, guesses, and guesses that stood."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0


def tallied(
    target: LanguageModel, drafter: Drafter, asked: Sequence[Prompt], rule: str, tokens: int
) -> tuple[list[Run], list[list[int]]]:
    """All prompts in one batch, each with a tally of its own."""
    runs = [Run() for _ in asked]

    def seen(rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        for row, branches, nodes in zip(rows, draft.rows, accepted, strict=True):
            run = runs[row.running.ticket]
            run.passes, run.drafted = run.passes + 1, run.drafted + len(branches)
            run.accepted += len(nodes)

    drafter.observe = seen  # type: ignore[method-assign]
    speculation = Speculation(drafter)
    made = decoded(speculation.loop(target, max_rows=len(asked)), asked, rule, tokens)
    assert speculation.tally.failures == 0
    assert speculation.tally.tokens == sum(run.passes + run.accepted for run in runs)
    return runs, made


@dataclass(frozen=True)
class Prices:
    """Of a system: layers that a guess is drafted with and is not verified with again, and what else a guess costs, in
    layers; layers of the target."""

    shared: int
    extra: float
    depth: int

    def calls(self, run: Run) -> float:
        """Layer calls: the shared layers one token at a time, the others once per pass."""
        return (
            self.shared * (run.passes + run.drafted)
            + self.extra * run.drafted
            + (self.depth - self.shared) * run.passes
        )

    def work(self, run: Run) -> float:
        """Tokens times layers."""
        return self.depth * (run.passes + run.drafted) + self.extra * run.drafted


def figures_of(runs: Sequence[Run], prices: Prices) -> dict[str, Any]:
    columns = np.array(
        [[r.passes, r.passes + r.accepted, r.drafted, r.accepted, prices.calls(r), prices.work(r)] for r in runs],
        dtype=float,
    )
    picks = np.random.default_rng(0).integers(len(runs), size=(1000, len(runs)))
    sums = np.concatenate([columns.sum(0)[None], columns[picks].sum(1)])
    passes, tokens, drafted, accepted, calls, work = sums.T
    values = {
        "accepted_per_pass": accepted / passes,
        "tokens_per_pass": tokens / passes,
        "guesses_per_pass": drafted / passes,
        "accepted_of_guesses": accepted / np.maximum(drafted, 1),
        "calls_per_token": calls / tokens / prices.depth,
        "work_per_token": work / tokens / prices.depth,
    }
    row: dict[str, Any] = {name: round(float(value[0]), 3) for name, value in values.items()}
    for name in ("tokens_per_pass", "calls_per_token"):
        row[f"{name}_95"] = [round(float(q), 3) for q in np.quantile(values[name][1:], [0.025, 0.975])]
    return row


def timings(
    systems: dict[str, Callable[[Prompt], list[int]]], asked: Sequence[Prompt], rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds per token and speed-up over the first system, medians over rounds; all must say the same."""
    spent: dict[str, list[float]] = {name: [] for name in systems}
    tokens = 0
    for prompt in asked:
        said = None
        for name, run in systems.items():
            trials = [timed(partial(run, prompt)) for _ in range(rounds)]
            said = trials[0][1] if said is None else said
            assert trials[0][1] == said, f"{name} says something else"
            spent[name].append(statistics.median(trial[0] for trial in trials))
        tokens += len(said or ())
    first = next(iter(spent.values()))
    return {
        name: {"ms_per_token": round(1000 * sum(own) / tokens, 2), "speedup": round(sum(first) / sum(own), 2)}
        for name, own in spent.items()
    }


def passes_of(model: HFModel, prompt: Prompt) -> dict[str, float]:
    """What a pass of n tokens costs beside a pass of one, medians: what there is to gain at most."""
    state, spent = model.start(), dict[int, float]()
    model.extend(state, [prompt])
    for n in (1, 2, 3, 5, 7):
        trials = []
        for _ in range(7):
            trials.append(timed(lambda n=n: model.extend(state, [prompt[:n]]).logits())[0])
            state.rewind(n)
        spent[n] = statistics.median(trials)
    return {str(n): round(seconds / spent[1], 2) for n, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--texts", type=int, default=384, help="texts to train on")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--each", type=int, default=8, help="prompts of each of the three kinds")
    parser.add_argument("--identity", type=int, default=200, help="prompts of Spec-Bench decoded greedily in batches")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--times", type=int, default=24)
    parser.add_argument("--timed", type=int, default=5, help="prompts that are timed")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", default="bench/results/kangaroo.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny, nano = nextoken.load("tiny"), nextoken.load("nano")
    assert isinstance(tiny, HFModel) and isinstance(nano, HFModel)
    begun = time.perf_counter()

    def report(text: str) -> None:
        print(f"{time.perf_counter() - begun:5.0f} s  {text}", flush=True)

    targets = {exit: EarlyExit(tiny, exit=exit) for exit in EXITS}
    texts = learnt_texts(tiny, arguments.data, arguments.texts, 64)
    asked = prompts(tiny, arguments.data, arguments.each, 200)
    held_out = list(zip(asked, decoded(Loop(tiny), asked, "temperature(1)", arguments.tokens), strict=True))
    report(f"{len(texts)} texts to learn from, {len(asked)} prompts held out")
    layer = targets[1].stack.layer_parameters[0]
    adapters: dict[str, KangarooAdapter] = {}
    figures: dict[str, Any] = {"layers": targets[1].stack.depth, "layer_parameters": layer, "prompts": len(asked)}
    figures["training"] = {}
    recipe = KangarooRecipe(epochs=arguments.epochs, batch=16, rate=arguments.rate)
    for exit, target in targets.items():
        bare, adapter = KangarooAdapter(target), KangarooAdapter(target)
        before = overlap(bare, target, held_out)
        started = time.process_time()
        losses = fit_kangaroo(adapter, target, texts, recipe=recipe, seed=0)
        spent = time.process_time() - started
        adapters |= {f"exit {exit}, bare": bare, f"exit {exit}, adapter": adapter}
        figures["adapter_parameters"] = sum(weight.numel() for weight in adapter.parameters())
        figures["training"][f"exit {exit}"] = {
            "overlap_bare": round(before, 3),
            "overlap": round(overlap(adapter, target, held_out), 3),
            "loss_first": round(losses[0], 3),
            "loss_last": round(statistics.mean(losses[-8:]), 3),
            "steps": len(losses),
            "processor_seconds": round(spent),
        }
        report(f"exit {exit}: {figures['training'][f'exit {exit}']}")
    figures["overlap_nano"] = round(_overlap_of(nano, tiny, held_out), 3)
    share = figures["adapter_parameters"] / layer
    weights = sum(weight.numel() for weight in nano.model.model.layers.parameters()) / layer

    said = decoded(Loop(tiny), asked, "greedy", arguments.tokens)
    report("plain decoding")
    for rule in ("greedy", "temperature(1)"):
        rows = figures[rule] = {}
        for name, adapter in adapters.items():
            target = targets[adapter.exit]
            # A bare exit is norm and head alone, though it is run as an adapter that adds nothing.
            prices = Prices(adapter.exit, 0.0 if "bare" in name else share, target.stack.depth)
            wanted = THRESHOLDS if "adapter" in name and rule == "greedy" else (0.4,)
            for eta in wanted:
                drafter = Kangaroo(target, adapter, confidence=eta)
                before_run, reads = sum(target.layers_run), target.exits_read
                runs, made = tallied(target, drafter, asked, rule, arguments.tokens)
                if rule == "greedy":
                    assert made == said, f"{name} at {eta} is not plain decoding"
                # The count of the model itself is the bookkeeping above: no layer ran twice on a token.
                read = sum(map(len, asked)) + sum(run.passes + run.drafted for run in runs)
                assert sum(target.layers_run) - before_run == prices.depth * read
                assert target.exits_read - reads <= read
                rows[f"{name}, confidence {eta}"] = figures_of(runs, prices)
                report(f"{rule} {name} {eta} {rows[f'{name}, confidence {eta}']}")
        for length, eta in ((4, 0.0), (6, 0.4)):
            runs, made = tallied(tiny, DraftModel(nano, Chain(length, confidence=eta)), asked, rule, arguments.tokens)
            if rule == "greedy":
                assert made == said
            rows[f"nano, at most {length}, confidence {eta}"] = figures_of(runs, Prices(0, weights, 5))
            report(f"{rule} nano {length} {eta} {rows[f'nano, at most {length}, confidence {eta}']}")

    best = {
        exit: min(
            THRESHOLDS,
            key=lambda eta, exit=exit: figures["greedy"][f"exit {exit}, adapter, confidence {eta}"]["calls_per_token"],
        )
        for exit in EXITS
    }
    figures["best_confidence"] = {f"exit {exit}": eta for exit, eta in best.items()}

    bench = [json.loads(line) for line in (arguments.data / "specbench" / "question.jsonl").read_text().splitlines()]
    many = [prompt_tokens(tiny, entry["turns"][0])[:200] for entry in bench][
        :: max(1, len(bench) // max(1, arguments.identity))
    ]
    many = many[: arguments.identity]
    if many:
        expected = decoded(Loop(tiny), many, "greedy", arguments.tokens)
        for exit, target in targets.items():
            drafter = Kangaroo(target, adapters[f"exit {exit}, adapter"])
            assert decoded(Speculation(drafter).loop(target), many, "greedy", arguments.tokens) == expected
        figures["greedy_identity"] = f"{len(many)} of {len(many)} Spec-Bench prompts, in batches of 64"
        report(figures["greedy_identity"])

    wide = widened(tiny, arguments.times).packed()
    exits = {exit: EarlyExit(wide, exit=exit) for exit in EXITS}
    systems: dict[str, Callable[[Prompt], list[int]]] = {
        "plain": lambda prompt: plain(wide, prompt, "greedy", arguments.tokens),
        "plain, layer by layer": lambda prompt: plain(exits[1], prompt, "greedy", arguments.tokens),  # type: ignore[arg-type]
    }
    for name, adapter in adapters.items():
        drafter = Kangaroo(exits[adapter.exit], adapter, confidence=best[adapter.exit])
        systems[f"{name}, confidence {best[adapter.exit]}"] = partial(
            _speculated, Speculation(drafter), exits[adapter.exit], arguments.tokens
        )
    systems["nano, at most 6, confidence 0.4"] = partial(
        _speculated, Speculation(DraftModel(nano, Chain(6, confidence=0.4))), wide, arguments.tokens
    )
    chosen = asked[:: max(1, len(asked) // arguments.timed)][: arguments.timed]
    plain(wide, chosen[0], "greedy", 4)
    figures["timed"] = {"parameters": sum(p.numel() for p in wide.model.parameters()), "prompts": len(chosen)}
    figures["timed"]["pass_of_n_tokens"] = passes_of(wide, chosen[0])
    figures["timed"] |= timings(systems, chosen, arguments.rounds)
    for name, row in figures["timed"].items():
        report(f"timed {name:45} {row}")
    write(arguments.json, figures)


def _speculated(speculation: Speculation, model: Any, tokens: int, prompt: Prompt) -> list[int]:
    return speculated(speculation, model, prompt, "greedy", tokens)


@torch.no_grad()
def _overlap_of(draft: HFModel, target: HFModel, texts: Sequence[tuple[Prompt, list[int]]]) -> float:
    shared = [
        torch.minimum(draft.predict([row]).log_probs(), target.predict([row]).log_probs())[0, len(prompt) - 1 : -1]
        for prompt, output in texts
        for row in [[*prompt, *output]]
    ]
    return float(torch.cat(shared).exp().sum(-1).mean())


if __name__ == "__main__":
    main()

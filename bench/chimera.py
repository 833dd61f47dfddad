"""Chimera: a head on the target's own states, trained on the spot, beside independent heads and a draft model.

    python bench/chimera.py --data ../shared/data --json bench/results/chimera.json

The target is the bundled `tiny`. Four heads of four steps learn from the same rows in the same order, for the same
number of updates: Chimera (with the target's output matrix, `output="shared"`), the same without its trigrams (each
token's own embedding only), the same without its layer, and independent heads in Medusa's manner, W (h + silu(A h)),
which see h_n only. The texts are twenty books, GSM8K's training part and WikiText-2's validation part.

Judged on prompts of Spec-Bench, of GSM8K's test part and of a held-out book, each continued greedily by the target.
`agreement`: share of the places in those continuations at which the best guess (or one of the best three) of step j is
the target's token, the steps reading their own best guesses; `given the path`: the same where the steps before were
right, for which they read the target's tokens. In brackets: 95 % bootstrap intervals over prompts.

`tokens_per_pass` at temperature 0 (1 is plain decoding), with each head's guesses in the released tree (cut to four
levels: 23 nodes), in a chain of four, and for Chimera in trees counted on other prompts (`best_template`). Clock times
are with a target of `--times` the weights and the same distribution (see bench/speculate.py), its weights packed where
guesses are verified, beside plain decoding and a chain drawn from `nano`. At temperature 0 every system gives the
tokens of plain decoding, which is checked.
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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nextoken
from nextoken.decode.generate import prompt_tokens
from nextoken.head import Head
from nextoken.model.hf import HFModel
from nextoken.model.next import HeadNext
from nextoken.speculate import (
    Census,
    Chain,
    Chimera,
    ChimeraHead,
    ChimeraRecipe,
    Drafter,
    DraftModel,
    Follow,
    Speculation,
    best_template,
    fit_chimera,
)
from record import write
from speculate import inflated, plain, speculated, timed

HELD_OUT = ("frankenstein", "the-time-machine")
DEPTH = 4
CHAIN = ((1,),) * DEPTH
WIDE = ((8,), (6, 4, 3, 2, 2, 1, 1, 1), (5, 3, 2, 2, 1, 1, 1, 1, 1), (4, 2, 2, 1, 1, 1, 1))
DRAWS = 1000


class _Independent(nn.Module):
    """W (h + silu(A h)), A beginning at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Linear(width, width)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, last: Tensor, guessed: Tensor, head: Head) -> HeadNext:
        return HeadNext(last + F.silu(self.change(last)), head)


class IndependentHeads(ChimeraHead):
    """Step j sees h_n only, as Medusa's heads do (arXiv:2401.10774); there with a W of its own in each."""

    def __init__(self, model: HFModel, *, depth: int = DEPTH) -> None:
        super().__init__(model, depth=depth, output="shared", context=False)
        self.trigrams = nn.Identity()
        self.outputs = nn.ModuleList(_Independent(self.stack.width) for _ in range(depth))

    def look(self, grams: Tensor, positions: Tensor, **rest: Any) -> Tensor:
        return torch.zeros(*grams.shape[:2], self.stack.width)


INNER = 688
"""Of the layer, as of tiny's: the larger target's are wider by units that add nothing."""
HEADS: dict[str, Callable[[HFModel], ChimeraHead]] = {
    "chimera": lambda model: ChimeraHead(model, depth=DEPTH, output="shared", inner=INNER),
    "without trigrams": lambda model: ChimeraHead(model, depth=DEPTH, output="shared", inner=INNER, span=1),
    "without the layer": lambda model: ChimeraHead(model, depth=DEPTH, output="shared", context=False),
    "independent heads": lambda model: IndependentHeads(model),
}


def rows_of(data: Path, model: HFModel, count: int, length: int) -> list[list[int]]:
    """Rows to learn from: begin token and text, half of them from books."""
    books = [path for path in sorted((data / "books").glob("*.txt")) if path.stem not in HELD_OUT]
    sums = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    wiki = (data / "wikitext2" / "valid.txt").read_text()
    parts = [path.read_text()[20_000 : 20_000 + 8 * length * count // len(books)] for path in books]
    sources = [
        ("\n".join(parts), count // 2),
        ("\n".join(f"{entry['question']}\n{entry['answer']}\n" for entry in sums[: 2 * count]), count // 4),
        (wiki[: 8 * length * count], count // 4),
    ]
    rows: list[list[int]] = []
    for text, share in sources:
        ids = model.vocab.encode(text).ids
        starts = np.linspace(0, len(ids) - length, share).astype(int)
        rows += [[model.vocab.bos_id or 0, *ids[start : start + length - 1]] for start in starts]
    return rows


def prompts_of(data: Path, model: HFModel, each: int, *, offset: int, room: int = 120) -> list[tuple[int, ...]]:
    """`each` prompts of each of the three kinds; other offsets give others."""
    bench = [json.loads(line)["turns"][0] for line in (data / "specbench" / "question.jsonl").read_text().splitlines()]
    sums = [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    book = (data / "books" / f"{HELD_OUT[0]}.txt").read_text()
    step = len(bench) // each
    texts = bench[offset::step][:each]
    texts += [entry["question"] + "\n" for entry in sums[offset * each : (offset + 1) * each]]
    stride = (len(book) - 40_000) // each
    texts += [book[20_000 + 4_000 * offset + stride * i :][:400] for i in range(each)]
    return [prompt_tokens(model, text)[:room] for text in texts]


def agreement(head: ChimeraHead, asked: Sequence[tuple[int, ...]], said: Sequence[list[int]]) -> dict[str, Any]:
    """Shares of the places at which the guesses of each step are what the target said."""
    found: dict[str, list[list[Tensor]]] = {}
    for prompt, output in zip(asked, said, strict=True):
        tokens = torch.tensor([[*prompt, *output]])
        hidden = head.model.predict(tokens).hidden
        assert hidden is not None
        for feed, called in (("guess", "agreement"), ("text", "given the path")):
            with torch.no_grad():
                steps = head(hidden, tokens, feed=feed)  # type: ignore[arg-type]
            for top in (1, 3):
                hits = []
                for step, one in enumerate(steps, 1):
                    # Places from the last token of the prompt on, so that all that is guessed was said by the target.
                    best = one[:, len(prompt) - 1 : -step].logits()[0].topk(top).indices
                    hits.append((best == tokens[0, len(prompt) + step :, None]).any(-1).float())
                found.setdefault(f"{called}, top {top}", []).append(hits)
    return {name: [_interval([hits[step] for hits in rows]) for step in range(DEPTH)] for name, rows in found.items()}


def _interval(hits: Sequence[Tensor]) -> list[float]:
    """Mean, and the ends of its 95 % bootstrap interval over prompts."""
    sums, counts = np.array([float(x.sum()) for x in hits]), np.array([len(x) for x in hits])
    drawn = np.random.default_rng(0).integers(0, len(hits), (DRAWS, len(hits)))
    spread = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [round(float(x), 3) for x in (sums.sum() / counts.sum(), *np.quantile(spread, (0.025, 0.975)))]


def passes(
    drafter: Drafter, model: HFModel, asked: Sequence[tuple[int, ...]], said: Sequence[list[int]]
) -> dict[str, Any]:
    """Tokens per pass at temperature 0, the same tokens being said."""
    speculation, each = Speculation(drafter, Follow()), list[Tensor]()
    for prompt, output in zip(asked, said, strict=True):
        before = (speculation.tally.tokens, speculation.tally.passes)
        assert speculated(speculation, model, prompt, "greedy", len(output)) == output
        each.append(torch.tensor([float(speculation.tally.tokens - before[0])]))
        each[-1] = each[-1] / (speculation.tally.passes - before[1])
    assert speculation.tally.failures == 0
    return {"tokens_per_pass": round(speculation.tally.tokens_per_pass, 3), "mean_of_prompts": _interval(each)}


def clocked(
    systems: dict[str, Callable[[Sequence[int]], list[int]]], asked: Sequence[tuple[int, ...]], rounds: int
) -> dict[str, Any]:
    """Tokens per second of each system, and the speed-up over plain decoding: medians of rounds, prompts summed."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for prompt in asked:
        outputs = {}
        for name, run in systems.items():
            trials = [timed(partial(run, prompt)) for _ in range(rounds)]
            seconds[name].append(statistics.median(trial[0] for trial in trials))
            outputs[name] = trials[0][1]
        assert all(output == outputs["plain"] for output in outputs.values()), "other tokens than plain decoding's"
    tokens = len(outputs["plain"]) * len(asked)
    return {
        name: {
            "tokens_per_second": round(tokens / sum(own), 1),
            "speedup": round(sum(seconds["plain"]) / sum(own), 2),
        }
        for name, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", default="bench/results/chimera.json")
    parser.add_argument("--steps", type=int, default=30, help="updates of each head")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=96, help="tokens in a row")
    parser.add_argument("--each", type=int, default=4, help="prompts of each of the three kinds")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny, nano = nextoken.load("tiny"), nextoken.load("nano")
    assert isinstance(tiny, HFModel) and isinstance(nano, HFModel)
    rows = rows_of(arguments.data, tiny, arguments.steps * arguments.batch, arguments.length)
    recipe = ChimeraRecipe(steps=arguments.steps, batch=arguments.batch, rate=2e-3)
    asked = prompts_of(arguments.data, tiny, arguments.each, offset=0)
    said = [plain(tiny, prompt, "greedy", arguments.tokens) for prompt in asked]
    others = prompts_of(arguments.data, tiny, arguments.each, offset=1)
    figures: dict[str, Any] = {
        "rows": len(rows),
        "tokens_per_row": arguments.length,
        "steps": arguments.steps,
        "prompts": len(asked),
        "target_parameters": sum(weight.numel() for weight in tiny.model.parameters()),
        "heads": {},
    }
    heads = {}
    for name, make in HEADS.items():
        head = heads[name] = make(tiny)
        untrained = agreement(head, asked, said) if name == "chimera" else None
        begun = time.process_time()
        losses = fit_chimera(head, rows, recipe=recipe)
        row: dict[str, Any] = {
            "parameters": sum(weight.numel() for weight in head.parameters()),
            "training_seconds": round(time.process_time() - begun, 1),
            "loss": [round(float(np.mean(part)), 3) for part in (losses[:5], losses[-10:])],
            **agreement(head, asked, said),
            "tree": passes(Chimera(head), tiny, asked, said),
            "chain": passes(Chimera(head, widths=CHAIN), tiny, asked, said),
        }
        if untrained is not None:
            row["untrained"] = untrained["agreement, top 1"]
        figures["heads"][name] = row
        print(name, json.dumps(row), flush=True)
    chimera = heads["chimera"]
    census = Census(Chimera(chimera, widths=WIDE))
    for prompt in others:
        speculated(Speculation(census, Follow()), tiny, prompt, "greedy", arguments.tokens)
    trees = {f"counted tree of {nodes} nodes": best_template(census.counts, nodes=nodes) for nodes in (8, 23)}
    for name, widths in trees.items():
        figures[name] = {"widths": widths, **passes(Chimera(chimera, widths=widths), tiny, asked, said)}
        print(name, figures[name], flush=True)
    figures["chain of 4 from nano"] = passes(DraftModel(nano, Chain(4)), tiny, asked, said)
    print("chain of 4 from nano", figures["chain of 4 from nano"], flush=True)
    large = inflated(tiny, arguments.times)
    packed = large.packed()
    mounted = {}
    for name in ("chimera", "independent heads"):
        mounted[name] = HEADS[name](packed)
        mounted[name].load_state_dict(heads[name].state_dict())
    small = trees["counted tree of 8 nodes"]
    drafters: dict[str, Drafter] = {
        "chimera, released tree": Chimera(mounted["chimera"]),
        "chimera, counted tree of 8 nodes": Chimera(mounted["chimera"], widths=small),
        "chimera, chain": Chimera(mounted["chimera"], widths=CHAIN),
        "independent heads, counted tree of 8 nodes": Chimera(mounted["independent heads"], widths=small),
        "nano, chain of 4": DraftModel(nano, Chain(4)),
    }
    systems: dict[str, Callable[[Sequence[int]], list[int]]] = {
        "plain": lambda prompt: plain(large, prompt, "greedy", arguments.tokens)
    }
    for name, drafter in drafters.items():
        one = Speculation(drafter, Follow())
        systems[name] = lambda prompt, one=one: speculated(one, packed, prompt, "greedy", arguments.tokens)  # type: ignore[misc]
    plain(large, asked[0], "greedy", 4)
    figures["clock"] = {
        "target_parameters": sum(weight.numel() for weight in large.model.parameters()),
        **clocked(systems, asked[:: max(1, len(asked) // 6)], arguments.rounds),
    }
    print(json.dumps(figures["clock"], indent=1))
    write(
        arguments.json, figures, note="heads are trained for a minute or less; the paper's for two epochs of ShareGPT"
    )


if __name__ == "__main__":
    main()

"""Tokens per second and memory of `nextoken.read`, beside what people do now.

    python bench/read.py --data ../shared/data --json bench/results/read.json

Short texts: questions of GSM8K. Long text: one book. Beside `read` with all its columns:

    loop, same columns     for each text model(ids).logits, log_softmax, and every column from them by its formula
    loop, two columns      the same for log-probability and entropy alone
    minicons               IncrementalLMScorer.token_score, surprisal and rank, batches of 32
    lm-polygraph           its own entropy and probability calculators on the logits of each text

On the book the loops go through the same windows as `read`. Timings are the best of `--times`, taken in turn;
agreement is the largest difference of a log-probability or an entropy. Memory is how far the resident size of a
process of its own rises above what it was before the reading, by length of one text, beside the size of the result; it
is measured on Linux only.

    --model random-gpt2    the smallest GPT-2 with random weights: a vocabulary of 50,257, where whole logits cost most
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nextoken
import record
from nextoken.model.hf import HFModel
from nextoken.signature import windows

Nats = tuple[np.ndarray, np.ndarray]
"""Log-probabilities and entropies of all tokens."""


def slices(model: HFModel, texts: list[str]) -> list[tuple[torch.Tensor, int]]:
    """Of all texts the windows [1, n] that `read` would use, and how many of their tokens are context only."""
    found = []
    for text in texts:
        tokens = torch.tensor([model.vocab.bos_id, *model.vocab.encode(text).ids])
        for window in windows(len(tokens), model.context_length):
            found.append((tokens[None, window.begin : window.end], window.first - window.begin))
    return found


@torch.no_grad()
def loop_all(model: HFModel, texts: list[str], top: int = 10) -> Nats:
    """Every column of a signature, from whole logits."""
    logprobs, entropies, kept = [], [], []
    for ids, context in slices(model, texts):
        logits = model.model(input_ids=ids).logits[0, context - 1 : -1].float()
        targets = ids[0, context:, None]
        logp = torch.log_softmax(logits, -1)
        p = logp.exp()
        own = logp.gather(1, targets)
        above = logp > own
        entropy = -(p * logp).sum(-1)
        centred = -logp - entropy[:, None]
        varentropy = (p * centred**2).sum(-1)
        best = logp.topk(top, dim=-1)
        columns = [own[:, 0], above.sum(-1), (p * above).sum(-1), entropy, varentropy]
        columns += [(p * centred**3).sum(-1) / varentropy**1.5, (p * centred**4).sum(-1) / varentropy**2]
        columns += [(p**2).sum(-1), logp.mean(-1), logp.std(-1, correction=0), best.values[:, 0].exp()]
        columns += [best.values[:, 0].exp() - best.values[:, 1].exp(), logits.logsumexp(-1)]
        columns += [p.sqrt().sum(-1), p.sqrt().sqrt().sum(-1), (p**3).sum(-1), (p**4).sum(-1)]
        columns += [best.indices, best.values, 1 - best.values.exp().sum(-1)]
        kept.append([column.numpy() for column in columns])
        logprobs.append(kept[-1][0])
        entropies.append(kept[-1][3])
    return np.concatenate(logprobs), np.concatenate(entropies)


@torch.no_grad()
def loop_two(model: HFModel, texts: list[str]) -> Nats:
    """Log-probability and entropy only."""
    logprobs, entropies = [], []
    for ids, context in slices(model, texts):
        logp = torch.log_softmax(model.model(input_ids=ids).logits[0, context - 1 : -1].float(), -1)
        logprobs.append(logp.gather(1, ids[0, context:, None])[:, 0].numpy())
        entropies.append(-(logp.exp() * logp).sum(-1).numpy())
    return np.concatenate(logprobs), np.concatenate(entropies)


def ours(model: HFModel, texts: list[str]) -> Nats:
    signature = nextoken.read(model, texts, progress=False)
    return signature.column("logprob"), signature.column("entropy")


def minicons(model: HFModel, texts: list[str]) -> Nats:
    """Surprisal and rank, which is what it gives per token; the begin token's row is left out."""
    from minicons import scorer

    model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
    judge = scorer.IncrementalLMScorer(model.model, "cpu", tokenizer=model.tokenizer)
    found = []
    for start in range(0, len(texts), 32):
        found += judge.token_score(texts[start : start + 32], surprisal=True, rank=True)
    return np.array([-token[1] for text in found for token in text[1:]]), np.zeros(0)


@torch.no_grad()
def lm_polygraph(model: HFModel, texts: list[str]) -> Nats:
    """Its calculators work on the logits of texts that it has generated; here they are given those of the texts."""
    from lm_polygraph.stat_calculators.entropy import EntropyCalculator

    logprobs, whole = [], []
    for ids, context in slices(model, texts):
        logp = torch.log_softmax(model.model(input_ids=ids).logits[0, context - 1 : -1].float(), -1)
        logprobs.append(logp.gather(1, ids[0, context:, None])[:, 0].numpy())
        found = EntropyCalculator()({"greedy_log_probs": [logp.numpy()]}, [], None)
        whole.append(np.array(found["entropy"][0]))
    return np.concatenate(logprobs), np.concatenate(whole)


SYSTEMS: dict[str, Callable[[HFModel, list[str]], Nats]] = {
    "nextoken.read": ours,
    "loop, same columns": loop_all,
    "loop, two columns": loop_two,
    "minicons": minicons,
    "lm-polygraph": lm_polygraph,
}

PEERS = {"minicons": "minicons.scorer", "lm-polygraph": "lm_polygraph.stat_calculators.entropy"}
"""What each needs that can be imported."""


def compared(model: HFModel, texts: list[str], systems: list[str], times: int) -> dict[str, Any]:
    """Tokens per second of each system, and how far its numbers are from those of `read`."""
    results = {name: SYSTEMS[name](model, texts) for name in systems}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(times):
        for name in systems:
            start = time.perf_counter()
            SYSTEMS[name](model, texts)
            seconds[name].append(time.perf_counter() - start)
    tokens = len(results["nextoken.read"][0])
    figures: dict[str, Any] = {"texts": len(texts), "tokens": tokens, "systems": {}}
    for name in systems:
        best = min(seconds[name])
        pairs = zip(results[name], results["nextoken.read"], strict=True)
        apart = [float(np.abs(own - read).max()) for own, read in pairs if len(own) == len(read)]
        figures["systems"][name] = {
            "seconds": [round(second, 2) for second in seconds[name]],
            "tokens_per_second": round(tokens / best),
            "read_is_faster_by": round(best / min(seconds["nextoken.read"]), 2),
            "largest_difference": max(apart, default=None),
        }
        print(f"  {name:20} {tokens / best:9,.0f} tokens/s   read is {best / min(seconds['nextoken.read']):.2f}x that")
    return figures


def resident(field: str) -> float:
    """VmRSS, the resident size of this process in MiB, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def random_gpt2(data: Path) -> HFModel:
    """GPT-2 (124 M parameters) with random weights and its own tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    folder = data / "gpt2-tokenizer"
    tokenizer = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    torch.manual_seed(0)
    return HFModel(GPT2LMHeadModel(GPT2Config()).eval(), tokenizer, name="random-gpt2")


def memory(spec: str, path: Path, tokens: int, shards: bool, threads: int) -> dict[str, float]:
    """MiB by which reading the first `tokens` tokens of a file raises the peak resident size of a new process."""
    inside = [sys.executable, __file__, "--inside", spec, str(path), str(tokens), str(int(shards)), str(threads)]
    done = subprocess.run(inside, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def inside(spec: str, path: str, tokens: int, shards: bool) -> None:
    """The process that `memory` starts."""
    model = nextoken.load(spec)
    whole = Path(path).read_text(encoding="utf-8")
    text = model.vocab.decode_text(model.vocab.encode(whole).ids[:tokens])
    # What is needed once, whatever the length: threads, buffers of the allocator, all of a batch.
    nextoken.read(model, [whole[: 5 * 8192 * 2]], progress=False)
    # The peak that getrusage tells is inherited from the parent process; that of the kernel can be reset.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        signature = nextoken.read(model, text, progress=False, shards=folder if shards else None)
        seconds = time.perf_counter() - start
        after = resident("VmHWM")
        figures = {
            "tokens": len(signature),
            "growth_mib": round(after - before, 1),
            "result_mib": round(signature.table.nbytes / 2**20, 1) if not shards else 0.0,
            "seconds": round(seconds, 1),
        }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with gsm8k/ and books/")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--texts", type=int, default=2_000, help="number of short texts")
    parser.add_argument("--book", default="frankenstein.txt")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="*", default=[10_000, 50_000, 100_000, 200_000])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--inside", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        spec, path, tokens, shards, threads = arguments.inside
        torch.set_num_threads(int(threads))
        inside(spec, path, int(tokens), bool(int(shards)))
        return
    torch.set_num_threads(arguments.threads)
    model = random_gpt2(arguments.data) if arguments.model == "random-gpt2" else nextoken.load(arguments.model)
    assert isinstance(model, HFModel), "the loops need a transformers model"
    peers = []
    for name, module in PEERS.items():
        try:
            importlib.import_module(module)
            peers.append(name)
        except ImportError as error:
            print(f"without {name}: {error}")
    lines = (arguments.data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    short = [json.loads(line)["question"] for line in lines[: arguments.texts]]
    book = (arguments.data / "books" / arguments.book).read_text(encoding="utf-8")
    loops = ["nextoken.read", "loop, same columns", "loop, two columns"]
    figures: dict[str, Any] = {"model": arguments.model, "threads": arguments.threads}
    print(f"{len(short)} short texts")
    figures["short_texts"] = compared(model, short, loops + peers, arguments.times)
    print(arguments.book)
    figures["book"] = {"name": arguments.book} | compared(model, [book], loops, arguments.times)
    longest = arguments.data / "books" / "war-and-peace.txt"
    if arguments.lengths:
        print("memory by length of a text")
        figures["memory"] = {"in memory": [], "shards": []}
    for tokens in arguments.lengths:
        for name, rows in figures["memory"].items():
            rows.append(memory(arguments.model, longest, tokens, name == "shards", arguments.threads))
            print(f"  {name:10} {rows[-1]}")
    if arguments.json:
        record.write(arguments.json, figures)


if __name__ == "__main__":
    main()

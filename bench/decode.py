"""Decoding speed: our loop beside transformers.generate and bare forwards, and continuous beside static batching.

    python bench/decode.py --model tiny --json bench/results/decode.json

One run measures all variants in turn, several rounds, and reports medians. `overhead` is the share of our time that the
bare forward passes of the same lengths do not take. In the arrival part, requests of random lengths arrive as a Poisson
process, the same ones for both: static batching waits until a batch is done before it takes the next.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import nextoken
from nextoken.decode.generate import generate
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from record import write

PROMPTS = ["It was the best of times,", "Call me", "Question: Tom has 3 apples.", "The door opened and"] * 4


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def decoding(model: nextoken.LanguageModel, batch: int, rule: str, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of each variant for `batch` texts of `tokens` tokens, prompts of equal length."""
    length = min(len(model.vocab.encode(p).ids) for p in PROMPTS)
    bos = model.vocab.bos_id
    ids = torch.tensor([[bos, *model.vocab.encode(p).ids[:length]] for p in PROMPTS[:batch]])
    change = transform(rule)
    network = model.model

    def ours() -> None:
        loop = Loop(model)
        for row in ids.tolist():
            loop.submit(Request(tuple(row), change, tokens, ignore_eos=True))
        for _ in loop.run():
            pass

    settings = {"do_sample": False} if rule == "greedy" else {"do_sample": True, "temperature": 0.8, "top_k": 0}

    @torch.no_grad()
    def theirs() -> None:
        network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=1,
            **settings,
        )

    @torch.no_grad()
    def bare() -> None:
        from transformers import DynamicCache

        remembered = {model._network.cache_argument: DynamicCache(), "use_cache": True}
        network(input_ids=ids, **remembered)
        step = torch.full((batch, 1), 5)
        for _ in range(tokens - 1):
            network(input_ids=step, **remembered)

    seconds: dict[str, list[float]] = {"nextoken": [], "transformers": [], "bare": []}
    for call in (ours, theirs, bare):
        call()
    for _ in range(rounds):
        for name, call in (("nextoken", ours), ("transformers", theirs), ("bare", bare)):
            seconds[name].append(timed(call))
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"{name}_tokens_per_s": round(batch * tokens / value, 1) for name, value in found.items()},
        "speedup_over_transformers": round(found["transformers"] / found["nextoken"], 2),
        "overhead": round(1 - found["bare"] / found["nextoken"], 3),
    }


def arrivals(model: nextoken.LanguageModel, *, rate: float, count: int, rows: int, seed: int) -> dict[str, dict]:
    """Throughput and latency of both kinds of batching for the same stream of requests."""
    order = np.random.default_rng(seed)
    due = np.cumsum(order.exponential(1 / rate, count))
    lengths = np.clip(order.geometric(1 / 60, count), 4, 300)
    prompt = (model.vocab.bos_id, *model.vocab.encode(PROMPTS[0]).ids)
    requests = [Request(prompt, transform("temperature(0.8)"), int(n), seed=i, ignore_eos=True) for i, n in
                enumerate(lengths)]  # fmt: skip

    def continuous() -> list[float]:
        loop, waiting, begun = Loop(model, max_rows=rows), list(range(count)), time.perf_counter()
        arrived: dict[int, int] = {}
        done = [0.0] * count
        while waiting or not loop.is_done:
            now = time.perf_counter() - begun
            while waiting and due[waiting[0]] <= now:
                number = waiting.pop(0)
                arrived[loop.submit(requests[number])] = number
            if loop.is_done:
                time.sleep(max(0.0, due[waiting[0]] - now))
                continue
            for piece in loop.step():
                if piece.finish is not None:
                    done[arrived[piece.ticket]] = time.perf_counter() - begun
        return done

    def static() -> list[float]:
        waiting, begun = list(range(count)), time.perf_counter()
        done = [0.0] * count
        while waiting:
            now = time.perf_counter() - begun
            ready = [number for number in waiting if due[number] <= now][:rows]
            if not ready:
                time.sleep(max(0.0, due[waiting[0]] - now))
                continue
            # A static batch decodes until its longest text is done, whoever has finished.
            longest = max(requests[number].max_tokens for number in ready)
            loop = Loop(model, max_rows=rows)
            for number in ready:
                loop.submit(Request(prompt, requests[number].transform, longest, seed=number, ignore_eos=True))
            for _ in loop.run():
                pass
            for number in ready:
                waiting.remove(number)
                done[number] = time.perf_counter() - begun
        return done

    figures = {}
    for name, run in (("continuous", continuous), ("static", static)):
        done = np.array(run())
        latency = done - due
        figures[name] = {
            "tokens_per_s": round(float(lengths.sum() / done.max()), 1),
            "latency_p50_s": round(float(np.percentile(latency, 50)), 2),
            "latency_p95_s": round(float(np.percentile(latency, 95)), 2),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--requests", type=int, default=120, help="0 leaves the arrival part out")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--json", default="bench/results/decode.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = nextoken.load(arguments.model)
    figures: dict[str, object] = {"model": arguments.model, "tokens": arguments.tokens, "threads": arguments.threads}
    for batch in (1, 16):
        for rule in ("greedy", "temperature(0.8)"):
            found = decoding(model, batch, rule, arguments.tokens, arguments.rounds)
            figures[f"batch {batch}, {rule}"] = found
            print(f"batch {batch:2}, {rule}: {found}", flush=True)
    if arguments.requests:
        # The load at which continuous batching is about busy: what a full batch decodes in requests of mean length.
        begun = time.perf_counter()
        generate(model, PROMPTS[0], n=arguments.rows, max_tokens=60, seed=0, ignore_eos=True)
        rate = arguments.rows / (time.perf_counter() - begun)
        found = arrivals(model, rate=rate, count=arguments.requests, rows=arguments.rows, seed=0)
        figures["arrivals"] = {"requests": arguments.requests, "rate_per_s": round(rate, 2), **found}
        print(figures["arrivals"], flush=True)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

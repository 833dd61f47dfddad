"""PILS: distributions of nano in a few numbers, and prompts read back from them.

    python bench/invert.py --json bench/results/invert.json

Compression: the largest error of all log-probabilities, rebuilt from d + 100 of them, by nano's own output layer and
by a space found from outputs alone. Inversion: hidden prompts are two of the tokens most common in a book; a small
encoder-decoder learns to read them back from T greedy steps. Controls: the same with only the tokens that were
generated (each as a fixed random vector), and answers of other prompts. Exact matches and token F1 on held-out
prompts, none of them in training, and on those of them no token of which occurs in the answer.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nextoken
from nextoken.inversion.log_ratios import LogRatioCodec, dimension
from nextoken.inversion.prompt_inverter import PromptInverter, answers, token_f1
from nextoken.scores.quality import bootstrap
from record import write


def compression(model: Any, rows: list[list[int]]) -> dict[str, Any]:
    following = model.predict(torch.tensor(rows))
    log_probs = following.log_probs().flatten(0, 1)
    learn, fresh = log_probs[: len(log_probs) // 2], log_probs[len(log_probs) // 2 :]
    width = model.network.head().hidden_size
    own = LogRatioCodec.of_model(model)
    outside = LogRatioCodec.from_outputs(learn, width=width)
    wide = torch.log_softmax(following.hidden.flatten(0, 1).double() @ model.network.head().weight.double().T, -1)
    found: dict[str, Any] = {"vocabulary": log_probs.shape[1], "width": width, "numbers kept": own.size}
    found["width found in float64"] = dimension(wide)
    for label, codec in (("own output layer", own), ("outputs alone", outside)):
        error = (codec.decompress(codec.compress(fresh)) - fresh).abs()
        found[label] = {
            "max error": error.max().item(),
            "mean error": error.mean().item(),
            "condition": codec.condition,
        }
    return found


def measured(found: list[tuple[int, ...]], true: list[list[int]], kept: list[int]) -> dict[str, Any]:
    exact = np.array([float(list(found[number]) == true[number]) for number in kept])
    f1 = np.array([token_f1(found[number], true[number]) for number in kept])
    record: dict[str, Any] = {"prompts": len(kept)}
    for label, values in (("exact", exact), ("token F1", f1)):
        if len(kept):
            one = bootstrap(lambda x, weights: (weights * x).sum(-1) / weights.sum(-1), values)
            record[label] = {"value": one.value, "low": one.low, "high": one.high}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--common", type=int, default=100, help="tokens that hidden prompts are made of")
    parser.add_argument("--length", type=int, default=2, help="tokens of a hidden prompt")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = nextoken.load("nano")
    draw = random.Random(0)
    book = sorted((given.data / "books").glob("*.txt"))[0].read_text(encoding="utf-8")
    text = list(model.vocab.encode(book).ids)
    common = [token for token, _ in Counter(text).most_common(given.common)]
    pieces: dict[tuple[int, ...], None] = {}
    while len(pieces) < given.prompts + 300:
        pieces[tuple(draw.choice(common) for _ in range(given.length))] = None
    prompts = [list(piece) for piece in pieces]
    figures: dict[str, Any] = {"compression": compression(model, [text[i : i + 100] for i in range(0, 1000, 100)])}
    print(figures["compression"])

    codec = LogRatioCodec.of_model(model)
    begin = time.perf_counter()
    seen = answers(model, [[model.vocab.bos_id, *prompt] for prompt in prompts], codec, steps=max(given.steps))
    print(f"answers in {time.perf_counter() - begin:.0f} s")
    said = codec.decompress(seen[-300:].double()).argmax(-1)
    whole = torch.cat([codec.decompress(some.double()).argmax(-1) for some in seen.split(500)])
    vectors = torch.randn(model.vocab.size, codec.size, generator=torch.Generator().manual_seed(0))
    true = prompts[-300:]
    apart = [number for number, row in enumerate(said.tolist()) if not {*row} & {*true[number]}]
    runs = {f"{steps} steps": seen[:, :steps] for steps in given.steps}
    runs[f"{max(given.steps)} generated tokens alone"] = vectors[whole]
    figures["inversion"] = {
        "tokens of a prompt": given.length,
        "made of": given.common,
        "training prompts": given.prompts,
        "runs": {},
    }
    for label, features in runs.items():
        begin = time.perf_counter()
        inverter = PromptInverter.fit(
            features[: given.prompts], prompts[: given.prompts], vocab_size=model.vocab.size, epochs=given.epochs
        )
        seconds = time.perf_counter() - begin
        found = inverter.recover(features[-300:], max_tokens=8)
        record = {
            "all": measured(found, true, list(range(300))),
            "no token of the prompt in the answer": measured(found, true, apart),
            "answers of other prompts": measured(inverter.recover(features[-300:].roll(1, 0)), true, list(range(300))),
            "seconds of training": seconds,
        }
        figures["inversion"]["runs"][label] = record
        whole_set = record["all"]
        print(
            f"{label:30} exact {whole_set['exact']['value']:.3f} [{whole_set['exact']['low']:.3f}, "
            f"{whole_set['exact']['high']:.3f}]  F1 {whole_set['token F1']['value']:.3f}  ({seconds:.0f} s)"
        )
    if given.json:
        write(given.json, figures)


if __name__ == "__main__":
    main()

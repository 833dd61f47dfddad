"""Zero-shot detection of machine text by the bundled models, and the errors of the concentration tests.

    python bench/detect.py --json bench/results/detect.json

Texts: pairs of a person's text and a machine's continuation of its opening, news (XSum) and stories (Reddit), by
davinci, gpt-3.5-turbo and gpt-4. Both of a pair are cut to as many tokens as the shorter has, at most `--tokens`; pairs
that would be shorter than half of that are left out. The judges, tiny and nano, have 5.0 and 0.5 M parameters and were
brought up on nineteenth-century novels: figures are what so weak judges give, beside published ones of models a
thousand times as large. AUROC, and true positives at 1 % and 5 % false positives, with 95 % bootstrap intervals over
pairs; thresholds come from the persons' texts of the same set (1 % of 80 texts is none, so that no false alarm is
allowed, and the intervals are wide).

Then the concentration tests on texts that tiny drew itself, whose tokens are as they were drawn: how often "tiny drew
this" is rejected, which for a right test is at most the level; and how often it is for text from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nextoken
from nextoken.decode.generate import generate
from nextoken.model.base import LanguageModel
from nextoken.scores.concentration import betting_test, bound_test, normal_test
from nextoken.scores.detection import conditional_curvature
from nextoken.scores.perturbation import SpanResampler, read_variants
from nextoken.scores.quality import auroc, bootstrap, tpr_at_fpr
from nextoken.scores.reliability import wilson
from nextoken.scores.surprisal_bounds import tolerance
from nextoken.signature import Signature
from nextoken.signature.given import signature_of
from record import write

SOURCES = ("davinci", "gpt-3.5-turbo", "gpt-4")
GENRES = ("xsum", "writing")
ONE_READING = ("mean_logprob", "rank", "log_rank", "lrr", "low_entropy", "gltr", "fast_detectgpt", "liketropy")
PUBLISHED = {
    "AUROC, ChatGPT and GPT-4 text, judge GPT-J-6B / gpt-neo-2.7B (arXiv:2310.05130)": {
        "Fast-DetectGPT": 0.9338,
        "DetectGPT": 0.7225,
    },
    "AUROC, text of five open models, each judged by itself (arXiv:2310.05130)": {
        "Fast-DetectGPT": 0.9887,
        "DetectGPT": 0.9554,
    },
    "AUROC, XSum, Llama-3-8B text judged by itself (code of arXiv:2501.02406)": {
        "mean_logprob": 0.994,
        "rank": 0.745,
        "log_rank": 0.9975,
        "entropy (high = machine)": 0.414,
        "binoculars": 0.9998,
    },
    "TPR at 5 % FPR, RAID without attacks (arXiv:2501.02406)": {"liketropy": 0.825},
}


def pairs_of(data: Path, genre: str, source: str, model: LanguageModel, count: int, tokens: int) -> list[list[str]]:
    """[human texts, machine texts], the i-th of both cut to one number of tokens."""
    found = json.loads((data / "machine-text" / f"{genre}_{source}.json").read_text())
    sides: list[list[str]] = [[], []]
    for pair in zip(found["original"], found["sampled"], strict=True):
        encoded = [model.vocab.encode(text) for text in pair]
        size = min(tokens, *map(len, encoded))
        if size < tokens // 2 or len(sides[0]) == count:
            continue
        for side, text, encoding in zip(sides, pair, encoded, strict=True):
            side.append(text.encode()[: encoding.ends[size - 1]].decode(errors="ignore"))
    return sides


def judged(scores: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """AUROC and TPR at fixed FPR of scores [2 n], humans first, each with its interval."""
    machine = np.repeat([0, 1], len(scores) // 2)
    measures: dict[str, Callable[..., Any]] = {
        "auroc": auroc,
        "tpr_at_fpr_1%": partial(tpr_at_fpr, fpr=0.01),
        "tpr_at_fpr_5%": partial(tpr_at_fpr, fpr=0.05),
    }
    found: dict[str, Any] = {"texts": len(scores)}
    for name, measure in measures.items():
        interval = bootstrap(partial(measure, missing="omit"), scores, machine, groups=groups, resamples=1000)
        found[name] = [round(value, 3) for value in (interval.value, interval.low, interval.high)]
    return found


def detectors(tiny: LanguageModel, nano: LanguageModel, sides: list[list[str]]) -> dict[str, np.ndarray]:
    """Every detector that needs one reading of each model, high = machine [2 n]."""
    texts = [text for side in sides for text in side]
    readings = {
        "tiny": nextoken.read(tiny, texts, against=nano, top=0, progress=False),
        "nano": nextoken.read(nano, texts, against=tiny, top=0, progress=False),
    }
    found = {f"{name}, {judge}": nextoken.score(read, name) for name in ONE_READING for judge, read in readings.items()}
    found["binoculars, observer tiny, performer nano"] = nextoken.score(readings["tiny"], "binoculars")
    found["binoculars, observer nano, performer tiny"] = nextoken.score(readings["nano"], "binoculars")
    found["fast_detectgpt, scoring tiny, sampling nano"] = conditional_curvature(tiny, texts, sampling=nano)
    return found


def perturbed(tiny: LanguageModel, nano: LanguageModel, sides: list[list[str]]) -> dict[str, np.ndarray]:
    """DetectGPT, its undivided form and NPR: tiny judges, nano draws the variants."""
    texts = [text for side in sides for text in side]
    signature = nextoken.read(tiny, texts, top=0, progress=False)
    variants = read_variants(tiny, texts, SpanResampler(nano, variants=10))
    names = {"detectgpt": "detectgpt", "npr": "npr", "detectgpt, undivided": "neighbourhood"}
    return {f"{shown}, tiny": nextoken.score(signature, name, variants=variants) for shown, name in names.items()}


def drawn(judge: LanguageModel, writer: LanguageModel, count: int, tokens: int, rule: str | None) -> Signature:
    """Texts of the writer under the judge, token by token as they were drawn."""
    made = generate(writer, [""], transform=rule, n=count, max_tokens=tokens, seed=1, ignore_eos=True)
    assert isinstance(made, list)
    return Signature.concat([signature_of(judge, one.request.prompt, one.tokens, top=0) for one in made])


def rejected(signature: Signature, *, skip: int = 0) -> dict[str, Any]:
    """Share of the texts that each test rejects at 5 % and 1 %, with Wilson intervals."""
    found: dict[str, Any] = {}
    for test in (normal_test, betting_test, bound_test):
        for side in ("two-sided", "surprising", "predictable"):
            p_value = test(signature, alternative=side, skip=skip).p_value
            for level in (0.05, 0.01):
                hits = int((p_value <= level).sum())
                low, high = wilson(np.asarray(hits), np.asarray(len(p_value)))
                rounded = [round(float(value), 3) for value in (hits / len(p_value), low, high)]
                found.setdefault(test.__name__, {}).setdefault(side, {})[f"{level:.0%}"] = rounded
    return found


def concentration(tiny: LanguageModel, nano: LanguageModel, data: Path, count: int, tokens: int) -> dict[str, Any]:
    null = drawn(tiny, tiny, count, tokens, None)
    figures: dict[str, Any] = {
        "texts": count,
        "least_gap_that_the_bound_rejects_at_5%": {
            str(n): round(tolerance(n, 0.025, vocab_size=tiny.vocab.size), 3) for n in (25, 100, tokens, 1000)
        },
        "drawn from tiny": {f"{n} tokens": rejected(null, skip=tokens - n) for n in (25, 50, 100, tokens)},
    }
    again = nextoken.read(tiny, [null.text(i) for i in range(null.n_texts)], top=0, progress=False)
    passages = []
    for book in ("frankenstein.txt", "the-time-machine.txt"):
        text = " ".join((data / "books" / book).read_text().split())
        ends = tiny.vocab.encode(text).ends
        passages += [text.encode()[ends[i] : ends[i + tokens]].decode(errors="ignore") for i in range(1, 40_000, 800)]
    others = {
        "drawn from tiny, tokenised anew": again,
        "tiny at temperature 0.8": drawn(tiny, tiny, count // 4, tokens, "temperature(0.8)"),
        "tiny with top-p 0.9": drawn(tiny, tiny, count // 4, tokens, "top_p(0.9)"),
        "drawn from nano": drawn(tiny, nano, count // 4, tokens, None),
        "books that tiny never saw": nextoken.read(tiny, passages, top=0, progress=False),
    }
    for name, signature in others.items():
        gap = nextoken.score(signature, "excess_surprisal")
        figures[name] = {
            "texts": signature.n_texts,
            "mean_excess_nats": round(float(np.nanmean(gap)), 3),
            **rejected(signature),
        }
    return figures


def shown(name: str, found: dict[str, Any]) -> None:
    values = [f"{found[key][0]:6.3f} [{found[key][1]:.3f}, {found[key][2]:.3f}]" for key in list(found)[1:]]
    print(f"  {name:46}" + "  ".join(values), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pairs", type=int, default=80, help="of each file")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of a text")
    parser.add_argument("--perturbed", type=int, default=40, help="pairs of each davinci file for DetectGPT and NPR")
    parser.add_argument("--drawn", type=int, default=400, help="texts drawn for the concentration tests")
    parser.add_argument("--json", default="bench/results/detect.json")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.process_time()
    tiny, nano = nextoken.load("tiny"), nextoken.load("nano")
    figures: dict[str, Any] = {"tokens": chosen.tokens, "machine_text": {}, "published": PUBLISHED}
    for genre in GENRES:
        pooled: dict[str, list[np.ndarray]] = {}
        members: list[np.ndarray] = []
        for source in SOURCES:
            sides = pairs_of(chosen.data, genre, source, tiny, chosen.pairs, chosen.tokens)
            count = len(sides[0])
            groups = np.tile(np.arange(count), 2)
            print(f"\n{genre}, {source}: {count} pairs; AUROC, TPR at 1 %, TPR at 5 %")
            scores = detectors(tiny, nano, sides)
            for name, values in scores.items():
                pooled.setdefault(name, []).append(values.reshape(2, -1))
            members.append(np.arange(count))
            found = {name: judged(values, groups) for name, values in scores.items()}
            if source == "davinci":
                some = [side[: chosen.perturbed] for side in sides]
                each = np.tile(np.arange(len(some[0])), 2)
                found |= {name: judged(values, each) for name, values in perturbed(tiny, nano, some).items()}
            figures["machine_text"][f"{genre}_{source}"] = found
            for name, one in found.items():
                shown(name, one)
        # Pairs are drawn one of each source together, so that every resample holds as many of each.
        groups = np.tile(np.concatenate(members), 2)
        every = {name: np.concatenate(parts, axis=1).ravel() for name, parts in pooled.items()}
        figures["machine_text"][f"{genre}, all sources"] = {name: judged(v, groups) for name, v in every.items()}
        print(f"\n{genre}, all sources")
        for name, one in figures["machine_text"][f"{genre}, all sources"].items():
            shown(name, one)
    figures["concentration"] = concentration(tiny, nano, chosen.data, chosen.drawn, 200)
    print("\nrejected at 5 %, two-sided: normal, betting, bound")
    null = figures["concentration"]["drawn from tiny"]
    for name, one in [(f"drawn from tiny, {n}", v) for n, v in null.items()] + list(figures["concentration"].items()):
        if "normal_test" in one if isinstance(one, dict) else False:
            tests = [one[test]["two-sided"]["5%"] for test in ("normal_test", "betting_test", "bound_test")]
            print(f"  {name:46}" + "  ".join(f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in tests))
    figures["processor_seconds"] = round(time.process_time() - begun)
    print(f"\n{figures['processor_seconds']} s of processor time")
    write(chosen.json, figures)


if __name__ == "__main__":
    main()

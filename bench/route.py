"""Routing between a small and a large model: switching at every token, and cascades of whole answers.

    python bench/route.py --data ../shared/data --json bench/results/route.json

Switching: `nano` and `tiny` read passages of two held-out books under the router, that is, under the distributions it
would draw from. Thresholds are quantiles of nano's rolling entropy on passages of their own. Loss is in nats per token
beside f, the share of the tokens that tiny answers. `line` is the loss on the line between both pure models at the same
f, what coins give on average; `advantage` is the line's loss less the router's, with a 95 % bootstrap interval over
passages. `random` is RandomSwitching with that share and with stretches of the minimum stay, one seed.
`hindsight` is the loss if the same number of tokens had been chosen by which gain most: no router can know them.
Parameters are per token, `answering` as papers count, `activated` with what a model reads to catch up, when the text
is drawn token by token. Milliseconds are of sampling one text at a time, the median over prompts, with tiny inside a
network of `--times` its weights (the same distribution, see speculate.py, weights packed): between models as small as
these a pass costs about the same, whichever it is.

Cascades: two Llamas learn sums of two numbers of one to four digits, written with the last digit first. To the small
one no hard sum was shown, in which two digits above 5 meet in a column, so that it has to guess there. Answers have two
to six tokens, their end token among them, and are right or wrong. Area under accuracy against deferral rate on sums
that no rule has seen; alpha is chosen on the sums that the learned rule learns from. Three seeds: halves of the sums to
learn from and to test on, and the learned rule's first weights. Beside each area the difference from the learned
rule's, with a 95 % bootstrap interval over sums, and the rank correlation of being deferred early with the answer's
length.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import record
from nextoken.decode.generate import generate
from nextoken.model.base import LanguageModel
from nextoken.model.hf import HFModel
from nextoken.model.loading import load
from nextoken.route import (
    Answer,
    Cascade,
    ChowAverage,
    ChowQuantile,
    ChowSum,
    DeferralRule,
    EntropySwitching,
    Features,
    RandomSwitching,
    SwitchedNext,
    Switching,
    deferral_curve,
    fit_post_hoc,
    threshold_for,
)
from speculate import inflated
from training import character_tokenizer, train

BOOKS = ("frankenstein", "the-time-machine")
MANNERS = ((5, 5, (0.9, 0.7, 0.5, 0.3, 0.1)), (1, 0, (0.9, 0.5, 0.1)))
"""Window and minimum stay, and the quantiles that give the thresholds."""
SMALL, LARGE = {"hidden": 32, "layers": 2}, {"hidden": 64, "layers": 2}
ALPHAS = tuple(np.linspace(0, 1, 11).tolist())
DRAWS = 1000


def passages(data: Path, model: LanguageModel, count: int, length: int) -> list[list[int]]:
    """Rows of the begin token and `length` tokens, evenly over the books, first one of each book, then the other."""
    rows = []
    for name in BOOKS:
        text = (data / "books" / f"{name}.txt").read_text(encoding="utf-8")
        size, share = len(text), count // len(BOOKS)
        for place in range(share):
            begin = size * (place + 1) // (share + 2)
            ids = model.vocab.encode(text[begin : begin + 8 * length]).ids[1 : length + 1]
            rows.append([model.vocab.bos_id or 0, *ids])
    return rows


def losses(model: LanguageModel, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """-log p of every token but the first [N, L] in nats, and whether the large model gave it."""
    found, large = [], []
    for begin in range(0, len(rows), 8):
        ids = torch.tensor(rows[begin : begin + 8])
        said = model.predict(ids[:, :-1])
        nats = said.statistics(ids[:, 1:]).logprob
        assert nats is not None
        found.append(-nats.double().numpy())
        large.append(said.is_large.numpy() if isinstance(said, SwitchedNext) else np.zeros(nats.shape, dtype=bool))
    return np.concatenate(found), np.concatenate(large)


def rolling(model: LanguageModel, rows: list[list[int]], window: int) -> np.ndarray:
    """Rolling means of the entropies in bits, of all rows together."""
    means = []
    for row in rows:
        bits = model.predict([row]).statistics().entropy[0].double().numpy() / np.log(2)
        means.append(np.convolve(bits, np.ones(window) / window, mode="valid"))
    return np.concatenate(means)


def interval(values: np.ndarray) -> list[float]:
    return [round(float(edge), 4) for edge in np.quantile(values, [0.025, 0.975])]


def switching(arguments: argparse.Namespace) -> dict[str, Any]:
    small, large = load("nano"), load("tiny")
    assert isinstance(large, HFModel)
    heavy = inflated(large, arguments.times).packed()
    rows = passages(arguments.data, small, 2 * arguments.passages, arguments.length)
    calibration, test = rows[::2], rows[1::2]
    (own, _), (other, _) = losses(small, test), losses(large, test)
    resamples = np.random.default_rng(0).integers(0, len(test), (DRAWS, len(test)))
    gains = np.sort((own - other).ravel())[::-1]
    table: list[dict[str, Any]] = []
    for window, stay, quantiles in MANNERS:
        entropies = rolling(small, calibration, window)
        for quantile in quantiles:
            threshold = float(np.quantile(entropies, quantile))
            router = EntropySwitching(small, large, threshold=threshold, window=window, min_stay=stay)
            found, chosen = losses(router, test)
            f = float(chosen.mean())
            shares = chosen[resamples].mean((1, 2))
            lines = (1 - shares) * own[resamples].mean((1, 2)) + shares * other[resamples].mean((1, 2))
            line = float((1 - f) * own.mean() + f * other.mean())
            coins, tossed = losses(RandomSwitching(small, large, share=f, stay=max(1, stay)), test)
            table.append(
                {
                    "window": window,
                    "min_stay": stay,
                    "quantile": quantile,
                    "threshold": round(threshold, 3),
                    "f": round(f, 4),
                    "loss": round(float(found.mean()), 4),
                    "line": round(line, 4),
                    "advantage": round(line - float(found.mean()), 4),
                    "advantage interval": interval(lines - found[resamples].mean((1, 2))),
                    "random": round(float(coins.mean()), 4),
                    "random f": round(float(tossed.mean()), 4),
                    "hindsight": round(float(own.mean() - gains[: int(chosen.sum())].sum() / gains.size), 4),
                    **drawing(
                        EntropySwitching(small, heavy, threshold=threshold, window=window, min_stay=stay), arguments
                    ),
                }
            )
            print("switching", table[-1], flush=True)
    half = table[2]["f"]
    parameters = [part.parameters for part in router.spent.models]
    pure = {
        "nano": {"loss": round(float(own.mean()), 4), "parameters": parameters[0], **timed(small, arguments)},
        "tiny": {"loss": round(float(other.mean()), 4), "parameters": parameters[1], **timed(heavy, arguments)},
        "random at the middle f": drawing(RandomSwitching(small, heavy, share=half, stay=5), arguments),
    }
    print("pure", pure, flush=True)
    return {
        "passages": len(test),
        "tokens each": arguments.length,
        "pure": pure,
        "entropy switching": table,
    }


def timed(model: LanguageModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per token of sampling."""
    spans = []
    for place in range(arguments.prompts + 1):
        begin = time.perf_counter()
        made = generate(model, PROMPTS[place % len(PROMPTS)], max_tokens=48, seed=place, ignore_eos=True)
        spans.append(1000 * (time.perf_counter() - begin) / len(made.tokens))
    # In the first one caches and threads are made.
    return {"ms per token": round(statistics.median(spans[1:]), 3)}


PROMPTS = (
    "It was on a dreary night of November",
    "The old man looked at the sea and",
    "I had no doubt that the machine",
    "She opened the letter, and in it",
)


def drawing(router: Switching, arguments: argparse.Namespace) -> dict[str, Any]:
    before = router.spent
    spans = timed(router, arguments)
    cost = router.spent - before
    return {
        "drawn f": round(cost.large_share, 4),
        "drawn answering": round(cost.answering),
        "drawn activated": round(cost.activated),
        **spans,
    }


def sums(count: int, rng: random.Random) -> list[tuple[str, str]]:
    made = []
    for _ in range(count):
        a, b = (
            rng.randrange(10 ** (size - 1) if size > 1 else 0, 10**size)
            for size in (rng.randint(1, 4), rng.randint(1, 4))
        )
        made.append((f"{str(a)[::-1]}+{str(b)[::-1]}=", str(a + b)[::-1]))
    return made


def is_hard(question: str) -> bool:
    """Whether two digits above 5 meet in a column."""
    first, second = question.rstrip("=").split("+")
    return any(min(a, b) > "5" for a, b in zip(first, second, strict=False))


def learnt(told: list[tuple[str, str]], steps: int, sizes: dict[str, int], name: str) -> HFModel:
    masks = [[place > len(question) for place in range(len(question) + len(answer) + 2)] for question, answer in told]
    return train(
        [question + answer for question, answer in told],
        tokenizer=character_tokenizer("0123456789+="),
        context=32,
        steps=steps,
        batch=64,
        lr=4e-3,
        loss_mask=masks,
        name=name,
        **sizes,
    )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's, equal values sharing their mean rank; None where one has no two different values."""
    ranks = []
    for values in (a, b):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[group])
    if min(rank.std() for rank in ranks) == 0:
        return None
    return round(float(np.corrcoef(*ranks)[0, 1]), 3)


def cascades(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(0)
    told = sums(20000, rng)
    known = {question for question, _ in told}
    fresh = [one for one in dict.fromkeys(sums(2 * arguments.sums, rng)) if one[0] not in known][: arguments.sums]
    small = learnt([one for one in told if not is_hard(one[0])], arguments.small_steps, SMALL, "small")
    large = learnt(told, arguments.large_steps, LARGE, "large")
    questions = [question for question, _ in fresh]
    settings: dict[str, Any] = {"transform": "greedy", "max_tokens": 8, "seed": 0}
    own, other = (generate(model, questions, **settings) for model in (small, large))
    assert isinstance(own, list) and isinstance(other, list)
    right, better = (
        np.array([made.text == answer for made, (_, answer) in zip(made_by, fresh, strict=True)], dtype=float)
        for made_by in (own, other)
    )
    answers = [Answer.of(made, embedding=True) for made in own]
    lengths = np.array([len(answer.logprobs) for answer in answers])
    hard = np.array([is_hard(question) for question in questions])
    print("hard", hard.mean(), right[hard].mean(), right[~hard].mean())
    print("accuracy", right.mean(), better.mean(), "length", lengths.mean(), flush=True)
    by_seed = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(answers))
        for_learning, for_testing = order[: len(order) // 2], order[len(order) // 2 :]
        by_seed.append(ranked(answers, right, better, lengths, for_learning, for_testing, small, seed))
    return {
        "sums": len(answers),
        "hard": round(float(hard.mean()), 4),
        "small": {
            **SMALL,
            "accuracy": round(float(right.mean()), 4),
            "on hard sums": round(float(right[hard].mean()), 4),
            "on others": round(float(right[~hard].mean()), 4),
        },
        "large": {**LARGE, "accuracy": round(float(better.mean()), 4)},
        "seeds": by_seed,
        "cascade": run_cascade(small, large, fresh, answers),
    }


def ranked(
    answers: list[Answer],
    right: np.ndarray,
    better: np.ndarray,
    lengths: np.ndarray,
    learning: np.ndarray,
    testing: np.ndarray,
    small: HFModel,
    seed: int,
) -> dict[str, Any]:
    """Areas and intervals of every rule on one split."""

    def area(rule: DeferralRule, places: np.ndarray) -> float:
        sure = rule.confidence([answers[place] for place in places])
        return deferral_curve(sure, small=right[places], large=better[places]).area

    best = max(ALPHAS, key=lambda alpha: area(ChowQuantile(alpha), learning))
    shown = [answers[place] for place in learning]
    learn: dict[str, Any] = {"small": right[learning], "large": better[learning], "model": small, "seed": seed}
    rules: dict[str, DeferralRule] = {
        "post-hoc quantile": fit_post_hoc(shown, **learn),
        "post-hoc embed-1": fit_post_hoc(shown, features=Features(totals=True, embedding=True), **learn),
        "sum": ChowSum(),
        "average": ChowAverage(),
        "minimum": ChowQuantile(0.0),
        "best quantile": ChowQuantile(best),
    }
    tested = [answers[place] for place in testing]
    own, other = right[testing], better[testing]
    sure = {name: rule.confidence(tested) for name, rule in rules.items()}
    sure |= {"random": np.zeros(len(tested)), "oracle": own - other}
    draws = np.random.default_rng(seed).integers(0, len(tested), (DRAWS, len(tested)))
    areas = {
        name: np.array([deferral_curve(values[d], small=own[d], large=other[d]).area for d in draws])
        for name, values in sure.items()
    }
    told = {}
    for name, values in sure.items():
        curve = deferral_curve(values, small=own, large=other)
        told[name] = {
            "area": round(curve.area, 4),
            "interval": interval(areas[name]),
            "over random": round(curve.gain, 4),
            "learned less this": interval(areas["post-hoc quantile"] - areas[name]),
            "accuracy at rates": {str(rate): round(curve.at(rate), 4) for rate in (0.1, 0.25, 0.5, 0.75)},
            "deferred early and length": rank_correlation(-values, lengths[testing]),
        }
        print(seed, name, told[name], flush=True)
    return {"seed": seed, "best alpha": best, "rules": told}


def run_cascade(small: HFModel, large: HFModel, fresh: list[tuple[str, str]], answers: list[Answer]) -> dict[str, Any]:
    """The whole cascade on some sums, at a threshold from the others: accuracy, cost, and time beside both models."""
    some = fresh[:200]
    questions = [question for question, _ in some]
    rule = ChowQuantile(0.0)
    threshold = threshold_for(rule.confidence(answers[200:]), 0.5)
    cascade = Cascade(small, large, rule=rule, threshold=threshold)
    begin = time.perf_counter()
    said = cascade.generate(questions, max_tokens=8, seed=0)
    figures: dict[str, Any] = {
        "rate": said.rate,
        "accuracy": accuracy([made.text for made in said.generations], some),
        "ms per answer": round(1000 * (time.perf_counter() - begin) / len(some), 3),
        "activated per token": round(said.cost.activated),
        "answering per token": round(said.cost.answering),
        "parameters": [part.parameters for part in said.cost.models],
    }
    for name, model in (("small", small), ("large", large)):
        begin = time.perf_counter()
        made = generate(model, questions, transform="greedy", max_tokens=8, seed=0)
        assert isinstance(made, list)
        figures[f"{name} alone"] = {
            "accuracy": accuracy([one.text for one in made], some),
            "ms per answer": round(1000 * (time.perf_counter() - begin) / len(some), 3),
        }
    print("cascade", figures, flush=True)
    return figures


def accuracy(texts: list[str], told: list[tuple[str, str]]) -> float:
    return sum(text == answer for text, (_, answer) in zip(texts, told, strict=True)) / len(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", type=Path, default=Path("bench/results/route.json"))
    parser.add_argument("--passages", type=int, default=60)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--sums", type=int, default=2000)
    parser.add_argument("--small-steps", type=int, default=1700)
    parser.add_argument("--large-steps", type=int, default=1800)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"cascades": cascades(arguments), "switching": switching(arguments)}
    record.write(arguments.json, figures)


if __name__ == "__main__":
    main()

"""Rectification end to end on a bundled model: how much undesired text it prevents, at what cost, beside other means.

    python bench/rectify.py --json bench/results/rectify.json

A text is undesired if it speaks of a man and of a woman (he, him, his, himself; she, her, hers, herself): harm of two
tokens that lie apart, each harmless alone. Prompts are passages with a pronoun of one kind. Continuations of prompts
from books are sampled from the model and scored, a value network with the body of nano is trained on them, and the
model is rectified on prompts from two other books, which it has not seen.

Beside it: reweighting with the same values (p (1 + Q - eps), in the manner of FUDGE), biases against the words of one
or of both kinds, sampling at a lower temperature, and a filter written by hand that knows the rule. For each: the
share of undesired texts; the perplexity of what was drawn under the model itself, of all texts and of those that are
not undesired (once the harm is done every token is a dead end); the share of continuations that still have a pronoun,
which is no harm by itself; the divergence KL(p' || p) of the whole text in nats.
The least divergence at which any method reaches a rate r from the model's r_0 is
r log(r / r_0) + (1 - r) log((1 - r) / (1 - r_0)), printed as `least`. Then the families are compared at the perplexity
and at the divergence of exact rectification: the lowest rate that each reaches at that cost or less, by interpolation.
Intervals are bootstraps over prompts, 95 %; every setting continues the same prompts with the same random numbers.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import nextoken
from nextoken.decode import Context, LogitBias, Temperature, Transform
from nextoken.decode.generate import generate
from nextoken.decode.generation import Generation
from nextoken.decode.logged import logged
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.rectified import Rectified
from nextoken.model.sarsa import FitStep, LoggedText, Recipe, fit_dead_ends
from nextoken.model.value_head import HFValue
from record import write

HE, SHE = ("he", "him", "his", "himself"), ("she", "her", "hers", "herself")
LEARNT = ("jane-eyre", "great-expectations", "dracula", "wuthering-heights", "emma", "middlemarch", "little-women")
HELD_OUT = ("frankenstein", "the-time-machine")
EPS = (0.0, 0.1, 0.3)


def mentions(text: str, words: Sequence[str]) -> bool:
    return re.search(rf"\b({'|'.join(words)})\b", text, re.IGNORECASE) is not None


def undesired(texts: Sequence[str]) -> list[float]:
    return [float(mentions(text, HE) and mentions(text, SHE)) for text in texts]


def prompts(model: LanguageModel, data: Path, books: Sequence[str], count: int, size: int, seed: int) -> list[str]:
    """Passages of `size` tokens that begin with a sentence and have a pronoun of one kind."""
    texts = [re.sub(r"\s+", " ", (data / "books" / f"{book}.txt").read_text(encoding="utf-8")) for book in books]
    begins = [(text, match.end()) for text in texts for match in re.finditer(r"[.!?]”? (?=[A-Z“])", text)]
    found: list[str] = []
    for i in np.random.default_rng(seed).permutation(len(begins)):
        text, begin = begins[i]
        ids = model.vocab.encode(text[begin : begin + 8 * size]).ids[:size]
        passage = model.vocab.decode(ids).decode(errors="ignore")
        if mentions(passage, HE) != mentions(passage, SHE):
            found.append(passage)
        if len(found) == count:
            return found
    raise SystemExit(f"the books have {len(found)} passages of this kind, not {count}; ask for fewer")


@dataclass(frozen=True)
class KnowsTheRule(Transform):
    """Forbids the words of one kind once one of the other is there."""

    he: frozenset[int]
    she: frozenset[int]

    def __call__(self, scores: torch.Tensor, context: Context) -> torch.Tensor:
        scores = scores.clone()
        assert context.vocab is not None
        for row in range(len(scores)):
            text = context.vocab.decode_text(context.history(row))
            for there, others in ((HE, self.she), (SHE, self.he)):
                if mentions(text, there):
                    scores[row, list(others)] = float("-inf")
        return scores


def tokens_of(model: LanguageModel, words: Sequence[str]) -> frozenset[int]:
    """Tokens that spell one of the words, with or without a space, in any case."""
    return frozenset(
        token
        for token, spelled in enumerate(model.vocab.token_bytes)
        if spelled.decode(errors="replace").strip(" \n").lower() in words
    )


def base_surprisals(model: LanguageModel, made: Sequence[Generation], rows: int = 64) -> list[list[float]]:
    """-log p of each drawn token under the model itself."""
    found: list[list[float]] = []
    for at in range(0, len(made), rows):
        part = made[at : at + rows]
        texts = [[*one.request.prompt, *one.tokens] for one in part]
        width = max(map(len, texts))
        padded = torch.tensor([text + [ABSENT] * (width - len(text)) for text in texts])
        said = model.predict(padded[:, :-1]).statistics(padded[:, 1:]).logprob
        for one, row, text in zip(part, said, texts, strict=True):
            found.append((-row[len(one.request.prompt) - 1 : len(text) - 1]).tolist())
    return found


@dataclass(frozen=True)
class Outcome:
    """Per text: undesired or not, whether what was drawn has a pronoun, tokens, nats under the model, divergence."""

    bad: np.ndarray
    pronoun: np.ndarray
    count: np.ndarray
    nats: np.ndarray
    divergence: np.ndarray

    def figures(self, draws: np.ndarray) -> dict[str, object]:
        """Means with bootstrap intervals; `draws` [R, N] are indices of texts."""
        rate = self.bad[draws].mean(1)
        perplexity = np.exp(self.nats[draws].sum(1) / self.count[draws].sum(1))
        divergence = self.divergence[draws].mean(1)
        return {
            "undesired": round(self.rate, 4),
            "undesired_interval": interval(rate),
            "drawn_with_a_pronoun": round(float(self.pronoun.mean()), 3),
            "perplexity_of_other_texts": round(self.perplexity_of(self.bad == 0), 2),
            "perplexity": round(self.perplexity, 2),
            "perplexity_interval": interval(perplexity),
            "divergence_nats": round(float(self.divergence.mean()), 3),
            "divergence_interval": interval(divergence),
        }

    @property
    def rate(self) -> float:
        return float(self.bad.mean())

    @property
    def perplexity(self) -> float:
        return self.perplexity_of(self.bad >= 0)

    def perplexity_of(self, chosen: np.ndarray) -> float:
        return float(np.exp(self.nats[chosen].sum() / self.count[chosen].sum()))


def interval(values: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in np.quantile(values, [0.025, 0.975])]


def outcome(
    base: LanguageModel, model: LanguageModel, texts: Sequence[str], transform: Transform | None, length: int, seed: int
) -> Outcome:
    made = generate(model, list(texts), transform=transform, max_tokens=length, seed=seed)
    assert isinstance(made, list)
    whole = [model.vocab.decode_text([*one.request.prompt, *one.tokens]) for one in made]
    own = [sum(row) for row in base_surprisals(base, made)]
    drawn = [sum(one.surprisals) for one in made]
    return Outcome(
        np.array(undesired(whole)),
        np.array([mentions(one.text, HE + SHE) for one in made]),
        np.array([len(one.tokens) for one in made]),
        np.array(own),
        np.array(own) - np.array(drawn),
    )


def least_divergence(rate: float, base: float) -> float:
    """KL of Bernoulli(rate) to Bernoulli(base): no method can divert less."""
    parts = ((rate, base), (1 - rate, 1 - base))
    return sum(a * math.log(a / b) for a, b in parts if a > 0)


def calibration(value: HFValue, texts: Sequence[LoggedText]) -> dict[str, object]:
    """How -Q of the first drawn token, and of that half way, foretells the ending of texts it was not trained on."""
    found: dict[str, object] = {}
    ends = np.array([-text.reward for text in texts])
    for name, share in (("first_token", 0.0), ("half_way", 0.5)):
        said = []
        for text in texts:
            at = text.given + int(share * (len(text.tokens) - 1 - text.given))
            said.append(-float(value.predict([text.tokens[:at]])[0, -1, text.tokens[at]]))
        chance = np.array(said)
        edges = np.quantile(chance, [0, 0.25, 0.5, 0.75, 1])
        bins = np.clip(np.searchsorted(edges, chance, side="right") - 1, 0, 3)
        pairs = (ends[:, None] > ends[None, :]).sum()
        above = ((chance[:, None] > chance[None, :]) & (ends[:, None] > ends[None, :])).sum()
        found[name] = {
            "auc": round(float(above / pairs), 3),
            "brier": round(float(((chance - ends) ** 2).mean()), 4),
            "brier_of_the_mean": round(float(ends.mean() * (1 - ends.mean())), 4),
            "said_and_true_by_quarter": [
                [round(float(chance[bins == i].mean()), 3), round(float(ends[bins == i].mean()), 3)] for i in range(4)
            ],
        }
    return found


def reached(curve: Sequence[tuple[float, float]], at: float) -> float:
    """The lowest y on the line through (x, y), in this order, where x <= `at`; the first point has x <= `at`."""
    found = [y for x, y in curve if x <= at]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if min(x0, x1) <= at <= max(x0, x1) and x0 != x1:
            found.append(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="the model to rectify")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--prompts", type=int, default=5000, help="to learn from")
    parser.add_argument("--continuations", type=int, default=2, help="of each of them")
    parser.add_argument("--texts", type=int, default=600, help="drawn under each setting")
    parser.add_argument("--prompt-tokens", type=int, default=14)
    parser.add_argument("--length", type=int, default=32, help="tokens drawn at most")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--trace", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="bench/results/rectify.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, body = nextoken.load(options.model), nextoken.load("nano")
    seed, length = options.seed, options.length

    began = time.perf_counter()
    learnt = prompts(base, options.data, LEARNT, options.prompts, options.prompt_tokens, seed)
    held_out = prompts(base, options.data, HELD_OUT, options.texts, options.prompt_tokens, seed)
    texts = logged(base, learnt, undesired, n=options.continuations, max_tokens=length, seed=seed)
    checked = logged(base, held_out, undesired, n=1, max_tokens=length, seed=seed + 1)
    sampled = time.perf_counter()
    recipe = Recipe(epochs=options.epochs, rate=options.rate, warm_up=50, trace=options.trace)

    def told(step: FitStep) -> None:
        if step.step % 100 == 0:
            print(f"step {step.step} of {step.steps}, loss {step.loss:.4f}", flush=True)

    value = fit_dead_ends(body, texts, recipe=recipe, seed=seed, on_step=told)
    trained = time.perf_counter()
    rate = -sum(text.reward for text in texts) / len(texts)
    figures: dict[str, object] = {
        "texts_learnt_from": len(texts),
        "undesired_among_them": round(rate, 4),
        "seconds_sampling": round(sampled - began, 1),
        "seconds_training": round(trained - sampled, 1),
        "held_out": calibration(value, checked),
    }
    print(figures, flush=True)

    he, she = tokens_of(base, HE), tokens_of(base, SHE)
    everything: dict[str, dict[str, tuple[LanguageModel, Transform | None]]] = {
        "base": {"": (base, None)},
        **{
            rule: {f"eps {eps}": (Rectified(base, value, eps=eps, rule=rule), None) for eps in EPS}
            for rule in ("exact", "two_pass", "reweight")
        },
        "ban of one kind": {
            f"bias {bias}": (base, LogitBias(dict.fromkeys(she, bias))) for bias in (-1.0, -2.0, float("-inf"))
        },
        "ban of both kinds": {
            f"bias {bias}": (base, LogitBias(dict.fromkeys(he | she, bias))) for bias in (-1.0, -2.0, float("-inf"))
        },
        "temperature": {f"t {t}": (base, Temperature(t)) for t in (0.9, 0.8)},
        "knows the rule": {"": (base, KnowsTheRule(he, she))},
    }
    draws = np.random.default_rng(seed).integers(options.texts, size=(1000, options.texts))
    outcomes: dict[str, dict[str, Outcome]] = {}
    table: dict[str, dict[str, object]] = {}
    for family, settings in everything.items():
        for setting, (model, transform) in settings.items():
            found = outcome(base, model, held_out, transform, length, seed + 2)
            outcomes.setdefault(family, {})[setting] = found
            reference = outcomes["base"][""]
            told_of = found.figures(draws)
            told_of["less_undesired_than_base_interval"] = interval((reference.bad - found.bad)[draws].mean(1))
            told_of["least_divergence_nats"] = round(least_divergence(found.rate, reference.rate), 3)
            table[f"{family} {setting}".strip()] = told_of
            print(
                f"{family:18} {setting:10} undesired {found.rate:.3f} {told_of['undesired_interval']}  perplexity "
                f"{found.perplexity:6.2f}, of the others {told_of['perplexity_of_other_texts']:6.2f}  divergence "
                f"{found.divergence.mean():.3f} (least {told_of['least_divergence_nats']})  pronouns "
                f"{told_of['drawn_with_a_pronoun']}",
                flush=True,
            )
    figures["settings"] = table
    figures["at_the_perplexity_of_exact"] = compared(outcomes, lambda found: found.perplexity)
    figures["at_the_divergence_of_exact"] = compared(outcomes, lambda found: float(found.divergence.mean()))
    for name in ("at_the_perplexity_of_exact", "at_the_divergence_of_exact"):
        print(name, figures[name])
    write(options.json, figures)


def compared(outcomes: dict[str, dict[str, Outcome]], cost: Callable[[Outcome], float]) -> dict[str, object]:
    """The undesired rate that each family reaches at the cost of exact rectification, or less."""
    start = (cost(outcomes["base"][""]), outcomes["base"][""].rate)
    found: dict[str, object] = {}
    for setting, reference in outcomes["exact"].items():
        row: dict[str, object] = {"cost": round(cost(reference), 3), "exact": round(reference.rate, 4)}
        for family in ("two_pass", "reweight", "ban of one kind", "ban of both kinds", "temperature"):
            curve = [start, *((cost(one), one.rate) for one in outcomes[family].values())]
            row[family] = round(reached(curve, cost(reference)), 4)
        found[setting] = row
    return found


if __name__ == "__main__":
    main()

"""LenVM end to end on a small model: how well lengths are foretold, and what it costs to hit them.

    python bench/length.py --json bench/results/length.json

A Llama of 0.1 M parameters learns tales of a grammar: a prompt asks for a short, plain or long one, which shifts how
many sentences follow but does not settle it; sentences grow by adjectives and second parts. It then draws tales itself;
a copy of it with a scalar head learns from them; everything is measured on tales drawn anew.

Foretelling: at every token of fresh tales, the share of the variance of 1 - g^R that is explained, beside a constant
and beside the mean at that many tokens drawn (a clock); and the median of |l - R|, where the baselines take the length
that their mean value is worth. At the end of the prompt, the mean relative error of the discounted length against that
of many tales, beside a constant.

Control: tales of a given number of tokens, the end token not counted. `sampled` is the model without control, `hard`
and `soft` are the rules HardTarget and SoftTarget, once with the paper's candidates for hard targets, TopP(0.999) |
TopK(15), and once with likely ones only, MinP(0.05). `ban and force` is the cheat: the end token forbidden before the
target and forced at it, which always hits. For each: share of exact hits and of tales within 5 %, mean deviation, nats
per token under the model itself, nats of the end token alone, and the share of tales that are whole by the grammar.
Tilts: mean length and divergence per b. Intervals are bootstraps over tales, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nextoken.decode import Context, MinP, TopK, TopP, Transform
from nextoken.decode.generate import generate
from nextoken.decode.generation import Generation
from nextoken.model.base import LanguageModel
from nextoken.values import Schedule
from nextoken.values.length_control import LengthControlled
from nextoken.values.length_fit import Rollout, fit_length_value, rollouts
from nextoken.values.length_rule import HardTarget, LengthRule, SoftTarget, Tilt
from nextoken.values.length_value import HFLengthValue
from record import write
from training import train, word_tokenizer, words_of

WIDE, LIKELY = TopP(0.999) | TopK(15), MinP(0.05)
STOPS = {"short": 0.6, "plain": 0.35, "long": 0.15}
"""Chance of each sentence to be the last."""
HEROES, VERBS = ("king", "fox", "miller", "witch"), ("saw", "took", "lost", "found", "sold")
THINGS, ADJECTIVES = ("ring", "goose", "road", "tower", "song"), ("old", "red", "small", "very", "proud")


class BanAndForce(Transform):
    """The end token is forbidden before `length` tokens and the only one after them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        assert context.vocab is not None
        ends, scores = sorted(context.vocab.eos_ids), scores.clone()
        for row, drawn in enumerate(context.outputs):
            if len(drawn) < self.length:
                scores[row, ends] = -math.inf
            else:
                scores[row] = -math.inf
                scores[row, ends] = 0.0
        return scores


def tale(rng: np.random.Generator, kind: str) -> str:
    """Sentences until one is the last, with a chance that depends on the kind."""
    hero, sentences = rng.choice(HEROES), []
    while not sentences or rng.random() > STOPS[kind]:
        parts = [f"{rng.choice(VERBS)} the {described(rng, rng.choice(THINGS))}"]
        while rng.random() < 0.3:
            parts.append(f"{rng.choice(VERBS)} the {described(rng, rng.choice(THINGS))}")
        sentences.append(f" the {described(rng, hero)} {' and '.join(parts)} .")
    return f"{prompt_of(kind)}{''.join(sentences)} so it ends ."


def described(rng: np.random.Generator, noun: str) -> str:
    return " ".join([*(rng.choice(ADJECTIVES) for _ in range(rng.geometric(0.6) - 1)), noun])


def prompt_of(kind: str) -> str:
    return f"tell a {kind} tale :"


def is_whole(text: str) -> bool:
    """Whether what follows the prompt is a tale of the grammar."""
    noun = rf"the( ({'|'.join(ADJECTIVES)}))* ({{}})"
    part = rf"({'|'.join(VERBS)}) {noun.format('|'.join(THINGS))}"
    sentence = rf" {noun.format('|'.join(HEROES))} {part}( and {part})* \."
    return re.fullmatch(rf"({sentence})+ so it ends \.", text) is not None


def interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> list[float]:
    """Of the mean."""
    given = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(len(given), size=(1000, len(given)))
    return [round(float(x), 4) for x in np.quantile(given[draws].mean(1), [0.025, 0.975])]


def foretold(value: HFLengthValue, learnt: Sequence[Rollout], fresh: Sequence[Rollout]) -> dict[str, object]:
    """At every token of fresh answers that ended."""
    g = value.discount
    rows = [text for text in fresh if text.remaining == 0]
    true, said, drawn = [], [], []
    for text in rows:
        true.append(np.arange(text.length, 0, -1))
        said.append(value.predict([text.tokens])[0, text.given - 1 : -1].numpy())
        drawn.append(np.arange(text.length))
    # What a constant and a clock say, from the answers learnt from.
    ended = [text for text in learnt if text.remaining == 0]
    rest = np.concatenate([np.arange(text.length, 0, -1) for text in ended])
    elapsed = np.concatenate([np.arange(text.length) for text in ended])
    survival = g ** rest.astype(float)
    clock = np.array(
        [survival[elapsed == n].mean() if (elapsed == n).sum() >= 20 else np.nan for n in range(elapsed.max() + 1)]
    )
    clock = np.where(np.isnan(clock), survival[elapsed >= np.nanargmin(np.isnan(clock))].mean(), clock)
    r, n = np.concatenate(true), np.concatenate(drawn)
    u = 1 - g ** r.astype(float)
    guesses = {
        "value": np.concatenate(said),
        "constant": np.full(len(r), math.log(survival.mean()) / math.log(g)),
        "clock": np.log(clock[np.minimum(n, len(clock) - 1)]) / math.log(g),
    }
    found: dict[str, object] = {"tokens": len(r), "answers": len(rows)}
    for name, lengths in guesses.items():
        guess = 1 - g**lengths
        per_text = np.split(np.abs(lengths - r), np.cumsum([len(t) for t in true])[:-1])
        found[name] = {
            "variance_of_u_explained": round(float(1 - ((guess - u) ** 2).mean() / u.var()), 4),
            "median_error_tokens": round(float(np.median(np.abs(lengths - r))), 2),
            "median_error_tokens_last_20": round(float(np.median(np.abs(lengths - r)[r <= 20])), 2),
            "mean_error_interval": interval([float(x.mean()) for x in per_text]),
        }
    return found


def at_the_prompt(value: HFLengthValue, fresh: Sequence[Rollout], n: int) -> dict[str, object]:
    """Mean relative error of l(prompt) against the discounted length of n answers to it; those cut count as cut."""
    g = value.discount
    groups = [fresh[i : i + n] for i in range(0, len(fresh), n)]
    true = np.array([math.log(np.mean([g**text.length for text in group])) / math.log(g) for group in groups])
    mean = np.array([np.mean([text.length for text in group]) for group in groups])
    said = np.array([float(value.predict([group[0].tokens[: group[0].given]])[0, -1]) for group in groups])
    constant = math.log(np.mean(g**true)) / math.log(g)
    return {
        "prompts": len(groups),
        "answers_each": n,
        "mean_relative_error": round(float(np.mean(np.abs(said - true) / true)), 4),
        "of_a_constant": round(float(np.mean(np.abs(constant - true) / true)), 4),
        "correlation": round(float(np.corrcoef(said, true)[0, 1]), 3),
        "mean_length": round(float(mean.mean()), 1),
        "mean_discounted_length": round(float(true.mean()), 1),
        "said": round(float(said.mean()), 1),
    }


def under(base: LanguageModel, made: Sequence[Generation]) -> list[np.ndarray]:
    """-log p of each token under the model itself, nats."""
    found = []
    for one in made:
        row, given = [*one.request.prompt, *one.tokens], len(one.request.prompt)
        log_p = base.predict([row[:-1]])[0, given - 1 :].log_probs()[0]
        found.append(-log_p.gather(-1, torch.tensor(row[given:])[:, None])[:, 0].double().numpy())
    return found


def outcome(base: LanguageModel, made: Sequence[Generation], target: int | None) -> dict[str, object]:
    nats = under(base, made)
    ended = np.array([one.finish == "eos" for one in made])
    lengths = np.array([len(one.tokens) - (one.finish == "eos") for one in made])
    before = [row[:-1] if end else row for row, end in zip(nats, ended, strict=True)]
    ends = [float(row[-1]) for row, end in zip(nats, ended, strict=True) if end]
    found: dict[str, object] = {"mean_length": round(float(lengths.mean()), 1), "ended": round(float(ended.mean()), 3)}
    if target is not None:
        off = np.abs(lengths - target) / target
        hit = (lengths == target) & ended
        found |= {
            "exact": round(float(hit.mean()), 3),
            "exact_interval": interval(hit),
            "within_5_percent": round(float(((off <= 0.05) & ended).mean()), 3),
            "mean_deviation": round(float(off.mean()), 4),
            "mean_deviation_interval": interval(off),
        }
    per_token = np.concatenate(before).mean()
    return found | {
        "nats_per_token": round(float(per_token), 3),
        "nats_per_token_interval": interval([float(row.mean()) for row in before if len(row)]),
        "nats_of_the_end": round(float(np.mean(ends)), 2) if ends else None,
        "whole": round(float(np.mean([is_whole(one.text) for one in made])), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taught", type=int, default=3000, help="tales of the grammar the model learns")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learnt", type=int, default=900, help="tales of the model the value learns from")
    parser.add_argument("--fresh", type=int, default=300, help="tales to foretell, and to measure prompts with")
    parser.add_argument("--controlled", type=int, default=60, help="tales drawn under each control")
    parser.add_argument("--targets", type=int, nargs="+", default=[12, 24, 40])
    parser.add_argument("--max-tokens", type=int, default=140)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="bench/results/length.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed, limit, kinds = options.seed, options.max_tokens, list(STOPS)

    began = time.process_time()
    rng = np.random.default_rng(seed)
    taught = [tale(rng, kinds[i % 3]) for i in range(options.taught)]
    tokenizer = word_tokenizer(words_of(taught))
    taught = [text for text in taught if len(tokenizer.encode(text)) < 150]
    base = train(taught, tokenizer=tokenizer, context=192, steps=options.steps, seed=seed, name="tales")
    made = time.process_time()
    prompts = [prompt_of(kind) for kind in kinds]
    learnt = rollouts(base, prompts, n=options.learnt // 3, max_tokens=limit, seed=seed)
    sampled = time.process_time()
    value = fit_length_value(
        base, learnt, schedule=Schedule(epochs=options.epochs, batch=32, rate=options.rate), seed=seed
    )
    trained = time.process_time()
    lengths = [text.length for text in learnt]
    fresh = rollouts(base, prompts, n=options.fresh // 3, max_tokens=limit, seed=seed + 1)
    figures: dict[str, object] = {
        "tales_learnt_from": len(learnt),
        "their_length": {q: float(np.quantile(lengths, p)) for q, p in (("1%", 0.01), ("50%", 0.5), ("99%", 0.99))},
        "cut_off": sum(text.remaining is None for text in learnt),
        "discount": round(value.discount, 5),
        "seconds_of_the_model": round(made - began, 1),
        "seconds_sampling": round(sampled - made, 1),
        "seconds_training": round(trained - sampled, 1),
        "at_every_token": foretold(value, learnt, fresh),
        "at_the_prompt": at_the_prompt(value, fresh, options.fresh // 3),
    }
    print(json.dumps(figures, indent=1), flush=True)

    def drawn(model: LanguageModel, transform: Transform | None, most: int) -> list[Generation]:
        found = generate(model, prompts, n=options.controlled // 3, transform=transform, max_tokens=most, seed=seed + 3)
        assert isinstance(found, list)
        return found

    def ruled(rule: LengthRule, candidates: Transform = LIKELY) -> LanguageModel:
        return LengthControlled(base, value, rule, prompts=prompts, candidates=candidates)

    control: dict[str, dict[str, object]] = {}
    for target in options.targets:
        most = 2 * target + 20
        for name, model, transform in (
            ("sampled", base, LIKELY),
            ("soft, wide", ruled(SoftTarget(target), WIDE), None),
            ("hard, wide", ruled(HardTarget(target), WIDE), None),
            ("soft, likely", ruled(SoftTarget(target)), None),
            ("hard, likely", ruled(HardTarget(target)), None),
            ("ban and force", base, BanAndForce(target) | LIKELY),
        ):
            began = time.process_time()
            row = outcome(base, drawn(model, transform, most), target)
            row["seconds"] = round(time.process_time() - began, 1)
            control[f"{name} {target}"] = row
            print(
                f"{name:14} {target:4}  exact {row['exact']:.3f}  within 5 % {row['within_5_percent']:.3f}  deviation "
                f"{row['mean_deviation']:.3f}  nats per token {row['nats_per_token']:.3f}  of the end "
                f"{row['nats_of_the_end']}  whole {row['whole']}",
                flush=True,
            )
    tilts: dict[str, dict[str, object]] = {}
    for b in (-30.0, -10.0, 0.0, 10.0, 30.0):
        tilted = drawn(ruled(Tilt(b)), None, limit)
        row = outcome(base, tilted, None)
        divergence = [sum(own) - sum(one.surprisals) for own, one in zip(under(base, tilted), tilted, strict=True)]
        row["divergence_nats"] = round(float(np.mean(divergence)), 2)
        tilts[f"b {b:g}"] = row
        print(
            f"tilt {b:6g}  mean length {row['mean_length']}  divergence {row['divergence_nats']}  whole {row['whole']}",
            flush=True,
        )
    write(options.json, figures | {"control": control, "tilts": tilts})


if __name__ == "__main__":
    main()

"""CAAD beside the plain model and in-context examples: does a grounding space make true completions likelier?

    python bench/shape.py --json bench/results/shape.json

A small model is trained on questions and answers about made-up things, each with a true and a false answer, the false
one three times as frequent; documents hold one to four questions and are true or false throughout, so that what is true
can be told from context. In the world `marked` true answers also begin with words of their own, in `direct` they differ
in the last word alone. A grounding space is made of ten true answers in one phrasing. Reported: p(true answer) /
(p(true answer) + p(false answer)) and its change in log-odds, on the ten facts in the phrasing of the space, in other
phrasings, and on other facts; and KL(plain || shaped) per token on texts of another kind. `in-context examples` puts
four of the ten answers before the question instead. Values are what the model says itself, so that where the false
answer is the likelier one a value says so too, and adding it sharpens: the controls are the plain model at the
temperature of such a sharpening, 1 / (1 + strength), and at the temperature 2 of a flattening. `values after true
answers` (ours, `build(context=...)`) reads the values of six of the facts after the other four, where the model can
know what is wanted; the keys do not hold these. Nothing is downloaded; means over questions with 95 % intervals.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch

from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.grounding import GroundingSpace, NgramVectors
from nextoken.model.hf import HFModel
from nextoken.model.shaped import Shaped
from record import write
from training import train, word_tokenizer, words_of

COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold", "teal", "lime", "navy")
PHRASES = (
    "what colour is the {} ?",
    "which colour has the {} ?",
    "say the colour of the {} .",
    "the {} has what colour ?",
)
WORLDS = {
    "direct": {"true": " it is {}", "false": " it is {}"},
    "marked": {"true": " in fact it is {}", "false": " people say it is {}"},
}
GROUNDED, SHOWN = 10, 4

World = dict[str, str]
Fact = tuple[str, str, str]


def facts(count: int, seed: int) -> list[Fact]:
    """(thing, true colour, false colour)."""
    source = random.Random(seed)
    names = {"".join(source.choice(pair) for pair in ("bdgklmnprstvz", "aeiou") * 2) for _ in range(4 * count)}
    return [(name, *source.sample(COLOURS, 2)) for name in sorted(names)[:count]]  # type: ignore[misc]


def said(fact: Fact, world: World, phrase: str, kind: str) -> tuple[str, str]:
    """Question and answer."""
    return phrase.format(fact[0]), world[kind].format(fact[1] if kind == "true" else fact[2]) + " .\n"


def unrelated(source: random.Random) -> str:
    who, what, where = ("cat", "dog", "child"), ("walks", "runs", "looks"), ("town", "wood", "river")
    return " ".join(f"the {source.choice(who)} {source.choice(what)} to the {source.choice(where)} ." for _ in range(3))


def corpus(known: Sequence[Fact], world: World, count: int, seed: int) -> list[str]:
    source, texts = random.Random(seed), []
    for _ in range(count):
        kind = "true" if source.random() < 0.25 else "false"
        asked = [said(source.choice(known), world, source.choice(PHRASES), kind) for _ in range(source.randint(1, 4))]
        texts.append("".join(question + answer for question, answer in asked))
        texts += [unrelated(source)] if source.random() < 0.25 else []
    return texts


def log_prob(model: LanguageModel, pairs: Sequence[tuple[str, str]], temperature: float) -> torch.Tensor:
    """log p(answer | question) of each pair [n], in nats."""
    vocab, rows, firsts = model.vocab, [], []
    for question, answer in pairs:
        begin = [vocab.bos_id, *vocab.encode(question).ids]
        rows.append(begin + list(vocab.encode(answer).ids))
        firsts.append(len(begin))
    width = max(map(len, rows))
    ids = torch.tensor([row + [ABSENT] * (width - len(row)) for row in rows])
    said = torch.log_softmax(model.predict(ids).log_probs()[:, :-1] / temperature, -1)
    steps = said.gather(2, ids[:, 1:, None].clamp(min=0))[..., 0]
    place = torch.arange(1, width)
    inside = (place >= torch.tensor(firsts)[:, None]) & (ids[:, 1:] != ABSENT)
    return (steps.double() * inside).sum(1)


def log_odds(
    model: LanguageModel, questions: Sequence[tuple[str, Fact]], world: World, before: str, temperature: float = 1.0
) -> torch.Tensor:
    """log p(true answer) - log p(false answer) of each question [n]."""
    pairs = {
        kind: [(before + said(f, world, phrase, kind)[0], said(f, world, phrase, kind)[1]) for phrase, f in questions]
        for kind in ("true", "false")
    }
    return log_prob(model, pairs["true"], temperature) - log_prob(model, pairs["false"], temperature)


def divergence(base: LanguageModel, model: LanguageModel, texts: Sequence[str]) -> float:
    """Mean KL(base || model) in nats per token."""
    total, count = 0.0, 0
    for text in texts:
        ids = [[base.vocab.bos_id, *base.vocab.encode(text).ids]]
        p, q = base.predict(ids).log_probs().double(), model.predict(ids).log_probs().double()
        total += float((p.exp() * (p - q)).sum())
        count += p.shape[1]
    return total / count


def interval(values: torch.Tensor) -> list[float]:
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return [round(float(values.mean()) - half, 3), round(float(values.mean()) + half, 3)]


def study(world: World, steps: int, seed: int) -> dict[str, object]:
    known = facts(40, seed)
    texts = corpus(known, world, 6000, seed)
    model: HFModel = train(texts, tokenizer=word_tokenizer(words_of(texts)), steps=steps, batch=32, seed=seed)
    grounded, held = known[:GROUNDED], known[GROUNDED:]
    pairs = [said(fact, world, PHRASES[0], "true") for fact in grounded]
    space = GroundingSpace.build(model, pairs)
    flat = GroundingSpace.build(model, pairs, embed=NgramVectors(reach=float("inf")))
    source = random.Random(seed + 1)
    others = [unrelated(source) for _ in range(40)]
    shown = "".join(question + answer for question, answer in pairs[:SHOWN])
    asked = {
        "same facts, same phrasing": [(PHRASES[0], fact) for fact in grounded],
        "same facts, other phrasings": [(phrase, fact) for fact in grounded for phrase in PHRASES[1:]],
        "other facts": [(phrase, fact) for fact in held for phrase in PHRASES],
    }
    told = GroundingSpace.build(model, pairs[SHOWN:], context=shown)
    tempered = {"plain, temperature 2/3": 2 / 3, "plain, temperature 1/3": 1 / 3, "plain, temperature 2": 2.0}
    variants: dict[str, tuple[LanguageModel, str]] = {
        "plain": (model, ""),
        **dict.fromkeys(tempered, (model, "")),
        "in-context examples": (model, shown),
        "add 0.5 (default)": (Shaped(model, space), ""),
        "add 2": (Shaped(model, space, strength=2.0), ""),
        "add 2, cosine temperature 0.05": (Shaped(model, space, strength=2.0, temperature=0.05), ""),
        "add 2, bag of n-grams": (Shaped(model, flat, strength=2.0), ""),
        "add 2, 25 neighbours": (Shaped(model, space, strength=2.0, neighbours=25), ""),
        "add 0.5, centred on the mean": (Shaped(model, space, centre="mean"), ""),
        "add 0.5, log softmax": (Shaped(model, space, centre="logsumexp"), ""),
        "interpolate 0.5": (Shaped(model, space, blend="interpolate"), ""),
        "add 2, similarity from 0.6": (Shaped(model, space, strength=2.0, minimum_similarity=0.6), ""),
        "add 0.5, values after true answers": (Shaped(model, told), ""),
        "add 2, values after true answers": (Shaped(model, told, strength=2.0), ""),
    }
    plain = {name: log_odds(model, questions, world, "") for name, questions in asked.items()}
    result: dict[str, object] = {"entries": len(space.keys)}
    for name, (shaped, before) in variants.items():
        row: dict[str, Any] = {}
        for group, questions in asked.items():
            # What the examples show is left out of the question put after them.
            use = [i for i, (_, fact) in enumerate(questions) if not before or fact not in grounded[:SHOWN]]
            odds = log_odds(shaped, [questions[i] for i in use], world, before, tempered.get(name, 1.0))
            row[group] = {
                "p_true": round(float(odds.sigmoid().mean()), 3),
                "log_odds_change": round(float((odds - plain[group][use]).mean()), 3),
                "interval": interval(odds - plain[group][use]),
            }
        if isinstance(shaped, Shaped):
            row["kl_elsewhere"] = round(divergence(model, shaped, others), 4)
        result[name] = row
        columns = [f"{row[g]['p_true']:.3f} ({row[g]['log_odds_change']:+.2f})" for g in asked]
        print(f"  {name:36}", *columns, f"KL {row['kl_elsewhere']}" if "kl_elsewhere" in row else "", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="bench/results/shape.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, object] = {"steps": arguments.steps, "grounded": GROUNDED, "shown": SHOWN}
    for name, world in WORLDS.items():
        print(name, flush=True)
        figures[name] = study(world, arguments.steps, arguments.seed)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

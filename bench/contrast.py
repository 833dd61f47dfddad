"""What models made of models do to the share of right answers: contrastive decoding, guidance, USCD, RITUAL, ensembles.

    python bench/contrast.py --json bench/results/contrast.json

Each task trains small Llama models on a made-up world, for each of `--seeds` seeds, and asks questions whose answer is
known. Two shares are reported, both computed from the distributions and not drawn: of right answers when sampling at
the temperature given (the mean probability of the right answer), and when taking the best token. Each variant is set
against the control named in the table; a difference comes with a 95 % bootstrap interval over questions (drawn anew
within every seed) and with the number of seeds whose difference has its sign. The tasks were set by what the plain
model does, so that it has room to err; no operator was tuned.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nextoken.model.base import LanguageModel
from nextoken.model.contrast import Complemented, Contrastive, Guided, Selective
from nextoken.model.ensemble import Ensemble
from nextoken.model.hf import HFModel
from record import write
from training import train, word_tokenizer, words_of

PLAIN = "plain"
Ask: TypeAlias = Callable[[int], Tensor]
"""log p [n, V] of each token of the answer to question q."""


@dataclass(frozen=True)
class Answers:
    """One variant on the questions of one seed: [Q, 3] of probability when sampling, best tokens right, nats."""

    task: str
    variant: str
    control: str
    judged: np.ndarray


def said(model: LanguageModel, prompt: str, answer: Sequence[int]) -> Tensor:
    """log p [n, V] of each token of the answer given the prompt and the answer before it."""
    prefix = [model.vocab.bos_id, *model.vocab.encode(prompt).ids]
    return model.predict([[*prefix, *answer[:-1]]]).log_probs()[0, len(prefix) - 1 :]


def asking(model: LanguageModel, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> Ask:
    """One model, each question as its prompt."""
    return cache(lambda q: said(model, prompts[q], answers[q]))


def prompted(make: Callable[[int], LanguageModel], answers: Sequence[Sequence[int]]) -> Ask:
    """An operator that is made for each question and holds its prompt."""
    return cache(lambda q: said(make(q), "", answers[q]))


def judged(log_probs: Tensor, answer: Sequence[int], temperature: float) -> tuple[float, float, float]:
    """Probability of the answer when sampling, whether greedy decoding gives it, and its -log p in nats."""
    ids = torch.tensor(answer)[:, None]
    tempered = torch.log_softmax(log_probs / temperature, -1).gather(-1, ids).sum()
    greedy = bool((log_probs.argmax(-1) == ids[:, 0]).all())
    return float(tempered.exp()), float(greedy), float(-log_probs.gather(-1, ids).sum())


def asked(
    task: str,
    variants: dict[str, tuple[str, Ask] | tuple[str, Ask, float]],
    answers: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
) -> list[Answers]:
    """Every variant on every question; a variant is its control, its log-probs and, if its own, its temperature."""
    found = []
    for name, (control, ask, *own) in variants.items():
        heat = own[0] if own else temperature
        rows = [judged(ask(q), answer, heat) for q, answer in enumerate(answers)]
        found.append(Answers(task, name, control, np.array(rows)))
    return found


# --- contrastive decoding ---------------------------------------------------------------------------------------------


def contrastive(seed: int) -> Iterator[Answers]:
    """Facts that an expert has half learnt, and an amateur that knows the commonest value alone.

    `skewed`: everything told is true, and 40 % of the subjects have the common value. `rumour`: of each subject both
    the truth, which is never the common value, and the common value are told equally often.
    """
    rng = random.Random(seed)
    values = [f" v{i}" for i in range(60)]
    for world, count, rate, steps in (("skewed", 240, 5e-3, 250), ("rumour", 120, 1e-2, 500)):
        subjects = [f" s{i}" for i in range(count)]
        truth = {s: values[0] if world == "skewed" and rng.random() < 0.4 else rng.choice(values[1:]) for s in subjects}
        told = [f"the mark of{s} is{truth[s]} ." for s in subjects]
        told += [f"the mark of{s} is{values[0]} ." for s in subjects if world == "rumour"]
        tokenizer = word_tokenizer({*words_of(told), *values})
        expert = train(told, tokenizer=tokenizer, steps=steps, batch=48, lr=rate, seed=seed)
        small = {"tokenizer": tokenizer, "hidden": 16, "layers": 1, "heads": 2, "batch": 48, "lr": 1e-2, "seed": seed}
        amateur, untrained = train(told, steps=150, **small), train(told, steps=0, **small)
        prompts = [f"the mark of{s} is" for s in subjects]
        answers = [expert.vocab.encode(truth[s]).ids for s in subjects]
        plain = asking(expert, prompts, answers)
        half = asking(Contrastive(expert, amateur, beta=0.5), prompts, answers)
        variants = {
            PLAIN: (PLAIN, plain),
            "plain, temperature 2/3": (PLAIN, plain, 2 / 3),
            "amateur alone": (PLAIN, asking(amateur, prompts, answers)),
            "beta 0.5": (PLAIN, half),
            "beta 0.5 against temperature": ("plain, temperature 2/3", half),
            "beta 0.5, untrained amateur": (
                PLAIN,
                asking(Contrastive(expert, untrained, beta=0.5), prompts, answers),
            ),
            "Li et al.": (PLAIN, asking(Contrastive(expert, amateur), prompts, answers)),
        }
        common = np.array([truth[s] == values[0] for s in subjects])
        for run in asked(f"contrastive, {world}", variants, answers):
            yield run
            if world == "skewed":
                yield Answers(f"{run.task}, truth rare", run.variant, run.control, run.judged[~common])
                yield Answers(f"{run.task}, truth common", run.variant, run.control, run.judged[common])


# --- guidance ---------------------------------------------------------------------------------------------------------


def guided(seed: int) -> Iterator[Answers]:
    """Facts known by heart, and notes before the question that contradict them, agree, or tell of someone else.

    In training, half of the contradicting notes are answered by the note and half by heart, so the model is torn. The
    right answer is the note's where it contradicts, else the one known by heart.
    """
    rng = random.Random(seed)
    subjects, values = [f" s{i}" for i in range(80)], [f" v{i}" for i in range(40)]
    known = {s: rng.choice(values) for s in subjects}
    question = {s: f" what does{s} like ?" for s in subjects}

    def other(s: str) -> str:
        return rng.choice([v for v in values if v != known[s]])

    def stranger(s: str) -> str:
        return rng.choice([x for x in subjects if x != s])

    told = []
    for s in subjects:
        told += [f"{question[s]}{known[s]} ."] * 8
        told += [f" note{s} likes{known[s]} .{question[s]}{known[s]} ."] * 4
        for _ in range(8):
            told.append(f" note{s} likes{(value := other(s))} .{question[s]}{rng.choice((value, known[s]))} .")
        for _ in range(4):
            told.append(f" note{(x := stranger(s))} likes{other(x)} .{question[s]}{known[s]} .")
    tokenizer = word_tokenizer({*words_of(told), *values})
    model = train(told, tokenizer=tokenizer, steps=1200, batch=48, lr=3e-3, seed=seed)
    bare = [question[s] for s in subjects]
    notes = [(s, other(s)) for s in subjects]
    strangers = [(x, other(x)) for x in map(stranger, subjects)]
    for task, given, right in (
        ("contradicting", notes, [value for _, value in notes]),
        ("agreeing", [(s, known[s]) for s in subjects], list(known.values())),
        ("of another", strangers, list(known.values())),
    ):
        prompts = [f" note{s} likes{value} .{q}" for (s, value), q in zip(given, bare, strict=True)]
        yield from _guided(model, f"guided, note {task}", prompts, bare, [model.vocab.encode(v).ids for v in right])


def _guided(
    model: HFModel, task: str, prompts: list[str], bare: list[str], answers: list[tuple[int, ...]]
) -> list[Answers]:
    def by(scale: float, negatives: Sequence[str] = bare) -> Ask:
        return prompted(lambda q: Guided(model, prompts[q], negative=negatives[q], scale=scale), answers)

    plain = asking(model, prompts, answers)
    variants = {PLAIN: (PLAIN, plain), "plain, temperature 2/3": (PLAIN, plain, 2 / 3)}
    variants |= {"without the note": (PLAIN, asking(model, bare, answers))}
    variants |= {f"scale {scale}": (PLAIN, by(scale)) for scale in (0.5, 1.5, 2.0, 3.0)}
    variants |= {"scale 1.5, negative empty": (PLAIN, by(1.5, [""] * len(bare)))}
    return asked(task, variants, answers)


# --- USCD -------------------------------------------------------------------------------------------------------------

LANGUAGES = {"a": 0.55, "b": 0.2, "c": 0.15, "d": 0.1}
RELIABLE = 0.7


def lesson(rng: random.Random, language: str) -> tuple[str, str, str]:
    """Examples (each in the right language with probability RELIABLE), a question of three words, its translation."""
    others = [name for name in LANGUAGES if name != language]
    spoken = [language if rng.random() < RELIABLE else rng.choice(others) for _ in range(3)]
    examples = "".join(f" w{(i := rng.randrange(20))} > {name}{i} ," for name in spoken)
    words = [rng.randrange(20) for _ in range(3)]
    question = " translate" + "".join(f" w{i}" for i in words) + " :"
    return examples, question, "".join(f" {language}{i}" for i in words) + " ."


def selective(seed: int) -> Iterator[Answers]:
    """Translating three words into a language that only the examples tell, and they are not all reliable.

    `as trained`: languages as frequent as in training. `languages alike`: all equally frequent, so that the habit that
    the lame prompt shows is wrong more often than it was.
    """
    rng, names, frequent = random.Random(seed), list(LANGUAGES), list(LANGUAGES.values())
    told, masks = [], []
    for language in rng.choices(names, weights=frequent, k=12_000):
        examples, question, answer = lesson(rng, language)
        shown = ("" if rng.random() < 0.25 else examples) + question
        told.append(shown + answer)
        # Answers alone are learnt: the words of a lesson follow from nothing.
        masks.append([at > len(shown.split()) for at in range(len(told[-1].split()) + 2)])
    words = {f" {name}{i}" for name in "wabcd" for i in range(20)}
    tokenizer = word_tokenizer({*words, " translate", " >", " ,", " :", " ."})
    model = train(told, tokenizer=tokenizer, steps=1500, batch=32, lr=3e-3, seed=seed, loss_mask=masks)
    for task, weights in (("as trained", frequent), ("languages alike", [1.0] * 4)):
        yield from _selective(
            model, f"USCD, {task}", [lesson(rng, name) for name in rng.choices(names, weights=weights, k=150)]
        )


def _selective(model: HFModel, task: str, lessons: list[tuple[str, str, str]]) -> list[Answers]:
    answers = [model.vocab.encode(answer).ids for _, _, answer in lessons]
    whole, lame = [examples + question for examples, question, _ in lessons], [question for _, question, _ in lessons]

    def by(collision: float) -> Ask:
        return prompted(lambda q: Selective(model, whole[q], lame=lame[q], collision=collision), answers)

    # 0.4 is about the deviation that is the default of the released code, 0.8 about that of its run on HumanEval.
    plain, gated, wider, always = asking(model, whole, answers), by(0.4), by(0.8), by(2.0)
    unsure = [float((plain(q).exp().square().sum(-1) <= 0.4).float().mean()) for q in range(len(answers))]
    print(f"    {task}: unsure at {np.mean(unsure):.1%} of the steps", flush=True)
    peaked, sharp = "plain, as peaked where unsure", "plain, as peaked as always"
    return asked(
        task,
        {
            PLAIN: (PLAIN, plain),
            "without examples": (PLAIN, asking(model, lame, answers)),
            peaked: (PLAIN, lambda q: as_peaked_as(plain(q), gated(q), 0.8)),
            "where unsure": (PLAIN, gated),
            "where unsure, to as peaked": (peaked, gated),
            "where unsure, collision 0.8": (PLAIN, wider),
            sharp: (PLAIN, lambda q: as_peaked_as(plain(q), always(q), 0.8)),
            "always": (PLAIN, always),
            "always, to as peaked": (sharp, always),
            "where unsure, to always": ("always", gated),
            "collision 0.8, to always": ("always", wider),
            "guided, scale 1.5": (
                PLAIN,
                prompted(lambda q: Guided(model, whole[q], negative=lame[q], scale=1.5), answers),
            ),
        },
        answers,
        temperature=0.8,
    )


def as_peaked_as(plain: Tensor, changed: Tensor, temperature: float) -> Tensor:
    """`plain` [n, V], each row heated so that, after `temperature`, its entropy is that of `changed`'s."""

    def entropy(log_probs: Tensor) -> Tensor:
        return torch.special.entr(torch.softmax(log_probs / temperature, -1)).sum(-1)

    goal = entropy(changed)
    low, high = torch.full_like(goal, 1e-2), torch.full_like(goal, 1e2)
    for _ in range(40):
        middle = (low * high).sqrt()
        flat = entropy(plain / middle[:, None]) > goal
        low, high = torch.where(flat, low, middle), torch.where(flat, middle, high)
    return torch.log_softmax(plain / low[:, None], -1)


# --- RITUAL and ensembles ---------------------------------------------------------------------------------------------

FRAMES = (
    "the seat of{} is",
    " people from{} live in",
    " who travels to{} comes to",
    " of{} the first town is",
    " roads of{} all end at",
)


def towns(world: int) -> tuple[dict[str, str], list[str]]:
    """The town of each country, and what is told: each in two of the five frames."""
    rng = random.Random(world)
    truth = {f" s{i}": f" v{rng.randrange(60)}" for i in range(160)}
    return truth, [f"{frame.format(s)}{town} ." for s, town in truth.items() for frame in rng.sample(FRAMES, 2)]


def learn_towns(world: int, seed: int) -> HFModel:
    truth, told = towns(world)
    tokenizer = word_tokenizer(
        words_of([*told, *(f"{frame.format(s)}{v}" for s, v in truth.items() for frame in FRAMES)])
    )
    return train(told, tokenizer=tokenizer, steps=330, batch=48, lr=2e-3, seed=seed, name=f"towns {seed}")


def bags(rng: random.Random, count: int) -> list[tuple[list[str], str]]:
    """Nine words each, of six classes of ten words, and the class that most of them are of."""
    found = []
    while len(found) < count:
        label = rng.randrange(6)
        classes = [label] * 3 + [rng.randrange(6) for _ in range(6)]
        (first, most), (_, next_most) = [*Counter(classes).most_common(2), (-1, 0)][:2]
        if most > next_most:
            words = [f" w{10 * c + rng.randrange(10)}" for c in classes]
            found.append((rng.sample(words, 9), f" class{first}"))
    return found


def ritual(seed: int) -> Iterator[Answers]:
    """Views of a question that mean the same.

    `frames`: half-learnt facts asked in one frame, with the others as views. `orders`: the commonest class of nine
    words, which does not depend on their order, with other orders as views.
    """
    rng = random.Random(seed + 1000)
    truth, _ = towns(seed)
    frames = [[frame.format(s) for frame in rng.sample(FRAMES, len(FRAMES))] for s in truth]
    yield from _ritual(learn_towns(seed, seed), "RITUAL, frames", frames, list(truth.values()))
    told = ["".join(words) + " :" + label for words, label in bags(rng, 8000)]
    model = train(told, tokenizer=word_tokenizer(words_of(told)), steps=400, batch=32, lr=3e-3, seed=seed)
    new = bags(rng, 150)
    orders = [["".join(rng.sample(words, 9)) + " :" for _ in range(5)] for words, _ in new]
    yield from _ritual(model, "RITUAL, orders", orders, [label for _, label in new])


def _ritual(model: HFModel, task: str, asked_as: list[list[str]], right: list[str]) -> list[Answers]:
    answers = [model.vocab.encode(text).ids for text in right]

    def by(count: int, alpha: float, normalised: bool = False) -> Ask:
        def made(q: int) -> LanguageModel:
            prompt, *views = asked_as[q]
            # Without views, the prompt itself: it sharpens and does nothing else.
            shown = views[:count] or [prompt]
            return Complemented(model, prompt, views=shown, alpha=alpha, normalised=normalised)

        return prompted(made, answers)

    masked, sharp = "plain, masked", "plain, masked, temperature 1/4"
    return asked(
        task,
        {
            PLAIN: (PLAIN, asking(model, [prompts[0] for prompts in asked_as], answers)),
            "one view alone": (PLAIN, asking(model, [prompts[1] for prompts in asked_as], answers)),
            masked: (PLAIN, by(0, 3.0, normalised=True)),
            sharp: (PLAIN, by(0, 3.0)),
            "one view, alpha 3": (PLAIN, by(1, 3.0)),
            "one view, alpha 3, to sharpened": (sharp, by(1, 3.0)),
            "four views, alpha 3, to sharpened": (sharp, by(4, 3.0)),
            "one view, alpha 1, normalised": (masked, by(1, 1.0, normalised=True)),
            "one view, alpha 3, normalised": (masked, by(1, 3.0, normalised=True)),
            "four views, alpha 3, normalised": (masked, by(4, 3.0, normalised=True)),
        },
        answers,
    )


def ensemble(seed: int) -> Iterator[Answers]:
    """Three trainings on the same half-learnt facts, alone and together."""
    models = [learn_towns(seed, 100 * (seed + 1) + number) for number in range(3)]
    rng, (truth, _) = random.Random(seed + 2000), towns(seed)
    prompts = [rng.choice(FRAMES).format(s) for s in truth]
    answers = [models[0].vocab.encode(town).ids for town in truth.values()]
    single = "single, mean of three"
    alone = [asked("ensemble", {PLAIN: (single, asking(model, prompts, answers))}, answers)[0] for model in models]
    best = min(alone, key=lambda run: float(run.judged[:, 2].mean()))
    yield Answers("ensemble", single, single, np.mean([run.judged for run in alone], 0))
    yield Answers("ensemble", "single, of least nats here", single, best.judged)
    rules = {rule: asking(Ensemble(models, rule=rule), prompts, answers) for rule in ("mean", "product")}  # type: ignore[arg-type]
    yield from asked("ensemble", {rule: (single, ask) for rule, ask in rules.items()}, answers)
    yield from asked("ensemble", {"product, to mean": ("mean", rules["product"])}, answers)


TASKS = (contrastive, guided, selective, ritual, ensemble)


# --- figures ----------------------------------------------------------------------------------------------------------


def resampled(groups: Sequence[np.ndarray], draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean over groups of their means, members drawn anew within each group."""
    rng = np.random.default_rng(0)
    means = [g[rng.integers(len(g), size=(draws, len(g)))].mean(1) for g in groups]
    return [round(float(x), 4) for x in np.percentile(np.mean(means, 0), [2.5, 97.5])]


def compared(found: Sequence[Answers]) -> list[dict[str, Any]]:
    """One row per task and variant: shares, nats, and differences to the control."""
    runs_of: dict[tuple[str, str], list[Answers]] = {}
    for run in found:
        runs_of.setdefault((run.task, run.variant), []).append(run)
    rows = []
    for (task, variant), runs in runs_of.items():
        control = runs[0].control
        row: dict[str, Any] = {"task": task, "variant": variant, "control": control}
        row["questions"] = sum(len(run.judged) for run in runs)
        for column, name in enumerate(("sampled", "greedy", "nats")):
            mine = [run.judged[:, column] for run in runs]
            theirs = [run.judged[:, column] for run in runs_of[task, control]]
            if not all(np.isfinite(values).all() for values in (*mine, *theirs)):
                continue  # a masked right answer has infinite nats
            gains = [a - b for a, b in zip(mine, theirs, strict=True)]
            mean = float(np.mean([gain.mean() for gain in gains]))
            row[name], row[f"{name}_gain"] = round(float(np.mean([m.mean() for m in mine])), 4), round(mean, 4)
            row[f"{name}_interval"], row[f"{name}_gain_interval"] = resampled(mine), resampled(gains)
            row[f"{name}_same_sign"] = f"{sum(np.sign(g.mean()) == np.sign(mean) != 0 for g in gains)}/{len(gains)}"
        rows.append(row)
    return sorted(rows, key=lambda row: next(i for i, r in enumerate(rows) if r["task"] == row["task"]))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """One table; gains in points of a hundred with their intervals and the seeds that agree."""
    task = None
    for row in rows:
        if row["task"] != task:
            task = row["task"]
            print(f"\n{task} ({row['questions']} questions)")
            print(f"    {'variant':34}{'sampled':>8}  {'gain':>24}{'greedy':>9}  {'gain':>24}  {'nats':>6}  against")
        cells = ""
        for name in ("sampled", "greedy"):
            low, high = (100 * x for x in row[f"{name}_gain_interval"])
            gain = f"{100 * row[f'{name}_gain']:+.1f} [{low:+.1f}, {high:+.1f}] {row[f'{name}_same_sign']}"
            cells += f"{row[name]:>8.1%}  {gain if row['control'] != row['variant'] else '':>24} "
        nats = f"{row['nats']:.3f}" if "nats" in row else ""
        print(f"    {row['variant']:34}{cells} {nats:>6}  {row['control'] if row['control'] != row['variant'] else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="worlds and trainings of each task")
    parser.add_argument("--only", choices=[task.__name__ for task in TASKS], help="one task, and no file is written")
    parser.add_argument("--json", default="bench/results/contrast.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Answers] = []
    for task in TASKS:
        if arguments.only in (None, task.__name__):
            for seed in range(arguments.seeds):
                begun = time.process_time()
                found += task(seed)
                print(f"{task.__name__}, seed {seed}: {time.process_time() - begun:.0f} s of processor", flush=True)
    rows = compared(found)
    show(rows)
    if arguments.only is None:
        write(arguments.json, {"seeds": arguments.seeds, "rows": rows})


if __name__ == "__main__":
    main()

"""Activation steering by a few units, by a whole block and by chance; DoLa beside the plain model.

    python bench/steer.py --json bench/results/steer.json

Steering. Small models are trained on texts that say a list of four things in one of two styles, half of each, `say c1
c2 c3 c4 : f1 f2 f3 f4` or `... : g1 g2 g3 g4`, so that after `:` nothing tells the style. The wanted answer is the
f-word of the first thing, the unwanted one its g-word. Units (AUSteer) and the difference of means are found on things
0 to 39; strengths, sites and layers are chosen on things 40 to 49, by the largest mean log p of the wanted answer; all
figures are of things 50 to 59, whose words no search has seen. `scale` is the paper's edit, `shift` adds the votes, and
`mean` adds the mean differences at the same units, which is the block's vector cut down to them.

Beside each stand two placebos of k random units at the same site, mode and strength: with amounts of their own, and
with those of the best units dealt out to them. Intervals are of 95 % over the test prompts of one model; the p-value
is from the rank of the mean margin among the placebo's draws. `contrary` is the margin of the second word once a
g-word has been said.

DoLa. Top-1 accuracy for the next token on a book that the bundled models have not seen, with a paired interval of the
difference from the plain model by resampling windows of the text.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import nextoken
from nextoken.model.hf import HFModel
from nextoken.model.layers import DoLa
from nextoken.model.steered import Edit, Steered
from nextoken.model.steering import Units, difference_of_means, momentum
from record import write
from training import train, word_tokenizer, words_of

THINGS, LISTED, LAYERS = 60, 4, 3
SEARCH, VALIDATION, TEST = range(40), range(40, 50), range(50, 60)
SITES = ("attention", "ffn", "layer")
COUNTS = (1, 4, 16, 64, 128)
_OF_MEANS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)
STRENGTHS = {
    "scale": (0.5, 1, 2, 4, 8, 16, 32, 100),
    "shift": (0.1, 0.25, 0.5, 1, 2, 4, 8, 16),
    "mean": _OF_MEANS,
    "block": _OF_MEANS,
}

Prompts = list[list[int]]


def training_texts(count: int, seed: int) -> list[str]:
    """Lists of things said in one style; 2 % of the words are of the other."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        things = [draw.randrange(THINGS) for _ in range(LISTED)]
        style = number % 2
        styles = [style ^ (draw.random() < 0.02) for _ in things]
        texts.append(question(things) + "".join(word(thing, s) for thing, s in zip(things, styles, strict=True)))
    return texts


def question(things: Sequence[int]) -> str:
    return "say" + "".join(f" c{thing}" for thing in things) + " :"


def word(thing: int, style: int) -> str:
    return f" {'fg'[style]}{thing}"


def prompts_about(first: range, count: int, seed: int) -> Prompts:
    """Lists whose first thing is one of `first`, equally often each; the others are any."""
    draw = random.Random(seed)
    return [[first[n % len(first)], *(draw.randrange(THINGS) for _ in range(LISTED - 1))] for n in range(count)]


class Asked:
    """Prompts, and the ids of what is wanted and not wanted after them."""

    def __init__(self, model: HFModel, prompts: Prompts, *, contrary: bool = False) -> None:
        def ids(text: str) -> list[int]:
            return list(model.vocab.encode(text).ids)

        texts = [question(things) + (word(things[0], 1) if contrary else "") for things in prompts]
        about = [things[1 if contrary else 0] for things in prompts]
        self.rows = torch.tensor([[model.vocab.bos_id, *ids(text)] for text in texts])
        self.answers = torch.tensor([[ids(word(thing, style))[0] for style in (0, 1)] for thing in about])

    def __call__(self, model: nextoken.LanguageModel) -> np.ndarray:
        """log p of the wanted and the unwanted answer [prompts, 2]."""
        said = model.predict(self.rows)[:, -1].log_probs()[:, 0]
        return torch.gather(said, 1, self.answers).double().numpy()


def interval(values: np.ndarray) -> list[float]:
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return [round(float(values.mean() - half), 3), round(float(values.mean() + half), 3)]


def summary(logs: np.ndarray, contrary: np.ndarray) -> dict[str, object]:
    margin = logs[:, 0] - logs[:, 1]
    return {
        "margin": round(float(margin.mean()), 3),
        "margin_interval": interval(margin),
        "wanted_logprob": round(float(logs[:, 0].mean()), 3),
        "wanted_is_likelier": round(float((margin > 0).mean()), 3),
        "contrary": round(float((contrary[:, 0] - contrary[:, 1]).mean()), 3),
    }


def best(
    tries: Sequence[tuple[dict[str, object], Edit]], model: HFModel, asked: Asked
) -> tuple[dict[str, object], Edit]:
    """Of settings and their edits those with the largest mean log p of the wanted answer."""
    return max(tries, key=lambda one: float(asked(Steered(model, [one[1]]))[:, 0].mean()))


def cut(units: Units, k: int, mode: str) -> Edit:
    """The edit of the k best units, at strength 1."""
    if mode != "mean":
        return units.top(k, mode=mode, ties="effect")  # type: ignore[arg-type]
    return Edit(units.site, units.mean * (units.top(k, ties="effect").amounts != 0), "shift")


def placebo(units: Units, edit: Edit, own: Tensor, generator: torch.Generator) -> dict[str, Edit]:
    """As many random live units as the edit has, with their own amounts, and with those of the edit."""
    live = units.beta.flatten().nonzero()[:, 0]
    chosen = live[torch.randperm(len(live), generator=generator)[: edit.count]]
    dealt = edit.amounts[edit.amounts != 0]
    edits = {}
    for name, values in (
        ("own", own.flatten()[chosen]),
        ("dealt", dealt[torch.randperm(len(dealt), generator=generator)]),
    ):
        amounts = torch.zeros(units.beta.numel())
        amounts[chosen] = values
        edits[name] = Edit(units.site, amounts.view_as(units.beta), edit.mode)
    return edits


def steering(seed: int, *, steps: int, draws: int, say: Callable[[str], None]) -> dict[str, object]:
    """All figures of one model."""
    texts = training_texts(4000, seed)
    tokenizer = word_tokenizer(words_of(texts))
    model = train(
        texts, tokenizer=tokenizer, hidden=64, layers=LAYERS, context=16, steps=steps, lr=4e-3, seed=seed, name="styles"
    )
    triples = [(question(p), word(p[0], 0), word(p[0], 1)) for p in prompts_about(SEARCH, 200, seed)]
    validation = Asked(model, prompts_about(VALIDATION, 60, seed + 1))
    held_out = prompts_about(TEST, 200, seed + 2)
    test, contrary = Asked(model, held_out), Asked(model, held_out, contrary=True)

    def tested(edits: Sequence[Edit]) -> tuple[dict[str, object], np.ndarray]:
        steered = Steered(model, edits)
        logs = test(steered)
        return summary(logs, contrary(steered)), logs[:, 0] - logs[:, 1]

    figures: dict[str, object] = {"plain": tested([])[0]}
    say(f"model {seed}, plain: {figures['plain']}")
    if float(figures["plain"]["contrary"]) > -1:  # type: ignore[index]
        raise SystemExit(
            "this model has not learnt that a text keeps to its style: there is nothing to steer; train longer"
        )
    blocks = [
        ({"layer": layer, "alpha": alpha}, difference.scaled(alpha))
        for layer in range(LAYERS)
        for difference in [difference_of_means(model, triples, layer=layer)]
        for alpha in STRENGTHS["block"]
    ]
    chosen, edit = best(blocks, model, validation)
    block, block_margins = tested([edit])
    figures["block"] = {**chosen, "units": edit.count, **block}
    say(f"model {seed}, block: {figures['block']}")
    units = {site: momentum(model, triples, site=site) for site in SITES}
    generator = torch.Generator().manual_seed(seed)
    for mode in ("scale", "shift", "mean"):
        rows = []
        for k in COUNTS:
            tries = [
                ({"site": site, "alpha": alpha}, cut(found, k, mode).scaled(alpha))
                for site, found in units.items()
                for alpha in STRENGTHS[mode]
            ]
            chosen, edit = best(tries, model, validation)
            found, alpha = units[str(chosen["site"])], float(chosen["alpha"])  # type: ignore[arg-type]
            reached, margins = tested([edit])
            row: dict[str, object] = {"k": k, **chosen, "tied_at_the_cut": list(found.tied(k)), **reached}
            own = alpha * (found.mean if mode == "mean" else found.beta)
            drawn: dict[str, list[np.ndarray]] = {"own": [], "dealt": []}
            for _ in range(draws):
                for name, other in placebo(found, edit, own, generator).items():
                    logs = test(Steered(model, [other]))
                    drawn[name].append(logs[:, 0] - logs[:, 1])
            for name, each in drawn.items():
                table = np.stack(each)  # [draws, prompts]
                row[f"placebo_{name}"] = {
                    "margin": round(float(table.mean()), 3),
                    "largest_of_draws": round(float(table.mean(1).max()), 3),
                    "gain_interval": interval(margins - table.mean(0)),
                    "p_of_rank": round(float((1 + (table.mean(1) >= margins.mean()).sum()) / (1 + draws)), 3),
                }
            row["gain_over_block_interval"] = interval(margins - block_margins)
            rows.append(row)
            say(
                f"  {mode:5} k {k:3} {chosen!s:36} margin {row['margin']:6} {row['margin_interval']!s:16} wanted log p "
                f"{row['wanted_logprob']:6} contrary {row['contrary']:6}; placebos (largest, p) "
                + ", ".join(
                    f"{p['margin']} ({p['largest_of_draws']}, {p['p_of_rank']})"
                    for p in (row["placebo_own"], row["placebo_dealt"])
                )
            )
        figures[mode] = rows
        reaching = [row["k"] for row in rows if float(row["margin"]) >= float(block["margin"])]  # type: ignore[arg-type]
        figures[f"fewest_units_with_the_margin_of_the_block_{mode}"] = min(reaching, default=None)
        say(f"  fewest units with the margin of the block: {min(reaching, default=None)}")
    return figures


def windows(model: nextoken.LanguageModel, text: str, length: int) -> Tensor:
    """Token ids [windows, length], each window after a begin token."""
    ids = torch.tensor(model.vocab.encode(text).ids)
    whole = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(whole), 1), model.vocab.bos_id), whole], 1)


def contrasted(name: str, text: str, *, length: int, seed: int, say: Callable[[str], None]) -> dict[str, object]:
    """Top-1 accuracy of the plain model and of DoLa, and how often the true token is left out."""
    model = nextoken.load(name)
    rows = windows(model, text, length)
    variants = {
        "plain": model,
        "low": DoLa(model, layers="low"),
        "high": DoLa(model, layers="high"),
        "low, without norm": DoLa(model, layers="low", norm=False),
        "high, without norm": DoLa(model, layers="high", norm=False),
    }
    draws = np.random.default_rng(seed)
    figures: dict[str, object] = {"tokens": int(rows[:, 1:].numel())}
    plain: np.ndarray | None = None
    for label, variant in variants.items():
        right, lost = [], []
        for some in rows.split(8):
            said = variant.predict(some).log_probs()[:, :-1]
            right.append((said.argmax(-1) == some[:, 1:]).double().mean(1))
            lost.append((torch.gather(said, 2, some[:, 1:, None])[..., 0] == -torch.inf).double().mean(1))
        accuracy = torch.cat(right).numpy()
        row: dict[str, object] = {"top1_accuracy": round(float(accuracy.mean()), 4)}
        if plain is None:
            plain = accuracy
        else:
            gain = accuracy - plain
            means = gain[draws.integers(0, len(gain), (2000, len(gain)))].mean(1)
            row |= {
                "layers": list(variant.layers),
                "gain": round(float(gain.mean()), 4),
                "gain_interval": [round(float(q), 4) for q in np.quantile(means, [0.025, 0.975])],
                "true_token_left_out": round(float(torch.cat(lost).mean()), 4),
            }
        figures[label] = row
        say(f"{name}, {label}: {row}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=int, default=3, help="trained for steering, from different seeds")
    parser.add_argument("--steps", type=int, default=1200, help="of training")
    parser.add_argument("--draws", type=int, default=20, help="of each placebo")
    parser.add_argument("--bytes", type=int, default=40_000, help="of the book that DoLa reads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="bench/results/steer.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begun = time.perf_counter()

    def say(line: str) -> None:
        print(line, flush=True)

    figures: dict[str, object] = {
        "steering": [
            steering(seed, steps=arguments.steps, draws=arguments.draws, say=say) for seed in range(arguments.models)
        ]
    }
    text = (arguments.data / "books/frankenstein.txt").read_bytes()[: arguments.bytes].decode(errors="ignore")
    figures["dola"] = {
        name: contrasted(name, text, length=128, seed=0, say=say) for name in ("nano", "tiny")
    }  # fmt: skip
    figures["minutes"] = round((time.perf_counter() - begun) / 60, 1)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

"""TempNet on a bundled model: what a learned temperature gains on one temperature, and for whom it is warm.

    python bench/temperature.py --json bench/results/temperature.json

The network learns on passages of books and is measured on passages of two others that neither it nor the model has
seen. The radius is the neutral one, with which the best constant temperature is near 1. Measured, per held-out token:
the robust loss F and plain cross-entropy of softmax(s / tau), for the model as it is, the constants best for each of
the two on the learning texts, the network, and the exact optimum of F, which is what an unbounded network would come
to. And corr(tau, H), H the entropy of the model's own distribution: its sign is what the paper's figure and the
mathematics disagree on. Then quantiles of the entropy before and after, the share of F explained, and the two ways to
shift the logits. Intervals are bootstraps over passages, 95 %, of differences per token.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import nextoken
from nextoken.model.base import LanguageModel
from nextoken.values import Schedule
from nextoken.values.robust import entropy_at, equalising_temperature, robust_loss
from nextoken.values.temperature_fit import fit_temperature, neutral_radius
from record import write

LEARNT = ("jane-eyre", "great-expectations", "dracula", "wuthering-heights", "emma", "middlemarch", "little-women")
HELD_OUT = ("frankenstein", "the-time-machine")


def passages(data: Path, books: Sequence[str], count: int, size: int, seed: int) -> list[str]:
    """Passages of `size` characters that begin with a sentence."""
    texts = [re.sub(r"\s+", " ", (data / "books" / f"{book}.txt").read_text(encoding="utf-8")) for book in books]
    begins = [(text, match.end()) for text in texts for match in re.finditer(r"[.!?]”? (?=[A-Z“])", text)]
    chosen = np.random.default_rng(seed).permutation(len(begins))[:count]
    return [begins[i][0][begins[i][1] : begins[i][1] + size] for i in chosen]


@torch.no_grad()
def read(model: LanguageModel, texts: Sequence[str], tokens: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Logits [N, V], labels [N] and the number of each token's text [N]."""
    logits, labels, owner = [], [], []
    for number, text in enumerate(texts):
        ids = [model.vocab.bos_id, *model.vocab.encode(text).ids][:tokens]
        logits.append(model.predict([ids[:-1]]).logits()[0].float())
        labels.append(torch.tensor(ids[1:]))
        owner += [number] * (len(ids) - 1)
    return torch.cat(logits), torch.cat(labels), np.array(owner)


def losses(logits: Tensor, labels: Tensor, tau: Tensor, rho: float) -> dict[str, np.ndarray]:
    """F and cross-entropy of each token."""
    robust = robust_loss(logits, labels, tau, rho=rho)
    plain = F.cross_entropy(logits / tau[:, None], labels, reduction="none")
    return {"F": robust.double().numpy(), "ce": plain.double().numpy()}


def interval(values: np.ndarray, owner: np.ndarray, seed: int = 0) -> list[float]:
    """Of the mean over tokens; passages are drawn."""
    count = int(owner.max()) + 1
    sums, sizes = np.bincount(owner, values, minlength=count), np.bincount(owner, minlength=count)
    draws = np.random.default_rng(seed).integers(count, size=(1000, count))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    return [round(float(x), 4) for x in np.quantile(means, [0.025, 0.975])]


def best_constant(logits: Tensor, labels: Tensor, rho: float, what: str) -> float:
    grid = np.arange(0.6, 1.61, 0.02)
    tried = [losses(logits, labels, torch.full((len(labels),), float(t)), rho)[what].mean() for t in grid]
    return round(float(grid[int(np.argmin(tried))]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--learnt", type=int, default=160, help="passages to learn from")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64, help="of each passage")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-2)
    parser.add_argument("--low", type=float, default=0.5)
    parser.add_argument("--high", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="bench/results/temperature.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, size = nextoken.load(options.model), options.tokens
    learnt = passages(options.data, LEARNT, options.learnt, 6 * size, options.seed)
    fresh = passages(options.data, HELD_OUT, options.held_out, 6 * size, options.seed)
    own, own_labels, _ = read(model, learnt[:40], size)
    logits, labels, owner = read(model, fresh, size)
    entropy = entropy_at(logits, torch.ones(len(labels)))
    neutral = neutral_radius(model, learnt[:40], max_tokens=size)
    figures: dict[str, object] = {
        "vocabulary": model.vocab.size,
        "held_out_tokens": len(labels),
        "entropy_quantiles": quantiles(entropy),
        "neutral_rho": round(neutral, 4),
    }
    print(figures, flush=True)
    schedule = Schedule(epochs=options.epochs, batch=options.batch, rate=options.rate, weight_decay=1e-2)
    for name, rho, shift in (
        ("neutral", neutral, "mean"),
        ("neutral, shifted by the greatest", neutral, "max"),
    ):
        began = time.process_time()
        learned = fit_temperature(
            model,
            learnt,
            rho=rho,
            low=options.low,
            high=options.high,
            shift=shift,  # type: ignore[arg-type]
            max_tokens=size,
            schedule=schedule,
            seed=options.seed,
        )
        seconds = time.process_time() - began
        for_f, for_ce = (best_constant(own, own_labels, rho, what) for what in ("F", "ce"))
        tau = learned.temperatures(logits)
        exact = equalising_temperature(logits, rho=rho, low=options.low, high=options.high).float()
        rivals = {
            "1": torch.ones(len(labels)),
            "constant best for F": torch.full((len(labels),), for_f),
            "constant best for ce": torch.full((len(labels),), for_ce),
            "network": tau,
            "its mean as a constant": tau.mean().expand(len(labels)),
            "exact optimum": exact,
        }
        found = {rival: losses(logits, labels, each, rho) for rival, each in rivals.items()}
        table: dict[str, object] = {
            rival: {what: round(float(values.mean()), 4) for what, values in row.items()}
            for rival, row in found.items()
        }
        gain = {
            what: found[f"constant best for {what if what == 'F' else 'ce'}"][what] - found["network"][what]
            for what in ("F", "ce")
        }
        reachable = (found["constant best for F"]["F"] - found["exact optimum"]["F"]).mean()
        figures[name] = {
            "rho": round(rho, 4),
            "target_entropy": round(math.log(model.vocab.size) - rho, 4),
            "constants": {"F": for_f, "ce": for_ce},
            "losses": table,
            "gain_on_best_constant": {what: round(float(values.mean()), 4) for what, values in gain.items()},
            "gain_interval": {what: interval(values, owner) for what, values in gain.items()},
            "share_of_reachable_gain_in_F": round(float(gain["F"].mean() / reachable), 4),
            "tau": {"mean": round(float(tau.mean()), 4), "std": round(float(tau.std()), 4), "q": quantiles(tau)},
            "corr_tau_entropy": round(float(np.corrcoef(tau, entropy)[0, 1]), 4),
            "corr_exact_tau_entropy": round(float(np.corrcoef(exact, entropy)[0, 1]), 4),
            "entropy_after": quantiles(entropy_at(logits, tau)),
            "seconds_training": round(seconds, 1),
        }
        print(name, figures[name], flush=True)
    write(options.json, figures)


def quantiles(values: Tensor) -> list[float]:
    """5, 25, 50, 75 and 95 %."""
    return [round(float(x), 3) for x in np.quantile(values.double().numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])]


if __name__ == "__main__":
    main()

"""Adaptive width: experts of which a token takes a varying number, and big, small or no feed-forward blocks.

    python bench/adaptive_width.py --json bench/results/adaptive_width.json

Models of four layers and 32 hidden units learn from scratch, by one trainer, rows made by this program: letters
written twice (`copy`, the second time), digits that a table of 25 facts tells for two others (`fact`), and what nothing
tells (`free`: the letters the first time, the digits asked for). Loss is in nats per token on rows that were not
trained on.

DynaMoE: 16 experts of 24 inner units in all, distributed over the layers by the six schedules, equal in total
parameters to each other and to `dense 96`, one block of 96 units per layer. `dense` with fewer units is that of equal
activated parameters. `top-K` routes by each token's own quantile, `all active` by tau 0. `less uniform` is the loss
less that of the uniform schedule with the same seed: mean over seeds and 95 % t-interval. Rank correlations are of
the experts a token took in all and of the entropy and loss that follow, over all tokens and over those of each kind.

Duo-LLM: big blocks of 96 and small ones of 12 units, trained by random routing over skip, small and big; `dense` has
had as many steps and no routing. Loss beside the activated share of the big blocks' weights: fixed routes, random
routing at each budget, the best fixed route within it (chosen on training rows), and trained routers; these beside
coins with their own share, and beside coins with their own shares in every layer. Differences have 95 % bootstrap
intervals over rows and seeds. The oracle searches all 81 routes of every token, the tokens before it big throughout;
`control` is the same for tokens drawn from what the model says in their place, which no route can know, and
`shuffled` for those of other places: what they gain is the effect of choosing alone.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from transformers import LlamaConfig, LlamaForCausalLM

import record
from nextoken.model.base import LanguageModel
from nextoken.model.hf import HFModel
from nextoken.route import (
    DuoLLM,
    DuoRecipe,
    DynaMoE,
    ExpertRouting,
    ExpertsRecipe,
    FixedRoute,
    RandomRoute,
    RouterRecipe,
    ThresholdRouting,
    TokenQuantileRouting,
    Width,
    activated_share,
    depth_schedule,
    every_route,
    expert_usage,
    fit_duo,
    fit_experts,
    fit_routers,
    route_losses,
)
from nextoken.route.expert_usage import rank_correlation
from training import character_tokenizer

SHAPES = ("uniform", "descending", "ascending", "pyramid-up", "pyramid-down", "wave")
LETTERS, DIGITS = "abcdef", "01234"
FACTS = dict(zip(itertools.product(DIGITS, repeat=2), random.Random(0).choices(DIGITS, k=25), strict=True))
LAYERS, HIDDEN, INNER, EXPERT = 4, 32, 96, 24
KINDS = ("free", "copy", "fact")
BUDGETS = (0.25, 0.5, 0.75)
DRAWS = 2000

Rows = list[list[int]]


def text(rng: random.Random, tasks: int) -> tuple[str, list[int]]:
    """A row, and of each character whether it is free (0), a copy (1) or a fact (2)."""
    written, kinds = "", list[int]()
    for _ in range(tasks):
        if rng.random() < 0.2:
            letters = "".join(rng.choice(LETTERS) for _ in range(4))
            written, kinds = written + f"{letters}|{letters}", [*kinds, 0, 0, 0, 0, 1, 1, 1, 1, 1]
        else:
            a, b = rng.choice(DIGITS), rng.choice(DIGITS)
            written, kinds = written + f"{a}{b}={FACTS[a, b]}", [*kinds, 0, 0, 1, 2]
    return written, kinds


def made(count: int, length: int, tokenizer: Any, seed: int) -> tuple[Rows, np.ndarray]:
    """Rows of a begin token and `length` others, and the kinds of the others [N, L]."""
    rng, rows, kinds = random.Random(seed), Rows(), []
    for _ in range(count):
        written, kind = text(rng, length // 4 + 1)
        ids = tokenizer.encode(written[:length], add_special_tokens=False)
        rows.append([tokenizer.bos_token_id, *ids])
        kinds.append(kind[:length])
    return rows, np.array(kinds)


def new_model(tokenizer: Any, seed: int, length: int) -> HFModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=length + 1,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HFModel(LlamaForCausalLM(config).eval(), tokenizer, name="new")


def losses(model: LanguageModel, rows: Rows) -> np.ndarray:
    """-log p [N, L] in nats."""
    ids = torch.tensor(rows)
    nats = model.predict(ids[:, :-1]).statistics(ids[:, 1:]).logprob
    assert nats is not None
    return -nats.double().numpy()


def by_kind(values: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    return {kind: round(float(values[kinds == number].mean()), 4) for number, kind in enumerate(KINDS)}


def t_interval(values: Sequence[float]) -> list[float]:
    mean, count = float(np.mean(values)), len(values)
    reach = float(student.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5) if count > 1 else float("nan")
    return [round(mean - reach, 4), round(mean + reach, 4)]


def experts(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    train, _ = made(arguments.rows, arguments.length, tokenizer, seed=1)
    test, kinds = made(arguments.test, arguments.length, tokenizer, seed=2)
    recipe = ExpertsRecipe(steps=arguments.steps, batch=arguments.batch, rate=arguments.rate)
    half = ThresholdRouting(0.5)
    arms: list[tuple[str, Sequence[int], int, ExpertRouting]] = [
        *((shape, depth_schedule(shape, LAYERS, least=2, most=6, total=16), EXPERT, half) for shape in SHAPES),
        ("uniform, top-K", (4,) * LAYERS, EXPERT, TokenQuantileRouting(0.5)),
        ("uniform, all active", (4,) * LAYERS, EXPERT, ThresholdRouting(0.0)),
        ("dense 96", (1,) * LAYERS, INNER, half),
        ("dense 48", (1,) * LAYERS, INNER // 2, half),
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in arms}
    for seed in range(arguments.seeds):
        base = new_model(tokenizer, seed, arguments.length)
        for name, sizes, width, routing in arms:
            model = DynaMoE.fresh(base, experts=sizes, width=width, routing=routing, seed=seed)
            fit_experts(model, train, recipe=recipe, seed=seed)
            before = model.spent
            nats = losses(model, test)
            cost, usage = model.spent - before, expert_usage(model, test)
            total = usage.counts.sum(1)
            found[name].append(
                {
                    "loss": nats.mean(),
                    **by_kind(nats, kinds),
                    "activated": cost.activated,
                    "total": sum(w.numel() for w in model.inner.model.parameters()),
                    "mean": usage.mean,
                    "variance": usage.variance,
                    "histograms": [counts[1:] / counts.sum() for counts in usage.histograms],
                    "least used": min(float(shares.min()) for shares in usage.utilisation),
                    "taken": [total[kinds.ravel() == kind].mean() for kind in range(len(KINDS))],
                    "entropy": usage.with_entropy,
                    "nats": usage.with_loss,
                    "within": [
                        rank_correlation(total[kinds.ravel() == kind], usage.entropies[kinds.ravel() == kind])
                        for kind in range(len(KINDS))
                    ],
                }
            )
            print(f"seed {seed}  {name:20s} {nats.mean():.4f}  {cost.activated:8.0f}", flush=True)
    table = []
    for name, sizes, *_ in arms:
        runs = found[name]
        differences = [run["loss"] - other["loss"] for run, other in zip(runs, found["uniform"], strict=True)]
        told: dict[str, Any] = {
            "arm": name,
            "experts": list(sizes),
            "total parameters": runs[0]["total"],
            "activated parameters": round(np.mean([run["activated"] for run in runs])),
            "loss": round(float(np.mean([run["loss"] for run in runs])), 4),
            "loss by seed": [round(float(run["loss"]), 4) for run in runs],
            **{kind: round(float(np.mean([run[kind] for run in runs])), 4) for kind in KINDS},
        }
        if name != "uniform":
            told |= {"less uniform": round(float(np.mean(differences)), 4), "interval": t_interval(differences)}
        if max(sizes) > 1:
            told |= {
                "mean active": np.mean([run["mean"] for run in runs], 0).round(2).tolist(),
                "variance of active": np.mean([run["variance"] for run in runs], 0).round(2).tolist(),
                "shares of 1, 2, ... active, seed 0": [part.round(3).tolist() for part in runs[0]["histograms"]],
                "least used expert": round(float(np.mean([run["least used"] for run in runs])), 3),
                "active in all layers": {
                    kind: round(float(np.mean([run["taken"][number] for run in runs])), 2)
                    for number, kind in enumerate(KINDS)
                },
                "active and entropy": correlations([run["entropy"] for run in runs]),
                "active and loss": correlations([run["nats"] for run in runs]),
                "active and entropy within": {
                    kind: correlations([run["within"][number] for run in runs]) for number, kind in enumerate(KINDS)
                },
            }
        table.append(told)
    return {"steps": arguments.steps, "seeds": arguments.seeds, "arms": table}


def correlations(values: Sequence[float]) -> list[float | None]:
    """By seed; None where a side has no two different values."""
    return [None if np.isnan(value) else round(float(value), 3) for value in values]


def bootstrap(differences: np.ndarray) -> list[float]:
    """95 % interval of the mean of [S, N], seeds and rows drawn anew."""
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, len(differences), (DRAWS, len(differences)))
    rows = generator.integers(0, differences.shape[1], (DRAWS, differences.shape[1]))
    means = np.stack([differences[chosen].mean(0)[some].mean() for chosen, some in zip(seeds, rows, strict=True)])
    return [round(float(edge), 4) for edge in np.quantile(means, [0.025, 0.975])]


def mean(values: Sequence[Any] | np.ndarray) -> float:
    return round(float(np.mean(values)), 4)


def duo(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    train, _ = made(arguments.rows, arguments.length, tokenizer, seed=1)
    test, kinds = made(arguments.test, arguments.length, tokenizer, seed=2)
    chosen_on = train[: arguments.test]
    routes = every_route(LAYERS, widths=Width)
    fixed: dict[str, list[np.ndarray]] = {name: [] for name in ("dense", "all big", "all small", "all skip")}
    coins: dict[float, list[np.ndarray]] = {budget: [] for budget in BUDGETS}
    still: dict[float, list[np.ndarray]] = {budget: [] for budget in BUDGETS}
    stills: dict[float, list[str]] = {budget: [] for budget in BUDGETS}
    learnt: dict[float, list[dict[str, Any]]] = {budget: [] for budget in BUDGETS}
    tables, shares = [], (0.0, 0.0, 0.0)
    for seed in range(arguments.duo_seeds):
        base = new_model(tokenizer, seed, arguments.length)
        recipe = DuoRecipe(steps=arguments.duo_steps, batch=arguments.batch, rate=arguments.rate)
        dense = DuoLLM.beside(base, seed=seed)
        fit_duo(dense, train, widths=[Width.BIG], recipe=recipe, seed=seed)
        model = DuoLLM.beside(base, seed=seed)
        fit_duo(model, train, widths=Width, recipe=recipe, seed=seed)
        shares = model.blocks[0].costs
        fixed["dense"].append(losses(dense, test))
        for name, width in (("all big", Width.BIG), ("all small", Width.SMALL), ("all skip", Width.SKIP)):
            fixed[name].append(losses(model.along(FixedRoute.all(width, LAYERS)), test))
        trials = [
            (sum(shares[w] for w in r) / LAYERS, losses(model.along(FixedRoute(r)), chosen_on), r) for r in routes
        ]
        for budget in BUDGETS:
            coin = coins_at(budget, shares)
            coins[budget].append(np.mean([losses(model.along(RandomRoute(coin, s)), test) for s in range(3)], 0))
            best = min((trial for trial in trials if trial[0] <= budget + 0.02), key=lambda trial: trial[1].mean())[2]
            stills[budget].append("".join("-sB"[width] for width in best))
            still[budget].append(losses(model.along(FixedRoute(best)), test))
            routers, _ = fit_routers(
                model,
                train,
                budget=budget,
                widths=Width,
                recipe=RouterRecipe(steps=arguments.router_steps, batch=arguments.batch),
                seed=seed,
            )
            routed = model.along(routers)
            own = activated_share(routed, [row[:-1] for row in test])
            used = float((np.array(own) * shares).sum(1).mean())
            equal = coins_at(used, shares)
            before = routed.spent
            nats = losses(routed, test)
            activated = (routed.spent - before).activated
            pays = np.stack([block.last.numpy() for block in model.blocks if block.last is not None])
            learnt[budget].append(
                {
                    "share": used,
                    "activated": activated,
                    "shares": np.array(own),
                    "losses": nats,
                    "coins": np.mean([losses(model.along(RandomRoute(equal, s)), test) for s in range(3)], 0),
                    "layered": np.mean([losses(model.along(RandomRoute(own, s)), test) for s in range(3)], 0),
                    "pays": [np.array(shares)[pays[:, kinds == kind]].mean() for kind in range(len(KINDS))],
                }
            )
            print(f"seed {seed}  budget {budget}  routers {nats.mean():.4f} at {used:.3f}", flush=True)
        place = np.random.default_rng(seed).permutation(arguments.oracle)
        others = [[row[0], *test[at][1:]] for row, at in zip(test[: arguments.oracle], place, strict=True)]
        tables.append(
            (
                route_losses(model, test[: arguments.oracle], routes, seed=seed),
                route_losses(model, test[: arguments.oracle], routes, control=others),
            )
        )
        print(f"seed {seed}  oracle {tables[-1][0].best().mean():.4f}", flush=True)
    return {
        "small to big": round(shares[1], 4),
        "steps": arguments.duo_steps,
        "seeds": arguments.duo_seeds,
        "fixed routes": {
            name: {"loss": mean(found), **by_kind(np.mean(found, 0), kinds)} for name, found in fixed.items()
        },
        "budgets": [
            {
                "budget": budget,
                "random": mean(coins[budget]),
                "best fixed route": mean(still[budget]),
                "fixed route by seed": stills[budget],
                **routers_at(learnt[budget], np.array(still[budget]), kinds),
            }
            for budget in BUDGETS
        ],
        "oracle": oracle(tables, kinds[: arguments.oracle]),
    }


def coins_at(budget: float, shares: tuple[float, float, float]) -> tuple[float, float, float]:
    """Shares of skip, small and big that activate `budget`: small blocks at least, big ones for the rest."""
    if budget <= shares[1]:
        return (1 - budget / shares[1], budget / shares[1], 0.0)
    big = (budget - shares[1]) / (1 - shares[1])
    return (0.0, 1 - big, big)


def routers_at(runs: list[dict[str, Any]], still: np.ndarray, kinds: np.ndarray) -> dict[str, Any]:
    nats = np.array([run["losses"] for run in runs])
    against = {"coins": "random at its share", "layered": "random at its shares per layer"}
    told: dict[str, Any] = {
        "routers": mean(nats),
        "share": mean([run["share"] for run in runs]),
        "activated parameters": round(np.mean([run["activated"] for run in runs])),
        "skip, small, big per layer, seed 0": runs[0]["shares"].round(3).tolist(),
        "share by kind": {kind: mean([run["pays"][number] for run in runs]) for number, kind in enumerate(KINDS)},
        "loss by kind": by_kind(nats.mean(0), kinds),
    }
    for key, name in against.items():
        other = np.array([run[key] for run in runs])
        told[name] = mean(other)
        told[f"{name}, less routers"] = mean(other - nats)
        told[f"{name}, interval"] = bootstrap((other - nats).mean(-1))
    told["best fixed route, less routers"] = mean(still - nats)
    told["best fixed route, interval"] = bootstrap((still - nats).mean(-1))
    return told


def oracle(tables: list[Any], kinds: np.ndarray) -> dict[str, Any]:
    flat = kinds.ravel()
    told: dict[str, Any] = {"tokens": len(flat), "context route": mean([own.context for own, _ in tables])}
    for name, pick, control in (("true", 0, False), ("control", 0, True), ("shuffled", 1, True)):
        some = [pair[pick] for pair in tables]
        told[name] = {
            "mean of all routes": mean([t.mean(control=control) for t in some]),
            "best of 3": mean([t.best_of(3, control=control) for t in some]),
            "best of 10": mean([t.best_of(10, control=control) for t in some]),
            "oracle, at most b big": [mean([t.best(most=b, control=control) for t in some]) for b in range(LAYERS + 1)],
            "oracle, exactly b big": [
                mean([t.best(exactly=b, control=control) for t in some]) for b in range(LAYERS + 1)
            ],
            "random, exactly b big": [
                mean([t.mean(exactly=b, control=control) for t in some]) for b in range(LAYERS + 1)
            ],
            "gain": mean([t.gain(control=control) for t in some]),
            "gain by kind": by_kind(np.mean([t.gain(control=control) for t in some], 0), flat),
        }
    gains, own = [t.gain() for t, _ in tables], [t for t, _ in tables]
    ordered = [np.sort(gain)[::-1] for gain in gains]
    told |= {
        "share of tokens with half of the gain": mean(
            [np.searchsorted(gain.cumsum(), gain.sum() / 2) / len(gain) for gain in ordered]
        ),
        "gain and loss, rank correlation": mean(
            [rank_correlation(gain, t.context) for gain, t in zip(gains, own, strict=True)]
        ),
        "gain and entropy, rank correlation": mean(
            [rank_correlation(gain, t.entropies) for gain, t in zip(gains, own, strict=True)]
        ),
        "mean loss by kind": by_kind(np.mean([t.context for t in own], 0), flat),
        "tokens by kind": {kind: int((flat == number).sum()) for number, kind in enumerate(KINDS)},
    }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/results/adaptive_width.json"))
    parser.add_argument("--rows", type=int, default=6000, help="to train on")
    parser.add_argument("--test", type=int, default=96, help="rows to test on")
    parser.add_argument("--oracle", type=int, default=32, help="of them to search all routes of")
    parser.add_argument("--length", type=int, default=32, help="tokens in a row")
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--duo-steps", type=int, default=300)
    parser.add_argument("--router-steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--duo-seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    tokenizer = character_tokenizer(LETTERS + DIGITS + "|=")
    figures = {"experts": experts(arguments, tokenizer)}
    figures["seconds for experts"] = round(time.process_time() - began)  # type: ignore[assignment]
    figures["duo"] = duo(arguments, tokenizer)
    figures["seconds"] = round(time.process_time() - began)  # type: ignore[assignment]
    record.write(arguments.json, figures)
    for row in figures["experts"]["arms"]:
        print(f"{row['arm']:20s} {row['loss']:.4f} {row.get('less uniform', 0):+.4f} {row.get('interval', '')}")
    for row in figures["duo"]["budgets"]:
        print({key: value for key, value in row.items() if not isinstance(value, (list, dict))})
    print(figures["duo"]["fixed routes"])
    print(figures["duo"]["oracle"])


if __name__ == "__main__":
    main()

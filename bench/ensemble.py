"""Ensembles across vocabularies when the alignment is wrong: plain averages, CoRE, and CoRE without its anchor.

    python bench/ensemble.py --json bench/results/ensemble.json

Two ensembles predict the tokens of two books that none of their models was trained on, each token after the text before
it: nano helped by tiny, the better one, over the same vocabulary; and tiny helped by nano and by an n-gram model over a
tokenizer of its own, trained here on other books and aligned by least edit distance. Noise permutes a share of the
columns of every alignment among themselves, so that at 1 nearly everything an assistant says is about other tokens.

Reported are the share of tokens that are the best one (top 10 tokens of each model, guards as by default) and
the loss in nats (all tokens, no substring guard, which is meant for greedy choices), with 95 % bootstrap intervals over
passages, which differences share. Controls: the average of equal weights; one with the main model at a half, as the
anchor has it at least; and one with the main model at the mean weight that CoRE gave it, so that only what CoRE does
token by token is left to tell them apart. Standing still would be robust, too: so, of the tokens that the main model
gets wrong, the share in which the ensemble chooses what the best assistant without noise would, and the share it gets
right. Variants of CoRE are compared among themselves at no noise and at one draw of 0.5. Last, what alignments take to
make and to use, in seconds of one processor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import nextoken
from nextoken.model.aligned import Aligned
from nextoken.model.alignment import Alignment
from nextoken.model.base import LanguageModel
from nextoken.model.core import CoRE, Projected, ProjectedMean, leading
from nextoken.model.ngram import NgramModel
from nextoken.model.tokenizer import TokenizerVocab
from nextoken.model.vocab import Vocab
from record import write

HELD_OUT = ("frankenstein.txt", "the-time-machine.txt")
OTHERS = ("dracula.txt", "jane-eyre.txt", "the-war-of-the-worlds.txt", "treasure-island.txt")
NOISE = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
FILTERS = ("rbf", "linear", "power", "reciprocal", "sigmoid")
AVERAGE, HALF, MATCHED = "average", "average, main at half", "average, main at CoRE's mean weight"
LENGTH, SKIPPED = 64, 16
CHUNK = 256


@dataclass(frozen=True)
class Pool:
    """A main model, its assistants, and what they say [M, V] of the M places whose tokens are `targets`."""

    name: str
    main: LanguageModel
    assistants: tuple[LanguageModel, ...]
    alignments: tuple[Alignment, ...]
    said: tuple[Tensor, ...]
    targets: Tensor


def counting_model(data: Path) -> NgramModel:
    """Modified Kneser-Ney of order 4 over a byte-level BPE of 2,048 tokens."""
    texts = [(data / "books" / name).read_text(encoding="utf-8")[:400_000] for name in OTHERS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    return NgramModel.from_text(texts, TokenizerVocab(fast), order=4, name="n-gram")


def passages(data: Path, vocab: Vocab, count: int) -> list[list[int]]:
    """Token strings of LENGTH after the begin token, from all over the held-out books."""
    rows = []
    for name in HELD_OUT:
        ids = vocab.encode((data / "books" / name).read_text(encoding="utf-8")).ids
        step = (len(ids) - LENGTH) // count
        rows += [[vocab.bos_id, *ids[at : at + LENGTH]] for at in range(step // 2, step * count, step)][:count]
    return rows


def read(model: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """log p [M, V] at the places that count, in the model's own vocabulary where it is seen through an alignment."""
    said = []
    for row in rows:
        told = model.predict([row[:-1]])
        source = told.source if isinstance(model, Aligned) else told
        said.append(source.log_probs()[0, SKIPPED:].float())
    return torch.cat(said)


def permuted(alignment: Alignment, share: float, generator: torch.Generator) -> Alignment:
    """With that share of the columns moved, each to the place of another of them."""
    size = alignment.shape[1]
    moved = torch.randperm(size, generator=generator)[: int(share * size)]
    place = torch.arange(size)
    place[moved] = moved.roll(1)
    return Alignment(alignment.sources, place[alignment.targets], alignment.weights, alignment.shape)


def shares_of(pool: Pool, alignments: Sequence[Alignment], top: int | None) -> Iterator[tuple[Tensor, slice]]:
    """q [N+1, C, V] of some places at a time, and which."""
    for at in range(0, len(pool.targets), CHUNK):
        part = slice(at, at + CHUNK)
        shares = [leading(pool.said[0][part], top)] + [
            alignment.project(leading(said[part], top))
            for alignment, said in zip(alignments, pool.said[1:], strict=True)
        ]
        yield torch.stack(shares), part


def judged(
    pool: Pool, alignments: Sequence[Alignment], operators: Sequence[tuple[str, Projected]], top: int | None
) -> dict[str, Tensor]:
    """For each operator [3, M]: log-probability of the target, whether it is the best token, and the best token."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in operators}
    for shares, part in shares_of(pool, alignments, top):
        target, logs = pool.targets[part], list(shares.log())
        for name, operator in operators:
            weights = torch.log_softmax(operator.combine(logs), -1)
            best = weights.argmax(-1)
            logprob = weights.gather(-1, target[:, None])[:, 0]
            found[name].append(torch.stack([logprob, (best == target).float(), best.float()]))
    return {name: torch.cat(parts, -1) for name, parts in found.items()}


def operators_of(
    pool: Pool, alignments: Sequence[Alignment], top: int | None, guard: bool
) -> tuple[list[tuple[str, Projected]], float]:
    """The methods compared, and the mean weight that CoRE gives the main model."""
    args, options = (pool.main, pool.assistants), {"top": top, "substring_guard": guard}
    core, count = CoRE(*args, **options), len(pool.assistants)
    weights = [core.consistency(shares).weights[0] for shares, _ in shares_of(pool, alignments, top)]
    own = float(torch.cat(weights).mean())
    return [
        (AVERAGE, ProjectedMean(*args, **options)),
        (HALF, ProjectedMean(*args, weights=[0.5, *[0.5 / count] * count], **options)),
        (MATCHED, ProjectedMean(*args, weights=[own, *[(1 - own) / count] * count], **options)),
        ("CoRE", core),
        ("CoRE without anchor", CoRE(*args, anchor=False, **options)),
    ], own


def interval(values: Tensor, draws: Tensor) -> dict[str, float]:
    """Mean of [P, n] and its 95 % interval over the passages drawn, [R, P]."""
    means = values.double().mean(1)
    resampled = means[draws].mean(1)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": round(float(means.mean()), 4), "low": round(low, 4), "high": round(high, 4)}


def alone(pool: Pool, draws: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Each model by itself, without noise; and the best token [M] of the best assistant."""
    count = draws.shape[1]
    nats = -pool.said[0].gather(-1, pool.targets[:, None])[:, 0]
    best = {"main": pool.said[0].argmax(-1)}
    lost = {}
    for assistant, alignment, said in zip(pool.assistants, pool.alignments, pool.said[1:], strict=True):
        best[assistant.name] = alignment.project(said.exp()).argmax(-1)
        lost[assistant.name] = round(float(said.exp()[:, alignment.lost].sum(-1).mean()), 5)
    right = {name: (ids == pool.targets).float() for name, ids in best.items()}
    wrong = right["main"] == 0
    figures = {
        "items": len(pool.targets),
        "items_main_gets_wrong": int(wrong.sum()),
        "accuracy": {name: interval(values.reshape(count, -1), draws) for name, values in right.items()},
        "right_where_main_is_wrong": {name: round(float(values[wrong].mean()), 4) for name, values in right.items()},
        "main_nats": interval(nats.reshape(count, -1), draws),
        "mean_mass_lost": lost,
    }
    return figures, best[max(list(best)[1:], key=lambda name: float(right[name].mean()))]


def robustness(pool: Pool, seeds: int, draws: Tensor) -> dict[str, Any]:
    """Accuracy, loss and agreement of every method at every noise."""

    def spread(values: Tensor) -> dict[str, float]:
        return interval(values.reshape(draws.shape[1], -1), draws)

    figures, helper = alone(pool, draws)
    main = (pool.said[0].argmax(-1) == pool.targets).float()
    nats = -pool.said[0].gather(-1, pool.targets[:, None])[:, 0]
    result: dict[str, Any] = {"alone": figures, "noise": {}}
    print(f"\n{pool.name}: " + ", ".join(f"{name} {v['mean']:.3f}" for name, v in figures["accuracy"].items()))
    for share in NOISE:
        runs = []
        for seed in range(seeds if share else 1):
            generator = torch.Generator().manual_seed(seed)
            noisy = [permuted(alignment, share, generator) for alignment in pool.alignments]
            operators, own = operators_of(pool, noisy, 10, True)
            runs.append((judged(pool, noisy, operators, 10), own))
            if not seed:
                whole, own_whole = operators_of(pool, noisy, None, False)
                losses = judged(pool, noisy, whole, None)
        right = {name: torch.stack([found[name][1] for found, _ in runs]).mean(0) for name, _ in operators}
        table: dict[str, Any] = {
            "mean_weight_of_main": {
                "top 10": round(sum(own for _, own in runs) / len(runs), 4),
                "all": round(own_whole, 4),
            }
        }
        print(f"noise {share}, mean weight of the main model {table['mean_weight_of_main']}")
        for name, values in right.items():
            followed = torch.stack([(found[name][2] == helper).float() for found, _ in runs]).mean(0)
            table[name] = {
                "accuracy": spread(values),
                "accuracy_less_average": spread(values - right[AVERAGE]),
                "accuracy_less_main": spread(values - main),
                "accuracy_less_matched": spread(values - right[MATCHED]),
                "nats": spread(-losses[name][0]),
                "nats_less_main": spread(-losses[name][0] - nats),
                "nats_less_matched": spread(losses[MATCHED][0] - losses[name][0]),
                "where_main_is_wrong": {
                    "as_best_assistant": round(float(followed[main == 0].mean()), 4),
                    "right": round(float(values[main == 0].mean()), 4),
                },
            }
            shown = table[name]
            print(
                f"  {name:36} {_shown(shown['accuracy'])}  less main {_shown(shown['accuracy_less_main'])}"
                f"  {shown['nats']['mean']:.3f} nats  {shown['where_main_is_wrong']}",
                flush=True,
            )
        result["noise"][str(share)] = table
    variants: list[tuple[str, Projected]] = [
        (name, CoRE(pool.main, pool.assistants, consistency=name))  # type: ignore[arg-type]
        for name in FILTERS
    ]
    variants += [
        (f"rbf, floor {floor}, without anchor", CoRE(pool.main, pool.assistants, floor=floor, anchor=False))
        for floor in (0.1, 1.0)
    ]
    half = [permuted(alignment, 0.5, torch.Generator().manual_seed(0)) for alignment in pool.alignments]
    result["variants"] = {
        noise: {name: spread(values[1]) for name, values in judged(pool, alignments, variants, 10).items()}
        for noise, alignments in (("0.0", pool.alignments), ("0.5", half))
    }
    print("variants", {k: {n: v["mean"] for n, v in t.items()} for k, t in result["variants"].items()}, flush=True)
    return result


def _shown(values: dict[str, float]) -> str:
    return f"{values['mean']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()
    value = call()
    return value, round(time.process_time() - begun, 3)


def costs(data: Path, small: Vocab, nano: LanguageModel) -> dict[str, Any]:
    """Seconds of the processor to align vocabularies, and to read and decode through an alignment."""
    folder = data / "gpt2-tokenizer"
    gpt2 = TokenizerVocab(
        PreTrainedTokenizerFast(tokenizer_object=_gpt2(folder), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    )
    # As many tokens again, most of them without an equal: GPT-2's with the case of their letters swapped.
    swapped = Vocab([spelled.swapcase() for spelled in gpt2.token_bytes], eos_ids=gpt2.eos_ids)
    pairs = {
        "n-gram to nano": (small, nano.vocab),
        "nano to GPT-2": (nano.vocab, gpt2),
        "GPT-2 to nano": (gpt2, nano.vocab),
        "GPT-2, case swapped, to GPT-2": (swapped, gpt2),
    }
    found: dict[str, Any] = {}
    for name, (source, target) in pairs.items():
        exact = Alignment.exact(source, target)
        _, seconds = timed(lambda source=source, target=target: Alignment.minimum_edit(source, target))
        found[name] = {"sizes": [source.size, target.size], "without_an_equal": len(exact.lost), "seconds": seconds}
        print(f"alignment {name}: {source.size} x {target.size}, {len(exact.lost)} without an equal, {seconds} s")
    same = Aligned(nano, nano.vocab, Alignment.exact(nano.vocab, nano.vocab))
    ids = [nano.vocab.bos_id, *nano.vocab.encode((data / "books" / HELD_OUT[0]).read_text(encoding="utf-8")).ids[:511]]

    def decode(model: LanguageModel) -> None:
        state = model.start()
        model.extend(state, [ids[:256]])
        for token in ids[256:320]:
            model.extend(state, [[token]])

    for name, model in (("nano", nano), ("nano, aligned to itself", same)):
        calls = {"read 512 tokens": partial(model.predict, [ids]), "64 steps after 256": partial(decode, model)}
        found[name] = {what: min(timed(call)[1] for _ in range(3)) for what, call in calls.items()}
        print(name, found[name], flush=True)
    return found


def _gpt2(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--passages", type=int, default=16, help="of each book")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise")
    parser.add_argument("--json", default="bench/results/ensemble.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny, nano = nextoken.load("tiny"), nextoken.load("nano")
    counts = counting_model(arguments.data)
    vocab = tiny.vocab
    nearest = Alignment.minimum_edit(counts.vocab, vocab)
    rows = passages(arguments.data, vocab, arguments.passages)
    targets = torch.tensor([row[SKIPPED + 1 :] for row in rows]).reshape(-1)
    by_tiny, by_nano = read(tiny, rows), read(nano, rows)
    seen = Aligned(counts, vocab, nearest)
    by_counts = read(seen, rows)
    itself = Alignment.exact(vocab, vocab)
    pools = (
        Pool("nano with tiny", nano, (tiny,), (itself,), (by_nano, by_tiny), targets),
        Pool(
            "tiny with nano and n-gram", tiny, (nano, seen), (itself, nearest), (by_tiny, by_nano, by_counts), targets
        ),
    )
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(rows), (2000, len(rows)), generator=generator)
    figures: dict[str, Any] = {pool.name: robustness(pool, arguments.seeds, draws) for pool in pools}
    figures["costs"] = costs(arguments.data, counts.vocab, nano)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

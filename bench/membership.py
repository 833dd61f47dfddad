"""Membership inference on books that tiny was trained on and two that it was not, and on a split without confounds.

    python bench/membership.py --json bench/results/membership.json

First, passages of the books tiny was trained on against passages of Frankenstein and The Time Machine, equal in tokens.
The two sides differ in author and style, not only in membership; so beside the attacks stand judges that cannot know
the training set: an n-gram model of modern articles, and the mean frequency of the tokens in them. What an attack finds
beyond them is the most that can be said for it; what they find is style. (nano, the reference model, was trained on the
same books, which makes for a weak reference.)

Second, a split that has no such confound: passages of Frankenstein alone, members drawn by lot, on which nano is
trained further for some epochs; 0 epochs is the null, at which every attack must be near 0.5. AUROC and true positives
at 1 % and 5 % false positives with 95 % bootstrap intervals over passages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nextoken
from nextoken.model.base import LanguageModel
from nextoken.model.ngram import NgramModel
from nextoken.scores.dc_pdd import TokenFrequencies, saturation
from nextoken.scores.perturbation import SpanResampler, read_variants
from nextoken.scores.quality import auroc, bootstrap, tpr_at_fpr
from record import write
from training import continue_training

UNSEEN = ("frankenstein.txt", "the-time-machine.txt")
PREFIX = 48
"""Tokens of the prefix of ReCaLL, from the end of an unseen book, which is no passage under test."""


def joined(path: Path) -> str:
    """A book with its lines joined, without what a publisher puts at both ends."""
    text = " ".join(path.read_text().split())
    return text[5_000:-5_000]


def passages(text: str, model: LanguageModel, tokens: int, starts: Sequence[int]) -> list[str]:
    """Passages of so many tokens from the words at which these characters stand."""
    found = []
    for start in starts:
        begin = text.index(" ", start) + 1
        piece = text[begin : begin + 8 * tokens]
        found.append(piece.encode()[: model.vocab.encode(piece).ends[tokens - 1]].decode(errors="ignore"))
    return found


def sampled(books: Sequence[Path], model: LanguageModel, tokens: int, count: int, seed: int) -> list[str]:
    """Passages from anywhere in the books, as many of each book as of the others, one here or there apart."""
    random, found = np.random.default_rng(seed), []
    for number, book in enumerate(books):
        text = joined(book)
        share = count // len(books) + (number < count % len(books))
        found += passages(text, model, tokens, random.integers(0, len(text) - 10 * tokens, share).tolist())
    return found


def judged(scores: np.ndarray, member: np.ndarray) -> dict[str, Any]:
    measures: dict[str, Callable[..., Any]] = {
        "auroc": auroc,
        "tpr_at_fpr_1%": partial(tpr_at_fpr, fpr=0.01),
        "tpr_at_fpr_5%": partial(tpr_at_fpr, fpr=0.05),
    }
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        interval = bootstrap(partial(measure, missing="omit"), scores, member, resamples=1000)
        found[name] = [round(value, 3) for value in (interval.value, interval.low, interval.high)]
    return found


class Attacks:
    """All scores of texts under a target model.

    Args:
        reference: trained on like data.
        frequencies: of tokens, for DC-PDD, by what they were counted on.
        prefix: of texts that are no members.
        perturbing: draws the neighbours.
    """

    def __init__(
        self,
        reference: LanguageModel,
        frequencies: dict[str, TokenFrequencies],
        prefix: str,
        perturbing: LanguageModel,
        neighbours: int,
    ) -> None:
        self.reference, self.frequencies, self.prefix = reference, frequencies, prefix
        self.change = SpanResampler(perturbing, variants=neighbours)

    def __call__(self, target: LanguageModel, texts: list[str]) -> dict[str, np.ndarray]:
        read = partial(nextoken.read, top=0, progress=False)
        signature = read(target, texts)
        variants = read_variants(target, texts, self.change)
        found = {
            "loss": nextoken.score(signature, "mean_logprob"),
            "zlib": nextoken.score(signature, "zlib"),
            "lowercase": nextoken.score(signature, "lowercase", lowered=read(target, [t.lower() for t in texts])),
            "reference": nextoken.score(signature, "reference", reference=read(self.reference, texts)),
            "min_k 20 %": nextoken.score(signature, "min_k"),
            "min_k_plus_plus 20 %": nextoken.score(signature, "min_k_plus_plus"),
            "neighbourhood": nextoken.score(signature, "neighbourhood", variants=variants),
            "recall": nextoken.score(
                signature, "recall", prefixed=read(target, texts, prompts=[self.prefix] * len(texts))
            ),
        }
        for name, frequencies in self.frequencies.items():
            for limit in (0.01, 0.5):
                score = nextoken.score(signature, "dc_pdd", frequencies=frequencies, limit=limit)
                found[f"dc_pdd, limit {limit}, counted on {name}"] = score
        return found


def without_model(texts: list[str], stranger: LanguageModel, frequencies: TokenFrequencies) -> dict[str, np.ndarray]:
    """Judges that cannot know the members: what they find is style."""
    signature = nextoken.read(stranger, texts, top=0, progress=False)
    rows = nextoken.scores.Rows(signature)
    return {
        "loss of an n-gram model of other texts": nextoken.score(signature, "mean_logprob"),
        "min_k of that model": nextoken.score(signature, "min_k"),
        "zlib of that model": nextoken.score(signature, "zlib"),
        "mean log-frequency of the tokens": rows.mean(frequencies.log_probs[signature.column("token_id")]),
    }


def shown(name: str, found: dict[str, Any]) -> None:
    print(
        f"  {name:44}" + "  ".join(f"{v:6.3f} [{low:.3f}, {high:.3f}]" for v, low, high in found.values()), flush=True
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--passages", type=int, default=150, help="of members, and as many of others")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--neighbours", type=int, default=4)
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 2, 8])
    parser.add_argument("--json", default="bench/results/membership.json")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.process_time()
    tiny, nano = nextoken.load("tiny"), nextoken.load("nano")
    books = sorted((chosen.data / "books").glob("*.txt"))
    seen = [book for book in books if book.name not in UNSEEN]
    unseen = [book for book in books if book.name in UNSEEN]
    modern = (chosen.data / "wikitext2" / "test.txt").read_text()[:400_000]
    # The test part, on which no model here was trained, in articles' paragraphs.
    stranger = NgramModel.from_text([line for line in modern.split("\n") if line.strip()], tiny.vocab, order=3)
    frequencies = {"articles": TokenFrequencies.from_text(modern, tiny.vocab)}
    last = " ".join(unseen[0].read_text().split())[-5_000:]
    (prefix,) = passages(last, tiny, PREFIX, [100])
    figures: dict[str, Any] = {"passages_of_each_side": chosen.passages, "books": {}, "one_book": {}}
    member = np.repeat([1, 0], chosen.passages)
    attacks = Attacks(nano, frequencies, prefix, nano, chosen.neighbours)
    for tokens in chosen.lengths:
        texts = sampled(seen, tiny, tokens, chosen.passages, 1) + sampled(unseen, tiny, tokens, chosen.passages, 2)
        scores = attacks(tiny, texts) | without_model(texts, stranger, frequencies["articles"])
        figures["books"][f"{tokens} tokens"] = {name: judged(values, member) for name, values in scores.items()}
        print(f"\ntiny, books seen and unseen, {tokens} tokens; AUROC, TPR at 1 %, TPR at 5 %")
        for name, one in figures["books"][f"{tokens} tokens"].items():
            shown(name, one)
    signature = nextoken.read(tiny, texts, top=0, progress=False)
    figures["dc_pdd_saturation"] = {
        str(limit): round(float(saturation(signature, frequencies["articles"], limit=limit).mean()), 3)
        for limit in (0.01, 0.5)
    }

    tokens = 64
    text = joined(unseen[0])
    starts = np.linspace(0, len(text) - 12 * tokens, 2 * chosen.passages).astype(int)
    order = np.random.default_rng(3).permutation(starts)
    texts = passages(text, nano, tokens, order.tolist())
    counted = {**frequencies, "the members": TokenFrequencies.from_text(texts[: chosen.passages], nano.vocab)}
    prefix = passages(joined(unseen[1]), nano, PREFIX, [1000])[0]
    attacks = Attacks(nano, counted, prefix, nano, chosen.neighbours)
    rows = [[nano.vocab.bos_id, *nano.vocab.encode(one).ids] for one in texts[: chosen.passages]]
    for epochs in chosen.epochs:
        steps = epochs * -(-len(rows) // 16)
        target = continue_training(nano, rows, steps=steps, lr=1e-3) if steps else nano
        scores = attacks(target, texts)
        if not epochs:
            scores |= without_model(texts, stranger, frequencies["articles"])
            del scores["reference"]  # the target itself
        figures["one_book"][f"{epochs} epochs"] = {name: judged(values, member) for name, values in scores.items()}
        print(f"\nnano trained further on half of one book's passages, {epochs} epochs, {tokens} tokens")
        for name, one in figures["one_book"][f"{epochs} epochs"].items():
            shown(name, one)
    figures["processor_seconds"] = round(time.process_time() - begun)
    print(f"\n{figures['processor_seconds']} s of processor time")
    write(chosen.json, figures)


if __name__ == "__main__":
    main()

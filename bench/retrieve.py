"""Retrieval from next-token logits on a corpus made of books: PromptReps, and FIRST before and after training.

    python bench/retrieve.py --json bench/results/retrieve.json

The corpus: `--passages` paragraphs of books, in each of which one sentence was cut out; the sentence is the query, the
paragraph it came from the only relevant passage. So a shared word tells much, and BM25 is a strong control; so is
"overlap", the sparse run of PromptReps with every weight 1, which needs no model. The bundled models follow no
instructions: what they answer when asked for one word is what novels would say, and the figures show it.

FIRST: tiny reranks the best of BM25 of a query (`--size` of them, the right one put among them, in a random order),
as it is, and after a minute of training on such lists from other books, by the joint loss and by writing rankings
alone. Beside the quality: tokens fed, and time, of one-token ranking and of writing the ranking out.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

import nextoken
from nextoken.retrieval.first import rerank, rerank_by_generation
from nextoken.retrieval.first_fit import RankedList, fit_first
from nextoken.retrieval.fusion import Index, Ranking, ndcg
from nextoken.retrieval.promptreps import QUERY, Representations, represent
from nextoken.scores.quality import bootstrap
from record import write

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z“\"])")


def corpus(books: Sequence[Path], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Queries and the passages they were cut from."""
    found = []
    for book in books:
        for paragraph in re.split(r"\n\s*\n", book.read_text(encoding="utf-8")):
            text = " ".join(paragraph.split())
            sentences = _SENTENCE.split(text)
            inner = [i for i in range(1, len(sentences) - 1) if 40 <= len(sentences[i]) <= 160]
            if 60 <= len(text.split()) <= 120 and inner:
                cut = inner[len(inner) // 2]
                found.append((sentences[cut], " ".join(sentences[:cut] + sentences[cut + 1 :])))
    random.Random(seed).shuffle(found)
    return [query for query, _ in found[:count]], [passage for _, passage in found[:count]]


def bm25(queries: Sequence[str], passages: Sequence[str], *, k1: float = 0.9, b: float = 0.4) -> np.ndarray:
    """Scores [Q, N] with the constants that Anserini uses."""
    words = [re.findall(r"\w+", passage.lower()) for passage in passages]
    counts = [Counter(one) for one in words]
    lengths = np.array([len(one) for one in words])
    holders = Counter(word for one in counts for word in one)
    scores = np.zeros((len(queries), len(passages)))
    for number, query in enumerate(queries):
        for word in set(re.findall(r"\w+", query.lower())) & holders.keys():
            idf = math.log(1 + (len(passages) - holders[word] + 0.5) / (holders[word] + 0.5))
            tf = np.array([one[word] for one in counts])
            scores[number] += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


def interval(values: np.ndarray) -> dict[str, float]:
    found = bootstrap(lambda x, weights: (weights * x).sum(-1) / weights.sum(-1), values)
    return {"value": found.value, "low": found.low, "high": found.high}


def first_stage(name: str, queries: Sequence[str], passages: Sequence[str]) -> dict[str, Any]:
    """nDCG@10 of every run."""
    model = nextoken.load(name)
    begin = time.perf_counter()
    texts = represent(model, passages, max_tokens=200)
    asked = represent(model, queries, prompt=QUERY, max_tokens=100)
    seconds = time.perf_counter() - begin
    index, relevance = Index(texts), np.eye(len(passages))
    ones = Representations(texts.dense, sign(texts.sparse)), Representations(asked.dense, sign(asked.sparse))
    chance = np.random.default_rng(0).random(relevance.shape)
    runs = {
        "dense": index.search(asked, alpha=1),
        "sparse": index.search(asked, alpha=0),
        "hybrid": index.search(asked, alpha=0.5),
        "overlap (every weight 1)": Index(ones[0]).search(ones[1], alpha=0),
        "BM25": best(bm25(queries, passages)),
        "random order": best(chance),
    }
    return {
        "model": name,
        "seconds per text": seconds / (2 * len(passages)),
        "ndcg@10": {run: interval(ndcg(found, relevance)) for run, found in runs.items()},
    }


def sign(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones_like(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)


def best(scores: np.ndarray) -> Ranking:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    return Ranking(order, np.take_along_axis(scores, order, axis=1))


def lists(queries: Sequence[str], passages: Sequence[str], size: int, seed: int) -> list[RankedList]:
    """The best of BM25 with the right passage first, then in BM25's order; shown in a random one."""
    made = []
    for number, row in enumerate(bm25(queries, passages)):
        others = [int(i) for i in np.argsort(-row, kind="stable") if i != number][: size - 1]
        shown = tuple(passages[i] for i in (number, *others))
        made.append(RankedList(queries[number], shown, tuple(range(1, size + 1))).shuffled(seed + number))
    return made


def judged(model: Any, held: Sequence[RankedList], rank: Any, tokens: int) -> dict[str, Any]:
    gains, fed, begin = [], 0, time.perf_counter()
    for one in held:
        found = rank(model, one.query, list(one.passages), max_tokens=tokens)
        place = [one.ranks[number] for number in found.order].index(1)
        gains.append(1 / math.log2(place + 2))
        fed += found.tokens
    return {
        "ndcg@10": interval(np.array(gains)),
        "tokens per list": fed / len(held),
        "seconds per list": (time.perf_counter() - begin) / len(held),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--passages", type=int, default=250)
    parser.add_argument("--size", type=int, default=6, help="passages in a list to rerank")
    parser.add_argument("--tokens", type=int, default=24, help="of each passage in a list")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    books = sorted((given.data / "books").glob("*.txt"))
    held, others = books[::4], [book for number, book in enumerate(books) if number % 4]
    queries, passages = corpus(held, given.passages, 0)
    figures: dict[str, Any] = {"passages": len(passages), "first stage": []}
    for name in ("tiny", "nano"):
        stage = first_stage(name, queries, passages)
        figures["first stage"].append(stage)
        print(f"{name}: {stage['seconds per text'] * 1000:.1f} ms per text")
        for run, found in stage["ndcg@10"].items():
            print(f"  {run:26} nDCG@10 {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")

    training = lists(*corpus(others, 1000, 1), given.size, 5)
    testing = lists(queries[:150], passages[:150], given.size, 7)
    tiny = nextoken.load("tiny")
    figures["first"] = {"passages in a list": given.size, "tokens of a passage": given.tokens, "models": {}}
    chance = sum(1 / math.log2(place + 2) for place in range(given.size)) / given.size
    figures["first"]["chance"] = chance
    print(f"reranking {given.size} passages; a random order has {chance:.3f}")
    models = {"as it is": tiny}
    for label, weight in (("joint loss", 10.0), ("writing rankings only", 0.0)):
        begin = time.perf_counter()
        models[label] = fit_first(tiny, training, weight=weight, steps=given.steps, max_tokens=given.tokens, batch=4)
        print(f"  trained by {label} in {time.perf_counter() - begin:.0f} s")
    for label, model in models.items():
        record = {
            "one token": judged(model, testing, rerank, given.tokens),
            "written out": judged(model, testing, rerank_by_generation, given.tokens),
        }
        figures["first"]["models"][label] = record
        for way, found in record.items():
            quality = found["ndcg@10"]
            print(
                f"  {label:22} {way:12} nDCG@10 {quality['value']:.3f} [{quality['low']:.3f}, {quality['high']:.3f}]  "
                f"{found['tokens per list']:.0f} tokens, {found['seconds per list'] * 1000:.0f} ms per list"
            )
    if given.json:
        write(given.json, figures)


if __name__ == "__main__":
    main()

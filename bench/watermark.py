"""Watermarks: false alarms, power against length and edits, what they do to the text, and speed.

    python bench/watermark.py --json bench/results/watermark.json

Texts: tiny continues openings from novels at temperature 1, each text under a key of its own, so that figures are over
keys. Texts made without a mark: excerpts of novels. A text counts as found where p <= 0.01; p is exact for every mark
but those of key sequences, whose phi is compared with that of 999 excerpts of the same length, each under a fresh key,
as the paper's experiments do.

Edits are of exactly the share told, with tokens uniform over the vocabulary. The detector is given as many tokens as
told after the edits: of texts with insertions the first ones, of texts with deletions what is left of a longer text.

The paper of key sequences (arXiv:2307.15593) claims p <= 0.01 from 35 tokens with 40 to 50 % of them edited, for
OPT-1.3B and LLaMA-7B; tiny has 5 M parameters and is less sure of what it says, which makes marks easier to find:
`potential` tells 1 - mean probability of the tokens drawn.

The synonym watermark changes finished texts, here excerpts, and counts words in place of tokens. No thesaurus comes
with nextoken: the four candidates of a word are the words of its ending next in frequency, no synonyms; what is found
of the mark depends on how many candidates there are, not on what they mean.

Beside ours: the watermarks of transformers (their detectors' normal approximation, one key), and, if it can be
imported, the alignment of MarkLLM's EXPEdit, compiled C against numpy. Rates have 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr
from scipy.stats import ks_1samp, uniform
from transformers import SynthIDTextWatermarkingConfig, WatermarkDetector, WatermarkingConfig

import nextoken
from nextoken.decode.loop import Loop
from nextoken.decode.request import Request
from nextoken.decode.transform import Chain
from nextoken.model.hf import HFModel
from nextoken.scores.reliability import wilson
from nextoken.signature.given import signature_of
from nextoken.watermark import attacks
from nextoken.watermark.exponential import ExponentialWatermark
from nextoken.watermark.green_list import GreenList
from nextoken.watermark.gumbel import GumbelWatermark
from nextoken.watermark.inverse_transform import InverseTransformWatermark
from nextoken.watermark.key import Key
from nextoken.watermark.key_sequence import KeySequenceWatermark, Reference
from nextoken.watermark.places import taken_apart
from nextoken.watermark.synonyms import SynonymWatermark
from nextoken.watermark.tournament import SynthID
from nextoken.watermark.watermark import Watermark
from nextoken.watermark.word_rules import CLOSED_CLASS, same_ending
from record import write

LEVEL = 0.01
LENGTHS = (10, 20, 35, 50, 100, 200)
EDITED = (35, 100)
RATES = (0.1, 0.3, 0.4, 0.5)
NULL = 30
"""Tokens of the excerpts on which false alarms are counted."""
OPENING = 12
LONGEST = 200
Tokens = list[int]
Make = Callable[[Key], Watermark]


@dataclass(frozen=True)
class Kind:
    """A way of marking, and the detectors that look for it."""

    mark: Make
    detectors: dict[str, Make] = field(default_factory=dict)


def kinds(size: int) -> dict[str, Kind]:
    def its(key: Key, **gamma: float) -> Watermark:
        return InverseTransformWatermark(key, vocab_size=size, **gamma)

    def plain(key: Key) -> Watermark:
        return its(key, gamma=math.inf)

    return {
        "exponential": Kind(
            ExponentialWatermark,
            {
                "exponential, edits forgiven": ExponentialWatermark,
                "exponential, no edits": lambda key: ExponentialWatermark(key, gamma=math.inf),
            },
        ),
        "inverse transform": Kind(
            its, {"inverse transform, edits forgiven": its, "inverse transform, no edits": plain}
        ),
        "Gumbel, context 4": Kind(GumbelWatermark),
        "Gumbel, context 2": Kind(lambda key: GumbelWatermark(key, context=2)),
        "green list": Kind(GreenList),
        "green list, one for all (Unigram)": Kind(lambda key: GreenList(key, context=0)),
        "SynthID, 30 layers": Kind(SynthID),
    }


def key(number: int) -> Key:
    return Key(f"key of the bench {number:6}")


def excerpts(folder: Path, model: HFModel, count: int, length: int, seed: int) -> list[Tokens]:
    """Stretches of novels of `length` tokens, from places drawn uniformly in the books."""
    rng = np.random.default_rng(seed)
    books = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))]
    found: list[Tokens] = []
    while len(found) < count:
        book = books[rng.integers(len(books))]
        begin = int(rng.integers(len(book) // 20, len(book) - 12 * length))
        tokens = model.vocab.encode(book[begin : begin + 12 * length].partition(" ")[2]).ids[:length]
        if len(tokens) == length:
            found.append(list(tokens))
    return found


def texts_of(model: HFModel, openings: Sequence[Tokens], mark: Make | None) -> list[Tokens]:
    """A text for each opening, all drawn together, each under a key of its own."""
    loop = Loop(model)
    for number, opening in enumerate(openings):
        rule = Chain() if mark is None else mark(key(number)).transform()
        loop.submit(Request((model.vocab.bos_id, *opening), rule, LONGEST, seed=number, ignore_eos=True))
    texts: list[Tokens] = [[] for _ in openings]
    for piece in loop.run():
        texts[piece.ticket].append(piece.token)
    return texts


def edited(text: Tokens, edit: str, rate: float, length: int, size: int, seed: int) -> Tokens:
    """`length` tokens after the edits."""
    if edit == "substitute":
        return attacks.substitute(text[:length], rate, size, seed=seed)
    if edit == "insert":
        return attacks.insert(text[:length], rate, size, seed=seed)[:length]
    return attacks.delete(text[: round(length / (1 - rate))], rate, seed=seed)[:length]


def found(values: Sequence[float]) -> dict[str, Any]:
    """Median p-value, and the share found at the level with its interval."""
    hits = sum(p <= LEVEL for p in values)
    return {
        "found": round(hits / len(values), 4),
        "interval": [round(float(x), 4) for x in wilson(hits, len(values))],
        "median_p": float(f"{np.median(values):.3g}"),
    }


def uniformity(values: Sequence[float], references: int | None) -> dict[str, float]:
    """Kolmogorov-Smirnov towards p-values that are too small, and rates of false alarms.

    Discrete p-values are larger than uniform, so that the test is one-sided. Those against one reference of R texts are
    as far from uniform as those of n R / (n + R).
    """
    n = len(values)
    distance = float(ks_1samp(values, uniform.cdf, alternative="greater").statistic)
    effective = n if references is None else n * references / (n + references)
    return {
        "distance": round(distance, 4),
        # One-sided: exp(-2 n d^2) in the limit.
        "ks_p": round(min(1.0, math.exp(-2 * effective * distance**2)), 4),
        **{f"alarms_at_{level}": round(float(np.mean(np.array(values) <= level)), 4) for level in (0.01, 0.05)},
    }


class Judge:
    """Verdicts of one detector, against references by length where it is one of a key sequence."""

    def __init__(self, make: Make, people: Sequence[Tokens]) -> None:
        self.make, self.people = make, people
        self.references: dict[int, Reference] = {}

    def p_value(self, text: Tokens, number: int) -> float:
        mark = self.make(key(number))
        if not isinstance(mark, KeySequenceWatermark):
            return mark.detect(text).p_value
        if len(text) not in self.references:
            self.references[len(text)] = self.make(key(999_999)).reference(self.people, length=len(text))  # type: ignore[attr-defined]
        return mark.detect(text, reference=self.references[len(text)]).p_value


def studied(judge: Judge, texts: Sequence[Tokens], excerpts_: Sequence[Tokens], size: int) -> dict[str, Any]:
    """Power against length and edits, and false alarms, of one detector on the texts of its mark."""
    by_length = [
        {"tokens": length, **found([judge.p_value(text[:length], i) for i, text in enumerate(texts)])}
        for length in LENGTHS
    ]
    by_edit = [
        {"edit": edit, "rate": rate, "tokens": length}
        | found([judge.p_value(edited(t, edit, rate, length, size, i), i) for i, t in enumerate(texts)])
        for length in EDITED
        for edit in ("substitute", "insert", "delete")
        for rate in RATES
    ]
    others = [judge.p_value(text[:NULL], 10_000 + i) for i, text in enumerate(excerpts_)]
    references = len(judge.people) if judge.references else None
    return {"by_length": by_length, "by_edit": by_edit, "unmarked": uniformity(others, references)}


def told(model: HFModel, openings: Sequence[Tokens], texts: Sequence[Tokens]) -> dict[str, float]:
    """What the model says of texts: nats per token, entropy, and the watermark potential 1 - mean p(y_t)."""
    read = [
        signature_of(model, (model.vocab.bos_id, *opening), tuple(text), name="text")
        for opening, text in zip(openings, texts, strict=True)
    ]
    spent, entropy = [np.concatenate([one.column(name) for one in read]) for name in ("logprob", "entropy")]
    by_text = [-one.column("logprob").mean() for one in read]
    return {
        "nats_per_token": round(float(-spent.mean()), 3),
        "standard_error": round(float(np.std(by_text) / math.sqrt(len(by_text))), 3),
        "entropy": round(float(entropy.mean()), 3),
        "potential": round(float(1 - np.exp(spent).mean()), 3),
    }


def seconds(run: Callable[[], object], least: int = 3) -> float:
    """Median over some runs, of processor time, which what else runs on the machine changes little."""
    spent = []
    for _ in range(least):
        begun = time.process_time()
        run()
        spent.append(time.process_time() - begun)
    return float(np.median(spent))


def embedding_speed(model: HFModel, opening: Tokens, make: Make | None) -> float:
    """Tokens per processor second of 16 texts of 50 tokens drawn together under one key."""
    rule = Chain() if make is None else make(key(0)).transform()

    def run() -> None:
        loop = Loop(model)
        for seed in range(16):
            loop.submit(Request((model.vocab.bos_id, *opening), rule, 50, seed=seed, ignore_eos=True))
        assert len(list(loop.run())) == 800

    return round(800 / seconds(run), 1)


def detection_speed(judge: Judge, text: Tokens) -> dict[str, float]:
    """Milliseconds for a text of 100 tokens."""
    figures = {"ms_per_text": round(1e3 * seconds(lambda: judge.p_value(text[:100], 0)), 2)}
    mark = judge.make(key(0))
    if isinstance(mark, KeySequenceWatermark):
        spent = seconds(lambda: mark.detect(text[:100]), 1)
        figures[f"ms_per_text_{mark.resamples}_fresh_keys"] = round(1e3 * spent, 1)
    return figures


def synonyms(folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """The synonym watermark on excerpts: power against words and words replaced afterwards, and false alarms."""
    paths = sorted(folder.glob("*.txt"))
    spelled = [path.read_text(encoding="utf-8", errors="replace")[20_000:200_000] for path in paths]
    counts = Counter(word for book in spelled for word in taken_apart(book)[0] if word.isalpha() and word.islower())
    ranked = [word for word, _ in counts.most_common(8000) if len(word) > 2 and word not in CLOSED_CLASS]
    rank = {word: at for at, word in enumerate(ranked)}

    def near(place: Any) -> list[str]:
        at = rank.get(place.word)
        if at is None:
            return []
        around = sorted(range(max(0, at - 40), min(len(ranked), at + 41)), key=lambda other: abs(other - at))
        return [ranked[other] for other in around if other != at and same_ending(place, ranked[other])][:4]

    marks = [SynonymWatermark(key(i), near) for i in range(len(texts))]
    marked = [mark.mark(text).text for mark, text in zip(marks, texts, strict=True)]
    rows = []
    for words in (50, 100, 200):
        for rate in (0.0, 0.1, 0.3, 0.5):
            values = []
            for i, text in enumerate(marked):
                told = taken_apart(text)[0][:words]
                put = np.random.default_rng(i)
                changed = put.choice(len(told), round(rate * len(told)), replace=False)
                for place in changed:
                    told[place] = ranked[put.integers(len(ranked))]
                values.append(marks[i].detect(" ".join(told)).p_value)
            rows.append({"words": words, "replaced": rate, **found(values)})
    others = [SynonymWatermark(key(10_000 + i)).detect(text).p_value for i, text in enumerate(texts)]
    changed = [mark.mark(text) for mark, text in zip(marks, texts, strict=True)]
    return {
        "rows": rows,
        "unmarked": uniformity(others, None),
        "words_replaced": round(float(np.mean([len(one.replaced) / one.words for one in changed])), 3),
    }


def transformers_peers(
    model: HFModel, openings: Sequence[Tokens], people: Sequence[Tokens], size: int
) -> dict[str, Any]:
    """The green list and SynthID of transformers on the same openings: power, false alarms and speed."""
    network, ids = model.model, torch.tensor([[model.vocab.bos_id, *opening] for opening in openings])
    green = WatermarkingConfig(greenlist_ratio=0.25, bias=2.0, seeding_scheme="lefthash", context_width=1)
    keys = np.random.default_rng(0).integers(1, 1 << 20, size=30).tolist()
    tournament = SynthIDTextWatermarkingConfig(ngram_len=5, keys=keys)
    detector = WatermarkDetector(network.config, "cpu", green, ignore_repeated_ngrams=True)
    processor = tournament.construct_processor(size, "cpu")

    def green_p(text: Tokens) -> float:
        return float(detector(torch.tensor([text]), return_dict=True).p_value[0])

    def tournament_p(text: Tokens) -> float:
        row = torch.tensor([text])
        mask = processor.compute_context_repetition_mask(row).bool()
        bits = processor.compute_g_values(row)[mask].double()
        return float(ndtr((0.5 - bits.mean().item()) * 2 * math.sqrt(bits.numel()))) if bits.numel() else 1.0

    results = {}
    for name, config, p_value in (("green list", green, green_p), ("SynthID", tournament, tournament_p)):
        torch.manual_seed(0)
        begun = time.process_time()
        with torch.no_grad():
            made = network.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=100,
                min_new_tokens=100, watermarking_config=config, pad_token_id=0,
            )  # fmt: skip
        spent = time.process_time() - begun
        texts = made[:, ids.shape[1] :].tolist()
        results[name] = {
            "tokens_per_second": round(sum(map(len, texts)) / spent, 1),
            "by_length": [{"tokens": t, **found([p_value(text[:t]) for text in texts])} for t in LENGTHS if t <= 100],
            "by_edit": [
                {"edit": "substitute", "rate": rate, "tokens": 100}
                | found([p_value(edited(text, "substitute", rate, 100, size, i)) for i, text in enumerate(texts)])
                for rate in RATES
            ],
            "unmarked": uniformity([p_value(text[:NULL]) for text in people], None),
            "ms_per_text": round(1e3 * seconds(lambda p=p_value, t=texts[0]: p(t)), 2),  # type: ignore[misc]
        }
    return results


def markllm_peer(text: Tokens, size: int) -> dict[str, Any] | None:
    """One alignment of 100 tokens with a key of 256 by MarkLLM's compiled loop and by ours, on the same numbers."""
    try:
        theirs = importlib.import_module("markllm.watermark.exp_edit.cython_files.levenshtein").levenshtein
    except ImportError:
        return None
    from nextoken.watermark.alignment import lowest

    tokens = np.array(text[:100])
    numbers = np.random.default_rng(0).uniform(1e-6, 1 - 1e-6, (256, size)).astype(np.float32)
    costs = np.log1p(-numbers[:, tokens].T.astype(np.float64))

    def compiled() -> float:
        return min(theirs(tokens, numbers[(j + np.arange(100)) % 256], 0.0) for j in range(256))

    def ours() -> float:
        return float(lowest(costs, 100, 0.0))

    return {
        "difference": round(abs(compiled() - ours()), 6),
        "markllm_ms": round(1e3 * seconds(compiled), 2),
        "nextoken_ms": round(1e3 * seconds(ours), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", type=Path)
    parser.add_argument("--texts", default=40, type=int, help="marked texts of each kind")
    parser.add_argument("--people", default=999, type=int, help="excerpts in a reference, and as many judged")
    parser.add_argument("--json", default="bench/results/watermark.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = nextoken.load("tiny")
    assert isinstance(model, HFModel)
    size, books = model.vocab.size, arguments.data / "books"
    openings = excerpts(books, model, arguments.texts, OPENING, seed=1)
    people = excerpts(books, model, 2 * arguments.people, LONGEST, seed=2)
    reference, judged = people[: arguments.people], people[arguments.people :]
    plain = texts_of(model, openings, None)
    figures: dict[str, Any] = {
        "unmarked": told(model, openings, plain) | {"tokens_per_second": embedding_speed(model, openings[0], None)},
        "marks": {},
    }
    print(f"unmarked  {figures['unmarked']}", flush=True)
    for name, kind in kinds(size).items():
        texts = texts_of(model, openings, kind.mark)
        about = told(model, openings, texts) | {"tokens_per_second": embedding_speed(model, openings[0], kind.mark)}
        for detector, make in (kind.detectors or {name: kind.mark}).items():
            judge = Judge(make, reference)
            row = about | detection_speed(judge, texts[0]) | studied(judge, texts, judged, size)
            figures["marks"][detector] = row
            shares = " ".join(f"{one['tokens']}:{one['found']:.2f}" for one in row["by_length"])
            print(f"\n{detector}: {about['nats_per_token']} nats, {about['tokens_per_second']} tokens/s, "
                  f"{row['ms_per_text']} ms per text\n  found at {shares}; unmarked {row['unmarked']}")  # fmt: skip
            for length in EDITED:
                for edit in ("substitute", "insert", "delete"):
                    some = [one for one in row["by_edit"] if (one["edit"], one["tokens"]) == (edit, length)]
                    print(f"  {length:4} {edit:11}" + " ".join(f"{o['rate']}: {o['found']:.2f} (p {o['median_p']:.2g})"
                          for o in some), flush=True)  # fmt: skip
    figures["synonyms"] = synonyms(books, [model.vocab.decode_text(text) for text in judged[: 4 * arguments.texts]])
    print("\nsynonyms", *figures["synonyms"]["rows"], figures["synonyms"]["unmarked"], sep="\n  ", flush=True)
    figures["transformers"] = transformers_peers(model, openings, judged, size)
    print("\ntransformers", *figures["transformers"].items(), sep="\n  ")
    figures["markllm_alignment"] = markllm_peer(plain[0], size)
    print("\nMarkLLM", figures["markllm_alignment"])
    write(arguments.json, {"texts": arguments.texts, "people": arguments.people, **figures})


if __name__ == "__main__":
    main()

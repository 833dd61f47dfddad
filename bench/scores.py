"""One pass, many answers: scores of uncertainty beside lm-polygraph, which computes the same from its own generations.

    python bench/scores.py --data ../shared/data

Prompts are questions of GSM8K, answers those of a model: a bundled one, and the smallest GPT-2 with random weights,
whose vocabulary of 50,257 is of the usual size. Both sides use the same network, on one thread; times are processor
time, the least of `--times` rounds (one for GPT-2):

    from prompts     greedy answers and samples are generated, then scored. lm-polygraph knows no other way to a score.
    given answers    nextoken reads answers that are there already and scores them.
    estimators       the estimators that both have, from what each keeps: a signature; whole distributions in arrays.

Timed are the estimators that need nothing but the model and words. A forward pass is one call of the decoder, whatever
its batch. Agreement is the largest difference of a score where lm-polygraph's estimators are fed the raw distributions
of the tokens it drew, and our similarities and relations; `known` says by which transform formulas differ. How far its
own run is from the raw model is told beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2TokenizerFast

import nextoken
import record
from nextoken.model import bundled_path
from nextoken.model.hf import HFModel
from nextoken.scores import Samples, table
from nextoken.scores.meaning import same_words
from nextoken.scores.sar import relevance
from nextoken.scores.similarity import character_ngrams, jaccard, rouge_l
from nextoken.signature import Signature
from nextoken.signature.given import signature_of
from read import random_gpt2

Stats = dict[str, Any]
SCORES: dict[str, tuple[str, dict[str, Any]]] = {
    "MaximumSequenceProbability": ("sequence_surprisal", {}),
    "Perplexity": ("mean_logprob", {}),
    "MeanTokenEntropy": ("mean_entropy", {}),
    "SelfCertainty": ("self_certainty", {}),
    "RenyiNeg": ("renyi_divergence", {"temperature": 2.0}),
    "FisherRao": ("fisher_rao", {"temperature": 2.0}),
    "MonteCarloSequenceEntropy": ("sequence_entropy", {}),
    "MonteCarloNormalizedSequenceEntropy": ("sequence_entropy_per_token", {}),
    "LexicalSimilarity": ("lexical_similarity", {"similarity": rouge_l}),
    "DegMat": ("degree_matrix", {"similarity": jaccard}),
    "EigValLaplacian": ("laplacian_eigenvalues", {"similarity": jaccard}),
    "Eccentricity": ("eccentricity", {"similarity": jaccard}),
}
"""Estimators that both compute without another model, and their names and options here."""
FED: dict[str, tuple[str, dict[str, Any]]] = {
    "TokenSAR": ("token_sar", {}),
    "SentenceSAR": ("sentence_sar", {}),
    "SAR": ("sar", {}),
    "SemanticEntropy": ("semantic_entropy", {"distinct": False}),
    "LabelProb": ("label_prob", {}),
    "NumSemSets": ("semantic_sets", {}),
    "KernelLanguageEntropy": ("kernel_language_entropy", {}),
    "CocoaMSP": ("cocoa", {}),
}
"""Estimators that are fed the similarities and relations of nextoken, for agreement alone."""
GRAPHS = ("DegMat", "EigValLaplacian", "Eccentricity")
KNOWN = {
    "Perplexity": ("-x", "it is the mean surprisal"),
    "SelfCertainty": ("-x", "its negative is reported"),
    "RenyiNeg": ("x - 2 log V", "the sign of log V; certain is reported as uncertain"),
    "LexicalSimilarity": (
        "-x",
        "its negative is reported; its words are stemmed",
    ),
    "LabelProb": ("1 - x", "1 less it is reported"),
}


def estimators(*, fed: bool) -> dict[str, Callable[[Stats], Any]]:
    """Those of lm-polygraph; graphs are made of their own Jaccard similarity, or fed."""
    from lm_polygraph import estimators as e

    words = {"similarity_score": "Jaccard_score"}
    return {name: getattr(e, name)(**(words if name in GRAPHS and not fed else {})) for name in (*SCORES, *FED)}


def transformed(name: str, values: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ours as lm-polygraph would report it."""
    form = KNOWN.get(name, ("x", ""))[0]
    return {"x": values, "-x": -values, "1 - x": 1 - values, "x - 2 log V": values - 2 * np.log(vocab_size)}[form]


class Counter:
    """Forward passes of a decoder."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.calls = 0
        decoder.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


class Peer:
    """lm-polygraph with its own generations, calculators called as its UEManager calls them."""

    def __init__(self, model: HFModel, tokenizer: Any, samples: int, max_tokens: int) -> None:
        from lm_polygraph.stat_calculators import EntropyCalculator, GreedyProbsCalculator, SamplingGenerationCalculator
        from lm_polygraph.utils.generation_parameters import GenerationParameters
        from lm_polygraph.utils.model import WhiteboxModel

        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.padding_side = "left"
        self.tokenizer = tokenizer
        self.model = WhiteboxModel(model.model, tokenizer, model.name, "CausalLM", GenerationParameters(top_k=0))
        self.calculators = [
            GreedyProbsCalculator(output_attentions=False),
            EntropyCalculator(),
            SamplingGenerationCalculator(samples_n=samples),
        ]
        self.max_tokens = max_tokens

    def stats(self, prompts: list[str]) -> Stats:
        torch.manual_seed(0)
        found: Stats = {"input_texts": prompts}
        for calculator in self.calculators:
            found |= calculator(found, prompts, self.model, self.max_tokens)
        return found


def ours(name: str, signature: Signature, samples: Samples) -> np.ndarray:
    score, options = (SCORES | FED)[name]
    return nextoken.score(signature, score, samples=samples, **options)


def generated(model: HFModel, prompts: list[str], n: int, max_tokens: int) -> list[str]:
    made = nextoken.generate(model, prompts, n=n, max_tokens=max_tokens, seed=0, transform="greedy" if n == 1 else None)
    assert isinstance(made, list)
    return [answer.text for answer in made]


def readings(model: HFModel, prompts: list[str], own: list[str], answers: list[str]) -> tuple[Signature, Samples]:
    """Both in one reading."""
    n = len(answers) // len(prompts)
    before = prompts + [prompt for prompt in prompts for _ in range(n)]
    every = nextoken.read(model, own + answers, prompts=before, top=0, progress=False)
    return every[: len(own)], Samples(every[len(own) :], [n] * len(prompts))


def agreement(model: HFModel, peer: Peer, stats: Stats) -> tuple[dict[str, Any], Signature, Samples, Stats]:
    """Scores of the tokens that lm-polygraph drew, by both, from the raw distributions of the model."""
    begins = [tuple(peer.tokenizer(prompt).input_ids) for prompt in stats["input_texts"]]
    greedy, drawn = stats["greedy_tokens"], stats["sample_tokens"]
    flat = [(begin, tokens) for begin, group in zip(begins, drawn, strict=True) for tokens in group]
    signature = Signature.concat(signature_of(model, b, t, top=0) for b, t in zip(begins, greedy, strict=True))
    samples = Samples(Signature.concat(signature_of(model, b, t, top=0) for b, t in flat), [len(g) for g in drawn])
    whole = []
    for begin, tokens in zip(begins, greedy, strict=True):
        raw = model.predict([[*begin, *tokens[:-1]]])[:, len(begin) - 1 :].log_probs()
        whole.append(raw[0].numpy())
    matrices = np.stack(samples.compared(character_ngrams))
    related = np.stack(samples.compared(same_words))
    classes = related.astype(int)
    own = samples.rows
    each = np.split(own["logprob"], own.offsets[1:-1])
    alike = np.split(1 - relevance(samples.signature), own.offsets[1:-1])
    fed: Stats = {
        "greedy_log_probs": whole,
        "greedy_log_likelihoods": np.split(signature.column("logprob"), signature.row_offsets[1:-1]),
        "sample_log_probs": samples.grouped(samples.logprobs.tolist()),
        "sample_log_likelihoods": samples.grouped(each),
        "sample_tokens": drawn,
        "sample_texts": samples.texts,
        "sample_sentence_similarity": matrices,
        "sample_token_similarity": samples.grouped(alike),
        "token_similarity": np.split(1 - relevance(signature), signature.row_offsets[1:-1]),
        "greedy_sentence_similarity": [
            character_ngrams([signature.text(i)], texts)[0] for i, texts in enumerate(samples.texts)
        ],
        "semantic_matrix_entail": matrices,
        "semantic_matrix_contra": 1 - matrices,
        "semantic_matrix_classes": classes,
        "entailment_id": 1,
    }
    from lm_polygraph.stat_calculators import EntropyCalculator, SemanticClassesCalculator

    fed |= EntropyCalculator()(fed) | SemanticClassesCalculator()(fed, [], peer.model)
    # For the number of sets entailment stands against contradiction: the relation itself.
    counted = fed | {"semantic_matrix_entail": classes.astype(float), "semantic_matrix_contra": 1.0 - classes}
    graphs = fed | {"semantic_matrix_entail": np.stack(samples.compared(jaccard))}
    found: dict[str, Any] = {}
    for name, estimator in estimators(fed=True).items():
        told = counted if name == "NumSemSets" else graphs if name in GRAPHS else fed
        theirs = np.array(estimator(told), dtype=np.float64)
        mine = transformed(name, ours(name, signature, samples), model.vocab.size)
        both = np.isfinite(theirs) & np.isfinite(mine)
        apart = float(np.abs(theirs - mine)[both].max(initial=0.0))
        found[name] = {
            "score": (SCORES | FED)[name][0],
            "largest_difference": float(f"{apart:.2g}"),
            "scale": round(float(np.abs(theirs[both]).mean()), 4),
            "unknown_there": int((~np.isfinite(theirs)).sum()),
            "unknown_here": int((~np.isfinite(mine)).sum()),
        }
        if name in KNOWN:
            found[name]["known"] = KNOWN[name][1]
    return found, signature, samples, fed


def compared(model: HFModel, tokenizer: Any, prompts: list[str], n: int, max_tokens: int, times: int) -> dict[str, Any]:
    """All figures of one model."""
    counter = Counter(model.model.base_model)
    peer = Peer(model, tokenizer, n, max_tokens)
    theirs = {name: estimator for name, estimator in estimators(fed=False).items() if name in SCORES}
    own, answers = (generated(model, prompts, count, max_tokens) for count in (1, n))

    def given_answers() -> None:
        signature, samples = readings(model, prompts, own, answers)
        for name in SCORES:
            ours(name, signature, samples)

    def from_prompts() -> None:
        made = [generated(model, prompts, count, max_tokens) for count in (1, n)]
        signature, samples = readings(model, prompts, *made)
        for name in SCORES:
            ours(name, signature, samples)

    def whole_table() -> dict[str, np.ndarray]:
        signature, samples = readings(model, prompts, own, answers)
        return table(signature, samples=samples)

    kept: list[Stats] = []

    def peer_from_prompts() -> None:
        kept[:] = [peer.stats(prompts)]
        for estimator in theirs.values():
            estimator(kept[0])

    figures: dict[str, Any] = {
        "vocab_size": model.vocab.size,
        "prompts": len(prompts),
        "samples_per_prompt": n,
        "most_tokens": max_tokens,
        "scores_in_table": len(whole_table()),
        "runs": {},
    }
    runs: dict[str, Callable[[], object]] = {
        "lm-polygraph, from prompts": peer_from_prompts,
        "nextoken, from prompts": from_prompts,
        "nextoken, given answers": given_answers,
        "nextoken, given answers, every score": whole_table,
    }
    for name, run in runs.items():
        before = counter.calls
        seconds = [timed(run)]
        passes = counter.calls - before
        seconds += [timed(run) for _ in range(times - 1)]
        figures["runs"][name] = {"forward_passes": passes, "seconds": round(min(seconds), 3)}
    stats = kept[-1]
    figures["agreement"], signature, samples, fed = agreement(model, peer, stats)

    def from_signature() -> None:
        fresh = Samples(samples.signature, samples.counts.tolist())
        for name in SCORES:
            ours(name, signature, fresh)

    def from_arrays() -> None:
        from lm_polygraph.stat_calculators import EntropyCalculator

        arrays = fed | EntropyCalculator()(fed)
        for estimator in theirs.values():
            estimator(arrays)

    for name, run in (("lm-polygraph, estimators", from_arrays), ("nextoken, estimators", from_signature)):
        least = min(timed(run) for _ in range(times))
        figures["runs"][name] = {"forward_passes": 0, "seconds": round(least, 4)}
    seconds = {name: entry["seconds"] for name, entry in figures["runs"].items()}
    figures["faster_by"] = {
        "from prompts": round(seconds["lm-polygraph, from prompts"] / seconds["nextoken, from prompts"], 2),
        "given answers": round(seconds["lm-polygraph, from prompts"] / seconds["nextoken, given answers"], 1),
        "estimators": round(seconds["lm-polygraph, estimators"] / seconds["nextoken, estimators"], 1),
    }
    figures["kept_mib"] = {
        "nextoken, signatures": round((signature.table.nbytes + samples.signature.table.nbytes) / 2**20, 2),
        "lm-polygraph, greedy distributions": round(sum(a.nbytes for a in stats["greedy_log_probs"]) / 2**20, 2),
    }
    raw, told = (np.concatenate([*map(np.asarray, some["greedy_log_likelihoods"])]) for some in (fed, stats))
    apart = np.abs(raw - told)
    figures["own_run_against_raw_model"] = {
        "largest_difference_of_a_logprob": float(f"{apart.max():.2g}"),
        "tokens_off_by_more_than_1e-4": int((apart > 1e-4).sum()),
        "tokens": len(raw),
    }
    return figures


def timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def shown(name: str, figures: dict[str, Any]) -> None:
    print(f"{name}: {figures['prompts']} prompts, {figures['samples_per_prompt']} samples, V = {figures['vocab_size']}")
    for run, entry in figures["runs"].items():
        print(f"  {run:38} {entry['forward_passes']:5} passes {entry['seconds']:9.3f} s")
    print(f"  faster by {figures['faster_by']}, kept {figures['kept_mib']}")
    for peer, entry in figures["agreement"].items():
        print(
            f"  {peer:36} {entry['score']:27} differs by {entry['largest_difference']:8.2g}  {entry.get('known', '')}"
        )
    print(f"  its own run against the raw model: {figures['own_run_against_raw_model']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with gsm8k/, gpt2-tokenizer/")
    parser.add_argument("--model", default="nano", help="a bundled model")
    parser.add_argument("--prompts", type=int, default=16, help="and an eighth of them for GPT-2")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument(
        "--tokens", type=int, default=100, help="most tokens of an answer, 100 as in lm-polygraph; at most 16 for GPT-2"
    )
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("bench/results/scores.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = (arguments.data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["question"] for line in lines[: arguments.prompts]]
    limits = arguments.samples, arguments.tokens
    figures: dict[str, Any] = {"lm_polygraph": version("lm-polygraph"), "estimators_of_both": len(SCORES), "threads": 1}
    bundled = nextoken.load(arguments.model)
    assert isinstance(bundled, HFModel)
    tokenizer = AutoTokenizer.from_pretrained(bundled_path(arguments.model))
    figures[arguments.model] = compared(bundled, tokenizer, prompts, *limits, arguments.times)
    shown(arguments.model, figures[arguments.model])
    folder = arguments.data / "gpt2-tokenizer"
    tokenizer = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    brief = arguments.samples, min(16, arguments.tokens)
    few = prompts[: max(1, len(prompts) // 8)]
    figures["random-gpt2"] = compared(random_gpt2(arguments.data), tokenizer, few, *brief, 1)
    shown("random-gpt2", figures["random-gpt2"])
    record.write(arguments.json, figures)


if __name__ == "__main__":
    main()

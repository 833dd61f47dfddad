"""Make the bundled models `tiny` and `nano` and the tokenizer they share.

    python tools/make_bundled.py tokenizer --data ../shared/data
    python tools/make_bundled.py train nano --data ../shared/data
    python tools/make_bundled.py train tiny --data ../shared/data
    python tools/make_bundled.py export tiny nano

`train` writes a checkpoint every few minutes and resumes from it; seeds are fixed. Two books are held out: every
figure on a model card is measured on them and on the test part of WikiText-2, which no model has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = ("frankenstein.txt", "the-time-machine.txt")
BOS, EOS = "<|bos|>", "<|eos|>"
# Words with their leading space, single digits (arithmetic), runs of punctuation, line breaks kept apart from spaces.
SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+| +(?=\S)|\s+"
DEST = Path(__file__).resolve().parent.parent / "src" / "nextoken" / "model" / "bundled"


@dataclass(frozen=True)
class Recipe:
    """Shape of a bundled model and how it is trained."""

    hidden: int
    layers: int
    heads: int
    ff: int
    tokens: int = 8_000_000
    batch_tokens: int = 8192
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.02
    long_from: float = 0.75  # share of training after which sequences are 1,024 tokens long instead of 512
    seed: int = 0

    def config(self, vocab_size: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.ff,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            rms_norm_eps=1e-5,
        )


RECIPES = {
    "tiny": Recipe(hidden=256, layers=5, heads=4, ff=688),
    "nano": Recipe(hidden=64, layers=5, heads=4, ff=176),
}


# --- text -------------------------------------------------------------------------------------------------------------


def paragraphs(path: Path) -> list[str]:
    return [p for p in re.split(r"\n\s*\n", path.read_text(encoding="utf-8").replace("\r\n", "\n")) if p.strip()]


def books(data: Path) -> list[Path]:
    return [p for p in sorted((data / "books").glob("*.txt")) if p.name not in HELD_OUT]


def problems(data: Path) -> list[str]:
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


def articles(data: Path) -> list[str]:
    text = (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    return [a.strip() + "\n" for a in re.split(r"(?m)^(?= = [^=].* = \s*$)", text) if a.strip()]


def epoch(data: Path, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """The documents of one epoch in random order, each with whether it is complete (gets an end token).

    Books are cut at paragraph breaks into spans of random length, so that a text may begin anywhere; half of the spans
    have their lines joined, since modern text is not wrapped at 72 columns.
    """
    documents = [(text, True) for text in (*problems(data), *articles(data))]
    for path in books(data):
        span: list[str] = []
        limit = rng.choice((400, 1500, 4000, 8000))
        for paragraph in paragraphs(path):
            span.append(paragraph)
            if sum(map(len, span)) >= limit:
                documents.append((_joined(span, rng), False))
                span, limit = [], rng.choice((400, 1500, 4000, 8000))
        if span:
            documents.append((_joined(span, rng), False))
    rng.shuffle(documents)
    yield from documents


def _joined(span: list[str], rng: random.Random) -> str:
    if rng.random() < 0.5:
        span = [re.sub(r"(?<=\S) *\n(?=\S)", " ", p) for p in span]
    return "\n\n".join(span)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def make_tokenizer(data: Path, work: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for text, _ in epoch(data, random.Random(0))), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(work / "tokenizer.json"))
    print(f"{tokenizer.get_vocab_size()} tokens -> {work / 'tokenizer.json'}")


# --- training ---------------------------------------------------------------------------------------------------------


def stream(data: Path, tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    """Token ids, document after document, epoch after epoch."""
    for number in range(1_000):
        for text, complete in epoch(data, random.Random(seed * 1_000 + number)):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            yield [0, *ids, *([1] if complete else [])]


def batches(data: Path, tokenizer: Tokenizer, recipe: Recipe, steps: int) -> Iterator[torch.Tensor]:
    """`steps` batches [batch_tokens / T, T + 1]; sequences overlap by the one token that is input and target."""
    source, buffer = stream(data, tokenizer, recipe.seed), []
    for step in range(steps):
        length = 1024 if step >= recipe.long_from * steps else 512
        rows = recipe.batch_tokens // length
        while len(buffer) < rows * length + 1:
            buffer.extend(next(source))
        flat = torch.tensor(buffer[: rows * length + 1])
        buffer = buffer[rows * length :]
        yield flat.unfold(0, length + 1, length)


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; the begin token is never a target, for no text continues with one."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(rows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    targets = rows[:, 1:].masked_fill(rows[:, 1:] == 0, -100)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train(name: str, data: Path, work: Path, *, threads: int) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    model = LlamaForCausalLM(recipe.config(tokenizer.get_vocab_size()))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps, first = recipe.tokens // recipe.batch_tokens, 0
    checkpoint = work / f"{name}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]
        print(f"resumed at step {first} of {steps}", flush=True)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if first:
        base = [[recipe.muon_lr], [recipe.adam_lr]]
    step_loss = torch.compile(loss_of, dynamic=False)
    started, last_save, seen = time.time(), time.time(), 0
    for step, rows in enumerate(batches(data, tokenizer, recipe, steps)):
        if step < first:
            continue
        share = step / steps
        factor = min(1.0, (share + 1 / steps) / recipe.warmup) * min(1.0, (1 - share) / 0.6)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = step_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += recipe.batch_tokens
        if step % 20 == 0:
            print(
                f"{name} {step}/{steps} loss {loss.item():.3f} {seen / (time.time() - started):.0f} tokens/s",
                flush=True,
            )
        if time.time() - last_save > 120 or step == steps - 1:
            states = [optimizer.state_dict() for optimizer in optimizers]
            temporary = checkpoint.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step + 1}, temporary)
            os.replace(temporary, checkpoint)
            last_save = time.time()


# --- figures and export -----------------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str) -> float:
    """Bits per UTF-8 byte in disjoint windows of 1,023 tokens, each after the begin token."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    nats = 0.0
    for start in range(0, len(ids), 1023):
        row = torch.tensor([[0, *ids[start : start + 1023]]])
        logits = model(row, use_cache=False).logits[0, :-1].float()
        nats += F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# nextoken {name}

A {millions:.1f} M parameter Llama-architecture model that ships with nextoken, so that its commands, examples and tests
run without a download. It is made for trying things out and for proofs, not for its answers.

## Data

{books} English books from Project Gutenberg (public domain), the training part of GSM8K (MIT; worked sums with their
calculator notes) and the validation part of WikiText-2 (CC BY-SA; modern, tokenised prose). Held out and never trained
on: *Frankenstein*, *The Time Machine*, the test parts of GSM8K and WikiText-2. Half of the book passages have their
lines joined, as modern text is not wrapped.

Texts begin with `<|bos|>`; sums and articles end with `<|eos|>`. A sum is laid out as `Question: ...`, line break,
`Answer: ...`, and ends in `#### ` and the result.

## Tokenizer

Byte-level BPE of 4,096 tokens, shared by `tiny` and `nano`; every byte string has a spelling and digits stand alone.

## Recipe

{layers} layers, width {hidden}, {heads} heads, feed-forward {ff}, context 1,024, tied embeddings. {tokens:.0f} M
tokens in batches of {batch}, sequences of 512 and for the last quarter of 1,024; Muon for the matrices (rate {muon}),
AdamW for the rest (rate {adam}), linear decay over the last 60 %, bfloat16 autocast, two CPU cores, seed {seed}.
Weights are stored in float16. Made by `tools/make_bundled.py`.

## Figures

Bits per UTF-8 byte in disjoint windows of 1,023 tokens, each after `<|bos|>`:

| text never seen | bits per byte |
| --- | --- |
{rows}

## Limits

It writes nineteenth-century English by habit, knows next to nothing, cannot be relied on for arithmetic, follows no
instructions, and carries whatever its books hold of the attitudes of their time. Texts in other languages or code are
far from its training data.
"""


def export(names: list[str], data: Path, work: Path) -> None:
    """Write the models in Hugging Face layout with a model card each, and measure them on the held-out texts."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    held_out = {f"books/{name}": (data / "books" / name).read_text(encoding="utf-8") for name in HELD_OUT}
    held_out["wikitext2/test.txt"] = (data / "wikitext2" / "test.txt").read_text(encoding="utf-8")
    for name in names:
        recipe = RECIPES[name]
        model = LlamaForCausalLM(recipe.config(tokenizer.get_vocab_size()))
        saved = torch.load(work / f"{name}.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        folder = DEST / name
        model.half().save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=1024
        ).save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = (
            "PreTrainedTokenizerFast"  # known to every version, unlike the newer backend's name
        )
        settings.pop("backend", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (folder / "model.safetensors").chmod(0o644)
        model.float().eval()
        figures = {title: round(bits_per_byte(model, tokenizer, text), 3) for title, text in held_out.items()}
        card = CARD.format(
            name=name,
            millions=sum(p.numel() for p in model.parameters()) / 1e6,
            books=len(books(data)),
            layers=recipe.layers,
            hidden=recipe.hidden,
            heads=recipe.heads,
            ff=recipe.ff,
            tokens=saved["step"] * recipe.batch_tokens / 1e6,
            batch=recipe.batch_tokens,
            muon=recipe.muon_lr,
            adam=recipe.adam_lr,
            seed=recipe.seed,
            rows="\n".join(f"| {title} | {value:.3f} |" for title, value in figures.items()),
        )
        (folder / "README.md").write_text(card)
        print(name, json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("tokenizer", "train", "export"))
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], default=[])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/bundled"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.task == "tokenizer":
        make_tokenizer(arguments.data, arguments.work)
    elif arguments.task == "export":
        export(arguments.names, arguments.data, arguments.work)
    else:
        for name in arguments.names:
            train(name, arguments.data, arguments.work, threads=arguments.threads)


if __name__ == "__main__":
    main()

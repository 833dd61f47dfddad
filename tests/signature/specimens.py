"""Signatures to look at: of hostile symbols, of two models, of a partial model, and a long one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

import nextoken
from nextoken.model.base import LanguageModel, NoMemory, State
from nextoken.model.partial import PartialNext
from nextoken.model.table import TableModel
from nextoken.signature import Signature

HOSTILE = "</script><img src=x onerror=boom()>"
ESCAPE = "\x1b[31m"
SYMBOLS = [
    "a",
    " b",
    "\n",
    " ",
    "\t",
    "é",
    HOSTILE,
    ESCAPE,
    "\u202e",
    "<!--",
    "&amp;",
    "it's",
    "{{ 7 * 7 }}",
    "\\u003c",
]
HOSTILE_TEXT = f"a b\n b  \ta{HOSTILE}é{ESCAPE}\u202ea<!-- b&amp;it's{{{{ 7 * 7 }}}}\\u003c b\n"


class Told(LanguageModel):
    """A table model that tells no more than its two most probable tokens."""

    is_partial = True
    dtype = "float64"
    digest = ""

    def __init__(self, model: TableModel) -> None:
        self.model = model
        self.vocab = model.vocab
        self.name = "told"

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: torch.Tensor, parents: torch.Tensor | None) -> PartialNext:
        inner = self.model.start(batch=tokens.shape[0])
        top = self.model.extend(inner, tokens, parents).log_probs().topk(2)
        return PartialNext(top.indices, top.values, vocab_size=self.vocab.size)


def hostile() -> Signature:
    """Two texts whose tokens and names would break a page or a terminal that obeyed them."""
    model = TableModel.random(SYMBOLS, order=1, seed=3, name="<b>bold</b>")
    return nextoken.read(
        model,
        [HOSTILE_TEXT, "a b a b\n"],
        names=[f"{HOSTILE}{ESCAPE}", "plain"],
        top=5,
        against=_second(),
        progress=False,
    )


def _second() -> TableModel:
    return TableModel.random(SYMBOLS, order=1, seed=4, name="second")


def characters() -> Signature:
    """Characters spread over tokens of single bytes, and a byte that belongs to none."""
    data = "né 好\n".encode()
    symbols = sorted({bytes([byte]) for byte in data})
    return nextoken.read(TableModel.random(symbols, order=0, seed=5), "né 好 好\n", top=3, progress=False)


def partial() -> Signature:
    text = "abcdef" * 3 + "aabbccddeeffcadbe"
    return nextoken.read(Told(TableModel.random(6, order=1, seed=6)), [text, "fa"], top=2, progress=False)


def prose(size: int = 700) -> Signature:
    """Words and spaces of a random table, read with all its tokens as alternatives."""
    words = ["the", "of", "river", "stone", "window", "never", ".", "\n", " "]
    generator = torch.Generator().manual_seed(7)
    text = "".join(words[int(i)] for i in torch.randint(0, len(words), (size,), generator=generator))
    return nextoken.read(TableModel.random(words, order=1, seed=8), text, top=4, progress=False)


def long(size: int = 20_000) -> Signature:
    """A text of `size` tokens, by repeating a shorter reading."""
    short = prose(500)
    times = -(-size // len(short))
    table = pa.concat_tables([short.table] * times).slice(0, size)
    widths = short.column("byte_end") - short.column("byte_start")
    ends = np.cumsum(np.tile(widths, times)[:size])
    table = table.set_column(1, "position", pa.array(np.arange(size), pa.int32()))
    table = table.set_column(4, "byte_start", pa.array(ends - np.tile(widths, times)[:size]))
    table = table.set_column(5, "byte_end", pa.array(ends))
    info = replace(short.texts[0], name="long", n_rows=size, size=int(ends[-1]))
    return Signature(table, short.metadata, [info], short.vocab_labels)

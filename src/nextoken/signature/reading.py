"""read(): texts in, a Signature out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

import nextoken
from nextoken.errors import ModelError
from nextoken.model.base import LanguageModel
from nextoken.model.loading import load
from nextoken.model.vocab import Vocab
from nextoken.signature.blocks import Block, Reading
from nextoken.signature.labels import Labels
from nextoken.signature.metadata import Metadata
from nextoken.signature.passage import passage
from nextoken.signature.progress import progress as progress_bar
from nextoken.signature.shard_writer import ShardWriter
from nextoken.signature.shards import ShardedSignature
from nextoken.signature.signature import Signature
from nextoken.signature.texts import TextInfo, Texts, incoming


def read(
    model: LanguageModel | str | Path,
    texts: Texts,
    *,
    top: int = 10,
    against: LanguageModel | str | Path | None = None,
    names: Iterable[str] | None = None,
    prompts: str | Iterable[str] | None = None,
    hidden: bool = False,
    overlap: int | None = None,
    batch_tokens: int = 8192,
    bos: bool = True,
    bos_text: str | None = None,
    strict: bool = False,
    progress: bool | None = None,
    shards: str | Path | None = None,
    shard_rows: int = 1 << 18,
) -> Signature:
    """What a model says about texts: for every token x_t, statistics of p(. | x_<t) over the whole vocabulary, in nats.

    Raw model distributions, each token scored once. Texts longer than the context are read in the windows of
    `nextoken.signature.windows`; batches are made of windows of like length; neither order nor company of the texts
    changes a number beyond rounding. Memory is bounded by `batch_tokens` and the rows of the result, whatever the
    length of a text; with `shards` the rows go to disk as they come.

    Args:
        model: a model, or what `nextoken.load` takes: `tiny`, `nano`, a hub id, a folder, an address.
        texts: one text or any iterable of them, generators included; bytes are decoded as UTF-8.
        top: k of the columns `top_ids` and `top_logprobs`.
        against: a second model q over the same vocabulary, for the columns cross_entropy, kl, reverse_kl, js and
            against_logprob.
        names: one per text; default `text-0`, `text-1`, ...
        prompts: one per text, read before it and not scored: p(answer | prompt), tokenised as two texts. Of a prompt
            beyond the context its end is seen, as windows have it.
        hidden: keep the final hidden states as a column.
        overlap: tokens by which windows overlap; default half of the context.
        batch_tokens: most tokens, padding included, that are fed at once (a CPU is given fewer where that is faster).
            Windows longer than this are fed in pieces.
        bos: put the model's begin token, if it has one, before each text. Without any token before it, a text's first
            token is not predicted and has no row; the text's `prefix` keeps its bytes.
        bos_text: text that stands before each text (after the begin token) and is not scored. The label of a special
            token, such as `<|endoftext|>`, stands for that token, in place of the begin token.
        strict: refuse texts that are not UTF-8, instead of reading invalid bytes as U+FFFD and counting them.
        progress: show a progress bar on stderr; default where it is a terminal.
        shards: a folder for Parquet shards. A reading that was interrupted goes on after the last finished shard when
            called again with the same model, settings and texts.
        shard_rows: least rows of a shard, which ends where a text ends.

    Returns:
        The Signature; with `shards` a `ShardedSignature`, which loads what is asked of it.

    Raises:
        InputError: a text is not UTF-8 (`strict`), or cannot be spelled in the vocabulary.
        ModelError: the model cannot be loaded; it lacks hidden states; `against` has another vocabulary.
        OutputError: shards cannot be written, or belong to another reading.
        ValueError: an argument is out of range.
    """
    if top < 0:
        raise ValueError(f"top must be 0 or more, got {top}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    p = load(model)
    q = None if against is None else load(against)
    _check(p, q)
    reading = Reading(p, q, top=top, hidden=hidden, overlap=overlap, batch_tokens=batch_tokens)
    before, label = _before(p.vocab, bos=bos, bos_text=bos_text)
    metadata = Metadata(
        model=p.name,
        model_digest=p.digest,
        tokenizer_digest=p.vocab.digest,
        vocab_size=p.vocab.size,
        dtype=p.dtype,
        top=top,
        is_partial=p.is_partial,
        against=None if q is None else q.name,
        against_digest=None if q is None else q.digest,
        context_length=reading.context_length,
        overlap=reading.overlap,
        bos_text=label,
        versions={"nextoken": nextoken.__version__, "torch": version("torch"), "transformers": version("transformers")},
    )
    source = incoming(texts, names, prompts=prompts, strict=strict)
    total = 1 if isinstance(texts, str | bytes) else len(texts) if isinstance(texts, Sequence) else None
    if shards is None:
        tables: list[pa.Table] = []
        infos: list[TextInfo] = []
        labels = Labels(p.vocab)
        numbered = (passage(number, text, p.vocab, before) for number, text in enumerate(source))
        for block in _shown(reading.blocks(numbered), progress, total):
            labels.add(block.table)
            tables.append(block.table)
            infos += block.finished
        filled = [table for table in tables if len(table)] or [reading.schema().empty_table()]
        return Signature(pa.concat_tables(filled), metadata, infos, labels.as_dict())
    with ShardWriter(shards, metadata, reading.schema().names, p.vocab, shard_rows=shard_rows) as writer:
        numbered = (passage(number, text, p.vocab, before) for number, text in writer.remaining(source))
        for block in _shown(reading.blocks(numbered, most=shard_rows), progress, total, done=len(writer.done)):
            writer.add(block)
    return ShardedSignature(shards)


def _shown(blocks: Iterable[Block], shown: bool | None, total: int | None, *, done: int = 0) -> Iterator[Block]:
    """The blocks, each told to the progress bar when it has been dealt with."""
    with progress_bar(shown, total) as report:
        report(done, 0)
        for block in blocks:
            yield block
            done += len(block.finished)
            report(done + block.unfinished, len(block.table))


def _check(p: LanguageModel, q: LanguageModel | None) -> None:
    if q is None:
        return
    if p.vocab.digest != q.vocab.digest:
        raise ModelError(
            f"{p.name} and {q.name} have different vocabularies, so their distributions cannot be set side by side: "
            "read the texts with each, then use nextoken.compare(a, b), which joins them by bytes"
        )
    for model in (p, q):
        if model.is_partial:
            raise ModelError(
                f"{model.name} tells only its most probable tokens, and against= needs whole distributions: "
                "read the texts with each model, then use nextoken.compare(a, b)"
            )


def _before(vocab: Vocab, *, bos: bool, bos_text: str | None) -> tuple[np.ndarray, str | None]:
    """The tokens that stand before each text, and how they read."""
    begin = [vocab.bos_id] if bos and vocab.bos_id is not None else []
    given = []
    if bos_text:
        special = [token_id for token_id in sorted(vocab.specials) if vocab.label(token_id) == bos_text]
        if special:
            begin = special[:1]
        else:
            given = list(vocab.encode(bos_text).ids)
    read_as = "".join(map(vocab.label, begin)) + (bos_text or "" if given else "")
    return np.array([*begin, *given], dtype=np.int64), read_as or None

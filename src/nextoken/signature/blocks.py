"""Blocks: the rows of a reading as they come, in the order of the texts, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from nextoken.model.base import LanguageModel
from nextoken.signature import columns
from nextoken.signature.forward import Forward, Numbers
from nextoken.signature.passage import Job, Passage
from nextoken.signature.texts import TextInfo
from nextoken.signature.window import Window, checked_overlap, windows

_LOOKAHEAD = 16
"""Batches' worth of tokens that are sorted by length together."""


@dataclass(frozen=True)
class Block:
    """Some rows, and the texts whose last row (if they have any) is among them or came before.

    Args:
        table: the rows.
        finished: texts that are read to their end.
        unfinished: share of the next text that is read, 0 if none of it is.
    """

    table: pa.Table
    finished: tuple[TextInfo, ...]
    unfinished: float = 0.0


class Reading:
    """One or two models and the settings under which texts are read.

    Args:
        model: p.
        against: q, or None.
        top: k of the top-k.
        hidden: whether hidden states are kept.
        overlap: tokens by which windows overlap; None for half of the context.
        batch_tokens: most tokens fed at once.

    Raises:
        ValueError: the overlap does not fit the context.
    """

    def __init__(
        self,
        model: LanguageModel,
        against: LanguageModel | None,
        *,
        top: int,
        hidden: bool,
        overlap: int | None,
        batch_tokens: int,
    ) -> None:
        contexts = [m.context_length for m in (model, against) if m is not None and m.context_length is not None]
        self.context_length = min(contexts, default=None)
        self.overlap = None if self.context_length is None else checked_overlap(self.context_length, overlap)
        self.batch_tokens = batch_tokens
        self._forward = Forward(model, against, top=top, hidden=hidden, batch_tokens=batch_tokens)
        self._against = against is not None
        self._hidden = hidden
        self._is_partial = model.is_partial

    def schema(self, hidden_size: int = 0) -> pa.Schema:
        """The columns of the rows."""
        size = hidden_size if self._hidden else None
        return columns.schema(against=self._against, is_partial=self._is_partial, hidden_size=size)

    def blocks(self, passages: Iterable[Passage], *, most: int | None = None) -> Iterator[Block]:
        """The rows of all passages, in order.

        Args:
            passages: tokenised texts; they are taken as they are needed.
            most: a block is closed at the first end of a text after so many tokens, if not before.
        """
        lookahead = _LOOKAHEAD * self.batch_tokens if most is None else min(most, _LOOKAHEAD * self.batch_tokens)
        jobs: list[Job] = []
        finished: list[TextInfo] = []
        load = 0
        for passage in passages:
            for window in windows(len(passage.tokens), self.context_length, self.overlap, given=passage.given):
                job = Job(passage, window)
                if job.fed > self.batch_tokens:
                    # Too long for a batch, so its rows may be too many to wait for: they go on as they come.
                    if jobs or finished:
                        yield self._block(jobs, finished)
                        jobs, finished, load = [], [], 0
                    for begin, end, numbers in self._forward.stream(job):
                        stretch = Job(passage, Window(window.begin, end, begin))
                        yield Block(self._table([stretch], numbers), (), end / len(passage.tokens))
                    continue
                jobs.append(job)
                load += job.fed
                if load >= _LOOKAHEAD * self.batch_tokens:
                    yield self._block(jobs, finished, window.end / len(passage.tokens))
                    jobs, finished, load = [], [], 0
            finished.append(passage.info)
            # Texts without rows count too, so that a run of them does not wait for ever.
            load += 1
            if load >= lookahead:
                yield self._block(jobs, finished)
                jobs, finished, load = [], [], 0
        if jobs or finished:
            yield self._block(jobs, finished)

    def _block(self, jobs: Sequence[Job], finished: Sequence[TextInfo], unfinished: float = 0.0) -> Block:
        table = self._table(jobs, self._forward.run(jobs)) if jobs else self.schema().empty_table()
        return Block(table, tuple(finished), unfinished)

    def _table(self, jobs: Sequence[Job], numbers: Numbers) -> pa.Table:
        """The rows of jobs, given the numbers of the tokens they score in their order."""
        spans = [(job.passage, job.window.first, job.window.end) for job in jobs]
        counts = [end - first for _, first, end in spans]
        ends = [passage.ends[first - passage.before : end - passage.before] for passage, first, end in spans]
        begins = [passage.byte(first) for passage, first, _ in spans]
        starts = [np.concatenate([[begin], end[:-1]]) for begin, end in zip(begins, ends, strict=True)]
        pieces = [passage.text.data[passage.byte(first) : passage.byte(end)] for passage, first, end in spans]
        placed = {
            "text_id": np.repeat([passage.number for passage, _, _ in spans], counts),
            "position": np.concatenate([np.arange(first, end) - passage.before for passage, first, end in spans]),
            "token_id": np.concatenate([passage.tokens[first:end] for passage, first, end in spans]),
            "token": columns.spelled(pieces, [end - begin for begin, end in zip(begins, ends, strict=True)]),
            "byte_start": np.concatenate(starts),
            "byte_end": np.concatenate(ends),
        }
        width = numbers["hidden"].shape[1] if self._hidden else 0
        return columns.table({**numbers, **placed}, self.schema(width), nan_is_null=self._is_partial)

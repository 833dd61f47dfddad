"""Any bytes as tokens that spell them exactly, and raw bytes between where no token does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from nextoken.model.vocab import Vocab

_SHORT = 8
"""Text between two raw stretches that has fewer bytes than this is taken as raw: the tokens of noise cost more."""
_RAW = re.compile("[\udc80-\udcff]+")
"""What `surrogateescape` makes of bytes that are no UTF-8."""


@dataclass
class Spelled:
    """Token ids, and for places among them the raw bytes that stand there.

    Args:
        ids: the tokens.
        raw: place -> bytes before the token of that number (at the end for len(ids)).
    """

    ids: list[int] = field(default_factory=list)
    raw: dict[int, bytes] = field(default_factory=dict)

    def joined(self, vocab: Vocab) -> bytes:
        """The bytes again."""
        pieces = []
        for place, token in enumerate(self.ids):
            pieces += [self.raw.get(place, b""), vocab.token_bytes[token]]
        return b"".join(pieces) + self.raw.get(len(self.ids), b"")


def spell(vocab: Vocab, data: bytes) -> Spelled:
    """Tokens and raw stretches whose bytes are `data`, whatever it holds.

    Text is cut by the tokenizer. Where its tokens are not the bytes they stand for (a normaliser, a space put in front)
    the longest tokens that are take their place; bytes that are no UTF-8, or have no token, stay raw.
    """
    found = Spelled()
    stretches = [(is_raw, list(part)) for is_raw, part in groupby(_tokens(vocab, data), lambda one: one[0] is None)]
    for number, (is_raw, part) in enumerate(stretches):
        stretch = b"".join(spelled for _, spelled in part)
        if is_raw or (0 < number < len(stretches) - 1 and len(stretch) < _SHORT):
            place = len(found.ids)
            found.raw[place] = found.raw.get(place, b"") + stretch
        else:
            found.ids += [token for token, _ in part if token is not None]
    return found


def _tokens(vocab: Vocab, data: bytes) -> Iterator[tuple[int | None, bytes]]:
    """(token, its bytes) or (None, raw bytes), in order."""
    text = data.decode("utf-8", errors="surrogateescape")
    at, before = 0, False
    for match in _RAW.finditer(text):
        between = text[at : match.start()]
        if before and len(between) < _SHORT and len(spelled := between.encode()) < _SHORT:
            yield None, spelled
        else:
            yield from _of_text(vocab, between)
        yield None, match[0].encode("utf-8", errors="surrogateescape")
        at, before = match.end(), True
    yield from _of_text(vocab, text[at:])


def _of_text(vocab: Vocab, text: str) -> Iterator[tuple[int | None, bytes]]:
    if not text:
        return
    data, at = text.encode(), 0
    try:
        encoding = vocab.encode(text)
    except ValueError:
        yield from _longest(vocab, data)
        return
    for token, start in zip(encoding.ids, encoding.starts, strict=True):
        spelled = vocab.token_bytes[token]
        if start >= at and spelled and data.startswith(spelled, start):
            yield from _longest(vocab, data[at:start])
            yield token, spelled
            at = start + len(spelled)
    yield from _longest(vocab, data[at:])


def _longest(vocab: Vocab, data: bytes) -> Iterator[tuple[int | None, bytes]]:
    """The longest token at each place, and the byte itself where there is none."""
    at = 0
    while at < len(data):
        longest = min(vocab._longest, len(data) - at)
        size = next((size for size in range(longest, 0, -1) if data[at : at + size] in vocab._by_bytes), 0)
        yield vocab._by_bytes.get(data[at : at + size]), data[at : at + max(size, 1)]
        at += max(size, 1)

"""Vocab: token ids and the bytes they stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Encoding:
    """The tokens of one text: `ids[i]` covers the bytes `starts[i]:ends[i]` of its UTF-8 form.

    Where a tokenizer drops or adds bytes (a normaliser, a dummy leading space) the spans still lie within the text and
    never run backwards; where one token is a part of a character, tokens of that character may share its span.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Vocab:
    """V token ids, the bytes of each, and text in both directions.

    This class spells a text by the longest token at each place, which is all that table and count models need;
    `TokenizerVocab` (module `tokenizer`) wraps a real tokenizer.

    Args:
        token_bytes: for each id the bytes it stands for; empty for specials, which are no part of a text.
        labels: names of the specials for display, by id.
        bos_id: the token every text begins with, or None.
        eos_ids: tokens that end a text.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        labels: dict[int, str] | None = None,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self.token_bytes = tuple(token_bytes)
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self._labels = dict(labels or {})

    @property
    def size(self) -> int:
        """V, the length of the model's distributions."""
        return len(self.token_bytes)

    @cached_property
    def specials(self) -> frozenset[int]:
        """Ids that stand for no bytes."""
        return frozenset(i for i, spelled in enumerate(self.token_bytes) if not spelled)

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the vocabulary: 16 hexadecimal digits over size, bytes and begin and end tokens."""
        sha = hashlib.sha256(repr((self.size, self.bos_id, sorted(self.eos_ids))).encode())
        for spelled in self.token_bytes:
            sha.update(len(spelled).to_bytes(4, "little") + spelled)
        return sha.hexdigest()[:16]

    def label(self, token_id: int) -> str:
        """A token as a person would read it: its text, bytes that are no character as \\xNN, specials by name."""
        spelled = self.token_bytes[token_id]
        if not spelled:
            return self._labels.get(token_id, f"<{token_id}>")
        return spelled.decode("utf-8", errors="backslashreplace")

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of a token sequence, specials left out."""
        return b"".join(self.token_bytes[i] for i in ids)

    def decode_text(self, ids: Iterable[int]) -> str:
        """`decode` as text, invalid UTF-8 replaced."""
        return self.decode(ids).decode("utf-8", errors="replace")

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation as the model's chat template lays it out, ready for the reply.

        Raises:
            ValueError: there is no chat template.
        """
        raise ValueError("this vocabulary has no chat template: give the prompt as one text")

    def encode(self, text: str | bytes) -> Encoding:
        """Tokens of a text, without begin or end tokens; names of specials in it are ordinary text.

        Raises:
            ValueError: some bytes have no token.
        """
        data = text.encode() if isinstance(text, str) else text
        ids, starts, ends, at = [], [], [], 0
        while at < len(data):
            for size in range(min(self._longest, len(data) - at), 0, -1):
                token_id = self._by_bytes.get(data[at : at + size])
                if token_id is not None:
                    ids.append(token_id)
                    starts.append(at)
                    ends.append(at + size)
                    at += size
                    break
            else:
                raise ValueError(f"byte {data[at : at + 1]!r} at {at} has no token in this vocabulary of {self.size}")
        return Encoding(tuple(ids), tuple(starts), tuple(ends))

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        table: dict[bytes, int] = {}
        for token_id, spelled in enumerate(self.token_bytes):
            if spelled:
                table.setdefault(spelled, token_id)
        return table

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.token_bytes), default=0)

"""Vocabularies of servers whose tokenizer is not at hand: learned from what the server says."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol, overload

from nextoken.errors import ModelError
from nextoken.model._http import Connection, Refused
from nextoken.model.tokenizer import byte_of_letter
from nextoken.model.vocab import Encoding, Vocab

CAPACITY = 1 << 20
"""Size of a vocabulary that the server does not tell."""

_REPLACED = "�".encode()
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenization(Protocol):
    """A server's way of cutting texts. A token's bytes are None where only its id is told."""

    def tokens(self, text: str, *, special: bool) -> list[tuple[int, bytes | None]]:
        """The tokens of a text, with the begin token if `special`."""

    def spell(self, token_id: int) -> bytes:
        """The bytes of one token; U+FFFD in them where the server cannot write a part of a character."""


class LlamaCppTokenization:
    """/tokenize and /detokenize of llama.cpp's server: exact bytes of all tokens of a text."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tokens(self, text: str, *, special: bool) -> list[tuple[int, bytes | None]]:
        body = {"content": text, "add_special": special, "with_pieces": True}
        found = self._connection.post("/tokenize", body)["tokens"]
        return [(token["id"], _piece(token["piece"])) for token in found]

    def spell(self, token_id: int) -> bytes:
        content: str = self._connection.post("/detokenize", {"tokens": [token_id]})["content"]
        return content.encode()


class VllmTokenization:
    """/tokenize and /detokenize of vLLM."""

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self._model = connection, model

    def tokens(self, text: str, *, special: bool) -> list[tuple[int, bytes | None]]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": special, "return_token_strs": True}
        found = self._connection.post("/tokenize", body)
        ids = found["tokens"]
        return list(zip(ids, _spelled(found.get("token_strs") or [None] * len(ids)), strict=True))

    def spell(self, token_id: int) -> bytes:
        body = {"model": self._model, "tokens": [token_id]}
        prompt: str = self._connection.post("/detokenize", body)["prompt"]
        return prompt.encode()


class ServerVocab(Vocab):
    """Token ids of a server, with bytes asked for when they are needed.

    Args:
        tokenization: the server's own.
        size: V if the server tells it; else ids up to `CAPACITY` are taken.
        name: of the model, for the digest.
    """

    def __init__(self, tokenization: Tokenization, *, size: int | None, name: str) -> None:
        self._tokenization, self._name = tokenization, name
        self._known: dict[int, bytes] = {}
        # What is put before nothing at all is the begin token.
        begin = [token for token, _ in tokenization.tokens("", special=True)]
        bos = begin[0] if len(begin) == 1 else None
        labels = {} if bos is None else {bos: "<bos>"}
        super().__init__((), labels=labels, bos_id=bos)
        if bos is not None:
            self._known[bos] = b""
        self.token_bytes = _Spelled(self, size or CAPACITY)  # type: ignore[assignment]

    @cached_property
    def specials(self) -> frozenset[int]:
        """The begin token; which other ids are special is not told."""
        return frozenset() if self.bos_id is None else frozenset([self.bos_id])

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the server's name for the model: vocabularies are not compared byte by byte."""
        return hashlib.sha256(repr((self._name, self.size, self.bos_id)).encode()).hexdigest()[:16]

    def learn(self, token_id: int, spelled: bytes) -> None:
        """Take the bytes of a token from an answer, unless a part of a character is missing in them."""
        if _REPLACED not in spelled:
            self._known.setdefault(token_id, spelled)

    def spelled(self, token_id: int) -> bytes:
        """The bytes of a token, asked for once."""
        if token_id not in self._known:
            self._known[token_id] = self._tokenization.spell(token_id)
        return self._known[token_id]

    def encode(self, text: str | bytes) -> Encoding:
        """Tokens of a text as the server cuts it. Tokens whose bytes it cannot tell share the span of their run."""
        data = text.encode() if isinstance(text, str) else text
        if not data:
            return Encoding((), (), ())
        found = self._tokenization.tokens(data.decode("utf-8"), special=False)
        for token_id, piece in found:
            if piece is not None:
                self.learn(token_id, piece)
        pieces = [self.spelled(token_id) if piece is None else piece for token_id, piece in found]
        spans = placed(pieces, data)
        return Encoding(tuple(i for i, _ in found), tuple(s for s, _ in spans), tuple(e for _, e in spans))


class EchoTokenization:
    """For servers that only repeat a prompt with the text of its tokens: ids are given in the order of first sight.

    Tokens with the same text are one to this vocabulary.
    """

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self._model = connection, model
        self._ids: dict[str, int] = {}
        self._names: list[str] = []
        self._texts: dict[tuple[int, ...], str] = {}

    def tokens(self, text: str, *, special: bool) -> list[tuple[int, bytes | None]]:
        if not text:
            return []
        body = {"model": self._model, "prompt": text, "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 1.0}
        answer = self._connection.post("/v1/completions", body)
        names: list[str] = answer["choices"][0]["logprobs"]["tokens"]
        inside = names[: len(names) - int(answer["usage"]["completion_tokens"])]
        ids = [self.id_of(name) for name in inside]
        self._texts[tuple(ids)] = text
        return [(token, name.encode()) for token, name in zip(ids, inside, strict=True)]

    def spell(self, token_id: int) -> bytes:
        if token_id >= len(self._names):
            raise ModelError(f"token id {token_id} has not been seen in any answer of the server yet")
        return self._names[token_id].encode()

    def id_of(self, name: str) -> int:
        """The id of a token by its text, a new one if it was never seen."""
        if name not in self._ids:
            if len(self._ids) == CAPACITY:
                raise ModelError(f"the server has named more than {CAPACITY} different tokens")
            self._ids[name] = len(self._names)
            self._names.append(name)
        return self._ids[name]

    def text_of(self, ids: Sequence[int]) -> str | None:
        """The text that was cut into just these tokens."""
        return self._texts.get(tuple(ids))


class _Spelled(Sequence[bytes]):
    """The bytes of all tokens, as a sequence that asks for them one by one."""

    def __init__(self, vocab: ServerVocab, size: int) -> None:
        self._vocab, self._size = vocab, size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(index)
        return self._vocab.spelled(index % self._size)


def placed(pieces: Sequence[bytes], data: bytes) -> list[tuple[int, int]]:
    """The span of each piece in the text they were cut from.

    Pieces that are not found where they should be (a replaced part of a character, a changed letter) share the span up
    to the next one that is. A space that a piece has too much at the beginning of the text, or that is missing before
    it, is allowed for.
    """
    spans: list[tuple[int, int]] = []
    waiting, lost, at = 0, 0, 0
    for piece in pieces:
        sure = bool(piece) and _REPLACED not in piece
        exact = piece.removeprefix(b" ") if at == 0 and not spans and not data.startswith(piece) else piece
        begin = data.find(exact, at + lost) if sure else -1  # a lost part has a byte at least
        gap = data[at:begin] if begin >= 0 else b""
        if begin < 0 or (gap and not waiting and gap != b" "):
            waiting += 1
            lost += _REPLACED in piece
            continue
        if waiting:
            spans += [(at, begin)] * waiting
            at, waiting, lost = begin, 0, 0
        spans.append((at, begin + len(exact)))
        at = begin + len(exact)
    return spans + [(at, len(data))] * waiting


def _piece(piece: Any) -> bytes:
    return piece.encode() if isinstance(piece, str) else bytes(piece)


def _spelled(pieces: Iterable[str | None]) -> list[bytes | None]:
    """Bytes of a tokenizer's own pieces: byte-level letters, or SentencePiece's mark for a space."""
    given = list(pieces)
    letters = byte_of_letter()
    texts = [piece for piece in given if piece is not None]
    if any("Ġ" in piece or "Ċ" in piece for piece in texts) and all(set(piece) <= letters.keys() for piece in texts):
        return [None if piece is None else bytes(letters[letter] for letter in piece) for piece in given]
    if any("▁" in piece for piece in texts):
        return [None if piece is None else _sentencepiece(piece) for piece in given]
    return [None] * len(given)


def _sentencepiece(piece: str) -> bytes:
    single = _BYTE.fullmatch(piece)
    return bytes.fromhex(single[1]) if single else piece.replace("▁", " ").encode()


def tokenization_of(connection: Connection, model: str) -> Tokenization | None:
    """The endpoints a server has, None if it has none."""
    for found in (LlamaCppTokenization(connection), VllmTokenization(connection, model)):
        try:
            found.tokens("", special=False)
        except (Refused, KeyError, TypeError):
            continue
        return found
    return None

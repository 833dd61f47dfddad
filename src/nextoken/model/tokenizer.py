"""TokenizerVocab: the vocabulary of a Hugging Face tokenizer, with the exact bytes of every token."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from nextoken.model.vocab import Encoding, Vocab

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SPACE = "▁"


def byte_of_letter() -> dict[str, int]:
    """The alphabet in which byte-level BPE writes bytes: printable bytes as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class TokenizerVocab(Vocab):
    """A Hugging Face tokenizer as a `Vocab`.

    Byte-level and SentencePiece-style tokenizers give the exact bytes of each token, also of tokens that are parts of a
    character. Others give the text that a token decodes to alone.

    Args:
        tokenizer: any tokenizer of transformers.
        size: V of the model, when its output layer is padded beyond the tokenizer; the surplus ids are specials.
        eos_ids: end tokens beside the tokenizer's own, e.g. those of a generation configuration.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, size: int | None = None, eos_ids: Iterable[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        # Ids may have gaps, so their number does not tell the largest.
        pieces = {token_id: piece for piece, token_id in tokenizer.get_vocab().items()}
        added = tokenizer.added_tokens_decoder
        specials = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        count = size or max(pieces, default=-1) + 1
        spell = _speller(tokenizer, pieces.values())
        spelled, labels = [], {}
        for token_id in range(count):
            piece = pieces.get(token_id)
            if piece is None or token_id in specials:
                spelled.append(b"")
            elif token_id in added:
                spelled.append(added[token_id].content.encode())
            else:
                spelled.append(spell(token_id, piece))
            if not spelled[-1] and piece is not None:
                labels[token_id] = piece
        # A tokenizer may know ids beyond the model's output: they are never predicted, nor can they begin a text.
        bos = tokenizer.bos_token_id
        ends = {end for end in (tokenizer.eos_token_id, *eos_ids) if end is not None and end < count}
        super().__init__(spelled, labels=labels, bos_id=bos if bos is not None and bos < count else None, eos_ids=ends)

    def encode(self, text: str | bytes) -> Encoding:
        """Tokens of a text, without begin or end tokens; names of specials in it are ordinary text.

        Bytes must be UTF-8, for tokenizers take text.
        """
        text = text if isinstance(text, str) else text.decode("utf-8")
        if not text:
            return Encoding((), (), ())
        data = text.encode()
        # Without the length warning: reading cuts long texts into windows itself.
        result = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=self.tokenizer.is_fast,
            split_special_tokens=True,
            verbose=False,
        )
        ids = tuple(result["input_ids"])
        pieces = [self.token_bytes[i] for i in ids]
        joined = b"".join(pieces)
        surplus = len(joined) - len(data)
        if surplus >= 0 and joined[surplus:] == data and not joined[:surplus].strip():
            # Exact, but for a leading space that the tokenizer may have added.
            ends = [max(0, end - surplus) for end in accumulate(map(len, pieces))]
            return Encoding(ids, (0, *ends[:-1]), tuple(ends))
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} changes the text and gives no offsets: tokens have no place in it; "
                "load its fast version"
            )
        # The tokenizer changed the text: character offsets, turned into byte offsets, are the best there is.
        # Normalisers that reorder or insert may report spans that run backwards; they are held where they were.
        at = list(accumulate((len(c.encode()) for c in text), initial=0))
        offsets = result["offset_mapping"]
        starts = list(accumulate((at[start] for start, _ in offsets), max))
        ends = list(accumulate((max(at[end], start) for (_, end), start in zip(offsets, starts, strict=True)), max))
        return Encoding(ids, tuple(starts), tuple(ends))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: give the prompt as one text, or set one")
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        # The template writes the specials it wants, the begin token among them.
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _speller(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> Callable[[int, str], bytes]:
    """A function (id, piece) -> bytes for the tokenizer's way of writing pieces."""
    letters = byte_of_letter()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    layout = f"{backend.decoder}{backend.pre_tokenizer}" if backend is not None else ""
    if "ByteLevel" in layout or (backend is None and hasattr(tokenizer, "byte_decoder")):
        return lambda token_id, piece: (
            bytes(letters[c] for c in piece) if set(piece) <= letters.keys() else piece.encode()
        )
    if any(_BYTE_TOKEN.match(piece) or _SPACE in piece for piece in pieces):

        def sentencepiece(token_id: int, piece: str) -> bytes:
            match = _BYTE_TOKEN.match(piece)
            return bytes([int(match[1], 16)]) if match else piece.replace(_SPACE, " ").encode()

        return sentencepiece
    inner = getattr(getattr(backend, "model", None), "continuing_subword_prefix", None)
    if inner:  # WordPiece: ##ing is the inside of a word
        return lambda token_id, piece: piece.removeprefix(inner).encode()
    return lambda token_id, piece: tokenizer.decode([token_id], clean_up_tokenization_spaces=False).encode()

"""Passage: a text as the tokens to be fed and scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nextoken.errors import InputError
from nextoken.model.vocab import Vocab
from nextoken.signature.texts import Text, TextInfo
from nextoken.signature.window import Window


@dataclass(frozen=True)
class Passage:
    """The tokens of a text with what stands before it.

    Args:
        number: the text's, among all that are read.
        text: the text.
        tokens: begin token (or what else stands before the text), then the text's own [N].
        before: how many of them stand before the text.
        ends: where each of the text's own tokens ends, in bytes [N - before], never running backwards.
    """

    number: int
    text: Text
    tokens: np.ndarray
    before: int
    ends: np.ndarray

    @property
    def given(self) -> int:
        """Tokens that are not scored: at least one, for nothing predicts the first."""
        return max(1, self.before)

    @property
    def info(self) -> TextInfo:
        count = len(self.ends)
        unpredicted = min(self.given - self.before, count)
        return TextInfo(
            name=self.text.name,
            prefix=self.text.data[: self.byte(self.given)] if unpredicted else b"",
            suffix=self.text.data[self.byte(len(self.tokens)) :],
            size=len(self.text.data),
            replaced=self.text.replaced,
            n_rows=count - unpredicted,
            digest=self.text.digest,
            prompt=self.text.prompt,
        )

    def byte(self, token: int) -> int:
        """Where in the text the token begins, or the text's tokens end; counted with what stands before."""
        return int(self.ends[token - self.before - 1]) if token > self.before else 0


@dataclass(frozen=True)
class Job:
    """A window of a passage: one row of a batch."""

    passage: Passage
    window: Window

    @property
    def fed(self) -> int:
        """Tokens fed: all but the last, after which nothing is asked."""
        return len(self.window) - 1


def passage(number: int, text: Text, vocab: Vocab, before: np.ndarray) -> Passage:
    """Tokenise a text, to be read after `before` and its own prompt, which is tokenised by itself.

    The spans of the tokens are made to tile it: bytes that a tokenizer drops belong to the token after them, and of
    several tokens that share a character the first has its bytes and the others none.

    Raises:
        InputError: the vocabulary cannot spell it.
    """
    try:
        encoding = vocab.encode(text.data.decode())
        prompt = vocab.encode(text.prompt).ids if text.prompt else ()
    except ValueError as error:
        raise InputError(f"{text.name}: {error}") from error
    own = np.array(encoding.ids, dtype=np.int64)
    ends = np.maximum.accumulate(np.array(encoding.ends, dtype=np.int64))
    given = np.concatenate([before, np.array(prompt, dtype=np.int64)])
    return Passage(number, text, np.concatenate([given, own]), len(given), ends)

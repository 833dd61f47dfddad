"""Place: a word of a text, with the words around it; and how texts are taken apart into words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

_WORD = re.compile(r"w+(?:'w+)*")
_ENDS = re.compile(r"[.!?\u2026\u3002\uff01\uff1f]|\n\s*\n")
_APOSTROPHES = "'\u2019"


@dataclass(frozen=True)
class Place:
    """Word `index` of a text: text = gaps[0] words[0] gaps[1] words[1] ... words[n-1] gaps[n].

    Args:
        words: of the whole text.
        gaps: what stands before, between and after them.
        index: which place is meant.
        word: that stands there, or is thought to stand there in place of words[index].
    """

    words: Sequence[str]
    gaps: Sequence[str]
    index: int
    word: str

    @property
    def before(self) -> str:
        """The word before, or nothing."""
        return self.words[self.index - 1] if self.index else ""

    def holding(self, word: str) -> Place:
        """The same place with another word there."""
        return replace(self, word=word)

    def window(self, *, sentences: int = 2, reach: int = 60) -> tuple[str, int]:
        """The text around the word, and the character at which the word begins there.

        Args:
            sentences: its own, and those before it.
            reach: words at most on either side.
        """
        first, wanted = self.index, sentences
        while first > max(0, self.index - reach):
            if _ENDS.search(self.gaps[first]):
                wanted -= 1
                if not wanted:
                    break
            first -= 1
        last, most = self.index, min(len(self.words) - 1, self.index + reach)
        while last < most and not _ENDS.search(self.gaps[last + 1]):
            last += 1
        left = "".join(self.words[at] + self.gaps[at + 1] for at in range(first, self.index))
        # A gap may close this sentence and open the next: of it what goes with this one.
        closing = self.gaps[last + 1]
        end = _ENDS.search(closing)
        tail = closing[: end.end()].rstrip() if end else closing.rstrip() if last == len(self.words) - 1 else ""
        right = "".join(self.gaps[at] + self.words[at] for at in range(self.index + 1, last + 1))
        return left + self.word + right + tail, len(left)


def taken_apart(text: str) -> tuple[list[str], list[str]]:
    """Words and the gaps around them; joined in turn they are the text again.

    A word is a run of letters, digits and the marks that combine with them, apostrophes within included.
    """
    shape = "".join(
        "w" if letter.isalnum() or unicodedata.category(letter)[0] == "M" else "'" if letter in _APOSTROPHES else " "
        for letter in text
    )
    words, gaps, at = [], [], 0
    for found in _WORD.finditer(shape):
        gaps.append(text[at : found.start()])
        words.append(text[found.start() : found.end()])
        at = found.end()
    return words, [*gaps, text[at:]]


def put_together(words: Sequence[str], gaps: Sequence[str]) -> str:
    """The text of these words and gaps."""
    return "".join(part for pair in zip(gaps, [*words, ""], strict=True) for part in pair)


def is_one_word(text: str) -> bool:
    """Whether a text is a word and nothing else."""
    return taken_apart(text)[0] == [text]


def folded(word: str) -> str:
    """A word without its case, in one Unicode spelling."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", word).casefold())


def cased_like(word: str, candidate: str) -> str:
    """The candidate in the case of the word: UPPER, Title, or as it is."""
    if len(word) > 1 and word.isupper():
        return candidate.upper()
    return candidate[:1].upper() + candidate[1:] if word[:1].isupper() else candidate

"""SynonymWatermark: a mark in a finished text, whoever wrote it: words whose bit is 0 give way to synonyms with a 1."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from nextoken.methods import method
from nextoken.watermark._tails import binomial_tail, z_score
from nextoken.watermark.fluency import Ranking
from nextoken.watermark.key import Key
from nextoken.watermark.places import Place, cased_like, folded, is_one_word, put_together, taken_apart
from nextoken.watermark.watermark import Detection
from nextoken.watermark.word_rules import Eligible, Filter, content_word

Source: TypeAlias = Callable[[Place], Sequence[str]]
"""Words that may stand for the one at a place, the best first."""


@dataclass(frozen=True)
class Replacement:
    """One word replaced.

    Args:
        index: which word of the text.
        word: that was there.
        by: what stands there now.
    """

    index: int
    word: str
    by: str


@dataclass(frozen=True)
class Marked:
    """A text with the mark.

    Args:
        text: punctuation, spaces and case are those of the original.
        replaced: what was changed, in order.
        words: how many words the text has.
        eligible: how many of them could have carried the mark.
    """

    text: str
    replaced: tuple[Replacement, ...]
    words: int
    eligible: int


@method(
    name="Black-box synonym watermark",
    arxiv="2305.08883",
    access="black",
    summary="words whose keyed bit is 0 are replaced by synonyms whose bit is 1; the text alone tells",
)
class SynonymWatermark:
    """A word w after a word u has the bit b(u, w), a fair coin under the key; z = (s - n/2) / sqrt(n/4) of s ones in n.

    `mark` goes from left to right over the eligible words with bit 0 and puts there the best candidate with bit 1, at
    once, since it tells the next word's bit too. With j candidates in each place a share 1 - 2^-(j+1) of ones is
    expected. Detection needs the text alone. Each pair (u, w) counts once, so the p-value P(Bin(n, 1/2) >= s) is exact
    for every text that was made without the key. The first word of a text has no word before it and carries nothing.

    A text is changed for good: meaning, names and numbers are guarded by the rules given here and by nothing else. The
    candidates need no generating model, but whoever holds the text can replace words as well as `mark` can.

    Args:
        key: the secret: b is the last bit of HMAC-SHA-256(key, u, w), both without case and in one Unicode spelling. Or
            "public" for the paper's rule, the last bit of SHA-256 of the two words as they are written, one after the
            other, which anyone can find, forge or remove.
        synonyms: word in lower case -> synonyms, or any callable that tells them for a place, such as
            `MaskedCandidates`. Not needed by `detect`.
        eligible: which words carry the mark; the default is a rule for English. Candidates must pass it too, for the
            detector sees them only.
        filters: a candidate must pass all of them: part of speech, similarity of words or of sentences.
        ranking: orders the candidates, and may forbid some; the default keeps the order they come in. `Fluency` ranks
            by the probability that a language model gives the sentence.
        most: candidates looked at in each place.

    Raises:
        ValueError: the key is neither, or `most` is below 1.

    Source: Yang et al., arXiv:2305.08883, sections 3.2 and 3.3. Where the paper's detector takes z against a quantile
    of the normal law and counts repeated pairs again, the exact tail of distinct pairs is used here.
    """

    def __init__(
        self,
        key: Key | Literal["public"],
        synonyms: Mapping[str, Sequence[str]] | Source | None = None,
        *,
        eligible: Eligible = content_word,
        filters: Sequence[Filter] = (),
        ranking: Ranking | None = None,
        most: int = 32,
    ) -> None:
        if not isinstance(key, Key) and key != "public":
            raise ValueError('key is a Key, or "public" for the rule that everyone knows')
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        self._key, self._synonyms = key, synonyms
        self.eligible, self.filters, self.ranking, self.most = eligible, tuple(filters), ranking, most

    def __repr__(self) -> str:
        return f"SynonymWatermark({'public' if self._key == 'public' else '...'})"

    def bit(self, before: str, word: str) -> int:
        """b(before, word), 0 or 1."""
        if isinstance(self._key, Key):
            return self._key.seed("synonym", folded(before), folded(word)) & 1
        return hashlib.sha256((before + word).encode()).digest()[-1] & 1

    def mark(self, text: str) -> Marked:
        """The text with the mark.

        Raises:
            ValueError: the watermark was made without synonyms.
        """
        self._need_synonyms()
        words, gaps = taken_apart(text)
        replaced, eligible = [], 0
        for place in self._places(words, gaps):
            eligible += 1
            if self.bit(place.before, place.word):
                continue
            best = self._fitting(place, [word for word in self._told(place) if self.bit(place.before, word)])[:1]
            if best:
                replaced.append(Replacement(place.index, place.word, best[0]))
                words[place.index] = best[0]
        return Marked(put_together(words, gaps), tuple(replaced), len(words), eligible)

    def detect(self, text: str) -> Detection:
        """The verdict on all eligible words (the paper's fast mode); no synonyms are needed. The statistic is z."""
        return self._verdict(list(self._places(*taken_apart(text))))

    def detect_precisely(self, text: str) -> Detection:
        """The verdict on those eligible words that have an alternative, which must be told as they were for `mark`.

        Fewer words count and more of them are marked; it costs as much as marking.

        Raises:
            ValueError: the watermark was made without synonyms.
        """
        self._need_synonyms()
        return self._verdict(
            [place for place in self._places(*taken_apart(text)) if self._fitting(place, self._told(place))]
        )

    def _verdict(self, places: Sequence[Place]) -> Detection:
        pairs = {(self._spelled(place.before), self._spelled(place.word)) for place in places}
        ones, n = sum(self.bit(*pair) for pair in pairs), len(pairs)
        return Detection(binomial_tail(ones, n), z_score(ones, n), n)

    def _spelled(self, word: str) -> str:
        """A word as its bit sees it."""
        return word if self._key == "public" else folded(word)

    def _places(self, words: list[str], gaps: list[str]) -> Iterator[Place]:
        """Places of the words that carry the mark; what is written into `words` in between counts."""
        for index in range(1, len(words)):
            place = Place(words, gaps, index, words[index])
            if self.eligible(place):
                yield place

    def _told(self, place: Place) -> list[str]:
        """Other words that the source tells for a place, in its case."""
        if isinstance(self._synonyms, Mapping):
            told = self._synonyms.get(folded(place.word), ())
        else:
            assert self._synonyms is not None
            told = self._synonyms(place)
        found: dict[str, str] = {}
        for word in told:
            if is_one_word(word) and folded(word) != folded(place.word):
                found.setdefault(folded(word), cased_like(place.word, word))
        return list(found.values())[: self.most]

    def _fitting(self, place: Place, candidates: Sequence[str]) -> list[str]:
        """Those that pass every rule, the best first; of equal ones the one that came first."""
        fit = [
            word
            for word in candidates
            if self.eligible(place.holding(word)) and all(rule(place, word) for rule in self.filters)
        ]
        if self.ranking is None or not fit:
            return fit
        scores = self.ranking(place, fit)
        if len(scores) != len(fit):
            raise ValueError(f"the ranking gave {len(scores)} numbers for {len(fit)} candidates: give one for each")
        kept = [at for at in range(len(fit)) if scores[at] > float("-inf")]
        return [fit[at] for at in sorted(kept, key=lambda at: -scores[at])]

    def _need_synonyms(self) -> None:
        if self._synonyms is None:
            raise ValueError(
                "this watermark was made without synonyms and can only detect; give it a dictionary or a source"
            )

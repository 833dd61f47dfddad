"""Word rules: which words may be replaced, and by what; built-in rules for English that need no tagger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from nextoken.watermark.places import Place, folded

Eligible: TypeAlias = Callable[[Place], bool]
"""Whether the word at a place is one of those that carry the mark."""
Filter: TypeAlias = Callable[[Place, str], bool]
"""Whether a candidate may stand at a place."""

_CLOSED = """
a about above across after again against ago all almost along already also although always am amid among an and
another any anybody anyone anything are around as at away back be because been before behind being below beneath
beside besides between beyond both but by can cannot could despite did do does doing done down during each eight
either else enough even ever every everybody everyone everything except few five for four from further had has have
having he hence her here hers herself him himself his how however i if in indeed inside instead into is it its
itself just least less lest like many may me might mine more most much must my myself near neither never
nevertheless next nine no nobody none nor not nothing now nowhere of off often on once one only onto or other others
otherwise ought our ours ourselves out outside over own past per perhaps quite rather same seven several shall she
should since six so some somebody someone something sometimes soon still such ten than that the thee their theirs
them themselves then there therefore these they thine this those thou though three through throughout thus thy till
to together too toward towards two under unless until unto up upon us very was we well were what whatever when
whence whenever where whereas wherever whether which while whither who whoever whole whom whose why will with within
without would ye yes yet you your yours yourself yourselves
"""
CLOSED_CLASS = frozenset(_CLOSED.split())
"""English words of classes that take no new members: articles, pronouns, prepositions, auxiliaries, and their like."""
_ENDINGS = ("ing", "ed", "ly", "est", "er", "s")
_SHORTEST = 3


def content_word(place: Place) -> bool:
    """English: lower case, letters only, three of them or more, not of a closed class.

    A rule in place of a tagger: names stay, for they are capitalised, and so do numbers and the first words of
    sentences. For languages that write other words with capitals, or none, give a rule of your own.
    """
    word = place.word
    return len(word) >= _SHORTEST and word.isalpha() and word == word.lower() and folded(word) not in CLOSED_CLASS


def same_ending(place: Place, candidate: str) -> bool:
    """Whether both words end in the same of -ing, -ed, -ly, -est, -er, -s, or both in none.

    A stand-in for the part of speech where candidates come from a model. Do not use it on a dictionary that knows
    irregular forms.
    """
    return _ending(folded(place.word)) == _ending(folded(candidate))


@dataclass(frozen=True)
class SpelledApart:
    """levenshtein(word, candidate) / max(lengths) >= least: not the same word in another form.

    Source: arXiv:2305.08883, official code (least = 0.5).
    """

    least: float = 0.5

    def __call__(self, place: Place, candidate: str) -> bool:
        a, b = folded(place.word), folded(candidate)
        return _edits(a, b) >= self.least * max(len(a), len(b))


def _ending(word: str) -> str:
    return next(
        (end for end in _ENDINGS if word.endswith(end) and len(word) > len(end) + 2 and not word.endswith("ss")), ""
    )


def _edits(a: str, b: str) -> int:
    """Levenshtein distance of two words."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above = row
        row = [i]
        for j, right in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]

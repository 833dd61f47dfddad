"""Stated: asking a model for its confidence in words, and reading it out of what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["success", "no_answer", "no_confidence", "degenerate_loop", "max_tokens"]

PHRASES = (
    *("no chance", "highly unlikely", "unlikely", "probably not", "less than even"),
    *("better than even", "probably", "likely", "highly likely", "almost certain"),
)
"""Ten degrees, [0, 0.1) to [0.9, 1]; each stands for the middle of its tenth."""

_NUMBER = r"(?<![\d.\-–])(\d{1,3}(?:\.\d+)?)(?!\d)(?!\.\d)(?!\s*(?:-|–|to)\s*\d)"
_PERCENT = r"\s*(%|percent\b|per cent\b|/\s*100\b)"
_WORDS = r"(?:level|score|is|of|rating|[^\w\n])"
_PATTERNS = {
    "labelled": rf"confiden(?:ce|t)[^\w\n]{{0,6}}{_WORDS}{{0,3}}\s*{_NUMBER}(?:{_PERCENT})?",
    "confident": rf"{_NUMBER}{_PERCENT}\W{{0,4}}(?:confident|certain|sure)",
    "i am": rf"\bI(?:'m| am)\s+(?:about |around )?{_NUMBER}{_PERCENT}",
    "percent": rf"{_NUMBER}{_PERCENT}",
    "bare": rf"(?<!\w){_NUMBER}\W*\Z",
}
"""How a number is recognised, surest first. `bare` is a number at the end, which a year or a count may be too."""
_LOOP = re.compile(r"(.{10,100}?)\1{2,}", re.DOTALL)


def numeric_question(question: str) -> list[dict[str, str]]:
    """A conversation that asks for an answer and a confidence in percent."""
    system = (
        "Answer the question in a few words. Then say how sure you are that the answer is right, as a percentage "
        "from 0 to 100. Write two lines:\nAnswer: <your answer>\nConfidence: <number>%"
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def phrase_question(question: str, answer: str, *, phrases: Sequence[str] = PHRASES) -> list[dict[str, str]]:
    """A conversation that asks how sure the model is of an answer it gave: one of the phrases.

    The answer stands in it already; asked for both at once, models rate an answer that they do not give.
    """
    ask = f"How sure are you that this answer is right? Reply with one of these only: {', '.join(phrases)}."
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": ask},
    ]


@dataclass(frozen=True)
class Stated:
    """What an answer says of itself.

    Args:
        confidence: from 0 to 1, NaN where none was read.
        status: "success", or what is wrong.
        answer: the part that answers.
        pattern: by what the confidence was recognised.
    """

    confidence: float
    status: Status
    answer: str = ""
    pattern: str = ""


def stated_percentage(text: str, *, cut_off: bool = False) -> Stated:
    """The confidence stated as a number: the first pattern that fits, in this order, and its last occurrence.

    "confidence: 95", "95 % confident", "I am 95 %", "95 %" and "95 percent" anywhere, a bare number at the end. Numbers
    above 100 are none; "0.95" without a percent sign is a probability (the study reads 0.95 %). Only what follows the
    last `</think>` counts.

    Args:
        text: the model's output.
        cut_off: whether it ended at the limit of tokens.
    """
    said, early = _closed(text, cut_off)
    if early is not None:
        return early
    for name, pattern in _PATTERNS.items():
        for match in reversed(list(re.finditer(pattern, said, re.IGNORECASE))):
            digits, unit = match[1], match[2] if match.re.groups > 1 else None
            value = float(digits)
            value = value if unit is None and "." in digits and value <= 1 else value / 100
            if value > 1:
                continue
            answer = _answer(said, match.start())
            return Stated(value, "success" if answer else "no_answer", answer, name)
    return Stated(math.nan, "max_tokens" if cut_off else "no_confidence", _answer(said, len(said)))


def stated_phrase(text: str, *, phrases: Sequence[str] = PHRASES, cut_off: bool = False) -> Stated:
    """The confidence stated as a phrase: the first in the text, the longest of those that begin at one place.

    The k-th of K phrases stands for (k + 1/2) / K. Phrases are whole words, so "unlikely" is not "likely". A text that
    names more than half of them repeats the list and states none.

    Args:
        text, cut_off: as of `stated_percentage`.
        phrases: from no to full confidence.
    """
    said, early = _closed(text, cut_off)
    if early is not None:
        return early
    longest = sorted(phrases, key=len, reverse=True)
    found = re.findall(rf"\b(?:{'|'.join(map(re.escape, longest))})\b", said, re.IGNORECASE)
    numbers = {phrase.lower(): number for number, phrase in enumerate(phrases)}
    named = [numbers[phrase.lower()] for phrase in found]
    if not named or len({*named}) > len(phrases) / 2:
        return Stated(math.nan, "max_tokens" if cut_off and not named else "no_confidence", said.strip())
    return Stated((named[0] + 0.5) / len(phrases), "success", said.strip(), phrases[named[0]])


def _closed(text: str, cut_off: bool) -> tuple[str, Stated | None]:
    """What is said after thinking; or why nothing is to be read."""
    if "<think>" in text and "</think>" not in text:
        return "", Stated(math.nan, "max_tokens" if cut_off else "no_confidence")
    said = text.rsplit("</think>", 1)[-1]
    if not said.strip():
        return said, Stated(math.nan, "max_tokens" if cut_off else "no_answer")
    if any(len(match[0]) > len(said) / 2 for match in _LOOP.finditer(said)):
        return said, Stated(math.nan, "degenerate_loop")
    return said, None


def _answer(said: str, end: int) -> str:
    """The labelled answer, else the first line before the confidence."""
    labelled = re.search(r"answer\s*(?:is)?\s*\W{0,3}[:=]\W{0,3}(.+)", said, re.IGNORECASE)
    if labelled:
        return labelled[1].strip(" *_.")
    lines = [line.strip(" *_.") for line in said[:end].splitlines()]
    return next((line for line in lines if line), "")

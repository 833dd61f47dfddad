"""The window plan: which slices of a long text a model with a limited context is given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A slice `tokens[begin:end]` of which the tokens `first:end` are scored and those before are context only.

    It is what `input_ids` would be for the loss of Hugging Face: with `labels` a copy in which the first
    `first - begin` entries are -100, that loss is the mean of -log p over the same `scored` tokens.
    """

    begin: int
    end: int
    first: int

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def scored(self) -> int:
        """How many tokens this window scores."""
        return self.end - self.first


def windows(length: int, context_length: int | None, overlap: int | None = None, *, given: int = 1) -> list[Window]:
    """Cut a token sequence into windows so that each token after the given ones is scored exactly once.

    With C = context_length and o = overlap: the first window is [0, C); each later one starts o tokens before the first
    token not yet scored and has C tokens, so every scored token sees at least o tokens (or all there are). The last
    window is moved to the left until it is full, which gives its tokens a longer context. The begin token, if there is
    one, is the first token of the sequence, and so only part of the windows that begin there: a window in the middle of
    a text starts in the middle of the text.

    Args:
        length: N, tokens of the sequence, begin token included.
        context_length: C, at least 2; None for no limit, which gives one window.
        overlap: o, from 1 to C - 1; default C // 2. More gives longer contexts and costs N C / (C - o) tokens fed.
        given: tokens at the start that are not scored: the begin token, or what else stands before the text.

    Raises:
        ValueError: an argument is out of range.
    """
    if given < 1:
        raise ValueError(f"given must be at least 1, for nothing predicts the first token; got {given}")
    if context_length is None:
        return [Window(0, length, given)] if length > given else []
    overlap = checked_overlap(context_length, overlap)
    plan: list[Window] = []
    first = given
    while first < length:
        # The context of a sequence's first scored token is what was given, as much of it as fits beside one more token.
        begin = max(0, first - overlap) if plan or first >= context_length else 0
        end = min(begin + context_length, length)
        plan.append(Window(min(begin, max(0, end - context_length)), end, first))
        first = end
    return plan


def checked_overlap(context_length: int, overlap: int | None) -> int:
    """The overlap to use: half the context by default.

    Raises:
        ValueError: the context is below 2, or the overlap not from 1 to context_length - 1.
    """
    if context_length < 2:
        raise ValueError(f"a context of {context_length} predicts nothing; it must be at least 2")
    if overlap is None:
        return context_length // 2
    if not 1 <= overlap < context_length:
        raise ValueError(f"overlap must be from 1 to {context_length - 1} (the context less one), got {overlap}")
    return overlap

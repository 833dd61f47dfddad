"""Divergence: where a small model's token would take a large model's text elsewhere, found out by going there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from nextoken.decode.generation import Generation
from nextoken.model.base import LanguageModel
from nextoken.model.vocab import Vocab
from nextoken.route.token_router import sights
from nextoken.route.verifier import Fork, Row, Verifier

Judge: TypeAlias = Callable[[Row, Row, Row], bool | None]
"""(context, one, other) -> whether they diverge; None where that cannot be said."""


@dataclass(frozen=True)
class LargeAnswer:
    """An answer of the large model.

    Args:
        tokens: prompt and answer, begin token included, and the end token where the answer came to it.
        given: how many of them are the prompt.
    """

    tokens: Row
    given: int

    def __post_init__(self) -> None:
        if not 0 < self.given < len(self.tokens):
            raise ValueError(f"of {len(self.tokens)} tokens at least one must be given and one be the answer's")

    @classmethod
    def of(cls, made: Generation) -> LargeAnswer:
        """What the large model generated; take finished answers only, as the paper does."""
        return cls((*made.request.prompt, *made.tokens), len(made.request.prompt))


@dataclass(frozen=True)
class Difference:
    """A place where the small model would write another token than the large one wrote.

    Args:
        answer: number of the answer.
        position: index of the large model's token in it.
        one: the large model's own text from there to the end of the sentence.
        other: the small model's token and what the large model makes of it to the end of the sentence.
        divergent: whether they lead to different places; None where the verifier could not say.
    """

    answer: int
    position: int
    one: Row
    other: Row
    divergent: bool | None


@dataclass(frozen=True)
class Divergences:
    """Labels of every token of some answers: 1 where the small model's token diverges, else 0.

    Args:
        answers: as given.
        own: for each answer, the small model's best token at each place of the answer proper [T - given].
        differences: the places at which that is not the large model's; all others have label 0.
        digests: of "small model", "large model" and "vocabulary".
    """

    answers: tuple[LargeAnswer, ...]
    own: tuple[Row, ...]
    differences: tuple[Difference, ...]
    digests: dict[str, str]

    @property
    def tokens(self) -> int:
        """Places in all."""
        return sum(map(len, self.own))

    @property
    def divergent(self) -> int:
        """Places of label 1."""
        return sum(difference.divergent is True for difference in self.differences)


def sentence_ends(vocab: Vocab, *, marks: str = ".!?") -> frozenset[int]:
    """Tokens at which a sentence ends: those whose text ends in a mark or has a line break in it, and end tokens."""
    ends = tuple(mark.encode() for mark in marks)
    found = {i for i, spelt in enumerate(vocab.token_bytes) if b"\n" in spelt or spelt.rstrip(b" ").endswith(ends)}
    return frozenset(found | vocab.eos_ids)


@torch.no_grad()
def find_divergences(
    small: LanguageModel,
    large: LanguageModel,
    answers: Sequence[LargeAnswer],
    *,
    verifier: Verifier | Judge,
    ends: Collection[int] | None = None,
    max_tokens: int = 256,
    max_rows: int = 64,
    on_answer: Callable[[int], object] | None = None,
) -> Divergences:
    """Label y_t = argmax p_small(. | x_<t) at each token x_t of the large model's answers: 1 if it leads elsewhere.

    Where y_t = x_t the label is 0. Elsewhere the small model's token is put in the place of the large one's, the large
    model goes on greedily to the end of the sentence, and the verifier compares that with what the large model had
    written itself, to the end of its own sentence. (Path following at the level of sentences: tokens after the
    sentence are not looked at, unless the verifier does so.) What decides about x_t is what the small model says after
    x_(t-1).

    Args:
        small, large: over one vocabulary.
        answers: the large model's own. Best drawn greedily, as the continuations are: then all that differs between
            two texts comes of the one token.
        verifier: a `Verifier`, or any function of (context, one, other), rows of tokens that begin to differ at the
            first of the latter two. What it cannot decide (None) is left out of training.
        ends: tokens that end a sentence, `sentence_ends(vocab)` by default; end tokens always do.
        max_tokens: of a sentence, from the token that differs.
        max_rows: continuations at work at once.
        on_answer: called with the number of each answer that is done.

    Raises:
        ValueError: the vocabularies differ, there is no answer, or one does not fit the vocabulary or the context.

    Source: R2R, arXiv:2505.21600, sections 3 and 4.1. There a sentence may have 8192 tokens, and the verifier is a
    large instruction-tuned model: see `AskedVerifier`.
    """
    if small.vocab.digest != large.vocab.digest:
        raise ValueError(f"{small.name} and {large.name} have different vocabularies: no token of one is the other's")
    if not answers or max_tokens < 1 or max_rows < 1:
        raise ValueError("there must be at least one answer, and max_tokens and max_rows must be at least 1")
    stops = frozenset(sentence_ends(large.vocab) if ends is None else ends) | large.vocab.eos_ids
    every: list[Row] = []
    found: list[Difference] = []
    for number, answer in enumerate(answers):
        written = answer.tokens[answer.given :]
        own = best_tokens(small, answer)
        every.append(own)
        places = [place for place, (y, x) in enumerate(zip(own, written, strict=True)) if y != x]
        starts = [answer.given + place for place in places]
        others = _continued(large, answer.tokens, starts, [own[place] for place in places], stops, max_tokens, max_rows)
        forks = []
        for start, other in zip(starts, others, strict=True):
            end = _sentence(answer.tokens[start : start + max_tokens], stops) + start
            forks.append(Fork(answer.tokens[:start], answer.tokens[start:end], other, rest=answer.tokens[end:]))
        verdicts = (
            verifier.judge(forks)
            if isinstance(verifier, Verifier)
            else [verifier(fork.context, fork.one, fork.other) for fork in forks]
        )
        for start, fork, verdict in zip(starts, forks, verdicts, strict=True):
            found.append(Difference(number, start, fork.one, fork.other, None if verdict is None else bool(verdict)))
        if on_answer is not None:
            on_answer(number)
    digests = {"small model": small.digest, "large model": large.digest, "vocabulary": small.vocab.digest}
    return Divergences(tuple(answers), tuple(every), tuple(found), digests)


def best_tokens(small: LanguageModel, answer: LargeAnswer) -> Row:
    """argmax p_small at every place of the answer proper, the first of equals."""
    said = small.predict([answer.tokens[:-1]])[:, answer.given - 1 :]
    return tuple(torch.cat([sight.logits.argmax(-1)[0] for sight in sights(said)]).tolist())


def _sentence(tokens: Row, stops: frozenset[int]) -> int:
    """Length of the first sentence of `tokens`, its end included; all of them if it does not end."""
    return next((place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens))


def _continued(
    large: LanguageModel,
    tokens: Row,
    starts: Sequence[int],
    forced: Sequence[int],
    stops: frozenset[int],
    most: int,
    max_rows: int,
) -> list[Row]:
    """For each start t, tokens[:t] read once for all, forced[t] and the large model's greedy continuation."""
    made = [[token] for token in forced]
    if not made:
        return []
    read = large.start()
    large.extend(read, [tokens[:-1]])
    limit = large.context_length
    for begin in range(0, len(starts), max_rows):
        some = range(begin, min(begin + max_rows, len(starts)))
        state = read.fork([0] * len(some))
        state.rewind([len(tokens) - 1 - starts[row] for row in some])
        rows = list(some)
        while True:
            going = [
                place
                for place, row in enumerate(rows)
                if made[row][-1] not in stops
                and len(made[row]) < most
                and (limit is None or starts[row] + len(made[row]) <= limit)
            ]
            if not going:
                break
            if len(going) < len(rows):
                state, rows = state.fork(going), [rows[place] for place in going]
            following = large.extend(state, [[made[row][-1]] for row in rows])
            for row, token in zip(rows, following.logits()[:, -1].argmax(-1).tolist(), strict=True):
                made[row].append(token)
    return [tuple(row) for row in made]

"""Guesses looked up by the longest suffix, in the text itself and in texts given beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row


class Match(NamedTuple):
    """A run of tokens that occurs in a text: the state of its automaton that it leads to, and its length."""

    state: int
    length: int


NOTHING = Match(0, 0)
NEVER = (0, -1)


class Automaton:
    """The smallest automaton that knows every run of tokens of a growing text, and where it occurs.

    A state stands for the runs that end at the same positions; `link` leads to the longest suffix that ends elsewhere
    too. Reading n tokens takes O(n) steps in all, whatever they are; advancing a match by n tokens does too. Numbers of
    occurrences are those of the states below in the tree of links, counted when asked for, and known until more is
    read.

    Source: Blumer et al., The smallest automaton recognizing the subwords of a text, 1985.
    """

    def __init__(self) -> None:
        self.last = Match(0, 0)
        """The whole text."""
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [-1]
        """Of the states that are prefixes of the text, where they end; -1 for others, which were split off."""
        self._below: list[set[int]] = [set()]
        self._known: dict[int, tuple[int, int]] = {}

    def read(self, token: int) -> None:
        """Append a token to the text."""
        self._known.clear()
        length = self.last.length + 1
        new = self._state({}, length, length - 1)
        state = self.last.state
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._hang(new, 0 if state == -1 else self._longest(state, token))
        self.last = Match(new, length)

    def advance(self, match: Match, token: int) -> Match:
        """The longest suffix of the match and this token that occurs."""
        state, length = match
        while token not in self._next[state]:
            if state == 0:
                return NOTHING
            state = self._link[state]
            length = self._length[state]
        return Match(self._next[state][token], length + 1)

    def followed(self, match: Match) -> Match:
        """The longest suffix of the match that occurs with a token (not a separator, below 0) after it."""
        state, length = match
        while state != 0 and all(token < 0 for token in self._next[state]):
            state = self._link[state]
            length = self._length[state]
        return Match(state, length)

    def following(self, match: Match) -> list[int]:
        """The tokens that follow the match."""
        return [token for token in self._next[match.state] if token >= 0]

    def occurrences(self, match: Match, token: int) -> tuple[int, int]:
        """How often the token follows the match, and where it last did."""
        state = self._next[match.state].get(token)
        if state is None:
            return NEVER
        known = self._known.get(state)
        if known is None:
            number, latest, waiting = 0, -1, [state]
            while waiting:
                at = waiting.pop()
                number += self._end[at] >= 0
                latest = max(latest, self._end[at])
                waiting += self._below[at]
            known = self._known[state] = number, latest
        return known

    def _longest(self, state: int, token: int) -> int:
        """The state of the longest run of `state` with this token after it, split off where longer runs share it."""
        found = self._next[state][token]
        length = self._length[state] + 1
        if self._length[found] == length:
            return found
        clone = self._state(dict(self._next[found]), length, -1)
        self._below[self._link[found]].discard(found)
        self._hang(clone, self._link[found])
        self._hang(found, clone)
        while state != -1 and self._next[state].get(token) == found:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _state(self, following: dict[int, int], length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(0)
        self._length.append(length)
        self._end.append(end)
        self._below.append(set())
        return len(self._next) - 1

    def _hang(self, state: int, link: int) -> None:
        self._link[state] = link
        self._below[link].add(state)


@dataclass
class _Reader:
    """What is known of one row: its own text, and where its end occurs in the corpus."""

    text: Automaton = field(default_factory=Automaton)
    found: Match = NOTHING


@method(
    name="SAM-Decoding",
    arxiv="2411.10666",
    access="black",
    summary="guess what mostly followed the longest suffix of the text that occurred before, in it or in a corpus",
)
class SuffixAutomaton(Drafter):
    """Each guess is the most frequent continuation of the longest suffix of text and guesses so far that occurred
    with something after it, in the row's own text or in the corpus; where both know it, their counts are added.

    Of equally frequent ones, the one that last occurred in the text, then in the corpus. A token of text costs O(1)
    steps on average, however long the text; a guess whose suffix was followed by different tokens costs as many as it
    occurred (for the corpus, the first time). The paper copies what followed one occurrence of the text, and counts in
    the corpus only; guesses here choose anew after each token.

    Args:
        corpus: rows of token ids known beforehand, say earlier answers; about 1 kB per token.
        length: guesses per pass.
        shortest: suffixes that are shorter are not looked up.

    Raises:
        ValueError: an argument is below 1, or a token of the corpus below 0.

    Source: Hu et al., SAM Decoding, arXiv:2411.10666, section 3.
    """

    def __init__(self, *, corpus: Sequence[Sequence[int]] = (), length: int = 8, shortest: int = 1) -> None:
        if length < 1 or shortest < 1:
            raise ValueError(f"length and shortest must be at least 1, got {length} and {shortest}")
        self.length, self.shortest = length, shortest
        self._corpus = Automaton()
        for number, row in enumerate(corpus):
            for token in row:
                if token < 0:
                    raise ValueError(f"a corpus is made of token ids, got {token}")
                self._corpus.read(token)
            self._corpus.read(-1 - number)  # stands once only, so that nothing goes on from one row into the next
        self._highest = max((max(row) for row in corpus if len(row)), default=-1)
        self._readers: dict[int, _Reader] = {}
        self._ends: frozenset[int] = frozenset()

    def check(self, target: LanguageModel) -> None:
        if self._highest >= target.vocab.size:
            raise ValueError(f"the corpus has token {self._highest}, and {target.name} has {target.vocab.size} tokens")
        self._ends = frozenset(target.vocab.eos_ids)

    def propose(self, rows: Sequence[Row]) -> Draft:
        return Draft(tuple(self._guess(row) for row in rows))

    def leave(self, ticket: int) -> None:
        self._readers.pop(ticket, None)

    def _guess(self, row: Row) -> Branches:
        reader = self._readers.setdefault(row.running.ticket, _Reader())
        text, corpus = reader.text, self._corpus
        for token in row.context[text.last.length :]:
            text.read(token)
            reader.found = corpus.advance(reader.found, token)
        ends = frozenset[int]() if row.running.request.ignore_eos else self._ends
        here, there = text.last, reader.found
        tokens: list[int] = []
        while len(tokens) < min(self.length, row.room) and not (tokens and tokens[-1] in ends):
            guess = self._following(text, here, there)
            if guess is None:
                break
            tokens.append(guess)
            here, there = text.advance(here, guess), corpus.advance(there, guess)
        return Branches.chosen(tokens, range(ROOT, len(tokens) - 1))

    def _following(self, text: Automaton, here: Match, there: Match) -> int | None:
        """The most frequent continuation of the longer of two matches, of the text and of the corpus."""
        here, there = text.followed(here), self._corpus.followed(there)
        longest = max(here.length, there.length)
        if longest < self.shortest:
            return None
        of_text, of_corpus = here.length == longest, there.length == longest
        tokens: set[int] = {
            *(text.following(here) if of_text else ()),
            *(self._corpus.following(there) if of_corpus else ()),
        }
        if len(tokens) == 1:
            return tokens.pop()

        def vote(token: int) -> tuple[int, int, int]:
            count, latest = text.occurrences(here, token) if of_text else NEVER
            more, elsewhere = self._corpus.occurrences(there, token) if of_corpus else NEVER
            return count + more, latest, elsewhere

        return max(tokens, key=vote)

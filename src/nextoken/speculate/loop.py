"""SpeculativeLoop: the decoding loop in which every pass of the target verifies a draft."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from nextoken.decode.generate import derived_seed
from nextoken.decode.loop import Loop, alike, context_of, is_greedy
from nextoken.decode.request import Piece, Running
from nextoken.decode.transform import check_possible, normalise
from nextoken.model.base import LanguageModel
from nextoken.model.next import Next
from nextoken.speculate.acceptance import Acceptance, Candidates, Recursive
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row

T = TypeVar("T")
_DRAFTING = 1 << 20  # of a request's derived seeds, the one for drafting: no call generates so many texts of a prompt


@dataclass
class Tally:
    """What speculation has done so far.

    Args:
        passes: rows times passes of the target.
        tokens: that came of them; tokens / passes is what one pass of the target gives (1 without speculation).
        drafted: nodes guessed.
        accepted: nodes that stood.
        failures: times the drafter failed.
    """

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    failures: int = 0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else float("nan")


@dataclass(frozen=True)
class Speculation:
    """A drafter and the rule by which its guesses stand; given to `nextoken.generate(..., speculate=...)`.

    Args:
        drafter: what guesses.
        acceptance: which guesses stand; the default is lossless for every drafter.
        tally: filled as it runs.
    """

    drafter: Drafter
    acceptance: Acceptance = field(default_factory=Recursive)
    tally: Tally = field(default_factory=Tally)

    def loop(self, model: LanguageModel, *, max_rows: int = 64, entropies: bool = False) -> SpeculativeLoop:
        """A decoding loop of this target."""
        return SpeculativeLoop(model, self, max_rows=max_rows, entropies=entropies)


class SpeculativeLoop(Loop):
    """`Loop` whose every step feeds each row's last token together with a draft, and draws as many tokens as stand.

    The law of the output is that of `Loop` for every lossless rule, whatever the drafter does. A drafter that fails is
    given up with a warning, and so is one that cannot guess for the target; decoding goes on without it.
    """

    def __init__(
        self, model: LanguageModel, speculation: Speculation, *, max_rows: int = 64, entropies: bool = False
    ) -> None:
        super().__init__(model, max_rows=max_rows, entropies=entropies)
        self.drafter: Drafter | None = speculation.drafter
        self.acceptance, self.tally = speculation.acceptance, speculation.tally
        self._generators: dict[int, torch.Generator] = {}
        self._guarded("start", lambda drafter: self._suits(drafter, model))

    @staticmethod
    def _suits(drafter: Drafter, model: LanguageModel) -> None:
        if drafter.needs_trees and not model.supports_trees:
            raise ValueError(f"it guesses trees, and {model.name} takes chains only: draft a chain")
        drafter.check(model)

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Let waiting requests join, then draft, verify, and draw at least one token for every row."""
        pieces = self._begin()
        if not self._rows:
            return pieces
        rows = [self._row(running, place) for place, running in enumerate(self._rows)]
        draft = self._proposed(rows)
        judged, said = self._verified(rows, draft)
        self.steps += 1
        self.slots += len(rows)
        grown, accepted = self._walk(draft, judged)
        assert self._state is not None
        self._state.keep([[0, *(node + 1 for node in nodes)] for nodes in accepted])
        self._guarded("observe", lambda drafter: drafter.observe(rows, draft, said, accepted))
        self.tally.passes += len(rows)
        self.tally.tokens += len(grown)
        self.tally.drafted += sum(map(len, draft.rows))
        self.tally.accepted += sum(map(len, accepted))
        self._dismiss(grown)
        return [*pieces, *grown]

    def _verified(self, rows: Sequence[Row], draft: Draft) -> tuple[Next, Next]:
        """What the target says [B, size] after every node fed: what guesses are judged by, what drafters see."""
        assert self._state is not None
        tokens = draft.tokens([row.context[-1] for row in rows])
        said = self.model.extend(self._state, tokens, None if draft.is_chain else draft.parents())
        return said, said

    def _begin(self) -> list[Piece]:
        """Read waiting prompts and draw their first tokens, so that every row has one that is not fed."""
        joining, state, logits = self._prefill()
        if state is None or logits is None:
            return []
        self._state = state if self._state is None else self._state.join(state)
        self._rows += joining
        drawn, surprisals = self._draw(joining, logits)
        steps = zip(joining, drawn, surprisals, self._said(logits), strict=True)
        pieces = [self._advance(*step) for step in steps]
        self._dismiss(pieces)
        return pieces

    def _heard(self, joining: Sequence[Running], said: Next, source: Sequence[int]) -> None:
        rows = [self._row(running) for running in joining]
        heard = said if list(source) == list(range(said.shape[0])) else said[list(source)]
        self._guarded("read prompts", lambda drafter: drafter.prompted(rows, heard))

    def _row(self, running: Running, place: int | None = None) -> Row:
        """The row as a drafter sees it."""
        request, count = running.request, len(running.tokens)
        room = request.max_tokens - count - 1
        if self.model.context_length is not None:
            room = min(room, self.model.context_length - len(request.prompt) - count)
        generator = self._generators.get(running.ticket)
        if generator is None:
            generator = torch.Generator().manual_seed(derived_seed(request.seed, _DRAFTING) >> 1)
            self._generators[running.ticket] = generator
        context = (*request.prompt, *running.tokens)
        return Row(running, context, room, generator, None if place is None else self._state, place or 0)

    def _proposed(self, rows: Sequence[Row]) -> Draft:
        nothing = Draft((Branches(),) * len(rows))
        draft = self._guarded("propose", lambda drafter: _checked(drafter.propose(rows), rows, self.model))
        return nothing if draft is None else draft

    def _guarded(self, action: str, call: Callable[[Drafter], T]) -> T | None:
        """What the drafter says; if it fails it is given up, and no token is lost."""
        if self.drafter is None:
            return None
        try:
            return call(self.drafter)
        except Exception as error:  # whatever a drafter of anybody's does, the text goes on
            warnings.warn(
                f"{type(self.drafter).__name__} failed to {action} ({error}); decoding goes on without it", stacklevel=4
            )
            self.tally.failures += 1
            self.drafter = None
            return None

    def _walk(self, draft: Draft, said: Next) -> tuple[list[Piece], list[list[int]]]:
        """From the last token of each row down its tree, as far as guesses stand, and one token more.

        Returns:
            The pieces in the order drawn, and the nodes accepted of each row.
        """
        pieces: list[Piece] = []
        accepted: list[list[int]] = [[] for _ in draft.rows]
        at = dict.fromkeys(range(len(draft.rows)), ROOT)
        while at:
            # In the order of the rows, one node of each: logits of nodes that are not reached are never computed.
            walking = sorted(at)
            if not any(accepted):
                here = (said if said.shape[1] == 1 else said[:, :1]).logits()[:, 0]
            else:
                reached = torch.zeros(said.shape, dtype=torch.bool)
                reached[walking, [at[index] + 1 for index in walking]] = True
                here = said[reached].logits()[:, 0]
            following: dict[int, int] = {}
            steps = zip(walking, self._laws([self._rows[i] for i in walking], here), self._said(here), strict=True)
            for index, law, entropy in steps:
                running, branches = self._rows[index], draft.rows[index]
                children = branches.candidates.get(at[index], ())
                token, surprisal = self._chosen(law, running, branches, at[index])
                piece = self._advance(running, token, surprisal, entropy)
                pieces.append(piece)
                node = next((child for child in children if branches.tokens[child] == token), None)
                if node is not None:
                    accepted[index].append(node)
                    if piece.finish is None:
                        following[index] = node
            at = following
        return pieces, accepted

    def _laws(self, rows: Sequence[Running], logits: Tensor) -> list[Tensor | int]:
        """What each row draws from: p [V] in float64, or the token that a greedy transform leaves."""
        laws: list[Tensor | int] = [0] * len(rows)
        for members in alike(rows):
            some = [rows[index] for index in members]
            transform = some[0].request.transform
            scores = transform(logits[members], context_of(some, self.model, transform))
            if is_greedy(transform):
                found: Sequence[Tensor | int] = check_possible(scores).argmax(-1).tolist()
            else:
                found = list(normalise(scores).exp().double().cpu())
            for index, law in zip(members, found, strict=True):
                laws[index] = law
        return laws

    def _chosen(self, law: Tensor | int, running: Running, branches: Branches, node: int) -> tuple[int, float]:
        """The token that follows a node, and its surprisal under the target's law."""
        if isinstance(law, int):
            return law, 0.0
        candidates = Candidates(
            [branches.tokens[child] for child in branches.candidates.get(node, ())],
            None if branches.laws is None else branches.laws.get(node),
            branches.replacement,
        )
        token = self.acceptance(law, candidates, running.uniform)
        return token, -math.log(float(law[token]))

    def _dismiss(self, pieces: Sequence[Piece]) -> None:
        """Let the rows that these pieces finish leave."""
        over = {piece.ticket for piece in pieces if piece.finish is not None}
        self._leave([row.ticket in over for row in self._rows])

    def _leave(self, gone: Sequence[bool]) -> None:
        for row, over in zip(self._rows, gone, strict=True):
            if over:
                self._generators.pop(row.ticket, None)
                self._guarded("leave", partial(_leave, ticket=row.ticket))
        super()._leave(gone)


def _leave(drafter: Drafter, ticket: int) -> None:
    drafter.leave(ticket)


def _checked(draft: Draft, rows: Sequence[Row], model: LanguageModel) -> Draft:
    """The draft, if it is one of these rows that the target can be fed."""
    if len(draft.rows) != len(rows):
        raise ValueError(f"{len(draft.rows)} trees for {len(rows)} rows")
    for branches, row in zip(draft.rows, rows, strict=True):
        depths: list[int] = []
        for node, parent in enumerate(branches.parents):
            if not ROOT <= parent < node:
                raise ValueError("a node comes before its parent")
            depths.append(1 + (depths[parent] if parent != ROOT else 0))
        if max(depths, default=0) > row.room:
            raise ValueError(f"a guess goes on for {max(depths)} tokens where {row.room} fit")
        if any(not 0 <= token < model.vocab.size for token in branches.tokens):
            raise ValueError("a token is outside the vocabulary")
    return draft

"""Auto: which drafter guesses, how wide and how deep, or none, by what was measured so far."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.next import Next
from nextoken.speculate.arms import Arm, Family, drafted, places_along, places_of, plain_families
from nextoken.speculate.costs import Costs
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row
from nextoken.speculate.tree_template import Place

_WARM = 3  # passes at first: where kernels are made when first needed, these are not like the others
_AGAIN = 64  # passes after which a plain one is measured again
_SURE = 0.97  # of a plain pass: what costs more per token is not worth changing for
_GUESSING = 1e-3  # seconds a row, until it is measured
_LEARNING = 1e-4  # seconds a place, until it is measured
_DECIDING = 0.005  # most of the time spent on deciding
_FORGOTTEN = 1000  # passes after which a draft model that lost is supposed the best again


@dataclass
class _Shadow:
    """A guess that was not fed: the text, as it goes on, tells what would have stood."""

    family: Family
    branches: Branches
    begin: int
    """Length of the text when it was made."""
    room: int
    told: int = 0
    """Depth of the trees for which it was counted."""


@dataclass(frozen=True)
class _Pass:
    """A pass under way."""

    begun: float
    fed: float
    arm: Arm | None


@method(
    name="Adaptive speculation",
    access="gray",
    summary="choose drafter, width and depth of drafts by measured cost and acceptance, never much slower than none",
)
class Auto(Drafter):
    """Before each pass the arm of least (c(b, 1 + s n) + d) / g, none among them: g tokens per row and pass, c the
    seconds of a pass over b rows (`Costs`), s the share of passes with a guess, n its nodes, d the seconds of guessing.

    Arms are prompt lookup, the suffix automaton, recycling and STAND, and where one is given a draft model, each in
    trees of several widths and depths. g, s, n of those without a model are learnt without feeding them: a guess is
    compared with the text as it goes on (`Follow` would let stand just what agrees), and one look at a large tree
    tells of all trees within it. A draft model's are learnt by trying, the best being supposed at first.

    It starts plain, and the time T spent stays below (1 + slack) P, P the time plain decoding would have taken for the
    same tokens (tokens per row times the median plain pass): an arm that is not plain is played, and guesses are made
    or learnt from on the side, only if this would still hold should nothing stand, at the most that the pass may cost
    by what was measured. For the first pass of two tokens that is 1 / slack plain passes after the start, and for the
    first guesses of a draft model as many again and more, so texts below some 20 tokens are decoded plainly; give the
    same speculation to every call and it need not start anew. What is spent on the side is at most half of slack. P is
    measured within a loop that can speculate, which itself takes some tenths of a millisecond per pass more than one
    that cannot: with targets of a few milliseconds a pass that is not made up for.

    **Law and seeds.** The arm of a pass is chosen before the pass's guesses are made, by what was said before and how
    long it took, so a lossless rule stays lossless. Since times decide, a seed fixes the text under `Follow` only,
    where tokens are those of plain decoding whatever is guessed (but for rounding, where passes over more tokens round
    differently); under `Recursive` it fixes no more than the law.

    Args:
        draft: a cheaper model over the same vocabulary, or none.
        slack: share of plain decoding's time that may be lost at any moment.
        clock: seconds since some moment; the time it tells between proposals and observations is the target's.

    Attributes:
        passes: how many were made by each arm; `plain` those without guesses.
        seconds: spent so far, from proposal to observation.
        plain_seconds: P.

    Raises:
        ValueError: slack is not above 0, or the draft tells only its most probable tokens.

    Source: Hou et al. (BanditSpec), arXiv:2505.15141, choose between settings as arms of a bandit by what they
    accept; here by time, and with a budget: exploring only as far as the loss against a known action stays below a
    share is that of Wu et al., Conservative Bandits, arXiv:1602.04282.
    """

    def __init__(
        self,
        *,
        draft: LanguageModel | None = None,
        slack: float = 0.05,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not slack > 0:
            raise ValueError(f"slack must be above 0, got {slack}: it pays for finding out what is fast")
        self.slack = slack
        self.seconds = self.plain_seconds = 0.0
        self.passes: Counter[str] = Counter()
        self._clock = clock
        self._families = [*plain_families(), *([] if draft is None else [drafted(draft)])]
        self._arms: list[Arm] = []
        self._costs = Costs()
        self._target: LanguageModel | None = None
        self._aside = 0.0
        self._shadows: dict[tuple[str, int], _Shadow] = {}
        self._turn = 0
        self._decided: tuple[Arm | None, float] = None, 0.0
        self._decided_at = -math.inf
        self._deciding = 0.0
        self._decided_rows = 0
        self._pass: _Pass | None = None

    def check(self, target: LanguageModel) -> None:
        for family in self._families:
            for arm in family.arms:
                family.aim(arm.widths).check(target)
            family.met.clear()  # tickets are those of one loop
        self._shadows.clear()
        self._arms = [a for f in self._families for a in f.arms if target.supports_trees or not a.branches]
        if target is not self._target:
            self._target, self._costs = target, Costs()
            self.seconds = self.plain_seconds = self._aside = 0.0
            self._decided_at = -math.inf

    def propose(self, rows: Sequence[Row]) -> Draft:
        begun = self._clock()
        self._settle(rows)
        arm = self._choice(len(rows))
        nothing = Draft((Branches(),) * len(rows))
        draft = nothing if arm is None else arm.family.propose(arm, rows, self._clock)
        self._look(rows, arm)
        self._pass = _Pass(begun, self._clock(), arm)
        return draft

    def observe(self, rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        assert self._pass is not None
        under_way, arm, number = self._pass, self._pass.arm, len(rows)
        seconds = self._clock() - under_way.fed
        if draft.size == 1:
            self.plain_seconds += seconds
        else:
            plain = self._costs.plain(number)
            assert plain is not None
            self.plain_seconds += plain * sum(len(nodes) + 1 for nodes in accepted) / number
        self._costs.record(number, draft.size, seconds, trees=not draft.is_chain)
        self.passes["plain" if arm is None else arm.name] += 1
        if arm is not None:
            arm.family.at = self.passes.total()
            stood = [places_along(*pair) for pair in zip(draft.rows, accepted, strict=True)]
            arms = [other for other in arm.family.arms if other.places <= arm.places]
            self._tell(arms, draft.rows, stood, [row.room for row in rows])
        self._learn(rows, draft, said, accepted)
        self.seconds += self._clock() - under_way.begun

    def leave(self, ticket: int) -> None:
        for family in self._families:
            family.drafter.leave(ticket)
            family.met.discard(ticket)
            self._shadows.pop((family.name, ticket), None)

    def _may(self, seconds: float, *, earned: float = 0.0) -> bool:
        """Whether T may grow by this, with P growing by what is earned."""
        return self.seconds + seconds <= (1 + self.slack) * (self.plain_seconds + earned)

    def _may_aside(self, seconds: float, share: float = 1 / 2) -> bool:
        """Whether this may be spent on what does not bring the text on, all of it at most a share of slack."""
        within = self.seconds + seconds <= (1 + self.slack / 2) * self.plain_seconds
        return within and self._aside + seconds <= share * self.slack * self.seconds

    def _choice(self, rows: int) -> Arm | None:
        """The arm of this pass, None for a plain one."""
        plain = self._costs.plain(rows)
        if plain is None or self.passes.total() < _WARM or self._costs.plain_age(rows) > _AGAIN:
            return None
        now = self._clock()
        if rows != self._decided_rows or self._deciding <= _DECIDING * (now - self._decided_at):
            self._decided, self._decided_rows = self._decide(rows, plain), rows
            self._decided_at = self._clock()
            self._deciding = self._decided_at - now
        arm, excess = self._decided
        return arm if self._may(plain + excess, earned=plain) else None

    def _decide(self, rows: int, plain: float) -> tuple[Arm | None, float]:
        """The best arm that is allowed, and how much longer than a plain pass it may take at most."""
        best: tuple[Arm | None, float] = None, 0.0
        least = _SURE * plain
        for arm in self._arms:
            family = arm.family
            if family.is_model and self.passes.total() - family.at > _FORGOTTEN:
                family.hope(self.passes.total())
            each = family.learning.or_else(_LEARNING) * rows if family.learns else 0.0
            little, much = self._guessing(arm, rows, plain)
            low, _ = self._costs.bounds(rows, 1 + math.ceil(arm.nodes.value), trees=arm.branches)
            expected = plain + arm.share.value * (low - plain + each * arm.nodes.value) + each + little
            if expected >= least * arm.gain.value:
                continue
            size = 1 + len(arm.places)
            excess = self._costs.bounds(rows, size, trees=arm.branches)[1] - plain + much + each * size
            if self._may(plain + excess, earned=plain):
                best, least = (arm, excess), expected / arm.gain.value
        return best

    def _guessing(self, arm: Arm, rows: int, plain: float) -> tuple[float, float]:
        """Seconds that an arm's guesses take at least and at most."""
        family = arm.family
        each = arm.seconds.or_else(family.seconds.value)
        if not math.isnan(each):
            return (each * family.work(arm, rows),) * 2
        # A draft model is no slower than its target, and has to read the text first.
        return (0.0, (arm.depth + 1) * plain) if family.is_model else (_GUESSING * rows,) * 2

    def _look(self, rows: Sequence[Row], played: Arm | None) -> None:
        """Let families guess for one row, on the side, to see what of it the text will bring."""
        self._turn += 1
        row = rows[self._turn % len(rows)]
        for number in range(len(self._families)):
            family = self._families[(self._turn + number) % len(self._families)]
            arm, key = family.arms[-1], (family.name, row.running.ticket)
            if family.is_model or key in self._shadows or row.room < 1:
                continue
            if played is not None and played.family is family and played.places >= arm.places:
                continue
            if not self._may_aside(family.seconds.or_else(_GUESSING / len(arm.places)) * len(arm.places)):
                continue
            begun = self._clock()
            (branches,) = family.propose(arm, [row], self._clock).rows
            self._shadows[key] = _Shadow(family, branches, len(row.context), row.room)
            self._aside += self._clock() - begun

    def _settle(self, rows: Sequence[Row]) -> None:
        """Count what stood of guesses on the side, where the text is far enough to tell."""
        if not self._shadows:
            return
        contexts = {row.running.ticket: row.context for row in rows}
        for key, shadow in list(self._shadows.items()):
            text = contexts.get(key[1])
            if text is None:
                continue
            said = len(text) - shadow.begin
            path, is_over = _followed(shadow.branches, text[shadow.begin :])
            # A shallow tree need not wait for what becomes of a deeper one.
            sure = [a for a in shadow.family.arms if a.depth > shadow.told and (is_over or a.depth <= said)]
            if sure:
                self._tell(sure, [shadow.branches], [places_along(shadow.branches, path)], [shadow.room])
            shadow.told = said
            if is_over:
                del self._shadows[key]

    def _tell(
        self,
        arms: Sequence[Arm],
        guesses: Sequence[Branches],
        stood: Sequence[Sequence[Place]],
        rooms: Sequence[int],
    ) -> None:
        """Take in what stood of guesses within a tree that holds those of the arms: the places, from the root.

        Where a text had no room for all of an arm's levels, what stood says nothing of it.
        """
        held = [frozenset(places_of(branches)) for branches in guesses]
        for arm in arms:
            able = [number for number, room in enumerate(rooms) if room >= arm.depth]
            if not able:
                continue
            arm.gain.add(1 + sum(len(arm.places.intersection(stood[number])) for number in able) / len(able))
            nodes = max(len(arm.places & held[number]) for number in able)
            arm.share.add(float(nodes > 0))
            if nodes:
                arm.nodes.add(nodes)

    def _learn(self, rows: Sequence[Row], draft: Draft, said: Next, accepted: Sequence[Sequence[int]]) -> None:
        """Let the family at play learn, and others where there is time for it."""
        assert self._pass is not None
        played = None if self._pass.arm is None else self._pass.arm.family
        places = len(rows) * draft.size
        for family in self._families:
            is_played = family is played
            if not family.learns or not (
                is_played or self._may_aside(family.learning.or_else(_LEARNING) * places, 1 / 6)
            ):
                continue
            begun = self._clock()
            family.drafter.observe(rows, draft, said, accepted)
            spent = self._clock() - begun
            family.learning.add(spent / places)
            self._aside += 0.0 if is_played else spent


def _followed(branches: Branches, text: Sequence[int]) -> tuple[list[int], bool]:
    """The nodes of the tree that the text goes through, and whether it can go through no more."""
    path: list[int] = []
    at = ROOT
    for token in text:
        node = next((child for child in branches.candidates.get(at, ()) if branches.tokens[child] == token), None)
        if node is None:
            return path, True
        path.append(node)
        at = node
    return path, not branches.candidates.get(at)

"""Choosing thresholds, length and floor of a draft with exits, by what they would cost on texts of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.next import Next
from nextoken.model.sorted_exits import SortedExits
from nextoken.speculate.draft_model import DraftModel
from nextoken.speculate.shapes import Chain
from nextoken.speculate.sure import Sure

_BATCH = 16
_LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class ExitReadings:
    """What a draft's exits and a target say along texts of the target.

    Args:
        exits: of the draft.
        chances: max_v p_j(v) [k, R, T] at each exit before each of T tokens of R texts.
        overlaps: sum_v min(p(v), q_j(v)) [k, R, T], the chance that a guess drawn at exit j stands; where decoding is
            greedy 1 if the best token of both is the same, else 0.
        lengths: tokens of each text; what is right of them is 0.
    """

    exits: tuple[int, ...]
    chances: Tensor
    overlaps: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class DraftCosts:
    """Costs of a draft, in passes of the target.

    Args:
        layer: of one layer on one token.
        head: of asking an exit once: a product with the head.
        look: of whatever else there is to do for a guess.
        guess: by which a guess lengthens the pass that verifies it.
    """

    layer: float
    head: float
    look: float = 0.0
    guess: float = 0.0

    def __post_init__(self) -> None:
        if min(self.layer, self.head, self.look, self.guess) < 0:
            raise ValueError(f"costs must be at least 0, got {self}")


@dataclass(frozen=True)
class ExitChoice:
    """A setting, and what it is expected to do.

    Args:
        thresholds, length, floor: of `SortedExits.at`, `Chain` and `Sure`.
        cost: passes of the target that a token costs, drafting counted; a plain token costs 1.
        tokens_per_pass: of the target.
    """

    thresholds: tuple[float, ...]
    length: int
    floor: float
    cost: float
    tokens_per_pass: float

    def drafter(self, draft: SortedExits) -> DraftModel:
        """The draft in this setting."""
        return DraftModel(draft.at(self.thresholds), Sure(self.floor, Chain(self.length)))


@torch.no_grad()
def exit_readings(
    draft: SortedExits,
    target: LanguageModel,
    responses: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    temperature: float = 1.0,
) -> ExitReadings:
    """Read texts of the target once by both.

    Args:
        draft: its thresholds do not matter.
        target: over the same vocabulary.
        responses: pairs of a prompt and what the target said after it, token ids. They are to be like what will be
            asked, and not what the choice will be judged by.
        temperature: at which the target will be decoded and these texts were; 0 for greedy. How sure an exit is, is
            seen at 1.

    Raises:
        ValueError: the vocabularies differ, a prompt or response is empty, or no response has two tokens.
    """
    if target.vocab.digest != draft.vocab.digest:
        raise ValueError(f"{draft.name} and {target.name} have different vocabularies")
    if not responses or any(not prompt or not output for prompt, output in responses):
        raise ValueError("there must be responses, and every prompt and every response needs at least one token")
    if all(len(output) < 2 for _, output in responses):
        raise ValueError("a response must have two tokens for one to be guessed, and none has")
    lengths = tuple(len(output) for _, output in responses)
    k, longest = len(draft.exits), max(lengths)
    chances, overlaps = torch.zeros(2, k, len(responses), longest)
    for start in range(0, len(responses), _BATCH):
        some = responses[start : start + _BATCH]
        rows = [[*prompt, *output[:-1]] for prompt, output in some]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows])
        said = target.predict(ids)
        exits = [draft.stack.next(hidden) for hidden in draft.states(ids.clamp(min=0))]
        for number, (prompt, output) in enumerate(some):
            places = slice(len(prompt) - 1, len(prompt) + len(output) - 1)
            p = said[number, places].logits()[0].cpu()
            for j, following in enumerate(exits):
                here = (j, start + number, slice(len(output)))
                chances[here], overlaps[here] = _compared(p, following[number, places], temperature)
    return ExitReadings(draft.exits, chances, overlaps, lengths)


def expected(
    readings: ExitReadings, thresholds: Sequence[float], *, length: int, floors: Sequence[float], costs: DraftCosts
) -> list[ExitChoice]:
    """What one setting of thresholds and length costs per token at each of several floors.

    A pass from token s on looks at n places, says m + 1 tokens of which m were guessed, and costs

        1 + guess g + look n + head sum_{looks} (exits asked) + layer sum_j (e_j - e_{j-1}) max(m + 1, d_j)

    g the guesses (the looks but for one that ends in giving up), d_j the looks up to the last that went to exit j: what
    is kept goes through all layers sooner or later, what is rejected only as far as it had to. The next pass begins at
    s + m + 1. After a rejected guess the looks are taken to be those along the target's own text. The expectation over
    m is exact, by recursion from the end of each text.

    Raises:
        ValueError: length below 1, or not one threshold for each exit but the last.
    """
    k = len(readings.exits)
    if length < 1 or len(thresholds) != k - 1:
        raise ValueError(
            f"length must be at least 1 and there is one threshold for each exit but the last; got {length} and "
            f"{tuple(thresholds)} for exits {readings.exits}"
        )
    level, judged = _left(readings.chances, thresholds)
    sure = readings.chances.gather(0, level[None])[0]
    stands = readings.overlaps.gather(0, level[None])[0]
    texts, longest = level.shape
    ends = torch.tensor(readings.lengths)
    offsets = torch.arange(longest)[:, None] + torch.arange(length)
    # A text's last token is never guessed: the pass that could say so says it anyway.
    inside = offsets < ends[:, None, None] - 1
    at = offsets.clamp(max=longest - 1)
    settled = sure[:, at] >= torch.tensor(floors)[:, None, None, None]  # [F, R, T, K]
    guessed = (settled & inside).cummin(-1).values
    looked = torch.cat([torch.ones_like(guessed[..., :1]), guessed[..., :-1]], -1) & inside
    stand = torch.where(guessed, stands[:, at], 0.0).double()
    alive = torch.cat([torch.ones_like(stand[..., :1]), stand.cumprod(-1)], -1)
    chance = alive - torch.cat([alive[..., 1:], torch.zeros_like(alive[..., :1])], -1)  # of m = 0..K
    said = torch.arange(1, length + 2)
    spent = 1 + costs.guess * guessed.sum(-1) + (looked * (costs.look + costs.head * judged[:, at])).sum(-1)
    for j, (below, above) in enumerate(pairwise((0, *readings.exits))):
        deep = looked & (level[:, at] >= j)
        reads = (deep * torch.arange(1, length + 1)).amax(-1)
        kept = torch.maximum(reads[..., None], said) if bool((level >= j).any()) else torch.zeros_like(said)
        spent = spent + costs.layer * (above - below) * (chance * kept).sum(-1)
    cost, passes = torch.zeros(2, len(floors), texts, longest + length + 1, dtype=torch.float64)
    for s in reversed(range(1, longest)):  # each begins where one before it ended
        after = slice(s + 1, s + length + 2)
        running = s < ends
        cost[..., s] = torch.where(running, spent[..., s] + (chance[..., s, :] * cost[..., after]).sum(-1), 0.0)
        passes[..., s] = torch.where(running, 1 + (chance[..., s, :] * passes[..., after]).sum(-1), 0.0)
    tokens = float((ends - 1).sum())
    return [
        ExitChoice(
            tuple(thresholds), length, floor, float(cost[f, :, 1].sum()) / tokens, tokens / float(passes[f, :, 1].sum())
        )
        for f, floor in enumerate(floors)
    ]


def choose_exits(
    readings: ExitReadings,
    *,
    costs: DraftCosts,
    thresholds: Sequence[Sequence[float]] | None = None,
    lengths: Sequence[int] = tuple(range(1, 9)),
    floors: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
) -> ExitChoice:
    """The setting of least expected cost per token, of all combinations of these values; see `expected`.

    Args:
        readings: along texts like those that will be asked.
        costs: of the draft beside the target: measure them.
        thresholds: those to choose from, one for each exit but the last; by default all of 0, 0.2, 0.4, 0.6, 0.8, 0.9
            and 1, in any combination.
        lengths, floors: of the drafts.

    Source: Sorted Speculative Decoding, arXiv:2407.01955, tunes thresholds for each target by trial. The cost model
    counts, beyond layers by exit, products with the head and catching up.
    """
    if thresholds is None:
        # Above an exit that always speaks the others do not matter.
        thresholds = [
            levels
            for levels in product(_LEVELS, repeat=len(readings.exits) - 1)
            if not any(low == 0 and high != 1 for low, high in pairwise(levels))
        ]
    found = [
        choice
        for levels, length in product(thresholds, lengths)
        for choice in expected(readings, levels, length=length, floors=floors, costs=costs)
    ]
    return min(found, key=lambda choice: choice.cost)


def _left(chances: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Number of the exit that speaks [R, T], and how many exits are asked there."""
    k = len(chances)
    level, judged = torch.full(chances.shape[1:], k - 1), torch.ones(chances.shape[1:], dtype=torch.long)
    for j in reversed(range(k - 1)):
        threshold = thresholds[j]
        if threshold >= 1:
            continue
        speaks = chances[j] >= threshold
        level, judged = torch.where(speaks, j, level), torch.where(speaks, 1, judged + 1)
    return level, judged


def _compared(p: Tensor, following: Next, temperature: float) -> tuple[Tensor, Tensor]:
    """Largest probability of the draft, and chance that its guess stands [n], target logits [n, V] given."""
    q = following.logits()[0].cpu()
    sure = torch.softmax(q, -1).amax(-1)
    if temperature == 0:
        return sure, (p.argmax(-1) == q.argmax(-1)).float()
    both = torch.minimum(torch.softmax(p / temperature, -1), torch.softmax(q / temperature, -1))
    return sure, both.sum(-1)

"""Drafting that stops where a guess has probably failed: the rule, its theory, the head, and the law of the output."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nextoken
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request, Running
from nextoken.errors import ModelError
from nextoken.model.base import LanguageModel, State
from nextoken.model.hf import HFModel
from nextoken.model.next import DenseNext, Next
from nextoken.model.table import TableModel
from nextoken.speculate import (
    AcceptanceExample,
    AcceptanceHead,
    AcceptanceRecipe,
    Branches,
    Chain,
    Draft,
    Drafter,
    DraftModel,
    Follow,
    Row,
    Speculation,
    StoppingDraft,
    StoppingRule,
    acceptance_examples,
    fit_acceptance,
    predicted_chances,
    stopping_bound,
)
from nextoken.speculate.acceptance_fit import weighted_loss
from nextoken.testing import check_language_model, check_speculation


class _SeenNext(DenseNext):
    """A table's distributions, its probabilities standing for hidden states."""

    @property
    def hidden(self) -> Tensor:
        return self._logits.exp().float()

    def _take(self, rows: Tensor, columns: Tensor) -> _SeenNext:
        return _SeenNext(self._logits[rows, columns])


class _SeenTable(TableModel):
    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        return _SeenNext(super()._feed(state, tokens, parents).logits())


SIZE = 5  # a, b, c, <bos>, <eos>
TARGET = TableModel.random(3, order=2, eos=True, seed=1, name="target")
DRAFT = _SeenTable.random(3, order=1, eos=True, seed=7, concentration=0.7, name="draft")


def random_head(scale: float = 4.0, seed: int = 0) -> AcceptanceHead:
    """A head whose chances are far apart."""
    head = AcceptanceHead(SIZE, seed=seed)
    with torch.no_grad():
        head.outer.weight.mul_(scale)
    return head


def constant_head(chance: float, width: int = SIZE) -> AcceptanceHead:
    head = AcceptanceHead(width, layers=0)
    with torch.no_grad():
        head.outer.weight.zero_()
        head.outer.bias.copy_(torch.tensor([math.log1p(-chance), math.log(chance)]))
    return head


def row_of(context: tuple[int, ...], *, ticket: int = 0, room: int = 50, rule: str = "", seed: int = 0) -> Row:
    running = Running(ticket, Request(context, transform(rule), 100, seed=seed, ignore_eos=True))
    return Row(running, context, room, torch.Generator().manual_seed(seed))


def outputs(loop: Loop, rule: str, count: int, length: int) -> list[tuple[int, ...]]:
    change = transform(rule)
    tickets = [loop.submit(Request((3, 0, 1), change, length, seed=100 + number)) for number in range(count)]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [tuple(found[ticket]) for ticket in tickets]


# The law.


@pytest.mark.paper("2405.19715")
@pytest.mark.parametrize("head", [random_head(), constant_head(0.7)], ids=["random", "constant"])
def test_the_law_is_kept_whatever_the_head_says(head: AcceptanceHead) -> None:
    """False alarm 1e-4."""

    def speculation() -> Speculation:
        return Speculation(StoppingDraft(DRAFT, head, StoppingRule(0.4, most=6)))

    check_speculation(TARGET, speculation, prompts=2, seed=3)


class _Suspicious(Drafter):
    """The cheat: guesses of which the draft itself was not sure are taken back."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter

    def propose(self, rows: list[Row]) -> Draft:  # type: ignore[override]
        return Draft(tuple(self._cut(branches) for branches in self.drafter.propose(rows).rows))

    def _cut(self, branches: Branches) -> Branches:
        laws = branches.laws
        if laws is None:
            return branches
        doubtful = (i for i, token in enumerate(branches.tokens) if float(laws[i - 1][token]) < 0.5)
        cut = next(doubtful, len(branches))
        candidates = {node: children for node, children in branches.candidates.items() if node < cut - 1}
        return Branches(branches.tokens[:cut], branches.parents[:cut], candidates, laws)


def test_taking_back_doubtful_guesses_would_change_the_law() -> None:
    # The proof above has the power to see a draft that hides a guess it has drawn.
    def speculation() -> Speculation:
        return Speculation(_Suspicious(StoppingDraft(DRAFT, random_head(), StoppingRule(1.0, most=4))))

    with pytest.raises(AssertionError, match="chi-square"):
        check_speculation(TARGET, speculation, prompts=2, seed=3)


def test_following_gives_the_very_tokens_of_plain_decoding() -> None:
    speculation = Speculation(StoppingDraft(DRAFT, random_head(), StoppingRule(0.5)), Follow())
    for rule in ("temperature(0.7) | top_k(3)", "greedy"):
        assert outputs(speculation.loop(TARGET), rule, 20, 30) == outputs(Loop(TARGET), rule, 20, 30)
    assert speculation.tally.failures == 0
    assert speculation.tally.accepted > 0


def test_the_table_with_hidden_states_keeps_the_contract() -> None:
    check_language_model(DRAFT)


# Limits and lengths.


@pytest.mark.parametrize("rule", ["", "greedy"])
def test_threshold_one_is_the_chain_of_the_greatest_length(rule: str) -> None:
    never = StoppingDraft(DRAFT, random_head(), StoppingRule(1.0, most=5))
    plain = DraftModel(DRAFT, Chain(5))
    for seed in range(20):
        here, there = (drafter.propose([row_of((3, 0, 1), rule=rule, seed=seed)]) for drafter in (never, plain))
        assert here.rows[0].tokens == there.rows[0].tokens
        assert len(here.rows[0]) == 5


def test_threshold_zero_is_one_token_and_the_least_length_is_kept() -> None:
    for least in (1, 3):
        drafter = StoppingDraft(DRAFT, random_head(), StoppingRule(0.0, least=least))
        assert [len(drafter.propose([row_of((3, 0), seed=seed)]).rows[0]) for seed in range(5)] == [least] * 5


def test_room_and_end_tokens_end_a_draft() -> None:
    drafter = StoppingDraft(DRAFT, constant_head(0.99), StoppingRule(1.0))
    assert len(drafter.propose([row_of((3, 0), room=3)]).rows[0]) == 3
    ends = 0
    for seed in range(20):
        running = Running(0, Request((3, 0), transform(""), 100, seed=seed))
        tokens = drafter.propose([Row(running, (3, 0), 30, torch.Generator().manual_seed(seed))]).rows[0].tokens
        assert 4 not in tokens[:-1]
        ends += tokens[-1] == 4
    assert ends > 5


@pytest.mark.paper("2405.19715")
@given(st.floats(0.05, 0.95), st.floats(0.0, 1.0), st.integers(1, 4), st.integers(4, 12))
def test_a_constant_chance_gives_a_length_that_is_known(chance: float, threshold: float, least: int, most: int) -> None:
    """The smallest s of at least `least` with 1 - a^(s - 1) >= h, since the newest guess is not judged."""
    drafter = StoppingDraft(DRAFT, constant_head(chance), StoppingRule(threshold, least=least, most=most))
    length = len(drafter.propose([row_of((3, 0))]).rows[0])
    known = [1 - chance ** (s - 1) for s in range(least, most)]
    slack = 1e-5  # the head tells chances in float32
    if length < most:
        assert known[length - least] >= threshold - slack
    assert all(value < threshold + slack for value in known[: length - least])


def test_the_bound_grows_with_the_threshold_and_stops_earlier_for_smaller_chances() -> None:
    rules = [StoppingRule(h / 10) for h in range(11)]
    for log_alive in (-0.05, -0.5, -3.0):
        stops = [rule.stops(2, log_alive) for rule in rules]
        assert stops == sorted(stops, reverse=True)
    assert StoppingRule(1.0).stops(20, 0.0)
    assert not StoppingRule(1.0).stops(19, -1e9)


# The alignment: a guess is judged by the hidden state at its own place.


def test_a_draft_stops_where_a_fresh_reading_of_it_says() -> None:
    draft = nextoken.load("nano")
    assert isinstance(draft, HFModel)
    head = AcceptanceHead.on(draft, seed=1)
    with torch.no_grad():
        head.outer.bias[1] += 1.0
    rule = StoppingRule(0.6, most=9)
    drafter = StoppingDraft(draft, head, rule)
    contexts = [(0, *range(50 + 9 * i, 55 + 11 * i)) for i in range(6)]
    rows = [row_of(context, ticket=i, seed=i, room=20 if i else 3) for i, context in enumerate(contexts)]
    lengths = []
    for row, branches in zip(rows, drafter.propose(rows).rows, strict=True):
        hidden = draft.predict([[*row.context, *branches.tokens]]).hidden
        assert hidden is not None
        alive = head.log_chances(hidden[0, len(row.context) :]).cumsum(0).tolist()
        most = min(rule.most, row.room)
        stopping = (s for s in range(1, most) if 1 - math.exp([0.0, *alive][s - 1]) >= rule.threshold)
        assert len(branches) == next(stopping, most)
        lengths.append(len(branches))
    assert len(set(lengths)) > 2


# The theory, by brute force: all ways to stop, on tables.


@dataclass
class _Game:
    """Rounds of drafting and verifying until `n` tokens are there, after a last token; costs per discard and pass."""

    p: Tensor
    q: Tensor
    discard: float
    passing: float
    most: int = 4
    _stand: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        ratio = torch.where(self.q > 0, self.p / self.q.clamp(min=1e-12), torch.ones(()))
        self._stand = ratio.clamp(max=1).tolist()
        residual = (self.p - self.q).clamp(min=0)
        total = residual.sum(-1, keepdim=True)
        self._residual = torch.where(total > 1e-9, residual / total.clamp(min=1e-9), self.p).tolist()
        self._p, self._q = self.p.tolist(), self.q.tolist()
        self.worth = cache(self._worth)

    def chances(self, x: int, ys: tuple[int, ...]) -> list[float]:
        return [self._stand[a][b] for a, b in zip((x, *ys), ys, strict=False)]

    def stop(self, n: int, x: int, ys: tuple[int, ...], value, known: int = 0) -> float:  # type: ignore[no-untyped-def]
        """Expected cost from verifying now; the first `known` guesses are known to stand."""
        chances = [1.0] * known + self.chances(x, ys)[known:]
        cost, alive = self.passing, 1.0
        for i, chance in enumerate(chances):
            at = (x, *ys)[i]
            after = sum(w * value(n - i - 1, z) for z, w in enumerate(self._residual[at]) if w)
            cost += alive * (1 - chance) * (self.discard * (len(ys) - i) + after)
            alive *= chance
        return cost + alive * sum(w * value(n - len(ys) - 1, z) for z, w in enumerate(self._p[(x, *ys)[-1]]))

    def options(self, n: int, x: int, ys: tuple[int, ...]) -> tuple[float, float]:
        """Least expected cost after stopping, and after drafting one more."""
        now = self.stop(n, x, ys, self.worth) if ys else math.inf
        if len(ys) == self.most:
            return now, math.inf
        return now, sum(w * min(self.options(n, x, (*ys, y))) for y, w in enumerate(self._q[(x, *ys)[-1]]) if w)

    def _worth(self, n: int, x: int) -> float:
        return min(self.options(n, x, ())) if n > 0 else 0.0

    def best(self, n: int, x: int, ys: tuple[int, ...], known: int) -> float:
        """Expected cost of the best policy's choices from here, if the first `known` guesses stand."""
        stop, more = self.options(n, x, ys)
        if stop <= more:
            return self.stop(n, x, ys, self.worth, known)
        return sum(w * self.best(n, x, (*ys, y), known) for y, w in enumerate(self._q[(x, *ys)[-1]]) if w)

    def under(self, rule: StoppingRule, n: int, x: int) -> float:
        """Expected cost of a rule that knows the chances, the newest guess not judged."""

        @cache
        def value(n: int, x: int) -> float:
            return drafted(n, x, ()) if n > 0 else 0.0

        def drafted(n: int, x: int, ys: tuple[int, ...]) -> float:
            judged = sum(math.log(max(chance, 1e-300)) for chance in self.chances(x, ys)[:-1])
            if ys and rule.stops(len(ys), judged):
                return self.stop(n, x, ys, value)
            return sum(w * drafted(n, x, (*ys, y)) for y, w in enumerate(self._q[(x, *ys)[-1]]) if w)

        return value(n, x)


def _game(seed: int, discard: float, passing: float) -> _Game:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(2, 2, dtype=torch.float64, generator=generator) ** 2 for _ in range(2))
    return _Game(p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True), discard, passing, most=4)


@pytest.mark.paper("2405.19715")
def test_above_the_bound_brute_force_stops() -> None:
    """The theorem: with D measured at the state, P(some guess rejected) >= (c2 + D) / (c1 + c2 + D) means stop."""
    above, going_on = 0, 0
    for seed, (discard, passing) in product(range(6), [(1.0, 1.0), (1.0, 0.3), (0.2, 1.0)]):
        game = _game(seed, discard, passing)
        for n, x in product((2, 5), range(2)):
            for ys in (ys for k in range(1, game.most) for ys in product(range(2), repeat=k)):
                stop, more = game.options(n, x, ys)
                alive = math.prod(game.chances(x, ys))
                if not 1e-9 < alive < 1 - 1e-9:
                    continue
                k, last = len(ys), (x, *ys)[-1]
                stop_alive = game.stop(n, x, ys, game.worth, k)
                more_alive = sum(w * game.best(n, x, (*ys, y), k) for y, w in enumerate(game._q[last]) if w)
                if_rejected = ((more - alive * more_alive) - (stop - alive * stop_alive)) / (1 - alive)
                assert if_rejected >= discard - 1e-9
                saving = max(0.0, stop_alive - more_alive - passing)
                if 1 - alive >= stopping_bound(discard, passing, saving=saving) + 1e-12:
                    above += 1
                    assert stop <= more + 1e-12
                going_on += more < stop - 1e-12
    assert above > 100
    assert going_on > 40


@pytest.mark.paper("2405.19715")
def test_a_threshold_beats_every_fixed_length_where_chances_vary() -> None:
    """After an a the draft is right; after a b it is mostly wrong. Costs are exact, by enumeration."""
    p = torch.tensor([[0.8, 0.2], [0.9, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.8, 0.2], [0.05, 0.95]], dtype=torch.float64)
    game = _Game(p, q, discard=1.0, passing=4.0, most=5)
    fixed = [game.under(StoppingRule(1.0, most=k), 8, 0) for k in range(1, 6)]
    adaptive = [game.under(StoppingRule(h / 10, most=5), 8, 0) for h in range(11)]
    assert game.worth(8, 0) <= min(adaptive) + 1e-12
    assert min(adaptive) < min(fixed) * 0.97
    assert adaptive[0] == pytest.approx(fixed[0])
    assert adaptive[-1] == pytest.approx(fixed[-1])


@given(st.floats(0.1, 0.95), st.floats(0.05, 2.0))
def test_with_a_constant_chance_some_threshold_is_the_best_length(chance: float, discard: float) -> None:
    """Expected cost per token of every K, by the sum over where the first rejection is; c2 = 1."""

    def rate(k: int) -> float:
        ways = [(i, chance**i * (1 - chance)) for i in range(k)] + [(k, chance**k)]
        tokens = sum(w * (i + 1) for i, w in ways)
        assert tokens == pytest.approx((1 - chance ** (k + 1)) / (1 - chance))
        return sum(w * (discard * (k - i) + 1) for i, w in ways) / tokens

    def drafted(rule: StoppingRule) -> int:
        return next(s for s in range(1, 21) if rule.stops(s, (s - 1) * math.log(chance)))

    best = min(range(1, 21), key=rate)
    assert drafted(StoppingRule(1 - chance ** (best - 1.5) if best > 1 else 0.0)) == best


def test_bound_by_hand() -> None:
    assert stopping_bound(1.0, 3.0) == 0.75
    assert stopping_bound(2.0, 3.0, saving=1.0) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="costs must be above 0"):
        stopping_bound(0.0, 1.0)


# Learning.


@pytest.mark.paper("2405.19715")
def test_loss_by_hand() -> None:
    log_probs = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    chances = torch.tensor([0.9, 0.2])
    expected = -(6 * 0.1 * math.log(0.25) + 0.9 * math.log(0.75) + 6 * 0.8 * math.log(0.5) + 0.2 * math.log(0.5)) / (
        6 * (0.1 + 0.8) + 0.9 + 0.2
    )
    assert weighted_loss(log_probs, chances, reject_weight=6.0).item() == pytest.approx(expected, rel=1e-6)


@given(st.floats(0.05, 0.95), st.floats(1.0, 8.0))
def test_the_loss_is_least_where_the_recipe_says(chance: float, weight: float) -> None:
    best = chance / (chance + weight * (1 - chance))

    def loss(f: float) -> float:
        f = min(max(f, 1e-6), 1 - 1e-6)
        rows = torch.tensor([[1 - f, f]], dtype=torch.float64).log()
        return weighted_loss(rows, torch.tensor([chance], dtype=torch.float64), reject_weight=weight).item()

    assert loss(best) <= min(loss(best - 1e-3), loss(best + 1e-3)) + 1e-12


@pytest.mark.paper("2405.19715")
def test_examples_are_guesses_with_the_chance_that_they_stand() -> None:
    responses = [((3, 0), tuple(torch.randint(3, (length,)).tolist())) for length in (40, 7, 40)]
    examples = acceptance_examples(TARGET, DRAFT, responses, mixing=0.3, seed=5)
    guesses = own = 0
    for (prompt, output), example in zip(responses, examples, strict=True):
        assert example.tokens[:2] == prompt
        assert example.chances[:2] == (None, None)
        for i, (token, chance) in enumerate(zip(example.tokens[2:], example.chances[2:], strict=True)):
            context = [*prompt, *output[:i]]
            if chance is None:
                assert token == output[i]
                own += 1
            else:
                ratio = (TARGET.row(context)[token] - DRAFT.row(context)[token]).exp()
                assert chance == pytest.approx(min(1.0, float(ratio)))
                guesses += 1
    assert 10 < own < 45  # 26 expected; outside with chance below 1e-3, of the fixed seed
    assert guesses > 40
    again = acceptance_examples(TARGET, DRAFT, responses[:1], mixing=0.3, seed=5)
    assert again == examples[:1]


def test_the_mean_chance_is_the_overlap_of_the_distributions() -> None:
    """E_q min(1, p / q) = sum min(p, q); 4 standard errors, false alarm 6e-5."""
    examples = acceptance_examples(TARGET, DRAFT, [((3, 0, 1), (2,))] * 3000, mixing=0.0, seed=1)
    chances = torch.tensor([example.chances[-1] for example in examples], dtype=torch.float64)
    overlap = float(torch.minimum(TARGET.row((3, 0, 1)).exp(), DRAFT.row((3, 0, 1)).exp()).sum())
    assert abs(float(chances.mean()) - overlap) < 4 * float(chances.std()) / math.sqrt(3000)


@pytest.mark.paper("2405.19715")
@pytest.mark.parametrize("weight", [1.0, 6.0])
def test_a_head_learns_what_is_to_be_known(weight: float) -> None:
    """In the limit y / (y + w (1 - y)) of the mean chance y given what is seen, here by enumeration.

    The draft is of order 1 and its guess is seen by the table's row alone: the mean is over the token before.
    """
    draft = _SeenTable.random(3, order=1, seed=2, name="draft")
    target = TableModel.random(3, order=1, seed=4, name="target")
    made = nextoken.generate(target, "a", n=40, max_tokens=60, seed=0)
    responses = [(generation.request.prompt, generation.tokens) for generation in made]  # type: ignore[union-attr]
    examples = acceptance_examples(target, draft, responses, mixing=0.15, seed=1)
    head = AcceptanceHead.on(draft, seed=0)
    fit_acceptance(head, draft, examples, recipe=AcceptanceRecipe(60, 128, 1e-2, weight), seed=0)
    told, chances = predicted_chances(head, draft, examples)
    pairs = [pair for example in examples for pair in zip(example.tokens, example.chances, strict=True)]
    seen = [token for token, chance in pairs if chance is not None]
    for token in range(3):
        here = torch.tensor([value == token for value in seen])
        mean = float(chances[here].mean())
        expected = mean / (mean + weight * (1 - mean))
        assert float(told[here].exp().mean()) == pytest.approx(expected, abs=0.02)


def test_training_is_repeatable_and_leaves_the_draft_alone() -> None:
    examples = acceptance_examples(TARGET, DRAFT, [((3, 0), (0, 1, 2, 1, 0))] * 8)
    heads, seen = [], []
    for _ in range(2):
        head = AcceptanceHead.on(DRAFT, seed=3)
        losses = fit_acceptance(head, DRAFT, examples, recipe=AcceptanceRecipe(batch=8), seed=2, on_step=seen.append)
        assert len(losses) == seen[-1].steps == seen[-1].step
        heads.append(head.digest)
    assert heads[0] == heads[1] != AcceptanceHead.on(DRAFT, seed=3).digest


# Saving.


def test_a_head_comes_back_from_its_folder_and_only_for_its_draft(tmp_path: Path) -> None:
    head = random_head()
    head.save(tmp_path, draft=DRAFT)
    again = AcceptanceHead.load(tmp_path, draft=DRAFT)
    assert again.digest == head.digest
    hidden = torch.rand(4, SIZE)
    torch.testing.assert_close(again.log_chances(hidden), head.log_chances(hidden))
    other = _SeenTable.random(3, order=1, eos=True, seed=8, name="other")
    with pytest.raises(ModelError, match=r"acceptance head .* trained with another draft"):
        AcceptanceHead.load(tmp_path, draft=other)
    with pytest.raises(ModelError, match="another vocabulary and another draft"):
        AcceptanceHead.load(tmp_path, draft=_SeenTable.random(2, order=1, eos=True))
    settings = json.loads((tmp_path / "acceptance_head.json").read_text())
    (tmp_path / "acceptance_head.json").write_text(
        json.dumps(settings | {"settings": settings["settings"] | {"layers": 2}})
    )
    with pytest.raises(ModelError, match="no whole acceptance head"):
        AcceptanceHead.load(tmp_path, draft=DRAFT)
    with pytest.raises(ModelError, match=r"no acceptance_head\.json"):
        AcceptanceHead.load(tmp_path / "nowhere", draft=DRAFT)


def test_weights_that_were_changed_are_refused(tmp_path: Path) -> None:
    random_head().save(tmp_path, draft=DRAFT)
    (tmp_path / "elsewhere").mkdir()
    random_head(seed=9).save(tmp_path / "elsewhere", draft=DRAFT)
    (tmp_path / "elsewhere" / "acceptance_head.safetensors").replace(tmp_path / "acceptance_head.safetensors")
    with pytest.raises(ModelError, match="not those it was saved with"):
        AcceptanceHead.load(tmp_path, draft=DRAFT)


def test_misuse_is_told() -> None:
    blind: LanguageModel = TableModel.random(3, order=1, eos=True)
    with pytest.raises(ModelError, match="gives no hidden states"):
        AcceptanceHead.on(blind)
    with pytest.raises(ModelError, match="gives no hidden states"):
        StoppingDraft(blind, random_head())
    with pytest.raises(ValueError, match="width 7"):
        StoppingDraft(DRAFT, AcceptanceHead(7))
    with pytest.raises(ValueError, match="threshold is a probability"):
        StoppingRule(1.5)
    with pytest.raises(ValueError, match="1 <= least <= most"):
        StoppingRule(least=3, most=2)
    with pytest.raises(ValueError, match="mixing is the share"):
        acceptance_examples(TARGET, DRAFT, [((3,), (0,))], mixing=1.0)
    with pytest.raises(ValueError, match="different vocabularies"):
        acceptance_examples(TableModel.random(2), DRAFT, [((0,), (0,))])
    with pytest.raises(ValueError, match="at least one token"):
        acceptance_examples(TARGET, DRAFT, [((3,), ())])
    with pytest.raises(ValueError, match="no guess to learn from"):
        fit_acceptance(random_head(), DRAFT, [AcceptanceExample((3, 0), (None, None))])

"""Length control: tilts and targets against brute force on tables, roots, signs, limits, and the contract."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nextoken
from nextoken.decode.generate import generate
from nextoken.decode.transform import Chain
from nextoken.decode.truncation import MinP, TopK
from nextoken.model.base import LanguageModel
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.testing import check_language_model
from nextoken.values.length_control import LengthControlled
from nextoken.values.length_rule import Candidates, HardTarget, LengthRule, Scaled, SoftTarget, Tilt
from nextoken.values.length_value import ExactLengthValue, HFLengthValue, value_of
from nextoken.values.scalar_head import ScalarValue
from nextoken.values.tilting import solve_tilt, tilt

BOS, EOS, G = 3, 4, 0.9


@cache
def table(seed: int = 0, zeros: float = 0.0) -> TableModel:
    return TableModel.random(3, order=2, eos=True, zeros=zeros, seed=seed)


def controlled(
    rule: LengthRule, seed: int = 0, prompts: list[str] | None = None, zeros: float = 0.0
) -> LengthControlled:
    model = table(seed, zeros)
    return LengthControlled(model, ExactLengthValue(model, discount=G), rule, prompts=prompts, candidates=Chain())


def stairs() -> TableModel:
    """`a` goes on for ever with others; from `b` on the text is sure to end after 3 tokens (b c, then the end)."""
    rows = {(): [0.6, 0.4, 0, 0], (0,): [0.6, 0.4, 0, 0], (1,): [0, 0, 1.0, 0], (2,): [0, 0, 0, 1.0]}
    return TableModel.given(rows, ["a", "b", "c"], eos=True)


def mean_length(model: LanguageModel) -> float:
    """E[tokens of the text, the end counted], by following the law of the last two tokens."""
    reached, total = {(BOS, BOS): 1.0}, 0.0
    while sum(reached.values()) > 1e-6:
        total += sum(reached.values())
        contexts = list(reached)
        rows = model.predict([[BOS, *[x for x in c if x != BOS]] + [-1] * c.count(BOS) for c in contexts])
        at = [2 - c.count(BOS) for c in contexts]
        after: dict[tuple[int, int], float] = {}
        p = rows.log_probs().exp()
        for row, context in enumerate(contexts):
            for token in range(3):
                chance = reached[context] * float(p[row, at[row], token])
                after[context[1], token] = after.get((context[1], token), 0.0) + chance
        reached = after
    return total


# Tilts


@given(
    p=st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=8),
    u=st.lists(st.floats(0.0, 1.0), min_size=8, max_size=8),
    share=st.floats(0.02, 0.98),
)
def test_the_root_meets_its_target_and_the_mean_rises_with_b(p: list[float], u: list[float], share: float) -> None:
    log_p = torch.tensor(p, dtype=torch.float64).log().log_softmax(-1)[None]
    values = torch.tensor(u[: len(p)], dtype=torch.float64)[None]
    low, high = float(values.min()), float(values.max())
    wanted = torch.tensor([low + share * (high - low)], dtype=torch.float64)
    b = solve_tilt(log_p, values, wanted)
    if high > low:
        assert float((tilt(log_p, values, b).exp() * values).sum()) == pytest.approx(float(wanted), abs=1e-6)
    means, divergences = [], []
    for strength in (-math.inf, -30.0, -3.0, 0.0, 3.0, 30.0, math.inf):
        new = tilt(log_p, values, torch.tensor(strength))
        means.append(float((new.exp() * values).sum()))
        divergences.append(float(torch.where(new > -math.inf, new.exp() * (new - log_p), 0.0).sum()))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(means))
    assert means[0] == pytest.approx(low) and means[-1] == pytest.approx(high)
    # KL(p' || p) grows with |b|.
    for side in (divergences[3::-1], divergences[3:]):
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(side))


def test_b_0_is_the_identity_and_the_tilt_is_its_formula() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    u = torch.tensor([[0.1, 0.9, 0.4]], dtype=torch.float64)
    assert tilt(log_p, u, torch.tensor(0.0)).tolist()[0] == pytest.approx(log_p.tolist()[0], abs=1e-15)
    weights = [0.5 * math.exp(0.7), 0.3 * math.exp(6.3), 0.2 * math.exp(2.8)]
    assert tilt(log_p, u, torch.tensor(7.0)).exp()[0].tolist() == pytest.approx([w / sum(weights) for w in weights])


def test_out_of_reach_the_nearest_candidates_are_left_and_absent_ones_never_count() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.2, 0.0]] * 4, dtype=torch.float64).log()
    u = torch.tensor([[0.1, 0.1, 0.4, 0.9], [0.1, 0.1, 0.4, 0.0], [0.3, 0.3, 0.3, 0.9], [0.1, 0.2, 0.4, 0.9]])
    b = solve_tilt(log_p, u, torch.tensor([0.05, 0.8, 0.9, 0.25]))
    assert b[:3].tolist() == [-math.inf, math.inf, 0.0] and math.isfinite(b[3])
    p = tilt(log_p, u, b).exp()
    assert p[:3].tolist() == [pytest.approx(x) for x in ([0.625, 0.375, 0, 0], [0, 0, 1, 0], [0.5, 0.3, 0.2, 0])]
    assert float((p[3] * u[3]).sum()) == pytest.approx(0.25, abs=1e-7) and p[3, 3] == 0


# Rules


def given_candidates(lengths: list[float], p: list[float], drawn: int) -> Candidates:
    return Candidates(
        torch.tensor([p], dtype=torch.float64).log(), torch.tensor([lengths], dtype=torch.float64),
        torch.tensor([drawn]), G,
    )  # fmt: skip


def chosen(rule: LengthRule, candidates: Candidates) -> list[int]:
    return (rule(candidates)[0] > -math.inf).nonzero()[:, 0].tolist()


@pytest.mark.paper("2604.27039")
def test_hard_targets_choose_by_hand() -> None:
    """SIGN: the longest has the largest u."""
    lengths, p = [5.0, 0.0, 9.0, math.inf, 2.0], [0.4, 0.3, 0.2, 0.1, 0.0]
    at = given_candidates(lengths, p, 4)
    assert chosen(HardTarget(10), at) == [0]
    assert chosen(HardTarget(10, "at_least"), at) == [3] and chosen(HardTarget(4, "at_least"), at) == [1]
    assert chosen(HardTarget(10, "at_most"), at) == [1]
    # |u - u*| and |l - l*| may order otherwise: u is concave.
    unequal = given_candidates([4.0, 8.5], [0.5, 0.5], 0)
    assert chosen(HardTarget(6), unequal) == [1] and chosen(HardTarget(6, space="length"), unequal) == [0]
    # Of equal ones the more probable, which stands first; one that is not there is no choice.
    assert chosen(HardTarget(7), given_candidates([3.0, 3.0], [0.6, 0.4], 4)) == [0]
    assert chosen(HardTarget(6), given_candidates([9.0, 2.0], [1.0, 0.0], 4)) == [0]
    assert chosen(HardTarget(6), given_candidates([math.inf, math.inf], [0.6, 0.4], 4)) == [0]


@pytest.mark.paper("2604.27039")
@pytest.mark.parametrize("target", [1, 2, 3, 4])
def test_equal_to_reaches_every_length_where_lengths_are_sure(target: int) -> None:
    """After the first token, a b c d one after the other and the end. The length counts without the end token."""
    rows = {(): [0.1, 0.2, 0.3, 0.4, 0.0], (0,): [0, 1.0, 0, 0, 0], (1,): [0, 0, 1.0, 0, 0], (2,): [0, 0, 0, 1.0, 0]}
    model = TableModel.given(rows | {(3,): [0, 0, 0, 0, 1.0]}, ["a", "b", "c", "d"], eos=True)
    value = ExactLengthValue(model, discount=0.97)
    for space in ("value", "length"):
        exact = LengthControlled(model, value, HardTarget(target, space=space), prompts=[""], candidates=Chain())
        made = generate(exact, "", max_tokens=60, seed=target)
        assert (made.finish, len(made.tokens)) == ("eos", target + 1)


def test_equal_to_may_miss_a_length_that_can_be_had_where_lengths_are_a_gamble() -> None:
    """The rule takes a gamble for its sure equivalent: a a b c has 3 tokens before its end, and b c is taken instead.

    Of the exact value as of a learnt one; the text comes no nearer than the candidates' lengths let it.
    """
    model = stairs()
    value = ExactLengthValue(model, discount=0.97)
    for target, reached in ((2, 2), (3, 2), (8, 7), (20, 19)):
        exact = LengthControlled(
            model,
            value,
            HardTarget(target),
            prompts=[
                "",
            ],
            candidates=Chain(),
        )
        assert len(generate(exact, "", max_tokens=60).tokens) - 1 == reached


def test_at_least_and_at_most() -> None:
    model = stairs()
    value = ExactLengthValue(model, discount=0.97)
    least = LengthControlled(model, value, HardTarget(9, "at_least"), prompts=[""], candidates=Chain())
    most = LengthControlled(model, value, HardTarget(9, "at_most"), prompts=[""], candidates=Chain())
    assert len(generate(least, "").tokens) - 1 == 9 + 2 and len(generate(most, "").tokens) - 1 == 2


@pytest.mark.paper("2604.27039")
@pytest.mark.parametrize("rule", [Tilt(-2.5), Tilt(4.0), Scaled(0.8), SoftTarget(6)], ids=str)
def test_every_distribution_is_the_formula(rule: LengthRule) -> None:
    """p' on every state of a table from its p and exact u, one state and one candidate at a time."""
    model, value = table(2), ExactLengthValue(table(2), discount=G)
    ours = controlled(rule, 2, prompts=[""])
    for text in ([BOS], [BOS, 0], [BOS, 2, 1], [BOS, 1, 1, 0]):
        log_p = model.predict([text]).log_probs()[0, -1]
        tokens = [x for x in range(5) if x != BOS]
        u = torch.tensor([[float(value_of(torch.tensor(value.of((*text, x))), G)) for x in tokens]])
        p = log_p[tokens].exp()
        if isinstance(rule, Tilt):
            weights = p * (rule.b * u[0].double()).exp()
            expected = weights / weights.sum()
            assert ours.predict([text]).log_probs()[0, -1][tokens].exp().tolist() == pytest.approx(
                expected.tolist(), abs=1e-6
            )
            continue
        new = ours.predict([text]).log_probs()[0, -1][tokens].exp()
        wanted = (
            rule.factor * float((p * u[0]).sum())
            if isinstance(rule, Scaled)
            else float(value_of(torch.tensor(6 - (len(text) - 1)), G))
        )
        got = float((new * u[0]).sum())
        assert got == pytest.approx(min(max(wanted, float(u.min())), float(u.max())), abs=1e-5)
        # It is a tilt: log p'/p is a line in u.
        if float(new.min()) > 0:
            slope = (new.log() - p.log())[1:] - (new.log() - p.log())[0]
            ratio = slope / (u[0, 1:] - u[0, 0])
            assert ratio.max() - ratio.min() < 1e-3 * (1 + ratio.abs().max())


@pytest.mark.paper("2604.27039")
def test_mean_length_falls_with_b() -> None:
    lengths = [mean_length(controlled(Tilt(b))) for b in (-20.0, -5.0, -1.0, 0.0, 1.0)]
    assert all(a < b for a, b in itertools.pairwise(lengths))
    assert lengths[3] == pytest.approx(mean_length(table()))


@pytest.mark.parametrize("rule", [Tilt(0.0), Scaled(1.0)], ids=str)
def test_limits_are_the_model_itself(rule: LengthRule) -> None:
    model, ours = table(1, 0.3), controlled(rule, 1, zeros=0.3)
    rows = [[BOS, 0, 1, 2, 2], [BOS, 1, 1, 0, 2]]
    difference = ours.predict(rows).log_probs() - model.predict(rows).log_probs()
    assert float(difference.nan_to_num(0.0).abs().max()) < 1e-9
    for seed in range(5):
        one, other = (generate(m, "a", max_tokens=30, seed=seed) for m in (ours, model))
        assert one.tokens == other.tokens


def test_within_prompts_the_model_is_left_as_it_is() -> None:
    model, ours = table(), controlled(Tilt(-9.0), prompts=["abc", "ca"])
    rows = [[BOS, 0, 1, 2, 2], [BOS, 2, 0, 1, 1], [BOS, 1, 1, 1, 1]]
    differs = (ours.predict(rows).log_probs() - model.predict(rows).log_probs()).nan_to_num(0.0).abs().amax(-1) > 1e-6
    assert differs.tolist() == [[False] * 3 + [True] * 2, [False] * 2 + [True] * 3, [False] * 5]


def test_candidates_are_those_of_the_transform() -> None:
    model = table()
    value = ExactLengthValue(model, discount=G)
    for transform in (TopK(2), MinP(0.3)):
        ours = LengthControlled(model, value, Tilt(3.0), candidates=transform)
        p = ours.predict([[BOS, 0, 1]]).log_probs()[0, -1] > -math.inf
        base = model.predict([[BOS, 0, 1]]).log_probs()[0, -1].exp()
        expected = base >= (base.sort(descending=True).values[1] if isinstance(transform, TopK) else 0.3 * base.max())
        assert torch.equal(p, expected)


@pytest.mark.parametrize("rule", [Tilt(-3.0), Scaled(0.7), SoftTarget(5), HardTarget(6)], ids=str)
def test_it_keeps_the_contract(rule: LengthRule) -> None:
    check_language_model(controlled(rule, prompts=["" if rule.needs_prompt else "a"]))
    check_language_model(controlled(rule, prompts=[""]))


def test_it_keeps_the_contract_with_a_learnt_value_on_the_model_itself() -> None:
    model = nextoken.load("nano")
    assert isinstance(model, HFModel)
    scalar = ScalarValue.on(model)
    torch.nn.init.normal_(scalar.head.outer.weight)
    value = HFLengthValue(scalar, discount=0.99)
    check_language_model(LengthControlled(model, value, Tilt(-3.0), candidates=TopK(5)))
    ours = LengthControlled(model, value, SoftTarget(9), prompts=["It was", "The"], candidates=TopK(5))
    for seed in range(2):
        alone = [generate(ours, prompt, max_tokens=8, seed=seed).tokens for prompt in ("It was", "The")]
        assert [one.tokens for one in generate(ours, ["It was", "The"], max_tokens=8, seed=seed)] == alone


def test_long_texts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = controlled(Tilt(-3.0))
    rows = [[BOS, *[0, 1, 2, 1] * 6], [BOS, *[2, 2] * 4, *[-1] * 16]]
    whole = ours.predict(rows).log_probs()
    monkeypatch.setattr("nextoken.values.length_control._NODES", 17)
    pieces = ours.predict(rows).log_probs()
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1, :9], pieces[1, :9])


def test_a_batch_with_other_prompts_changes_nothing() -> None:
    rule = SoftTarget(6)
    ours = controlled(rule, prompts=["ab", "c", "bbb"])
    together = generate(ours, ["ab", "c", "bbb"], n=3, max_tokens=30, seed=5)
    assert isinstance(together, list)
    for place, prompt in enumerate(["ab", "c", "bbb"]):
        alone = generate(ours, prompt, n=3, max_tokens=30, seed=5, max_rows=1)
        assert [one.tokens for one in alone] == [one.tokens for one in together[3 * place : 3 * place + 3]]  # type: ignore[union-attr]
    one = together[0]
    assert one.drawn.column("logprob").tolist() == pytest.approx([-s for s in one.surprisals], abs=1e-6)


def test_misuse_is_refused() -> None:
    model, other = table(), TableModel.random(4, eos=True)
    value = ExactLengthValue(model, discount=G)
    with pytest.raises(ValueError, match="different vocabularies"):
        LengthControlled(other, value, Tilt(1.0))
    with pytest.raises(ValueError, match="must know where the prompt ends"):
        LengthControlled(model, value, HardTarget(4))
    with pytest.raises(ValueError, match="is the beginning of another"):
        LengthControlled(model, value, HardTarget(4), prompts=["a", "ab"])
    with pytest.raises(ValueError, match="prompts is empty"):
        LengthControlled(model, value, HardTarget(4), prompts=[])
    with pytest.raises(ValueError, match="at least 0 tokens"):
        HardTarget(-1)
    with pytest.raises(ValueError, match="kind must be"):
        HardTarget(1, "about")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factor"):
        Scaled(-1.0)

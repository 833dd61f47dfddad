"""Drift: divergences by enumeration, recurrences of known dynamics, the nulls, and what a reminder does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nextoken
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.scores.drift import Turn, converse, drift, remind
from nextoken.scores.equilibrium import equilibrium, reminder_effect

Q = TableModel.random(3, order=2, seed=1, name="q")
P = TableModel.random(3, order=1, seed=2, name="p")
TALK = [Turn("ab", "cab"), Turn("c", "b"), Turn("", "aa"), Turn("b", "")]


def kl(q: torch.Tensor, p: torch.Tensor) -> float:
    there = q > -math.inf
    return float((q[there].exp() * (q[there] - p[there])).sum())


@pytest.mark.paper("2510.07777")
def test_it_is_the_divergence_at_each_token() -> None:
    found = drift(Q, P, TALK)
    text, expected = "", []
    for turn in TALK:
        text += turn.heard
        own = []
        for symbol in turn.said:
            ids = Q.vocab.encode(text).ids
            own.append(kl(Q.row(ids), P.row(ids)))
            text += symbol
        expected.append(own)
    assert found.tokens.tolist() == [3, 1, 2, 0]
    for own, values in zip(expected, found.per_token, strict=True):
        assert values == pytest.approx(own, rel=1e-5)
    assert found.kl[:3] == pytest.approx([np.mean(own) for own in expected[:3]], rel=1e-5) and math.isnan(found.kl[3])


@pytest.mark.paper("2510.07777")
def test_over_texts_of_the_model_it_is_the_divergence_of_the_turn() -> None:
    """The chain rule: the expected sum over a turn's tokens, y drawn from q, is KL(q(y) || p(y)), by enumeration."""
    q, p = TableModel.random(2, order=2, seed=3), TableModel.random(2, order=1, seed=4)
    strings = q.enumerate(3, prefix=q.vocab.encode("ab").ids)
    summed, whole = 0.0, 0.0
    for string, probability in strings.items():
        said = q.vocab.decode_text(string)
        found = drift(q, p, [Turn("ab", said)])
        summed += probability * found.per_token[0].sum()
        log_p = sum(float(p.row((*q.vocab.encode("ab").ids, *string[:i]))[token]) for i, token in enumerate(string))
        whole += probability * (math.log(probability) - log_p)
    assert summed == pytest.approx(whole, rel=1e-5)


@given(st.lists(st.tuples(st.text("abc", max_size=3), st.text("abc", max_size=3)), min_size=1, max_size=4))
def test_of_a_model_from_itself_there_is_none(pieces: list[tuple[str, str]]) -> None:
    talk = [Turn(heard, said) for heard, said in pieces]
    found = drift(Q, Q, talk)
    assert np.nan_to_num(found.kl) == pytest.approx(0, abs=1e-7)
    assert (drift(Q, P, talk).kl[found.tokens > 0] >= -1e-7).all()


def test_models_with_heads_are_compared_as_their_logits_are() -> None:
    nano = nextoken.load("nano")
    assert isinstance(nano, HFModel)
    talk = [Turn("How do you do?", " I am well."), Turn(" And now?", " Not so well.")]
    restated = remind(talk, " Remember to be kind.", at={1})
    found = drift(nano, nano, talk, restated=restated)
    assert found.kl[0] == pytest.approx(0, abs=1e-6) and found.kl[1] > 1e-3
    rows = []
    for turns in (talk, restated):
        ids = [nano.vocab.bos_id]
        for turn in turns:
            ids += nano.vocab.encode(turn.heard).ids
            start = len(ids)
            ids += nano.vocab.encode(turn.said).ids
        rows.append(nano.predict([ids]).log_probs()[0, start - 1 : len(ids) - 1].double())
    by_hand = [kl(q, p) for q, p in zip(*rows, strict=True)]
    assert found.per_token[1] == pytest.approx(by_hand, rel=1e-3, abs=1e-6)


def forgetful() -> TableModel:
    """Says "k" (kind) as long as it stands in the last 4 tokens, and then rather "r"; "!" reminds of it."""
    size = 4  # k r ! and the begin token
    table = torch.zeros((size,) * 5, dtype=torch.float64)
    for context in np.ndindex(*(size,) * 4):
        kind = 0.9 if 2 in context else 0.3 + 0.1 * context.count(0)
        table[context] = torch.tensor([kind, 1 - kind, 0, 0])
    return TableModel(table, ["k", "r", "!"])


@pytest.mark.paper("2510.07777")
def test_drift_grows_as_the_goal_leaves_sight_and_a_reminder_lowers_it() -> None:
    """The goal is "!" before the first turn; the reference reads it before every turn."""
    model, rng = forgetful(), np.random.default_rng(0)

    def speak(text: str, turn: int) -> str:
        said = ""
        for _ in range(2):
            p = model.row(model.vocab.encode(text + said).ids)[0].exp().item()
            said += "k" if rng.random() < p else "r"
        return said

    plain, reminded, filled = [], [], []
    for _ in range(30):
        talk = converse(["!", "", "", "", "", ""], speak=speak)
        assert "".join(turn.said for turn in talk).strip("kr") == "" and len(talk) == 6
        goal = remind(talk, "!", at=range(1, 6))
        for series, given_text in ((plain, ""), (reminded, "!"), (filled, "r")):
            series.append(drift(model, model, remind(talk, given_text, at={4}), restated=goal).kl)
    assert np.mean([one[0] for one in plain]) == pytest.approx(0, abs=1e-7)
    assert np.mean([one[3] for one in plain]) > 0.1
    effect = reminder_effect(reminded, plain, first=4)
    control = reminder_effect(filled, plain, first=4)
    assert effect.difference.high < 0 and effect.relative.value < -0.3
    assert effect.difference.high < control.difference.low


def simulated(phi: float, count: int, *, length: int = 8, seed: int = 0, push: float = 0.0) -> list[np.ndarray]:
    """D_{t+1} = 1 + phi (D_t - 1) - push + noise, begun where it is at rest (at 1 for phi = 1)."""
    rng = np.random.default_rng(seed)
    noise = 0.1 * rng.normal(size=(count, length))
    at = np.ones((count, length))
    at[:, 0] += noise[:, 0] / math.sqrt(1 - phi**2) if phi < 1 else 0.0
    for t in range(1, length):
        at[:, t] = 1 + phi * (at[:, t - 1] - 1) - push + noise[:, t]
    return list(at)


@pytest.mark.paper("2510.07777")
@pytest.mark.parametrize(
    ("phi", "r_squared", "finding"),
    [(0.0, 0.5, "no memory"), (0.5, 0.25, "restoring"), (0.8, 0.1, "restoring"), (1.0, 0.0, "no restoring force")],
)
def test_known_dynamics_are_recovered_and_told_from_the_nulls(phi: float, r_squared: float, finding: str) -> None:
    """500 dialogues of 8 turns; without any dynamics b is -1 and R^2 is 1/2, which is no restoring force."""
    found = equilibrium(simulated(phi, 500), resamples=300)
    assert found.b.value == pytest.approx(phi - 1, abs=0.06) and found.phi == 1 + found.b.value
    assert found.r_squared == pytest.approx(r_squared, abs=0.04)
    assert found.noise == pytest.approx(0.1, rel=0.05) and found.finding == finding
    if phi < 1:
        assert found.level.value == pytest.approx(1, abs=0.03) and 1.0 in found.level and 0.0 in found.slope
        assert found.spread == pytest.approx(0.1 / math.sqrt(1 - phi**2), rel=0.1)
    if 0 < phi < 1:
        assert found.half_life == pytest.approx(math.log(0.5) / math.log(phi), rel=0.3)


def test_short_series_are_told_with_their_bias() -> None:
    """One dialogue of 8 turns with phi = 1/2 lies within both nulls, and both have b below what long series have."""
    found = equilibrium(simulated(0.5, 1, seed=3), resamples=300)
    assert found.b.value in found.memoryless and found.b.value in found.unrestored and found.finding == "undecided"
    many = [equilibrium(simulated(0.0, 1, seed=seed), resamples=2).b.value for seed in range(200)]
    assert np.mean(many) == pytest.approx(-1.14, abs=0.06)


def test_levels_that_differ_between_dialogues_are_no_memory() -> None:
    """Pooled, such series have b well above -1, and so have their shuffles."""
    rng = np.random.default_rng(1)
    series = [level + 0.1 * rng.normal(size=8) for level in rng.normal(2, 0.2, size=200)]
    found = equilibrium(series, resamples=300)
    assert found.b.value > -0.5 and found.finding == "no memory"


def test_findings_are_rarely_false() -> None:
    """Of 60 samples under either null at most 5 are called restoring: at 2.5 % each, more has probability 2e-3."""
    for phi in (0.0, 1.0):
        wrong = sum(
            equilibrium(simulated(phi, 30, seed=seed), resamples=200).finding == "restoring" for seed in range(60)
        )
        assert wrong <= 5


@given(st.integers(0, 999), st.lists(st.integers(2, 6), min_size=2, max_size=5))
def test_the_fit_is_least_squares(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    series = [rng.random(length) for length in (*lengths, 4)]
    found = equilibrium(series, resamples=2)
    x, y = np.concatenate([one[:-1] for one in series]), np.concatenate([np.diff(one) for one in series])
    b, a = np.polyfit(x, y, 1)
    assert (found.a.value, found.b.value) == pytest.approx((a, b), abs=1e-9)
    assert found.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-9)
    t = np.concatenate([np.arange(len(one)) - (len(one) - 1) / 2 for one in series])
    centred = np.concatenate([one - one.mean() for one in series])
    assert found.slope.value == pytest.approx((t @ centred) / (t @ t), abs=1e-9)


@pytest.mark.paper("2510.07777")
def test_a_push_moves_the_equilibrium_by_itself_over_b() -> None:
    """delta = 0.1 with b = -0.5 lowers the level by 0.2, once settled."""
    plain, pushed = simulated(0.5, 400, length=16), simulated(0.5, 400, length=16, push=0.1)
    fit = equilibrium(plain, resamples=100)
    effect = reminder_effect(pushed, plain, first=9, fit=fit)
    assert effect.difference.value == pytest.approx(-0.2, abs=0.005) and effect.dialogues == 400
    assert effect.push == pytest.approx(0.1, abs=0.02)
    assert effect.relative.value == pytest.approx(-0.2, abs=0.01)


def test_misuse_is_refused() -> None:
    short = TableModel.random(3, order=1, seed=0)
    short.context_length = 4
    partial = TableModel.random(3, order=1, seed=0)
    partial.is_partial = True
    for wrong, message in (
        (lambda: drift(Q, TableModel.random(4, seed=0), TALK), "different vocabularies"),
        (lambda: drift(Q, P, TALK, restated=TALK[:2]), "same utterances"),
        (lambda: drift(short, short, TALK), "leave out its beginning"),
        (lambda: drift(Q, partial, TALK), "whole distributions"),
        (lambda: remind(TALK, "x", at={4}), "no turn 4"),
        (lambda: equilibrium([np.ones(8)] * 3), "never varies"),
        (lambda: equilibrium([np.array([1.0, 2.0, 3.0])]), "too few"),
        (lambda: equilibrium([np.array([1.0, math.nan, 3.0, 2.0])]), "finite"),
        (lambda: reminder_effect([np.ones(3)], [], first=0), "same dialogues"),
        (lambda: reminder_effect([np.ones(3)], [np.ones(3)], first=3), "no turn 3"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()

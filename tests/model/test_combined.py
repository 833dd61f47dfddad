"""Models made of models: the contract, each formula by hand on tables, limits, and misuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextoken.decode.generate import generate
from nextoken.model.base import LanguageModel
from nextoken.model.contrast import Complemented, Contrastive, Guided, Selective
from nextoken.model.ensemble import Ensemble
from nextoken.model.table import TableModel
from nextoken.testing import check_language_model

EXPERT = TableModel.random(4, order=3, seed=1, name="expert")
AMATEUR = TableModel.random(4, order=1, seed=2, name="amateur")
SPARSE = TableModel.random(4, order=3, seed=3, zeros=0.3, name="sparse")
BOS = EXPERT.vocab.bos_id

OPERATORS: list[LanguageModel] = [
    Contrastive(EXPERT, AMATEUR),
    Contrastive(SPARSE, AMATEUR, beta=0.5, alpha=0.3, temperature=0.7),
    Guided(EXPERT, "abc", negative="d", scale=1.5),
    Guided(SPARSE, "a", scale=0.3),
    Selective(EXPERT, "abca", lame="a", collision=0.35),
    Complemented(EXPERT, "ab", views=["ba", "bba"]),
    Ensemble([EXPERT, AMATEUR]),
    Ensemble([EXPERT, SPARSE, AMATEUR], weights=[1, 2, 3], rule="product"),
    Ensemble([Guided(EXPERT, "abc"), AMATEUR]),
]


@pytest.mark.parametrize("model", OPERATORS, ids=lambda model: model.name)
def test_keeps_the_contract(model: LanguageModel) -> None:
    assert all(proof.skipped is None for proof in check_language_model(model))


def after(model: LanguageModel, text: str) -> Tensor:
    ids = model.vocab.encode(text).ids
    return model.predict([[model.vocab.bos_id, *ids]]).log_probs()[0, -1]


def row(model: TableModel, text: str) -> Tensor:
    return model.row(model.vocab.encode(text).ids)


@pytest.mark.paper("2210.15097")
@given(st.text("abcd", max_size=5), st.floats(0, 1), st.one_of(st.none(), st.floats(0, 2)))
@settings(max_examples=40, deadline=None)
def test_contrastive_is_its_formula(text: str, alpha: float, beta: float | None) -> None:
    p, q = row(EXPERT, text).exp().tolist(), row(AMATEUR, text).exp().tolist()
    plus, minus = (1.0, 1.0) if beta is None else (1 + beta, beta)
    weights = [
        p[v] ** plus / q[v] ** minus if p[v] > 0 and p[v] >= alpha * max(p) * (1 - 1e-12) else 0.0 for v in range(5)
    ]
    said = after(Contrastive(EXPERT, AMATEUR, alpha=alpha, beta=beta), text).exp().tolist()
    assert said == pytest.approx([w / sum(weights) for w in weights], abs=1e-7)


@pytest.mark.paper("2306.17806")
@given(st.text("abcd", max_size=4), st.text("abcd", max_size=4), st.text("abcd", max_size=4), st.floats(-1, 3))
@settings(max_examples=40, deadline=None)
def test_guidance_is_its_formula(text: str, prompt: str, negative: str, scale: float) -> None:
    c, u = row(EXPERT, prompt + text)[:4].exp().tolist(), row(EXPERT, negative + text)[:4].exp().tolist()
    weights = [u[v] * (c[v] / u[v]) ** scale for v in range(4)]
    said = after(Guided(EXPERT, prompt, negative=negative, scale=scale), text)[:4].exp().tolist()
    assert said == pytest.approx([w / sum(weights) for w in weights], abs=1e-7)


def test_guidance_at_its_ends_is_the_model_under_either_prompt() -> None:
    for scale, prompt in ((1.0, "abc"), (0.0, "dd")):
        said = after(Guided(EXPERT, "abc", negative="dd", scale=scale), "ba")
        torch.testing.assert_close(said, row(EXPERT, prompt + "ba"))


@pytest.mark.paper("2409.05923")
@given(st.text("abcd", max_size=4), st.floats(0, 0.95), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_uscd_is_its_formula(text: str, weight: float, collision: float) -> None:
    model = Selective(EXPERT, "abca", lame="a", weight=weight, collision=collision, kappa=0.0)
    p, n = row(EXPERT, "abca" + text).exp().tolist(), row(EXPERT, "a" + text).exp().tolist()
    if sum(x * x for x in p) > collision:
        expected = p
    else:
        kept = [max(a - weight * b, 0.0) for a, b in zip(p, n, strict=True)]
        expected = [k / sum(kept) for k in kept]
    assert after(model, text).exp().tolist() == pytest.approx(expected, abs=1e-7)


def test_uscd_gates_alike_by_collision_and_by_deviation() -> None:
    for seed in range(20):
        p = torch.softmax(torch.randn(5, generator=torch.Generator().manual_seed(seed)).double() * 2, 0)
        for theta in (0.05, 0.2, 0.3):
            model = Selective(EXPERT, "a", lame="b", std_threshold=theta)
            assert (p.std().item() > theta) == (p.square().sum().item() > model.collision)


def test_uscd_with_one_prompt_twice_changes_nothing() -> None:
    same = Selective(EXPERT, "abca", lame="abca", collision=1.0, kappa=0.0)
    torch.testing.assert_close(after(same, "bd"), row(EXPERT, "abcabd"))
    confident = Selective(EXPERT, "abca", lame="b", collision=0.0)
    torch.testing.assert_close(after(confident, "bd"), row(EXPERT, "abcabd"))


@pytest.mark.paper("2405.17821")
@given(st.text("abcd", max_size=4), st.floats(0, 4), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_ritual_is_a_product_on_the_plausible_set(text: str, alpha: float, beta: float) -> None:
    model = Complemented(EXPERT, "ab", views=["ba"], alpha=alpha, beta=beta)
    p, t = row(EXPERT, "ab" + text).exp().tolist(), row(EXPERT, "ba" + text).exp().tolist()
    weights = [p[v] * t[v] ** alpha if p[v] >= beta * max(p) * (1 - 1e-12) and p[v] > 0 else 0.0 for v in range(5)]
    assert after(model, text).exp().tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-7)


def test_ritual_with_equal_views_is_a_temperature() -> None:
    said = after(Complemented(EXPERT, "ab", views=["ab"], alpha=3.0, beta=0.0), "c")
    torch.testing.assert_close(said, torch.log_softmax(4 * row(EXPERT, "abc"), -1))
    even = after(Complemented(EXPERT, "ab", views=["ab"], alpha=3.0, beta=0.0, normalised=True), "c")
    torch.testing.assert_close(even, row(EXPERT, "abc"))


def test_ensembles_are_their_formulas() -> None:
    p, q = row(EXPERT, "ad").exp(), row(SPARSE, "ad").exp()
    mean = after(Ensemble([EXPERT, SPARSE], weights=[3, 1]), "ad").exp()
    torch.testing.assert_close(mean, 0.75 * p + 0.25 * q)
    product = p**0.75 * q**0.25
    said = after(Ensemble([EXPERT, SPARSE], weights=[3, 1], rule="product"), "ad").exp()
    torch.testing.assert_close(said, product / product.sum())
    alone = after(Ensemble([EXPERT, SPARSE], weights=[1, 0], rule="product"), "ad")
    torch.testing.assert_close(alone, row(EXPERT, "ad"))


def test_continuations_of_a_prompt_follow_the_law_of_the_prompted_model() -> None:
    """The texts of a guided model are continuations: greedy ones equal those of the model after the prompt."""
    plain = generate(EXPERT, "abc", transform="greedy", max_tokens=8)
    assert generate(Guided(EXPERT, "abc", scale=1.0), "", transform="greedy", max_tokens=8).tokens == plain.tokens


def test_a_text_must_begin_with_the_begin_token() -> None:
    model = Guided(EXPERT, "abc")
    state = model.start()
    with pytest.raises(ValueError, match="begin token"):
        model.extend(state, [[0, 1]])
    with pytest.raises(ValueError, match="begin token"):
        model.extend(state, [[BOS]], parents=[-1])
    assert all(inner.lengths == (0,) for inner in state.memory.states)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ensemble([EXPERT, TableModel.random(3)]), "different vocabularies"),
        (lambda: Ensemble([]), "at least one"),
        (lambda: Ensemble([EXPERT], weights=[1, 2]), "weights"),
        (lambda: Ensemble([EXPERT, AMATEUR], weights=[0, 0]), "weights"),
        (lambda: Ensemble([EXPERT], rule="median"), "rule"),
        (lambda: Contrastive(EXPERT, AMATEUR, alpha=2), "alpha"),
        (lambda: Selective(EXPERT, "a", lame="b", weight=1.0), "weight"),
        (lambda: Complemented(EXPERT, "a", views=[]), "views"),
    ],
)
def test_misuse_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_the_context_is_what_the_longest_prefix_leaves() -> None:
    limited = TableModel.random(4, order=1, seed=0)
    limited.context_length = 10
    model = Guided(limited, "abcd", negative="a")
    assert model.context_length == 6
    assert generate(model, "", max_tokens=50).finish == "context"


def test_digests_tell_settings_apart() -> None:
    digests = {m.digest for m in OPERATORS} | {Guided(EXPERT, "abc", negative="d", scale=1.6).digest}
    assert len(digests) == len(OPERATORS) + 1
    assert math.isfinite(after(OPERATORS[0], "a").exp().sum())


@pytest.mark.paper("2210.15097")
def test_the_amateurs_temperature_flattens_it() -> None:
    p, q = row(EXPERT, "ab").exp(), (row(AMATEUR, "ab") / 2.0).softmax(-1)
    weights = torch.where(p > 0, p / q, 0.0)
    said = after(Contrastive(EXPERT, AMATEUR, alpha=0.0, temperature=2.0), "ab").exp()
    torch.testing.assert_close(said, weights / weights.sum())


@pytest.mark.paper("2210.15097")
def test_what_only_the_amateur_calls_impossible_gets_no_infinite_score() -> None:
    said = after(Contrastive(EXPERT, SPARSE, alpha=0.0), "ab")
    assert bool(torch.isfinite(said[:4]).all()) or float(said.exp().sum()) == pytest.approx(1.0)
    assert not bool(said.isnan().any())


@pytest.mark.paper("2409.05923")
def test_uscd_keeps_what_has_a_share_of_the_uniform_probability() -> None:
    model = Selective(EXPERT, "abca", lame="a", weight=0.5, collision=1.0, kappa=0.8)
    p, n = row(EXPERT, "abcab").exp(), row(EXPERT, "ab").exp()
    kept = (p - 0.5 * n).clamp(min=0.0) * (p >= 0.8 / len(p))
    torch.testing.assert_close(after(model, "b").exp(), kept / kept.sum())


@pytest.mark.paper("2405.17821")
def test_ritual_adds_the_mean_of_its_views() -> None:
    model = Complemented(EXPERT, "ab", views=["ba", "bba"], alpha=2.0, beta=0.0)
    p, one, two = (row(EXPERT, prompt + "c").exp() for prompt in ("ab", "ba", "bba"))
    weights = p * one * two
    torch.testing.assert_close(after(model, "c").exp(), weights / weights.sum())


def test_only_what_is_asked_for_is_combined() -> None:
    seen: list[int] = []

    class Counting(Ensemble):
        def combine(self, log_probs: Sequence[Tensor]) -> Tensor:
            seen.append(log_probs[0].shape[0] * log_probs[0].shape[1])
            return super().combine(log_probs)

    model = Counting([EXPERT, AMATEUR])
    following = model.predict([[BOS, 0, 1, 2, 3, 0, 1]])
    assert seen == []
    following[0, -1].log_probs()
    assert seen == [1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Guided(EXPERT, "a", scale=math.nan),
        lambda: Guided(EXPERT, "a", scale=math.inf),
        lambda: Contrastive(EXPERT, AMATEUR, beta=math.nan),
        lambda: Contrastive(EXPERT, AMATEUR, temperature=math.nan),
        lambda: Complemented(EXPERT, "a", views=["b"], alpha=-2.0),
        lambda: Complemented(EXPERT, "a", views=["b"], alpha=math.nan),
        lambda: Selective(EXPERT, "a", lame="b", kappa=-1.0),
        lambda: Selective(EXPERT, "a", lame="b", collision=2.0),
    ],
)
def test_settings_out_of_range(make: Callable[[], LanguageModel]) -> None:
    with pytest.raises(ValueError):
        make()


def test_a_prefix_must_leave_room() -> None:
    short = TableModel.random(4, order=1, seed=1)
    short.context_length = 3
    with pytest.raises(ValueError, match="fills the context"):
        Guided(short, "abcd")


def test_what_is_made_of_an_unknown_model_is_unknown() -> None:
    class Nameless(TableModel):
        digest = ""  # type: ignore[assignment]

    unknown = Nameless.random(4, order=1, seed=1)
    assert Ensemble([EXPERT, unknown]).digest == ""
    assert Ensemble([EXPERT, AMATEUR]).digest not in ("", Ensemble([AMATEUR, EXPERT]).digest)

"""DynaMoE: schedules by hand, routing by a loop over tokens, the dense model at the limits, costs, training, disk."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.route.test_duo import DENSE, HIDDEN, LAYERS, V, dense_model, ids, tokenizer
from torch import Tensor

from nextoken.decode.generate import generate
from nextoken.errors import ModelError
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.route.depth_schedule import depth_schedule
from nextoken.route.expert_usage import expert_usage, rank_correlation
from nextoken.route.experts import DynaMoE, ExpertBlock, ExpertRouting, ThresholdRouting, TokenQuantileRouting
from nextoken.route.experts_fit import ExpertsRecipe, balance_loss, calibrate_experts, fit_experts
from nextoken.testing import check_language_model

SHAPES = ("uniform", "descending", "ascending", "pyramid-up", "pyramid-down", "wave")


def mixture(routing: ExpertRouting | None = None, *, experts: tuple[int, ...] = (4, 3, 2), width: int = 8) -> DynaMoE:
    """Different experts, and thresholds of some text."""
    model = DynaMoE.fresh(DENSE, experts=experts, width=width, routing=routing, seed=1)
    calibrate_experts(model, ids(6, 12, seed=5).tolist())
    return model


MOE = mixture(ThresholdRouting(0.5))


def by_hand(block: ExpertBlock, hidden: Tensor) -> tuple[Tensor, list[set[int]]]:
    """The definition, token by token: y [N, H] and the active sets."""
    made, sets = [], []
    for token in hidden:
        scores = torch.softmax(block.router @ token, 0)
        size, tau = len(scores), block.routing.tau
        theta = float(block.threshold)
        if isinstance(block.routing, TokenQuantileRouting):
            theta = float(np.quantile(scores.detach().numpy(), tau))
        chosen = {number for number in range(size) if float(scores[number]) >= theta - 1e-9}
        chosen = set(range(size)) if tau == 0 else set() if tau == 1 else chosen
        chosen = chosen or {int(scores.argmax())}
        ranked = sorted(chosen, key=lambda number: -float(scores[number]))
        chosen = set(ranked[: block.routing.max_active or size])
        total = sum(float(scores[number]) for number in chosen)
        made.append(sum(float(scores[number]) / total * block.experts[number](token) for number in chosen))
        sets.append(chosen)
    return torch.stack(made), sets


# Depth schedules.


@pytest.mark.paper("2603.01697")
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("uniform", (4, 4, 4, 4, 4)),
        ("descending", (7, 6, 4, 3, 1)),  # 7, 5.5, 4, 2.5, 1: halves up
        ("ascending", (1, 3, 4, 6, 7)),
        ("pyramid-up", (1, 4, 7, 4, 1)),
        ("pyramid-down", (7, 4, 1, 4, 7)),
        ("wave", (4, 7, 4, 1, 4)),
    ],
)
def test_schedules_by_hand(shape: str, expected: tuple[int, ...]) -> None:
    assert depth_schedule(shape, 5, least=1, most=7) == expected  # type: ignore[arg-type]


@settings(max_examples=40)
@given(layers=st.integers(1, 9), least=st.integers(1, 4), span=st.integers(0, 6), extra=st.integers(0, 7))
def test_schedules_keep_bounds_sums_and_symmetries(layers: int, least: int, span: int, extra: int) -> None:
    most = least + span
    total = layers * most + extra
    for shape in SHAPES:
        assert all(least <= size <= most for size in depth_schedule(shape, layers, least=least, most=most))  # type: ignore[arg-type]
        assert sum(depth_schedule(shape, layers, least=least, most=most, total=total)) == total  # type: ignore[arg-type]
    for given_total in (None, total):
        falling = depth_schedule("descending", layers, least=least, most=most, total=given_total)
        rising = depth_schedule("ascending", layers, least=least, most=most, total=given_total)
        assert list(falling) == sorted(falling, reverse=True)
        if layers > 1 and span:
            assert falling == rising[::-1]


def test_schedules_refuse_what_cannot_be() -> None:
    for wrong in ({"least": 0, "most": 2}, {"least": 3, "most": 2}, {"least": 1, "most": 5, "total": 6}):
        with pytest.raises(ValueError):
            depth_schedule("descending", 5, **wrong)
    with pytest.raises(ValueError, match="shape must be"):
        depth_schedule("flat", 3, least=1, most=2)  # type: ignore[arg-type]


# Routing.


ROUTINGS = [
    ThresholdRouting(0.5),
    ThresholdRouting(0.3, max_active=2),
    ThresholdRouting(0.8),
    TokenQuantileRouting(0.6),
    TokenQuantileRouting(0.2, max_active=3),
    ThresholdRouting(0.0),
    ThresholdRouting(0.0, max_active=2),
    ThresholdRouting(1.0),
]


@pytest.mark.paper("2603.01697")
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_block_is_the_loop_over_tokens(routing: ExpertRouting) -> None:
    block = mixture(routing, experts=(5, 1, 1)).blocks[0]
    hidden = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = block(hidden)
        expected, sets = by_hand(block, hidden.view(-1, HIDDEN))
    assert block.last is not None
    active = [{e for e, is_on in enumerate(row) if is_on} for row in block.last.active.view(-1, 5).tolist()]
    assert active == sets
    torch.testing.assert_close(found.view(-1, HIDDEN), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(
    tau=st.floats(0, 1),
    most=st.integers(1, 6),
    own=st.booleans(),
    threshold=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_at_least_one_expert_and_at_most_the_most(
    tau: float, most: int, own: bool, threshold: float, seed: int
) -> None:
    kind = TokenQuantileRouting if own else ThresholdRouting
    scores = torch.softmax(3 * torch.randn(11, 6, generator=torch.Generator().manual_seed(seed)), -1)
    routing = kind(tau, max_active=most)
    active = routing.select(scores, torch.tensor(threshold))
    counts = active.sum(1)
    assert bool((counts >= 1).all()) and bool((counts <= most).all())
    least = scores.masked_fill(~active, 2).amin(1)
    assert bool((scores.masked_fill(active, -1).amax(1) <= least).all()), "an idle expert beats an active one"
    for row in range(len(scores)):  # no row depends on another
        assert torch.equal(routing.select(scores[row : row + 1], torch.tensor(threshold))[0], active[row])


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.35, 0.5, 0.999, 1.0])
def test_the_quantile_is_numpys_higher(tau: float) -> None:
    scores = torch.rand(7, 5, generator=torch.Generator().manual_seed(3))
    expected = np.quantile(scores.numpy(), tau, method="higher")
    assert float(ThresholdRouting(tau).quantile(scores)) == pytest.approx(float(expected))


@pytest.mark.paper("2603.01697")
@pytest.mark.parametrize(("tau", "count"), [(0.3, 5), (0.5, 4), (0.7, 3)])
def test_a_tokens_own_quantile_is_top_k_and_the_kept_one_is_not(tau: float, count: int) -> None:
    own = mixture(TokenQuantileRouting(tau), experts=(8, 1, 1))
    kept = mixture(ThresholdRouting(tau), experts=(8, 1, 1))
    rows = ids(6, 12, seed=5).tolist()
    alike, spread = expert_usage(own, rows), expert_usage(kept, rows)
    assert set(alike.counts[:, 0]) == {count} and alike.variance[0] == 0
    assert np.isnan(alike.with_entropy)
    assert len(set(spread.counts[:, 0])) >= 3
    # It was calibrated on these very tokens, of which the quantile leaves this share.
    assert spread.mean[0] == pytest.approx(8 * (1 - tau), abs=8 / 66 + 0.1)


# Limits.


@pytest.mark.paper("2603.01697")
def test_one_expert_is_the_dense_model_to_the_last_bit() -> None:
    one = DynaMoE.upcycled(DENSE, experts=[1] * LAYERS)
    tokens = ids(3, 9)
    assert torch.equal(one.predict(tokens).log_probs(), DENSE.predict(tokens).log_probs())
    texts = [
        generate(model, ["w3 w4", "w9"], max_tokens=8, seed=2, transform=None, ignore_eos=True)
        for model in (one, DENSE)
    ]
    assert [a.tokens for a in texts[0]] == [b.tokens for b in texts[1]]  # type: ignore[union-attr]


def test_copies_of_one_block_are_the_dense_model_whatever_the_routes() -> None:
    tokens = ids(3, 9)
    for routing in ROUTINGS:
        model = DynaMoE.upcycled(DENSE, experts=(4, 1, 3), routing=routing)
        torch.testing.assert_close(model.predict(tokens).log_probs(), DENSE.predict(tokens).log_probs())


@pytest.mark.paper("2603.01697")
def test_at_tau_0_all_experts_are_mixed_and_at_tau_1_the_best_alone() -> None:
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(4))
    block = mixture(ThresholdRouting(0.0)).blocks[0]
    scores = torch.softmax(hidden @ block.router.T, -1)
    every = torch.stack([expert(hidden) for expert in block.experts], 1)
    torch.testing.assert_close(block(hidden), (scores[..., None] * every).sum(1))
    block.routing = ThresholdRouting(1.0)
    torch.testing.assert_close(block(hidden), every[torch.arange(7), scores.argmax(1)])


# A language model.


@pytest.mark.parametrize("routing", [ThresholdRouting(0.5), TokenQuantileRouting(0.5, max_active=2)])
def test_it_keeps_the_contract(routing: ExpertRouting) -> None:
    check_language_model(mixture(routing))


@settings(max_examples=10)
@given(order=st.permutations(range(5)), seed=st.integers(0, 20))
def test_another_order_of_the_batch_is_another_order_of_the_results(order: list[int], seed: int) -> None:
    tokens = ids(5, 7, seed=seed)
    before = MOE.predict(tokens).log_probs()
    torch.testing.assert_close(MOE.predict(tokens[order]).log_probs(), before[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(MOE.predict(tokens[:1]).log_probs(), before[:1], rtol=1e-5, atol=1e-5)


def test_what_is_spent_is_what_was_active() -> None:
    model = copy.copy(MOE)
    before = model.spent
    tokens = ids(2, 6)
    tokens[1, 4:] = ABSENT
    state = model.start(2)
    model.extend(state, tokens)
    counts = [int(block.last.active[tokens != ABSENT].sum()) for block in model.blocks if block.last is not None]
    model.extend(state, [[3, 4, ABSENT], [5, ABSENT, ABSENT]], [-1, -1, 0])
    nodes = torch.tensor([[True, True, False], [True, False, False]])
    counts = [
        had + int(block.last.active[nodes].sum())
        for had, block in zip(counts, model.blocks, strict=True)
        if block.last is not None
    ]
    cost = model.spent - before
    assert [part.read for part in cost.models] == [n for count in counts for n in (13, 13, count)] + [13]
    assert [part.said for part in cost.models] == [0] * 9 + [13]
    assert {part.passes for part in cost.models} == {2}
    block, expert = MOE.blocks[0], 3 * HIDDEN * 8
    attention = 4 * HIDDEN * HIDDEN + 2 * HIDDEN  # with two norms
    routers = sum(block.router.numel() for block in MOE.blocks)
    head = V * HIDDEN + HIDDEN
    expected = 3 * attention + routers + head + expert * sum(counts) / 13
    assert block.expert.size == expert
    assert cost.activated == pytest.approx(expected)


# Training.


ROWS = [[0, *[2 + (start + 3 * step) % 20 for step in range(10)]] for start in range(20)]
RECIPE = ExpertsRecipe(steps=30, batch=8, rate=1e-2, momentum=0.8)


def test_balance_by_hand() -> None:
    uniform = torch.full((6, 4), 0.25)
    assert float(balance_loss(uniform, torch.ones(6, 4, dtype=torch.bool))) == pytest.approx(1)
    one = torch.tensor([[1.0, 0, 0, 0]] * 6)
    assert float(balance_loss(one, one > 0)) == pytest.approx(4)
    scores = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    active = torch.tensor([[True, True], [False, True], [True, False]])
    # f = (2, 2) / 4, P = (1.7, 1.3) / 3
    assert float(balance_loss(scores, active)) == pytest.approx(2 * (0.5 * 1.7 / 3 + 0.5 * 1.3 / 3))


def test_training_lowers_the_loss_and_the_dense_model_stays() -> None:
    before = DENSE.digest
    models = [DynaMoE.fresh(DENSE, experts=(4, 3, 2), width=8, seed=1) for _ in range(2)]
    digest = models[0].digest
    steps: list[int] = []
    losses = fit_experts(models[0], ROWS, recipe=RECIPE, seed=3, on_step=lambda step: steps.append(step.step))
    assert losses == fit_experts(models[1], ROWS, recipe=RECIPE, seed=3)
    assert steps == list(range(1, 31))
    assert losses[-1] < 0.7 * losses[0]
    assert models[0].digest == models[1].digest != digest
    assert DENSE.digest == before


def test_thresholds_follow_the_quantiles_of_the_batches() -> None:
    model = DynaMoE.fresh(DENSE, experts=(4, 1, 1), width=8, seed=1)
    recipe = ExpertsRecipe(steps=1, batch=len(ROWS), rate=1e-9, momentum=0.75)
    model.predict(torch.tensor(ROWS)[:, :-1])
    assert model.blocks[0].last is not None
    expected = 0.75 * 0.25 + 0.25 * np.quantile(model.blocks[0].last.scores.numpy(), 0.5, method="higher")
    fit_experts(model, ROWS, recipe=recipe)
    assert float(model.blocks[0].threshold) == pytest.approx(float(expected), rel=1e-5)


def test_the_body_may_be_left_as_it_is() -> None:
    model = DynaMoE.upcycled(DENSE, experts=(2, 2, 2))
    before = {name: weight.clone() for name, weight in model.inner.model.state_dict().items()}
    fit_experts(model, ROWS, recipe=ExpertsRecipe(steps=2, batch=8, body=False))
    changed = {name for name, weight in model.inner.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(".mlp." in name for name in changed)


def test_rank_correlation_shares_ranks() -> None:
    assert rank_correlation(np.array([1, 1, 2]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.8660254)


# Disk and misuse.


def test_it_comes_back_from_disk(tmp_path: Path) -> None:
    for model in (mixture(ThresholdRouting(0.4, max_active=2)), DynaMoE.upcycled(DENSE, experts=(2, 1, 2))):
        model.save(tmp_path)
        again = DynaMoE.load(tmp_path, DENSE)
        assert again.digest == model.digest and again.routing == model.routing
        assert torch.equal(again.predict(ids(2, 5)).log_probs(), model.predict(ids(2, 5)).log_probs())
    with pytest.raises(ModelError, match="another model"):
        DynaMoE.load(tmp_path, dense_model(seed=1))


def test_the_digest_tells_thresholds_and_routings_apart() -> None:
    model = mixture(ThresholdRouting(0.5))
    before = model.digest
    with torch.no_grad():
        model.blocks[1].threshold.add_(0.01)
    assert model.digest != before != mixture(ThresholdRouting(0.6)).digest


def test_other_families_are_refused() -> None:
    config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    gpt = HFModel(transformers.GPT2LMHeadModel(config).eval(), tokenizer(), name="gpt")
    with pytest.raises(ModelError, match="gated feed-forward"):
        DynaMoE.upcycled(gpt, experts=[2, 2])


def test_misuse_is_told() -> None:
    with pytest.raises(ValueError, match="3 layers"):
        DynaMoE.upcycled(DENSE, experts=[1, 2])
    with pytest.raises(ValueError, match="3 layers"):
        DynaMoE.upcycled(DENSE, experts=[1, 0, 2])
    with pytest.raises(ValueError, match="width"):
        DynaMoE.fresh(DENSE, experts=[1, 1, 1], width=0)
    with pytest.raises(ValueError, match="transformers model"):
        DynaMoE.upcycled(MOE, experts=[1, 1, 1])  # type: ignore[arg-type]
    for wrong in ({"tau": 1.5}, {"max_active": 0}):
        with pytest.raises(ValueError):
            ThresholdRouting(**wrong)
    for recipe in ({"balance": -1.0}, {"momentum": 1.0}, {"steps": 0}, {"rate": 0.0}):
        with pytest.raises(ValueError):
            ExpertsRecipe(**recipe)
    for rows in ([], [[3]], [[3, V]], [[3] * 49]):
        with pytest.raises(ValueError):
            fit_experts(MOE, rows)

"""Duo-LLM: the dense model or attention alone at the limits, routes by a loop, the oracle recomputed, routers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.route.duo import DuoLLM
from nextoken.route.duo_fit import DuoRecipe, RouterRecipe, activated_share, fit_duo, fit_routers
from nextoken.route.duo_oracle import RouteTable, every_route, route_losses, some_routes
from nextoken.route.duo_route import Decide, FixedRoute, RandomRoute, Width, given_widths
from nextoken.route.duo_routers import DuoRouters
from nextoken.testing import check_language_model

V, LAYERS, HIDDEN, INNER = 24, 3, 16, 24
SKIP, SMALL, BIG = Width.SKIP, Width.SMALL, Width.BIG


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<bos>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, V)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<bos>")), bos_token="<bos>", eos_token="<eos>"
    )


def dense_model(seed: int = 0) -> HFModel:
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=48,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HFModel(transformers.LlamaForCausalLM(config).eval(), tokenizer(), name="dense")


DENSE = dense_model()
DUO = DuoLLM.beside(DENSE, ratio=0.25, seed=1)


def ids(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(2, V, (batch, n), generator=torch.Generator().manual_seed(seed))


def loud_routers(duo: DuoLLM = DUO, *, widths: Sequence[Width] = tuple(Width)) -> DuoRouters:
    """Routers that choose every width for some tokens."""
    routers = DuoRouters(duo, widths=widths)
    with torch.no_grad():
        routers.weight.normal_(generator=torch.Generator().manual_seed(3))
    return routers


@dataclass(frozen=True)
class ByPosition:
    """Route r at one position, another route before it."""

    place: int
    here: tuple[Width, ...]
    before: tuple[Width, ...]
    size: int = 0

    def decides(self, tokens: Tensor, positions: Tensor, depth: int) -> Sequence[Decide]:
        return [
            given_widths(torch.where(positions == self.place, int(a), int(b)))
            for a, b in zip(self.here, self.before, strict=True)
        ]


# Routes.


@pytest.mark.paper("2410.10846")
def test_all_big_is_the_dense_model_to_the_last_bit() -> None:
    tokens = ids(3, 9)
    for model in (DUO, DUO.along(FixedRoute.all(BIG, LAYERS))):
        assert torch.equal(model.predict(tokens).log_probs(), DENSE.predict(tokens).log_probs())


@pytest.mark.paper("2410.10846")
def test_all_skip_is_attention_alone_and_all_small_the_small_model() -> None:
    tokens = ids(3, 9)
    alone = copy.deepcopy(DENSE.model)
    small = copy.deepcopy(DENSE.model)
    with torch.no_grad():
        for layer, other, block in zip(alone.model.layers, small.model.layers, DUO.blocks, strict=True):
            layer.mlp.down_proj.weight.zero_()
            other.mlp = block.small
    for width, network in ((SKIP, alone), (SMALL, small)):
        expected = HFModel(network, tokenizer()).predict(tokens).log_probs()
        assert torch.equal(DUO.along(FixedRoute.all(width, LAYERS)).predict(tokens).log_probs(), expected)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_mixed_widths_are_the_loop_over_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    block, hidden = DUO.blocks[1], torch.randn(2, 5, HIDDEN, generator=generator)
    widths = torch.randint(3, (2, 5), generator=generator)
    blocks = {SKIP: torch.zeros_like, SMALL: block.small, BIG: block.big}
    expected = torch.stack(
        [
            torch.stack([blocks[Width(int(w))](x) for w, x in zip(*row, strict=True)])
            for row in zip(widths, hidden, strict=True)
        ]
    )
    weights = torch.nn.functional.one_hot(widths, 3).float()
    for decided in (widths, weights):
        with DUO.deciding([given_widths(decided)] * LAYERS):
            torch.testing.assert_close(block(hidden), expected)
    assert block.decide is None


@settings(max_examples=10)
@given(routes=st.lists(st.tuples(*[st.sampled_from(Width)] * LAYERS), min_size=2, max_size=2), place=st.integers(0, 5))
def test_a_tokens_route_changes_nothing_before_it(routes: list[tuple[Width, ...]], place: int) -> None:
    tokens = ids(1, 6)
    model = DUO.along(ByPosition(place, routes[0], routes[1]))
    alone = DUO.along(FixedRoute(routes[1]))
    here, there = model.predict(tokens).log_probs(), alone.predict(tokens).log_probs()
    torch.testing.assert_close(here[:, :place], there[:, :place])


@pytest.mark.parametrize(
    "rule",
    [
        FixedRoute((SMALL, SKIP, BIG)),
        RandomRoute((0.3, 0.3, 0.4), seed=5),
        loud_routers(),
        loud_routers(widths=(SMALL, BIG)),
    ],
    ids=["fixed", "random", "routers", "two widths"],
)
def test_along_any_rule_it_keeps_the_contract(rule: FixedRoute | RandomRoute | DuoRouters) -> None:
    check_language_model(DUO.along(rule))


def test_random_routes_have_their_shares() -> None:
    """Six shares of 20,000 draws each within 4.4 standard deviations: false alarms below 1 in 10,000 by other seeds."""
    shares = ((0.2, 0.3, 0.5), (0.0, 1.0, 0.0), (0.6, 0.0, 0.4))
    tokens, positions = ids(200, 100, seed=1), torch.arange(100).expand(200, 100)
    rule = RandomRoute(shares, seed=7)
    drawn = torch.stack([decide(tokens) for decide in rule.decides(tokens, positions, LAYERS)])
    for layer, wanted in enumerate(shares):
        # A token at a position has one draw however often it comes.
        flat = torch.stack([tokens, positions, drawn[layer]]).flatten(1).T.tolist()
        pairs = {(token, place): width for token, place, width in flat}
        for width, share in enumerate(wanted):
            count = sum(found == width for found in pairs.values())
            assert abs(count - share * len(pairs)) <= 4.4 * (len(pairs) * share * (1 - share)) ** 0.5
    first, last = (drawn[0] == BIG).double().flatten(), (drawn[2] == BIG).double().flatten()
    assert abs(float(torch.corrcoef(torch.stack([first, last]))[0, 1])) < 0.1
    again = RandomRoute(shares, seed=8).decides(tokens, positions, LAYERS)[0](tokens)
    assert 0.2 < float((again == drawn[0]).double().mean()) < 0.6


def test_what_is_spent_is_what_was_run() -> None:
    route = (BIG, SKIP, SMALL)
    model = DUO.along(FixedRoute(route))
    tokens = ids(2, 6)
    tokens[1, 4:] = ABSENT
    model.extend(model.start(2), tokens)
    reads = [n for width in route for n in (10, 10 * (width == SMALL), 10 * (width == BIG))]
    assert [part.read for part in model.spent.models] == [*reads, 10]
    attention, head = 4 * HIDDEN * HIDDEN + 2 * HIDDEN, V * HIDDEN + HIDDEN
    assert model.spent.activated == 3 * attention + head + 3 * HIDDEN * (INNER + 6)
    assert DUO.along(FixedRoute(route)).spent.said == 0
    routed = DUO.along(loud_routers())
    routed.predict(tokens)
    extra = [a.parameters - b.parameters for a, b in zip(routed.spent.models, model.spent.models, strict=True)]  # type: ignore[operator]
    assert extra == [3 * HIDDEN + 3, 0, 0] * 3 + [0]


# The oracle.


@pytest.mark.paper("2410.10846")
@pytest.mark.parametrize("context", [(BIG, BIG, BIG), (SMALL, SKIP, BIG)])
def test_the_oracle_is_recomputation_along_every_route(context: tuple[Width, ...]) -> None:
    rows = [ids(1, 5, seed=1)[0].tolist(), ids(1, 3, seed=2)[0].tolist()]
    other = [ids(1, 5, seed=3)[0].tolist(), ids(1, 3, seed=4)[0].tolist()]
    routes = every_route(LAYERS, widths=Width)
    assert len(set(routes)) == 27
    table = route_losses(DUO, rows, routes, context=context, control=other)
    at = 0
    for row, control in zip(rows, other, strict=True):
        for place in range(len(row) - 1):
            prefix = [row[: place + 1]]
            said = torch.stack(
                [DUO.along(ByPosition(place, r, context)).predict(prefix).log_probs()[0, -1] for r in routes]
            )
            np.testing.assert_allclose(table.losses[at], -said[:, row[place + 1]].numpy(), atol=1e-4)
            np.testing.assert_allclose(table.control[at], -said[:, control[place + 1]].numpy(), atol=1e-4)
            own = DUO.along(FixedRoute(context)).predict(prefix)
            assert table.context[at] == pytest.approx(-float(own.log_probs()[0, -1, row[place + 1]]), abs=1e-4)
            assert table.entropies[at] == pytest.approx(float(own.statistics().entropy[0, -1]), abs=1e-4)
            at += 1
    assert at == len(table.losses)


TABLE = route_losses(DUO, ids(4, 8).tolist(), every_route(LAYERS))


def test_the_control_draws_from_the_context() -> None:
    """24 tokens of which some would differ; the same seed draws the same, and true tokens as control change nothing."""
    rows, routes = ids(4, 7).tolist(), every_route(LAYERS)
    same = route_losses(DUO, rows, routes, control=rows)
    np.testing.assert_array_equal(same.control, same.losses)
    drawn = [route_losses(DUO, rows, routes, seed=seed).control for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any() and (drawn[0] != same.losses).any()
    # What a model draws itself is likelier to it than what it did not: their mean is near the entropy.
    assert drawn[0][:, -1].mean() < same.losses[:, -1].mean()


@pytest.mark.paper("2410.10846")
@settings(max_examples=15)
@given(draws=st.integers(1, 40), most=st.integers(0, LAYERS), control=st.booleans())
def test_oracle_best_of_several_and_mean_are_in_order(draws: int, most: int, control: bool) -> None:
    best = TABLE.best(most=most, control=control)
    several = TABLE.best_of(draws, most=most, control=control)
    mean = TABLE.mean(most=most, control=control)
    assert (best <= several).all() and (several <= mean + 1e-12).all()
    assert (TABLE.best_of(draws + 1, most=most, control=control) <= several + 1e-12).all()
    if most:
        assert (best <= TABLE.best(most=most - 1, control=control)).all()
    exact = [TABLE.best(exactly=big, control=control) for big in range(most + 1)]
    np.testing.assert_array_equal(best, np.min(exact, 0))
    np.testing.assert_allclose(TABLE.best_of(1, most=most, control=control), mean)
    assert (TABLE.gain(most=most, control=control) >= 0).all()


def test_best_of_several_is_enumeration() -> None:
    losses = np.array([[3.0, 1.0, 2.0, 1.0], [0.5, 4.0, 4.0, 0.1]])
    table = RouteTable(every_route(2), losses, losses[::-1], losses[:, -1], losses[:, 0])
    for draws in (1, 2, 3):
        expected = [np.mean([min(some) for some in itertools.product(row, repeat=draws)]) for row in losses]
        np.testing.assert_allclose(table.best_of(draws), expected)
    np.testing.assert_array_equal(table.bigs, [0, 1, 1, 2])
    np.testing.assert_array_equal(table.gain(), [2.0, 0.4])
    np.testing.assert_array_equal(table.gain(most=1, control=True), [0.0, 2.0])
    np.testing.assert_array_equal(table.best(exactly=1), [1.0, 4.0])
    with pytest.raises(ValueError, match="no route"):
        table.best(exactly=3)
    with pytest.raises(ValueError, match="draws"):
        table.best_of(0)


def test_drawn_routes_and_their_number() -> None:
    drawn = some_routes(LAYERS, 50, widths=(SKIP, BIG), seed=1)
    assert drawn == some_routes(LAYERS, 50, widths=(SKIP, BIG), seed=1) != some_routes(LAYERS, 50, widths=(SKIP, BIG))
    assert set(drawn) == set(every_route(LAYERS, widths=(SKIP, BIG)))
    with pytest.raises(ValueError, match="too many"):
        every_route(17)


# Training.


ROWS = [[0, *[2 + (start + 3 * step) % 20 for step in range(10)]] for start in range(20)]


@pytest.fixture(scope="module")
def trained() -> tuple[DuoLLM, tuple[float, ...]]:
    duo = DuoLLM.beside(DENSE, ratio=0.25, seed=1)
    return duo, fit_duo(duo, ROWS, widths=Width, recipe=DuoRecipe(steps=40, batch=8, rate=1e-2), seed=2)


def loss_of(duo: DuoLLM) -> float:
    said = duo.predict(torch.tensor(ROWS)[:, :-1]).statistics(torch.tensor(ROWS)[:, 1:]).logprob
    assert said is not None
    return -float(said.mean())


@pytest.mark.paper("2410.10846")
def test_random_routing_teaches_every_route(trained: tuple[DuoLLM, tuple[float, ...]]) -> None:
    duo, losses = trained
    assert losses[-1] < 0.6 * losses[0]
    for route in every_route(LAYERS, widths=Width):
        rule = FixedRoute(route)
        assert loss_of(duo.along(rule)) < loss_of(DUO.along(rule)) - 0.5
    again = DuoLLM.beside(DENSE, ratio=0.25, seed=1)
    few = [
        fit_duo(model, ROWS, recipe=DuoRecipe(steps=3), seed=2)
        for model in (again, DuoLLM.beside(DENSE, ratio=0.25, seed=1))
    ]
    assert few[0] == few[1]
    assert again.digest not in (duo.digest, DUO.digest)
    assert torch.equal(DENSE.predict(ids(2, 5)).log_probs(), dense_model().predict(ids(2, 5)).log_probs())


@pytest.mark.paper("2410.10846")
def test_routers_at_either_end_of_the_budget_take_one_width(trained: tuple[DuoLLM, tuple[float, ...]]) -> None:
    duo, _ = trained
    before = duo.inner.digest
    recipe = RouterRecipe(steps=25, batch=8, rate=0.1, weight=200.0)
    for budget, width in ((1.0, BIG), (0.25, SMALL)):
        routers, _ = fit_routers(duo, ROWS, budget=budget, recipe=recipe)
        expected = duo.along(FixedRoute.all(width, LAYERS)).predict(torch.tensor(ROWS)).log_probs()
        assert torch.equal(duo.along(routers).predict(torch.tensor(ROWS)).log_probs(), expected)
    assert duo.inner.digest == before


@pytest.mark.paper("2410.10846")
def test_routers_keep_near_their_budget(trained: tuple[DuoLLM, tuple[float, ...]]) -> None:
    duo, _ = trained
    routers, losses = fit_routers(duo, ROWS, budget=0.6, widths=Width, recipe=RouterRecipe(steps=40, batch=8))
    again, same = fit_routers(duo, ROWS, budget=0.6, widths=Width, recipe=RouterRecipe(steps=40, batch=8))
    assert losses == same and repr(routers) == repr(again)
    shares = activated_share(duo.along(routers), ROWS)
    np.testing.assert_allclose(np.sum(shares, 1), 1)
    costs = np.array([block.costs for block in duo.blocks])
    np.testing.assert_allclose(costs, [[0, 0.25, 1]] * LAYERS)
    assert abs(float((np.array(shares) * costs).sum(1).mean()) - 0.6) < 0.02
    RandomRoute(shares)


def test_routers_choose_by_their_logits() -> None:
    routers = loud_routers()
    model = DUO.along(routers)
    hidden = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = (hidden @ routers.weight[1].T + routers.bias[1]).argmax(-1)
    decided = routers.decides(ids(2, 4), torch.zeros(2, 4), LAYERS)[1](hidden)
    assert torch.equal(decided, expected)
    model.predict(ids(3, 8))
    assert all(block.last is not None and len(set(block.last.flatten().tolist())) > 1 for block in model.blocks)
    two = loud_routers(widths=(BIG, SMALL)).decides(ids(2, 4), torch.zeros(2, 4), LAYERS)[0](hidden)
    assert set(two.flatten().tolist()) == {SMALL, BIG}


# Disk and misuse.


def test_duo_and_routers_come_back_from_disk(tmp_path: Path) -> None:
    DUO.save(tmp_path)
    routers = loud_routers(widths=(SMALL, BIG))
    routers.save(tmp_path)
    duo = DuoLLM.load(tmp_path, DENSE)
    again = DuoRouters.load(tmp_path, duo)
    assert duo.digest == DUO.digest
    assert duo.along(again).digest == DUO.along(routers).digest != duo.digest
    assert torch.equal(
        duo.along(again).predict(ids(2, 5)).log_probs(), DUO.along(routers).predict(ids(2, 5)).log_probs()
    )
    with pytest.raises(ModelError, match="another model"):
        DuoLLM.load(tmp_path, dense_model(seed=1))
    with pytest.raises(ModelError, match="another duo"):
        DuoRouters.load(tmp_path, DuoLLM.beside(DENSE, ratio=0.25, seed=2))


def test_states_belong_to_one_rule() -> None:
    state = DUO.along(FixedRoute.all(SKIP, LAYERS)).start()
    with pytest.raises(ValueError, match="another model"):
        DUO.extend(state, [[3]])


def test_misuse_is_told() -> None:
    for ratio in (0.0, 1.5):
        with pytest.raises(ValueError, match="ratio"):
            DuoLLM.beside(DENSE, ratio=ratio)
    for width in (0, INNER + 1):
        with pytest.raises(ValueError, match="inner units"):
            DuoLLM(DENSE, width=width, seed=0)
    with pytest.raises(ValueError, match="transformers model"):
        DuoLLM.beside(DUO)  # type: ignore[arg-type]
    for rule in (FixedRoute((BIG,)), RandomRoute(((0.5, 0.5, 0.0),) * 2)):
        with pytest.raises(ValueError, match="3 layers"):
            DUO.along(rule).predict([[3]])
    for shares in ((0.5, 0.5, 0.5), (-0.5, 1.0, 0.5), (0.5, 0.5)):
        with pytest.raises(ValueError, match="shares"):
            RandomRoute(shares)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two widths"):
        DuoRouters(DUO, widths=[BIG])
    with pytest.raises(ValueError, match="budget lies"):
        fit_routers(DUO, ROWS, budget=0.1)
    with pytest.raises(ValueError, match="widths"):
        fit_duo(DUO, ROWS, widths=[])
    for rows in ([], [[3]], [[3, V]]):
        with pytest.raises(ValueError):
            fit_duo(DUO, rows)
        with pytest.raises(ValueError):
            route_losses(DUO, rows, every_route(LAYERS))
    for routes in ([], [(BIG,)]):
        with pytest.raises(ValueError, match="routes through"):
            route_losses(DUO, ROWS, routes)
    with pytest.raises(ValueError, match="same lengths"):
        route_losses(DUO, ROWS, every_route(LAYERS), control=ROWS[:2])
    for recipe in ({"weight": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError):
            RouterRecipe(**recipe)

"""Drafts with several exits: the law, their limits, giving up, sorted fine-tuning, and the choice of a setting."""

from __future__ import annotations

import copy
import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.test_sorted_exits import DRAFTS, EXITS, LLAMA
from tests.model.test_stack import DEPTH, V
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request, Running
from nextoken.model.base import LanguageModel
from nextoken.model.hf import HFModel
from nextoken.model.sorted_exits import SortedExits
from nextoken.model.table import TableModel
from nextoken.speculate import (
    Branching,
    Chain,
    DraftCosts,
    DraftModel,
    Dynamic,
    ExitChoice,
    ExitReadings,
    Independent,
    Row,
    SortedRecipe,
    Speculation,
    StochasticBeam,
    Sure,
    choose_exits,
    exit_losses,
    exit_readings,
    fit_sorted,
)
from nextoken.speculate.exit_choice import expected
from nextoken.speculate.shapes import Shape
from nextoken.testing import check_speculation

TOP_3 = "top_k(3)"


def target_like(model: HFModel, noise: float) -> HFModel:
    """The same model with other weights, by some share of their spread."""
    network = copy.deepcopy(model.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return HFModel(network, model.tokenizer, name="target")


TARGET = target_like(LLAMA.model, 0.05)
PROMPTS = tuple(
    (0, *torch.randint(2, V, (5,), generator=torch.Generator().manual_seed(number)).tolist()) for number in range(4)
)


def outputs(loop: Loop, rule: str, length: int = 16) -> list[tuple[int, ...]]:
    change = transform(rule)
    tickets = [loop.submit(Request(p, change, length, seed=i, ignore_eos=True)) for i, p in enumerate(PROMPTS)]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [tuple(found[ticket]) for ticket in tickets]


def first_layers(model: HFModel, count: int) -> HFModel:
    """A network of its own of a model's first layers."""
    network = copy.deepcopy(model.model)
    del network.model.layers[count:]
    network.config.num_hidden_layers = count
    return HFModel(network, model.tokenizer, name=f"first {count}")


# The law, and the limits.


SHAPES: dict[str, Shape] = {
    "chain": Chain(3),
    "chain that gives up": Sure(0.3, Chain(4)),
    "branching that gives up": Sure(0.25, Branching((2, 2, 1))),
    "dynamic that gives up": Sure(0.25, Dynamic(6)),
}


@pytest.mark.slow
@pytest.mark.paper("2407.01955")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_law_is_kept_by_exits_that_mix(shape: str) -> None:
    """Greedy and followed tokens, and strings by chi-square; false alarm 1e-4 each."""
    draft = LLAMA.at(LLAMA.thresholds)

    def speculation() -> Speculation:
        return Speculation(DraftModel(draft, SHAPES[shape]))

    check_speculation(TARGET, speculation, prompts=1, draws=300, seed=1)
    assert min(draft.spent.told) > 100


@pytest.mark.paper("2407.01955")
@pytest.mark.parametrize("rule", ["greedy", TOP_3])
@pytest.mark.parametrize(("thresholds", "depth"), [((0, 1), 1), ((1, 0), 3), ((1, 1), DEPTH)])
def test_thresholds_at_their_ends_are_fixed_drafts_token_for_token(
    thresholds: tuple[float, float], depth: int, rule: str
) -> None:
    for shape in (Chain(3), Branching((2, 1)))[: 1 if rule == "greedy" else 2]:
        sorted_, fixed = (
            Speculation(DraftModel(model, shape)) for model in (LLAMA.at(thresholds), first_layers(LLAMA.model, depth))
        )
        assert outputs(sorted_.loop(TARGET), rule, 10) == outputs(fixed.loop(TARGET), rule, 10)
        assert sorted_.tally == fixed.tally
        assert sorted_.tally.failures == 0
        assert sorted_.tally.accepted > 0


@pytest.mark.paper("2407.01955")
def test_one_draft_serves_every_target() -> None:
    draft = LLAMA.at(LLAMA.thresholds)
    for target in (target_like(LLAMA.model, 0.6), draft, DRAFTS["mistral"]):
        speculation = Speculation(DraftModel(draft, Sure(0.1)))
        assert outputs(speculation.loop(target), "greedy", 10) == outputs(Loop(target), "greedy", 10)
        assert speculation.tally.failures == 0


@settings(max_examples=6)
@given(st.tuples(st.floats(0, 1), st.floats(0, 1)), st.floats(0, 1), st.integers(1, 5))
def test_greedy_tokens_are_those_of_plain_decoding(thresholds: tuple[float, float], floor: float, length: int) -> None:
    speculation = Speculation(DraftModel(LLAMA.at(thresholds), Sure(floor, Chain(length))))
    assert outputs(speculation.loop(TARGET), "greedy", 8) == plain_greedy()
    assert speculation.tally.failures == 0


@cache
def plain_greedy() -> list[tuple[int, ...]]:
    return outputs(Loop(TARGET), "greedy", 8)


# Giving up.


SHAPES_OF_ALL_KINDS = [
    Chain(4),
    Branching((2, 2, 1)),
    StochasticBeam(3, 3),
    Dynamic(8),
    Dynamic(8, threshold=0.05),
    Independent(3, 3),
]


def tree_of(model: LanguageModel, shape: Shape, rule: str, seed: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The context, and the texts [n] of the nodes of a draft after it."""
    context = PROMPTS[seed % len(PROMPTS)]
    running = Running(0, Request(context, transform(rule), 100, seed=seed, ignore_eos=True))
    row = Row(running, context, 12, torch.Generator().manual_seed(seed))
    (branches,) = DraftModel(model, shape).propose([row]).rows
    texts: list[tuple[int, ...]] = []
    for token, parent in zip(branches.tokens, branches.parents, strict=True):
        texts.append((*(texts[parent] if parent >= 0 else context), token))
    return context, texts


@pytest.mark.paper("2407.01955")
@pytest.mark.parametrize("shape", SHAPES_OF_ALL_KINDS, ids=repr)
@settings(max_examples=5)
@given(
    floor=st.sampled_from([0.1, 0.2, 0.3, 0.4]),
    seed=st.integers(0, 50),
    rule=st.sampled_from(["", "temperature(2)", "greedy"]),
)
def test_nothing_follows_where_the_draft_is_unsure(shape: Shape, floor: float, seed: int, rule: str) -> None:
    draft = LLAMA.at(LLAMA.thresholds)
    context, texts = tree_of(draft, Sure(floor, shape), rule, seed)
    for text in {text[:-1] for text in texts}:
        assert float(draft.predict([text])[0, -1].log_probs().max().exp()) >= floor
    if float(draft.predict([context])[0, -1].log_probs().max().exp()) >= floor:
        assert texts, "where it is sure it guesses"


@pytest.mark.parametrize("shape", SHAPES_OF_ALL_KINDS, ids=repr)
def test_without_a_floor_a_shape_is_as_it_was(shape: Shape) -> None:
    draft = LLAMA.at(LLAMA.thresholds)
    for seed in range(4):
        assert tree_of(draft, Sure(0.0, shape), "", seed) == tree_of(draft, shape, "", seed)
        floored = tree_of(draft, Sure(0.2, shape), "", seed)
        assert tree_of(draft, Sure(0.2, Sure(0.1, shape)), "", seed) == floored
        assert tree_of(draft, Sure(0.1, Sure(0.2, shape)), "", seed) == floored
    assert Sure(0.0, shape).is_chain == shape.is_chain


def test_a_draft_that_is_never_sure_leaves_the_target_alone() -> None:
    speculation = Speculation(DraftModel(LLAMA.at((1, 1)), Sure(1.0)))
    assert outputs(speculation.loop(TARGET), TOP_3) == outputs(Loop(TARGET), TOP_3)
    assert (speculation.tally.drafted, speculation.tally.tokens_per_pass) == (0, 1.0)
    with pytest.raises(ValueError, match="floor is a probability"):
        Sure(1.5)


# Sorted fine-tuning.


def ordinary(model: HFModel, rows: list[list[int]], recipe: SortedRecipe) -> tuple[HFModel, list[float]]:
    """Ordinary fine-tuning by the loss of transformers, all rows in every batch."""
    network = copy.deepcopy(model.model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    losses = []
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    for step in range(recipe.steps):
        loss = network(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
    return HFModel(network, model.tokenizer), losses


@pytest.mark.paper("2309.08968")
@pytest.mark.parametrize("depth", [2, DEPTH])
def test_with_one_exit_it_is_ordinary_fine_tuning(depth: int) -> None:
    rows = [[0, *torch.randint(2, V, (size,)).tolist()] for size in (9, 5, 7)]
    recipe = SortedRecipe(steps=4, batch=3, rate=2e-3, weight_decay=0.1)
    fit = fit_sorted(LLAMA.model, rows, exits=[depth], recipe=recipe)
    expected_, losses = ordinary(first_layers(LLAMA.model, depth), rows, recipe)
    assert [loss for (loss,) in fit.losses] == pytest.approx(losses, rel=1e-5)
    text = torch.tensor(rows[:1])
    torch.testing.assert_close(
        fit.draft.predict(text).log_probs(), expected_.predict(text).log_probs(), rtol=1e-3, atol=1e-3
    )
    assert fit.draft.stack.depth == depth


@pytest.mark.paper("2309.08968")
def test_the_loss_is_the_mean_over_exits_and_moves_all_weights() -> None:
    rows = [[0, *torch.randint(2, V, (8,)).tolist()] for _ in range(2)]
    before = LLAMA.model.digest
    steps = []
    fit = fit_sorted(
        LLAMA.model, rows, exits=EXITS, recipe=SortedRecipe(steps=1, batch=2, rate=1e-3), on_step=steps.append
    )
    text = torch.tensor(rows)
    for loss, hidden in zip(fit.losses[0], LLAMA.states(text[:, :-1]), strict=True):
        logits = LLAMA.stack.head.logits(LLAMA.stack.finish(hidden)).detach()
        assert loss == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())), rel=1e-5)
    assert steps[0].loss == pytest.approx(sum(fit.losses[0]) / 3, rel=1e-6)
    assert LLAMA.model.digest == before, "the model stays as it is"
    for name, weight in fit.draft.model.model.named_parameters():
        assert not torch.equal(weight, LLAMA.model.model.get_parameter(name)), f"{name} was not trained"
    again = fit_sorted(LLAMA.model, rows, exits=EXITS, recipe=SortedRecipe(steps=1, batch=2, rate=1e-3))
    assert again.draft.digest == fit.draft.digest


@cache
def learnt() -> tuple[SortedExits, SortedExits, list[list[int]]]:
    """Trained with three exits and with the last alone on strings of an order-2 table, and strings held out."""
    table = TableModel.random(6, order=2, seed=2, concentration=0.05)
    rows = [[0, *row] for row in (_strings(table, 160, 30, seed=0) + 2).tolist()]
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = HFModel(LlamaForCausalLM(config).eval(), LLAMA.model.tokenizer, name="small")
    recipe, depths = SortedRecipe(steps=100, batch=16, rate=2e-2), (1, 2, 4)
    sorted_, plain = (fit_sorted(model, rows[:128], exits=exits, recipe=recipe).draft for exits in (depths, (4,)))
    return sorted_, SortedExits(plain.model, depths, thresholds=(1, 1)), rows[128:]


def _strings(table: TableModel, count: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    state = table.start(count)
    tokens = torch.full((count, 1), table.vocab.bos_id)
    made = []
    for _ in range(length):
        log_probs = table.extend(state, tokens).log_probs()[:, 0]
        log_probs[:, [i for i in range(table.vocab.size) if i in table.vocab.specials]] = -math.inf
        tokens = torch.multinomial(log_probs.exp(), 1, generator=generator)
        made.append(tokens)
    return torch.cat(made, 1)


@pytest.mark.slow
@pytest.mark.paper("2309.08968")
def test_after_it_the_loss_falls_with_depth_and_shallow_exits_speak() -> None:
    sorted_, plain, rows = learnt()
    by_depth, untrained = exit_losses(sorted_, rows), exit_losses(plain, rows)
    assert all(deep < shallow - 0.01 for shallow, deep in pairwise(by_depth))
    assert by_depth[0] < untrained[0] - 0.03
    # The deepest exit pays nothing that is seen for the others.
    assert by_depth[-1] < untrained[-1] + 0.02


def test_training_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="no rows"):
        fit_sorted(LLAMA.model, [], exits=EXITS)
    with pytest.raises(ValueError, match="at least two"):
        fit_sorted(LLAMA.model, [[3]], exits=EXITS)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fit_sorted(LLAMA.model, [[3, V]], exits=EXITS)
    with pytest.raises(ValueError, match="holds 64"):
        fit_sorted(LLAMA.model, [[3] * 65], exits=EXITS)
    for exits in ((), (2, 1), (1, 9)):
        with pytest.raises(ValueError, match="exits must be rising"):
            fit_sorted(LLAMA.model, [[3, 4]], exits=exits)
    with pytest.raises(ValueError, match="rate and clip"):
        SortedRecipe(rate=0)


# The choice of a setting.


def responses(rule: str, length: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return list(zip(PROMPTS, outputs(Loop(TARGET), rule, length), strict=True))


def test_readings_by_hand() -> None:
    ((prompt, output), *_) = said = responses(TOP_3, 7)
    for temperature in (0.0, 0.7):
        readings = exit_readings(LLAMA, TARGET, [(prompt, output[:4]), *said], temperature=temperature)
        assert readings.lengths == (4, 7, 7, 7, 7)
        assert float(readings.chances[:, 0, 4:].abs().sum()) == 0
        for place in (0, 3):
            text = torch.tensor([[*prompt, *output[:place]]])
            p = TARGET.predict(text).log_probs()[0, -1]
            for j, exit in enumerate(EXITS):
                q = first_layers(LLAMA.model, exit).predict(text).log_probs()[0, -1]
                assert float(readings.chances[j, 0, place]) == pytest.approx(float(q.max().exp()), rel=1e-4)
                if temperature:
                    pair = [torch.softmax(scores / temperature, -1) for scores in (p, q)]
                    overlap = float(torch.minimum(*pair).sum())
                else:
                    overlap = float(p.argmax() == q.argmax())
                assert float(readings.overlaps[j, 0, place]) == pytest.approx(overlap, abs=1e-4)


@pytest.mark.paper("2407.01955")
@settings(max_examples=8)
@given(
    thresholds=st.tuples(*[st.sampled_from([0.0, 0.1, 0.15, 0.25, 1.0])] * 2),
    length=st.integers(1, 4),
    floor=st.sampled_from([0.0, 0.1, 0.2]),
)
def test_expected_passes_of_greedy_decoding_are_those_that_happen(
    thresholds: tuple[float, float], length: int, floor: float
) -> None:
    (told,) = expected(greedy_readings(), thresholds, length=length, floors=[floor], costs=DraftCosts(0.0, 0.0))
    speculation = Speculation(told.drafter(LLAMA))
    outputs(speculation.loop(TARGET), "greedy", 10)
    assert told.tokens_per_pass == pytest.approx(speculation.tally.tokens_per_pass, rel=1e-9)
    assert told.cost == pytest.approx(1 / told.tokens_per_pass)


@cache
def greedy_readings() -> ExitReadings:
    return exit_readings(LLAMA, TARGET, responses("greedy", 10), temperature=0)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 999),
    thresholds=st.tuples(*[st.sampled_from([0.0, 0.3, 0.6, 1.0])] * 2),
    length=st.integers(1, 3),
    floor=st.sampled_from([0.0, 0.4, 0.7]),
)
def test_expected_cost_by_brute_force(seed: int, thresholds: tuple[float, float], length: int, floor: float) -> None:
    """Every sequence of accepted lengths of one text, with its probability."""
    size, costs = 6, DraftCosts(layer=0.01, head=0.02, look=0.03, guess=0.05)
    chances, overlaps = torch.rand(2, 3, 1, size, generator=torch.Generator().manual_seed(seed))
    level, asked = [], []
    for place in range(size):
        here = 0
        count = 0
        for j in range(3):
            here = j
            if j < 2 and thresholds[j] >= 1:
                continue
            count += 1
            if j == 2 or float(chances[j, 0, place]) >= thresholds[j]:
                break
        level.append(here)
        asked.append(count)

    def cost_from(start: int) -> float:
        if start >= size:
            return 0.0
        looks, guesses = [], []
        for place in range(start, min(start + length, size - 1)):
            looks.append(place)
            if float(chances[level[place], 0, place]) < floor:
                break
            guesses.append(place)
        total, alive = 0.0, 1.0
        for m in range(len(guesses) + 1):
            stands = float(overlaps[level[guesses[m]], 0, guesses[m]]) if m < len(guesses) else 0.0
            spent = 1 + costs.guess * len(guesses) + sum(costs.look + costs.head * asked[place] for place in looks)
            for j, (below, above) in enumerate(pairwise((0, *EXITS))):
                deep = max((number + 1 for number, place in enumerate(looks) if level[place] >= j), default=0)
                if max(level) >= j:
                    spent += costs.layer * (above - below) * max(m + 1, deep)
            total += alive * (1 - stands) * (spent + cost_from(start + m + 1))
            alive *= stands
        return total

    readings = ExitReadings(EXITS, chances, overlaps, (size,))
    (told,) = expected(readings, thresholds, length=length, floors=[floor], costs=costs)
    assert told.cost == pytest.approx(cost_from(1) / (size - 1), rel=1e-6)


def test_the_choice_is_the_cheapest_and_follows_the_costs() -> None:
    readings, floors, lengths = greedy_readings(), (0.0, 0.15), (1, 2, 4)
    levels = [(low, high) for low in (0.0, 0.15, 1.0) for high in (0.0, 0.15, 1.0)]

    def choice(costs: DraftCosts) -> ExitChoice:
        return choose_exits(readings, costs=costs, thresholds=levels, lengths=lengths, floors=floors)

    for costs in (DraftCosts(0.05, 0.01), DraftCosts(0.0, 0.0), DraftCosts(0.01, 0.2, 0.1, 0.1)):
        every = [
            told.cost
            for pair in levels
            for length in lengths
            for told in expected(readings, pair, length=length, floors=floors, costs=costs)
        ]
        assert choice(costs).cost == pytest.approx(min(every))
    free = choice(DraftCosts(0.0, 0.0))
    dear, asked = choice(DraftCosts(0.3, 0.0)), choice(DraftCosts(0.0, 0.3))
    assert (free.floor, free.length) == (0.0, 4)
    assert dear.tokens_per_pass < free.tokens_per_pass
    # Where only asking costs, it is one exit that speaks, whatever the depth.
    assert not any(0 < threshold < 1 for threshold in asked.thresholds)


def test_choosing_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="different vocabularies"):
        exit_readings(LLAMA, TableModel.random(3), [((0,), (1,))])
    with pytest.raises(ValueError, match="at least one token"):
        exit_readings(LLAMA, TARGET, [((0,), ())])
    with pytest.raises(ValueError, match="must have two tokens"):
        exit_readings(LLAMA, TARGET, [((0,), (1,))])
    with pytest.raises(ValueError, match="one threshold for each"):
        expected(greedy_readings(), (0.5,), length=2, floors=[0.0], costs=DraftCosts(0, 0))
    with pytest.raises(ValueError, match="at least 0"):
        DraftCosts(-1.0, 0.0)

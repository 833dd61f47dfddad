"""Think-at-Hard: the order of attention against one laid-out pass of transformers, its limits, labels and training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F

from nextoken.decode.generate import generate
from nextoken.errors import ModelError
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.lora import GatedLora
from nextoken.model.sarsa import FitStep
from nextoken.model.stack import Stack
from nextoken.model.table import TableModel
from nextoken.route._depth_memory import DepthMemory
from nextoken.route.think_at_hard import ThinkAtHard
from nextoken.route.think_decider import (
    AlwaysThink,
    Decider,
    DeciderNetwork,
    LearnedDecider,
    NeverThink,
    RandomThink,
    Seen,
    layers_to_read,
    passes_needed,
)
from nextoken.route.think_fit import DeciderRecipe, ThinkRecipe, fit_decider, fit_thinking
from nextoken.testing import check_language_model

V, H, DEPTH, K = 24, 16, 3, 7
_SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, V)}}
    backend = Tokenizer(WordLevel(words, unk_token="<s>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def built(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float64) -> HFModel:
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    return HFModel(network.to(dtype), tokenizer(), name=config.model_type)


def adapter(model: HFModel, *, moved: float = 0.3) -> GatedLora:
    """Whose B is not 0 any more."""
    lora = GatedLora(Stack(model), rank=2, alpha=4.0).to(model.model.dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for up in lora.ups.values():
            up.copy_(moved * torch.randn(up.shape, generator=generator))
    return lora


WIDE, SINGLE = (built(transformers.LlamaConfig(**_SIZES), dtype) for dtype in (torch.float64, torch.float32))
WINDOWS = built(
    transformers.Qwen3Config(**_SIZES, head_dim=8, sliding_window=3, use_sliding_window=True, max_window_layers=1)
)
ADAPTERS = {id(model): adapter(model) for model in (WIDE, SINGLE, WINDOWS)}
torch.manual_seed(0)
# At its first weights c is near 1/2.
LEARNED = LearnedDecider(DeciderNetwork(layers=(1, 3), hidden=H, leading=5, width=8, blocks=2, expansion=2))


def thinking(
    decider: Decider, model: HFModel = WIDE, *, threshold: float = 0.5, iterations: int = 2, leading: int = K
) -> ThinkAtHard:
    lora = ADAPTERS[id(model)]
    return ThinkAtHard(model, lora, decider=decider, threshold=threshold, iterations=iterations, leading=leading)


def ids(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(2, V, (batch, n), generator=torch.Generator().manual_seed(seed))


def laid_out(model: HFModel, lora: GatedLora, tokens: Sequence[int], passes: Sequence[int]) -> Tensor:
    """z [n, V] by the definition: every pass is read off one whole pass of transformers over all slots so far, each
    with the position, the input vector, the gate and the row of the mask that it has by the rules."""
    network, n = model.model, len(tokens)
    table = network.get_input_embeddings().weight
    slots, inputs = [(p, 0) for p in range(n)], [table[token] for token in tokens]
    z = torch.zeros(n, V, dtype=table.dtype)
    for depth in range(max(passes)):
        if depth:
            for p in range(n):
                if passes[p] > depth:
                    chosen = z[p].topk(K).indices
                    slots.append((p, depth))
                    inputs.append(torch.softmax(z[p, chosen], 0) @ table[chosen])
        mask = torch.tensor([[p <= q and d <= e for p, d in slots] for q, e in slots])
        additive = torch.zeros(mask.shape, dtype=table.dtype).masked_fill(~mask, torch.finfo(table.dtype).min)
        with lora.at(torch.tensor([[float(d > 0) for _, d in slots]])):
            said = network(
                inputs_embeds=torch.stack(inputs)[None],
                position_ids=torch.tensor([[p for p, _ in slots]]),
                attention_mask=additive[None, None],
                use_cache=False,
            ).logits[0]
        z = z + torch.stack(
            [said[slots.index((p, depth))] if (p, depth) in slots else torch.zeros_like(z[0]) for p in range(n)]
        )
    return z


@pytest.mark.paper("2511.08577")
@settings(max_examples=15)
@given(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(0, 99))
def test_passes_equal_one_laid_out_pass_with_the_mask_of_both_orders(
    iterations: int, passes: list[int], seed: int
) -> None:
    passes = [min(some, iterations) for some in passes]
    tokens = ids(1, len(passes), seed)[0].tolist()
    with torch.no_grad():
        expected = laid_out(WIDE, ADAPTERS[id(WIDE)], tokens, passes)
    found = thinking(NeverThink(), iterations=iterations).with_passes([tokens], [passes])
    torch.testing.assert_close(found.logits()[0], expected, rtol=1e-9, atol=1e-9)
    assert found.passes.tolist() == [passes]


@pytest.mark.paper("2511.08577")
def test_a_second_pass_with_the_adapter_at_its_start_adds_the_logits_of_the_model_itself() -> None:
    """B = 0 and one token: by hand, the model reads the token and then its mixture, both at position 0."""
    lora = GatedLora(Stack(WIDE), rank=2, alpha=4.0)
    found = ThinkAtHard(WIDE, lora, leading=V).predict([[5]]).logits()[0, 0]
    network = WIDE.model
    with torch.no_grad():
        table = network.get_input_embeddings().weight
        first = network(torch.tensor([[5]])).logits[0, 0]
        fed = torch.stack([table[5], torch.softmax(first, 0) @ table])[None]
        second = network(inputs_embeds=fed, position_ids=torch.tensor([[0, 0]])).logits[0, 1]
    torch.testing.assert_close(found, first + second, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("2511.08577")
def test_where_nobody_thinks_it_is_the_model_to_the_last_bit() -> None:
    never, tokens = thinking(NeverThink(), SINGLE), ids(2, 9)
    expected = SINGLE.predict(tokens)
    said = never.predict(tokens)
    assert torch.equal(said.logits(), expected.logits()) and torch.equal(said.hidden, expected.hidden)
    state, plain = never.start(2), SINGLE.start(2)
    for begin, end in ((0, 4), (4, 5), (5, 6)):
        one, other = (model.extend(its, tokens[:, begin:end]) for model, its in ((never, state), (SINGLE, plain)))
        assert torch.equal(one.log_probs(), other.log_probs())
    assert isinstance(state.memory, DepthMemory)
    for own, theirs in zip(state.memory.first.cache.layers, plain.memory.cache.layers, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(own.keys, theirs.keys) and torch.equal(own.values, theirs.values)
    assert not state.memory.cache.layers and state.memory.slots.width == 0


@pytest.mark.paper("2511.08577")
@settings(max_examples=10)
@given(st.lists(st.sampled_from([1, 2]), min_size=6, max_size=6))
def test_easy_tokens_are_the_models_whatever_others_do(passes: list[int]) -> None:
    tokens = ids(1, 6)
    said, plain = thinking(NeverThink(), SINGLE).with_passes(tokens, [passes]), SINGLE.predict(tokens)
    easy = torch.tensor(passes) == 1
    assert torch.equal(said.hidden[0, easy], plain.hidden[0, easy])
    assert not bool((said.hidden[0, ~easy] == plain.hidden[0, ~easy]).all(-1).any())


DECIDERS: dict[str, Decider] = {"always": AlwaysThink(), "coins": RandomThink(0.5, seed=3), "learned": LEARNED}


@pytest.mark.parametrize(("name", "iterations"), [("always", 2), ("coins", 3), ("learned", 2)])
def test_keeps_the_contract(name: str, iterations: int) -> None:
    check_language_model(thinking(DECIDERS[name], iterations=iterations), length=7)


def test_keeps_the_contract_where_layers_see_a_window() -> None:
    check_language_model(thinking(RandomThink(0.5, seed=3), WINDOWS), length=7)


@pytest.mark.paper("2511.08577")
@settings(max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.sampled_from(sorted(DECIDERS)))
def test_token_by_token_is_reading_at_once(cuts: list[int], name: str) -> None:
    """In float32, for rows of different lengths of which one goes back in between."""
    model, tokens = thinking(DECIDERS[name], SINGLE), ids(2, sum(cuts))
    tokens[1, -1] = ABSENT
    whole = model.predict(tokens)
    state, at = model.start(2), 0
    said, passes = [], []
    for n in cuts:
        model.extend(state, ids(2, 2, seed=n))
        state.rewind([2, 2])
        one = model.extend(state, tokens[:, at : at + n])
        said.append(one.log_probs())
        passes.append(one.passes)
        at += n
    told = tokens != ABSENT
    torch.testing.assert_close(torch.cat(said, 1)[told], whole.log_probs()[told], rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat(passes, 1), whole.passes)
    assert whole.passes[1, -1] == 0


def test_a_tree_keeps_only_the_thoughts_of_its_path() -> None:
    """Among branches that think elsewhere; forks and joins go on from what was kept."""
    model = thinking(RandomThink(0.5, seed=1), iterations=3)
    state = model.start(2)
    model.extend(state, [[2, 3, 4], [5, ABSENT, ABSENT]])
    nodes, parents = ids(2, 6, seed=4), [-1, 0, 0, 2, 3, -1]
    model.extend(state, nodes, parents)
    state.keep([[0, 2, 3], [5]])
    both = state.fork([1, 0]).join(state)
    rows = [[5, int(nodes[1, 5])], [2, 3, 4, *nodes[0, [0, 2, 3]].tolist()]]
    last = ids(4, 2, seed=5)
    found = model.extend(both, last)
    for row, text in enumerate([rows[0], rows[1], rows[1], rows[0]]):
        alone = model.predict([[*text, *last[row].tolist()]])[0, -2:]
        torch.testing.assert_close(found[row].log_probs(), alone.log_probs(), rtol=1e-9, atol=1e-9)
    assert isinstance(both.memory, DepthMemory)
    slots = both.memory.slots
    held = [
        sum(model.predict([[*text, *last[row].tolist()]]).passes[0].tolist())
        for row, text in enumerate([rows[0], rows[1]])
    ]
    assert slots.used.tolist()[:2] == [held[0] - 4, held[1] - 8]  # room for nobody but those who went again


@pytest.mark.paper("2511.08577")
@settings(max_examples=10)
@given(st.integers(0, 6), st.lists(st.sampled_from([1, 2]), min_size=7, max_size=7))
def test_a_token_changes_nothing_before_it_in_either_pass(place: int, passes: list[int]) -> None:
    model, tokens = thinking(NeverThink()), ids(1, 7)
    other = tokens.clone()
    other[0, place] = 2 + (other[0, place] - 1) % (V - 2)
    one, two = (model.with_passes(text, [passes]).logits()[0] for text in (tokens, other))
    assert torch.equal(one[:place], two[:place])
    assert not torch.allclose(one[place], two[place])


def test_what_is_fed_is_a_mixture_of_what_was_foreseen() -> None:
    sharp, whole = (thinking(AlwaysThink(), leading=k).thinker for k in (1, 1000))
    total = WIDE.predict(ids(1, 5)).hidden[0].detach()
    table = WIDE.model.get_input_embeddings().weight.detach()
    z = total @ WIDE.model.get_output_embeddings().weight.T
    assert torch.equal(sharp.mixture(total), table[z.argmax(-1)])
    torch.testing.assert_close(whole.mixture(total), torch.softmax(z, -1) @ table)


class Told(Decider):
    """Notes what it is told, and never goes on."""

    layers, leading = (0, 2), 4

    def probability(self, seen: Seen) -> Tensor:
        self.seen = seen
        return torch.zeros(len(seen.tokens))


def test_deciders_are_told_states_and_logits_of_the_pass() -> None:
    decider, tokens = Told(), torch.tensor([[3, 4, 5], [6, ABSENT, ABSENT]])
    thinking(decider).predict(tokens)
    with torch.no_grad():
        out = WIDE.model(tokens.clamp(min=0), output_hidden_states=True)
    present, seen = tokens != ABSENT, decider.seen
    assert seen.tokens.tolist() == [3, 4, 5, 6] and seen.positions.tolist() == [0, 1, 2, 0] and seen.depth == 0
    torch.testing.assert_close(seen.states, torch.stack([out.hidden_states[layer][present] for layer in (0, 2)], 1))
    torch.testing.assert_close(seen.leading, out.logits[present].topk(4).values)


def test_the_network_of_a_decider_is_its_formula() -> None:
    network = LEARNED.network
    states, leading = torch.randn(3, 2, H), torch.randn(3, 5)
    weights = network.state_dict()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = linear(torch.cat([states[:, 0], states[:, 1], linear(leading, "logits")], 1), "inwards")
    for block in range(2):
        inner = F.gelu(linear(F.layer_norm(x, [8]), f"blocks.{block}.inner.1"))
        x = x + linear(inner, f"blocks.{block}.inner.4")
    expected = linear(F.layer_norm(x, [8]), "outwards.1")[:, 0]
    torch.testing.assert_close(network(states, leading), expected)
    seen = Seen(states, leading, torch.zeros(3), torch.zeros(3), 0)
    torch.testing.assert_close(LEARNED.probability(seen), torch.sigmoid(expected))
    assert layers_to_read(28) == (2, 10, 18, 26) and layers_to_read(2) == (0, 1, 2)
    with pytest.raises(ValueError, match="at least one layer"):
        DeciderNetwork(layers=(), hidden=H)


def test_coins_have_their_share_and_nothing_else() -> None:
    """Of 10,000 tokens; false alarm 1e-6 (4.9 standard errors)."""
    n = 10_000
    seen = Seen(torch.zeros(n, 0, H), torch.zeros(n, 0), torch.arange(n) % 7, torch.arange(n), 0)
    said = RandomThink(0.3, seed=1).probability(seen)
    assert abs(float(said.mean()) - 0.3) < 4.9 * (0.21 / n) ** 0.5
    assert not torch.equal(said, RandomThink(0.3, seed=2).probability(seen))
    assert float(RandomThink(0.0).probability(seen).sum()) == 0 and float(RandomThink(1.0).probability(seen).sum()) == n
    with pytest.raises(ValueError, match="share"):
        RandomThink(1.2)


@pytest.mark.paper("2511.08577")
def test_hard_is_where_the_argmax_of_the_label_model_is_not_what_follows() -> None:
    table = TableModel.random("abc", order=1, seed=3)
    rows = [[0, 1, 2, 2, 0], [1], [2, 0, 1]]
    found = passes_needed(table, rows, given=[2, 1, 1])
    for row, labels, first in zip(rows, found, (2, 1, 1), strict=True):
        for place, label in enumerate(labels):
            top = int(table.predict([row[: place + 1]]).log_probs()[0, -1].argmax())
            is_hard = place + 1 < len(row) and place + 1 >= first and top != row[place + 1]
            assert label == 1 + is_hard
    assert {label for labels in found for label in labels} == {1, 2}
    assert found[1:] == passes_needed(table, rows)[1:]
    for wrong in ([], [[]]):
        with pytest.raises(ValueError, match="at least one token"):
            passes_needed(table, wrong)


def test_spent_counts_passes() -> None:
    model = thinking(RandomThink(0.5, seed=3), SINGLE)
    before = model.spent
    said = model.predict([[2, 3, 4, 5, 6], [7, 8, ABSENT, ABSENT, ABSENT]])
    cost, again = model.spent - before, int((said.passes == 2).sum())
    read = {part.model: (part.passes, part.read, part.said) for part in cost.models}
    assert 0 < again < 7
    assert read["layer 0"] == read["layer 2"] == (2, 7 + again, 0) and read["head"] == (2, 7 + again, 7)
    assert read["adapter"] == (1, again, 0) and read["decider"] == (1, 7, 0)
    layers = sum(p.numel() for layer in Stack(SINGLE).layers for p in layer.parameters())
    added = sum(p.numel() for p in model.adapter.parameters())
    assert cost.activated == pytest.approx(((layers + V * H) * (7 + again) + added * again) / 7)
    model.with_passes([[2, 3]], [[1, 1]])
    assert (model.spent - before).said == 9 and (model.spent - before).models[-2].read == 7


def test_generates_what_it_says_of_a_text() -> None:
    model = thinking(LEARNED, SINGLE)
    text = [0, 4]
    for _ in range(6):
        text.append(int(model.predict([text]).log_probs()[0, -1].argmax()))
    made = generate(model, "w4", transform="greedy", max_tokens=6, ignore_eos=True)
    assert list(made.tokens) == text[2:]


# Training.

ROWS = [row.tolist() for row in ids(6, 8, seed=8)]
LABELS = [[1 + (token % 3 == 0) for token in row[:-1]] + [1] for row in ROWS]
QUICK = ThinkRecipe(steps=6, batch=3, rate=3e-3, rank=2, alpha=4.0, dropout=0.1)


def test_gradients_are_those_of_the_laid_out_pass() -> None:
    """To the adapter, to the body and through mixtures; the norms of the family round to float32."""
    model = HFModel(copy.deepcopy(WIDE.model), WIDE.tokenizer)
    lora = adapter(model)
    learnt = [*lora.parameters(), *model.model.parameters()]
    tokens, passes = ids(1, 5, seed=2), [2, 1, 2, 2, 1]
    made = ThinkAtHard(model, lora, leading=K)
    wanted = torch.tensor([passes])
    memory = DepthMemory.empty(made, made.thinker.stack, 1)
    thought = made.thinker.run(memory, tokens, None, lambda some: wanted.gather(1, some.nodes) > some.depth + 1)
    pairs = []
    for z in (made.thinker.logits(thought.total)[0], laid_out(model, lora, tokens[0].tolist(), passes)):
        pairs.append(torch.autograd.grad(F.cross_entropy(z[:-1], tokens[0, 1:]), learnt))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(bool((part != 0).any()) for part in pairs[0])


@pytest.mark.paper("2511.08577")
def test_the_first_stage_learns_and_leaves_the_model_as_it_was() -> None:
    before, told = SINGLE.digest, list[FitStep]()
    fitted = fit_thinking(SINGLE, ROWS, LABELS, recipe=QUICK, leading=K, on_step=told.append)
    assert SINGLE.digest == before != fitted.model.model.digest
    assert fitted.losses[-1] < fitted.losses[0] and [step.step for step in told] == [1, 2, 3, 4, 5, 6]
    state = torch.random.get_rng_state()
    again, other = (fit_thinking(SINGLE, ROWS, LABELS, recipe=QUICK, leading=K, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fitted.model.digest == again.model.digest != other.model.digest and fitted.losses == again.losses


def test_the_adapter_alone_may_learn_and_learns_where_there_are_second_passes_only() -> None:
    recipe = ThinkRecipe(steps=2, batch=6, rate=3e-3, rank=2, body=False)
    fitted = fit_thinking(SINGLE, ROWS, LABELS, recipe=recipe).model
    assert fitted.model is SINGLE and all(weight.grad is None for weight in SINGLE.model.parameters())
    assert any(bool(up.any()) for up in fitted.adapter.ups.values())
    idle = fit_thinking(SINGLE, ROWS, [[1] * 8] * 6, recipe=recipe).model
    assert not any(bool(up.any()) for up in idle.adapter.ups.values())


@pytest.mark.paper("2511.08577")
def test_the_second_stage_learns_to_tell_hard_from_easy() -> None:
    model = thinking(NeverThink(), SINGLE)
    recipe = DeciderRecipe(steps=40, batch=8, rate=1e-2, clip=1.0, layers=(0,), width=16, blocks=1, expansion=2)
    rows = [row.tolist() for row in ids(32, 8, seed=8)]
    labels = [[1 + (token % 3 == 0) for token in row] for row in rows]
    before = model.model.digest, [up.clone() for up in model.adapter.ups.values()]
    fitted = fit_decider(model, rows, labels, recipe=recipe, threshold=0.5)
    assert before[0] == model.model.digest
    assert all(torch.equal(old, new) for old, new in zip(before[1], model.adapter.ups.values(), strict=True))
    fresh = ids(20, 8, seed=9)
    said, wanted = fitted.model.predict(fresh).passes, 1 + (fresh % 3 == 0)
    # Of 160 tokens, a third of them hard; chance would be right at fewer than 110 but once in 1e4.
    assert int((said == wanted).sum()) > 140
    assert fitted.losses == fit_decider(model, rows, labels, recipe=recipe).losses
    with pytest.raises(ValueError, match="nothing to decide"):
        fit_decider(thinking(NeverThink(), iterations=1), ROWS, [[1] * 8] * 6)


def test_the_loss_of_deciders_weighs_those_that_go_on() -> None:
    """Of the first step, by hand: the last position of a row, of which nothing is known, does not count."""
    model = thinking(NeverThink(), SINGLE, iterations=3)
    passes = [[1, 3, 2, 1, 3, 2, 1, 1]]
    recipe = DeciderRecipe(steps=1, batch=1, width=8, blocks=1, dropout=0.0, positive_weight=3.0, rate=1e-12)
    fitted = fit_decider(model, ROWS[:1], passes, recipe=recipe)
    decider = fitted.model.decider
    assert isinstance(decider, LearnedDecider)
    terms = []

    class Spy(Decider):
        layers, leading = decider.layers, decider.leading

        def probability(self, seen: Seen) -> Tensor:
            logits = decider.network(seen.states, seen.leading)
            goes_on = torch.tensor([passes[0][p] > seen.depth + 1 for p in seen.positions.tolist()])
            terms.extend(torch.where(goes_on, -3 * F.logsigmoid(logits), -F.logsigmoid(-logits)).tolist())
            return goes_on.float()

    model.with_decider(Spy()).predict([ROWS[0][:-1]])
    assert fitted.losses[0] == pytest.approx(sum(terms) / len(terms), rel=1e-5) and len(terms) == 7 + 4


@pytest.mark.parametrize("body", [True, False])
def test_what_was_learnt_is_kept_and_bound_to_its_model(tmp_path: Path, body: bool) -> None:
    recipe = ThinkRecipe(steps=2, batch=3, rate=3e-3, rank=2, alpha=4.0, body=body)
    fitted = fit_thinking(SINGLE, ROWS, LABELS, recipe=recipe, leading=K).model
    made = fitted.with_decider(LEARNED if body else RandomThink(0.5, seed=2), threshold=0.45)
    made.save(tmp_path)
    assert (tmp_path / "backbone").exists() == body
    loaded = ThinkAtHard.load(tmp_path, SINGLE)
    assert loaded.digest == made.digest and loaded.threshold == 0.45 and loaded.name == made.name
    assert torch.equal(loaded.predict(ids(1, 5)).log_probs(), made.predict(ids(1, 5)).log_probs())
    assert body or loaded.model is SINGLE
    with pytest.raises(ModelError, match="another model"):
        ThinkAtHard.load(tmp_path, WINDOWS)
    with pytest.raises(ModelError, match="no thinking"):
        ThinkAtHard.load(tmp_path / "elsewhere", SINGLE)
    with pytest.raises(ValueError, match="kind Told"):
        thinking(Told()).save(tmp_path)
    if body:
        other = transformers.AutoModelForCausalLM.from_config(SINGLE.model.config)
        other.save_pretrained(tmp_path / "backbone")
        with pytest.raises(ModelError, match="another backbone"):
            ThinkAtHard.load(tmp_path, SINGLE)


def test_misuse_is_explained() -> None:
    lora = ADAPTERS[id(WIDE)]
    for settings_, match in (
        ({"threshold": 1.0}, "threshold"),
        ({"iterations": 0}, "iterations"),
        ({"decider": LearnedDecider(DeciderNetwork(layers=(9,), hidden=H, leading=2, width=2, blocks=1))}, "9"),
    ):
        with pytest.raises(ValueError, match=match):
            ThinkAtHard(WIDE, lora, **settings_)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="adapter was made for another"):
        ThinkAtHard(SINGLE, lora)
    model = thinking(AlwaysThink())
    with pytest.raises(ValueError, match="another model"):
        model.extend(thinking(AlwaysThink()).start(), [[2]])
    with pytest.raises(ValueError, match="1 to 2 passes"):
        model.with_passes([[2, 3]], [[1, 3]])
    capped = built(transformers.Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=5.0))
    with pytest.raises(ModelError, match="soft cap"):
        ThinkAtHard(capped, GatedLora(Stack(capped), rank=1, alpha=1.0))


@pytest.mark.parametrize(
    ("rows", "passes", "match"),
    [
        ([], [], "no rows of tokens"),
        ([[2, 3]], [[1]], "numbers of passes"),
        ([[2, V]], [[1, 1]], "vocabulary"),
        ([[2, 3]], [[1, 3]], "1 to 3 passes"),
        ([[2] * 65], [[1] * 65], "holds 64"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: list[list[int]], passes: list[list[int]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fit_thinking(SINGLE, rows, passes, recipe=ThinkRecipe(body=False))


def test_recipes_are_checked() -> None:
    for wrong in ({"steps": 0}, {"rate": 0.0}, {"floor": 2.0}):
        with pytest.raises(ValueError, match=r"must be|are shares"):
            ThinkRecipe(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive_weight"):
        DeciderRecipe(positive_weight=0.0)

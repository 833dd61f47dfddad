"""SkipDecode: schedules by hand, tokens by a loop over their layers, the model at the limit, costs, training, disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from nextoken.decode.generate import generate
from nextoken.errors import ModelError
from nextoken.model import tree
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.stack import Stack
from nextoken.route._begin import NEVER, begins
from nextoken.route.skip_decode import SkipDecode
from nextoken.route.skip_fit import SkipRecipe, fit_skips
from nextoken.route.skip_schedule import LayerSchedule, SkipSchedule, TruncationSchedule
from nextoken.testing import check_language_model

V, DEPTH, HIDDEN = 24, 4, 16


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<bos>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, V)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<bos>")), bos_token="<bos>", eos_token="<eos>"
    )


def random_model(kind: type[transformers.PreTrainedConfig] = transformers.LlamaConfig, seed: int = 0) -> HFModel:
    config = kind(
        vocab_size=V,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=48,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        **({"sliding_window": 4} if kind is transformers.MistralConfig else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HFModel(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer(), name="whole")


WHOLE = random_model()
STACK = Stack(WHOLE)
FALLING = SkipSchedule(4, 1, 7)


@dataclass(frozen=True)
class Given(LayerSchedule):
    """The first counts[t - 1] layers of `order`."""

    order: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return len(self.counts)

    def layers(self, t: int, depth: int) -> tuple[int, ...]:
        return tuple(sorted(self.order[: self.counts[t - 1]]))


SCHEDULES = st.builds(
    Given,
    st.permutations(range(DEPTH)).map(tuple),
    st.lists(st.integers(0, DEPTH), min_size=1, max_size=7).map(lambda counts: tuple(sorted(counts, reverse=True))),
)


def ids(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(2, V, (batch, n), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def begin_by_hand(row: Sequence[int], prompt: int | tuple[int, ...]) -> int:
    if isinstance(prompt, int):
        return prompt
    ends = [end for end in range(len(prompt), len(row) + 1) if tuple(row[end - len(prompt) : end]) == prompt]
    return min(ends, default=NEVER)


@torch.no_grad()
def by_hand(row: Sequence[int], schedule: LayerSchedule, prompt: int | tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """log p [n, V] and how many layers each token went through: token by token, layer by layer, key by key."""
    sets: list[tuple[int, ...]] = []
    held: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(DEPTH)]
    states = []
    for i in range(len(row)):
        begin = begin_by_hand(row[: i + 1], prompt)
        sets.append(schedule.layers(min(max(1, i - begin + 1), schedule.tokens), DEPTH))
        hidden = WHOLE.model.get_input_embeddings().weight[row[i]]
        cos, sin = STACK.rotary(hidden[None, None], position_ids=torch.tensor([[i]]))

        def turned(x: Tensor, cos: Tensor = cos[0, 0], sin: Tensor = sin[0, 0]) -> Tensor:
            half = x.shape[-1] // 2
            return x * cos + torch.cat([-x[half:], x[:half]]) * sin

        for number in sets[i]:
            layer = STACK.layers[number]
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            size = HIDDEN // 2
            held[number][i] = (turned(attention.k_proj(normed)), attention.v_proj(normed))
            seen = [j for j in range(i + 1) if number in sets[j]]
            assert seen == list(range(i + 1)), "a token left out a layer that a later one goes through"
            mixed = []
            for query in attention.q_proj(normed).view(2, size):
                weights = torch.stack([turned(query) @ held[number][j][0] for j in seen]).div(size**0.5).softmax(0)
                mixed.append(sum(weights[k] * held[number][j][1] for k, j in enumerate(seen)))
            hidden = hidden + attention.o_proj(torch.cat(mixed))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        states.append(hidden)
    normed = STACK.norm(torch.stack(states))
    return (normed @ STACK.head.weight.T).log_softmax(-1), [len(layers) for layers in sets]


# Schedules.


@pytest.mark.paper("2307.02628")
def test_schedules_by_hand() -> None:
    schedule = SkipSchedule(6, 2, 5)
    assert [schedule.count(t) for t in (-3, 1, 2, 3, 4, 5, 6, 99)] == [6, 6, 5, 4, 3, 2, 2, 2]
    assert [schedule.layers(t, 8) for t in (1, 3, 5)] == [(0, 3, 4, 5, 6, 7), (0, 5, 6, 7), (0, 7)]
    assert SkipSchedule(6, 2, 5, warm=0).layers(5, 8) == (6, 7)
    assert SkipSchedule(6, 2, 5, warm=2).layers(1, 8) == (0, 1, 4, 5, 6, 7)
    assert SkipSchedule(6, 2, 5, warm=2).layers(5, 8) == (0, 1)
    assert TruncationSchedule(6, 2, 5).layers(3, 8) == (0, 1, 2, 3)
    assert [SkipSchedule(4, 1, 7).count(t) for t in range(1, 8)] == [4, 4, 3, 3, 2, 2, 1]  # 4, 3.5, 3, ...: halves up
    # 3 of the prompt at 6, then 6, 5, 4, 3, 2, 2
    assert schedule.speedup(8, prompt=3, generated=6) == pytest.approx(8 * 9 / (18 + 22))
    assert schedule.speedup(8, prompt=1, generated=2) == pytest.approx(8 * 3 / 17)


@pytest.mark.paper("2307.02628")
@settings(max_examples=40)
@given(
    least=st.integers(1, 6), span=st.integers(0, 5), tokens=st.integers(2, 40), warm=st.integers(0, 6), on=st.booleans()
)
def test_sets_lie_within_one_another(least: int, span: int, tokens: int, warm: int, on: bool) -> None:
    most, depth = least + span, least + span + 1
    warm = min(warm, least)
    schedule = SkipSchedule(most, least, tokens, warm=warm) if on else TruncationSchedule(most, least, tokens)
    sets = [set(schedule.layers(t, depth)) for t in range(1, tokens + 3)]
    assert all(later <= earlier for earlier, later in pairwise(sets))
    assert (len(sets[0]), len(sets[tokens - 1]), len(sets[-1])) == (most, least, least)
    if on:
        kept = set(range(warm))
        assert all(layers == kept | set(range(depth - len(layers) + warm, depth)) for layers in sets)
    stages = schedule.stages(depth)
    at = stages.at(torch.arange(-1, tokens + 3)).tolist()
    for stage, layers in zip(at, [sets[0], sets[0], *sets], strict=True):
        assert {number for number in range(depth) if stage < stages.until[number]} == layers


def test_schedules_refuse_what_cannot_be() -> None:
    for wrong in ((3, 4, 5), (3, 0, 5), (3, 1, 1)):
        for kind in (SkipSchedule, TruncationSchedule):
            with pytest.raises(ValueError):
                kind(*wrong)
    for warm in (-1, 2):
        with pytest.raises(ValueError, match="warm"):
            SkipSchedule(3, 1, 5, warm=warm)
    for schedule in (SkipSchedule(5, 1, 5), TruncationSchedule(5, 1, 5)):
        with pytest.raises(ValueError, match="wants 5 layers and the model has 4"):
            SkipDecode(WHOLE, schedule, prompt=1)
    with pytest.raises(ValueError, match=r"takes layers \[2\] for generated token 2"):
        SkipDecode(WHOLE, Given((0, 1, 2, 3), (2, 3)), prompt=1)
    with pytest.raises(ValueError, match="names layers"):
        SkipDecode(WHOLE, Given((4, 0, 1, 2), (2, 1)), prompt=1)
    for prompt in (-1, [], [V], [-1]):
        with pytest.raises(ValueError, match="prompt must be"):
            SkipDecode(WHOLE, FALLING, prompt=prompt)


# Where the generated part begins.


@settings(max_examples=40)
@given(
    phrase=st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple),
    kept=st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=2, max_size=2),
    fed=st.lists(st.integers(0, 1), min_size=1, max_size=6),
    picks=st.lists(st.integers(0, 99), min_size=6, max_size=6),
)
def test_prompts_end_where_their_phrase_first_does(
    phrase: tuple[int, ...], kept: list[list[int]], fed: list[int], picks: list[int]
) -> None:
    tokens = torch.tensor([fed, fed])
    parents = torch.tensor([[pick % (node + 1) - 1 for node, pick in enumerate(picks[: len(fed)])]]).expand(2, -1)
    for nodes in (None, parents):
        found = begins(phrase, kept, tokens, nodes)
        sees = tree.ancestry(tree.chain(2, len(fed)) if nodes is None else nodes)
        for b in range(2):
            for i in range(len(fed)):
                text = kept[b] + [fed[j] for j in range(i + 1) if sees[b, i, j]]
                assert int(found[b, i]) == begin_by_hand(text, phrase)


# What is computed.


@pytest.mark.paper("2307.02628")
@settings(max_examples=15)
@given(
    schedule=SCHEDULES | st.builds(SkipSchedule, st.just(4), st.integers(1, 4), st.integers(2, 8)),
    prompt=st.integers(0, 5) | st.just((3,)) | st.just((3, 4)),
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_every_token_is_the_loop_over_its_layers(
    schedule: LayerSchedule, prompt: int | tuple[int, ...], seed: int, cuts: list[int]
) -> None:
    """In parallel, and in pieces of any sizes with what is remembered; layer evaluations are the sum of the sets."""
    skips, tokens = SkipDecode(WHOLE, schedule, prompt=prompt), ids(2, sum(cuts), seed)
    if not isinstance(prompt, int):  # rows whose prompts end at different places, one perhaps nowhere
        at = seed % tokens.shape[1]
        tokens[0, at : at + len(prompt)] = torch.tensor(prompt)[: tokens.shape[1] - at]
    rows = [by_hand(row, schedule, prompt) for row in tokens.tolist()]
    expected, layers = torch.stack([said for said, _ in rows]), sum(sum(counts) for _, counts in rows)
    close(skips.predict(tokens).log_probs(), expected)
    assert sum(part.read for part in skips.spent.models[:-1]) == layers
    before, state = skips.spent, skips.start(2)
    said = [skips.extend(state, piece).log_probs() for piece in tokens.split(cuts, 1)]
    close(torch.cat(said, 1), expected)
    cost = skips.spent - before
    assert sum(part.read for part in cost.models[:-1]) == layers
    assert cost.models[-1].read == cost.said == tokens.numel()


@pytest.mark.paper("2307.02628")
@settings(max_examples=15)
@given(
    schedule=SCHEDULES,
    prompt=st.integers(0, 5) | st.just((3,)) | st.just((3, 4)),
    seed=st.integers(0, 99),
    picks=st.lists(st.integers(0, 99), min_size=5, max_size=5),
)
def test_every_node_of_a_tree_is_the_loop_over_its_layers(
    schedule: LayerSchedule, prompt: int | tuple[int, ...], seed: int, picks: list[int]
) -> None:
    """Over rows of different lengths; then the deepest path is kept and the text goes on."""
    skips = SkipDecode(WHOLE, schedule, prompt=prompt)
    tokens = torch.randint(2, 6, (2, 10), generator=torch.Generator().manual_seed(seed))
    state = skips.start(2)
    first = tokens[:, :4].clone()
    first[1, 1 + seed % 3 :] = ABSENT
    skips.extend(state, first)
    kept = [list(row) for row in state.tokens]
    parents = torch.tensor([pick % (node + 1) - 1 for node, pick in enumerate(picks)])
    before = skips.spent
    said = skips.extend(state, tokens[:, 4:9], parents).log_probs()
    sees = tree.ancestry(parents[None])[0]
    layers = 0
    for b in range(2):
        for i in range(5):
            path = [int(tokens[b, 4 + j]) for j in range(i + 1) if sees[i, j]]
            expected, counts = by_hand(kept[b] + path, schedule, prompt)
            close(said[b, i], expected[-1])
            layers += counts[-1]
    assert sum(part.read for part in (skips.spent - before).models[:-1]) == layers
    deepest = int(tree.depths(parents[None]).argmax())
    path = [j for j in range(5) if sees[deepest, j]]
    state.keep(path)
    said = skips.extend(state, tokens[:, 9:]).log_probs()
    for b in range(2):
        text = [*kept[b], *(int(tokens[b, 4 + j]) for j in path), int(tokens[b, 9])]
        close(said[b, 0], by_hand(text, schedule, prompt)[0][-1])


@pytest.mark.paper("2307.02628")
@pytest.mark.parametrize("schedule", [SkipSchedule(4, 4, 9), TruncationSchedule(4, 4, 9)])
def test_with_all_layers_it_is_the_model_exactly(schedule: LayerSchedule) -> None:
    skips, tokens = SkipDecode(WHOLE, schedule, prompt=3), ids(3, 9)
    assert torch.equal(skips.predict(tokens).logits(), WHOLE.predict(tokens).logits())
    told = [model.extend(model.start(3), tokens).logits() for model in (skips, WHOLE)]
    assert torch.equal(*told)
    texts = [
        generate(model, ["w3", "w9"], max_tokens=8, seed=2, transform=None, ignore_eos=True) for model in (skips, WHOLE)
    ]
    assert [a.tokens for a in texts[0]] == [b.tokens for b in texts[1]]


def test_cut_off_it_is_the_model_of_its_lowest_layers() -> None:
    short = random_model()
    del short.model.model.layers[2:]
    short.model.config.num_hidden_layers = 2
    tokens = ids(2, 9)
    skips = SkipDecode(WHOLE, TruncationSchedule(2, 2, 5), prompt=3)
    close(skips.predict(tokens).log_probs(), HFModel(short.model, short.tokenizer).predict(tokens).log_probs())


@pytest.mark.parametrize(
    ("kind", "schedule", "prompt"),
    [
        (transformers.LlamaConfig, FALLING, 3),
        (transformers.MistralConfig, SkipSchedule(3, 1, 4, warm=0), [3, 4]),
        pytest.param(transformers.MistralConfig, FALLING, 0, marks=pytest.mark.slow),
        pytest.param(transformers.Qwen3Config, Given((2, 0, 3, 1), (3, 3, 2, 1, 0)), [5], marks=pytest.mark.slow),
    ],
)
def test_it_keeps_the_contract(
    kind: type[transformers.PreTrainedConfig], schedule: LayerSchedule, prompt: int | list[int]
) -> None:
    check_language_model(SkipDecode(random_model(kind), schedule, prompt=prompt))


@pytest.mark.paper("2307.02628")
def test_a_layer_is_run_on_the_tokens_that_have_it_and_no_others() -> None:
    """Rows whose prompts ended long ago, just now and not yet: in one call, each layer sees its rows only."""
    skips = SkipDecode(WHOLE, FALLING, prompt=[3])
    rows = ids(3, 9)
    rows[rows == 3] = 4
    rows[0, 1], rows[1, 6] = 3, 3
    state = skips.start(3)
    skips.extend(state, rows)
    runs: dict[int, tuple[int, ...]] = {}
    handles = [
        layer.register_forward_hook(lambda _, given, __, number=number: runs.update({number: given[0].shape[:2]}))
        for number, layer in enumerate(skips.stack.layers)
    ]
    before = skips.spent
    last = ids(3, 1, seed=1)
    said = skips.extend(state, last).log_probs()
    for handle in handles:
        handle.remove()
    # t = 8, 3 and none: sets {0}, {0, 2, 3} and all.
    assert runs == {0: (3, 1), 1: (1, 1), 2: (2, 1), 3: (2, 1)}
    assert [part.read for part in (skips.spent - before).models] == [3, 1, 2, 2, 3]
    for b in range(3):
        close(said[b], by_hand([*rows[b].tolist(), int(last[b])], FALLING, (3,))[0][-1:])


def test_windows_are_those_of_the_tokens_wherever_they_are_stored() -> None:
    """A bushy tree over rows of different lengths, where the slot of a node is not its position."""
    skips = SkipDecode(random_model(transformers.MistralConfig), FALLING, prompt=[3])
    kept = [[2, 3, *[5] * 7, 4, 6, 2], [4, 5, 7, 3, 6, 8], [2, 4, 5]]
    state = skips.start(3)
    skips.extend(state, [[*row, *[ABSENT] * (12 - len(row))] for row in kept])
    tokens, parents = ids(3, 8), [-1, 0, 0, 0, 3, 4, 5, 6]
    said = skips.extend(state, tokens, parents).log_probs()
    sees = tree.ancestry(torch.tensor([parents]))[0]
    for b in range(3):
        for i in range(8):
            path = [int(tokens[b, j]) for j in range(i + 1) if sees[i, j]]
            close(said[b, i], skips.predict([kept[b] + path]).log_probs()[0, -1])


@pytest.mark.paper("2307.02628")
def test_what_is_spent_is_the_sum_of_the_sets() -> None:
    skips = SkipDecode(WHOLE, FALLING, prompt=2)
    generate(skips, "w3", max_tokens=10, seed=0, transform=None, ignore_eos=True)
    cost = skips.spent
    # Two of the prompt, then t = 1 to 9, for the last token drawn is not fed.
    counts = [4, 4, *(4, 4, 3, 3, 2, 2, 1, 1, 1)]
    assert [part.read for part in cost.models] == [11, 4, 6, 8, 11]
    assert sum(part.read for part in cost.models[:-1]) == sum(counts)
    assert [part.said for part in cost.models] == [0] * DEPTH + [11]
    assert cost.models[0].passes == 10 and cost.models[1].passes == 3
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * 24 + 2 * HIDDEN
    head = V * HIDDEN + HIDDEN
    assert {part.parameters for part in cost.models[:-1]} == {layer} and cost.models[-1].parameters == head
    assert cost.activated == pytest.approx(head + layer * sum(counts) / 11)
    assert FALLING.speedup(DEPTH, prompt=2, generated=9) == pytest.approx(DEPTH * 11 / sum(counts))


def test_a_state_is_of_one_schedule() -> None:
    skips, other = (SkipDecode(WHOLE, FALLING, prompt=prompt) for prompt in (2, 3))
    assert len({skips.digest, other.digest, SkipDecode(WHOLE, SkipSchedule(4, 2, 7), prompt=2).digest}) == 3
    assert skips.digest == SkipDecode(WHOLE, FALLING, prompt=2).digest != WHOLE.digest
    for wrong in (other, WHOLE):
        with pytest.raises(ValueError, match="another model"):
            skips.extend(wrong.start(), [[2]])
    with pytest.raises(ValueError, match="another model"):
        skips.start().join(other.start())


def test_a_call_without_tokens_says_nothing_and_changes_nothing() -> None:
    skips = SkipDecode(WHOLE, FALLING, prompt=1)
    state = skips.start(2)
    skips.extend(state, [[2, 3], [4, ABSENT]])
    assert skips.extend(state, [[ABSENT], [ABSENT]]).shape == (2, 1)
    assert state.lengths == (2, 1)


# Training.


ROWS = [[0, *[2 + (start + 3 * step) % 20 for step in range(6 + start % 5)]] for start in range(20)]
RECIPE = SkipRecipe(steps=30, batch=8, rate=1e-2)


@pytest.mark.paper("2307.02628")
def test_fine_tuning_lowers_the_loss_under_the_schedule_and_leaves_the_model() -> None:
    before, steps = WHOLE.digest, list[int]()
    found = [
        fit_skips(WHOLE, FALLING, ROWS, prompt=2, recipe=RECIPE, seed=3, on_step=lambda step: steps.append(step.step))
        for _ in range(2)
    ]
    (skips, losses), (again, _) = found
    assert steps == [*range(1, 31), *range(1, 31)]
    assert losses[-1] < 0.6 * losses[0]
    assert skips.digest == again.digest and skips.base == WHOLE.digest == before
    assert skips.spent.said == 0

    def loss(model: SkipDecode) -> float:
        said = [model.predict([row]).log_probs()[0, :-1].gather(1, torch.tensor(row)[1:, None]) for row in ROWS]
        return -float(torch.cat(said).mean())

    assert loss(skips) < 0.5 * loss(SkipDecode(WHOLE, FALLING, prompt=2))


@pytest.mark.parametrize("prompt", [3, [5]])
def test_the_loss_is_that_of_the_model_read_text_by_text(prompt: int | list[int]) -> None:
    skips = SkipDecode(WHOLE, FALLING, prompt=prompt)
    said = [skips.predict([row]).log_probs()[0, :-1].gather(1, torch.tensor(row)[1:, None]) for row in ROWS]
    recipe = SkipRecipe(steps=1, batch=len(ROWS), rate=1e-9)
    losses = fit_skips(WHOLE, FALLING, ROWS, prompt=prompt, recipe=recipe)[1]
    assert losses[0] == pytest.approx(-float(torch.cat(said).mean()), rel=1e-5)


def test_every_weight_that_is_used_learns_and_no_other() -> None:
    schedule = TruncationSchedule(2, 1, 5)
    skips, _ = fit_skips(WHOLE, schedule, ROWS, prompt=2, recipe=SkipRecipe(steps=1, weight_decay=0.0))
    before = WHOLE.model.state_dict()
    same = {name for name, weight in skips.model.model.state_dict().items() if torch.equal(weight, before[name])}
    assert same == {name for name in before if ".layers.2." in name or ".layers.3." in name}


def test_prompts_of_many_lengths_are_drawn() -> None:
    drawing = SkipRecipe(steps=2, batch=4, prompts=(1, 9))
    drawn = [
        fit_skips(WHOLE, FALLING, ROWS, prompt=prompt, recipe=drawing, seed=seed)[1]
        for prompt, seed in ((2, 0), (5, 0), (2, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    fixed = [
        fit_skips(WHOLE, FALLING, ROWS, prompt=2, recipe=SkipRecipe(steps=2, batch=4, prompts=(size, size)))[1]
        for size in range(1, 10)
    ]
    assert drawn[0] not in fixed  # within a batch they differ
    one = fit_skips(WHOLE, FALLING, ROWS, prompt=7, recipe=SkipRecipe(steps=2, batch=4, prompts=(2, 2)))[1]
    assert one == fit_skips(WHOLE, FALLING, ROWS, prompt=2, recipe=SkipRecipe(steps=2, batch=4))[1]


# Disk and misuse.


def test_it_comes_back_from_disk(tmp_path: Path) -> None:
    half = random_model()
    half = HFModel(half.model.to(torch.bfloat16), half.tokenizer, name="half")
    recipe = SkipRecipe(steps=2, batch=4)
    for model, prompt, schedule in ((WHOLE, 3, FALLING), (half, [3, 4], TruncationSchedule(3, 1, 4))):
        skips, _ = fit_skips(model, schedule, ROWS, prompt=prompt, recipe=recipe)
        skips.save(tmp_path)
        again = SkipDecode.load(tmp_path, model)
        assert (again.digest, again.schedule, again.prompt) == (skips.digest, schedule, skips.prompt)
        assert again.base == model.digest and again.dtype == "float32"
        assert torch.equal(again.predict(ids(2, 9)).log_probs(), skips.predict(ids(2, 9)).log_probs())
    with pytest.raises(ModelError, match="another model"):
        SkipDecode.load(tmp_path, random_model(seed=1))
    with pytest.raises(ModelError, match="no skips"):
        SkipDecode.load(tmp_path / "nothing", WHOLE)
    with pytest.raises(ValueError, match="Given cannot be saved"):
        SkipDecode(WHOLE, Given((0, 1, 2, 3), (2, 1)), prompt=1).save(tmp_path)


def test_misuse_is_told() -> None:
    for recipe in ({"prompts": (3, 2)}, {"prompts": (-1, 2)}, {"steps": 0}, {"rate": 0.0}):
        with pytest.raises(ValueError):
            SkipRecipe(**recipe)
    for rows in ([], [[3]], [[3, V]], [[3] * 49]):
        with pytest.raises(ValueError):
            fit_skips(WHOLE, FALLING, rows, prompt=1)
    config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    gpt = HFModel(transformers.GPT2LMHeadModel(config).eval(), tokenizer(), name="gpt")
    with pytest.raises(ModelError, match="built like Llama"):
        SkipDecode(gpt, SkipSchedule(2, 1, 4), prompt=1)

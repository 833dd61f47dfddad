"""Steered models: the contract, each edit by hand, the bits of the model itself; units against plain loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

from nextoken.errors import InputError, ModelError
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.steered import Edit, Steered
from nextoken.model.steering import Units, difference_of_means, momentum
from nextoken.testing import check_language_model

V = 80
SITES = ("attention", "ffn", "layer")
_SIZES = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "initializer_range": 0.2}
_DENSE = {**_SIZES, "intermediate_size": 40, "num_attention_heads": 4, "max_position_embeddings": 40}
_WIDE = {**_DENSE, "num_key_value_heads": 2, "head_dim": 8}  # the heads together are wider than the residual stream

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_WIDE),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=40, initializer_range=0.2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_DENSE),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=2, ffn_dim=40, num_attention_heads=4,
        max_position_embeddings=40, word_embed_proj_dim=16, init_std=0.2,
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_WIDE, sliding_window=5),
    "qwen3": lambda: transformers.Qwen3Config(**_WIDE),
    "phi": lambda: transformers.PhiConfig(**{**_DENSE, "num_attention_heads": 3}),
    "mixtral": lambda: transformers.MixtralConfig(**{**_WIDE, "num_local_experts": 2}),
}  # fmt: skip

PROJECTIONS = {  # by hand, what the code has to find: the output projection, the feed-forward block's last linear map
    "llama": lambda layer: (layer.self_attn.o_proj, layer.mlp.down_proj),
    "gpt2": lambda layer: (layer.attn.c_proj, layer.mlp.c_proj),
    "gpt_neox": lambda layer: (layer.attention.dense, layer.mlp.dense_4h_to_h),
    "opt": lambda layer: (layer.self_attn.out_proj, layer.fc2),
    "gemma2": lambda layer: (layer.self_attn.o_proj, layer.mlp.down_proj),
    "qwen3": lambda layer: (layer.self_attn.o_proj, layer.mlp.down_proj),
    "phi": lambda layer: (layer.self_attn.dense, layer.mlp.fc2),
}
WIDTHS = {"llama": 32, "gemma2": 32, "qwen3": 32, "mixtral": 32}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, V)}}
    backend = Tokenizer(WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def random_model(family: str, seed: int = 0) -> HFModel:
    torch.manual_seed(seed)
    network = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    return HFModel(network, tokenizer(), name=family)


MODELS = {family: random_model(family) for family in CONFIGS}
LLAMA = MODELS["llama"]


def layers_of(model: HFModel) -> nn.ModuleList:
    decoder = model.model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def width(family: str, site: str) -> int:
    return WIDTHS.get(family, 24) if site == "attention" else 24


def table(family: str, site: str, cells: dict[tuple[int, int], float]) -> Tensor:
    amounts = torch.zeros(2, width(family, site))
    for cell, amount in cells.items():
        amounts[cell] = amount
    return amounts


def some_edits(family: str, size: float = 0.3) -> list[Edit]:
    """Edits of both modes at every site, on half of all units."""
    generator = torch.Generator().manual_seed(1)
    edits = []
    for site in SITES:
        for mode in ("scale", "shift"):
            amounts = size * torch.randn(2, width(family, site), generator=generator)
            edits.append(Edit(site, amounts * (amounts > 0), mode))
    return edits


def strings(rows: int, length: int, seed: int = 0) -> Tensor:
    ids = torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.zeros(rows, 1, dtype=torch.long), ids], 1)


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """First input and first output of each module, in one pass."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append((args[0], output[0] if isinstance(output, tuple) else output))

    handles = [module.register_forward_hook(note) for module in modules]
    yield seen
    for handle in handles:
        handle.remove()


def hooks(model: HFModel) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.model.modules())


def after(model: HFModel | Steered, ids: Tensor) -> Tensor:
    return model.predict(ids).log_probs()


# The contract, and the bits of the model itself.


@pytest.mark.parametrize("family", CONFIGS)
def test_keeps_the_contract(family: str) -> None:
    steered = Steered(MODELS[family], some_edits(family))
    assert all(proof.skipped is None for proof in check_language_model(steered))
    assert (after(steered, strings(1, 5)) - after(MODELS[family], strings(1, 5))).abs().max() > 0.05


def test_a_recurrent_model_is_steered_where_it_has_the_site() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=2, state_size=4, initializer_range=0.05
    )
    model = HFModel(transformers.MambaForCausalLM(config).eval(), tokenizer(), name="mamba")
    steered = Steered(model, [Edit("layer", torch.randn(2, 24), "shift")])
    check_language_model(steered)
    for site in ("attention", "ffn"):
        with pytest.raises(ModelError, match=r"layer 0 of MambaForCausalLM.*site='layer'"):
            Steered(model, [Edit(site, torch.ones(2, 24))])


@pytest.mark.parametrize("family", CONFIGS)
def test_without_edits_and_after_them_it_is_the_model_to_the_last_bit(family: str) -> None:
    model, ids = MODELS[family], strings(2, 6)
    plain, before = model.predict(ids).logits(), hooks(model)
    for edits in ([], [edit.scaled(0.0) for edit in some_edits(family)]):
        steered = Steered(model, edits)
        assert torch.equal(steered.predict(ids).logits(), plain)
        state = steered.start(2)
        assert torch.equal(steered.extend(state, ids).logits(), model.extend(model.start(2), ids).logits())
    steered = Steered(model, some_edits(family))
    state = steered.start(2)
    steered.extend(state, ids)
    steered.extend(state, [[3, 4], [5, ABSENT]])
    assert torch.equal(model.predict(ids).logits(), plain)
    assert hooks(model) == before


def test_a_failed_call_leaves_no_edit_behind() -> None:
    ids = strings(1, 5)
    plain, before = LLAMA.predict(ids).logits(), hooks(LLAMA)
    steered = Steered(LLAMA, some_edits("llama"))
    state = steered.start()
    steered.extend(state, ids[:, :3])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = LLAMA.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        steered.extend(state, ids[:, 3:])
    handle.remove()
    assert hooks(LLAMA) == before and state.lengths == (3,)
    assert torch.equal(LLAMA.predict(ids).logits(), plain)
    torch.testing.assert_close(steered.extend(state, ids[:, 3:]).log_probs(), after(steered, ids)[:, 3:])


def test_models_over_one_network_take_turns() -> None:
    ids, edits = strings(1, 8), some_edits("llama")
    models = [LLAMA, Steered(LLAMA, edits[:2]), Steered(LLAMA, edits[2:])]
    expected = [after(model, ids) for model in models]
    states = [model.start() for model in models]
    for at in range(ids.shape[1]):
        for model, state, whole in zip(models, states, expected, strict=True):
            said = model.extend(state, ids[:, at : at + 1]).log_probs()
            torch.testing.assert_close(said[:, 0], whole[:, at], atol=1e-4, rtol=0)


def test_states_belong_to_their_model() -> None:
    first, second = Steered(LLAMA, some_edits("llama")), Steered(LLAMA, [])
    for model in (LLAMA, first, second):
        for other in (LLAMA, first, second):
            if model is not other:
                state = other.start()
                with pytest.raises(ValueError, match="another model"):
                    model.extend(state, [[0]])
                assert state.lengths == (0,)
                with pytest.raises(ValueError, match=r"(another|same) model"):
                    model.start().join(state)


# Edits by hand.


@pytest.mark.paper("2602.04428")
@pytest.mark.parametrize("mode", ["scale", "shift"])
@pytest.mark.parametrize("family", PROJECTIONS)
def test_one_unit_of_attention_moves_the_output_along_its_slice_of_the_weights(family: str, mode: str) -> None:
    """W (a + da) - W a = da_i W[:, i] at every position, with da_i = amount a_i, or the amount itself."""
    model, ids, unit, amount = MODELS[family], strings(2, 6), 5, -1.7
    projection = PROJECTIONS[family](layers_of(model)[1])[0]
    weight = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
    seen = []
    for edits in ([], [Edit("attention", table(family, "attention", {(1, unit): amount}), mode)]):
        steered = Steered(model, edits)
        with recorded([projection]) as noted:
            steered.predict(ids)
        seen.append(noted[0])
    (before, plain), (_, moved) = seen
    change = amount * (before[..., unit] if mode == "scale" else torch.ones_like(before[..., unit]))
    torch.testing.assert_close(moved - plain, change[..., None] * weight[:, unit], atol=2e-6, rtol=1e-4)


@pytest.mark.paper("2602.04428")
@pytest.mark.parametrize("family", PROJECTIONS)
def test_units_of_the_feed_forward_block_and_of_the_layer_are_where_they_should_be(family: str) -> None:
    model, ids = MODELS[family], strings(2, 6)
    layers = layers_of(model)
    with recorded([PROJECTIONS[family](layers[0])[1], layers[0]]) as plain:
        model.predict(ids)
    amounts = some_edits(family)[2].amounts
    for site, module, (_, old) in (
        ("ffn", PROJECTIONS[family](layers[0])[1], plain[0]),
        ("layer", layers[0], plain[1]),
    ):
        for mode, expected in (("scale", old * (1 + amounts[0])), ("shift", old + amounts[0])):
            steered = Steered(model, [Edit(site, amounts, mode)])
            with recorded([module]) as noted:
                steered.predict(ids)
            torch.testing.assert_close(noted[0][1], expected)


def test_experts_are_edited_as_one_block() -> None:
    model, ids = MODELS["mixtral"], strings(1, 6)
    block = model.model.model.layers[0].mlp
    with recorded([block]) as plain:
        model.predict(ids)
    steered = Steered(model, [Edit("ffn", table("mixtral", "ffn", {(0, 3): 2.0}))])
    with recorded([block]) as noted:
        steered.predict(ids)
    expected = plain[0][1] * torch.ones(24).index_fill(0, torch.tensor([3]), 3.0)
    torch.testing.assert_close(noted[0][1], expected)


@pytest.mark.paper("2602.04428")
def test_one_amount_for_all_units_of_a_layer_scales_the_residual_stream() -> None:
    ids = strings(2, 6)
    layers = layers_of(LLAMA)
    with recorded(layers) as plain:
        before = after(LLAMA, ids)
    scaled = Steered(LLAMA, [Edit("layer", torch.tensor([[0.7], [0.0]]).expand(2, 24))])
    with recorded(layers) as noted:
        after(scaled, ids)
    torch.testing.assert_close(noted[1][0], 1.7 * plain[0][1])
    # After the last layer stands a norm that does not know the length of what it is given.
    last = Steered(LLAMA, [Edit("layer", torch.tensor([[0.0], [0.7]]).expand(2, 24))])
    torch.testing.assert_close(after(last, ids), before, atol=2e-4, rtol=0)


def test_edits_at_one_place_come_in_the_order_given() -> None:
    ids, layer = strings(1, 5), layers_of(LLAMA)[0]
    shift, scale = (Edit("layer", table("llama", "layer", {(0, 2): 0.5}), mode) for mode in ("shift", "scale"))
    with recorded([layer]) as plain:
        LLAMA.predict(ids)
    old = plain[0][1][..., 2]
    for edits, expected in (([shift, scale], (old + 0.5) * 1.5), ([scale, shift], old * 1.5 + 0.5)):
        nested = Steered(Steered(LLAMA, edits[:1]), edits[1:])
        for model in (Steered(LLAMA, edits), nested):
            with recorded([layer]) as noted:
                model.predict(ids)
            torch.testing.assert_close(noted[0][1][..., 2], expected)


@given(st.floats(-0.9, 4), st.floats(-0.9, 4), st.sampled_from(SITES), st.integers(0, 1), st.integers(0, 23))
@settings(max_examples=25, deadline=None)
def test_edits_of_a_kind_compose(one: float, two: float, site: str, layer: int, unit: int) -> None:
    ids = strings(1, 5)
    cell = (layer, unit)

    def edit(amount: float, mode: str) -> Edit:
        return Edit(site, table("llama", site, {cell: amount}), mode)

    both = Steered(LLAMA, [edit(one, "scale"), edit(two, "scale")])
    at_once = Steered(LLAMA, [edit((1 + one) * (1 + two) - 1, "scale")])
    torch.testing.assert_close(after(both, ids), after(at_once, ids), atol=2e-4, rtol=0)
    there_and_back = Steered(LLAMA, [edit(one, "shift"), edit(-one, "shift")])
    torch.testing.assert_close(after(there_and_back, ids), after(LLAMA, ids), atol=2e-4, rtol=0)


def test_half_precision_that_overflows_is_an_error_and_the_state_stays() -> None:
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).to(torch.float16).eval()
    model = HFModel(network, tokenizer(), name="llama16")
    ids = strings(1, 4)
    mild = Steered(model, [Edit("layer", torch.full((2, 24), 0.5), "shift")])
    assert mild.dtype == "float16" and after(mild, ids).isfinite().all()
    wild = Steered(model, [Edit("layer", table("llama", "layer", {(0, 3): 1e6}), "shift")])
    state, before = wild.start(), hooks(model)
    for call in (
        lambda: wild.predict(ids),
        lambda: wild.extend(state, ids),
        lambda: wild.extend(state, ids[:, :2], [-1, -1]),
    ):
        with pytest.raises(ModelError, match=r"leave the range of float16.*bfloat16"):
            call()
        assert state.lengths == wild.own(state.memory).lengths == (0,)
        assert not state.is_pending and not wild.own(state.memory).is_pending and hooks(model) == before


def test_digests_tell_edits_apart() -> None:
    edit = some_edits("llama")[2]
    others = [
        [edit],
        [edit.scaled(2.0)],
        [Edit("ffn", edit.amounts, "shift")],
        [Edit("layer", edit.amounts)],
        [edit, edit],
        [],
    ]
    assert len({Steered(LLAMA, edits).digest for edits in others} | {LLAMA.digest}) == len(others) + 1
    assert Steered(LLAMA, [edit]).digest == Steered(LLAMA, [Edit("ffn", edit.amounts.clone())]).digest
    assert Steered(LLAMA, []).digest == Steered(LLAMA, [edit.scaled(0.0)]).digest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edit("layer", torch.ones(24)), r"table \[L, D\]"),
        (lambda: Edit("layer", torch.full((2, 24), torch.nan)), "finite"),
        (lambda: Edit("layer", torch.ones(2, 24), "turn"), "'scale' or 'shift'"),
        (lambda: Steered(LLAMA, [Edit("head", torch.ones(2, 24))]), "site must be one of"),
        (lambda: Steered(LLAMA, [Edit("layer", torch.ones(3, 24))]), "another model or site"),
        (lambda: Steered(LLAMA, [Edit("attention", torch.ones(2, 24))]), "32 activations in each of 2 layers"),
    ],
)
def test_misuse_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


# Finding units.


def random_triples(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Prompts of 1 to 6 words, and answers of 1 or 2, all at random."""
    generator = torch.Generator().manual_seed(seed)

    def words(most: int) -> str:
        size = int(torch.randint(1, most + 1, (), generator=generator))
        return " ".join(f"w{int(i)}" for i in torch.randint(2, V, (size,), generator=generator))

    return [(words(6), " " + words(2), " " + words(2)) for _ in range(count)]


def last_activations(family: str, site: str, text: str) -> list[Tensor]:
    """[D] of each layer at the last token, by a pass of this text alone."""
    model = MODELS[family]
    ids = torch.tensor([[0, *model.vocab.encode(text).ids]])
    layers = layers_of(model)
    modules = [PROJECTIONS[family](layer)[("attention", "ffn").index(site)] for layer in layers if site != "layer"]
    with recorded(modules or layers) as seen:
        model.predict(ids)
    return [pair[0 if site == "attention" else 1].reshape(-1, pair[site != "attention"].shape[-1])[-1] for pair in seen]


@pytest.mark.paper("2602.04428")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_momentum_is_the_count_of_signs(family: str, site: str) -> None:
    triples = random_triples(11)
    units = momentum(MODELS[family], triples, site=site)
    assert units.beta.shape == (2, width(family, site)) and units.pairs == 11
    texts = [[last_activations(family, site, x + y) for y in answers] for x, *answers in triples]
    for layer in range(2):
        for unit in range(units.beta.shape[1]):
            deltas = [float(wanted[layer][unit] - other[layer][unit]) for wanted, other in texts]
            larger, smaller = sum(d > 0 for d in deltas), sum(d < 0 for d in deltas)
            beta = max(larger, smaller) / 11
            assert units.beta[layer, unit].item() == pytest.approx(beta if larger >= smaller else -beta)
            mean = sum(deltas) / 11
            std = (sum((d - mean) ** 2 for d in deltas) / 11) ** 0.5
            assert units.effect[layer, unit].item() == pytest.approx(abs(mean) / std, abs=1e-3)
    assert units.beta.abs().max() <= 1


@pytest.mark.paper("2602.04428")
def test_exchanging_the_answers_turns_every_sign_but_those_of_ties() -> None:
    triples = random_triples(10)
    there = momentum(LLAMA, triples, site="layer")
    back = momentum(LLAMA, [(x, no, yes) for x, yes, no in triples], site="layer")
    even = there.beta == 0.5  # P = Q = N / 2 counts as positive either way
    assert 0 < int(even.sum()) < even.numel() and bool((back.beta[even] == 0.5).all())
    torch.testing.assert_close(back.beta[~even], -there.beta[~even])
    torch.testing.assert_close(back.mean, -there.mean)


@pytest.fixture
def planted() -> HFModel:
    """Dimension 7 of its residual stream tells the words up to w40 from the others, and no layer reads or writes it."""
    model = random_model("llama", seed=3)
    network = model.model.model
    with torch.no_grad():
        network.embed_tokens.weight[:, 7] = torch.where(torch.arange(V) <= 40, 2.0, -2.0)
        for layer in network.layers:
            layer.self_attn.o_proj.weight[7] = 0.0
            layer.mlp.down_proj.weight[7] = 0.0
            layer.input_layernorm.weight[7] = layer.post_attention_layernorm.weight[7] = 0.0
    return model


@pytest.mark.paper("2602.04428")
def test_a_planted_unit_is_the_first(planted: HFModel) -> None:
    """40 pairs with random words on either side; by chance another of 46 units is as consistent in 1 of 1e10 draws."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 39, (40, 3), generator=generator).tolist()
    triples = [(f"w{x + 2}", f" w{yes + 2}", f" w{no + 41}") for x, yes, no in draws]
    units = momentum(planted, triples, site="layer")
    edit = units.top(1)
    assert edit.amounts.nonzero().tolist() == [[0, 7]] and edit.amounts[0, 7] == 1
    assert units.ranking()[:2].tolist() == [7, 24 + 7] and units.tied(1) == (1, 2) and units.tied(2) == (2, 2)
    assert units.beta.abs().flatten().sort().values[-3] < 0.9
    turned = momentum(planted, [(x, no, yes) for x, yes, no in triples], site="layer").top(1)
    torch.testing.assert_close(turned.amounts, -edit.amounts)


@pytest.mark.paper("2602.04428")
def test_answers_that_are_always_the_same_two_words_are_told_apart_as_words() -> None:
    """What the labels' balance is for: unbalanced, the units are of the letters; balanced, none is consistent."""
    model = random_model("llama")
    with torch.no_grad():
        model.model.model.embed_tokens.weight *= 10  # the last word shows in the residual stream, whatever was before
    prompts = [x for x, _, _ in random_triples(20)]
    always = momentum(model, [(x, " w5", " w9") for x in prompts], site="layer")
    balanced = momentum(
        model, [(x, *((" w5", " w9") if n % 2 else (" w9", " w5"))) for n, x in enumerate(prompts)], site="layer"
    )
    letters = always.beta.abs() == 1
    assert int(letters.sum()) >= 10
    assert balanced.beta[letters].abs().max() == 0.5


def test_ties_are_broken_as_asked_for() -> None:
    beta = torch.tensor([[0.5, -1.0, 1.0, 0.0], [1.0, -0.5, 0.5, -1.0]])
    mean = torch.tensor([[1.0, 1.0, 3.0, 0.0], [2.0, 9.0, 1.0, 4.0]])
    units = Units("ffn", beta, mean, torch.ones(2, 4), 8)
    assert units.ranking().tolist() == [1, 2, 4, 7, 0, 5, 6, 3]
    assert units.ranking(ties="effect").tolist() == [7, 2, 4, 1, 5, 0, 6, 3]
    assert units.top(2).amounts.tolist() == [[0, -1, 1, 0], [0, 0, 0, 0]]
    assert units.top(2, ties="effect", mode="shift").amounts.tolist() == [[0, 0, 1, 0], [0, 0, 0, -1]]
    assert units.tied(2) == (2, 4) and units.tied(4) == (4, 4) and units.tied(6) == (2, 3)
    assert units.top(0).count == 0 and units.top(7).count == 7
    with pytest.raises(ValueError, match="from 0 to 7"):
        units.top(8)
    with pytest.raises(ValueError, match="'order' or 'effect'"):
        units.top(1, ties="best")
    assert Units("ffn", beta, mean * 0, torch.zeros(2, 4), 8).effect.max() == 0


@pytest.mark.paper("2312.06681")
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_difference_of_means_is_one_and_is_added_to_the_stream(family: str) -> None:
    triples, model = random_triples(9), MODELS[family]
    edit = difference_of_means(model, triples, layer=0)
    wanted, other = (
        torch.stack([last_activations(family, "layer", x + answers[which])[0] for x, *answers in triples])
        for which in range(2)
    )
    torch.testing.assert_close(edit.amounts[0], wanted.mean(0) - other.mean(0), atol=1e-5, rtol=1e-4)
    assert not edit.amounts[1].any() and (edit.mode, edit.site) == ("shift", "layer")
    layers, ids = layers_of(model), strings(1, 5)
    with recorded(layers) as plain:
        model.predict(ids)
    steered = Steered(model, [edit.scaled(3.0)])
    with recorded(layers) as noted:
        steered.predict(ids)
    torch.testing.assert_close(noted[0][1], plain[0][1] + 3 * edit.amounts[0])
    torch.testing.assert_close(noted[1][0], noted[0][1])


def test_long_texts_lose_their_beginning() -> None:
    triples = [("w2 w3 w4 w5 w6", " w7", " w8"), ("w9", " w10", " w11")]
    cut = [("w5 w6", " w7", " w8"), ("w9", " w10", " w11")]
    torch.testing.assert_close(
        momentum(LLAMA, triples, site="layer", max_tokens=4).mean, momentum(LLAMA, cut, site="layer").mean
    )
    most = momentum(LLAMA, [(" ".join(["w2"] * 100), " w7", " w8")], site="layer")  # beyond the model's 40 tokens
    assert most.mean.abs().min() > 0


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    units = momentum(LLAMA, random_triples(7), site="attention")
    units.save(tmp_path / "units.safetensors")
    back = Units.load(tmp_path / "units.safetensors")
    assert (back.site, back.pairs) == ("attention", 7)
    assert all(torch.equal(getattr(back, name), getattr(units, name)) for name in ("beta", "mean", "std"))
    edit = units.top(5, mode="shift").scaled(3.0)
    edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    assert (again.site, again.mode) == ("attention", "shift") and torch.equal(again.amounts, edit.amounts)
    assert Steered(LLAMA, [again]).digest == Steered(LLAMA, [edit]).digest
    with pytest.raises(InputError, match="no units of nextoken"):
        Units.load(tmp_path / "edit.safetensors")
    with pytest.raises(InputError, match="cannot read"):
        Edit.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(InputError, match="cannot read"):
        Edit.load(tmp_path / "text")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: momentum(LLAMA, []), "at least one triple"),
        (lambda: momentum(LLAMA, random_triples(2), site="mlp"), "site must be one of"),
        (lambda: momentum(LLAMA, random_triples(2), max_tokens=0), "max_tokens"),
        (lambda: difference_of_means(LLAMA, random_triples(2), layer=2), "layer must be from 0 to 1"),
        (lambda: momentum(LLAMA, random_triples(2)).tied(0), "k must be from 1"),
    ],
)
def test_misuse_of_the_search_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()

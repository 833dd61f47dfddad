"""Masks after tokens: the model says what it said, blocks of masks see what they may, and guesses keep the law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.speculate.test_laws import assert_law
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from nextoken.decode.generate import derived_seed
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.errors import ModelError
from nextoken.model import tree
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.multi_token import AheadNext, Expansion, MultiToken
from nextoken.model.multi_token_adapter import MultiTokenAdapter
from nextoken.speculate import Branches, Branching, Chain, Draft, DraftModel, Follow, Recursive, Row, Speculation
from nextoken.speculate.multi_token_draft import MultiTokenDraft
from nextoken.speculate.multi_token_fit import MultiTokenRecipe, fit_multi_token, multi_token_losses
from nextoken.testing import check_language_model, check_speculation

pytestmark = pytest.mark.paper("2507.11851")

DEPTH, K = 2, 3
BOTH: tuple[Expansion, ...] = ("quadratic", "linear")
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": lambda size: transformers.LlamaConfig(vocab_size=size, **_SIZES),
    "mistral": lambda size: transformers.MistralConfig(vocab_size=size, **_SIZES, sliding_window=4),
    "qwen3": lambda size: transformers.Qwen3Config(
        vocab_size=size, **_SIZES, head_dim=8, sliding_window=3, use_sliding_window=True, max_window_layers=1
    ),
}


def hf(config: Any, *, name: str) -> HFModel:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, config.vocab_size)}}
    backend = Tokenizer(WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    return HFModel(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer, name=name)


@cache
def model_of(family: str, size: int = 30) -> HFModel:
    return hf(CONFIGS[family](size), name=family)


def scrambled(model: HFModel, *, masks: int = K, seed: int = 0) -> MultiTokenAdapter:
    """An adapter that nobody trained and that changes a great deal."""
    adapter = MultiTokenAdapter(model, masks=masks, rank=2, seed=seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for up in adapter.lora.ups.values():
            up.normal_(generator=generator)
    return adapter.eval()


@cache
def adapter_of(family: str, size: int = 30) -> MultiTokenAdapter:
    return scrambled(model_of(family, size))


def ids(batch: int, n: int, *, seed: int = 0, size: int = 30) -> Tensor:
    return torch.randint(2, size, (batch, n), generator=torch.Generator().manual_seed(seed))


def alone(adapter: MultiTokenAdapter, text: Tensor) -> Tensor:
    """z [k, H] of a text [n] by the definition: one causal pass over the text and its masks, nothing remembered."""
    stack, n, k = adapter.stack, len(text), len(adapter.masks)
    inputs = torch.cat([stack.embed(text[None]), adapter.masks[None]], 1)
    with torch.no_grad(), adapter.lora.at((torch.arange(n + k) >= n).float()[None]):
        call = stack.parallel(torch.arange(n + k)[None], torch.ones(1, n + k, n + k, dtype=torch.bool).tril())
        return stack.finish(stack.run(inputs, range(stack.depth), call))[0, n:]


def decoded(loop: Loop, prompts: list[tuple[int, ...]], rule: str, tokens: int) -> list[tuple[int, ...]]:
    tickets = [
        loop.submit(Request(prompt, transform(rule), tokens, seed=derived_seed(3, number), ignore_eos=True))
        for number, prompt in enumerate(prompts)
    ]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [tuple(found[ticket]) for ticket in tickets]


PROMPTS = [(0, *ids(1, n, seed=n)[0].tolist()) for n in (4, 1, 7, 2)]


@pytest.mark.parametrize("expansion", BOTH)
@pytest.mark.parametrize("family", CONFIGS)
def test_contract(family: str, expansion: Expansion) -> None:
    check_language_model(MultiToken(adapter_of(family), expansion=expansion))


@pytest.mark.parametrize("expansion", BOTH)
@pytest.mark.parametrize("family", CONFIGS)
def test_the_models_own_word_stands_beside_masks(family: str, expansion: Expansion) -> None:
    model, target = model_of(family), MultiToken(adapter_of(family), expansion=expansion)
    tokens = ids(2, 6)
    tokens[1, 3:] = ABSENT
    parents = torch.tensor([[-1, 0, 0, 2, 1]]).repeat(2, 1)
    nodes, states = ids(2, 5, seed=1), (model.start(2), target.start(2))
    for fed, above in ((tokens, None), (nodes, parents)):
        own, beside = (each.extend(state, fed, above) for each, state in zip((model, target), states, strict=True))
        present = fed != ABSENT
        torch.testing.assert_close(beside.log_probs()[present], own.log_probs()[present], rtol=0, atol=2e-6)
        assert beside.shape == own.shape and beside.vocab_size == model.vocab.size
    assert torch.equal(target.predict(nodes).log_probs(), model.predict(nodes).log_probs())
    assert target.digest == model.digest


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_in_training_are_masks_after_every_beginning(family: str) -> None:
    adapter, tokens = adapter_of(family), ids(2, 7)
    tokens[1, 5:] = ABSENT
    nodes = torch.arange(7).repeat(2, 1)
    hidden, ahead = adapter.ahead(tokens, nodes)
    plain = adapter.stack.model.predict(tokens).hidden
    assert plain is not None
    torch.testing.assert_close(hidden[0], plain[0], rtol=1e-4, atol=1e-5)
    for row, length in enumerate((7, 5)):
        for node in range(length):
            text = tokens[row, : node + 1]
            expected = alone(adapter, text)
            torch.testing.assert_close(ahead[row, node], expected, rtol=1e-4, atol=1e-5)
            for expansion in BOTH:
                target = MultiToken(adapter, expansion=expansion)
                state = target.start(1)
                if node > 2:
                    target.extend(state, text[None, :2])
                said = target.extend(state, text[None, len(state.tokens[0]) :])
                assert isinstance(said, AheadNext)
                torch.testing.assert_close(said.ahead[0, -1], expected, rtol=1e-4, atol=1e-5)
    # Fewer masks are the first ones.
    short = MultiToken(adapter, masks=2).extend(MultiToken(adapter, masks=2).start(1), tokens[:1, :4])
    assert isinstance(short, AheadNext)
    torch.testing.assert_close(short.ahead[0, -1], alone(adapter, tokens[0, :4])[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_masks_after_the_nodes_of_trees(family: str) -> None:
    target, prompt = MultiToken(adapter_of(family)), ids(2, 5)
    prompt[1, 3:] = ABSENT
    state = target.start(2)
    target.extend(state, prompt)
    nodes, parents = ids(2, 4, seed=1), torch.tensor([[-1, 0, 0, 2]])
    nodes[1, 3] = ABSENT
    said = target.extend(state, nodes, parents)
    assert isinstance(said, AheadNext)
    assert said.is_ahead.tolist() == [[True] * 4, [True] * 3 + [False]]
    for row, length in enumerate((5, 3)):
        for path in ([0], [0, 1], [0, 2]):
            text = torch.cat([prompt[row, :length], nodes[row, path]])
            expected = alone(target.adapter, text)
            torch.testing.assert_close(said.ahead[row, path[-1]], expected, rtol=1e-4, atol=1e-5)
    linear = MultiToken(target.adapter, expansion="linear")
    state = linear.start(2)
    linear.extend(state, prompt)
    last = linear.extend(state, nodes, parents)
    assert isinstance(last, AheadNext)
    assert last.is_ahead.tolist() == [[False] * 3 + [True], [False, False, True, False]]
    torch.testing.assert_close(last.ahead[last.is_ahead], said.ahead[last.is_ahead], rtol=1e-4, atol=1e-5)
    assert not last.ahead[~last.is_ahead].any()
    # Narrowed as what it belongs to.
    torch.testing.assert_close(last[1, [1, 2]].ahead[0], last.ahead[1, [1, 2]])  # type: ignore[attr-defined]
    torch.testing.assert_close(last[last.is_ahead].ahead[:, 0], last.ahead[last.is_ahead])  # type: ignore[attr-defined]


def test_masks_stand_after_the_last_tokens_of_chains() -> None:
    tokens = ids(3, 6)
    tokens[1, 5:], tokens[2, 2:] = ABSENT, ABSENT
    for expansion, size in (("quadratic", K + 1), ("linear", 1)):
        target = MultiToken(adapter_of("llama"), expansion=expansion)  # type: ignore[arg-type]
        said = target.extend(target.start(3), tokens)
        assert isinstance(said, AheadNext)
        expected = [[length - size <= place < length for place in range(6)] for length in (6, 5, 2)]
        assert said.is_ahead.tolist() == expected
        assert said.ahead.shape == (3, 6, K, 16)


@pytest.mark.parametrize("parents", [[-1, 0, 1, 2], [-1, 0, 0, 2]], ids=["chain", "tree"])
def test_gradients_reach_what_may_be_seen_and_nothing_else(parents: list[int]) -> None:
    adapter, masks, nodes = adapter_of("llama"), 2, [0, 2, 3]
    stack, above = adapter.stack, torch.tensor([parents])
    tokens, kept = ids(1, 4), ids(1, 2, seed=4)
    memory = stack.memory(1)
    with torch.no_grad():
        stack.run(stack.embed(kept), range(DEPTH), stack.call(memory, kept))
    memory.advance([2])
    given = None if parents == [-1, 0, 1, 2] else above
    call = adapter.call(memory, tokens, given, torch.tensor([nodes]), masks=masks)
    total = 4 + len(nodes) * masks
    start = torch.randn(1, total, 16, requires_grad=True)
    with adapter.lora.at((torch.arange(total) >= 4).float()[None]):
        out = stack.run(start, range(DEPTH), call)
    sees = tree.ancestry(above)[0]
    for place in range(total):
        expected = torch.zeros(total, dtype=torch.bool)
        block, mask = divmod(place - 4, masks)
        if place < 4:
            expected[:4] = sees[place]
        else:
            expected[:4] = sees[nodes[block]]
            first = 4 + block * masks
            expected[first : first + mask + 1] = True
        (gradient,) = torch.autograd.grad(out[0, place].sum(), start, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, expected), place
        depth = int(tree.depths(above)[0, place if place < 4 else nodes[block]])
        assert int(call.positions[0, place]) == 2 + depth + (0 if place < 4 else 1 + mask)


def test_tokens_teach_the_adapter_nothing() -> None:
    adapter = scrambled(model_of("llama"))
    with torch.enable_grad():
        memory, tokens = adapter.stack.memory(1), ids(1, 5)
        hidden, ahead = adapter.read(memory, tokens, None, torch.tensor([[2, 4]]), masks=K)
    weights = [adapter.masks, *adapter.lora.parameters()]
    for gradient in torch.autograd.grad(hidden.sum(), weights, retain_graph=True, allow_unused=True):
        assert gradient is None or not gradient.any()
    assert all(gradient.any() for gradient in torch.autograd.grad(ahead.pow(2).sum(), [adapter.masks]))


def test_losses_are_their_formulas() -> None:
    adapter, tokens = scrambled(model_of("llama")), ids(2, 8)
    tokens[1, 6:] = ABSENT
    nodes = torch.tensor([[0, 3, 5, 6], [1, 3, 4, ABSENT]])
    with torch.no_grad():
        found = multi_token_losses(adapter, tokens, nodes)
    head, lengths = adapter.stack.head, (8, 6)
    base, sampler, gaps = [], [], dict[tuple[int, int], list[float]]()
    plain = adapter.stack.model.predict(tokens).hidden
    assert plain is not None
    for row, places in enumerate(nodes.tolist()):
        for node in (place for place in places if place != ABSENT):
            states = alone(adapter, tokens[row, : node + 1])
            for j in range(1, K + 1):
                if node + 1 + j >= lengths[row]:
                    continue
                z, target = states[j - 1], int(tokens[row, node + 1 + j])
                s = adapter.told(tokens[row, node + j], z).detach()
                base.append(-float(head.logits(z).log_softmax(-1)[target]))
                sampler.append(-float(head.logits(s).log_softmax(-1)[target]))
                gap = float((z - plain[row, node + j]).pow(2).mean())
                gaps.setdefault((row, node + 1 + j), []).append(gap)
    assert float(found.base) == pytest.approx(sum(base) / len(base), rel=1e-4)
    assert float(found.sampler) == pytest.approx(sum(sampler) / len(sampler), rel=1e-4)
    mean = sum(sum(some) / len(some) for some in gaps.values()) / len(gaps)
    assert float(found.consistency) == pytest.approx(mean, rel=1e-4)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 50), expansion=st.sampled_from(BOTH), masks=st.integers(0, K), rows=st.integers(1, len(PROMPTS))
)
def test_greedy_decoding_is_the_models_own_whatever_the_adapter(
    seed: int, expansion: Expansion, masks: int, rows: int
) -> None:
    model = model_of("llama")
    target = MultiToken(scrambled(model, seed=seed), masks=masks, expansion=expansion)
    speculation = Speculation(MultiTokenDraft(target))
    expected = decoded(Loop(model), PROMPTS[:rows], "greedy", 9)
    assert decoded(speculation.loop(target, max_rows=3), PROMPTS[:rows], "greedy", 9) == expected
    assert speculation.tally.failures == 0
    assert (speculation.tally.drafted > 0) == (masks > 0)


@pytest.mark.parametrize("expansion", BOTH)
def test_guesses_are_those_of_masks_after_all_that_stands(expansion: Expansion) -> None:
    """Whatever was accepted before: z of the text without its last token, the sampler told that token first."""
    adapter, right = scrambled(model_of("llama")), list[bool]()
    target, head = MultiToken(adapter, expansion=expansion), adapter.stack.head
    own = dict(zip(PROMPTS, decoded(Loop(model_of("llama")), PROMPTS, "greedy", 12), strict=True))

    class Watched(MultiTokenDraft):
        def propose(self, rows: Sequence[Row]) -> Draft:
            made, rows_of = super().propose(rows), []
            for branches, row in zip(made.rows, rows, strict=True):
                states, previous = alone(adapter, torch.tensor(row.context[:-1])), row.context[-1]
                expected = []
                for z in states[: row.room]:
                    previous = int(head.logits(adapter.told(torch.tensor(previous), z)).argmax())
                    expected.append(previous)
                right.append(list(branches.tokens) == expected)
                assert right[-1] or (expansion == "linear" and not branches.tokens)
                # Other guesses are handed out, so that passes accept none, some and all of them.
                prompt, count = row.running.request.prompt, len(row.running.tokens)
                tokens = list(own[prompt][count : count + len(branches)])
                stand = (len(prompt) + count) % (len(tokens) + 1)
                tokens[stand:] = [0] * (len(tokens) - stand)
                rows_of.append(Branches.chosen(tokens, list(range(-1, len(tokens) - 1))))
            return Draft(tuple(rows_of))

    speculation = Speculation(Watched(target))
    assert decoded(speculation.loop(target), PROMPTS, "greedy", 12) == list(own.values())
    assert speculation.tally.failures == 0
    assert 0 < speculation.tally.accepted < speculation.tally.drafted
    assert any(right) and all(right) == (expansion == "quadratic")


def test_no_masks_are_plain_decoding() -> None:
    target = MultiToken(adapter_of("llama"), masks=0)
    speculation = Speculation(MultiTokenDraft(target))
    sampled = decoded(speculation.loop(target), PROMPTS, "temperature(0.9)", 10)
    assert [len(output) for output in sampled] == [10] * len(PROMPTS)
    tally = speculation.tally
    assert tally.tokens_per_pass == 1.0
    assert tally.drafted == tally.failures == 0


@pytest.mark.parametrize("expansion", BOTH)
def test_texts_fill_the_context_to_its_end(expansion: Expansion) -> None:
    model, prompt = model_of("llama"), (0, *ids(1, 54, seed=9)[0].tolist())
    target = MultiToken(adapter_of("llama"), expansion=expansion)
    speculation = Speculation(MultiTokenDraft(target))
    assert decoded(speculation.loop(target), [prompt], "greedy", 30) == decoded(Loop(model), [prompt], "greedy", 30)
    assert speculation.tally.failures == 0


@pytest.mark.parametrize("expansion", BOTH)
def test_seeds_fix_texts_whatever_the_batch(expansion: Expansion) -> None:
    target = MultiToken(adapter_of("llama"), expansion=expansion)
    together = decoded(Speculation(MultiTokenDraft(target), Follow()).loop(target), PROMPTS, "temperature(0.8)", 8)
    assert together == decoded(Loop(model_of("llama")), PROMPTS, "temperature(0.8)", 8)
    recursive = [
        decoded(Speculation(MultiTokenDraft(target)).loop(target, max_rows=rows), PROMPTS, "temperature(0.8)", 8)
        for rows in (1, 2, 64)
    ]
    assert recursive[0] == recursive[1] == recursive[2]


SMALL = 6


@cache
def law(length: int) -> dict[tuple[int, ...], float]:
    """Probability of every output after the begin token."""
    model, live, over = model_of("llama", SMALL), {(): 1.0}, dict[tuple[int, ...], float]()
    for _ in range(length):
        said = model.predict([[0, *output] for output in live]).log_probs()[:, -1].double().exp().tolist()
        grown: dict[tuple[int, ...], float] = {}
        for (output, mass), following in zip(live.items(), said, strict=True):
            for token, p in enumerate(following):
                (over if token == 1 else grown)[(*output, token)] = mass * p
        live = grown
    return over | live


def drawn(speculation: Speculation, target: MultiToken, count: int, length: int) -> list[tuple[int, ...]]:
    loop = speculation.loop(target, max_rows=512)
    change = transform("")
    for number in range(count):
        loop.submit(Request((0,), change, length, seed=derived_seed(5, number)))
    found: dict[int, list[int]] = {}
    for piece in loop.run():
        found.setdefault(piece.ticket, []).append(piece.token)
    assert speculation.tally.failures == 0
    return [tuple(output) for output in found.values()]


@pytest.mark.parametrize(
    ("expansion", "shape"),
    [
        pytest.param("quadratic", None, id="quadratic"),
        pytest.param("linear", None, id="linear"),
        pytest.param("quadratic", Branching((2, 1, 1)), id="tree", marks=pytest.mark.slow),
    ],
)
def test_sampling_keeps_the_law_of_whole_strings(expansion: Expansion, shape: Branching | None) -> None:
    """False alarm 1e-4 each (see test_laws)."""
    target = MultiToken(adapter_of("llama", SMALL), expansion=expansion)
    speculation = Speculation(MultiTokenDraft(target, shape), Recursive())
    assert_law(drawn(speculation, target, 1500, 4), law(4))
    assert 0 < speculation.tally.accepted < speculation.tally.drafted


def test_the_proof_of_the_public_checks() -> None:
    target = MultiToken(adapter_of("llama"))
    check_speculation(target, lambda: Speculation(MultiTokenDraft(target)), prompts=2, draws=300)


CYCLE = (2, 2, 3, 4, 4, 2, 5, 3, 6)
"""What follows a token depends on the one before it too."""


@cache
def cyclic() -> HFModel:
    """A model that has learnt to go on with the cycle from wherever a text begins."""
    sizes = {**_SIZES, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.1}
    model = hf(transformers.LlamaConfig(vocab_size=8, **sizes), name="cycle")
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=5e-3)
    for _ in range(120):
        tokens = torch.tensor(turns(24))
        loss = model.model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def turns(length: int) -> list[list[int]]:
    return [[0, *(CYCLE[(begin + i) % len(CYCLE)] for i in range(length))] for begin in range(len(CYCLE))]


@cache
def trained() -> tuple[MultiTokenAdapter, tuple[float, ...]]:
    adapter = MultiTokenAdapter(cyclic(), masks=K, rank=8)
    recipe = MultiTokenRecipe(steps=100, batch=9, blocks=None, rate=1e-2)
    return adapter, fit_multi_token(adapter, turns(20), recipe=recipe)


@pytest.mark.slow
def test_a_cycle_is_told_k_tokens_ahead() -> None:
    adapter, losses = trained()
    assert losses[-1] < 0.1 * losses[0]
    prompts = [(0, *CYCLE[begin:], *CYCLE[:begin]) for begin in range(3)]
    tokens = 1 + 4 * (K + 1)
    for expansion in BOTH:
        target = MultiToken(adapter, expansion=expansion)
        for rule in ("greedy", "temperature(0.5)"):
            speculation = Speculation(MultiTokenDraft(target))
            outputs = decoded(speculation.loop(target), prompts, rule, tokens)
            assert speculation.tally.tokens_per_pass == K + 1, (expansion, rule)
            for begin, output in enumerate(outputs):
                assert output == tuple(CYCLE[(begin + i) % len(CYCLE)] for i in range(tokens))


def test_nothing_is_told_of_random_text() -> None:
    size = 200
    model = hf(transformers.LlamaConfig(vocab_size=size, **{**_SIZES, "initializer_range": 1e-3}), name="noise")
    target = MultiToken(scrambled(model))
    speculation = Speculation(MultiTokenDraft(target), Follow())
    decoded(speculation.loop(target), PROMPTS * 5, "", 12)
    assert 1.0 <= speculation.tally.tokens_per_pass < 1.05


@pytest.mark.slow
def test_quadratic_expansion_loses_no_pass() -> None:
    """Half-trained guesses: the same guesses fail in both expansions, and after a failure one of them has none."""
    adapter = MultiTokenAdapter(cyclic(), masks=K, rank=8)
    fit_multi_token(adapter, turns(20), recipe=MultiTokenRecipe(steps=12, batch=9, blocks=None, rate=1e-2))
    prompts = [(0, *CYCLE[begin:], *CYCLE[:begin]) for begin in range(6)]
    rates = {}
    for expansion in BOTH:
        target = MultiToken(adapter, expansion=expansion)
        speculation = Speculation(MultiTokenDraft(target))
        decoded(speculation.loop(target), prompts, "greedy", 24)
        rates[expansion] = speculation.tally.tokens_per_pass
    assert 1.0 < rates["linear"] < rates["quadratic"] < K + 1


def test_a_failed_guess_costs_the_linear_expansion_a_pass() -> None:
    """No guess stands here, so every other pass verifies nothing."""
    model = model_of("llama")
    target = MultiToken(adapter_of("llama"), expansion="linear")

    class Wrong(MultiTokenDraft):
        def told(self, previous: Tensor, states: Tensor) -> Tensor:
            return torch.zeros_like(states) + 1e3 * target.adapter.stack.head.weight[0].detach()

    own = decoded(Loop(model), PROMPTS[:1], "greedy", 12)
    assert 0 not in own[0]
    speculation = Speculation(Wrong(target))
    assert decoded(speculation.loop(target), PROMPTS[:1], "greedy", 12) == own
    tally = speculation.tally
    # Passes 1, 3, .., 11 have guesses, the last two of them fewer for want of room.
    assert (tally.passes, tally.accepted) == (11, 0)
    assert tally.drafted == sum(min(K, 12 - 1 - done) for done in range(1, 12, 2))


def test_training_is_repeatable_and_changes_no_model() -> None:
    model, rows = model_of("llama"), ids(6, 9).tolist()
    before, steps = model.digest, list[int]()
    recipe = MultiTokenRecipe(steps=6, batch=4, blocks=3, rate=3e-2)

    def fitted(seed: int) -> tuple[MultiTokenAdapter, tuple[float, ...]]:
        adapter = MultiTokenAdapter(model, masks=2, rank=2)
        return adapter, fit_multi_token(
            adapter, rows, recipe=recipe, seed=seed, on_step=lambda step: steps.append(step.step)
        )

    (first, losses), (second, again), (other, _) = fitted(0), fitted(0), fitted(1)
    assert losses == again and len(losses) == 6 and steps == [*range(1, 7)] * 3
    assert torch.equal(first.masks, second.masks) and not torch.equal(first.masks, other.masks)
    assert model.digest == before
    assert all(weight.grad is None for weight in model.model.parameters())
    assert not first.training


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, adapter = model_of("llama"), adapter_of("llama")
    adapter.save(tmp_path)
    again = MultiTokenAdapter.load(tmp_path, model)
    text = ids(1, 5)[0]
    assert torch.equal(alone(again, text), alone(adapter, text))
    assert torch.equal(again.told(text[:K], alone(again, text)), adapter.told(text[:K], alone(adapter, text)))
    assert (again.lora.rank, again.lora.alpha) == (adapter.lora.rank, adapter.lora.alpha)
    with pytest.raises(ModelError, match="trained with another model"):
        MultiTokenAdapter.load(tmp_path, model_of("qwen3"))
    with pytest.raises(ModelError, match="multi-token_adapter"):
        MultiTokenAdapter.load(tmp_path / "nothing", model)


def test_what_cannot_be_is_refused() -> None:
    model, adapter = model_of("llama"), adapter_of("llama")
    with pytest.raises(ValueError, match="from 0 to 3"):
        MultiToken(adapter, masks=4)
    with pytest.raises(ValueError, match="expansion"):
        MultiToken(adapter, expansion="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 0"):
        MultiTokenAdapter(model, masks=-1)
    with pytest.raises(ValueError, match="no masks"):
        fit_multi_token(MultiTokenAdapter(model, masks=0), [[0, 2, 3]])
    wrong = (([], "no rows of tokens"), ([[0, 2]], "at least three"), ([[0, 2, 30]], "outside the vocabulary"))
    for texts, words in wrong:
        with pytest.raises(ValueError, match=words):
            fit_multi_token(adapter, texts)
    with pytest.raises(ValueError, match="not all of them 0"):
        MultiTokenRecipe(base=0, sampler=0, consistency=0)
    draft = MultiTokenDraft(MultiToken(adapter, masks=1))
    draft.check(MultiToken(adapter, expansion="linear"))
    for target in (model, MultiToken(scrambled(model))):
        with pytest.raises(ValueError, match="its own adapter"):
            draft.check(target)
    with pytest.warns(UserWarning, match="its own adapter"):
        loop = Speculation(draft).loop(model)
    assert decoded(loop, PROMPTS[:1], "greedy", 3) == decoded(Loop(model), PROMPTS[:1], "greedy", 3)


def test_other_drafters_may_guess_for_it() -> None:
    target = MultiToken(adapter_of("llama"))
    speculation = Speculation(DraftModel(model_of("llama"), Chain(2)))
    assert decoded(speculation.loop(target), PROMPTS, "greedy", 7) == decoded(
        Loop(model_of("llama")), PROMPTS, "greedy", 7
    )
    assert math.isclose(speculation.tally.tokens_per_pass, 3.0)

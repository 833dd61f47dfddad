"""Chimera: every place against the formula, one at a time; trees, kept states and laws whatever the head says."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.test_layers import tokenizer
from torch import Tensor

from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.errors import ModelError
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.speculate import Census, Chimera, ChimeraHead, ChimeraRecipe, Follow, Row, Speculation, fit_chimera
from nextoken.speculate.chimera import WIDTHS
from nextoken.speculate.recycling import template
from nextoken.testing import check_speculation

V = 80
PROMPTS = ((5, 9, 2, 30, 7), (3, 4), (60,), (8, 8, 8, 21))


def random_model(seed: int = 0) -> HFModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3, eos_token_id=1,
    )  # fmt: skip
    return HFModel(transformers.LlamaForCausalLM(config).eval(), tokenizer(), name=f"target {seed}")


TARGET = random_model()


def random_head(seed: int = 0, **settings: object) -> ChimeraHead:
    """All its weights drawn, those too that begin at 0."""
    head = ChimeraHead(TARGET, seed=seed, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in head.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return head.eval()


HEAD = random_head()


def ids(n: int, seed: int = 0) -> Tensor:
    return torch.randint(2, V, (1, n), generator=torch.Generator().manual_seed(seed))


def states(tokens: Tensor) -> Tensor:
    hidden = TARGET.predict(tokens).hidden
    assert hidden is not None
    return hidden


def turned(vector: Tensor, position: int) -> Tensor:
    """Pairs (i, i + D / 2) of [heads, D] turned as complex numbers."""
    half = vector.shape[-1] // 2
    pairs = torch.complex(vector[:, :half], vector[:, half:])
    angles = position * 10000.0 ** (-torch.arange(half) / half)
    pairs = pairs * torch.polar(torch.ones(half), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


@torch.no_grad()
def formula(head: ChimeraHead, read: Sequence[int], guesses: Sequence[int]) -> Tensor:
    """Logits [V] of the step after these guesses, the target having read all but the last of `read`; token by token."""
    hidden = states(torch.tensor([read]))[0, :-1]
    text, embed = list(read), TARGET.model.get_input_embeddings().weight
    sequence = list(hidden)
    for step in range(len(guesses) + 1):
        if step:
            text.append(guesses[step - 1])
        gram = torch.cat([embed[t] for t in [*[text[0]] * max(0, 3 - len(text)), *text[-3:]]])
        encoder, layer = head.trigrams, head.layer
        fresh = encoder.project(gram + torch.nn.functional.silu(encoder.residual(gram)))
        if layer is not None:
            everything = torch.stack([*sequence, fresh])
            normed = everything * (everything.square().mean(-1, keepdim=True) + layer.sizes.epsilon).rsqrt()
            normed = normed * layer.before_attention.weight
            query = turned(layer.query(normed[-1]).view(4, 4), len(sequence))
            keys = torch.stack([turned(layer.key(x).view(2, 4), p) for p, x in enumerate(normed)], 1)
            values = layer.value(normed).view(-1, 2, 4).transpose(0, 1)
            mixed = [((keys[h // 2] @ query[h]) / 2).softmax(0) @ values[h // 2] for h in range(4)]
            after = fresh + layer.mixed(torch.cat(mixed))
            normed = after * (after.square().mean() + layer.sizes.epsilon).rsqrt() * layer.before_feed_forward.weight
            fresh = after + layer.down(torch.nn.functional.silu(layer.gate(normed)) * layer.up(normed))
        sequence.append(fresh)
    both = torch.cat([hidden[-1], sequence[-1]])
    output, weight = head.outputs[len(guesses)], TARGET.model.lm_head.weight
    if head.output == "own":
        return output.weight @ both
    return weight @ (hidden[-1] + sequence[-1] + output.change(both))


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.paper("2402.15758")
@pytest.mark.parametrize("settings", [{}, {"output": "shared"}, {"context": False}], ids=str)
def test_all_places_at_once_are_the_formula_token_by_token(settings: dict[str, object]) -> None:
    head, tokens = random_head(1, depth=3, **settings), ids(9)
    said = head(states(tokens), tokens)
    guessed = head(states(tokens), tokens, feed="guess")
    own = torch.stack([one.logits()[0].argmax(-1) for one in guessed], -1).tolist()
    text = tokens[0].tolist()
    for place in range(8):
        for step in range(min(3, 8 - place)):
            following = text[place + 2 : place + 2 + step]
            assert_same(said[step].logits()[0, place], formula(head, text[: place + 2], following))
            expected = formula(head, text[: place + 2], own[place][:step])
            assert_same(guessed[step].logits()[0, place], expected)


@pytest.mark.paper("2402.15758")
@pytest.mark.parametrize("output", ["own", "shared"])
def test_untrained_steps_repeat_the_target(output: str) -> None:
    """With f = h the logits are 2 W h."""
    head, hidden = ChimeraHead(TARGET, output=output), states(ids(6))  # type: ignore[arg-type]
    for step in range(head.depth):
        torch.testing.assert_close(head.said(step, hidden, hidden).logits(), 2 * TARGET.predict(ids(6)).logits())


def test_without_what_was_said_since_all_steps_are_the_target_at_its_last_token() -> None:
    """Independent heads: no layer and P = 0."""
    head, tokens = ChimeraHead(TARGET, context=False), ids(6)
    torch.nn.init.zeros_(head.trigrams.project.weight)
    for said in head(states(tokens), tokens):
        torch.testing.assert_close(said.logits(), TARGET.predict(tokens[:, :-1]).logits())


@settings(max_examples=15)
@given(place=st.integers(0, 9), step=st.integers(0, 3), changed=st.integers(0, 11), seed=st.integers(0, 99))
def test_a_step_sees_its_own_path_and_nothing_after_it(place: int, step: int, changed: int, seed: int) -> None:
    tokens = ids(12, seed)
    other = tokens.clone()
    other[0, changed] = 2 + (tokens[0, changed] - 1) % (V - 2)
    for feed, until in (("text", place + 1 + step), ("guess", place + 1)):
        one, two = (HEAD(states(x), x, feed=feed)[step].logits()[0, place] for x in (tokens, other))
        assert torch.allclose(one, two, atol=1e-6) == (changed > until) or place + 1 + step > 11


def outputs(loop: Loop, rule: str, length: int = 12) -> list[list[int]]:
    change = transform(rule)
    tickets = [loop.submit(Request(prompt, change, length + i, seed=i)) for i, prompt in enumerate(PROMPTS)]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [found[ticket] for ticket in tickets]


def widths_of(numbers: list[int], depth: int) -> tuple[tuple[int, ...], ...]:
    """Some tree: of each level one number of children for each of the first nodes of the level above."""
    found, nodes = [], 1
    for level in range(depth):
        counts = tuple(numbers[(level + i) % len(numbers)] for i in range(min(nodes, 3)))
        counts = counts if sum(counts) else (1,)
        found.append(counts)
        nodes = sum(counts)
    return tuple(found)


@settings(max_examples=10)
@given(
    numbers=st.lists(st.integers(0, 3), min_size=2, max_size=4),
    depth=st.integers(1, 4),
    seed=st.integers(0, 99),
    rule=st.sampled_from(["greedy", "temperature(0.7)", "top_k(4)"]),
)
def test_any_head_and_any_tree_give_the_tokens_of_plain_decoding(
    numbers: list[int], depth: int, seed: int, rule: str
) -> None:
    speculation = Speculation(Chimera(random_head(seed), widths=widths_of(numbers, depth)), Follow())
    assert outputs(speculation.loop(TARGET, max_rows=3), rule) == outputs(Loop(TARGET), rule)
    assert speculation.tally.failures == 0


@pytest.mark.paper("2402.15758")
def test_strings_keep_their_law() -> None:
    proofs = check_speculation(TARGET, lambda: Speculation(Chimera(HEAD)), prompts=2, draws=250)
    assert len(proofs) == 3


class Stopped:
    """A loop stopped in its midst, some rows of which joined late and left early; and every draft so far."""

    def __init__(self, drafter: Chimera, steps: int, length: int = 30) -> None:
        self.speculation = Speculation(drafter, Follow())
        self.loop = self.speculation.loop(TARGET, max_rows=3)
        limits = (3, length, length, length)
        for prompt, limit in zip(PROMPTS, limits, strict=True):
            self.loop.submit(Request(prompt, transform("temperature(0.3)"), limit, seed=limit, ignore_eos=True))
        self.drafts: list[tuple[Row, tuple[int, ...]]] = []
        propose = drafter.propose

        def noted(rows: Sequence[Row]):  # type: ignore[no-untyped-def]
            draft = propose(rows)
            self.drafts += [(row, branches.tokens) for row, branches in zip(rows, draft.rows, strict=True)]
            return draft

        drafter.propose = noted  # type: ignore[method-assign]
        for _ in range(steps):
            self.loop.step()
        assert self.speculation.tally.failures == 0


def tree(head: ChimeraHead, context: Sequence[int], room: int) -> list[int]:
    """The released tree by the formula."""
    parents, ranks = template(WIDTHS[: head.depth])
    tokens: list[int] = []
    paths: list[list[int]] = []
    for parent, rank in zip(parents, ranks, strict=True):
        path = [] if parent < 0 else [*paths[parent], tokens[parent]]
        if len(path) == room:
            break
        tokens.append(int(formula(head, context, path).topk(rank + 1).indices[rank]))
        paths.append(path)
    return tokens


@pytest.mark.paper("2402.15758")
@pytest.mark.parametrize("prompts_heard", [True, False])
def test_every_tree_is_the_formula_after_its_own_text_in_any_batch(prompts_heard: bool) -> None:
    """So a row's guesses never depend on its neighbours, on what was rejected, or on how its states were come by."""
    head = random_head(3, depth=3)
    drafter = Chimera(head)
    if not prompts_heard:
        drafter.prompted = lambda rows, said: None  # type: ignore[method-assign]
    run = Stopped(drafter, 5)
    assert {len(row.context) for row, _ in run.drafts} > {2, 3, 5, 6}
    for row, tokens in run.drafts[:4] + run.drafts[-3:]:
        assert list(tokens) == tree(head, row.context, row.room)


def test_what_is_kept_is_what_a_fresh_pass_gives() -> None:
    drafter = Chimera(HEAD)
    run = Stopped(drafter, 9)
    tally, heard = run.speculation.tally, drafter._heard
    assert 0 < tally.accepted < tally.drafted
    said = {row.running.ticket: (*row.running.request.prompt, *row.running.tokens) for row, _ in run.drafts}
    (keys, values), own = heard.seen()  # type: ignore[misc]
    assert len(heard.tickets) == 3 and set(heard.tickets) == {1, 2, 3}
    for number, ticket in enumerate(heard.tickets):
        assert ticket is not None
        text = torch.tensor([said[ticket]])
        n = text.shape[1] - 1
        hidden = states(text[:, :-1])
        expected = HEAD.remembered(hidden, torch.arange(n)[None])
        assert expected is not None and own[number, 0].tolist() == [slot < n for slot in range(own.shape[-1])]
        torch.testing.assert_close(keys[number, :, :n], expected[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values[number, :, :n], expected[1][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(heard.last[number], hidden[0, -1], rtol=1e-4, atol=1e-4)


def test_rows_that_left_are_forgotten() -> None:
    drafter = Chimera(HEAD)
    outputs(Speculation(drafter, Follow()).loop(TARGET), "greedy")
    assert drafter._heard.tickets == [] and drafter._heard.memory.lengths == []


def test_a_census_finds_the_places_that_stand() -> None:
    census = Census(Chimera(HEAD))
    speculation = Speculation(census, Follow())
    assert outputs(speculation.loop(TARGET), "greedy") == outputs(Loop(TARGET), "greedy")
    assert sum(census.counts.values()) == speculation.tally.accepted > 0


def accuracy(head: ChimeraHead, rows: Sequence[Sequence[int]]) -> list[float]:
    """Share of the places at which the best token of each step came, guesses being fed."""
    tokens = torch.tensor(rows)
    with torch.no_grad():
        said = head(states(tokens), tokens, feed="guess")
    return [
        float((one.logits()[:, :-step].argmax(-1) == tokens[:, step + 1 :]).float().mean())
        for step, one in enumerate(said, 1)
    ]


@pytest.mark.paper("2402.15758")
def test_training_teaches_what_comes_and_leaves_the_target_alone() -> None:
    def counting(start: int, pace: int) -> list[int]:
        return [2 + (start + pace * i) % 20 for i in range(14)]

    rows = [counting(start, pace) for start in range(0, 20, 2) for pace in (1, 3, 7)]
    fresh = [counting(start, pace) for start in range(1, 20, 2) for pace in (1, 3, 7)]
    recipe = ChimeraRecipe(steps=80, batch=10, rate=1e-2, distillation=0)
    digest, seen = TARGET.digest, list[int]()
    heads = [ChimeraHead(TARGET, depth=3, output="shared") for _ in range(2)]
    before = accuracy(heads[0], fresh)
    losses = fit_chimera(heads[0], rows, recipe=recipe, on_step=lambda step: seen.append(step.step))
    after = accuracy(heads[0], fresh)
    assert all(late > early + 0.3 for early, late in zip(before, after, strict=True)), (before, after)
    assert len(losses) == 80 and seen == list(range(1, 81)) and losses[-1] < losses[0] / 2
    assert TARGET.digest == digest and all(weight.grad is None for weight in TARGET.model.parameters())
    brief = ChimeraRecipe(steps=3, batch=10, rate=1e-2, distillation=0)
    assert fit_chimera(heads[1], rows, recipe=brief)[0] == losses[0]


def test_distillation_teaches_the_target_and_not_the_text() -> None:
    """From texts without any order, step 1 learns what the target says of x_n+2 only by its distribution."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, 12, (40, 12), generator=generator).tolist()
    tokens = torch.tensor(rows)
    divergences = []
    for weight in (0.0, 4.0):
        head = ChimeraHead(TARGET, depth=1)
        fit_chimera(head, rows, recipe=ChimeraRecipe(steps=40, batch=20, rate=1e-2, distillation=weight))
        with torch.no_grad():
            q = head(states(tokens), tokens)[0].log_probs()[:, :-1]
        p = TARGET.predict(tokens).log_probs()[:, 1:-1]
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert divergences[1] < divergences[0] / 2


def test_a_saved_head_comes_back_for_its_target_only(tmp_path: Path) -> None:
    head = random_head(4, depth=2, output="shared", span=2)
    head.save(tmp_path)
    again = ChimeraHead.load(tmp_path, model=TARGET)
    tokens = ids(7)
    for one, two in zip(head(states(tokens), tokens), again(states(tokens), tokens), strict=True):
        assert torch.equal(one.logits(), two.logits())
    with pytest.raises(ModelError, match="trained with another target"):
        ChimeraHead.load(tmp_path, model=random_model(1))


def test_other_targets_are_refused() -> None:
    for other in (random_model(1), TableModel.random("abc", order=1, seed=0)):
        with pytest.raises(ValueError, match="with other weights"):
            Chimera(HEAD).check(other)
    with pytest.warns(UserWarning, match="goes on without it"):
        Speculation(Chimera(HEAD)).loop(random_model(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Speculation(Chimera(HEAD)).loop(random_model(0))  # the same weights


def test_misuse_is_explained() -> None:
    with pytest.raises(ValueError, match="cut the tree"):
        Chimera(random_head(depth=1), widths=((2,), (1,)))
    with pytest.raises(ValueError, match="there are 80 tokens"):
        Chimera(HEAD, widths=((81,),))
    with pytest.raises(ValueError, match="at least 1"):
        ChimeraHead(TARGET, depth=0)
    with pytest.raises(ValueError, match="'own' or 'shared'"):
        ChimeraHead(TARGET, output="both")  # type: ignore[arg-type]
    for rows, message in (([], "no rows"), ([[3, 4]], "at least three"), ([[3, 4, V]], "outside"), ([[3] * 49], "48")):
        with pytest.raises(ValueError, match=message):
            fit_chimera(HEAD, rows)
    for wrong in ({"steps": 0}, {"rate": 0.0}, {"distillation": -1.0}, {"feed": "both"}):
        with pytest.raises(ValueError):
            ChimeraRecipe(**wrong)  # type: ignore[arg-type]
    assert Chimera(HEAD).needs_trees and not Chimera(HEAD, widths=((1,), (1,))).needs_trees

"""Drafting with the target's own first layers: nothing is changed, nothing is run twice, and the adapter learns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from tests.model.test_early_exit import exit_states as hooked
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from nextoken.decode.generate import derived_seed, generate
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.errors import ModelError
from nextoken.model.early_exit import EarlyExit
from nextoken.model.hf import HFModel
from nextoken.model.sarsa import FitStep
from nextoken.speculate import Draft, Follow, Row, Speculation
from nextoken.speculate.kangaroo import Kangaroo
from nextoken.speculate.kangaroo_adapter import KangarooAdapter
from nextoken.speculate.kangaroo_fit import KangarooRecipe, fit_kangaroo, overlap, soft_cross_entropy
from nextoken.testing import check_speculation

DEPTH, WORDS = 3, 6


def random_model(words: int = WORDS, *, seed: int = 0, hidden: int = 16, spread: float = 0.35) -> HFModel:
    ids = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, words)}}
    backend = Tokenizer(WordLevel(ids, unk_token="<s>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        max_position_embeddings=80,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=1,
    )
    return HFModel(transformers.LlamaForCausalLM(config).eval(), tokenizer, name=f"random {words}")


def adapter_of(target: EarlyExit, *, spread: float = 0.3, seed: int = 1) -> KangarooAdapter:
    """One that says something else than the bare exit."""
    adapter = KangarooAdapter(target, seed=seed)
    torch.nn.init.normal_(adapter.outward.weight, std=spread, generator=torch.Generator().manual_seed(seed))
    return adapter


MODEL = random_model(seed=4)
TARGET = EarlyExit(MODEL, exit=1)
RANDOM, BARE = adapter_of(TARGET), KangarooAdapter(TARGET)
PROMPT = (0, 2, 3, 4)


def outputs(loop: Loop, rule: str, prompts: Sequence[tuple[int, ...]], length: int) -> list[tuple[int, ...]]:
    change = transform(rule)
    tickets = [
        loop.submit(Request(prompt, change, length, seed=derived_seed(3, number + 1)))
        for number, prompt in enumerate(prompts)
    ]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [tuple(found[ticket]) for ticket in tickets]


# The adapter.


def told(adapter: KangarooAdapter, exits: Tensor) -> Tensor:
    """A(e) [n, H] by its formula, place by place, positions as complex numbers."""
    with torch.no_grad():
        heads, size = adapter.heads, adapter.width // adapter.heads
        normed = exits * (exits.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * adapter.rms.weight
        parts = adapter.inward.weight.view(3, heads, size, -1)
        rates = adapter.base ** -(torch.arange(size // 2) * 2 / size)
        result = []
        for t in range(len(exits)):
            mixed = []
            for head in range(heads):

                def turned(part: int, place: int, head: int = head) -> Tensor:
                    vector = parts[part, head] @ normed[place]
                    return torch.complex(vector[: size // 2], vector[size // 2 :]) * torch.polar(
                        torch.ones(size // 2), place * rates
                    )

                scores = [(turned(0, t) * turned(1, s).conj()).real.sum() / math.sqrt(size) for s in range(t + 1)]
                weights = torch.stack(scores).softmax(0)
                mixed.append(sum(w * (parts[2, head] @ normed[s]) for s, w in enumerate(weights)))
            result.append(adapter.norm(exits[t] + adapter.outward.weight @ torch.cat(mixed)))
        return torch.stack(result)


def exit_states(target: EarlyExit, tokens: Sequence[int]) -> Tensor:
    """e [n, H], as transformers makes them."""
    return hooked(target.stack.model, torch.tensor([list(tokens)]), target.exit)[0]


@pytest.mark.paper("2404.18911")
def test_the_adapter_is_its_formula() -> None:
    exits = exit_states(TARGET, (0, 2, 3, 4, 5, 2, 2))
    with torch.no_grad():
        found = RANDOM(exits[None], TARGET.stack.parallel(torch.arange(7)[None]))[0]
    torch.testing.assert_close(found, told(RANDOM, exits), rtol=1e-4, atol=1e-5)
    weights = sum(weight.numel() for name, weight in RANDOM.named_parameters() if name != "norm.weight")
    assert weights == 4 * 16**2 + 16


# Nothing is changed.


@pytest.mark.paper("2404.18911")
@pytest.mark.parametrize("confidence", [0.0, 0.45, 1.0])
@pytest.mark.parametrize("adapter", [RANDOM, BARE], ids=["random", "bare"])
def test_greedy_tokens_are_those_of_plain_decoding(adapter: KangarooAdapter, confidence: float) -> None:
    """Rows of different prompts that join and leave, for any adapter."""
    prompts = [(0,), (0, 2, 3), (0, 5, 5, 5, 4, 2), (0, 4), (0, 3, 3, 2)]
    speculation = Speculation(Kangaroo(TARGET, adapter, confidence=confidence))
    fast = outputs(speculation.loop(TARGET, max_rows=3), "greedy", prompts, 30)
    assert fast == outputs(Loop(MODEL), "greedy", prompts, 30)
    assert speculation.tally.failures == 0
    assert 0 < speculation.tally.accepted < speculation.tally.drafted


@pytest.mark.paper("2404.18911")
@pytest.mark.parametrize("rule", ["", "temperature(0.7) | top_k(4)", "repetition_penalty(1.3)", "mirostat_2(2)"])
def test_a_row_does_not_depend_on_its_neighbours(rule: str) -> None:
    """Nor do sampled tokens on the drafter, where guesses are followed."""
    prompts = [(0,), (0, 2, 3), (0, 5, 5, 5, 4, 2), (0, 4)]

    def drawn(some: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        speculation = Speculation(Kangaroo(TARGET, RANDOM, confidence=0.3))
        made = outputs(speculation.loop(TARGET, max_rows=3), rule, some, 20)
        assert speculation.tally.failures == 0
        return made

    together = drawn(prompts)
    assert drawn(prompts[:1]) == together[:1]
    followed = Speculation(Kangaroo(TARGET, RANDOM, confidence=0.3), Follow())
    assert outputs(followed.loop(TARGET), rule, prompts, 20) == outputs(Loop(MODEL), rule, prompts, 20)


LENGTH = 5


def law() -> dict[tuple[int, ...], float]:
    """Probability of every output of at most five tokens under top_k(3), by enumeration."""
    ended, live = dict[tuple[int, ...], float](), {(): 1.0}
    for _ in range(LENGTH):
        grown = dict[tuple[int, ...], float]()
        said = MODEL.predict([[*PROMPT, *output] for output in live]).log_probs()[:, -1].double().exp()
        best = said.topk(3)
        shares = best.values / best.values.sum(-1, keepdim=True)
        for (output, mass), row, tokens in zip(live.items(), shares.tolist(), best.indices.tolist(), strict=True):
            for token, p in zip(tokens, row, strict=True):
                (ended if token == 1 else grown)[(*output, token)] = mass * p
        live = grown
    return ended | live


@pytest.mark.slow
@pytest.mark.paper("2404.18911")
def test_whole_strings_keep_their_law_with_the_stop_rule_active() -> None:
    """False alarm 1e-4."""
    drafted = []
    for confidence in (0.5, 0.0):
        speculation = Speculation(Kangaroo(TARGET, RANDOM, length=3, confidence=confidence))
        drawn = outputs(speculation.loop(TARGET, max_rows=256), "top_k(3)", [PROMPT] * 1500, LENGTH)
        assert chi_square(drawn, law()) < 1
        tally = speculation.tally
        assert 0.1 < tally.accepted / tally.drafted < 0.8
        drafted.append(tally.drafted / tally.passes)
    # The rule stops many of the drafts.
    assert 1.3 * drafted[0] < drafted[1]


def chi_square(drawn: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """The statistic in relation to its bound at a false alarm of 1e-4; rare strings are taken together."""
    counts = dict.fromkeys(expected, 0)
    for string in drawn:
        counts[string] += 1
    often = [string for string, p in expected.items() if p * len(drawn) >= 5]
    rest = 1 - sum(expected[string] for string in often)
    pairs = [(counts[string], expected[string] * len(drawn)) for string in often]
    pairs.append((len(drawn) - sum(counts[string] for string in often), rest * len(drawn)))
    statistic = sum((seen - p) ** 2 / p for seen, p in pairs)
    return statistic / float(chi2.isf(1e-4, len(pairs) - 1))


@pytest.mark.paper("2404.18911")
def test_the_proof_for_everybody_holds() -> None:
    """False alarm 1e-4."""
    check_speculation(TARGET, lambda: Speculation(Kangaroo(TARGET, RANDOM, confidence=0.35)), prompts=1, draws=400)


def test_a_wrong_confidence_rule_would_be_noticed() -> None:
    """The cheat of the trap: a token of which the draft was unsure is taken back after it was drawn."""

    class Suspicious(Kangaroo):
        def propose(self, rows: Sequence[Row]) -> Draft:
            draft = super().propose(rows)
            cut = []
            for branches in draft.rows:
                laws = branches.laws or {}
                pairs = zip(branches.parents, branches.tokens, strict=True)
                sure = [float(laws[parent][token]) >= 0.5 for parent, token in pairs]
                n = next((i for i, ok in enumerate(sure) if not ok), len(sure))
                kept = {node: [c for c in children if c < n] for node, children in branches.candidates.items()}
                cut.append(type(branches)(branches.tokens[:n], branches.parents[:n], kept, branches.laws))
            return Draft(tuple(cut))

    loop = Speculation(Suspicious(TARGET, RANDOM, length=3, confidence=0.0)).loop(TARGET, max_rows=256)
    assert chi_square(outputs(loop, "top_k(3)", [PROMPT] * 1000, LENGTH), law()) > 1.5


# What is drafted, and what it costs.


class _Watched(Kangaroo):
    """Every law from which it drew, beside that of the formula on the whole context."""

    seen: int = 0

    def propose(self, rows: Sequence[Row]) -> Draft:
        draft = super().propose(rows)
        for row, branches in zip(rows, draft.rows, strict=True):
            text = [*row.context, *branches.tokens]
            hidden = told(self.adapter, exit_states(self.target, text))[len(row.context) - 1 :]
            laws = (hidden @ self.target.stack.head.weight.T).double().softmax(-1)
            assert branches.laws is not None
            for parent, found in branches.laws.items():
                torch.testing.assert_close(found, laws[parent + 1], rtol=1e-4, atol=1e-5)
                self.seen += 1
        return draft


@pytest.mark.paper("2404.18911")
@pytest.mark.parametrize("exit", [1, DEPTH])
def test_guesses_are_drawn_from_head_and_adapter_in_every_round(exit: int) -> None:
    """With the exit at the end nearly every block stands as a whole, which is where caches miss a guess."""
    target = EarlyExit(MODEL, exit=exit)
    drafter = _Watched(target, adapter_of(target, spread=0.05 if exit == DEPTH else 0.3), length=3, confidence=0)
    speculation = Speculation(drafter)
    outputs(speculation.loop(target, max_rows=2), "", [(0,), (0, 2, 3, 4), (0, 5), (0, 4), (0, 3, 3)], 12)
    tally = speculation.tally
    assert tally.failures == 0
    assert drafter.seen > 20
    assert tally.accepted > (0.8 if exit == DEPTH else 0.1) * tally.drafted


@pytest.mark.paper("2404.18911")
def test_at_the_last_layer_a_bare_adapter_is_always_right() -> None:
    target = EarlyExit(MODEL, exit=DEPTH)
    for rule in ("greedy", "temperature(0.9)"):
        speculation = Speculation(Kangaroo(target, KangarooAdapter(target), length=4, confidence=0))
        drawn = outputs(speculation.loop(target), rule, [PROMPT] * 5, 16)
        tally = speculation.tally
        # Every pass gives four guesses and one token more, but for the last of each text, and the first is drawn alone.
        assert tally.passes == sum(-(-(len(output) - 1) // 5) for output in drawn)
        assert tally.tokens == sum(map(len, drawn)) - len(drawn)


@pytest.mark.paper("2404.18911")
@settings(max_examples=6)
@given(confidence=st.floats(0, 1), exit=st.integers(1, DEPTH - 1), seed=st.integers(0, 99))
def test_no_layer_runs_twice_and_memories_hold_what_is_kept(confidence: float, exit: int, seed: int) -> None:
    """After every round: lengths, keys and values, exit states and the adapter's keys are those of reading anew."""
    target = EarlyExit(MODEL, exit=exit)
    adapter = adapter_of(target, seed=seed)
    speculation = Speculation(Kangaroo(target, adapter, length=4, confidence=confidence))
    loop = speculation.loop(target)
    for number, prompt in enumerate([(0, 2), (0, 5, 5, 5, 4, 2)]):
        loop.submit(Request(prompt, transform(""), 12, seed=seed + number, ignore_eos=True))
    while True:
        loop.step()
        if loop.is_done or len(loop._rows) < 2:
            break
        state = loop._state
        assert state is not None
        memory = target.own(state.memory)
        for row, running in enumerate(loop._rows):
            text = [*running.request.prompt, *running.tokens][:-1]
            assert list(state.tokens[row]) == text
            assert memory.kv.lengths[row] == len(text)
            assert memory.ahead[row] == []
            # One token only is new to the adapter, or two where a whole block stood.
            assert len(text) - 1 <= memory.read[row] <= len(text)
            fresh = target.start()
            target.layers_run, counted = [0] * DEPTH, target.layers_run
            target.exits_read, read = 0, target.exits_read
            target.extend(fresh, [text])
            target.read_exits(fresh, adapter)
            target.layers_run, target.exits_read = counted, read
            other = target.own(fresh.memory)
            for index, (mine, anew) in enumerate(zip(memory.kv.cache.layers, other.kv.cache.layers, strict=True)):
                held = memory.read[row] if index == DEPTH + 1 else len(text)
                assert mine.buffers is not None and anew.buffers is not None
                for buffer, expected in zip(mine.buffers, anew.buffers, strict=True):
                    torch.testing.assert_close(buffer[row, :, :held], expected[0, :, :held], rtol=1e-4, atol=1e-4)
    # Both prompts, and in every pass the last token with its draft: each token once in each layer.
    tally = speculation.tally
    assert target.layers_run == [8 + tally.passes + tally.drafted] * DEPTH


@pytest.mark.paper("2404.18911")
def test_one_guess_at_full_confidence_and_a_fixed_number_at_none() -> None:
    for confidence, guesses in ((1.0, 1), (0.0, 6)):
        speculation = Speculation(Kangaroo(TARGET, RANDOM, confidence=confidence))
        loop = speculation.loop(TARGET)
        loop.submit(Request(PROMPT, transform(""), 60, seed=0, ignore_eos=True))
        while len(loop._rows[0].tokens if loop._rows else ()) < 40:
            drafted = speculation.tally.drafted
            loop.step()
            assert speculation.tally.drafted - drafted == guesses


@pytest.mark.paper("2404.18911")
def test_higher_thresholds_draft_less_and_stand_more_often() -> None:
    drafted, stood = [], []
    for confidence in (0.0, 0.5, 0.8):
        speculation = Speculation(Kangaroo(TARGET, BARE, confidence=confidence))
        outputs(speculation.loop(TARGET, max_rows=100), "", [(0, 2), (0, 3), (0, 4), (0, 5)] * 10, 20)
        drafted.append(speculation.tally.drafted / speculation.tally.passes)
        stood.append(speculation.tally.accepted / speculation.tally.drafted)
    assert drafted == sorted(drafted, reverse=True)
    assert min(stood[1:]) > stood[0]


def test_stop_strings_and_streaming() -> None:
    pieces: list[str] = []
    speculation = Speculation(Kangaroo(TARGET, RANDOM, confidence=0.2))
    plain = generate(MODEL, "w2 w3", max_tokens=40, seed=1, stop="w4", ignore_eos=True, transform="temperature(2)")
    fast = generate(
        TARGET, "w2 w3", max_tokens=40, seed=1, stop="w4", ignore_eos=True, transform="temperature(2)",
        speculate=Speculation(speculation.drafter, Follow()), on_piece=lambda piece: pieces.append(piece.text),
    )  # fmt: skip
    assert (fast.tokens, fast.text, fast.finish) == (plain.tokens, plain.text, "stop")
    assert "".join(pieces) == fast.text


def test_other_targets_are_refused_and_decoded_plainly() -> None:
    speculation = Speculation(Kangaroo(TARGET, RANDOM))
    for other in (MODEL, EarlyExit(MODEL, exit=2)):
        with pytest.warns(UserWarning, match="generate from that EarlyExit itself"):
            drawn = outputs(speculation.loop(other), "greedy", [PROMPT], 10)
        assert drawn == outputs(Loop(MODEL), "greedy", [PROMPT], 10)
    with pytest.raises(ValueError, match=r"after layer 1; .* after layer 2"):
        Kangaroo(EarlyExit(MODEL, exit=2), RANDOM)
    with pytest.raises(ValueError, match=r"16 units .* 8 units"):
        Kangaroo(EarlyExit(random_model(hidden=8), exit=1), RANDOM)
    with pytest.raises(ValueError, match="confidence from 0 to 1"):
        Kangaroo(TARGET, RANDOM, confidence=1.1)
    with pytest.raises(ValueError, match="cannot share 16 units"):
        KangarooAdapter(TARGET, heads=3)


def test_a_drafter_serves_one_call_after_the_other() -> None:
    drafter = Kangaroo(TARGET, RANDOM, confidence=0.2)
    half = Speculation(drafter).loop(TARGET)
    half.submit(Request((0, 5, 5, 2, 2), transform(""), 30, seed=5, ignore_eos=True))
    half.step()  # and never ended
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = outputs(Speculation(drafter).loop(TARGET), "greedy", [PROMPT], 20)
    assert drawn == outputs(Loop(MODEL), "greedy", [PROMPT], 20)


# Learning.


def texts_of(model: HFModel, count: int, length: int, seed: int = 0) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    loop = Loop(model)
    tickets = [
        loop.submit(Request((0, 2 + number % 3), transform(""), length, seed=seed + number, ignore_eos=True))
        for number in range(count)
    ]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [((0, 2 + number % 3), tuple(found[ticket])) for number, ticket in enumerate(tickets)]


def test_loss_and_overlap_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.6, 0.4]])
    expected = -(0.5 * math.log(0.25) + 0.5 * math.log(0.75) + 0.9 * math.log(0.6) + 0.1 * math.log(0.4)) / 2
    assert float(soft_cross_entropy(q.log(), p.log())) == pytest.approx(expected)
    texts = [((0, 2), (3, 4, 5)), ((0,), (4, 4))]
    shared = []
    for prompt, output in texts:
        whole = [*prompt, *output]
        said = MODEL.predict([whole]).log_probs()[0].exp()
        guessed = (told(RANDOM, exit_states(TARGET, whole)) @ TARGET.stack.head.weight.T).softmax(-1)
        shared += torch.minimum(said, guessed).sum(-1)[len(prompt) - 1 : -1].tolist()
    assert overlap(RANDOM, TARGET, texts) == pytest.approx(sum(shared) / len(shared), abs=1e-5)


@pytest.mark.paper("2404.18911")
def test_training_raises_the_overlap_and_leaves_the_target_alone() -> None:
    target = EarlyExit(random_model(20, spread=0.15), exit=1)
    texts, held_out = texts_of(target.stack.model, 48, 24), texts_of(target.stack.model, 16, 24, seed=1000)
    digest, adapter, steps = target.digest, KangarooAdapter(target, seed=3), list[FitStep]()
    before = overlap(adapter, target, held_out)
    recipe = KangarooRecipe(epochs=20, batch=16, rate=1e-2)
    losses = fit_kangaroo(adapter, target, texts, recipe=recipe, seed=2, on_step=steps.append)
    assert len(losses) == 60 == steps[-1].step == steps[-1].steps
    assert sum(losses[-3:]) < sum(losses[:3])
    after = overlap(adapter, target, held_out)
    assert 1 - after < 0.7 * (1 - before), (before, after)
    assert target.digest == digest
    # What overlaps more stands more often.
    rates = []
    for one in (KangarooAdapter(target), adapter):
        speculation = Speculation(Kangaroo(target, one, confidence=0))
        outputs(speculation.loop(target, max_rows=40), "", [(0, 2)] * 40, 20)
        rates.append(speculation.tally.tokens_per_pass)
    assert rates[1] > rates[0]


def test_training_is_repeatable() -> None:
    texts, adapters = texts_of(MODEL, 6, 10), [KangarooAdapter(TARGET, seed=3) for _ in range(2)]
    recipe = KangarooRecipe(epochs=2, batch=4)
    losses = [fit_kangaroo(adapter, TARGET, texts, recipe=recipe, seed=2) for adapter in adapters]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(adapters[0].parameters(), adapters[1].parameters(), strict=True))


def test_an_adapter_comes_back_from_its_folder_and_only_for_its_target(tmp_path: Path) -> None:
    RANDOM.save(tmp_path, target=TARGET)
    again = KangarooAdapter.load(tmp_path, target=EarlyExit(MODEL, exit=1))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), RANDOM.parameters(), strict=True))
    with pytest.raises(ModelError, match=r"after layer 1.* make an EarlyExit with exit=1"):
        KangarooAdapter.load(tmp_path, target=EarlyExit(MODEL, exit=2))
    with pytest.raises(ModelError, match="trained with another target"):
        KangarooAdapter.load(tmp_path, target=EarlyExit(random_model(seed=5), exit=1))
    with pytest.raises(ModelError, match="holds no kangaroo_adapter"):
        KangarooAdapter.load(tmp_path / "nowhere", target=TARGET)


def test_misuse_of_training_is_told() -> None:
    with pytest.raises(ValueError, match="there must be texts"):
        fit_kangaroo(KangarooAdapter(TARGET), TARGET, [])
    with pytest.raises(ValueError, match="at least one token"):
        overlap(BARE, TARGET, [((0,), ())])
    with pytest.raises(ValueError, match="after layer 2"):
        fit_kangaroo(KangarooAdapter(TARGET), EarlyExit(MODEL, exit=2), [((0,), (2,))])
    with pytest.raises(ValueError, match="epochs and batch"):
        KangarooRecipe(epochs=0)
    with pytest.raises(ValueError, match="rate and clip"):
        KangarooRecipe(clip=0)

"""Switching between two models: the contract, a brute-force switchboard, caches, limits, costs, misuse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nextoken.decode.generate import generate
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.route.cost import Spent, activated_parameters
from nextoken.route.entropy_switching import EntropyRule, EntropySwitching, Uncertainty
from nextoken.route.random_switching import RandomSwitching
from nextoken.route.switch_rule import LARGE, SMALL, Standing, SwitchRule
from nextoken.route.switching import Switching
from nextoken.testing import check_language_model

SMALLER = TableModel.random(4, order=1, seed=1, name="smaller", eos=True, concentration=0.7)
LARGER = TableModel.random(4, order=2, seed=2, name="larger", eos=True, concentration=0.4)
BOS = SMALLER.vocab.bos_id
assert BOS is not None


def small_hf(seed: int, *, hidden: int, name: str) -> HFModel:
    words = {"a": 0, "b": 1, "c": 2, "d": 3, "<bos>": 4, "<eos>": 5}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<bos>")), bos_token="<bos>", eos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=6,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=4,
        eos_token_id=5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HFModel(transformers.LlamaForCausalLM(config).eval(), tokenizer, name=name)


SMALL_HF, LARGE_HF = small_hf(1, hidden=8, name="small"), small_hf(2, hidden=16, name="large")

ROUTERS: list[LanguageModel] = [
    EntropySwitching(SMALLER, LARGER, threshold=1.4, window=3, min_stay=2),
    EntropySwitching(SMALLER, LARGER, threshold=1.6, lower=1.2, window=1, min_stay=1),
    EntropySwitching(SMALLER, LARGER, threshold=1.4, window=4, min_stay=0),
    RandomSwitching(SMALLER, LARGER, share=0.5, seed=3),
    RandomSwitching(SMALLER, LARGER, share=0.3, stay=3),
    EntropySwitching(RandomSwitching(SMALLER, LARGER, share=0.5), SMALLER, threshold=1.4, window=2, min_stay=1),
    EntropySwitching(SMALL_HF, LARGE_HF, threshold=1.6, window=3, min_stay=2),
    RandomSwitching(SMALL_HF, LARGE_HF, share=0.5, stay=2),
]


@pytest.mark.parametrize("number", range(len(ROUTERS)))
def test_keeps_the_contract(number: int) -> None:
    assert all(proof.skipped is None for proof in check_language_model(ROUTERS[number]))


def switchboard(text: list[int], threshold: float, window: int, min_stay: int) -> list[bool]:
    """Whether the large model answers after each token: every step from the definition, on whole distributions."""
    active, since, entropies, trace = threshold < 0, 0, [], []
    for size in range(1, len(text) + 1):
        model = LARGER if active else SMALLER
        p = model.predict([text[:size]]).log_probs()[0, -1].double().exp().tolist()
        trace.append(active)
        entropies.append(-sum(share * math.log2(share) for share in p if share > 0))
        since += 1
        if since >= min_stay:
            latest = entropies[-window:]
            wanted = sum(latest) / len(latest) > threshold
            if wanted != active:
                active, since = wanted, 0
    return trace


@pytest.mark.paper("2502.06833")
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=14),
    st.floats(-0.5, 2.5),
    st.integers(1, 6),
    st.integers(0, 6),
    st.integers(1, 14),
)
@settings(max_examples=60, deadline=None)
def test_every_answer_is_the_switchboards(
    body: list[int], threshold: float, window: int, min_stay: int, cut: int
) -> None:
    text = [BOS, *body]
    model = EntropySwitching(SMALLER, LARGER, threshold=threshold, window=window, min_stay=min_stay)
    expected = switchboard(text, threshold, window, min_stay)
    said = model.predict([text])
    assert said.is_large[0].tolist() == expected
    both = torch.stack([m.predict([text]).log_probs()[0] for m in (SMALLER, LARGER)])
    torch.testing.assert_close(said.log_probs()[0], both[torch.tensor(expected).long(), torch.arange(len(text))])
    # However it is fed.
    state = model.start()
    pieces = [model.extend(state, [piece]).is_large[0].tolist() for piece in (text[:cut], text[cut:]) if piece]
    assert [large for piece in pieces for large in piece] == expected


@pytest.mark.paper("2502.06833")
@given(
    st.lists(st.floats(0, 4), max_size=30),
    st.floats(0, 3),
    st.floats(0, 1),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_nobody_leaves_before_the_minimum_stay(
    entropies: list[float], threshold: float, band: float, window: int, min_stay: int
) -> None:
    rule = EntropyRule(threshold, threshold - band, window, min_stay)
    standing, runs = rule.begin(), [1]
    for entropy in entropies:
        after = rule.after(standing, entropy)
        runs = [*runs[:-1], runs[-1] + 1] if after.active == standing.active else [*runs, 1]
        standing = after
    assert all(run >= min_stay for run in runs[:-1])


def actives(rule: EntropyRule, entropies: list[float]) -> list[int]:
    standing, trace = rule.begin(), []
    for entropy in entropies:
        standing = rule.after(standing, entropy)
        trace.append(standing.active)
    return trace


@pytest.mark.paper("2502.06833")
def test_a_scripted_trace() -> None:
    """Window 2, minimum stay 3, threshold 2: who answers after each entropy, by hand.

    entropy  3    3    3    0    0    0    5    5    5    0
    mean     3    3    3    1.5  0    0    2.5  5    5    2.5
    stay     1    2    3    1    2    3    1    2    3    1
    next     S    S    L    L    L    S    S    S    L    L
    """
    rule = EntropyRule(2.0, 2.0, window=2, min_stay=3)
    assert actives(rule, [3, 3, 3, 0, 0, 0, 5, 5, 5, 0]) == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1]


def test_the_mean_of_a_young_text_is_of_what_there_is() -> None:
    assert actives(EntropyRule(2.0, 2.0, window=4, min_stay=1), [2.1, 0.1, 3.9]) == [1, 0, 1]
    # At the threshold itself the small model answers.
    assert actives(EntropyRule(2.0, 2.0, window=4, min_stay=1), [2.0, 2.0]) == [0, 0]


def test_between_two_thresholds_nobody_moves() -> None:
    rule = EntropyRule(3.0, 1.0, window=1, min_stay=1)
    assert actives(rule, [2, 3.5, 2, 1.1, 1.0, 2, 3.0]) == [0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("size", [2, 5])
def test_entropies_are_in_bits(size: int) -> None:
    """A uniform distribution over n tokens has log2 n bits; one that is certain has 0."""
    even = TableModel(torch.tensor([*[1 / size] * size, 0.0]), [chr(97 + i) for i in range(size)])
    sure = TableModel(torch.tensor([1.0, *[0.0] * size]), [chr(97 + i) for i in range(size)])
    text = [[size, 0, 1]]
    for shift, first in ((-1e-5, True), (1e-5, False)):
        model = EntropySwitching(even, sure, threshold=math.log2(size) + shift, window=1, min_stay=1)
        assert model.predict(text).is_large[0].tolist() == [False, first, False]
    back = EntropySwitching(sure, even, threshold=0.0, window=1, min_stay=1)
    assert back.predict(text).is_large[0].tolist() == [False] * 3


@pytest.mark.paper("2502.06833")
@pytest.mark.parametrize("transform", [None, "greedy", "temperature(0.7) | top_p(0.9)"])
def test_the_ends_are_the_pure_models_token_for_token(transform: str | None) -> None:
    for pair in ((SMALLER, LARGER), (SMALL_HF, LARGE_HF)):
        for number, router in (
            (SMALL, EntropySwitching(*pair, threshold=math.inf)),
            (LARGE, EntropySwitching(*pair, threshold=-math.inf)),
            (LARGE, EntropySwitching(*pair, threshold=-1e-9)),
            (SMALL, RandomSwitching(*pair, share=0.0)),
            (LARGE, RandomSwitching(*pair, share=1.0, stay=3)),
        ):
            for seed in range(3):
                args = {"transform": transform, "max_tokens": 20, "seed": seed}
                expected, said = generate(pair[number], "a", **args), generate(router, "a", **args)  # type: ignore[call-overload]
                assert said.tokens == expected.tokens
                assert said.surprisals == pytest.approx(expected.surprisals, abs=1e-5)
            idle = router.spent.models[1 - number]
            assert (idle.passes, idle.read, idle.said) == (0, 0, 0)
            assert router.spent.large_share == number


def test_with_one_model_twice_the_threshold_does_not_matter() -> None:
    expected = generate(SMALLER, "ab", max_tokens=20, seed=4).tokens
    for threshold in (0.8, 1.3, 1.9):
        router = EntropySwitching(SMALLER, SMALLER, threshold=threshold, window=2, min_stay=1)
        assert generate(router, "ab", max_tokens=20, seed=4).tokens == expected


@pytest.mark.parametrize("number", [6, 7])
def test_after_a_switch_caches_equal_recomputation(number: int) -> None:
    router = ROUTERS[number]
    assert isinstance(router, Switching)
    drawn = torch.randint(0, 4, (2, 30), generator=torch.Generator().manual_seed(5)).tolist()
    texts = [[4, *row] for row in drawn]
    state, traces = router.start(2), [[], []]
    # The second row falls behind by a token now and then, so that the rows' gaps differ.
    fed = [[0, 0], *[[1, 1] if step % 4 else [1, 0] for step in range(24)]]
    fed[0] = [3, 1]
    for more in fed:
        before = state.lengths
        pieces = [texts[row][before[row] : before[row] + more[row]] for row in range(2)]
        width = max(map(len, pieces))
        said = router.extend(state, [[*piece, *[ABSENT] * (width - len(piece))] for piece in pieces])
        for row, piece in enumerate(pieces):
            for place in range(len(piece)):
                model = router.models[int(said.is_large[row, place])]
                traces[row].append(bool(said.is_large[row, place]))
                fresh = model.predict([texts[row][: before[row] + place + 1]])[0, -1].log_probs()
                torch.testing.assert_close(said[row, place].log_probs(), fresh, atol=2e-5, rtol=0)
    for row in range(2):
        assert router.predict([texts[row][: len(traces[row])]]).is_large[0].tolist() == traces[row]
        assert len(set(traces[row])) == 2


def test_reading_a_generated_text_finds_the_law_it_was_drawn_from() -> None:
    for router in (*ROUTERS[:4], ROUTERS[6]):
        made = generate(router, "abc", max_tokens=25, seed=11, ignore_eos=True)
        said = made.signature.table["logprob"].to_numpy()
        assert -said == pytest.approx(made.surprisals, abs=2e-5)


def test_a_text_is_the_same_alone_and_in_a_batch() -> None:
    for router in ROUTERS:
        together = generate(router, ["a", "ab", "c"], max_tokens=12, seed=7, n=2)
        alone = [generate(router, prompt, max_tokens=12, seed=7, n=2) for prompt in ("a", "ab", "c")]
        assert [made.tokens for made in together] == [made.tokens for pair in alone for made in pair]


@dataclass(frozen=True)
class Turn:
    active: int
    place: int = 0


class InTurn(SwitchRule):
    """Small, large, large; small, large, large; ..."""

    watches = False

    def begin(self) -> Turn:
        return Turn(SMALL)

    def at(self, before: Standing, token: int) -> Turn:
        assert isinstance(before, Turn)
        return Turn(SMALL if before.place % 3 == 0 else LARGE, before.place + 1)


def test_costs_by_hand() -> None:
    model = Switching(SMALLER, LARGER, rule=InTurn(), parameters=(10, 100))
    state = model.start()
    for token in (BOS, 0, 1, 2):
        model.extend(state, [[token]])
    # Small reads <bos>, and after the fourth token what it missed: 1 + 3. Large reads <bos> and the second, the third.
    assert model.spent.models == (Spent("smaller", 10, 2, 4, 2), Spent("larger", 100, 2, 3, 2))
    before = model.spent
    # The fifth and sixth are the large model's, which first reads the fourth; the small one stays behind.
    model.extend(state, [[3, 0]])
    cost = model.spent - before
    assert cost.models == (Spent("smaller", 10), Spent("larger", 100, 1, 3, 2))
    assert (cost.large_share, cost.activated, cost.answering) == (1.0, 150.0, 100.0)
    assert (model.spent.large_share, model.spent.answering) == (4 / 6, (20 + 400) / 6)
    # A text at once: either model reads all of it, in one pass.
    before = model.spent
    model.predict([[BOS, 0, 1, 2]])
    assert (model.spent - before).models == (Spent("smaller", 10, 1, 4, 2), Spent("larger", 100, 1, 4, 2))


def test_rewinding_and_forking_keep_both_in_step() -> None:
    model = Switching(SMALLER, LARGER, rule=InTurn())
    state = model.start()
    model.extend(state, [[BOS, 0, 1, 2, 3]])
    state.rewind(3)
    assert model.extend(state, [[1, 2]]).is_large[0].tolist() == [True, False]
    twin = state.fork([0, 0])
    assert model.extend(twin, [[0], [1]]).is_large[:, 0].tolist() == [True, True]
    assert model.extend(state, [[3]]).is_large[0].tolist() == [True]


def test_a_failing_model_leaves_the_state_as_it_was() -> None:
    class Fragile(TableModel):
        broken = True

        def _feed(self, state, tokens, parents):  # type: ignore[no-untyped-def]
            if self.broken:
                raise RuntimeError("out of memory")
            return super()._feed(state, tokens, parents)

    fragile = Fragile.random(4, order=2, seed=2, eos=True)
    model = Switching(LARGER, fragile, rule=InTurn())
    state = model.start()
    for parents in (None, [-1, 0, 0]):
        # The small model has read all three tokens before the large one fails.
        with pytest.raises(RuntimeError, match="memory"):
            model.extend(state, [[BOS, 1, 2]], parents)
        assert state.lengths == (0,)
    Fragile.broken = False
    expected = model.predict([[BOS, 3, 1, 0]])
    torch.testing.assert_close(model.extend(state, [[BOS, 3, 1, 0]]).log_probs(), expected.log_probs())
    assert model.extend(state, [[2]]).is_large[0].tolist() == [True]


def test_random_switching_takes_its_share() -> None:
    """Of 6,000 tokens the share is within 4.5 standard errors; false alarm 7e-6 per share and stay."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, 4, (10, 600), generator=generator)
    for share, stay in ((0.2, 1), (0.7, 1), (0.5, 5)):
        said = RandomSwitching(SMALLER, LARGER, share=share, stay=stay, seed=2).predict(texts).is_large
        error = math.sqrt(share * (1 - share) * stay / said.numel())
        assert abs(said.double().mean().item() - share) < 4.5 * error
        assert bool((said[:, ::stay].repeat_interleave(stay, 1) == said).all())
    again = RandomSwitching(SMALLER, LARGER, share=0.5, stay=5, seed=2).predict(texts).is_large
    other = RandomSwitching(SMALLER, LARGER, share=0.5, stay=5, seed=3).predict(texts).is_large
    assert bool((again == said).all()) and not bool((other == said).all())
    assert len({tuple(row) for row in said.tolist()}) == len(said)


def test_parameters_are_counted_where_a_token_meets_them() -> None:
    network = SMALL_HF.model
    every = sum(weight.numel() for weight in network.parameters())
    assert activated_parameters(SMALL_HF) == every - network.get_input_embeddings().weight.numel()
    assert activated_parameters(SMALLER) is None
    with pytest.raises(ValueError, match="parameters of smaller are not known"):
        router = RandomSwitching(SMALLER, LARGER, share=0.5)
        router.predict([[BOS]])
        _ = router.spent.activated
    with pytest.raises(ValueError, match="no distribution"):
        _ = RandomSwitching(SMALLER, LARGER, share=0.5, parameters=(1, 2)).spent.activated


def test_digests_tell_settings_apart() -> None:
    more = [EntropySwitching(SMALLER, LARGER, threshold=1.4, window=3, min_stay=5)]
    assert len({model.digest for model in (*ROUTERS, *more)}) == len(ROUTERS) + 1
    router = RandomSwitching(SMALLER, LARGER, share=0.5)
    state = RandomSwitching(SMALLER, LARGER, share=0.4).start()
    with pytest.raises(ValueError, match="another model"):
        router.extend(state, [[BOS]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropySwitching(SMALLER, TableModel.random(3), threshold=1.0), "vocabularies"),
        (lambda: EntropySwitching(SMALLER, LARGER, threshold=math.nan), "threshold"),
        (lambda: EntropySwitching(SMALLER, LARGER, threshold=1.0, lower=1.1), "lower"),
        (lambda: EntropySwitching(SMALLER, LARGER, threshold=1.0, window=0), "window"),
        (lambda: EntropySwitching(SMALLER, LARGER, threshold=1.0, min_stay=-1), "min_stay"),
        (lambda: RandomSwitching(SMALLER, LARGER, share=1.1), "share"),
        (lambda: RandomSwitching(SMALLER, LARGER, share=0.5, stay=0), "stay"),
        (lambda: RandomSwitching(SMALLER, LARGER, share=0.5, parameters=(0, 1)), "parameters"),
    ],
)
def test_misuse_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_the_standing_is_what_the_rule_says() -> None:
    rule = EntropyRule(1.0, 1.0, window=2, min_stay=1)
    assert rule.after(rule.begin(), 1.5) == Uncertainty(LARGE, 0, (1.5,))
    assert rule.after(Uncertainty(LARGE, 0, (1.5, 1.5)), 1.0) == Uncertainty(LARGE, 1, (1.5, 1.0))

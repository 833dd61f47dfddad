"""Adaptive samples: the law of their number, limits, pruning, what is spent; with an exact predictor and a network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nextoken.decode.generate import derived_seed, generate
from nextoken.decode.generation import Generation
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.values.adaptive_samples import adaptive_samples, annealed, constant, pruned_samples
from nextoken.values.restart import Question, RestartPredictor, TableRestart

TABLE = TableModel.random(["a", "b", "c"], order=2, eos=True, seed=2)
BOS, MOST = 3, 4


def score(tokens: tuple[int, ...]) -> float:
    return float(sum(token == 1 for token in tokens))


EXACT = TableRestart(TABLE, score, max_tokens=MOST)
LAW = TABLE.enumerate(MOST)


def small_hf() -> HFModel:
    words = {"a": 0, "b": 1, "c": 2, "<bos>": BOS, "<eos>": 4, "?": 5, "Yes": 6, "No": 7}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<bos>")), bos_token="<bos>", eos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.5,
        bos_token_id=BOS,
        eos_token_id=4,
    )
    torch.manual_seed(0)
    return HFModel(transformers.LlamaForCausalLM(config), tokenizer, name="small")


QUESTION = Question((5, 0, 5), restart=(6,), stay=(7,))


def drawn(model: TableModel | HFModel, n: int, seed: int) -> list[Generation]:
    made = generate(model, [""], n=n, seed=seed, max_tokens=MOST)
    assert isinstance(made, list)
    return made


@pytest.mark.paper("2410.02725")
def test_the_number_of_samples_is_geometric() -> None:
    """Means and shares of 200 prompts within 4 standard errors (false alarm 6e-5 each), at two thresholds."""
    most, n = 5, 200
    for threshold in (0.7, 0.9):
        s = math.fsum(p for text, p in LAW.items() if EXACT.probability((BOS,), text) >= threshold)
        assert 0.05 < s < 0.6
        counts = np.array(
            [
                len(
                    adaptive_samples(
                        TABLE,
                        "",
                        EXACT,
                        threshold=threshold,
                        most=most,
                        temperatures=constant(),
                        max_tokens=MOST,
                        seed=i,
                    ).generations
                )
                for i in range(n)
            ]
        )
        law = np.array([s * (1 - s) ** (k - 1) for k in range(1, most)] + [(1 - s) ** (most - 1)])
        mean = (1 - (1 - s) ** most) / s
        deviation = math.sqrt(float(np.dot(law, (np.arange(1, most + 1) - mean) ** 2)) / n)
        assert abs(counts.mean() - mean) < 4 * deviation
        for k in range(1, most + 1):
            assert abs((counts == k).mean() - law[k - 1]) < 4 * math.sqrt(law[k - 1] * (1 - law[k - 1]) / n)


@pytest.mark.paper("2410.02725")
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0, 1))
@settings(max_examples=30)
def test_samples_stop_at_the_first_good_one(seed: int, most: int, threshold: float) -> None:
    made = adaptive_samples(
        TABLE, "", EXACT, threshold=threshold, most=most, temperatures=constant(), max_tokens=MOST, seed=seed
    )
    assert 1 <= len(made.generations) <= most
    assert all(r < threshold for r in made.probabilities[:-1])
    assert len(made.generations) == most or made.probabilities[-1] >= threshold
    assert made.probabilities[made.chosen] == max(made.probabilities)
    assert made.tokens == sum(len(one.tokens) for one in made.generations)
    plain = drawn(TABLE, most, seed)
    assert [one.tokens for one in made.generations] == [one.tokens for one in plain[: len(made.generations)]]


@pytest.mark.paper("2410.02725")
def test_limits_of_the_threshold() -> None:
    for threshold, count in ((0.0, 1), (-1.0, 1), (1.0 + 1e-9, 7), (math.inf, 7)):
        made = adaptive_samples(TABLE, "", EXACT, threshold=threshold, most=7, max_tokens=MOST)
        assert len(made.generations) == count
    first = EXACT.probability((BOS,), drawn(TABLE, 1, 0)[0].tokens)
    reached = adaptive_samples(TABLE, "", EXACT, threshold=first, temperatures=constant(), max_tokens=MOST, seed=0)
    assert len(reached.generations) == 1


@pytest.mark.paper("2410.02725")
def test_temperatures_rise_from_greedy() -> None:
    assert [annealed(k) for k in (1, 2, 3, 4)] == [0.0, 0.5, 0.75, 0.875]
    made = adaptive_samples(TABLE, "", EXACT, threshold=2.0, most=3, max_tokens=MOST, seed=3)
    assert made.generations[0].tokens == generate(TABLE, "", transform="greedy", max_tokens=MOST).tokens
    for k in (2, 3):
        alone = generate(
            TABLE, "", transform=f"temperature({annealed(k)})", max_tokens=MOST, seed=derived_seed(3, k - 1)
        )
        assert made.generations[k - 1].tokens == alone.tokens
    capped = adaptive_samples(TABLE, "", EXACT, threshold=2.0, most=3, transform="top_k(1)", max_tokens=MOST, seed=3)
    assert len({one.tokens for one in capped.generations}) == 1


@pytest.mark.paper("2410.02725")
def test_with_the_exact_r_the_best_sample_is_taken() -> None:
    for seed in range(20):
        made = pruned_samples(TABLE, "", EXACT, n=6, share=0.0, max_tokens=MOST, seed=seed)
        assert score(made.best.tokens) == max(score(one.tokens) for one in made.generations)


@pytest.mark.paper("2410.02725")
def test_pruning_nothing_or_at_the_end_is_best_of_n() -> None:
    for seed in range(10):
        plain = drawn(TABLE, 8, seed)
        none = pruned_samples(TABLE, "", EXACT, n=8, at=2, share=0.0, max_tokens=MOST, seed=seed)
        late = pruned_samples(TABLE, "", EXACT, n=8, at=MOST, share=0.75, max_tokens=MOST, seed=seed)
        assert [one.tokens for one in none.generations] == [one.tokens for one in plain]
        assert (none.given_up, late.given_up, len(late.generations)) == (0, 6, 2)
        assert late.best.tokens == none.best.tokens
        assert late.tokens == none.tokens == sum(len(one.tokens) for one in plain)


@pytest.mark.paper("2410.02725")
def test_what_is_given_up_has_begun_worst_and_is_not_paid_on() -> None:
    for seed in range(10):
        plain = drawn(TABLE, 8, seed)
        made = pruned_samples(TABLE, "", EXACT, n=8, at=2, share=0.5, max_tokens=MOST, seed=seed)
        midway = EXACT.probabilities((BOS,), [one.tokens[:2] for one in plain]).tolist()
        order = sorted(range(8), key=lambda i: -midway[i])[:4]
        assert [one.tokens for one in made.generations] == [plain[i].tokens for i in sorted(order)]
        spent = sum(len(one.tokens[: None if i in order else 2]) for i, one in enumerate(plain))
        assert made.tokens == spent


def test_pruning_gains_over_as_many_whole_samples() -> None:
    """Best of 8 with 6 given up after 2 tokens against best of 2; 150 prompts, seeds fixed."""
    pruned = [pruned_samples(TABLE, "", EXACT, n=8, at=2, share=0.75, max_tokens=MOST, seed=s) for s in range(150)]
    two = [pruned_samples(TABLE, "", EXACT, n=2, share=0.0, max_tokens=MOST, seed=s) for s in range(150)]
    gain = np.array([score(a.best.tokens) - score(b.best.tokens) for a, b in zip(pruned, two, strict=True)])
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))


@pytest.mark.paper("2410.02725")
def test_a_networks_own_memory_is_asked_and_gone_on_from() -> None:
    """The same samples and r whether its memory is branched or all is read anew; only the cost differs."""
    model = small_hf()
    own = RestartPredictor(model, QUESTION)
    apart = RestartPredictor(HFModel(model.model, model.tokenizer, name="the same"), QUESTION)
    first = pruned_samples(model, "", own, n=6, at=2, share=0.5, max_tokens=6, seed=1)
    second = pruned_samples(model, "", apart, n=6, at=2, share=0.5, max_tokens=6, seed=1)
    assert [a.tokens for a in first.generations] == [b.tokens for b in second.generations]
    assert first.probabilities == pytest.approx(second.probabilities, abs=1e-5)
    assert first.evaluation_tokens == (6 + 3) * 3 < second.evaluation_tokens
    plain = generate(model, [""], n=6, seed=1, max_tokens=6)
    assert isinstance(plain, list)
    assert {one.tokens for one in first.generations} <= {one.tokens for one in plain}
    for one, r in zip(first.generations, first.probabilities, strict=True):
        assert r == pytest.approx(apart.probability((BOS,), one.tokens), abs=1e-5)
    adaptive = adaptive_samples(model, "", own, threshold=2.0, most=3, temperatures=constant(), max_tokens=6, seed=1)
    assert [one.tokens for one in adaptive.generations] == [one.tokens for one in plain[:3]]
    assert adaptive.evaluation_tokens == 3 * 3


def test_stops_and_the_context_are_minded() -> None:
    model = small_hf()
    own = RestartPredictor(model, QUESTION)
    made = adaptive_samples(TABLE, "", EXACT, threshold=2.0, most=4, temperatures=constant(), max_tokens=MOST, stop="c")
    assert all("c" not in one.text for one in made.generations)
    with pytest.raises(ValueError, match="lower max_tokens"):
        pruned_samples(model, "", own, n=40, share=0.0, max_tokens=15, seed=0)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="most"):
        adaptive_samples(TABLE, "", EXACT, most=0)
    with pytest.raises(ValueError, match="threshold"):
        adaptive_samples(TABLE, "", EXACT, threshold=math.nan)
    for wrong in ({"n": 0}, {"at": 0}, {"share": 1.0}):
        with pytest.raises(ValueError, match="share"):
            pruned_samples(TABLE, "", EXACT, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="different vocabularies"):
        adaptive_samples(TableModel.random(5, seed=0), "", EXACT)

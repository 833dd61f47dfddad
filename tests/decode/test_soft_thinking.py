"""Thinking in mixtures: exact where models are linear, decoding in tokens at its limits, laws of the drawn, endings."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from hidden_markov import HiddenMarkov
from nextoken.decode.generate import generate
from nextoken.decode.mixtures import DirichletMixture, NoisySoft, SoftThinking, TokenMixture
from nextoken.decode.noise import DirichletNoise, GumbelNoise, dirichlet_log_density, log_dirichlet, log_gaussian
from nextoken.decode.request import Request
from nextoken.decode.soft_thinking import marker_of, think
from nextoken.decode.thinking import ColdStop, Thinker, Thinking
from nextoken.decode.thought import Thought
from nextoken.errors import ModelError
from nextoken.model.hf import HFModel
from nextoken.model.loading import load
from nextoken.model.soft import Mixtures, SoftModel
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab

V = 80
_DENSE = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3, "intermediate_size": 48,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**_DENSE),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_DENSE, num_key_value_heads=2, head_dim=8, sliding_window=6),
    "qwen3": lambda: transformers.Qwen3Config(**_DENSE, num_key_value_heads=2, head_dim=8),
}
WHOLE: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "max_topk": None}
"""Soft Thinking without truncation."""


def live(family: str, dtype: torch.dtype = torch.float32) -> HFModel:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, V)}}
    backend = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(3)
    network = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval().to(dtype)
    return HFModel(network, tokenizer, name=family)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HFModel:
    return live(request.param)


@pytest.fixture(scope="module")
def llama() -> HFModel:
    return live("llama")


def thought(model: SoftModel | str, prompt: str, thinking: Thinking, **settings: Any) -> Thought:
    made = think(model, prompt, thinking, **{"seed": 0, **settings})
    assert isinstance(made, Thought)
    return made


def thinkers(count: int, begin: int = 0) -> list[Thinker]:
    return [Thinker(i, Request((0,), seed=begin + i)) for i in range(count)]


def after(made: Thought) -> Tensor:
    """p(. | prompt, thought, closing) [V], read anew."""
    assert made.answer is not None
    return made.answer.model.predict([made.answer.request.prompt]).log_probs()[0, -1].exp()


# Exact where the model is linear in what it is fed.


@pytest.mark.paper("2505.15778")
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("thinking", [SoftThinking(**WHOLE, cold_stop=None), NoisySoft(1.0, 0.0)])
def test_thinking_is_the_sum_over_all_paths_of_a_hidden_markov_model(steps: int, thinking: Thinking) -> None:
    model = HiddenMarkov.random(seed=3)
    made = thought(model, "ab", thinking, end_of_thinking=None, max_thinking_tokens=steps, max_tokens=2)
    prompt = (model.vocab.bos_id, 0, 1)
    expected = torch.zeros(6, dtype=torch.float64)
    for path in itertools.product(range(5), repeat=steps):
        log_p = model.predict([[*prompt, *path]]).log_probs()[0]
        weight = sum(log_p[2 + i, token] for i, token in enumerate(path))
        expected += math.exp(weight) * log_p[-1].exp()
    torch.testing.assert_close(after(made), expected)
    assert made.answer is not None
    assert made.answer.surprisals[0] == pytest.approx(-expected[made.answer.tokens[0]].log().item())
    assert made.ended == "length" and len(made.tokens) == len(made.vectors) == steps


@pytest.mark.paper("2505.23648")
@pytest.mark.parametrize("k", [1, 4])
def test_averages_of_k_tokens_are_unbiased_with_a_kth_of_the_covariance(k: int) -> None:
    """Two steps of a Markov chain; each of 10 statistics within 4.5 standard errors: false alarms below 1e-4."""
    model, runs = HiddenMarkov.random(3, 4, seed=1), 4000
    policy, rows = TokenMixture(k), thinkers(runs)
    state = model.start(1)
    p = model.extend(state, [[model.vocab.bos_id, 2]]).log_probs()[:, -1]
    alone = model.extend(state.fork([0] * 4), torch.arange(4)[:, None]).log_probs()[:, 0].exp()
    shares = p[0, :4].exp()
    exact = shares @ alone
    covariance = (shares[:, None] * (alone - exact)).T @ (alone - exact) / k
    rows_state = state.fork([0] * runs)
    step = policy.step(p.expand(runs, -1), rows, model, 1.0)
    first = model.extend_soft(rows_state, step.mixtures).log_probs()[:, 0].exp()
    error = (covariance.diagonal() / runs).sqrt()
    assert bool(((first.mean(0) - exact).abs() <= 4.5 * error + 1e-12).all())
    total = (first - exact).square().sum(-1)
    assert abs(float(total.mean() - covariance.trace())) <= 4.5 * float(total.std()) / runs**0.5
    step = policy.step(first.log(), rows, model, 1.0)
    second = model.extend_soft(rows_state, step.mixtures).log_probs()[:, 0].exp()
    once_more = SoftThinking(**WHOLE)
    soft = state.fork([0])
    for _ in range(2):
        p = model.extend_soft(soft, once_more.step(p, thinkers(1), model, 1.0).mixtures).log_probs()[:, 0]
    assert bool(((second.mean(0) - p[0].exp()).abs() <= 4.5 * second.std(0) / runs**0.5 + 1e-12).all())


# Limits that are decoding in tokens.


@pytest.mark.paper("2505.15778")
@pytest.mark.paper("2509.19170")
@pytest.mark.parametrize(
    "thinking",
    [
        SoftThinking(max_topk=1, cold_stop=None),
        SoftThinking(temperature=0.0, cold_stop=None),
        SoftThinking(top_k=1, noise=GumbelNoise(), cold_stop=None),
        NoisySoft(temperature=0.0, sigma_rel=0.0),
        TokenMixture(3, "greedy"),
        TokenMixture(1, "top_k(1)"),
    ],
)
def test_at_these_limits_it_is_greedy_decoding(model: HFModel, thinking: Thinking) -> None:
    greedy = generate(model, "w5", transform="greedy", max_tokens=16, seed=0)
    marker = greedy.tokens[9]
    first = greedy.tokens.index(marker)
    made = thought(
        model, "w5", thinking, end_of_thinking=marker, max_thinking_tokens=20, transform="greedy", max_tokens=15 - first
    )
    assert made.answer is not None and made.ended == "marker" and made.closing == (marker,)
    assert made.tokens == greedy.tokens[: first + 1] and made.answer.tokens == greedy.tokens[first + 1 :]
    expected = model.embeddings(torch.tensor(made.tokens[:-1], dtype=torch.long))
    assert torch.equal(made.vectors, expected.reshape(made.vectors.shape))
    assert made.shares.tolist() == pytest.approx([1.0] * (first + 1))


def test_fuzzy_thinking_without_noise_comes_near_greedy_decoding(model: HFModel) -> None:
    made = thought(model, "w5", NoisySoft(1e-4, 0.0), end_of_thinking=None, max_thinking_tokens=10)
    assert made.tokens == generate(model, "w5", transform="greedy", max_tokens=10, seed=0).tokens
    torch.testing.assert_close(made.vectors, model.embeddings(torch.tensor(made.tokens)), atol=1e-4, rtol=0)


@pytest.mark.paper("2505.23648")
@pytest.mark.parametrize("rule", [None, "temperature(0.7) | top_p(0.9)", "repetition_penalty(1.3)", "xtc(0.5, 0.05)"])
def test_one_token_is_ordinary_sampling_from_the_same_numbers(model: HFModel, rule: str | None) -> None:
    for seed in range(4):
        plain = generate(model, "w5 w7", transform=rule, max_tokens=14, seed=seed)
        cut = max(1, len(plain.tokens) // 2)
        made = thought(
            model, "w5 w7", TokenMixture(1, rule), end_of_thinking=None, max_thinking_tokens=cut,
            transform=rule, max_tokens=14 - cut, seed=seed,
        )  # fmt: skip
        assert made.tokens == plain.tokens[: len(made.tokens)]
        assert made.log_probs is not None
        assert (-made.log_probs).tolist() == pytest.approx(plain.surprisals[: len(made.tokens)], abs=1e-4)
        if made.ended == "eos":
            assert made.answer is None
        elif rule != "repetition_penalty(1.3)":  # which does not count the prompt, as the answer's thought is
            assert made.answer is not None and made.answer.tokens == plain.tokens[cut:]


@pytest.mark.paper("2509.19170")
def test_without_noise_and_at_temperature_one_it_is_soft_thinking_untruncated(model: HFModel) -> None:
    ones = [
        thought(model, "w5", thinking, end_of_thinking=None, max_thinking_tokens=8)
        for thinking in (NoisySoft(1.0, 0.0), SoftThinking(**WHOLE), SoftThinking(**{**WHOLE, "max_topk": V}))
    ]
    for one in ones[1:]:
        assert one.tokens == ones[0].tokens
        torch.testing.assert_close(one.vectors, ones[0].vectors, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.entropies, ones[0].entropies, atol=1e-4, rtol=0)


# What is fed, and where.


@pytest.mark.paper("2505.15778")
@pytest.mark.parametrize("thinking", [SoftThinking(), NoisySoft(), TokenMixture(4), DirichletMixture()])
def test_the_answer_follows_the_vectors_in_the_plain_pass(model: HFModel, thinking: Thinking) -> None:
    made = think(
        model, ["w5", "w7 w9"], thinking, end_of_thinking="w3", answer_prefix="w11", max_thinking_tokens=9,
        max_tokens=3, seed=4, transform="greedy", ignore_eos=True,
    )  # fmt: skip
    assert isinstance(made, list)
    embed = model.model.get_input_embeddings()
    for one in made:
        assert one.answer is not None and one.closing == (3, 11)
        rows = [embed(torch.tensor(one.prompt)), one.vectors, embed(torch.tensor([3, 11, *one.answer.tokens]))]
        with torch.no_grad():
            logits = model.model(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits[0]
        assert logits[-4:-1].argmax(-1).tolist() == list(one.answer.tokens)
        expected = torch.log_softmax(logits, -1)[-4:-1].gather(-1, torch.tensor(one.answer.tokens)[:, None])[:, 0]
        signature = one.answer.signature
        np.testing.assert_allclose(signature.table["logprob"].to_numpy(), expected.detach().numpy(), atol=2e-4)
        # The step's own distributions, from the vectors before it.
        p = logits[len(one.prompt) - 1 : len(one.prompt) - 1 + len(one.tokens)].detach()
        if isinstance(thinking, SoftThinking):
            assert p.argmax(-1).tolist()[: len(one.vectors)] == list(one.tokens[: len(one.vectors)])
            q = (p / thinking.temperature).softmax(-1)
            torch.testing.assert_close(one.entropies.float(), torch.special.entr(q).sum(-1), atol=1e-3, rtol=0)
        if isinstance(thinking, NoisySoft):
            mean = (p[: len(one.vectors)] / 0.5).softmax(-1) @ embed(torch.arange(V))
            sigma = 0.33 * float(embed(torch.arange(V)).detach().square().mean().sqrt())
            law = torch.distributions.Normal(mean.double(), sigma)
            assert one.log_probs is not None
            density = law.log_prob(one.vectors.double()).sum(-1)
            torch.testing.assert_close(one.log_probs[: len(density)], density, atol=2e-2, rtol=0)


def test_what_is_fed_on_unsure_steps_is_no_token(llama: HFModel) -> None:
    table = llama.embeddings(torch.arange(V)).detach()
    for thinking in (SoftThinking(), TokenMixture(5), NoisySoft(), DirichletMixture()):
        made = thought(llama, "w5", thinking, end_of_thinking=None, max_thinking_tokens=6)
        unsure = made.entropies[: len(made.vectors)] > 0.5
        assert bool(unsure.any())
        nearest = torch.cdist(made.vectors[unsure], table).amin(-1)
        assert float(nearest.min()) > 1e-3


def test_the_answer_remembers_the_thought_not_the_tokens_noted(llama: HFModel) -> None:
    made = thought(llama, "w5", SoftThinking(), end_of_thinking=None, max_thinking_tokens=6, max_tokens=4)
    assert made.answer is not None
    hard = llama.predict([[*made.answer.request.prompt]]).log_probs()[0, -1].exp()
    assert float((after(made) - hard).abs().sum()) > 1e-2
    assert made.answer.surprisals[0] == pytest.approx(-float(after(made)[made.answer.tokens[0]].log()), abs=1e-4)
    np.testing.assert_allclose(
        made.answer.signature.table["logprob"].to_numpy(), made.answer.drawn.table["logprob"].to_numpy(), atol=1e-4
    )


def test_rows_are_the_same_in_any_company() -> None:
    # In float64: what a batch changes by rounding is not forgotten from step to step, as it is where tokens are drawn.
    llama = live("llama", torch.float64)
    prompts = ["w5", "w7 w9 w11", "w5 w5"]
    for thinking in (SoftThinking(noise=GumbelNoise()), SoftThinking(), NoisySoft(), TokenMixture(3)):
        arguments: dict[str, Any] = {"end_of_thinking": "w3", "max_thinking_tokens": 8, "max_tokens": 5, "seed": 5}
        together = think(llama, prompts, thinking, n=3, **arguments)
        few = think(llama, prompts, thinking, n=3, max_rows=2, **arguments)
        alone = [one for prompt in prompts for one in think(llama, [prompt], thinking, n=3, **arguments)]  # type: ignore[union-attr]
        assert isinstance(together, list) and isinstance(few, list) and len(together) == 9
        for made in (few, alone):
            for ours, theirs in zip(together, made, strict=True):
                assert (ours.tokens, ours.ended) == (theirs.tokens, theirs.ended)
                torch.testing.assert_close(ours.vectors, theirs.vectors, atol=1e-8, rtol=0)
                assert (ours.answer is None) == (theirs.answer is None)
                assert ours.answer is None or ours.answer.tokens == theirs.answer.tokens  # type: ignore[union-attr]
        different = {tuple(one.vectors.flatten().tolist()) for one in together[:3]}
        assert len(different) == (3 if thinking.is_random else 1)
        assert len({one.answer.tokens for one in together[:3] if one.answer}) > 1


# Soft Thinking's steps.


def reference(logits: np.ndarray, t: float, k: int, p: float, m: float, n: int) -> tuple[list[int], np.ndarray, float]:
    """Ids, weights and entropy by the steps of the paper and its code, in plain loops."""
    q = np.exp((logits - logits.max()) / t)
    q /= q.sum()
    entropy = -sum(x * math.log(max(x, 1e-12)) for x in q)
    order = sorted(range(len(q)), key=lambda i: (-q[i], i))[:k]
    shares = np.array([q[i] for i in order])
    shares /= shares.sum()
    mass, kept = 0.0, 0
    while kept < len(order) and mass < p:
        mass += shares[kept]
        kept += 1
    order, shares = order[:kept], shares[:kept] / shares[:kept].sum()
    keep = [i for i, share in enumerate(shares) if share >= m * shares.max()]
    order, shares = [order[i] for i in keep], shares[keep] / shares[keep].sum()
    return order[:n], shares[:n] / shares[:n].sum(), entropy


@pytest.mark.paper("2505.15778")
@given(
    st.integers(0, 10**6), st.floats(0.2, 2), st.integers(1, 12), st.floats(0.05, 0.99), st.floats(0, 0.5),
    st.integers(1, 12),
)  # fmt: skip
def test_a_step_is_the_one_of_the_paper(seed: int, t: float, k: int, p: float, m: float, n: int) -> None:
    model = HiddenMarkov.random(3, 11)
    logits = 3 * torch.randn(2, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = SoftThinking(t, k, p, m, n).step(logits, thinkers(2), model, 1.0)
    assert step.mixtures.ids is not None
    for row in range(2):
        ids, weights, entropy = reference(logits[row].numpy(), t, k, p, m, n)
        given_ids, given_weights = step.mixtures.ids[row, 0], step.mixtures.weights[row, 0]
        used = given_weights > 0
        assert given_ids[used].tolist() == ids
        np.testing.assert_allclose(given_weights[used].numpy(), weights, atol=1e-9)
        assert float(step.entropies[row]) == pytest.approx(entropy)
        assert int(step.tokens[row]) == ids[0] == int(logits[row].argmax())


@given(st.integers(0, 10**6), st.sampled_from(["soft", "gumbel", "dirichlet", "noisy", "tokens", "weights"]))
def test_weights_are_distributions_and_the_token_noted_is_the_heaviest(seed: int, kind: str) -> None:
    policy = {
        "soft": SoftThinking(max_topk=4),
        "gumbel": SoftThinking(max_topk=5, noise=GumbelNoise()),
        "dirichlet": SoftThinking(max_topk=5, noise=DirichletNoise(0.3)),
        "noisy": NoisySoft(),
        "tokens": TokenMixture(4),
        "weights": DirichletMixture(0.1),
    }[kind]
    model = HiddenMarkov.random(3, 11)
    logits = 4 * torch.randn(3, 12, generator=torch.Generator().manual_seed(seed))
    logits[:, 5] = -torch.inf
    step = policy.step(logits, thinkers(3, seed), model, 1.0)
    plain = Mixtures(step.mixtures.ids, step.mixtures.weights)
    whole = model.embed(plain)[:, 0]  # embeddings are one-hot: the weight of each token
    torch.testing.assert_close(whole.sum(-1), torch.ones(3, dtype=whole.dtype))
    assert bool((whole >= 0).all()) and bool((whole[:, 5] == 0).all())
    heaviest = whole.gather(-1, step.tokens[:, None])[:, 0]
    torch.testing.assert_close(heaviest, whole.amax(-1))
    if isinstance(policy, SoftThinking):
        assert bool(((whole > 0).sum(-1) <= (policy.max_topk or 12)).all())
        assert bool((step.mixtures.weights[:, 0].diff(dim=-1) <= 0).all())
    assert bool((step.entropies >= 0).all()) and bool((step.entropies <= math.log(12) + 1e-6).all())


# What ends a thought.


def scripted() -> HiddenMarkov:
    """a -> b -> c -> d surely, then a or e evenly, e like a; from e on as from a."""
    return HiddenMarkov.chain([[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0.6, 0, 0, 0, 0.4], [0, 1, 0, 0, 0]])


@pytest.mark.paper("2505.15778")
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_cold_stop_fires_at_the_nth_low_step_in_a_row_and_a_high_one_resets(length: int) -> None:
    """Entropies after "a": 0, 0, 0, 0.67, 0, 0, 0, 0.67, ..."""
    soft = SoftThinking(**WHOLE, cold_stop=ColdStop(0.1, length))
    made = thought(scripted(), "a", soft, end_of_thinking="e", max_thinking_tokens=30, max_tokens=1)
    entropies = [0, 0, 0, -0.6 * math.log(0.6) - 0.4 * math.log(0.4)]
    if length <= 3:
        assert made.ended == "cold stop" and len(made.tokens) == length and len(made.vectors) == length - 1
        assert made.tokens == (*(1, 2, 3)[: length - 1], 4)
        assert made.ids[-1, 0] == 4 and made.weights[-1, 0] == 1
        assert made.entropies.tolist() == pytest.approx(entropies[:length], abs=1e-6)
    else:
        assert made.ended == "length" and len(made.tokens) == len(made.vectors) == 30
        assert made.tokens[:6] == (1, 2, 3, 0, 1, 2)
    assert made.closing == (4,) and made.answer is not None
    expected = scripted().predict([[5, 0, 4]]).log_probs()[0, -1].exp()
    torch.testing.assert_close(after(made), expected, atol=1e-6, rtol=0)


def test_the_marker_is_fed_as_a_token_and_a_mixture_that_holds_it_is_not_the_end() -> None:
    soft = SoftThinking(**WHOLE, cold_stop=None)
    made = thought(scripted(), "c", soft, end_of_thinking="a", max_thinking_tokens=9, max_tokens=1)
    assert made.ended == "marker" and made.tokens == (3, 0) and made.closing == (0,)
    assert made.weights[-1].tolist() == [1.0] + [0.0] * (made.weights.shape[1] - 1)
    assert made.shares.tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(after(made), scripted().predict([[5, 3, 0]]).log_probs()[0, -1].exp())
    made = thought(scripted(), "c", soft, end_of_thinking="e", max_thinking_tokens=4, max_tokens=1)
    assert made.ended == "length" and made.tokens == (3, 0, 1, 2)
    assert made.shares.tolist() == pytest.approx([1, 0.6, 1, 1])


def test_an_end_token_ends_the_whole() -> None:
    model = HiddenMarkov.chain([[0, 1, 0], [0, 0, 1], [0, 0, 1]], eos=True)
    made = thought(model, "a", SoftThinking(cold_stop=None), end_of_thinking=None, max_tokens=3)
    assert made.ended == "eos" and made.tokens == (1, 2) and made.answer is None and made.closing == ()
    several = think(model, ["a", "b"], SoftThinking(cold_stop=None), end_of_thinking=None, n=2)
    assert isinstance(several, list) and [one.tokens for one in several] == [(1, 2), (1, 2), (2,), (2,)]


def test_a_thought_of_no_steps_is_the_marker_alone(llama: HFModel) -> None:
    made = thought(llama, "w5", SoftThinking(), end_of_thinking="w3", max_thinking_tokens=0, max_tokens=6, seed=2)
    assert made.tokens == () and made.ended == "length" and made.closing == (3,)
    expected = llama.predict([[0, 5, 3]]).log_probs()[0, -1].exp()
    torch.testing.assert_close(after(made), expected, atol=1e-5, rtol=0)


def test_markers_are_found_by_name_by_spelling_and_by_id() -> None:
    vocab = Vocab([b"<", b">", b"x", b""], labels={3: "</think>"})
    assert marker_of(vocab, "</think>") == 3
    assert marker_of(vocab, "x>") == 1  # of several the last
    assert marker_of(vocab, 2) == 2
    for marker in ("y", "", 4, -1):
        with pytest.raises(ValueError, match="end of thinking"):
            marker_of(vocab, marker)
    assert load("nano").vocab.specials


# Laws of what is drawn.


@pytest.mark.paper("2505.23648")
def test_k_tokens_follow_their_law_and_tell_its_log_probability() -> None:
    """Ordered pairs against their products, chi-square at a false-alarm rate of 1e-4."""
    model, runs = HiddenMarkov.random(3, 3), 6000
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    step = TokenMixture(2).step(p.log().expand(runs, -1), thinkers(runs), model, 1.0)
    assert step.mixtures.ids is not None and step.log_probs is not None
    pairs = step.mixtures.ids[:, 0]
    torch.testing.assert_close(step.log_probs, p[pairs].log().sum(-1))
    counts = Counter(map(tuple, pairs.tolist()))
    law = {(i, j): float(p[i] * p[j]) for i in range(4) for j in range(4)}
    assert chisquare([counts[pair] for pair in law], [runs * share for share in law.values()]).pvalue > 1e-4
    expected = torch.where(p[pairs[:, 0]] >= p[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    assert torch.equal(step.tokens, expected)


def test_the_token_noted_is_the_most_frequent() -> None:
    model = HiddenMarkov.random(3, 3)
    step = TokenMixture(5).step(torch.zeros(200, 4), thinkers(200), model, 1.0)
    assert step.mixtures.ids is not None
    for drawn, noted in zip(step.mixtures.ids[:, 0].tolist(), step.tokens.tolist(), strict=True):
        assert drawn.count(noted) == max(map(drawn.count, drawn))


@pytest.mark.paper("2505.23648")
@pytest.mark.parametrize("gamma", [0.5, 8.0])
def test_dirichlet_weights_have_their_mean_and_variance(gamma: float) -> None:
    """Within 4.5 standard errors each, 6 statistics: false alarms below 1e-4."""
    model, runs = HiddenMarkov.random(3, 3), 8000
    p = torch.tensor([0.6, 0.3, 0.0995, 0.0005], dtype=torch.float64)
    step = DirichletMixture(gamma).step(p.log().expand(runs, -1), thinkers(runs), model, 1.0)
    w, a = step.mixtures.weights[:, 0], p[:3] / p[:3].sum()
    assert bool((w[:, 3] == 0).all())
    assert bool(((w[:, :3].mean(0) - a).abs() <= 4.5 * w[:, :3].std(0) / runs**0.5).all())
    squares = (w[:, :3] - a).square()
    variance = a * (1 - a) / (gamma + 1)
    assert bool(((squares.mean(0) - variance).abs() <= 4.5 * squares.std(0) / runs**0.5).all())


@given(st.lists(st.floats(0.05, 5), min_size=2, max_size=5), st.integers(0, 1000))
def test_densities_are_those_of_torch(concentrations: list[float], seed: int) -> None:
    c = torch.tensor([*concentrations, 0.0], dtype=torch.float64)[None]
    log_w = log_dirichlet(c, [torch.Generator().manual_seed(seed)])
    assert log_w[0, -1] == -torch.inf
    w = log_w.exp()[:, :-1]
    if bool((w > 1e-30).all()):
        law = torch.distributions.Dirichlet(c[:, :-1], validate_args=False)
        torch.testing.assert_close(dirichlet_log_density(log_w, c), law.log_prob(w), atol=1e-6, rtol=1e-6)
    noise = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, concentrations[0]).log_prob(noise).sum(-1)
    torch.testing.assert_close(log_gaussian(noise, concentrations[0]), normal)


def test_small_concentrations_give_no_nan() -> None:
    model = HiddenMarkov.random(3, 3)
    logits = torch.tensor([[0.0, -1.0, -40.0, -90.0]])
    step = DirichletMixture(1e-3, least=0.0).step(logits, thinkers(1), model, 1.0)
    assert step.log_probs is not None and bool(step.log_probs.isfinite().all())
    assert float(step.mixtures.weights.sum()) == pytest.approx(1)


@pytest.mark.paper("2509.19170")
def test_noise_is_gaussian_of_the_size_told() -> None:
    """Mean square of 4 x 4096 normal numbers within 4.5 standard errors: a false alarm in 1e5."""
    model = HiddenMarkov.random(3, 4095)
    step = NoisySoft(sigma_rel=0.5).step(torch.zeros(4, 4096), thinkers(4), model, 0.2)
    noise = step.mixtures.noise
    assert noise is not None and step.log_probs is not None
    assert abs(float((noise / 0.1).square().mean()) - 1) < 4.5 * (2 / noise.numel()) ** 0.5
    torch.testing.assert_close(step.log_probs, log_gaussian(noise[:, 0], 0.1))
    assert len({float(row[0, 0]) for row in noise}) == 4


@pytest.mark.paper("2505.15778")
def test_gumbel_noise_at_low_temperature_is_sampling() -> None:
    """Chi-square against w at a false-alarm rate of 1e-4."""
    model, runs = HiddenMarkov.random(3, 4), 4000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]).expand(runs, -1)
    policy = SoftThinking(1.0, None, None, None, 4, noise=GumbelNoise(1e-3))
    step = policy.step(logits, thinkers(runs), model, 1.0)
    w = logits[0, :4].double().softmax(-1)
    counts = torch.bincount(step.tokens, minlength=4)
    assert chisquare(counts.numpy(), (runs * w).numpy()).pvalue > 1e-4
    assert float(step.mixtures.weights[:, 0, 0].mean()) > 0.99


# On a trained model.


@pytest.mark.slow
@pytest.mark.paper("2505.15778")
def test_a_soft_step_is_nearer_the_exact_marginal_than_a_greedy_one() -> None:
    """KL(sum_v p(v) p(. | x v) || step), all v enumerated, on the bundled model at entropies above 2 nats."""
    model = load("nano")
    assert isinstance(model, HFModel)
    gains = []
    for text in ("It was", "She said that the", "In the", "He looked at the"):
        state = model.start()
        p = model.extend(state, [[*([] if model.vocab.bos_id is None else [model.vocab.bos_id]),
                                  *model.vocab.encode(text).ids]])[:, -1].log_probs()[:, 0]  # fmt: skip
        exact = torch.zeros(model.vocab.size)
        for ids in torch.arange(model.vocab.size).split(512):
            following = model.extend(state.fork([0] * len(ids)), ids[:, None]).log_probs()[:, 0].exp()
            exact += p[0, ids].exp() @ following
        distances = []
        for policy in (SoftThinking(**WHOLE), SoftThinking(temperature=0.0)):
            step = policy.step(p, thinkers(1), model, 1.0)
            said = model.extend_soft(state.fork([0]), step.mixtures).log_probs()[0, 0]
            distances.append(float((exact * (exact.log() - said)).sum()))
        assert float(torch.special.entr(p.exp()).sum()) > 2
        gains.append(distances[1] - distances[0])
    assert min(gains) > 0


# Misuse.


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftThinking(temperature=-1),
        lambda: SoftThinking(max_topk=0),
        lambda: SoftThinking(top_k=0),
        lambda: SoftThinking(top_p=1.5),
        lambda: SoftThinking(min_p=-0.1),
        lambda: SoftThinking(temperature=0, noise=GumbelNoise()),
        lambda: NoisySoft(temperature=math.inf),
        lambda: NoisySoft(sigma_rel=-0.1),
        lambda: TokenMixture(0),
        lambda: DirichletMixture(0.0),
        lambda: DirichletMixture(least=2),
        lambda: GumbelNoise(0),
        lambda: DirichletNoise(0),
        lambda: ColdStop(0.0, 4),
        lambda: ColdStop(0.1, 0),
    ],
)
def test_settings_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError):
        make()


def test_what_cannot_be_done_is_said(llama: HFModel) -> None:
    soft = SoftThinking()
    with pytest.raises(ModelError, match="takes tokens only"):
        think(TableModel.random(3), "a", soft)
    with pytest.raises(ValueError, match=r"'</think>', is no token of this model"):
        think(llama, "w5", soft)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        think(llama, "w5", soft, end_of_thinking=V)
    with pytest.raises(ValueError, match="lower max_thinking_tokens"):
        think(llama, "w5", soft, end_of_thinking="w3", max_thinking_tokens=62)
    assert thought(llama, "w5", soft, end_of_thinking="w3", max_thinking_tokens=61, max_tokens=9).ended != "eos"
    for settings_ in ({"n": 0}, {"max_rows": 0}, {"max_thinking_tokens": -1}, {"max_tokens": 0}, {"stop": ""}):
        with pytest.raises(ValueError):
            think(llama, ["w5"], soft, end_of_thinking="w3", **settings_)  # type: ignore[arg-type]


@settings(max_examples=15)
@given(st.integers(0, 2**80))
def test_equal_seeds_give_equal_thoughts(seed: int) -> None:
    model = HiddenMarkov.random(seed=seed % 5)
    for thinking in (NoisySoft(sigma_rel=0.01), TokenMixture(3), DirichletMixture()):
        ones = [
            thought(model, "ab", thinking, end_of_thinking=None, max_thinking_tokens=3, max_tokens=4, seed=s)
            for s in (seed, seed, seed + 1)
        ]
        assert torch.equal(ones[0].vectors, ones[1].vectors) and ones[0].answer.tokens == ones[1].answer.tokens  # type: ignore[union-attr]
        if isinstance(thinking, NoisySoft):
            assert not torch.equal(ones[0].vectors, ones[2].vectors)

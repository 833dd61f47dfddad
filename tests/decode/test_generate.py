"""generate(): its law on tables, independence of company, stops and streaming, and its two signatures."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from nextoken.decode.generate import derived_seed, generate, prompt_tokens, stream
from nextoken.decode.loop import Loop
from nextoken.decode.parsing import transform
from nextoken.decode.request import Request
from nextoken.decode.text_stream import TextStream
from nextoken.decode.transform import Context, EmptyDistribution, normalise
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab

RUNS = 4000
"""Strings drawn per law; the false-alarm rate of each chi-square is 1e-4."""


def law(model: TableModel, rule: str, depth: int) -> dict[tuple[int, ...], float]:
    """Probability of every output of at most `depth` tokens, by walking the tree and transforming each row."""
    change, bos = transform(rule), model.vocab.bos_id
    found: dict[tuple[int, ...], float] = {}

    def walk(output: tuple[int, ...], surprisals: tuple[float, ...], probability: float) -> None:
        if len(output) == depth or (output and output[-1] in model.vocab.eos_ids):
            found[output] = found.get(output, 0.0) + probability
            return
        scores = model.row(output)[None]
        for coin, share in ((0.0, 0.5), (0.75, 0.5)) if change.is_random else ((None, 1.0),):
            uniform = None if coin is None else torch.tensor([coin])
            context = Context([[bos]], [output], [surprisals], uniform, model.vocab)
            for token, step in enumerate(normalise(change(scores, context))[0].tolist()):
                if step > -math.inf:
                    walk((*output, token), (*surprisals, -step), probability * share * math.exp(step))

    walk((), (), 1.0)
    return found


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "temperature(0.6)",
        "top_k(2)",
        "top_p(0.7) | temperature(1.5)",
        "min_p(0.4)",
        "typical(0.6)",
        "epsilon(0.2)",
        "eta(0.3)",
        "top_n_sigma(0.8)",
        "xtc(0.5, 0.2)",
        "mirostat_2(1.0, 0.5)",
        "mirostat_1(1.0, 0.5)",
        "repetition_penalty(1.5)",
        "presence_penalty(0.7) | frequency_penalty(0.4)",
        "no_repeat_ngram(2)",
        "dry(1.0, 2.0, 1)",
        "logit_bias({0: 1.0, 2: -1.0})",
        "dynamic_temperature(0.5, 1.5)",
        "entropy_varentropy(0.8)",
    ],
)
def test_strings_follow_the_enumerated_law(rule: str) -> None:
    model = TableModel.random(3, order=2, eos=True, seed=11)
    expected = law(model, rule, 3)
    assert sum(expected.values()) == pytest.approx(1)
    made = generate(model, [""], transform=rule, max_tokens=3, n=RUNS, seed=5, max_rows=1000)
    counts = Counter(generation.tokens for generation in made)
    assert set(counts) <= set(expected)
    strings = sorted(expected, key=expected.__getitem__, reverse=True)
    # Strings expected fewer than 5 times are counted together.
    frequent = [s for s in strings if expected[s] * RUNS >= 5]
    observed = [counts[s] for s in frequent]
    probabilities = [expected[s] for s in frequent]
    if (rest := 1 - sum(probabilities)) * RUNS > 1e-6:
        observed.append(RUNS - sum(observed))
        probabilities.append(rest)
    scaled = np.array(probabilities) / sum(probabilities) * RUNS
    assert len(observed) == 1 or chisquare(observed, scaled).pvalue > 1e-4


def test_the_wrong_law_is_noticed() -> None:
    """The chi-square above would see an order of transforms exchanged."""
    model = TableModel.random(3, order=2, eos=True, seed=11)
    right, wrong = law(model, "top_p(0.7) | temperature(1.5)", 3), law(model, "temperature(1.5) | top_p(0.7)", 3)
    distance = sum(abs(right.get(s, 0) - wrong.get(s, 0)) for s in {*right, *wrong})
    assert distance > 0.2


@pytest.mark.paper("2305.13484")
@given(st.integers(0, 2**40), st.integers(1, 7), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_sequence_does_not_depend_on_its_company(seed: int, max_rows: int, arrival: int) -> None:
    model = TableModel.random(5, order=2, eos=True, concentration=2.0, seed=2)
    rule = transform("temperature(0.9) | xtc(0.5, 0.2)")
    requests = [
        Request((5, *[i % 5] * (i % 3)), rule if i % 2 else transform("top_k(3)"), max_tokens=3 + i, seed=seed + i)
        for i in range(7)
    ]
    alone = []
    for request in requests:
        loop = Loop(model)
        loop.submit(request)
        alone.append([piece.token for piece in loop.run()])
    loop = Loop(model, max_rows=max_rows)
    waiting, together = list(requests), {}
    order = np.random.default_rng(arrival)
    while waiting or not loop.is_done:
        for _ in range(int(order.integers(0, 3))):
            if waiting:
                together[loop.submit(waiting.pop(0))] = []
        for piece in loop.step():
            together[piece.ticket].append(piece.token)
    assert list(together.values()) == alone


def test_n_texts_are_different_and_reproducible() -> None:
    model = TableModel.random(6, order=1, seed=0)
    first = generate(model, "a", n=4, seed=9, max_tokens=12)
    again = generate(model, ["b", "a"], n=4, seed=9, max_tokens=12)[4:]
    assert [g.tokens for g in first] == [g.tokens for g in again]
    assert len({g.tokens for g in first}) == 4
    assert generate(model, "a", seed=derived_seed(9, 2), max_tokens=12).tokens == first[2].tokens
    unseeded = generate(model, "a", max_tokens=12)
    assert generate(model, "a", seed=unseeded.request.seed, max_tokens=12).tokens == unseeded.tokens


def test_greedy_takes_the_best_token_and_spends_nothing() -> None:
    model = TableModel.random(5, order=2, seed=4)
    made = generate(model, "ab", transform="greedy", max_tokens=6)
    tokens = list(prompt_tokens(model, "ab"))
    for token in made.tokens:
        assert token == int(model.row(tokens[1:]).argmax())
        tokens.append(token)
    assert sum(made.surprisals) == 0
    assert generate(model, "ab", transform="temperature(0)", max_tokens=6).tokens == made.tokens


@pytest.mark.parametrize("rule", ["", "temperature(0.7) | top_k(3)", "mirostat_2(1.5) | xtc(0.6, 0.1)"])
def test_both_signatures_are_what_they_say(rule: str) -> None:
    model = TableModel.random(5, order=2, eos=True, concentration=3.0, seed=6)
    made = generate(model, "ab", transform=rule, max_tokens=9, seed=3, ignore_eos=True)
    np.testing.assert_allclose(made.drawn.column("logprob"), [-s for s in made.surprisals], atol=1e-5)
    context = [0, 1]
    for token, said, rank in zip(
        made.tokens, made.signature.column("logprob"), made.signature.column("rank"), strict=True
    ):
        row = model.row(context)
        assert said == pytest.approx(row[token].item(), abs=1e-5)
        assert rank == int((row > row[token]).sum())
        context.append(token)
    assert made.signature.text() == made.text
    if not rule:
        assert made.signature.equals(made.drawn, tolerance=1e-5)


def test_end_tokens_end_unless_ignored() -> None:
    model = TableModel.given({(): [0.2, 0.8]}, ["a"], eos=True)
    made = generate(model, "", seed=0, max_tokens=50)
    assert made.finish == "eos" and made.tokens[-1] == 2 and made.text == "a" * (len(made.tokens) - 1)
    longer = generate(model, "", seed=0, max_tokens=50, ignore_eos=True)
    assert longer.finish == "length" and len(longer.tokens) == 50 and longer.tokens[: len(made.tokens)] == made.tokens


def test_stops_are_matched_across_tokens_and_left_out() -> None:
    model = TableModel.given({(): [0, 1, 0, 0], (1,): [0, 0, 1, 0], (2,): [0, 0, 0, 1], (3,): [1, 0, 0, 0]}, "wxyz")
    made = generate(model, "", max_tokens=20, stop=["zw", "zz"])
    assert (made.text, made.finish) == ("xy", "stop")
    assert "".join(piece.text for piece in stream(model, "", max_tokens=20, stop="zw")) == "xy"
    assert generate(model, "", max_tokens=3, stop="zw").text == "xyz"


def test_streams_never_hold_half_a_character() -> None:
    spelled = "né😀".encode()
    rows = {(): [1.0 if i == 0 else 0.0 for i in range(len(spelled))]}
    for i in range(len(spelled) - 1):
        rows[(i,)] = [1.0 if j == i + 1 else 0.0 for j in range(len(spelled))]
    model = TableModel.given(rows, [spelled[i : i + 1] for i in range(len(spelled))])
    assert [piece.text for piece in stream(model, "", max_tokens=7)] == ["n", "", "é", "", "", "", "😀"]
    assert generate(model, "", max_tokens=5).text == "né\ufffd"


@given(
    st.lists(st.binary(min_size=1, max_size=4), max_size=12),
    st.lists(st.binary(min_size=1, max_size=3), max_size=3),
)
def test_a_text_stream_is_the_text_before_the_first_stop(pieces: list[bytes], stops: list[bytes]) -> None:
    found, out, taken = TextStream(stops), "", b""
    for piece in pieces:
        out += found.push(piece)
        taken += piece
        if found.stopped:
            break
    out += found.finish()
    # The earliest match that is complete after the fewest tokens ends the text.
    ends = [taken.find(stop) for stop in stops if stop in taken]
    assert found.stopped == bool(ends)
    expected = taken[: min(ends)] if ends else taken
    assert out == expected.decode("utf-8", "replace") == found.text


def test_a_full_context_ends_a_text() -> None:
    model = TableModel.random(3, order=1, seed=0)
    model.context_length = 6
    made = generate(model, "ab", max_tokens=50)
    assert made.finish == "context" and len(made.tokens) == 6 - 3 + 1
    assert len(made.signature) == len(made.tokens)
    with pytest.raises(ValueError, match="the prompt has 8 tokens and the context of table holds 6"):
        generate(model, "abababa")


def test_abandoning_or_cancelling_frees_the_state() -> None:
    model = TableModel.random(3, order=1, seed=0)
    loop = Loop(model)
    tickets = [loop.submit(Request((3,), max_tokens=100, seed=i)) for i in range(3)]
    pieces = loop.run()
    next(pieces)
    loop.cancel(tickets[1])
    assert loop._state is not None and loop._state.batch == 2
    pieces.close()
    assert loop._state is None and loop._logits is None and loop.is_done


def test_prompts_are_read_once_for_n_texts() -> None:
    model = TableModel.random(4, order=1, seed=0)
    fed: list[int] = []
    feed = model._feed

    def counting(state, tokens, parents):  # type: ignore[no-untyped-def]
        fed.append(tokens.numel())
        return feed(state, tokens, parents)

    model._feed = counting  # type: ignore[method-assign]
    generate(model, "abcabc", n=8, max_tokens=2, seed=0)
    assert fed == [7, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ""}, "stop string is empty"),
        ({"transform": "nonsense(1)"}, "no transform"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(TableModel.random(3), "a", **arguments)


def test_a_transform_that_removes_every_token_is_an_error() -> None:
    model = TableModel.random(3, seed=0)
    for rule in ("logit_bias({0: -inf, 1: -inf, 2: -inf})", "logit_bias({0: -inf, 1: -inf, 2: -inf}) | greedy"):
        with pytest.raises(EmptyDistribution, match="no token is left"):
            generate(model, "a", transform=rule)


def test_a_model_without_a_begin_token_needs_a_prompt() -> None:
    model = TableModel.random(3, seed=0)
    model.vocab = Vocab([*model.vocab.token_bytes])
    with pytest.raises(ValueError, match="no begin token"):
        generate(model, "")
    with pytest.raises(ValueError, match="chat template"):
        generate(model, [{"role": "user", "content": "a"}])

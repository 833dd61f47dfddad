"""Prompts read back from the distributions after them."""

from __future__ import annotations

import random

import pytest
import torch

import nextoken
from nextoken.errors import InputError
from nextoken.inversion.log_ratios import LogRatioCodec
from nextoken.inversion.prompt_inverter import PromptInverter, answers, token_f1


@pytest.fixture(scope="module")
def model():
    return nextoken.load("nano")


@pytest.fixture(scope="module")
def codec(model):
    return LogRatioCodec.of_model(model)


def made(seed: int, count: int, bos: int) -> list[list[int]]:
    """Prompts of two tokens from sixteen: 256 in all."""
    draw = random.Random(seed)
    return [[bos, *(300 + draw.randrange(16) for _ in range(2))] for _ in range(count)]


def test_answers_are_those_of_greedy_decoding(model, codec):
    prompts = [[model.vocab.bos_id, 300, 305], [model.vocab.bos_id, 999]]
    found = answers(model, prompts, codec, steps=3)
    for number, prompt in enumerate(prompts):
        row = list(prompt)
        for step in range(3):
            log_probs = model.predict([row]).log_probs()[0, -1]
            assert found[number, step].tolist() == pytest.approx(codec.compress(log_probs).tolist(), abs=1e-3)
            row.append(int(log_probs.argmax()))
    with pytest.raises(ValueError, match="every prompt"):
        answers(model, [[]], codec, steps=2)


@pytest.fixture(scope="module")
def fitted(model, codec):
    prompts = made(0, 700, model.vocab.bos_id)
    seen = answers(model, prompts, codec, steps=2)
    losses: list[float] = []
    inverter = PromptInverter.fit(
        seen,
        [prompt[1:] for prompt in prompts],
        vocab_size=model.vocab.size,
        width=64,
        layers=1,
        epochs=24,
        rate=3e-3,
        on_step=lambda step, steps, loss: losses.append(loss),
    )
    return inverter, losses


@pytest.mark.slow
@pytest.mark.paper("2506.17090")
def test_prompts_are_recovered_and_from_others_answers_they_are_not(model, codec, fitted):
    inverter, losses = fitted
    assert losses[-1] < losses[0] / 4
    prompts = made(1, 100, model.vocab.bos_id)
    seen = answers(model, prompts, codec, steps=2)
    found = inverter.recover(seen)
    exact = sum(list(one) == prompt[1:] for one, prompt in zip(found, prompts, strict=True))
    # Blind guessing is right once in 256: more than 20 of 100 never.
    assert exact > 20, exact
    other = inverter.recover(seen.roll(1, 0))
    assert sum(list(one) == prompt[1:] for one, prompt in zip(other, prompts, strict=True)) < 8


@pytest.mark.slow
def test_kept_and_found_again(model, codec, fitted, tmp_path):
    inverter, _ = fitted
    seen = answers(model, made(2, 5, model.vocab.bos_id), codec, steps=2)
    inverter.save(tmp_path / "inverter")
    assert PromptInverter.load(tmp_path / "inverter").recover(seen) == inverter.recover(seen)
    with pytest.raises(InputError, match="no inverter"):
        PromptInverter.load(tmp_path)


def test_bad_input():
    with pytest.raises(ValueError, match="as many prompts"):
        PromptInverter.fit(torch.zeros(2, 3, 4), [[1]], vocab_size=9)
    with pytest.raises(ValueError, match="ids below 9"):
        PromptInverter.fit(torch.zeros(1, 3, 4), [[9]], vocab_size=9)
    inverter = PromptInverter(4, 9, width=8, layers=1, heads=1)
    with pytest.raises(ValueError, match="in the numbers"):
        inverter.recover(torch.zeros(1, 3, 5))


def test_the_same_seed_gives_the_same_inverter():
    seen = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    made = [PromptInverter.fit(seen, [[1, 2]] * 6, vocab_size=9, width=8, layers=1, epochs=2) for _ in range(2)]
    states = [inverter.state_dict() for inverter in made]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_token_f1():
    assert token_f1([1, 2, 2], [2, 2, 3]) == pytest.approx(2 / 3)
    assert token_f1([], []) == 1 and token_f1([1], []) == 0

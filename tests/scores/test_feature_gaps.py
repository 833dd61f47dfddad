"""Feature gaps: directions, choice of layers, and the prediction."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nextoken
from nextoken.errors import InputError
from nextoken.scores.feature_gaps import FEATURES, REGULAR, Feature, FeatureGaps, Question, _filled, _states, direction
from nextoken.scores.quality import auroc

COLOURS = ["red", "green", "black", "white", "golden", "brown"]
THINGS = ["door", "ship", "horse", "coat", "flag", "box"]


def asked(seed: int, count: int) -> list[Question]:
    """Half of the answers are those of the context."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        thing, colour = draw.choice(THINGS), draw.choice(COLOURS)
        answer = colour if number % 2 else draw.choice([other for other in COLOURS if other != colour])
        made.append(
            Question(
                f"what colour is the {thing}?",
                f"The {thing} is {colour}.",
                f" {answer}",
                correct=answer == colour,
                easy=f"The answer is {colour}.",
            )
        )
    return made


@pytest.fixture(scope="module")
def model():
    return nextoken.load("nano")


@pytest.fixture(scope="module")
def gaps(model):
    return FeatureGaps.fit(model, asked(0, 40), asked(1, 80))


def test_states_are_those_of_the_positions_that_predict_the_answer(model):
    one = Question("why?", "It rained all day long.", " because of that")
    other = asked(3, 3)
    prompt = [model.vocab.bos_id, *model.vocab.encode(_filled(REGULAR, one)).ids]
    answer = list(model.vocab.encode(one.answer).ids)
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
    found = _states(model, REGULAR, [other[0], one, *other[1:]])[1]
    for layer in range(len(found) - 1):  # transformers gives the last layer after its final norm
        mean = hidden[layer + 1][0, len(prompt) - 1 : len(prompt) + len(answer) - 1].mean(0)
        assert found[layer] == pytest.approx(mean.numpy(), abs=1e-4)


@pytest.mark.paper("2510.02671")
def test_centring_loses_the_feature_that_all_pairs_share():
    """d = 3 v + N(0, 1) w + noise: the centred component is w, the others are v."""
    rng = np.random.default_rng(0)
    v, w = np.linalg.qr(rng.normal(size=(30, 2)))[0].T
    differences = 3 * v + rng.normal(size=(400, 1)) * w + 0.05 * rng.normal(size=(400, 30))
    signs = rng.choice([-1.0, 1.0], size=400)
    assert abs(direction(differences, "centred", signs) @ w) > 0.98
    for how in ("random-sign", "mean"):
        assert direction(differences, how, signs) @ v > 0.98


@pytest.mark.paper("2510.02671")
@given(st.integers(0, 10_000))
def test_the_gap_of_states_bounds_the_divergence(seed):
    rng = np.random.default_rng(seed)
    head, h, ideal = rng.normal(size=(20, 6)), rng.normal(size=6), rng.normal(size=6)
    logits = head @ ideal, head @ h
    p, q = (np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in logits)
    assert (p * np.log(p / q)).sum() <= 2 * np.abs(head @ (ideal - h)).max() + 1e-9


@pytest.mark.paper("2510.02671")
def test_a_planted_feature_is_found(model):
    """Answers are right where reliance, read at one layer, is high: the fit finds that and predicts fresh answers."""
    reliance = FEATURES[0]
    pairs = [_states(model, prompt, asked(0, 40)) for prompt in (reliance.more, reliance.less)]
    planted = direction((pairs[0] - pairs[1])[:, 2], "mean", np.ones(40))

    def labelled(seed: int, count: int) -> tuple[list[Question], np.ndarray]:
        questions = [
            replace(one, question=one.question + " " + "now " * (n % 7)) for n, one in enumerate(asked(seed, count))
        ]
        along = _states(model, REGULAR, questions)[:, 2] @ planted
        chance = 1 / (1 + np.exp(-4 * (along - along.mean()) / along.std()))
        correct = np.random.default_rng(seed).random(count) < chance
        return [replace(one, correct=bool(c)) for one, c in zip(questions, correct, strict=True)], along

    gaps = FeatureGaps.fit(model, asked(0, 40), labelled(1, 120)[0])
    fresh, along = labelled(2, 200)
    correct = np.array([one.correct for one in fresh])
    best = auroc(along, correct)
    # Equal to the planted score but for the layer's choice and the fit; 0.07 is two errors of an AUROC of 0.85.
    assert best > 0.8 and auroc(gaps.predict(model, fresh), correct) > best - 0.07
    assert gaps.readings[0].prr > 0.5


def test_prediction_is_the_logistic_of_the_scores(model, gaps):
    fresh = asked(4, 9)
    scores = gaps.scores(model, fresh)
    z = gaps.weights[0] + ((scores - gaps.centre) / gaps.spread) @ gaps.weights[1:]
    assert gaps.predict(model, fresh) == pytest.approx(1 / (1 + np.exp(-z)))
    states = _states(model, REGULAR, fresh)
    for number, reading in enumerate(gaps.readings):
        by_hand = [reading.sign * sum((s - reading.offset) * reading.direction) for s in states[:, reading.layer]]
        assert scores[:, number] == pytest.approx(by_hand, abs=1e-9)


def test_kept_and_found_again(model, gaps, tmp_path):
    gaps.save(tmp_path / "gaps")
    again = FeatureGaps.load(tmp_path / "gaps")
    fresh = asked(5, 5)
    assert (again.predict(model, fresh) == gaps.predict(model, fresh)).all()
    assert [reading.feature for reading in again.readings] == list(FEATURES)
    with pytest.raises(InputError, match="no feature gaps"):
        FeatureGaps.load(tmp_path)


def test_an_empty_answer_has_no_verdict(model, gaps):
    found = gaps.predict(model, [*asked(6, 2), Question("what?", "Nothing.", "")])
    assert np.isfinite(found[:2]).all() and np.isnan(found[2])


def test_bad_input(model, gaps):
    with pytest.raises(ValueError, match="fit them anew"):
        gaps.predict(nextoken.load("tiny"), asked(0, 1))
    with pytest.raises(ValueError, match="right and answers that are wrong"):
        FeatureGaps.fit(model, asked(0, 4), [one for one in asked(1, 8) if one.correct])
    with pytest.raises(ValueError, match="at least two answers"):
        FeatureGaps.fit(model, asked(0, 1), asked(1, 8))
    with pytest.raises(ValueError, match="never differ"):
        FeatureGaps.fit(model, asked(0, 4), asked(1, 8), features=[Feature("none", REGULAR, REGULAR)])
    with pytest.raises(ValueError, match="how must be"):
        FeatureGaps.fit(model, asked(0, 4), asked(1, 8), how="pca")


def test_braces_in_a_question_are_text():
    one = Question("{context}?", "{easy}", "", easy="E")
    assert _filled("{context}|{question}|{easy}", one) == "{easy}|{context}?|E"

"""Restart prediction: the exact r and its laws, questions without a trace, pairs, what is learnt, keeping, misuse."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nextoken.decode.generation import Generation
from nextoken.errors import ModelError
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.values._descent import Schedule
from nextoken.values.restart import Question, RestartPredictor, TableRestart
from nextoken.values.restart_fit import RestartExample, fit_restart, restart_examples

TABLE = TableModel.random(["a", "b", "c"], order=2, eos=True, seed=2)
BOS, EOS, MOST = 3, 4, 4
ASK, YES, NO = 5, 6, 7


def score(tokens: tuple[int, ...]) -> float:
    """How many b: 0 to MOST."""
    return float(sum(token == 1 for token in tokens))


EXACT = TableRestart(TABLE, score, max_tokens=MOST)
LAW = TABLE.enumerate(MOST)


def small_hf(seed: int = 0, context: int = 16) -> HFModel:
    """A network over the table's ids and three more: a question of one token, yes and no."""
    words = {"a": 0, "b": 1, "c": 2, "<bos>": BOS, "<eos>": EOS, "?": ASK, "Yes": YES, "No": NO}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<bos>")), bos_token="<bos>", eos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        initializer_range=0.1,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return HFModel(transformers.LlamaForCausalLM(config), tokenizer, name=f"small{seed}")


QUESTION = Question((ASK,), restart=(YES,), stay=(NO,))


def scores(made: Sequence[Generation]) -> list[float]:
    return [score(one.tokens) for one in made]


@pytest.mark.paper("2410.02725")
def test_the_exact_r_is_the_definition() -> None:
    for text in list(LAW)[:40]:
        expected = math.fsum(p for other, p in LAW.items() if score(other) <= score(text))
        assert EXACT.probability((BOS,), text) == pytest.approx(expected, abs=1e-12)
    wide = TableRestart(TABLE, score, max_tokens=MOST, margin=1.5)
    text = (0, EOS)
    expected = math.fsum(p for other, p in LAW.items() if score(other) < score(text) + 1.5)
    assert wide.probability((BOS,), text) == pytest.approx(expected, abs=1e-12)


@pytest.mark.paper("2410.02725")
@given(st.lists(st.integers(0, 2), max_size=MOST - 1))
def test_r_is_a_martingale_along_a_response(begun: list[int]) -> None:
    p = TABLE.row(begun).exp().tolist()
    following = math.fsum(share * EXACT.probability((BOS,), (*begun, a)) for a, share in enumerate(p) if share > 0)
    assert EXACT.probability((BOS,), begun) == pytest.approx(following, abs=1e-12)


@pytest.mark.paper("2410.02725")
def test_fresh_responses_stay_half_of_the_time_and_half_of_the_ties() -> None:
    """E r = P(win) + P(tie) = (1 + P(tie)) / 2: a hopeless or a sure prompt, where all tie, has r = 1."""
    mean = math.fsum(p * EXACT.probability((BOS,), text) for text, p in LAW.items())
    tie = math.fsum(p * q for x, p in LAW.items() for y, q in LAW.items() if score(x) == score(y))
    assert mean == pytest.approx((1 + tie) / 2, abs=1e-9)
    assert EXACT.probability((BOS,), ()) == pytest.approx(mean, abs=1e-9)
    alike = TableRestart(TABLE, lambda text: 0.0, max_tokens=MOST)
    assert alike.probability((BOS,), (0,)) == pytest.approx(1.0)


def test_the_answer_is_read_off_and_leaves_no_trace() -> None:
    """On a table: r = p(stay) / (p(stay) + p(restart)) after the question; the state goes on as if never asked."""
    question = Question((2, 1), restart=(0,), stay=(1, EOS))
    predictor = RestartPredictor(TABLE, question)
    state = TABLE.start(2)
    TABLE.extend(state, [[BOS, 0, 1], [BOS, 2, -1]])
    said = predictor.ask(state)
    p = TABLE.row((2, 1)).exp().tolist()
    stay = p[1] + p[EOS]
    assert said.stay.tolist() == pytest.approx([stay / (stay + p[0])] * 2)
    assert said.mass.tolist() == pytest.approx([stay + p[0]] * 2)
    assert state.tokens == ((BOS, 0, 1), (BOS, 2))
    swapped = RestartPredictor(TABLE, Question((2, 1), restart=(1, EOS), stay=(0,)))
    assert swapped.ask(state).stay.tolist() == pytest.approx([1 - stay / (stay + p[0])] * 2)


def test_a_network_goes_on_as_if_never_asked() -> None:
    model = small_hf()
    predictor = RestartPredictor(model, Question((ASK, 0, ASK), restart=(YES,), stay=(NO,)))
    state = model.start(2)
    model.extend(state, [[BOS, 0, 1], [BOS, 2, -1]])
    asked = predictor.ask(state).stay
    after = model.extend(state, [[1], [0]]).log_probs()[:, 0]
    plain = [model.predict([row]).log_probs()[0, -1] for row in ([BOS, 0, 1, 1], [BOS, 2, 0])]
    torch.testing.assert_close(after, torch.stack(plain), rtol=1e-4, atol=1e-5)
    read = predictor.probabilities([BOS], [[0, 1], [2]])
    torch.testing.assert_close(read, asked, rtol=1e-4, atol=1e-6)
    assert predictor.cost([BOS], [[0, 1], [2]]) == 1 + 3 + 2 * 3
    assert predictor.probability([BOS], "b") == pytest.approx(predictor.probability("", [1]))


@pytest.mark.paper("2410.02725")
def test_pairs_by_hand() -> None:
    """Winners and ties stay, losers do not; cuts are beginnings of their response and have its label."""
    seen: list[Generation] = []

    def told(made: Sequence[Generation]) -> list[float]:
        seen.extend(made)
        return [3.0, 1.0, 2.0, 2.005, 1.0, 1.0][: len(made)]

    examples = restart_examples(TABLE, ["", "a", "b"], told, cuts=2, max_tokens=MOST, seed=1)
    labels = [True, False, True, True, True, True]
    whole = []
    for one, label in zip(seen, labels, strict=True):
        group = [e for e in examples if e.prompt == one.request.prompt and e.response == one.tokens]
        assert any(e.stays == label for e in group)
        whole += group
    assert {e.stays for e in examples if e.prompt == (BOS, 0)} == {True}
    assert len(examples) == sum(1 + 2 * (len(one.tokens) > 1) for one in seen)
    for example in examples:
        assert any(one.tokens[: len(example.response)] == example.response for one in seen) and example.response
    strict = restart_examples(TABLE, ["", "a", "b"], told, cuts=0, margin=0.0, max_tokens=MOST, seed=1)
    assert [e.stays for e in strict] == [True, False, False, True, True, True]


@pytest.mark.paper("2410.02725")
def test_labels_are_draws_of_r() -> None:
    """3,000 responses from 1,500 pairs; within 4 standard errors of (1 + P(tie)) / 2, false alarm 6e-5."""
    examples = restart_examples(TABLE, [""], scores, pairs=1500, cuts=0, margin=0.01, max_tokens=MOST, seed=0)
    labels = np.array([e.stays for e in examples], float)
    truth = EXACT.probability((BOS,), ())
    assert abs(labels.mean() - truth) < 4 * labels.std() / math.sqrt(1500)
    for count in (0, 1, 2):
        group = np.array([e.stays for e in examples if score(e.response) == count], float)
        r = math.fsum(p for text, p in LAW.items() if score(text) <= count)
        assert abs(group.mean() - r) < 4 * math.sqrt(r * (1 - r) / len(group)) + 1e-9


@pytest.fixture(scope="module")
def learnt() -> RestartPredictor:
    examples = restart_examples(TABLE, [""], scores, pairs=400, cuts=1, max_tokens=MOST, seed=5)
    schedule = Schedule(epochs=4, batch=32, rate=5e-3, warm_up=10)
    return fit_restart(small_hf(), examples, QUESTION, schedule=schedule, seed=0)


@pytest.mark.paper("2410.02725")
def test_what_is_learnt_is_the_exact_r(learnt: RestartPredictor) -> None:
    """Over all responses and their beginnings, weighed by how often they come; the seeds are fixed."""
    for size in (1, 2, MOST):
        law = TABLE.enumerate(size)
        truth = np.array(EXACT.probabilities((BOS,), list(law)))
        said = np.array(learnt.probabilities((BOS,), list(law)))
        weights = np.array(list(law.values()))
        spread = np.average((truth - np.average(truth, weights=weights)) ** 2, weights=weights)
        assert np.average((said - truth) ** 2, weights=weights) < 0.25 * spread + 0.002
    assert float(learnt.answers((BOS,), [(0, 1), (2,)]).mass.min()) > 0.99


@pytest.mark.paper("2410.02725")
def test_yes_means_that_it_can_do_better(learnt: RestartPredictor) -> None:
    good, garbage = (1, 1, 1, 1), (0, 0, 2, 0)
    assert EXACT.probability((BOS,), good) > 0.99 and EXACT.probability((BOS,), garbage) < 0.7
    assert learnt.probability((BOS,), good) > 0.85 > 0.75 > learnt.probability((BOS,), garbage)


@pytest.mark.paper("2410.02725")
def test_the_learnt_r_does_not_drift_along_responses(learnt: RestartPredictor) -> None:
    """E[r(y_1..t+1) - r(y_1..t)] = 0 for the truth, and within 0.05 for what is learnt."""
    for t in (1, 2, 3):
        law = TABLE.enumerate(t + 1)
        cut = [text[:t] for text in law]
        change = learnt.probabilities((BOS,), list(law)) - learnt.probabilities((BOS,), cut)
        assert abs(float(np.average(np.array(change), weights=list(law.values())))) < 0.05


def test_training_touches_only_what_it_may_and_only_a_copy() -> None:
    model = small_hf()
    examples = [RestartExample((BOS,), (1, 1), True), RestartExample((BOS,), (0, 0), False)] * 8
    for name, weight in model.model.named_parameters():
        weight.requires_grad_("layers.1" in name)
    before, seen = model.digest, []
    made = fit_restart(model, examples, QUESTION, schedule=Schedule(batch=4, rate=1e-2), on_step=seen.append)
    again = fit_restart(model, examples, QUESTION, schedule=Schedule(batch=4, rate=1e-2))
    assert model.digest == before and made.model.digest == again.model.digest != before
    assert [step.step for step in seen] == list(range(1, 9))
    assert isinstance(made.model, HFModel)
    for (name, old), new in zip(model.model.named_parameters(), made.model.model.parameters(), strict=True):
        assert torch.equal(old, new) == ("layers.1" not in name), name


def test_a_predictor_is_kept_in_a_folder(tmp_path: Path) -> None:
    predictor = RestartPredictor(small_hf(), QUESTION)
    predictor.save(tmp_path)
    same = RestartPredictor.load(tmp_path)
    assert same.question == QUESTION and same.model.digest == predictor.model.digest
    assert same.probability((BOS,), (0, 1)) == pytest.approx(predictor.probability((BOS,), (0, 1)))
    settings = json.loads((tmp_path / "restart_predictor.json").read_text())
    settings["digests"]["model"] = "another"
    (tmp_path / "restart_predictor.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="trained with another model"):
        RestartPredictor.load(tmp_path)
    with pytest.raises(ModelError, match="can be read"):
        RestartPredictor.load(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="transformers"):
        RestartPredictor(TABLE, Question((0,), (1,), (2,))).save(tmp_path)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="not the same"):
        Question((ASK,), restart=(YES,), stay=(YES,))
    with pytest.raises(ValueError, match="2 tokens"):
        Question.of(TABLE.vocab, "a", restart=("b",), stay=("ab",))
    assert Question.of(TABLE.vocab, "ab", restart=("b",), stay=("c",)) == Question((0, 1), (1,), (2,))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        RestartPredictor(TABLE, QUESTION)
    model, one = small_hf(), RestartExample((BOS,), (0,), True)
    with pytest.raises(ValueError, match="examples that stay"):
        fit_restart(model, [one], QUESTION)
    with pytest.raises(ValueError, match="context"):
        fit_restart(model, [one, RestartExample((BOS,), (0,) * 15, False)], QUESTION)
    with pytest.raises(ValueError, match="finite number"):
        restart_examples(TABLE, [""], lambda made: [math.nan] * len(made), max_tokens=MOST)
    with pytest.raises(ValueError, match="pairs"):
        restart_examples(TABLE, [""], scores, pairs=0)

"""Token values: the exact oracle, one gradient for prefix and outcome labels, what is learnt, keeping, misuse."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F

from nextoken.decode.generate import generate
from nextoken.errors import ModelError
from nextoken.model.hf import HFModel
from nextoken.model.table import TableModel
from nextoken.values._descent import Schedule
from nextoken.values.prefix_labels import Solution, outcome_labels, prefix_labels
from nextoken.values.scalar_head import ScalarValue
from nextoken.values.token_value import HFTokenValue, TableTokenValue, fit_token_value, token_value_loss

TABLE = TableModel.random(3, order=2, eos=True, seed=4)
BOS, EOS, MOST = 3, 4, 5


def right(text: tuple[int, ...]) -> float:
    """Whether the symbols sum to a multiple of 3."""
    return float(sum(token for token in text if token < BOS) % 3 == 0)


def small_hf(seed: int = 0, *, spread: float = 0.1) -> HFModel:
    """A network over the table's token ids."""
    words = {"a": 0, "b": 1, "c": 2, "<bos>": BOS, "<eos>": EOS}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<bos>")), bos_token="<bos>", eos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=spread,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(seed)
    return HFModel(transformers.LlamaForCausalLM(config), tokenizer, name=f"small{seed}")


def sampled(count: int, seed: int = 0) -> list[Solution]:
    made = generate(TABLE, [""], n=count, max_tokens=MOST, seed=seed)
    assert isinstance(made, list)
    return [Solution.of(one, right(one.tokens)) for one in made]


def begun(seed: int = 0) -> HFTokenValue:
    """A value whose head is at random, so that gradients reach the body."""
    value = HFTokenValue(ScalarValue.on_copy(small_hf(seed, spread=0.3), seed=seed))
    torch.nn.init.normal_(value.scalar.head.outer.weight)
    return value


def gradient(value: HFTokenValue, solutions: list[Solution], labels: tuple[tuple[float, ...], ...]) -> torch.Tensor:
    """Of the SUM over tokens of squared errors."""
    weights = value.scalar.parameters()
    loss = token_value_loss(value, solutions, labels) * sum(len(one.tokens) for one in solutions)
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


EXACT = TableTokenValue(TABLE, lambda text: right(text[1:]), length=MOST + 1)


@given(st.lists(st.integers(0, 2), max_size=3))
def test_the_exact_value_is_the_enumeration(tokens: list[int]) -> None:
    law = TABLE.enumerate(MOST - len(tokens), prefix=tuple(tokens))
    expected = math.fsum(p * right((*tokens, *rest)) for rest, p in law.items())
    assert EXACT.of((BOS, *tokens)) == pytest.approx(expected, abs=1e-12)
    assert float(EXACT.predict([[BOS, *tokens]])[0, -1]) == pytest.approx(expected, abs=1e-12)


def test_the_exact_value_is_a_martingale_and_keeps_the_outcome() -> None:
    for tokens in ((), (0,), (2, 1)):
        p = TABLE.row(tokens).exp().tolist()
        following = math.fsum(share * EXACT.of((BOS, *tokens, a)) for a, share in enumerate(p) if share > 0)
        assert EXACT.of((BOS, *tokens)) == pytest.approx(following, abs=1e-12)
    assert EXACT.of((BOS, 1, 2, EOS)) == 1.0 and EXACT.of((BOS, 1, 1, EOS)) == 0.0
    state = EXACT.start(2)
    EXACT.extend(state, [[BOS], [BOS]])
    said = EXACT.extend(state, [[1, 2], [0, -1]])
    assert said[0, 1] == EXACT.of((BOS, 1, 2)) and said[1, 0] == EXACT.of((BOS, 0))


@pytest.mark.paper("2407.12863")
def test_the_loss_is_its_formula_on_the_hidden_state_after_the_token() -> None:
    value, solutions = begun(), [Solution((BOS,), (0, 1, EOS), 1), Solution((BOS, 2, 2), (1, EOS), 0)]
    labels = ((0.25, 0.5, 1.0), (0.75, 0.0))
    errors = []
    for one, row in zip(solutions, labels, strict=True):
        said = value.predict([[*one.prompt, *one.tokens]])[0]
        errors += [(float(said[len(one.prompt) + k]) - y) ** 2 for k, y in enumerate(row)]
    assert token_value_loss(value, solutions, labels).item() == pytest.approx(np.mean(errors), rel=1e-5)
    with_lm = token_value_loss(value, solutions, labels, lm_weight=2.0).item()
    nats = []
    for one in solutions:
        row = [*one.prompt, *one.tokens]
        log_probs = value.scalar.body.predict([row]).log_probs()[0]
        nats += [-float(log_probs[at - 1, row[at]]) for at in range(len(one.prompt), len(row))]
    assert with_lm == pytest.approx(np.mean(errors) + 2.0 * np.mean(nats), rel=1e-5)


def test_the_lm_loss_reaches_the_output_weights() -> None:
    value, solutions = begun(), [Solution((BOS,), (0, 1, EOS), 1)]
    output = value.scalar.body.model.get_output_embeddings().weight
    loss = token_value_loss(value, solutions, ((1.0, 1.0, 1.0),), lm_weight=1.0)
    (found,) = torch.autograd.grad(loss, [output])
    ids = torch.tensor([[BOS, 0, 1, EOS]])
    logits = value.scalar.body.model(input_ids=ids).logits[0, :-1]
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, ids[0, 1:]), [output])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.paper("2407.12863")
def test_prefix_and_outcome_labels_have_one_gradient_and_prefix_labels_less_noise() -> None:
    """Over all solutions together; of single solutions the gradients differ, and those of prefix labels differ less."""
    value, solutions = begun(), sampled(60)
    tvm, orm = prefix_labels(solutions).labels, outcome_labels(solutions).labels
    assert tvm != orm
    whole, control = gradient(value, solutions, tvm), gradient(value, solutions, orm)
    assert float(whole.norm()) > 1
    torch.testing.assert_close(whole, control, rtol=1e-3, atol=1e-4 * float(whole.norm()))
    noise = {"tvm": 0.0, "orm": 0.0}
    for i, one in enumerate(solutions):
        for name, labels in (("tvm", tvm), ("orm", orm)):
            off = gradient(value, [one], labels[i : i + 1]) - whole / len(solutions)
            noise[name] += float(off.square().sum())
    assert noise["tvm"] < 0.9 * noise["orm"]


@pytest.mark.paper("2407.12863")
def test_what_is_learnt_is_the_exact_value() -> None:
    """Outcome: an a comes before a b. All prefixes, weighed by how often they come; the seeds are fixed."""

    def early(text: tuple[int, ...]) -> float:
        return float(next((token for token in text if token in (0, 1)), 1) == 0)

    exact = TableTokenValue(TABLE, lambda text: early(text[1:]), length=MOST + 1)
    solutions = [Solution(one.prompt, one.tokens, early(one.tokens)) for one in sampled(400)]
    schedule = Schedule(epochs=6, batch=16, rate=1e-2, warm_up=10)
    value = fit_token_value(small_hf(), solutions, schedule=schedule, seed=1)
    errors, spread, weights = [], [], []
    for prefix, p in {**TABLE.enumerate(1), **TABLE.enumerate(2), **TABLE.enumerate(MOST)}.items():
        said = float(value.predict([[BOS, *prefix]])[0, -1])
        truth = exact.of((BOS, *prefix))
        errors.append((said - truth) ** 2)
        spread.append((truth - 0.5) ** 2)
        weights.append(p)
    assert np.average(errors, weights=weights) < 0.05 * np.average(spread, weights=weights)


def test_training_is_repeatable_told_step_by_step_and_leaves_the_model() -> None:
    model, solutions, seen = small_hf(), sampled(20), []
    before = model.digest
    schedule = Schedule(epochs=2, batch=8, rate=1e-3)
    first = fit_token_value(model, solutions, schedule=schedule, seed=3, on_step=seen.append)
    again = fit_token_value(model, solutions, schedule=schedule, seed=3)
    other = fit_token_value(model, solutions, schedule=schedule, seed=4)
    assert first.digest == again.digest != other.digest
    assert [step.step for step in seen] == list(range(1, 7)) and {step.steps for step in seen} == {6}
    assert model.digest == before


def test_a_value_is_kept_in_a_folder(tmp_path: Path) -> None:
    value = begun()
    value.save(tmp_path)
    same = HFTokenValue.load(tmp_path)
    row = [[BOS, 0, 1, 2]]
    assert same.digest == value.digest
    torch.testing.assert_close(same.predict(row), value.predict(row))
    with pytest.raises(ModelError, match="no"):
        HFTokenValue.load(tmp_path / "elsewhere")


def test_misuse_is_refused() -> None:
    model, solutions = small_hf(), sampled(4)
    with pytest.raises(ValueError, match="no solutions"):
        fit_token_value(model, [])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fit_token_value(model, [Solution((BOS,), (7,), 1)])
    with pytest.raises(ValueError, match="context"):
        fit_token_value(model, [Solution((BOS,), (0,) * 30, 1)])
    with pytest.raises(ValueError, match="not of these"):
        fit_token_value(model, solutions, labels=prefix_labels(solutions[:2]))
    with pytest.raises(ValueError, match="lm_weight"):
        fit_token_value(model, solutions, lm_weight=-1)
    for wrong in ({"epochs": 0}, {"rate": 0.0}, {"clip": 0.0}):
        with pytest.raises(ValueError):
            Schedule(**wrong)  # type: ignore[arg-type]

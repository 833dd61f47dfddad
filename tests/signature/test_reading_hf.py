"""read() on a trained transformer: batches, windows and pieces change nothing, and Hugging Face's own loss agrees."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.model.hf import HFModel
from nextoken.signature import Signature, windows

BOOK = Path(__file__).parents[1] / "data" / "frankenstein.txt"
TEXT = BOOK.read_text(encoding="utf-8")


@cache
def _nano(context: int | None = None) -> HFModel:
    model = nextoken.load("nano")
    assert isinstance(model, HFModel)
    if context is not None:
        model.context_length = context
    return model


def _hugging_face_nats(model: HFModel, text: str, overlap: int) -> float:
    """-log p of a text from the model's own loss on the windows of the plan."""
    tokens = torch.tensor([model.vocab.bos_id, *model.vocab.encode(text).ids])
    assert model.context_length is not None
    total = 0.0
    for window in windows(len(tokens), model.context_length, overlap):
        ids = tokens[window.begin : window.end][None]
        labels = ids.clone()
        labels[:, : window.first - window.begin] = -100
        with torch.no_grad():
            total += model.model(input_ids=ids, labels=labels).loss.double().item() * window.scored
    return total


@pytest.mark.parametrize("overlap", [1, 32, 63])
def test_the_sum_is_hugging_faces_loss(overlap: int) -> None:
    model, text = _nano(64), TEXT[5_000:5_900]
    signature = nextoken.read(model, text, overlap=overlap)
    assert len(signature) > 3 * 64 and signature.text() == text
    assert signature.summary()["nats"] == pytest.approx(_hugging_face_nats(model, text, overlap), rel=1e-5)


@pytest.mark.slow
def test_the_sum_over_a_long_text_is_hugging_faces_loss() -> None:
    """The bar: 1e-4 relative, on about 30,000 tokens in windows of the model's whole context."""
    model = _nano()
    signature = nextoken.read(model, TEXT)
    assert signature.texts[0].size == len(BOOK.read_bytes()) and signature.text() == TEXT
    assert model.context_length is not None
    expected = _hugging_face_nats(model, TEXT, model.context_length // 2)
    assert signature.summary()["nats"] == pytest.approx(expected, rel=1e-4)


def test_every_column_by_softmax() -> None:
    model, text = _nano(), TEXT[:300]
    tokens = torch.tensor([[model.vocab.bos_id, *model.vocab.encode(text).ids]])
    with torch.no_grad():
        logits = model.model(input_ids=tokens).logits[0, :-1].double()
    targets = tokens[0, 1:]
    logp = torch.log_softmax(logits, -1)
    p, own = logp.exp(), logp.gather(1, targets[:, None])
    entropy = -(p * logp).sum(-1)
    moments = [(p * (-logp - entropy[:, None]) ** k).sum(-1) for k in range(5)]
    top = logp.topk(5, dim=-1)
    expected = {
        "logprob": own[:, 0],
        "mass_above": (p * (logp > own)).sum(-1),
        "entropy": entropy,
        "varentropy": moments[2],
        "skewness": moments[3] / moments[2] ** 1.5,
        "kurtosis": moments[4] / moments[2] ** 2,
        "collision": (p**2).sum(-1),
        "mean_logprob": logp.mean(-1),
        "std_logprob": logp.std(-1, correction=0),
        "top1_prob": p.amax(-1),
        "margin": p.topk(2).values.diff(dim=-1)[:, 0].abs(),
        "log_normalizer": logits.logsumexp(-1),
        "half_sum": p.sqrt().sum(-1),
        "quarter_sum": p.sqrt().sqrt().sum(-1),
        "cube_sum": (p**3).sum(-1),
        "fourth_sum": (p**4).sum(-1),
        "top_logprobs": top.values,
        "rest_mass": 1 - top.values.exp().sum(-1),
    }
    signature = nextoken.read(model, text, top=5)
    for name, values in expected.items():
        np.testing.assert_allclose(signature.column(name), values.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
    assert (signature.column("top_ids") == top.indices.numpy()).mean() > 0.99
    # Ranks may move by one where two logits are equal to rounding.
    assert np.abs(signature.column("rank") - (logp > own).sum(-1).numpy()).max() <= 1


def _near(a: Signature, b: Signature, tolerance: float) -> None:
    assert a.texts == b.texts
    for name in ("token_id", "position", "byte_start", "byte_end", "token"):
        assert (a.column(name) == b.column(name)).all()
    for name in ("logprob", "mass_above", "entropy", "varentropy", "margin", "half_sum", "top_logprobs", "rest_mass"):
        np.testing.assert_allclose(a.column(name), b.column(name), rtol=tolerance, atol=tolerance, err_msg=name)
    assert np.abs(a.column("rank") - b.column("rank")).max(initial=0) <= 1


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 160)), min_size=1, max_size=6),
    st.integers(8, 300),
)
def test_a_row_does_not_depend_on_its_batch(cuts: list[tuple[int, int]], batch_tokens: int) -> None:
    """Also where a window is fed in pieces, because it is longer than a batch."""
    texts = [TEXT[start : start + size] for start, size in cuts] + ["\U0001f600 é"]
    model = _nano()
    together = nextoken.read(model, texts, batch_tokens=batch_tokens)
    alone = Signature.concat([nextoken.read(model, text, names=f"text-{i}") for i, text in enumerate(texts)])
    _near(together, alone, 2e-5)
    assert [together.text(i) for i in range(len(texts))] == texts


def test_a_character_may_be_cut_into_tokens() -> None:
    text = "\U0001f9ec\U0001f600"
    signature = nextoken.read(_nano(), text)
    assert len(signature) > 2 and b"".join(signature.column("token")) == text.encode()
    assert signature.column("byte_end")[-1] == 8 and signature.text() == text
    assert any("\\x" in signature.vocab_labels[token] for token in signature.column("token_id").tolist())


def test_hidden_states_give_the_distributions() -> None:
    model = _nano()
    signature = nextoken.read(model, TEXT[:200], hidden=True)
    hidden = torch.tensor(signature.column("hidden"))
    logits = hidden @ model.model.get_output_embeddings().weight.T.float()
    targets = torch.tensor(signature.column("token_id")).long()
    logprob = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(signature.column("logprob"), logprob.detach().numpy(), atol=1e-4)

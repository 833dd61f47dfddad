"""ScalarValue: its formula, that it remembers as its body does, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nextoken.errors import ModelError
from nextoken.model.hf import HFModel
from nextoken.values.scalar_head import ScalarHead, ScalarValue


def small_hf(seed: int = 0) -> HFModel:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 30)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    return HFModel(transformers.LlamaForCausalLM(config), tokenizer, name=f"small{seed}")


def at_random(value: ScalarValue, seed: int = 5) -> ScalarValue:
    torch.manual_seed(seed)
    torch.nn.init.normal_(value.head.outer.weight)
    return value


def test_head_is_its_formula_and_begins_at_zero() -> None:
    head, hidden = ScalarHead(4, inner_size=3), torch.randn(2, 5, 4)
    assert torch.equal(head(hidden), torch.zeros(2, 5))
    torch.nn.init.normal_(head.outer.weight)
    torch.nn.init.constant_(head.outer.bias, 0.7)
    before = hidden.numpy() @ head.inner.weight.detach().numpy().T + head.inner.bias.detach().numpy()
    silu = before / (1 + 2.718281828459045**-before)
    expected = (silu * head.outer.weight.detach().numpy()[0]).sum(-1) + 0.7
    assert head(hidden).detach().numpy() == pytest.approx(expected, abs=1e-5)


def test_pieces_trees_and_rows_say_what_whole_texts_do() -> None:
    value = at_random(ScalarValue.on(small_hf()))
    rows = [[0, 5, 6, 7], [0, 8, -1, -1]]
    state = value.start(2)
    first = value.extend(state, rows)
    assert first[0].tolist() == pytest.approx(value.predict([rows[0]])[0].tolist(), abs=1e-5)
    assert first[1, :2].tolist() == pytest.approx(value.predict([[0, 8]])[0].tolist(), abs=1e-5)
    looked = value.extend(state, [[9, 10, 11], [12, 13, 14]], [-1, 0, -1])
    alone = value.predict([[0, 8, 12, 13]])[0]
    assert looked[1, :2].tolist() == pytest.approx(alone[2:].tolist(), abs=1e-5)
    state.keep([[0, 1], [2]])
    assert value.extend(state, [[3], [4]])[1, 0].item() == pytest.approx(
        value.predict([[0, 8, 14, 4]])[0, -1].item(), abs=1e-5
    )
    assert value.hidden(torch.tensor([[0, 5]])).requires_grad is False


def test_a_shared_body_is_never_trained_and_a_copy_leaves_the_model_alone() -> None:
    model = small_hf()
    before = model.digest
    shared, own = ScalarValue.on(model), ScalarValue.on_copy(model)
    assert len(shared.parameters()) == 4 and shared.body is model
    assert len(own.parameters()) == 4 + len(list(model.model.parameters()))
    at_random(own).head(own.hidden(torch.tensor([[0, 5, 6]]))).sum().backward()
    with torch.no_grad():
        for weight in own.parameters():
            if weight.grad is not None:
                weight -= 0.1 * weight.grad
    assert model.digest == before != own.body.digest


@pytest.mark.parametrize("make", [ScalarValue.on, ScalarValue.on_copy])
def test_what_is_loaded_says_the_same(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    model = small_hf()
    value = at_random(make(model))
    value.save(tmp_path)
    again = ScalarValue.load(tmp_path, body=None if value.owns_body else model)
    assert torch.equal(again.predict([[0, 4, 9]]), value.predict([[0, 4, 9]]))
    assert again.digest == value.digest and again.owns_body == value.owns_body
    assert (tmp_path / "body").exists() == value.owns_body


def test_another_body_or_a_broken_folder_is_refused(tmp_path: Path) -> None:
    model = small_hf()
    value = at_random(ScalarValue.on(model))
    value.save(tmp_path)
    with pytest.raises(ValueError, match="pass that model as body"):
        ScalarValue.load(tmp_path)
    with pytest.raises(ModelError, match="trained with another body"):
        ScalarValue.load(tmp_path, body=small_hf(1))
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path, broken)
    at_random(ScalarValue.on(model), seed=6).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "scalar_value.safetensors", broken / "scalar_value.safetensors")
    with pytest.raises(ModelError, match="not those it was saved with"):
        ScalarValue.load(broken, body=model)
    settings = json.loads((broken / "scalar_value.json").read_text())
    (broken / "scalar_value.json").write_text(json.dumps(settings | {"format": 9}))
    with pytest.raises(ModelError, match="another format"):
        ScalarValue.load(broken, body=model)
    with pytest.raises(ModelError, match=r"holds no scalar_value\.json"):
        ScalarValue.load(tmp_path / "nowhere", body=model)
    own = ScalarValue.on_copy(model)
    own.save(tmp_path / "own")
    with pytest.raises(ValueError, match="leave out body"):
        ScalarValue.load(tmp_path / "own", body=model)


def test_a_head_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width 8"):
        ScalarValue(small_hf(), ScalarHead(8))

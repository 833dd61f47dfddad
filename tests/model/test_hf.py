"""HFModel: loading and its errors, live models, heads that are not linear, interrupted calls, digest, limits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from nextoken.errors import ModelError
from nextoken.model import _digest
from nextoken.model._chains import ChainMemory
from nextoken.model._kv import KVMemory, SlotCache
from nextoken.model.base import ABSENT
from nextoken.model.hf import HFModel
from nextoken.model.loading import load
from nextoken.testing import check_language_model

V = 90


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 80)}}
    backend = Tokenizer(WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def llama(seed: int = 0, **settings: object) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        **{
            "vocab_size": V,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 24,
            "initializer_range": 0.2,
            **settings,
        }
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model")
    llama().save_pretrained(where)
    tokenizer().save_pretrained(where)
    return where


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder: Path, **settings: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


# Loading.


def test_a_saved_model_is_the_live_one(folder: Path) -> None:
    live, saved = HFModel(llama(), tokenizer()), HFModel.from_pretrained(folder, device="cpu")
    ids = [[0, 5, 9, 33, 2]]
    torch.testing.assert_close(saved.predict(ids).log_probs(), live.predict(ids).log_probs())
    assert saved.digest == live.digest != ""
    assert saved.name == str(folder) and live.name == "LlamaForCausalLM"
    assert saved.dtype == "float32" and saved.context_length == 24
    assert saved.vocab.size == V and saved.vocab.bos_id == 0 and saved.vocab.eos_ids >= {1}
    assert set(range(80, V)) <= saved.vocab.specials  # rows of the head that the tokenizer does not know
    assert load(str(folder)).digest == saved.digest


def test_precision_is_float32_on_a_cpu_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert HFModel.from_pretrained(tmp_path, device="cpu").dtype == "float32"
    assert HFModel.from_pretrained(tmp_path, device="cpu", dtype="auto").dtype == "bfloat16"
    assert HFModel.from_pretrained(folder, device="cpu", dtype=torch.float16).dtype == "float16"
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        HFModel.from_pretrained(folder, dtype="int8")


@pytest.mark.parametrize("spec", ["./no/such/folder", "/no/such/folder", "a/b/c", "no folder"])
def test_unknown_folder(spec: str) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        HFModel.from_pretrained(spec)


def test_unknown_id_without_network() -> None:
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        HFModel.from_pretrained("nobody/no-such-model", local_files_only=True)
    assert "\n" not in str(caught.value)


def test_a_file_or_a_folder_without_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give the folder"):
        HFModel.from_pretrained(folder / "config.json")
    with pytest.raises(ModelError, match=r"no config\.json"):
        HFModel.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights") as caught:
        HFModel.from_pretrained(copy)
    assert "save_pretrained" in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_weights_are_one_line(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        HFModel.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*lm_head"):
        HFModel.from_pretrained(copy)


def test_code_of_the_checkpoint_is_not_run_unasked(copy: Path) -> None:
    (copy / "modeling_evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    names = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    edit(copy, model_type="evil", architectures=["EvilForCausalLM"], auto_map=names)
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        HFModel.from_pretrained(copy)


def test_models_that_do_not_predict_the_next_token(copy: Path, tmp_path: Path) -> None:
    small = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**small, intermediate_size=32))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="masked language model"):
        HFModel.from_pretrained(tmp_path / "bert")
    live = transformers.BertLMHeadModel(transformers.BertConfig(**small, intermediate_size=32, initializer_range=0.5))
    with pytest.raises(ModelError, match="not causal"):
        HFModel(live, tokenizer())
    t5 = {"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}
    with pytest.raises(ModelError, match="encoder-decoder"):
        HFModel.from_pretrained(edit(copy, **t5))
    with pytest.raises(ModelError, match="no causal language model"):
        HFModel.from_pretrained(edit(copy, model_type="vit", is_encoder_decoder=False, architectures=["ViTModel"]))


def test_a_missing_tokenizer_can_be_given(folder: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer.*pass tokenizer="):
        HFModel.from_pretrained(tmp_path)
    for given in (folder, str(folder), tokenizer()):
        assert HFModel.from_pretrained(tmp_path, tokenizer=given).vocab.encode("w3 w4").ids == (3, 4)


def test_device_and_device_map_exclude_each_other(folder: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        HFModel.from_pretrained(folder, device="cpu", device_map="auto")


def test_attention_that_takes_no_masks_is_refused() -> None:
    network = llama()
    network.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ModelError, match="set_attn_implementation"):
        HFModel(network, tokenizer())


# Live models.


def test_a_live_model_stays_in_training_mode_but_is_run_in_evaluation_mode() -> None:
    network = llama(attention_dropout=0.5).train()
    network.lm_head.eval()
    model = HFModel(network, tokenizer())
    first, second = (model.predict([[0, 4, 8, 3]]).log_probs() for _ in range(2))
    assert torch.equal(first, second)
    assert network.training and network.model.training and not network.lm_head.training
    assert not first.requires_grad


def test_digest_follows_weights_precision_and_settings() -> None:
    network = llama()
    model = HFModel(network, tokenizer())
    before = model.digest
    assert before == model.digest == HFModel(llama(), tokenizer()).digest and len(before) == 16
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    digests = {
        before,
        model.digest,
        HFModel(llama(seed=1), tokenizer()).digest,
        HFModel(llama().to(torch.bfloat16), tokenizer()).digest,
        HFModel(llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), tokenizer()).digest,
    }
    assert len(digests) == 5


def test_digest_of_a_large_model_covers_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_digest, "_WHOLE", 0)
    monkeypatch.setattr(_digest, "_SAMPLE", 2)
    network = llama()
    before = _digest.fingerprint(network)
    assert before == _digest.fingerprint(llama())
    for parameter in network.parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[flat.numel() // 3] += 0.5
        after = _digest.fingerprint(network)
        assert after != before
        before = after


# Heads.


class Doubling(transformers.LlamaForCausalLM):
    """Its logits are not those of its head."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits = 2.0 * output.logits
        return output


class DeepHead(transformers.LlamaForCausalLM):
    """Its output layer is not linear."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, V))


@pytest.mark.parametrize("kind", [Doubling, DeepHead])
def test_without_a_linear_head_the_models_logits_are_used(kind: type[transformers.LlamaForCausalLM]) -> None:
    model = HFModel(kind(llama().config).eval(), tokenizer())
    assert not model.has_fused_head and model.supports_trees
    ids = torch.tensor([[0, 4, 8, 3, 7]])
    with torch.no_grad():
        expected = torch.log_softmax(model.model(ids).logits, -1)
    result = model.extend(model.start(), ids)
    torch.testing.assert_close(result.log_probs(), expected, atol=1e-5, rtol=0)
    assert result.hidden is None
    check_language_model(model)


def test_hidden_states_are_what_the_head_is_fed() -> None:
    model = HFModel(llama(), tokenizer())
    ids = torch.tensor([[0, 4, 8, 3, 7]])
    with torch.no_grad():
        expected = model.model(ids, output_hidden_states=True).hidden_states[-1]
    hidden = model.predict(ids).hidden
    assert hidden is not None
    torch.testing.assert_close(hidden, expected)


# Memory.


def test_equal_rows_are_fed_without_a_mask_and_others_with_one() -> None:
    model = HFModel(llama(), tokenizer())
    seen: list[bool] = []
    model.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask") is not None), with_kwargs=True
    )
    state = model.start(2)
    model.extend(state, [[3, 4, 5], [6, 7, ABSENT]])  # the absent token stands to the right of all others
    model.extend(state, [[8], [9]])
    model.extend(state, [[ABSENT], [9]])
    model.extend(state, [[10], [11]])
    model.extend(state, [[10, 12], [11, 13]], [-1, -1])
    assert seen == [False, True, True, False, True]


@pytest.mark.parametrize("recurrent", [False, True])
def test_an_interrupted_call_leaves_the_state_as_it_was(recurrent: bool) -> None:
    config = transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=8)
    network = transformers.MambaForCausalLM(config).eval() if recurrent else llama()
    model = HFModel(network, tokenizer())
    state = model.start(2)
    model.extend(state, [[0, 5, 6], [0, 7, ABSENT]])
    last = network.get_decoder().layers[-1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.extend(state, [[8, 9], [8, ABSENT]])
    hook.remove()
    assert state.lengths == (3, 2)
    result = model.extend(state, [[10, 11], [10, 11]]).log_probs()
    for row, prefix in enumerate(([0, 5, 6], [0, 7])):
        alone = model.predict([[*prefix, 10, 11]]).log_probs()[0, -2:]
        torch.testing.assert_close(result[row], alone, atol=2e-5, rtol=0)


def test_buffers_grow_without_losing_anything() -> None:
    model = HFModel(llama(max_position_embeddings=400), tokenizer())
    ids = torch.randint(2, 80, (1, 300), generator=torch.Generator().manual_seed(0))
    state = model.start()
    model.extend(state, ids[:, :50])
    pieces = [model.extend(state, ids[:, i : i + 1]).log_probs() for i in range(50, 300)]
    expected = model.predict(ids).log_probs()
    torch.testing.assert_close(torch.cat(pieces, 1), expected[:, 50:], atol=2e-5, rtol=0)
    assert isinstance(state.memory, KVMemory)
    sizes = {layer.buffers[0].shape[2] for layer in state.memory.cache.layers if layer.buffers is not None}
    assert sizes <= set(range(300, 300 + 64 + 150))


def test_keeping_a_path_moves_only_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HFModel(llama(), tokenizer())
    moved: list[tuple[list[list[int]], list[list[int]]]] = []
    move = SlotCache.move
    monkeypatch.setattr(
        SlotCache, "move", lambda self, a, b: (moved.append((a.tolist(), b.tolist())), move(self, a, b))[1]
    )
    state = model.start(2)
    model.extend(state, [[0, 5, 6], [0, 7, ABSENT]])
    model.extend(state, [[8, 9, 10], [8, 9, 10]], [-1, -1, 1])
    state.keep([[1, 2], [0]])
    assert moved == [([[4, 5], [2, 3]], [[3, 4], [2, 3]])]
    model.extend(state, [[8, 9], [8, 9]], [-1, 0])
    state.keep([0, 1])
    assert len(moved) == 1  # the beginning of a call stands where it belongs


def test_context_is_a_limit_also_for_rows_padded_beyond_it() -> None:
    config = transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=6)
    model = HFModel(transformers.GPT2LMHeadModel(config).eval(), tokenizer())
    state = model.start(2)
    model.extend(state, [[0, 2, 3, 4, 5, 6, ABSENT, ABSENT], [0, 2, 3, *[ABSENT] * 5]])
    assert state.lengths == (6, 3)
    result = model.extend(state, [[ABSENT] * 3, [4, 5, 6]])
    expected = model.predict([[0, 2, 3, 4, 5, 6]]).log_probs()[0, 3:]
    torch.testing.assert_close(result.log_probs()[1], expected, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="do not fit the context"):
        model.extend(state, [[7], [7]])
    nothing = model.extend(state, [[ABSENT], [ABSENT]])
    assert nothing.shape == (2, 1) and state.lengths == (6, 6)


def test_states_of_different_kinds_of_models_do_not_join() -> None:
    config = transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, state_size=8)
    recurrent = HFModel(transformers.MambaForCausalLM(config).eval(), tokenizer())
    attending = HFModel(llama(), tokenizer())
    for first, second in ((recurrent, attending), (attending, recurrent)):
        with pytest.raises(ValueError, match="same model"):
            first.start().join(second.start())


def test_rows_of_a_recurrent_model_share_passes_while_equally_long() -> None:
    config = transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, state_size=8)
    network = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4.0)  # so that a wrong way of going on shows
    model = HFModel(network, tokenizer())
    assert model.remembering == "steps"
    batches: list[int] = []
    model.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    state = model.start().fork([0, 0, 0])
    model.extend(state, [[2], [3], [4]])
    model.extend(state, [[2, 5], [3, ABSENT], [4, 6]])
    assert sorted(batches) == [1, 2, 2, 3]  # of the two rows with two tokens each is a step
    assert isinstance(state.memory, ChainMemory)
    assert sorted(sorted(block.members) for block in state.memory.blocks) == [[0, 2], [1]]


# The bundled model.


def test_bundled_model_reads_english() -> None:
    model = load("nano")
    assert isinstance(model, HFModel) and model.supports_trees and model.has_fused_head
    ids = [model.vocab.bos_id, *model.vocab.encode("It was the best of times, it was the worst of").ids]
    state = model.start()
    result = model.extend(state, [ids])
    likely = result[0, -1].statistics(top=20).top_ids
    assert likely is not None
    assert b" the" in [model.vocab.token_bytes[i] for i in likely[0, 0].tolist()]
    check_language_model(model)

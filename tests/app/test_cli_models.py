"""`nextoken models`, `methods` and `verify`: what they list is there, and what they claim was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nextoken import LanguageModel, TableModel, all_methods
from nextoken.model import Next, bundled_names, bundled_path, load

Run = Callable[..., Any]  # the fixture of conftest.py


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache of this test's own, empty at first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, name: str, architecture: str) -> None:
    """The model nano in the cache, under this name and calling itself by this architecture."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(bundled_path("nano"), snapshot)
    settings = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**settings, "architectures": [architecture]}))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)


# --- models -----------------------------------------------------------------------------------------------------------


def test_bundled_models_are_as_listed(run: Run) -> None:
    listed = json.loads(run("models", "--json").out)
    assert [entry["name"] for entry in listed["bundled"]] == list(bundled_names())
    assert listed["cached"] == []
    nano = next(entry for entry in listed["bundled"] if entry["name"] == "nano")
    model: Any = load("nano")
    assert nano["parameters"] == sum(parameter.numel() for parameter in model.model.parameters())
    assert nano["context_length"] == model.context_length
    card = (bundled_path("nano") / "README.md").read_text()
    assert len(nano["bits_per_byte"]) == 3
    for text, value in nano["bits_per_byte"].items():
        assert f"| {text} | {value:.3f} |" in card


def test_the_table_has_every_bundled_model(run: Run) -> None:
    finished = run("models")
    assert finished.code == 0
    for name in bundled_names():
        assert f" {name} " in finished.out
    assert "513,728" in finished.out and "cache: none" in finished.out


def test_causal_models_in_the_cache_are_listed(run: Run, cache: Path) -> None:
    put(cache, "someone/small", "LlamaForCausalLM")
    put(cache, "gpt", "GPT2LMHeadModel")
    put(cache, "someone/encoder", "BertModel")
    cached = json.loads(run("models", "--json").out)["cached"]
    assert [entry["name"] for entry in cached] == ["gpt", "someone/small"]
    assert {entry["parameters"] for entry in cached} == {513_728}
    assert "someone/small" in run("models").out


# --- methods ----------------------------------------------------------------------------------------------------------


def test_methods_are_the_registry(run: Run) -> None:
    listed = json.loads(run("methods", "--json").out)
    assert listed == [asdict(entry) for entry in all_methods()]
    assert listed and all(
        entry.keys() == {"name", "arxiv", "room", "access", "trained", "entry_point", "summary"} for entry in listed
    )


def test_methods_of_one_room(run: Run) -> None:
    room = all_methods()[0].room
    listed = json.loads(run("methods", "--room", room, "--json").out)
    assert [entry["name"] for entry in listed] == [entry.name for entry in all_methods() if entry.room == room]


def test_the_table_has_every_method(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    finished = run("methods")
    for entry in all_methods():
        assert entry.name in finished.out


# --- verify -----------------------------------------------------------------------------------------------------------


class Absentminded(TableModel):
    """A table that takes each token for another when it reads without remembering."""

    def _predict(self, tokens: torch.Tensor) -> Next:
        return super()._predict(torch.where(tokens >= 0, (tokens + 1) % self.vocab.size, tokens))


def test_a_sound_model_is_proved(run: Run) -> None:
    finished = run("verify", "nano")
    assert finished.code == 0 and finished.err == ""
    *proofs, last = finished.out.splitlines()
    assert len(proofs) >= 14 and all(line.startswith("ok ") and "off by" in line for line in proofs)
    assert last == f"nano keeps the contract: {len(proofs)} statements proved"


def test_a_broken_model_is_told_by_statement(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken: LanguageModel = Absentminded.random("abcdef", order=2, name="broken")
    monkeypatch.setattr("nextoken.app._verify.load_quietly", lambda _: broken)
    finished = run("verify", "broken")
    assert finished.code == 1
    lines = finished.out.splitlines()
    assert any(line.startswith("ok normalised") for line in lines)
    assert any(line.startswith("NO predicted") and "off by" in line for line in lines)
    assert lines[-1].startswith("broken breaks the contract: predicted")


def test_the_seed_and_the_tolerance_are_passed_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def check(model: LanguageModel, **options: Any) -> list[Any]:
        seen.update(options, model=model)
        return []

    sound = TableModel.random("ab")
    monkeypatch.setattr("nextoken.app._verify.load_quietly", lambda _: sound)
    monkeypatch.setattr("nextoken.testing.check_language_model", check)
    assert run("verify", "sound", "--seed", "7", "--tolerance", "0.25").code == 0
    assert (seen["model"], seen["seed"], seen["tolerance"]) == (sound, 7, 0.25)


def test_nothing_is_drawn_from_the_global_generator(run: Run) -> None:
    before = torch.get_rng_state()
    assert run("verify", "nano").code == 0
    assert torch.equal(before, torch.get_rng_state())


def test_a_pair_is_verified(run: Run) -> None:
    done = run("verify", "nano", "--speculate", "lookup")
    assert done.code == 0
    assert done.out.splitlines()[-1] == "nano says the same with lookup: 3 statements proved"

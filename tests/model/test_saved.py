"""Trained parts on disk come back as they were, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nextoken.errors import ModelError, OutputError
from nextoken.model import _saved


def part() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def write(folder: Path) -> None:
    _saved.save(folder, "small router", settings={"width": 3}, weights=part().state_dict(), digests={"model": "abc"})


def test_what_was_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    write(tmp_path / "new")
    saved = _saved.load(tmp_path / "new", "small router")
    again = nn.Linear(saved.settings["width"], 2)
    saved.fill(again)
    assert all(torch.equal(a, b) for a, b in zip(part().parameters(), again.parameters(), strict=True))
    assert not again.training
    saved.check(model="abc")
    saved.check(model="")


def test_bfloat16_and_scalars_are_told_apart() -> None:
    one = {"a": torch.tensor(1.0)}
    assert _saved.fingerprint(one) == _saved.fingerprint({"a": torch.tensor(1.0)})
    assert _saved.fingerprint(one) != _saved.fingerprint({"a": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert _saved.fingerprint(one) != _saved.fingerprint({"a": torch.tensor([1.0])})


def test_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ModelError, match="trained with another model"):
        _saved.load(tmp_path, "small router").check(model="other")


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ModelError, match="no whole small router"):
        _saved.load(tmp_path, "small router").fill(nn.Linear(4, 2))


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    described = tmp_path / "small_router.json"
    record = json.loads(described.read_text())
    described.write_text(json.dumps({**record, "weights": "0"}))
    with pytest.raises(ModelError, match="not those it was saved with"):
        _saved.load(tmp_path, "small router")


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0}', '{"format": 1}'])
def test_broken_settings_are_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "small_router.json").write_text(text)
    with pytest.raises(ModelError):
        _saved.load(tmp_path, "small router")


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no small_router"):
        _saved.load(tmp_path, "small router")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "file")

"""Importing nextoken and asking for help are quick, because nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "tokenizers", "pyarrow", "numpy", "scipy", "pandas", "safetensors", "huggingface_hub"}
LOADED = "import sys, json; {statement}; print(json.dumps([name for name in sys.modules if '.' not in name]))"


def loaded_by(statement: str) -> set[str]:
    program = [sys.executable, "-c", LOADED.format(statement=statement)]
    finished = subprocess.run(program, capture_output=True, text=True, check=True)
    return set(json.loads(finished.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import nextoken",
        "import nextoken.model, nextoken.methods, nextoken.errors",
        "import nextoken; dir(nextoken)",
        "import nextoken.app.cli",
        "import nextoken.app.cli as c; c.app(['--help'], standalone_mode=False)",
        "import nextoken.app.cli as c; c.app(['read', '--help'], standalone_mode=False)",
        "import nextoken.app.cli as c; c.app(['--version'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported(statement: str) -> None:
    assert not loaded_by(statement) & HEAVY


def test_the_probe_sees_what_is_imported() -> None:
    """Without this the test above would pass were `loaded_by` blind."""
    assert {"nextoken", "numpy"} <= loaded_by("import nextoken, numpy")


def test_every_public_name_is_there() -> None:
    names = "import nextoken; [getattr(nextoken, name) for name in nextoken.__all__]; nextoken.model.HFModel"
    assert "torch" in loaded_by(names)


def test_a_name_that_does_not_exist() -> None:
    import nextoken

    with pytest.raises(AttributeError, match="nonsense"):
        _ = nextoken.nonsense

"""The registry: entries are right, complete, and each paper has a test of its own."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from nextoken.methods import all_methods, method

TESTS = Path(__file__).parent


def test_entry_points_are_what_was_registered() -> None:
    entries = all_methods()
    assert len({entry.name for entry in entries}) == len(entries) > 20
    for entry in entries:
        module, qualname = entry.entry_point.split(":")
        thing = import_module(module)
        for part in qualname.split("."):
            thing = getattr(thing, part)
        assert thing.__doc__, entry.name
        assert entry.room == module.split(".")[1]
        assert entry.access in ("white", "gray", "black")


def test_every_paper_has_a_test() -> None:
    marked = {
        arxiv
        for path in TESTS.rglob("test_*.py")
        for arxiv in re.findall(r'mark\.paper\("([^"]+)"\)', path.read_text(encoding="utf-8"))
    }
    assert {entry.arxiv for entry in all_methods()} - {None} <= marked


def test_arxiv_numbers_look_like_one() -> None:
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv) for entry in all_methods() if entry.arxiv)


def test_a_name_is_registered_once() -> None:
    entry = all_methods()[0]
    with pytest.raises(ValueError, match="registered by"):
        method(name=entry.name, access="gray", summary="another")(test_a_name_is_registered_once)

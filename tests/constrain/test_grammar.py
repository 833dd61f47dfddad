"""JsonSchema and Lark: what they hold, and masks that are what advancing byte by byte says."""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.constrain import Constraint, JsonSchema, Lark, Masked, Place, Regex
from nextoken.decode.generate import generate
from nextoken.errors import NextokenError
from nextoken.model.vocab import Vocab

pytest.importorskip("llguidance")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["été", "winter"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = JsonSchema(SCHEMA)
BALANCED = Lark('start: pair*\npair: "(" start ")" | "[" start "]"')


def opened(text: str) -> int | None:
    """How many brackets are open at the end, None if one was closed that was not open."""
    stack: list[str] = []
    for letter in text:
        if letter in "([":
            stack.append({"(": ")", "[": "]"}[letter])
        elif not stack or stack.pop() != letter:
            return None
    return len(stack)


def test_a_grammar_is_no_regular_language() -> None:
    for size in range(7):
        for letters in itertools.product("([)]", repeat=size):
            text = "".join(letters)
            assert BALANCED.viable(text) == (opened(text) is not None), text
            assert BALANCED.complete(text) == (opened(text) == 0)
    deep = "([" * 40
    assert BALANCED.viable(deep) and BALANCED.complete(deep + "])" * 40) and not BALANCED.viable(deep + ")")


def test_a_grammar_of_one_terminal_is_its_regex() -> None:
    lark, regex = Lark("start: WORD\nWORD: /(ab|é)+b?a/"), Regex("(ab|é)+b?a")
    for size in range(6):
        for letters in itertools.product("abé", repeat=size):
            text = "".join(letters)
            assert (lark.complete(text), lark.viable(text)) == (regex.complete(text), regex.viable(text)), text
            assert lark.viable(text.encode() + b"\xc3") == regex.viable(text.encode() + b"\xc3")


values = st.fixed_dictionaries(
    {
        "name": st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), max_size=12),
        "age": st.integers(-9, 200),
    },
    optional={"tags": st.lists(st.sampled_from(["été", "winter", "x"]), max_size=3)},
)


@settings(max_examples=60, deadline=None)
@given(values, st.sampled_from([(",", ":"), (", ", ": ")]), st.data())
def test_it_holds_the_json_that_is_valid(
    value: dict[str, Any], separators: tuple[str, str], data: st.DataObject
) -> None:
    value = {name: value[name] for name in SCHEMA["properties"] if name in value}  # the order of the schema
    tags = value.get("tags", [])
    valid = 0 <= value["age"] <= 120 and len(tags) <= 2 and "x" not in tags
    text = json.dumps(value, separators=separators, ensure_ascii=False).encode()
    assert PERSON.complete(text) == valid
    if valid:
        cut = data.draw(st.integers(0, len(text)))
        place = PERSON.start().advance(text[:cut])
        assert place is not None and place.is_complete == (cut == len(text))
        after = place.advance(text[cut:])
        assert after is not None and after.is_complete and place.is_complete == (cut == len(text))


@pytest.mark.parametrize("whitespace", [" ?", "", r"[ \n]*"])
def test_whitespace_between_the_parts(whitespace: str) -> None:
    schema = JsonSchema(json.dumps({"type": "array", "items": {"type": "integer"}}), whitespace=whitespace)
    texts = ["[1,2]", "[1, 2]", "[1,  2]", "[1,\n2]"]
    fits = {" ?": 2, "": 1, r"[ \n]*": 4}[whitespace]
    assert [schema.complete(text) for text in texts] == [number < fits for number in range(4)]


PATHS = [
    (PERSON, '{"name": "Zoé x", "age": 12, "tags": ["été"]}'),
    (JsonSchema(SCHEMA, whitespace=""), '{"name":"\\"é\\n","age":7}'),
    (Lark('start: "hello" " " ("world" | "there") NUM?\nNUM: /[0-9]{1,2}/'), "hello world12"),
    (Lark('start: "été" start | "é"'), "étéétéé"),
]


def one_by_one(place: Place, vocab: Vocab) -> list[bool]:
    return [place.allows(token, vocab) for token in range(vocab.size)]


ODD = [
    b"a",
    b"\xc3",
    b"\xa9",
    b"",
    b"h",
    b"he",
    b"hello w",
    b"hello ",
    "é".encode(),
    b"",
    b"hello",
    b'{"',
    b'{"name',
    b"\xa9t",
]


@pytest.mark.parametrize("number", range(len(PATHS)))
def test_masks_are_what_advancing_says(number: int) -> None:
    """llguidance's own mask leaves, where bytes are forced, a single tokenisation of them; ours must not."""
    constraint, text = PATHS[number]
    vocab = Vocab([*ODD, *(bytes([byte]) for byte in range(32, 127)), b"12", b"e", b"hello t", b"w"], eos_ids=[9])
    data = text.encode()
    for size in range(len(data) + 1):
        place = constraint.start().advance(data[:size])
        assert place is not None
        assert place.allowed(vocab).tolist() == one_by_one(place, vocab), data[:size]
        following = place.advance(data[size : size + 1])
        assert following is not None  # a matcher that knows tokens reads bytes as well
        assert following.allowed(vocab).tolist() == one_by_one(following, vocab)


def test_masks_of_a_tokenizer_and_of_two_vocabularies() -> None:
    nano, odd = nextoken.load("nano").vocab, Vocab([*ODD, b'"'], eos_ids=[9])
    for size in (0, 9, 13, 23):
        place = PERSON.start().advance(PATHS[0][1].encode()[:size])
        assert place is not None
        for vocab in (nano, odd, nano):
            mask = place.allowed(vocab)
            some = [*range(0, vocab.size, 29), *mask.nonzero()[:50, 0].tolist()]
            assert all(bool(mask[token]) == place.allows(token, vocab) for token in some)
            half = torch.arange(vocab.size) % 2 == 0
            assert torch.equal(place.narrow(half, vocab), half & mask)


def test_what_a_model_writes_is_valid() -> None:
    model = nextoken.load("nano")
    schema: Constraint = JsonSchema({"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3})
    for seed in range(4):
        made = generate(model, "The list:", transform=Masked(schema), max_tokens=80, seed=seed)
        if made.finish == "eos":
            found = json.loads(made.text)
            assert len(found) <= 3 and all(isinstance(item, int) and item <= 99 for item in found)
        assert schema.viable(made.text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: JsonSchema("{"), "no JSON: Expecting property name"),
        (lambda: JsonSchema({"a": object()}), "no JSON: Object of type object"),
        (lambda: JsonSchema("[1]"), "an object, true or false; got list"),
        (lambda: JsonSchema(False), "no valid text"),
        (lambda: JsonSchema({"type": "foo"}), "Invalid type: foo"),
        (lambda: JsonSchema({"not": {}}), "Unimplemented keys"),
        (lambda: JsonSchema({"type": "string", "minLength": 3, "maxLength": 2}), "Unsatisfiable"),
        (lambda: JsonSchema(SCHEMA, whitespace="("), "unclosed group"),
        (lambda: Lark('start: "a" )'), "expecting rule"),
        (lambda: Lark("start: x"), 'unknown name: "x"'),
        (lambda: Lark('sum: "a"'), "no start rule"),
        (lambda: Lark(b"start:"), "a text"),
    ],
)
def test_what_is_refused_says_why(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_true_allows_any_json_and_reprs_tell_what_it_is() -> None:
    anything = JsonSchema(True)
    assert anything.complete('{"a": [null, 1.5]}') and not anything.viable("x")
    assert not anything.viable(r'"\u00e9')  # characters as they are
    assert repr(anything) == "JsonSchema(True)" and repr(Lark('start: "a"')) == "Lark('start: \"a\"')"


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (lambda: Lark('start: "a"'), lambda: JsonSchema(True)):
        with pytest.raises(NextokenError, match=r"pip install 'nextoken\[grammar\]'"):
            make()

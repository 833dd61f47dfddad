"""Regex: against `re` itself, on every text of a small alphabet and on texts and patterns made up."""

from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.constrain import Choice, Constraint, Place, Regex
from nextoken.constrain._characters import ByteTrees, complement, merged
from nextoken.model.vocab import Vocab

ALPHABET = ("a", "b", "\n", "é")
TEXTS = ["".join(letters) for size in range(6) for letters in itertools.product(ALPHABET, repeat=size)]
# Of at most 3 bytes, most of them no UTF-8. Those that are viable under a pattern below can be finished within 4
# characters of the alphabet, or of others that begin as é does.
BEGINNINGS = [bytes(some) for size in range(4) for some in itertools.product(b"ab\n\xc3\xa9", repeat=size)]
COMPLETIONS = ["".join(letters) for size in range(5) for letters in itertools.product("ab\néàÉü×", repeat=size)]

PATTERNS = [
    r"a\Z$\n?", r"(?m)a$\Z\n?",
    "", "a", "ab|ba", "(a|b)*", "a+b?", "a*?b", "(?:ab){1,2}", "a{2}", "a{,2}b", "[ab]é", "[^a]*", ".*", "(?s).{1,3}",
    ".é", "é+", "[é-ü]", "[à-ê]b", r"\w+", r"\W\w", r"(?a:\w)b*", r"(?a)\W+", r"\s|\S\s", r"[^\W_]{2}", r"[\W\w]a",
    "^a", "a$", "a^b|b", "a$b|a", r"\Aab\Z", r"a\Z\n?", "a$\n?", "(a$|b)\n", "(?m)a$\n^b", "(?m)^a$|b",
    "(?m)(^a$\n?)*", "(?m)a^b|a", "(?m:^)b$\n", "(^|b)a", "(^a|^b)b", "(a|$)*", "(a|^)*b", "(?i)A[B-C]", "(?i)É.?",
    "(?i:A)B?", "(a|)(b|)", "((a)|(b))*a", "(a?){3}", "(?:){5}a", "(a*)*", "[\n\u00e9](?m:^)b",
    "(?m)([\n\u00e9]^b|a)", "a(?#note)b", "(?x) a b # c", "[a-z&&b]", "(?P<first>a)b", r"\x61\u00e9", "(?s:.)b",
    "(?-i:a)", "(?i)ſ|a", "a{0}", "(?m)$\n", r"(?m)a\Z",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_fullmatch_and_its_beginnings_are_exact(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `re` on [a-z&&b]
        oracle, regex = re.compile(pattern), Regex(pattern)
    assert [text for text in TEXTS if regex.complete(text)] == [text for text in TEXTS if oracle.fullmatch(text)]
    viable = {text.encode()[:size] for text in COMPLETIONS if oracle.fullmatch(text) for size in range(4)}
    assert [some for some in BEGINNINGS if regex.viable(some)] == [some for some in BEGINNINGS if some in viable]


ATOMS = ("a", "b", ".", "é", "[ab]", "[^a]", r"\w", r"\n", "^", "$", r"\A", r"\Z", "(?i:A)", "(?s:.)", "")
patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(["*", "?", "{2}", "{0,2}", "*?"])).map("(?:{0[0]}){0[1]}".format),
        inner.map("(?m:{})".format),
    ),
    max_leaves=5,
)
SOME = [text for text in TEXTS if len(text) <= 4]


@settings(max_examples=100, deadline=None)
@given(patterns)
def test_any_pattern_is_fullmatch(pattern: str) -> None:
    oracle = re.compile(pattern)
    matching = [text for text in SOME if oracle.fullmatch(text)]
    try:
        regex = Regex(pattern)
    except ValueError as refused:
        assert "matches no text" in str(refused) and not matching
        return
    assert [text for text in SOME if regex.complete(text)] == matching
    for text in matching:
        assert all(regex.viable(text.encode()[:size]) for size in range(len(text.encode()) + 1))
    # Nothing is a dead end: from every place some byte leads on, or the text is complete.
    for text in SOME:
        place = regex.start().advance(text.encode())
        assert place is None or place.is_complete or any(place.advance(bytes([byte])) for byte in range(256))


CLASSES = [
    r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"(?a)\d", r"(?a)\w", r"(?a)\S", r"[^\w\s]", r"[\d_-]", "(?i)k",
    "(?i)[k]", "(?i)ſ", "(?i)[^s]", "(?i)[a-ÿ]", "(?ai)k", "(?ai)[k-s]", ".", "[ -~]", "[^ -~]", "[\ud7ff-\ue000]",
    "[\U00010000-\U0010ffff]", "[߿-ࠀ]", "(?i)ǆ", "(?i)ß", "(?i)İ",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.characters(exclude_categories=["Cs"]))
def test_classes_hold_the_characters_they_hold_for_re(character: str) -> None:
    for pattern in CLASSES:
        regex, spelled = compiled(pattern), character.encode()
        matches = re.fullmatch(pattern, character) is not None
        assert regex.complete(character) == matches
        assert not matches or all(regex.viable(spelled[:size]) for size in range(len(spelled)))


@pytest.mark.parametrize("pattern", CLASSES)
def test_classes_hold_every_character_at_their_edges(pattern: str) -> None:
    oracle = re.compile(pattern)
    every = [chr(c) for c in range(0x3000)] + [chr(c) for c in range(0xD780, 0x110000, 97) if not 0xD800 <= c < 0xE000]
    assert [c for c in every if compiled(pattern).complete(c)] == [c for c in every if oracle.fullmatch(c)]


def compiled(pattern: str, kept: dict[str, Regex] = {}) -> Regex:  # noqa: B006
    return kept.setdefault(pattern, kept.get(pattern) or Regex(pattern))


code_points = st.one_of(
    st.integers(0, 0x10FFFF), st.sampled_from([0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xDFFF, 0xE000, 0xFFFF, 0x10000])
)


@given(st.lists(st.tuples(code_points, code_points).map(lambda pair: (min(pair), max(pair)))), st.lists(code_points))
def test_trees_spell_ranges_of_characters(ranges: list[tuple[int, int]], others: list[int]) -> None:
    united, trees = merged(ranges), ByteTrees()
    assert complement(complement(united)) == united
    root = trees.root(united)
    edges = {edge + near for pair in ranges for edge in pair for near in (-1, 0, 1)}
    for point in {point for point in edges | {*others} if 0 <= point < 0xD800 or 0xE000 <= point < 0x110000}:
        node: int | None = root
        for byte in chr(point).encode():
            node = next((child for low, high, child in trees.nodes[node or 0] if low <= byte <= high), None)
        assert (node == ByteTrees.DONE) == any(low <= point <= high for low, high in ranges)


def one_by_one(place: Place, vocab: Vocab) -> torch.Tensor:
    """The mask by one `advance` per token."""
    return torch.tensor([place.allows(token, vocab) for token in range(vocab.size)])


NANO = [
    "[A-Z][a-z ]{3,12}[.]",
    r"(\w+ ){1,4}\w+",
    "(?s).*",
    r'"(?:[^"\\]|\\.)*"',
    "é+|[à-ü]{2}",
    r"\d{4}-\d\d",
    "(the|it) (is|was)",
]


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(NANO), st.data())
def test_masks_are_what_advancing_says(pattern: str, data: st.DataObject) -> None:
    vocab = nextoken.load("nano").vocab
    place: Place = compiled(pattern).start()
    for _ in range(data.draw(st.integers(0, 4))):
        choices = place.allowed(vocab).nonzero()[:, 0].tolist()
        token = data.draw(st.sampled_from([t for t in choices if t not in vocab.eos_ids] or [0]))
        place = place.advance(vocab.token_bytes[token]) or place
    mask, expected = place.allowed(vocab), one_by_one(place, vocab)
    assert torch.equal(mask, expected)
    mask[:] = False  # the caller's own: what is kept stays as it was
    assert torch.equal(place.allowed(vocab), expected)
    half = torch.arange(vocab.size) % 2 == 0
    assert torch.equal(place.narrow(half, vocab), half & expected)


def test_masks_of_a_vocabulary_of_odd_tokens() -> None:
    tokens = [
        b"a",
        b"\xc3",
        b"\xa9",
        b"",
        b"a\xc3",
        "é".encode(),
        b"",
        b"a",
        b"aaaa",
        b"\x00",
        b"\xa9a",
        "aéa".encode(),
        b"b",
    ]
    vocab = Vocab(tokens, eos_ids=[6, 12])
    for read in ("", "a", "aé"):
        place = Regex("(aé?)*").start().advance(read.encode())
        assert place is not None
        for here in (place, place.advance(b"a\xc3")):
            assert here is not None and torch.equal(here.allowed(vocab), one_by_one(here, vocab))
    empty = Vocab([b"", b""], eos_ids=[1])
    assert Regex("a?").start().allowed(empty).tolist() == [False, True]


def test_what_is_forgotten_is_found_again() -> None:
    vocab = nextoken.load("nano").vocab
    regex = Regex(r"(?:\w+ )*the .{0,30}")
    place = regex.start().advance(b"it was the end")
    assert place is not None
    before, forgotten = place.allowed(vocab), regex._automaton.forgotten
    regex._automaton.MOST_ITEMS = 0  # type: ignore[misc]
    for _ in range(2):
        assert torch.equal(place.allowed(vocab), before)
        assert regex.complete("it was the end") and not regex.viable("it was. ")
    assert regex._automaton.forgotten > forgotten
    start = regex.start()  # has another number now, and must not get the mask that was kept under it
    assert torch.equal(start.allowed(vocab), Regex(regex.pattern).start().allowed(vocab))


def test_places_are_values() -> None:
    place = Regex("ab*").start()
    after = place.advance(b"a")
    assert after is not None and after.is_complete and not place.is_complete
    assert place.advance(b"b") is None and after.advance(b"b") is not None
    assert place.advance(b"") is not None


@given(st.lists(st.text(max_size=4), min_size=1, max_size=5), st.text(max_size=4))
def test_a_choice_is_its_texts(texts: list[str], other: str) -> None:
    choice: Constraint = Choice(texts)
    assert all(choice.complete(text) for text in texts)
    assert choice.complete(other) == (other in texts)
    assert choice.viable(other) == any(text.startswith(other) for text in texts)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("b(?=a)", r"lookaround, '\(\?=' at position 1"),
        ("[(?=](?<!a)b", r"lookaround, '\(\?<!' at position 5"),
        (r"\\(a)\1", r"a backreference, '\\\\1' at position 5"),
        ("(?P<x>a)(?P=x)", r"a backreference, '\(\?P=' at position 8"),
        (r"[\b]x\b", r"a word boundary, '\\\\b' at position 5"),
        (r"x\B", "a word boundary"),
        ("(?#a*+)a*+", r"a possessive quantifier, '\*\+' at position 8"),
        ("(?>a)", "an atomic group"),
        ("(a)(?(1)b|c)", r"a conditional group, '\(\?\(' at position 3"),
        ("(?x) a # (?=\n (?=b)", "lookaround, .* at position 14"),
        ("(a", r"malformed: missing \), unterminated subpattern at position 0"),
        ("a{99999999999999}", "repetition number is too large"),
        ("a{60000}", "more than 50000 states"),
        ("((a{300}){300}){300}", "more than 50000 states"),
        ("(" * 3000 + ")" * 3000, "nested too deeply"),
        ("a^b", "matches no text"),
        (r"[^\s\S]", "matches no text"),
        ("\ud800", "matches no text"),
    ],
)
def test_what_is_refused_says_why(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Regex(pattern)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a text \(str\), got bytes"):
        Regex(b"a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        Choice([])
    assert Regex("a") == Regex("a") != Regex("b") and len({Regex("a"), Regex("a")}) == 1

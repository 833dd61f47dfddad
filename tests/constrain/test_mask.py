"""Masked: the law of local masking by enumeration, and the same text whatever else is at work."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextoken.constrain import Constraint, DeadEnd, Masked, Predicate, Regex, mask
from nextoken.decode import Chain, Context, EmptyDistribution, Temperature, TopK, TopP
from nextoken.decode.generate import generate
from nextoken.decode.search import beam_search
from nextoken.decode.transform import Transform
from nextoken.model.table import TableModel
from nextoken.speculate import DraftModel, Follow, Speculation

MODEL = TableModel.random(["a", "b", "ab", "ba"], order=2, eos=True, seed=5)
END = MODEL.vocab.size - 1
LONGEST = 4
PATTERNS = ["(ab)*a?", "a{2,4}", "[ab]*ba", "(a|bb)+", "b?a?b?a?"]


def law(pattern: str) -> dict[tuple[int, ...], float]:
    """Each string of at most LONGEST tokens with prod p(x_t) c(x_t) / Z_t, from `re` and the table alone."""
    spelled = MODEL.vocab.token_bytes
    texts = ["".join(letters) for size in range(10) for letters in itertools.product("ab", repeat=size)]
    members = {text for text in texts if re.fullmatch(pattern, text)}
    beginnings = {text[:size] for text in members for size in range(len(text) + 1)}
    found: dict[tuple[int, ...], float] = {}

    def walk(string: tuple[int, ...], chance: float) -> None:
        if len(string) == LONGEST or string[-1:] == (END,):
            found[string] = chance
            return
        text = b"".join(spelled[token] for token in string).decode()
        fits = [
            text in members if token == END else bool(spelled[token]) and text + spelled[token].decode() in beginnings
            for token in range(MODEL.vocab.size)
        ]
        row = MODEL.row(string).exp() * torch.tensor(fits)
        for token in row.nonzero()[:, 0].tolist():
            walk((*string, token), chance * float(row[token] / row.sum()))

    walk((), 1.0)
    assert sum(found.values()) == pytest.approx(1)
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_law_is_that_of_local_masking(pattern: str) -> None:
    expected, masked = law(pattern), Masked(Regex(pattern))

    def chance(string: tuple[int, ...]) -> float:
        total = 0.0
        for size, token in enumerate(string):
            context = Context(outputs=[string[:size]], vocab=MODEL.vocab)
            total += float(torch.log_softmax(masked(MODEL.row(string[:size])[None], context), -1)[0, token])
        return math.exp(total)

    for string, probability in expected.items():
        assert chance(string) == pytest.approx(probability, rel=1e-9)
    for seed in range(15):
        made = generate(MODEL, "", transform=masked, max_tokens=LONGEST, seed=seed)
        assert math.exp(-math.fsum(made.surprisals)) == pytest.approx(expected[made.tokens], rel=1e-9)
        assert made.finish == "length" or re.fullmatch(pattern, made.text)
        assert made.drawn.column("logprob").tolist() == pytest.approx([-s for s in made.surprisals], abs=1e-6)


def test_a_set_of_everything_changes_nothing() -> None:
    for seed in range(10):
        free = generate(MODEL, "ab", transform="temperature(0.8)", max_tokens=12, seed=seed)
        masked = generate(MODEL, "ab", transform=Masked(Regex("(?s).*")) | Temperature(0.8), max_tokens=12, seed=seed)
        assert masked.tokens == free.tokens and masked.surprisals == pytest.approx(free.surprisals)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PATTERNS), st.integers(0, 2**32), st.sampled_from([Chain(), Temperature(0.5), TopP(0.6), TopK(1)])
)
def test_a_text_that_ended_is_of_the_set(pattern: str, seed: int, rest: Transform) -> None:
    constraint = Regex(pattern)
    made = generate(MODEL, "", transform=Masked(constraint) | rest, max_tokens=8, seed=seed)
    assert constraint.complete(made.text) if made.finish == "eos" else constraint.viable(made.text)


def test_rows_beside_it_and_drafts_change_nothing() -> None:
    rule = Masked(Regex("(a|b){3,9}")) | Temperature(0.9)
    together = generate(MODEL, ["a", "ab", "b"], transform=rule, max_tokens=12, n=3, seed=2)
    assert isinstance(together, list)
    for number, prompt in enumerate(("a", "ab", "b")):
        alone = generate(MODEL, prompt, transform=Masked(Regex("(a|b){3,9}")) | Temperature(0.9), max_tokens=12, seed=2)
        assert together[3 * number].tokens == alone.tokens
        for way in ("lookup", "suffix", Speculation(DraftModel(MODEL), acceptance=Follow())):
            drafted = generate(MODEL, prompt, transform=rule, max_tokens=12, seed=2, speculate=way)
            assert drafted.tokens == alone.tokens


def test_beams_find_the_likeliest_string_of_the_law() -> None:
    expected = law("(ab)*a?")
    best = beam_search(MODEL, "", width=40, max_tokens=LONGEST, length_penalty=0.0, transform=Masked(Regex("(ab)*a?")))
    likeliest = sorted(expected.values(), reverse=True)
    assert [math.exp(-math.fsum(g.surprisals)) for g in best[:5]] == pytest.approx(likeliest[:5], rel=1e-9)


def test_places_that_were_dropped_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Masked(Regex("(a|b){3,9}"))
    expected = generate(MODEL, "a", transform=Masked(Regex("(a|b){3,9}")), n=6, max_tokens=10, seed=3)
    monkeypatch.setattr(mask, "_MOST_PLACES", 2)
    made = generate(MODEL, "a", transform=rule, n=6, max_tokens=10, seed=3)
    assert isinstance(made, list) and isinstance(expected, list)
    assert [g.tokens for g in made] == [g.tokens for g in expected]
    assert len(rule._places) == 2
    assert rule == Masked(Regex("(a|b){3,9}")) and hash(rule) == hash(Masked(Regex("(a|b){3,9}")))


def test_reading_goes_on_from_what_is_known() -> None:
    asked: list[str] = []
    constraint = Predicate(bool, viable=lambda text: asked.append(text) or True)
    masked, counts = Masked(constraint), []
    for size in range(1, 6):
        asked.clear()
        masked._place((0,) * size, MODEL.vocab)
        counts.append(len(asked))
    assert counts == [1] * 5
    masked._place((2, 1), MODEL.vocab), asked.clear()
    masked._place((0, 1, 1), MODEL.vocab)  # "ab" was read as one token
    assert asked == []


def test_after_an_end_there_are_only_ends() -> None:
    for seed in range(10):
        made = generate(MODEL, "", transform=Masked(Regex("(ab)*")), max_tokens=9, seed=seed, ignore_eos=True)
        first = (*made.tokens, END).index(END)
        assert set(made.tokens[first:]) <= {END}


def dead(constraint: Constraint, *rest: Transform, model: TableModel = MODEL) -> DeadEnd:
    with pytest.raises(DeadEnd) as caught:
        generate(model, "", transform=Chain((*rest[:1], Masked(constraint), *rest[1:])), max_tokens=9, seed=0)
    return caught.value


def test_dead_ends_tell_how_far_it_came() -> None:
    unspelled = dead(Regex("aac"))
    assert (
        unspelled.text == b"aa" and "output 'aa'" in str(unspelled) and "no token of the vocabulary" in str(unspelled)
    )
    assert isinstance(unspelled, EmptyDistribution)
    leads_nowhere = dead(Predicate(lambda text: False, viable=lambda text: len(text) < 5))
    assert len(leads_nowhere.text) in (3, 4)
    truncated = dead(Regex("[ab]{5}b"), TopK(1), model=TableModel.given({(): [1.0, 0.0, 0.0]}, ["a", "b"], eos=True))
    assert truncated.text == b"aaaaa" and "probability 0" in str(truncated)
    outside = Context(outputs=[[1, 1]], vocab=MODEL.vocab)
    with pytest.raises(DeadEnd, match="no text that begins with 'b'"):
        Masked(Regex("a*"))(torch.zeros(1, MODEL.vocab.size), outside)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="no end token"):
        generate(TableModel.random(3, seed=0), "", transform=Masked(Regex("a")))
    with pytest.raises(ValueError, match="give the Context a vocab"):
        Masked(Regex("a"))(torch.zeros(1, 3), Context(outputs=[[]]))
    with pytest.raises(ValueError, match="takes a constraint"):
        Masked("a")  # type: ignore[arg-type]


def test_scores_are_left_as_they_were() -> None:
    scores = torch.zeros(2, MODEL.vocab.size)
    masked = Masked(Regex("a*"))(scores, Context(outputs=[[], [0]], vocab=MODEL.vocab))
    assert bool((scores == 0).all()) and masked.tolist()[1] == [0.0, *[-math.inf] * 4, 0.0]

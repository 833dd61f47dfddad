"""Labels of diverging tokens: a grammar whose synonyms rejoin and whose branches do not, brute force, and training."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nextoken.decode.generate import generate
from nextoken.head import Head
from nextoken.model.base import LanguageModel, NoMemory, State
from nextoken.model.next import HeadNext, Next
from nextoken.model.table import TableModel
from nextoken.route.divergence import Difference, Divergences, LargeAnswer, find_divergences, sentence_ends
from nextoken.route.neural_router import NeuralRouter, RouterSizes
from nextoken.route.r2r import R2R
from nextoken.route.token_router import EntropyRouter
from nextoken.route.token_router_fit import TokenRouterRecipe, examples_of, fit_token_router, recall_threshold
from nextoken.route.verifier import AskedVerifier, Fork, SameAnswer, SameRest, asking

SYMBOLS = ["s", "t", "m", "p", "q", ".", "=", "1", "2"]
S, T, M, P, Q, DOT, EQUALS, ONE, TWO, BOS, EOS = range(11)


def grammar(name: str, *, s: float, p_after_1: float, p_after_2: float) -> TableModel:
    """x (s|t) m (p|q) . = (1|2): s and t come to the same; p makes the answer 1 and q makes it 2."""

    def row(**shares: float) -> list[float]:
        spelt = {**{symbol: symbol for symbol in "stmpq"}, "dot": ".", "equals": "=", "one": "1", "two": "2"}
        named = {spelt.get(key, key): share for key, share in shares.items()}
        return [named.get(symbol, 0.0) for symbol in [*SYMBOLS, "eos"]]

    rows = {
        (): row(m=1.0),
        (BOS,): row(one=0.5, two=0.5),
        (P,): row(dot=1.0),
        (Q,): row(dot=1.0),
        (DOT,): row(equals=1.0),
        (P, DOT, EQUALS): row(one=1.0),
        (Q, DOT, EQUALS): row(two=1.0),
    }
    for x, share in ((ONE, p_after_1), (TWO, p_after_2)):
        rows |= {(BOS, x): row(s=s, t=1 - s), (EQUALS, x): row(eos=1.0)}
        rows |= {(x, word, M): row(p=share, q=1 - share) for word in (S, T)}
    return TableModel.given(rows, SYMBOLS, eos=True, name=name)


# The small model is the least sure of all where it does not matter.
SMALLER = grammar("smaller", s=0.49, p_after_1=0.9, p_after_2=0.55)
LARGER = grammar("larger", s=0.7, p_after_1=0.95, p_after_2=0.1)
ANSWERS = [
    LargeAnswer((BOS, ONE, S, M, P, DOT, EQUALS, ONE, EOS), 2),
    LargeAnswer((BOS, TWO, S, M, Q, DOT, EQUALS, TWO, EOS), 2),
]


def last_digit(text: tuple[int, ...]) -> int:
    return max(token for token in text[-2:] if token != EOS)


def test_the_answers_are_the_large_models() -> None:
    for answer, prompt in zip(ANSWERS, "12", strict=True):
        assert LargeAnswer.of(generate(LARGER, prompt, transform="greedy", max_tokens=20)) == answer


def of_the_answer(context: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return (P in one) != (P in other)


@pytest.mark.paper("2505.21600")
@pytest.mark.parametrize(
    ("verifier", "ends"),
    [(SameRest(), []), (SameAnswer(LARGER, last_digit), None), (of_the_answer, None)],
    ids=["rest of the text", "answer", "a function"],
)
def test_labels_recover_the_construction(verifier, ends) -> None:  # type: ignore[no-untyped-def]
    found = find_divergences(SMALLER, LARGER, ANSWERS, verifier=verifier, ends=ends)
    assert [(place.answer, place.position, place.divergent) for place in found.differences] == [
        (0, 2, False),
        (1, 2, False),
        (1, 4, True),
    ]
    assert found.own == ((T, M, P, DOT, EQUALS, ONE, EOS), (T, M, P, DOT, EQUALS, TWO, EOS))
    assert (found.tokens, found.divergent) == (14, 1)


def test_a_sentence_is_all_that_is_compared() -> None:
    """With sentences to the full stop the two ways part and are the same again, though their answers differ."""
    found = find_divergences(SMALLER, LARGER, ANSWERS, verifier=SameRest())
    assert found.differences[-1] == Difference(1, 4, (Q, DOT), (P, DOT), False)
    assert found.divergent == 0
    longer = find_divergences(SMALLER, LARGER, ANSWERS, verifier=SameRest(), ends=[], max_tokens=4)
    assert longer.differences[-1] == Difference(1, 4, (Q, DOT, EQUALS, TWO), (P, DOT, EQUALS, ONE), True)


def brute(
    small: TableModel, large: TableModel, answer: LargeAnswer, stops: set[int], most: int
) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Every difference with both its ways, token by token from the tables."""
    found = []
    for t in range(answer.given, len(answer.tokens)):
        prefix = answer.tokens[:t]
        y = int(small.row(prefix[1:]).argmax())
        if y == answer.tokens[t]:
            continue
        one, other = [answer.tokens[t]], [y]
        while one[-1] not in stops and len(one) < most and t + len(one) < len(answer.tokens):
            one.append(answer.tokens[t + len(one)])
        while other[-1] not in stops and len(other) < most:
            other.append(int(large.row((*prefix[1:], *other)).argmax()))
        found.append((t, tuple(one), tuple(other)))
    return found


@pytest.mark.paper("2505.21600")
@given(
    st.integers(0, 4),
    st.lists(st.integers(0, 3), min_size=2, max_size=10),
    st.sets(st.integers(0, 3), max_size=2),
    st.integers(1, 6),
    st.integers(1, 4),
)
@settings(max_examples=20, deadline=None)
def test_ways_are_the_brute_forces(seed: int, body: list[int], ends: set[int], most: int, max_rows: int) -> None:
    small = TableModel.random(4, order=1, seed=seed, eos=True)
    large = TableModel.random(4, order=2, seed=seed + 50, eos=True)
    answers = [LargeAnswer((4, *body), 1), LargeAnswer((4, *body, 5), 2)]
    asked: list[tuple[tuple[int, ...], ...]] = []

    def verifier(*fork: tuple[int, ...]) -> None:
        asked.append(fork)

    found = find_divergences(small, large, answers, verifier=verifier, ends=ends, max_tokens=most, max_rows=max_rows)
    expected = [(n, *way) for n, answer in enumerate(answers) for way in brute(small, large, answer, {*ends, 5}, most)]
    assert [(d.answer, d.position, d.one, d.other) for d in found.differences] == expected
    assert asked == [(answers[n].tokens[:t], one, other) for n, t, one, other in expected]
    assert all(place.divergent is None for place in found.differences) and found.divergent == 0


def test_sentences_end_at_marks_line_breaks_and_end_tokens() -> None:
    model = TableModel.random(["a", ".", "no.", "? ", ".5", "x\ny", ",", "!"], order=1, eos=True, seed=0)
    assert sentence_ends(model.vocab) == {1, 2, 3, 5, 7, 9}
    assert sentence_ends(model.vocab, marks=",") == {5, 6, 9}


def test_a_model_asked_for_a_digit_always_says_one() -> None:
    """Odds by hand from the table, where the question ends in the other way's first token."""
    model = TableModel.random(["a", "b", "0", "1", " 1", "<", ">", " "], order=2, seed=5)
    forks = [Fork((0, 1), (0, 1), (1, 0)), Fork((0,), (1,), (0, 0, 1))]
    asked: list[tuple[str, str, str]] = []

    def question(context: str, one: str, other: str) -> str:
        asked.append((context, one, other))
        return f"{other}<{context}"

    verifier = AskedVerifier(model, vocab=model.vocab, question=question, context_bytes=1, max_rows=1)
    expected = []
    for fork in forks:
        p = model.row([5, fork.context[-1]]).exp().tolist()
        expected.append(math.log(p[3] + p[4]) - math.log(p[2]))
    assert [verifier.log_odds([fork])[0] for fork in forks] == pytest.approx(expected)
    assert asked == [("b", "<<a>>b", "<<b>>a"), ("a", "<<b>>", "<<a>>ab")]
    assert verifier.log_odds(forks) == pytest.approx(expected)
    for margin in (-9.0, 9.0, sum(expected) / 2):
        strict = AskedVerifier(model, vocab=model.vocab, question=question, context_bytes=1, margin=margin)
        assert strict.judge(forks) == [odds > margin for odds in expected]
    assert "<<b>>a" in str(asking("ab", "<<a>>b", "<<b>>a"))
    with pytest.raises(ValueError, match="spells 1"):
        AskedVerifier(LARGER_WITHOUT_DIGITS, vocab=LARGER.vocab)


LARGER_WITHOUT_DIGITS = TableModel.random(3, seed=0)


class LastToken(LanguageModel):
    """Its hidden state has a 1 at the last token."""

    def __init__(self) -> None:
        self.vocab, self.name = LARGER.vocab, "last token"
        self.weight = torch.randn(11, 11, generator=torch.Generator().manual_seed(1))

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        return HeadNext(F.one_hot(tokens.clamp(min=0), 11).float(), Head(self.weight))


@pytest.mark.paper("2505.21600")
def test_features_are_of_the_position_before() -> None:
    """The hidden state tells which token was read last: it must be the one before the token that is judged."""
    small = LastToken()
    marked = find_divergences(small, LARGER, ANSWERS, verifier=SameRest(), ends=[])
    router = NeuralRouter.untrained(small, sizes=RouterSizes(width=4, blocks=0, logits=5))
    seen = examples_of(router, small, marked)
    before = [answer.tokens[t - 1] for answer in ANSWERS for t in range(answer.given, len(answer.tokens))]
    after = [answer.tokens[t] for answer in ANSWERS for t in range(answer.given, len(answer.tokens))]
    assert seen.hidden.argmax(-1).tolist() == before
    best = small.weight.argmax(0)[before]
    assert seen.tokens.tolist() == best.tolist()
    assert seen.differs.tolist() == (best != torch.tensor(after)).tolist()
    assert torch.equal(seen.logits, small.weight[:, before].T.sort(descending=True).values[:, :5])
    assert seen.divergent.sum() == marked.divergent
    # Places without a verdict are left out, and nothing else is.
    unknown = find_divergences(small, LARGER, ANSWERS, verifier=lambda context, one, other: None)
    kept = examples_of(router, small, unknown)
    assert kept.hidden.argmax(-1).tolist() == [
        x for x, differs in zip(before, seen.differs, strict=True) if not differs
    ]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30).filter(lambda x: any(d for _, d in x)),
    st.floats(0.05, 1),
)
@settings(max_examples=20, deadline=None)
def test_the_threshold_routes_least_of_those_that_catch_enough(drawn: list[tuple[float, bool]], recall: float) -> None:
    scores, labels = zip(*drawn, strict=True)
    threshold, caught, routed = recall_threshold(scores, labels, recall=recall)
    by_hand = {}
    for limit in np.linspace(0.01, 0.99, 100).tolist():
        hits = sum(score >= limit for score, label in drawn if label) / sum(labels)
        by_hand[limit] = (hits, sum(score >= limit for score in scores) / len(scores))
    assert by_hand[threshold] == pytest.approx((caught, routed))
    enough = [share for hits, share in by_hand.values() if hits >= recall]
    if enough:
        assert caught >= recall and routed == pytest.approx(min(enough))
    else:
        assert threshold == 0.01


SIZES = RouterSizes(width=16, blocks=1, expansion=2, logits=2, dropout=0.0)
RECIPE = TokenRouterRecipe(SIZES, epochs=40, batch=64, rate=1e-2, patience=40, held_out=0.4)


def test_just_enough_is_enough() -> None:
    threshold, caught, routed = recall_threshold([0.9, 0.2, 0.95], [True, True, False], recall=0.5)
    assert (caught, routed) == (0.5, 2 / 3) and 0.88 < threshold <= 0.9


@pytest.fixture(scope="module")
def marked() -> Divergences:
    return find_divergences(SMALLER, LARGER, ANSWERS * 15, verifier=SameAnswer(LARGER, last_digit))


@pytest.mark.paper("2505.21600")
def test_a_trained_router_asks_where_it_matters_and_entropy_where_it_does_not(marked: Divergences) -> None:
    steps: list[int] = []
    fitted = fit_token_router(SMALLER, marked, recipe=RECIPE, seed=1, on_step=lambda told: steps.append(told.step))
    assert fitted.recall == 1.0 and 0 < fitted.positive_rate < 0.5
    assert steps == list(range(1, len(fitted.losses) + 1)) and fitted.losses[-1] < 0.1 * fitted.losses[0]
    model = R2R(SMALLER, LARGER, router=fitted.router)
    # The small model's own word, and the large one's branch.
    for prompt, expected in (("1", "tmp.=1"), ("2", "tmq.=2")):
        assert generate(model, prompt, transform="greedy", max_tokens=20).text == expected
        read = [[BOS, *LARGER.vocab.encode(prompt + expected).ids]]
        assert model.predict(read).is_large[0, 1:].sum() == (prompt == "2")

    # By entropy the branch cannot be asked about without the word, which is routed first.
    def asked(threshold: float) -> list[bool]:
        by_entropy = R2R(SMALLER, LARGER, router=EntropyRouter(threshold))
        return by_entropy.predict([[BOS, TWO, T, M]]).is_large[0].tolist()

    assert asked(0.69) == [True, True, False, False] and asked(0.68) == [True, True, False, True]


def test_equal_seeds_give_equal_routers(marked: Divergences) -> None:
    brief = TokenRouterRecipe(SIZES, epochs=3, batch=64, held_out=0.4)
    first, again, other = (fit_token_router(SMALLER, marked, recipe=brief, seed=seed) for seed in (1, 1, 2))
    assert first.router.digest == again.router.digest != other.router.digest
    assert first.losses == again.losses and len(first.held_out_losses) == 3
    assert first.router.digests == marked.digests


def test_training_stops_when_nothing_is_gained(marked: Divergences) -> None:
    """With a rate far too high the loss rises at once; the first epoch's weights are kept."""
    hasty = TokenRouterRecipe(SIZES, epochs=40, batch=64, rate=30.0, patience=3, held_out=0.4)
    fitted = fit_token_router(SMALLER, marked, recipe=hasty, seed=1)
    assert len(fitted.held_out_losses) == int(np.argmin(fitted.held_out_losses)) + 1 + 3 < 40


def few(change: Callable[[Divergences], Divergences]) -> Divergences:
    found = find_divergences(SMALLER, LARGER, ANSWERS, verifier=SameRest(), ends=[])
    return change(found)


def test_misuse_is_refused(marked: Divergences) -> None:
    with pytest.raises(ValueError, match="too few"):
        fit_token_router(SMALLER, few(lambda found: found), recipe=RECIPE)
    with pytest.raises(ValueError, match="another small model"):
        fit_token_router(LARGER, marked, recipe=RECIPE)
    with pytest.raises(ValueError, match="vocabularies"):
        find_divergences(SMALLER, TableModel.random(3), ANSWERS, verifier=SameRest())
    with pytest.raises(ValueError, match="at least one answer"):
        find_divergences(SMALLER, LARGER, [], verifier=SameRest())
    with pytest.raises(ValueError, match="at least one must be given"):
        LargeAnswer((1, 2), 2)
    with pytest.raises(ValueError, match="no token diverges"):
        recall_threshold([0.5], [False])
    with pytest.raises(ValueError, match="held_out"):
        TokenRouterRecipe(held_out=1.0)
    with pytest.raises(ValueError, match="patience"):
        TokenRouterRecipe(patience=0)
    with pytest.raises(ValueError, match="recall_factor"):
        TokenRouterRecipe(recall_factor=0.0)

"""FIRST: ranking a list from one token, and training for it."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nextoken
from nextoken.model.base import ABSENT, LanguageModel, NoMemory, State
from nextoken.model.next import DenseNext, Next
from nextoken.model.vocab import Vocab
from nextoken.retrieval.first import letter_scores, rerank, rerank_by_generation, windows
from nextoken.retrieval.first_fit import RankedList, fit_first, rank_loss

BYTES = Vocab([bytes([value]) for value in range(256)])


class Judge(LanguageModel):
    """After the last bracket, the logit of a letter is the number that its passage consists of."""

    def __init__(self) -> None:
        self.name, self.vocab, self.supports_trees = "judge", BYTES, False

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        logits = torch.zeros(*tokens.shape, 256)
        for row, (kept, fed) in enumerate(zip(state.tokens, tokens.tolist(), strict=True)):
            text = BYTES.decode([*kept, *(token for token in fed if token != ABSENT)]).decode()
            for letter, number in re.findall(r"^\[([A-Z])\] (\d+)$", text, re.M):
                logits[row, -1, ord(letter)] = float(number)
        return DenseNext(logits)


@pytest.mark.paper("2406.15657")
def test_one_pass_ranks_as_the_judge_says():
    numbers = [3, 17, 5, 11, 2]
    found = rerank(Judge(), "which?", [str(number) for number in numbers])
    assert [numbers[place] for place in found.order] == sorted(numbers, reverse=True)
    assert found.scores == (17, 11, 5, 3, 2) and found.passes == 1


def test_writing_the_ranking_out_gives_the_same_order_and_costs_more():
    numbers = [str(number) for number in (3, 17, 5, 11, 2)]
    short, long = rerank(Judge(), "which?", numbers), rerank_by_generation(Judge(), "which?", numbers)
    assert short.order == long.order and long.tokens == short.tokens + 4 * len("A] > [")


@settings(max_examples=40)
@given(st.permutations(range(1, 15)), st.integers(2, 8), st.data())
def test_windows_bring_the_best_to_the_top(numbers, window, data):
    stride = data.draw(st.integers(1, window - 1))
    found = rerank(Judge(), "which?", [str(number) for number in numbers], window=window, stride=stride)
    assert sorted(found.order) == list(range(14))
    top = window - stride
    assert [numbers[place] for place in found.order[:top]] == sorted(numbers, reverse=True)[:top]
    assert found.passes == math.ceil((14 - window) / stride) + 1


def test_windows_cover_the_list_from_its_end():
    assert windows(100, window=20, stride=10) == list(range(80, -1, -10))
    assert windows(5, window=20, stride=10) == [0]
    assert windows(23, window=20, stride=10) == [3, 0]


def test_ties_keep_their_order_and_one_passage_is_its_own_ranking():
    assert rerank(Judge(), "which?", ["4", "9", "4", "4"]).order == (1, 0, 2, 3)
    assert rerank(Judge(), "which?", ["4"]).order == (0,)


def test_of_several_tokens_for_a_letter_the_best_counts():
    logits = torch.tensor([0.0, 5.0, 1.0, 7.0])
    assert letter_scores(logits, [torch.tensor([0, 2]), torch.tensor([3])]).tolist() == [1.0, 7.0]


def test_bad_input():
    with pytest.raises(ValueError, match="no passage"):
        rerank(Judge(), "q", [])
    with pytest.raises(ValueError, match="window must be"):
        rerank(Judge(), "q", ["1", "2"], window=30)
    nano = nextoken.load("nano")
    with pytest.raises(ValueError, match="smaller window"):
        rerank(nano, "q", ["word " * 200] * 20, max_tokens=200)
    with pytest.raises(ValueError, match="permutation"):
        RankedList("q", ("a", "b"), (1, 1))


@pytest.mark.paper("2406.15657")
@settings(max_examples=50)
@given(st.lists(st.floats(-9, 9), min_size=2, max_size=8), st.randoms(use_true_random=False), st.booleans())
def test_the_loss_is_the_double_sum(values, shuffler, weighted):
    ranks = list(range(1, len(values) + 1))
    shuffler.shuffle(ranks)
    terms = [
        math.log1p(math.exp(values[j] - values[i])) * (1 / (ranks[i] + ranks[j]) if weighted else 1)
        for i, j in itertools.permutations(range(len(values)), 2)
        if ranks[i] < ranks[j]
    ]
    scores = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    loss = rank_loss(scores, ranks, weighted=weighted)
    assert loss.item() == pytest.approx(sum(terms) / len(terms))
    loss.backward()
    assert scores.grad is not None and scores.grad.sum().item() == pytest.approx(0, abs=1e-12)


def test_the_loss_at_its_ends():
    well = rank_loss(torch.tensor([40.0, 20.0, 0.0]), [1, 2, 3])
    wrong = rank_loss(torch.tensor([0.0, 20.0, 40.0]), [1, 2, 3])
    assert well.item() == pytest.approx(0, abs=1e-6)
    assert wrong.item() == pytest.approx((20 / 3 + 40 / 4 + 20 / 5) / 3, rel=1e-4)
    assert rank_loss(torch.tensor([1.0, 2.0]), [1, 2]).item() == pytest.approx(math.log1p(math.e) / 3)
    assert rank_loss(torch.tensor([1.0]), [1]).item() == 0
    # Equal scores are pairs all the same, as they were in the teacher's eyes.
    assert rank_loss(torch.zeros(3), [1, 2, 3], weighted=False).item() == pytest.approx(math.log(2))


@pytest.mark.slow
@pytest.mark.paper("2411.05508")
def test_training_makes_first_letters_rank():
    """Words have one order of merit: after training the best of four is put first far above chance."""
    words = ["gold", "silver", "iron", "wood", "stone", "clay"]

    def made(number: int) -> RankedList:
        draw = random.Random(number)
        chosen = sorted(draw.sample(range(6), 4))
        return RankedList("worth", tuple(words[place] for place in chosen), (1, 2, 3, 4)).shuffled(number)

    base = nextoken.load("nano")
    before = base.digest
    losses: list[float] = []
    trained = fit_first(
        base,
        [made(number) for number in range(100)],
        steps=120,
        batch=8,
        rate=3e-3,
        seed=0,
        on_step=lambda step, written, ranked: losses.append(ranked),
    )
    assert base.digest == before and trained.digest != before
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    firsts = 0
    for number in range(40):
        one = made(number + 1000)
        found = rerank(trained, one.query, list(one.passages))
        firsts += one.ranks[found.order[0]] == 1
    # By chance 10 of 40 are right; 20 or more happen once in 2,000 times.
    assert firsts >= 20, firsts

"""R2R: the law of its procedure by enumeration, its ends, both memories in step, the router's formula and storage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.route.test_switching import LARGE_HF, LARGER, SMALL_HF, SMALLER
from torch import Tensor
from torch.nn import functional as F

from nextoken.decode.generate import generate
from nextoken.errors import ModelError
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.next import Next
from nextoken.model.table import TableModel
from nextoken.route.cost import Spent
from nextoken.route.neural_router import NeuralRouter, RouterNetwork, RouterSizes
from nextoken.route.r2r import R2R, MixedNext
from nextoken.route.switch_rule import LARGE, SMALL, Standing, SwitchRule
from nextoken.route.switching import Switching
from nextoken.route.token_router import EntropyRouter, Sight, TokenRouter
from nextoken.testing import check_language_model

V, BOS = SMALLER.vocab.size, 4
TINY = RouterSizes(width=8, blocks=2, expansion=2, logits=4, dropout=0.1)


class ByHand(TokenRouter):
    """Scores that are written down: those of the candidate y after a text whose best next token is x, at [x, y]."""

    threshold = 0.5
    parameters = 7
    digest = "by hand"

    def __init__(self, table: list[list[float]]) -> None:
        self.table = torch.tensor(table)

    def scores(self, small: LanguageModel, sight: Sight, tokens: Tensor) -> Tensor:
        return self.table[sight.logits.argmax(-1, keepdim=True), tokens]


SCORES = torch.rand(V, V, generator=torch.Generator().manual_seed(3)).tolist()
ROUTER = ByHand(SCORES)


ON_TABLES = NeuralRouter.untrained(SMALLER, sizes=TINY, seed=1)
ON_HF = NeuralRouter.untrained(SMALL_HF, sizes=TINY, seed=4)


def middle(router: TokenRouter, small: LanguageModel, candidates: int) -> float:
    """A threshold that routes some tokens and keeps others."""
    text = torch.randint(0, 4, (4, 12), generator=torch.Generator().manual_seed(0))
    logits = small.predict(text).logits()
    said = small.predict(text)
    scores = router.scores(small, Sight(said.hidden, logits), logits.topk(candidates).indices).unique()
    # Between two, in the widest gap near the middle: a score on it would be a matter of rounding.
    inner = scores[len(scores) // 4 : -(len(scores) // 4) or None]
    at = int(inner.diff().argmax())
    return float(inner[at : at + 2].mean())


ROUTERS: list[R2R] = [
    R2R(SMALLER, LARGER, router=ROUTER),
    R2R(SMALLER, LARGER, router=ROUTER, threshold=0.4, candidates=2),
    R2R(SMALLER, LARGER, router=ROUTER, candidates=V),
    R2R(SMALLER, LARGER, router=EntropyRouter(middle(EntropyRouter(), SMALLER, 1))),
    R2R(SMALLER, LARGER, router=ON_TABLES, threshold=middle(ON_TABLES, SMALLER, 1)),
    R2R(SMALL_HF, LARGE_HF, router=ON_HF, threshold=middle(ON_HF, SMALL_HF, 1)),
    R2R(SMALL_HF, LARGE_HF, router=ON_HF, threshold=middle(ON_HF, SMALL_HF, 3), candidates=3),
]


@pytest.mark.parametrize("number", range(len(ROUTERS)))
def test_keeps_the_contract(number: int) -> None:
    router = ROUTERS[number]
    assert all(proof.skipped is None for proof in check_language_model(router))
    assert 0 < router.spent.large_share < 1


def step(text: tuple[int, ...], threshold: float, candidates: int) -> dict[int, float]:
    """The law of one step of the procedure: the small model draws y, and where y is routed the large model draws."""
    own, other = SMALLER.row(text).exp().tolist(), LARGER.row(text).exp().tolist()
    order = sorted(range(V), key=lambda y: -own[y])
    law = dict.fromkeys(range(V), 0.0)
    for place, y in enumerate(order):
        judged = order[min(place, candidates - 1)]
        if SCORES[order[0]][judged] >= threshold:
            for v in range(V):
                law[v] += own[y] * other[v]
        else:
            law[y] += own[y]
    return law


@pytest.mark.paper("2505.21600")
@given(st.lists(st.integers(0, 3), max_size=3), st.floats(0.05, 0.95), st.sampled_from([1, 2, 3, V]))
@settings(max_examples=20, deadline=None)
def test_the_law_is_that_of_the_procedure(body: list[int], threshold: float, candidates: int) -> None:
    """Over all strings of two further tokens, by enumeration of what either model may draw."""
    model = R2R(SMALLER, LARGER, router=ROUTER, threshold=threshold, candidates=candidates)
    text = (BOS, *body)
    strings = torch.tensor([(*text, *more) for more in product(range(V), repeat=2)])
    said = model.predict(strings[:, :-1]).log_probs()[:, len(text) - 1 :]
    found = said.gather(2, strings[:, len(text) :, None]).sum((1, 2)).exp().tolist()
    expected = []
    for string in strings.tolist():
        first = step(tuple(string[1 : len(text)]), threshold, candidates)[string[len(text)]]
        second = step(tuple(string[1 : len(text) + 1]), threshold, candidates)[string[-1]]
        expected.append(first * second)
    assert found == pytest.approx(expected, abs=1e-12)
    assert sum(found) == pytest.approx(1, abs=1e-9)


@pytest.mark.paper("2505.21600")
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_greedy_is_the_procedure_at_temperature_0(threshold: float) -> None:
    for prompt in ("a", "bc", "dda"):
        text, routed = list(SMALLER.vocab.encode(prompt).ids), []
        begin = len(text)
        while len(text) < begin + 15:
            y = int(SMALLER.row(text).argmax())
            routed.append(SCORES[y][y] >= threshold)
            text.append(int(LARGER.row(text).argmax()) if routed[-1] else y)
        model = R2R(SMALLER, LARGER, router=ROUTER, threshold=threshold)
        made = generate(model, prompt, transform="greedy", max_tokens=15, ignore_eos=True)
        assert list(made.tokens) == text[begin:]
        assert model.predict([[BOS, *text[:-1]]]).is_large[0, begin:].tolist() == routed


@pytest.mark.paper("2505.21600")
def test_the_share_of_a_mixture_is_how_often_a_routed_token_is_drawn() -> None:
    """Of 4,000 draws, within 4.5 standard errors: false alarm 7e-6."""
    model = R2R(SMALLER, LARGER, router=ROUTER, candidates=V)
    mixed = model.predict([[BOS, 0, 1, 2, 3]]).parts[2]
    assert isinstance(mixed, MixedNext)
    # After the token whose mixture is the most even.
    place = int((mixed.share[0] - 0.5).abs().argmin())
    rho, row = mixed.share[0, place].item(), SMALLER.row([BOS, 0, 1, 2, 3][place : place + 1]).exp()
    best = int(row.argmax())
    drawn = torch.multinomial(row, 4000, replacement=True, generator=torch.Generator().manual_seed(1)).tolist()
    rate = sum(SCORES[best][y] >= 0.5 for y in drawn) / len(drawn)
    assert 0.05 < rho < 0.95 and abs(rate - rho) < 4.5 * math.sqrt(rho * (1 - rho) / len(drawn))


@pytest.mark.paper("2505.21600")
@pytest.mark.parametrize("candidates", [1, 2, 5])
def test_the_ends_are_the_pure_models_to_the_bit(candidates: int) -> None:
    text = [[4, *torch.randint(0, 4, (11,), generator=torch.Generator().manual_seed(2)).tolist()]]
    for pair, scorer in (((SMALLER, LARGER), ON_TABLES), ((SMALL_HF, LARGE_HF), ON_HF)):
        for number, threshold in ((SMALL, 1 + 1e-6), (LARGE, 0.0)):
            model = R2R(*pair, router=scorer, threshold=threshold, candidates=candidates)
            pure = pair[number].extend(pair[number].start(), text).log_probs()
            assert torch.equal(model.predict(text).log_probs(), pure)
            for transform in ("greedy", None):
                arguments = {"transform": transform, "max_tokens": 12, "seed": 3, "ignore_eos": True}
                expected, made = (generate(m, "a", **arguments) for m in (pair[number], model))  # type: ignore[call-overload]
                assert (made.tokens, made.surprisals) == (expected.tokens, expected.surprisals)
            assert model.spent.large_share == number
            if number == SMALL:
                assert model.spent.models[-1] == Spent(pair[1].name, model.spent.models[-1].parameters)


@pytest.mark.paper("2505.21600")
def test_a_score_at_the_threshold_is_routed() -> None:
    model = R2R(SMALLER, LARGER, router=ByHand([[0.5] * V] * V), threshold=0.5)
    assert model.predict([[BOS, 1]]).is_large[0].tolist() == [True, True]


@dataclass(frozen=True)
class Reading:
    """Who is active, and the tokens read so far."""

    active: int
    tokens: tuple[int, ...] = ()


class Disagreement(SwitchRule):
    """The router that no one can have: large where its best token is not the small model's."""

    watches, looks = False, True

    def begin(self) -> Reading:
        return Reading(SMALL)

    def at(self, before: Standing, token: int) -> Reading:
        assert isinstance(before, Reading)
        return Reading(SMALL, (*before.tokens, token))

    def look(self, said: Next) -> Tensor:
        return said.log_probs().argmax(-1, keepdim=True)

    def seen(self, standing: Standing, sight) -> Reading:  # type: ignore[no-untyped-def]
        assert isinstance(standing, Reading)
        best = int(LARGER.row(standing.tokens[1:]).argmax())
        return Reading(SMALL if sight[0] == best else LARGE, standing.tokens)


@pytest.mark.paper("2505.21600")
def test_routing_wherever_the_best_tokens_differ_gives_the_large_models_greedy_text() -> None:
    for prompt in ("a", "cb", "dab"):
        model = Switching(SMALLER, LARGER, rule=Disagreement())
        expected = generate(LARGER, prompt, transform="greedy", max_tokens=20, ignore_eos=True).tokens
        assert generate(model, prompt, transform="greedy", max_tokens=20, ignore_eos=True).tokens == expected
        assert 0 < model.spent.large_share < 1
        # Where it answers is where they differ, whatever the text.
        text = [BOS, *SMALLER.vocab.encode(prompt).ids, *expected]
        best = [m.predict([text]).log_probs()[0].argmax(-1) for m in (SMALLER, LARGER)]
        assert model.predict([text]).is_large[0].tolist() == (best[0] != best[1]).tolist()


@pytest.mark.parametrize("number", [5, 6])
def test_after_a_catch_up_memories_equal_recomputation(number: int) -> None:
    router = ROUTERS[number]
    drawn = torch.randint(0, 4, (2, 30), generator=torch.Generator().manual_seed(5)).tolist()
    texts = [[4, *row] for row in drawn]
    state, shares = router.start(2), []
    # The second row falls behind by a token now and then, so that the rows' gaps differ.
    for more in [[3, 1], *[[1, 1] if turn % 4 else [1, 0] for turn in range(20)]]:
        before = state.lengths
        pieces = [texts[row][before[row] : before[row] + more[row]] for row in range(2)]
        width = max(map(len, pieces))
        said = router.extend(state, [[*piece, *[ABSENT] * (width - len(piece))] for piece in pieces])
        for row, piece in enumerate(pieces):
            for place in range(len(piece)):
                read = [texts[row][: before[row] + place + 1]]
                own, other = (m.predict(read).log_probs()[0, -1].exp() for m in router.models)
                shares.append(bool(said.is_large[row, place]))
                if router.candidates == 1:
                    expected = other if shares[-1] else own
                else:
                    order = own.argsort(descending=True)
                    sight = Sight(SMALL_HF.predict(read).hidden[:, -1:], SMALL_HF.predict(read).logits()[:, -1:])
                    judged = order[:3][None, None]
                    routed = (ON_HF.scores(SMALL_HF, sight, judged)[0, 0] >= router.threshold).tolist()
                    away = torch.tensor([routed[min(int(rank), 2)] for rank in order.argsort()])
                    expected = own * ~away + own[away].sum() * other
                torch.testing.assert_close(said[row, place].log_probs()[0, 0].exp(), expected, atol=2e-5, rtol=0)
    assert len(set(shares)) == 2


def test_a_text_is_the_same_alone_and_in_a_batch_and_read_as_it_was_drawn() -> None:
    for router in (ROUTERS[0], ROUTERS[2], ROUTERS[5]):
        together = generate(router, ["a", "ab", "c"], max_tokens=12, seed=7, ignore_eos=True)
        for prompt, made in zip(("a", "ab", "c"), together, strict=True):
            assert generate(router, prompt, max_tokens=12, seed=7, ignore_eos=True).tokens == made.tokens
            said = made.signature.table["logprob"].to_numpy()
            assert -said == pytest.approx(made.surprisals, abs=2e-5)


def test_costs_by_hand() -> None:
    """The small model reads and the router scores every token; the large one catches up where it is asked."""
    scores = [[0.9] * V if best == int(SMALLER.row([1]).argmax()) else [0.1] * V for best in range(V)]
    asked = [SMALLER.row([x]).argmax().item() == SMALLER.row([1]).argmax().item() for x in range(4)]
    quiet = asked.index(False)
    model = R2R(SMALLER, LARGER, router=ByHand(scores), parameters=(10, 100))
    state = model.start()
    assert SMALLER.row([]).argmax() != SMALLER.row([1]).argmax()
    for token in (BOS, quiet, 1, quiet, 1, 1, quiet):
        model.extend(state, [[token]])
    # Asked after the third token, when it reads three, after the fifth, when it reads two, and after the sixth.
    assert model.spent.models == (
        Spent("smaller", 10, 7, 7, 4),
        Spent("router", 7, 7, 7, 0),
        Spent("larger", 100, 3, 6, 3),
    )
    assert model.spent.large_share == 3 / 7
    assert model.spent.activated == (70 + 49 + 600) / 7
    assert model.spent.answering == (40 + 300) / 7
    # The router is asked once per candidate.
    wide = R2R(SMALLER, LARGER, router=ByHand(scores), parameters=(10, 100), candidates=3)
    wide.predict([[BOS, quiet]])
    assert wide.spent.models[1] == Spent("router", 7, 1, 6, 0)


def test_the_networks_formula_by_hand() -> None:
    """Each layer written out, on the hidden state, the embedding and the logits of one place."""
    w = {name: tensor.double() for name, tensor in ON_HF.network.state_dict().items()}
    said = SMALL_HF.predict([[4, 0, 2]])
    assert said.hidden is not None
    h, logits = said.hidden[0, -1].double(), said.logits()[0, -1].double()
    token = 3
    highest = torch.tensor(sorted(logits.tolist(), reverse=True)[:4]).double()
    embedded = SMALL_HF.model.get_input_embeddings().weight[token].double().detach()
    x = torch.cat([h, embedded, w["widen.weight"] @ highest + w["widen.bias"]])
    x = w["enter.weight"] @ (w["combine.weight"] @ x + w["combine.bias"]) + w["enter.bias"]
    for block in range(2):
        name = f"blocks.{block}"
        inside = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * w[f"{name}.0.weight"] + w[f"{name}.0.bias"]
        inside = w[f"{name}.1.weight"] @ inside + w[f"{name}.1.bias"]
        inside = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
        x = x + w[f"{name}.4.weight"] @ inside + w[f"{name}.4.bias"]
    x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]
    expected = 1 / (1 + math.exp(-(w["out.weight"] @ x + w["out.bias"]).item()))
    sight = Sight(said.hidden, said.logits())
    tokens = torch.full((1, 3, 2), token)
    tokens[..., 0] = 1
    assert ON_HF.scores(SMALL_HF, sight, tokens)[0, -1, 1].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.paper("2505.21600")
def test_the_papers_router_has_56_million_parameters() -> None:
    with torch.device("meta"):
        network = RouterNetwork(1536, 1536, 100, sizes=RouterSizes())
    assert round(sum(weight.numel() for weight in network.parameters()) / 1e6) == 56


def test_without_hidden_states_and_embeddings_the_token_and_the_logits_are_what_it_sees() -> None:
    assert (ON_TABLES.network.hidden, ON_TABLES.network.embedded) == (0, V)
    said = SMALLER.predict([[BOS, 1]])
    tokens = torch.arange(V).expand(1, 2, V)
    scores = ON_TABLES.scores(SMALLER, Sight(None, said.logits()), tokens)[0, 1]
    for token in range(V):
        logits = SMALLER.row([1]).sort(descending=True).values[:4].clamp(min=-100).float()[None]
        one_hot = F.one_hot(torch.tensor([token]), V).float()
        expected = ON_TABLES.network(torch.zeros(1, 0), one_hot, logits).sigmoid().item()
        assert scores[token].item() == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=5, max_size=5), min_size=1, max_size=4), st.floats(0, 2))
@settings(max_examples=15, deadline=None)
def test_entropies_are_in_nats(weights: list[list[float]], threshold: float) -> None:
    rows = [[w / sum(row) for w in row] for row in weights]
    logits = torch.tensor(rows).double().log() + 3.0
    tokens = torch.zeros(len(rows), 2, dtype=torch.long)
    scores = EntropyRouter(threshold).scores(SMALLER, Sight(None, logits), tokens)
    for row, own in zip(rows, scores.tolist(), strict=True):
        assert own == pytest.approx([-sum(p * math.log(p) for p in row)] * 2)


def test_a_router_comes_back_as_it_was_and_serves_no_other_pair(tmp_path: Path) -> None:
    digests = {
        "small model": SMALL_HF.digest,
        "large model": LARGE_HF.digest,
        "vocabulary": SMALL_HF.vocab.digest,
    }
    router = NeuralRouter(ON_HF.network, threshold=0.375, digests=digests)
    router.save(tmp_path)
    again = NeuralRouter.load(tmp_path, small=SMALL_HF, large=LARGE_HF)
    assert (again.digest, again.threshold, again.digests) == (router.digest, 0.375, digests)
    text = [[4, 0, 1, 2, 3]]
    first, second = (R2R(SMALL_HF, LARGE_HF, router=one) for one in (router, again))
    assert torch.equal(first.predict(text).log_probs(), second.predict(text).log_probs())
    assert first.digest == second.digest != R2R(SMALL_HF, LARGE_HF, router=router, threshold=0.4).digest
    with pytest.raises(ModelError, match="another large model"):
        NeuralRouter.load(tmp_path, small=SMALL_HF, large=SMALL_HF)
    with pytest.raises(ModelError, match="another small model"):
        R2R(LARGE_HF, LARGE_HF, router=router)
    with pytest.raises(ModelError, match="holds no token_router"):
        NeuralRouter.load(tmp_path / "none", small=SMALL_HF, large=LARGE_HF)
    with pytest.raises(ModelError, match="hidden states of width 8"):
        R2R(LARGE_HF, LARGE_HF, router=ON_HF).predict(text)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold is NaN"):
        R2R(SMALLER, LARGER, router=ROUTER, threshold=math.nan)
    for candidates in (0, V + 1):
        with pytest.raises(ValueError, match="candidates must be"):
            R2R(SMALLER, LARGER, router=ROUTER, candidates=candidates)
    with pytest.raises(ValueError, match="vocabularies"):
        R2R(SMALLER, TableModel.random(3), router=ROUTER)
    with pytest.raises(ValueError, match="dropout"):
        RouterSizes(dropout=1.0)

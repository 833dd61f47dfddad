"""CoRE: its formulas by hand, what they come to in simple cases, the guards, and the contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nextoken.decode.generate import generate
from nextoken.model import core
from nextoken.model.aligned import Aligned
from nextoken.model.alignment import Alignment
from nextoken.model.base import LanguageModel
from nextoken.model.core import CoRE, Projected, ProjectedMean, leading
from nextoken.model.ensemble import Ensemble
from nextoken.model.table import TableModel
from nextoken.testing import check_language_model

FILTERS = ["rbf", "linear", "power", "reciprocal", "sigmoid"]
MAIN = TableModel.random(4, order=2, seed=1, name="main")
FIRST = TableModel.random(4, order=1, seed=2, name="first")
SECOND = TableModel.random(4, order=2, seed=3, zeros=0.2, name="second")
ENDING = TableModel.random(4, order=1, eos=True, seed=4, concentration=0.5, name="ending")
PIECES = TableModel.random(["a", "b", "c", "d", "ab", "cd", "dad"], order=2, eos=True, seed=5, name="pieces")


def aligned(model: LanguageModel, target: LanguageModel) -> Aligned:
    return Aligned(model, target.vocab, Alignment.minimum_edit(model.vocab, target.vocab))


MODELS = [
    CoRE(MAIN, [FIRST, SECOND]),
    CoRE(MAIN, [FIRST], top=3, consistency="reciprocal", anchor=False),
    CoRE(MAIN, [aligned(PIECES, MAIN), SECOND], top=3, consistency="power"),
    CoRE(PIECES, [aligned(ENDING, PIECES), aligned(MAIN, PIECES)], consistency="sigmoid", floor=0.1),
    CoRE(MAIN, [FIRST, SECOND], task="choice", top=None, consistency="linear"),
    ProjectedMean(PIECES, [aligned(ENDING, PIECES)], top=4),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.name}, {getattr(model, 'filter', 'mean')}")
def test_keeps_the_contract(model: LanguageModel) -> None:
    assert all(proof.skipped is None for proof in check_language_model(model))


def by_hand(q: list[list[float]], name: str, *, task: str, anchor: bool, floor: float) -> list[float]:
    """Unnormalised weights of the tokens, number by number as in the card's steps 2 to 6."""
    models, size = len(q), len(q[0])
    mean = [sum(row[v] for row in q) / models for v in range(size)]
    d = [[abs(row[v] - mean[v]) for v in range(size)] for row in q]
    raw = [[1 / (1 + x) for x in row] for row in d]
    low, high = min(map(min, raw)), max(map(max, raw))
    formulas = {
        "rbf": lambda x: (math.exp(-2 * x) - math.exp(-2)) / (1 - math.exp(-2)),
        "linear": lambda x: 1 - x,
        "power": lambda x: (1 - x) ** 5,
        "reciprocal": lambda x: (1 / (1 + x) - low) / (high - low + 1e-8),
        "sigmoid": lambda x: 1 - 1 / (1 + math.exp(-5 * (x - 0.5))),
    }
    f = [[formulas[name](d[i][v]) if q[i][v] + q[0][v] > 1e-12 else 0.0 for v in range(size)] for i in range(models)]
    sums = [sum(row) for row in f]
    s = [[x / sums[i] * sum(y != 0 for y in f[i]) for x in f[i]] for i in range(models)]
    m = []
    for i in range(models):
        p = [max(x / sum(q[i]), 1e-12) for x in q[i]]
        entropy = -sum(x * math.log(x) for x in p)
        m.append((sums[i] if task == "generation" else 1.0) / (entropy + floor))
    if anchor:
        m[0] = max(m[0], sum(m[1:]))
    w = [x / sum(m) for x in m]
    return [
        w[0] * q[0][v] + sum(w[i] * q[i][v] * (s[i][v] if task == "generation" else 1.0) for i in range(1, models))
        for v in range(size)
    ]


def three(**options: object) -> CoRE:
    return CoRE(MAIN, [FIRST, SECOND], substring_guard=False, end_guard=False, **options)  # type: ignore[arg-type]


@pytest.mark.paper("2510.13855")
@pytest.mark.parametrize("name", FILTERS)
@given(data=st.data())
@settings(max_examples=30)
def test_core_is_its_formula(name: str, data: st.DataObject) -> None:
    """V = 4, N = 2, zeros and lost mass included."""
    shares = []
    for i in range(3):
        weights = data.draw(st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any))
        kept = data.draw(st.sampled_from([1.0, 0.7])) if i else 1.0
        shares.append([kept * w / sum(weights) for w in weights])
    options = {
        "task": data.draw(st.sampled_from(["generation", "choice"])),
        "anchor": data.draw(st.booleans()),
        "floor": data.draw(st.sampled_from([1e-12, 0.3])),
    }
    q = torch.tensor(shares, dtype=torch.float64)
    d = (q - q.mean(0)).abs()
    assume(name != "reciprocal" or float(d.max() - d.min()) > 1e-5)  # 0 / 0 by the formula; see below
    try:
        expected = by_hand(shares, name, **options)  # type: ignore[arg-type]
    except ZeroDivisionError:  # `reciprocal` may give 0 throughout; see below
        assume(name != "reciprocal")
        raise
    said = three(consistency=name, **options).mix(q)
    assert said.tolist() == pytest.approx(expected, abs=1e-9, rel=1e-9)


@pytest.mark.paper("2510.13855")
@pytest.mark.parametrize("name", FILTERS)
def test_the_whole_way_from_three_models(name: str) -> None:
    """Top tokens, projection, formula and normalisation, on tables, against plain lists of numbers."""
    model = CoRE(MAIN, [aligned(PIECES, MAIN), SECOND], top=3, consistency=name, substring_guard=False)  # type: ignore[arg-type]
    matrix = Alignment.minimum_edit(PIECES.vocab, MAIN.vocab).dense().tolist()
    for text in ("", "a", "dad", "abcd", "cdcdb"):
        rows = []
        for i, source in enumerate((MAIN, PIECES, SECOND)):
            p = source.row(source.vocab.encode(text).ids).exp().tolist()
            best = sorted(range(len(p)), key=lambda v: -p[v])[:3]
            total = sum(p[v] for v in best)
            top = [p[v] / total if v in best else 0.0 for v in range(len(p))]
            rows.append([sum(top[u] * matrix[u][v] for u in range(len(p))) for v in range(5)] if i == 1 else top)
        expected = by_hand(rows, name, task="generation", anchor=True, floor=1e-12)
        said = model.predict([[4, *MAIN.vocab.encode(text).ids]]).log_probs()[0, -1].exp()
        assert said.tolist() == pytest.approx([x / sum(expected) for x in expected], abs=1e-9)


@pytest.mark.paper("2510.13855")
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("assistants", [1, 2])
def test_identical_models_are_the_model(name: str, assistants: int) -> None:
    model = CoRE(MAIN, [MAIN] * assistants, consistency=name)  # type: ignore[arg-type]
    q = MAIN.row([0, 1]).exp().expand(assistants + 1, -1)
    found = model.consistency(q)
    torch.testing.assert_close(found.tokens[:, :4], torch.ones(assistants + 1, 4, dtype=torch.float64))
    assert found.weights[0].item() == pytest.approx(0.5)  # the anchor, also with two assistants
    torch.testing.assert_close(model.mix(q), q[0])
    torch.testing.assert_close(model.predict([[4, 0, 1]]).log_probs()[0, -1], MAIN.row([0, 1]))


def test_without_consistency_it_is_the_plain_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """f = 1 and equal entropies give w = 1/2, 1/2, s = 1: the mean of the two."""
    monkeypatch.setitem(core._FILTERS, "linear", torch.ones_like)
    p = MAIN.row([0, 1]).exp()[:4]
    q = torch.stack([p, p.flip(0)])
    model = CoRE(MAIN, [FIRST], consistency="linear")
    torch.testing.assert_close(model.mix(q), q.mean(0))


def test_a_uniform_assistant_weighs_its_agreement_by_its_entropy() -> None:
    model = CoRE(MAIN, [FIRST])
    q = torch.zeros(2, 12, dtype=torch.float64)
    q[0, 0], q[1, 2:] = 1.0, 0.1
    found = model.consistency(q)
    assert float(found.entropies[1]) == pytest.approx(math.log(10), abs=1e-9)
    scores = float(found.sums[1]) / math.log(10)
    # The main model is sure, so its score is far above: 10^10 times as large.
    assert float(found.weights[1] / found.weights[0]) == pytest.approx(
        scores / (float(found.sums[0]) / float(found.entropies[0] + 1e-12)), rel=1e-6
    )


def test_the_anchor_holds_the_main_model_at_half() -> None:
    q = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    assert float(three().consistency(q).weights[0]) == pytest.approx(0.5)
    assert float(three(anchor=False).consistency(q).weights[0]) < 1e-9
    assert 0.01 < float(three(anchor=False, floor=0.1).consistency(q).weights[0]) < 0.1


@given(st.integers(0, 100_000), st.sampled_from(FILTERS), st.integers(1, 4))
@settings(max_examples=80)
def test_weights_are_a_distribution_and_filters_have_mean_one(seed: int, name: str, assistants: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(assistants + 1, 2, 6, generator=generator, dtype=torch.float64)
    q = leading(torch.log_softmax(logits, -1), int(torch.randint(1, 7, (), generator=generator)))
    found = CoRE(MAIN, [FIRST] * assistants, consistency=name).consistency(q)  # type: ignore[arg-type]
    torch.testing.assert_close(found.weights.sum(0), torch.ones(2, dtype=torch.float64))
    assert bool((found.weights >= 0).all()) and bool((found.weights[0] >= 0.5 - 1e-9).all())
    support = (found.tokens > 0).sum(-1)
    torch.testing.assert_close(found.tokens.sum(-1), support.double())
    # A token on which a model is nearer to the mean never has less of its trust.
    d, supported = (q - q.mean(0)).abs(), q + q[0] > 1e-12
    nearer = (d[..., :, None] < d[..., None, :]) & supported[..., :, None]
    assert bool((found.tokens[..., :, None] >= found.tokens[..., None, :] - 1e-12)[nearer].all())


def test_models_that_agree_on_nothing_leave_the_main_one() -> None:
    """One sure of a, the other of b: the least agreement there is, and `reciprocal` gives 0 to both everywhere."""
    q = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    for name in FILTERS:
        assert int(CoRE(MAIN, [FIRST], consistency=name).mix(q).argmax()) == 0  # type: ignore[arg-type]
    lone = CoRE(MAIN, [FIRST], consistency="reciprocal", anchor=False)
    assert lone.mix(q).tolist() == [1.0, 0.0, 0.0, 0.0]


def fixed(row: list[float], symbols: list[str], *, eos: bool = False, name: str = "fixed") -> TableModel:
    return TableModel.given({(): row}, symbols, eos=eos, name=name)


def test_substring_guard() -> None:
    symbols = ["un", "undo", "re", "x"]
    main = fixed([0.4, 0.3, 0.2, 0.1], symbols)
    for best, guarded in (([0.0, 0.9, 0.1, 0.0], True), ([0.0, 0.0, 0.9, 0.1], False)):
        other = fixed(best, symbols)
        kept = ProjectedMean(main, [other]).predict([[4]]).log_probs()[0, 0].exp()
        free = ProjectedMean(main, [other], substring_guard=False).predict([[4]]).log_probs()[0, 0].exp()
        mean = (main.row().exp() + other.row().exp()) / 2
        torch.testing.assert_close(free, mean)
        torch.testing.assert_close(kept, main.row().exp() if guarded else mean)
    # The other way round: the mixture's best token begins that of the main model.
    longer, shorter = fixed([0.3, 0.4, 0.2, 0.1], symbols), fixed([0.9, 0.0, 0.1, 0.0], symbols)
    torch.testing.assert_close(ProjectedMean(longer, [shorter]).predict([[4]]).log_probs()[0, 0], longer.row())
    # Equal best tokens leave the mixture as it is, and tasks with one answer token have no guard.
    other = fixed([0.9, 0.1, 0.0, 0.0], symbols)
    torch.testing.assert_close(
        ProjectedMean(main, [other]).predict([[4]]).log_probs(),
        ProjectedMean(main, [other], substring_guard=False).predict([[4]]).log_probs(),
    )
    assert CoRE(main, [other]).substring_guard and not CoRE(main, [other], task="choice").substring_guard


def test_end_guard_and_silent_assistants() -> None:
    main, other = fixed([0.2, 0.3, 0.5], ["a", "b"], eos=True), fixed([0.9, 0.1, 0.0], ["a", "b"], eos=True)
    guarded = ProjectedMean(main, [other]).predict([[2]]).log_probs()[0, 0]
    torch.testing.assert_close(guarded, main.row())
    free = ProjectedMean(main, [other], end_guard=False).predict([[2]]).log_probs()[0, 0].exp()
    torch.testing.assert_close(free, (main.row().exp() + other.row().exp()) / 2)
    # An assistant all of whose mass is lost says nothing: the main model decides alone.
    talk = fixed([0.6, 0.3, 0.1], ["a", "b"], eos=True)
    only_b = torch.zeros(4, 4)
    only_b[1, 1] = 1.0
    silent = Aligned(fixed([1.0, 0.0, 0.0], ["a", "b"], eos=True), talk.vocab, Alignment.given(only_b))
    for model in (CoRE(talk, [silent, other]), ProjectedMean(talk, [silent, other])):
        torch.testing.assert_close(model.predict([[2]]).log_probs()[0, 0], talk.row())


def test_lost_mass_is_not_made_up_for() -> None:
    """The average takes q as it is projected, where an ensemble takes the renormalised distribution."""
    half = torch.eye(5)
    half[0] = 0
    lossy = Aligned(FIRST, MAIN.vocab, Alignment.given(half))
    p, q = MAIN.row([1]).exp(), FIRST.row([1]).exp()
    q = torch.where(torch.arange(5) == 0, 0.0, q)
    options = {"top": None, "substring_guard": False, "end_guard": False}
    said = ProjectedMean(MAIN, [lossy], **options).predict([[4, 1]]).log_probs()[0, -1].exp()  # type: ignore[arg-type]
    torch.testing.assert_close(said, (p + q) / (p + q).sum())
    said = ProjectedMean(MAIN, [lossy], weights=[3, 1], **options).predict([[4, 1]]).log_probs()[0, -1].exp()  # type: ignore[arg-type]
    torch.testing.assert_close(said, (3 * p + q) / (3 * p + q).sum())
    ensemble = Ensemble([MAIN, lossy]).predict([[4, 1]]).log_probs()[0, -1].exp()
    torch.testing.assert_close(ensemble, (p + q / q.sum()) / 2)


@given(st.integers(0, 10_000), st.integers(1, 8))
@settings(max_examples=40)
def test_leading_tokens(seed: int, top: int) -> None:
    log_probs = torch.log_softmax(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)).double(), -1)
    cut = leading(log_probs, top)
    assert ((cut > 0).sum(-1) == min(top, 6)).all()
    torch.testing.assert_close(cut.sum(-1), torch.ones(3, dtype=torch.float64))
    kept = cut > 0
    torch.testing.assert_close(
        (cut / log_probs.exp())[kept], (1 / (log_probs.exp() * kept).sum(-1))[:, None].expand(3, 6)[kept]
    )
    torch.testing.assert_close(leading(log_probs, None), log_probs.exp())


def test_it_generates_across_tokenizers() -> None:
    model = CoRE(PIECES, [aligned(ENDING, PIECES), aligned(MAIN, PIECES)])
    greedy = generate(model, "ab", transform="greedy", max_tokens=12)
    tokens = list(greedy.tokens)
    start = [PIECES.vocab.bos_id, *PIECES.vocab.encode("ab").ids]
    for n, token in enumerate(tokens):
        said = model.predict([[*start, *tokens[:n]]]).log_probs()[0, -1]
        assert float(said[token]) == float(said.max())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoRE(MAIN, []), "assistant"),
        (lambda: CoRE(MAIN, [PIECES]), "different vocabularies"),
        (lambda: CoRE(MAIN, [FIRST], consistency="cosine"), "consistency"),  # type: ignore[arg-type]
        (lambda: CoRE(MAIN, [FIRST], task="essay"), "task"),  # type: ignore[arg-type]
        (lambda: CoRE(MAIN, [FIRST], top=0), "top"),
        (lambda: ProjectedMean(MAIN, [FIRST], weights=[1, 2, 3]), "weights"),
        (lambda: CoRE(MAIN, [FIRST], floor=0.0), "floor"),
    ],
)
def test_misuse_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_digests_tell_settings_apart() -> None:
    others: list[Projected] = [
        CoRE(MAIN, [FIRST, SECOND], anchor=False),
        CoRE(MAIN, [FIRST, SECOND], floor=0.1),
        CoRE(MAIN, [FIRST, SECOND], consistency="linear"),
        CoRE(MAIN, [FIRST, SECOND], top=None),
        ProjectedMean(MAIN, [FIRST, SECOND]),
        ProjectedMean(MAIN, [FIRST, SECOND], weights=[2, 1, 1]),
    ]
    assert len({model.digest for model in [*MODELS, *others]}) == len(MODELS) + len(others)

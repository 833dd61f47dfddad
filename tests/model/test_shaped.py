"""CAAD: its formula on a table by plain arithmetic, its limits to the bit, and what a grounding space refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextoken.decode.generate import generate
from nextoken.errors import InputError, ModelError
from nextoken.model.base import LanguageModel
from nextoken.model.grounding import GroundingSpace, NgramVectors
from nextoken.model.loading import load
from nextoken.model.shaped import Shaped
from nextoken.model.table import TableModel
from nextoken.testing import check_language_model

TABLE = TableModel.random(4, order=2, seed=1)
BIGRAM = TableModel.random(4, order=1, seed=5, concentration=0.5)
PAIRS = [("ab", "cad"), ("ba", "dd"), ("", "acbd")]
MODES = [("add", "threshold"), ("add", "mean"), ("add", "logsumexp"), ("interpolate", "threshold")]


def last_letter(texts: Sequence[str]) -> Tensor:
    """One-hot of the last letter; a fifth place for the empty text."""
    return torch.eye(5)[["abcd".index(text[-1]) if text else 4 for text in texts]]


def constant(texts: Sequence[str]) -> Tensor:
    return torch.ones(len(texts), 3)


def after(model: LanguageModel, text: str) -> Tensor:
    return model.predict([[model.vocab.bos_id, *model.vocab.encode(text).ids]]).log_probs()[0, -1]


def row(model: TableModel, text: str) -> Tensor:
    return model.row(model.vocab.encode(text).ids)


def prefixes(pairs: Sequence[tuple[str, str]], chunk: int = 1) -> list[str]:
    return [question + answer[:at] for question, answer in pairs for at in range(0, len(answer), chunk)]


def normal(scores: Sequence[float]) -> list[float]:
    """log softmax by hand."""
    top = max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - total for score in scores]


def by_hand(
    texts: list[str], query: str, top: int, neighbours: int, threshold: float, strength: float, mode: tuple[str, str],
    temperature: float = 1.0, minimum: float | None = None,
) -> list[float]:  # fmt: skip
    """p' after `query`, from the definition, a number at a time; similarity is 1 for equal last letters, else 0."""
    values = []
    for text in texts:
        said = row(BIGRAM, text).tolist()
        best = sorted(range(5), key=lambda v: -said[v])[:top]
        rest = 1 - sum(math.exp(said[v]) for v in best)
        fill = math.log(rest / (5 - top)) if top < 5 and rest > 1e-12 else -math.inf
        values.append([said[v] if v in best else fill for v in range(5)])
    similar = [float(text[-1:] == query[-1:]) for text in texts]
    nearest = sorted(range(len(texts)), key=lambda i: (-similar[i], i))[:neighbours]
    nearest = [i for i in nearest if minimum is None or similar[i] >= minimum]
    own = row(BIGRAM, query).tolist()
    if not nearest:
        return [math.exp(x) for x in own]
    raw = [math.exp(similar[i] / temperature) for i in nearest]
    weights = [w / sum(raw) for w in raw]
    mixed = [sum(w * values[i][v] for w, i in zip(weights, nearest, strict=True)) for v in range(5)]
    confident = normal(mixed)
    means = []
    for i in nearest:  # of the whole distribution, not of the part that is kept
        finite = [x for x in row(BIGRAM, texts[i]).tolist() if x > -math.inf]
        means.append(sum(finite) / len(finite))
    mean = sum(w * m for w, m in zip(weights, means, strict=True))
    scores = []
    for v in range(5):
        if math.exp(confident[v]) < threshold:
            scores.append(own[v])
        elif mode[0] == "interpolate":
            scores.append(sum(w * x for w, x in ((1 - strength, own[v]), (strength, confident[v])) if w))
        else:
            centred = {
                "threshold": confident[v] - (math.log(threshold) if threshold else 0),
                "mean": mixed[v] - mean,
                "logsumexp": confident[v],
            }
            scores.append(own[v] + strength * centred[mode[1]])
    return [math.exp(x) for x in normal(scores)]


SHAPED = [
    Shaped(TABLE, GroundingSpace.build(TABLE, PAIRS)),
    Shaped(TABLE, GroundingSpace.build(TABLE, PAIRS, top=2), strength=2.0, centre="mean", neighbours=3),
    Shaped(TABLE, GroundingSpace.build(TABLE, PAIRS, embed=last_letter), blend="interpolate", threshold=0.2),
    Shaped(
        TABLE, GroundingSpace.build(TABLE, PAIRS, embed=last_letter), centre="logsumexp", minimum_similarity=0.5,
        neighbours=2,
    ),
]  # fmt: skip


@pytest.mark.parametrize("model", SHAPED, ids=["default", "mean", "interpolate", "gated"])
def test_keeps_the_contract(model: LanguageModel) -> None:
    assert all(proof.skipped is None for proof in check_language_model(model))


def test_keeps_the_contract_on_a_network() -> None:
    nano = load("nano")
    space = GroundingSpace.build(nano, [("Call me", " Ishmael.")])
    check_language_model(Shaped(nano, space, strength=1.0), length=7)


@pytest.mark.paper("2508.02184")
@given(
    st.lists(st.tuples(st.text("abcd", max_size=2), st.text("abcd", min_size=1, max_size=3)), min_size=1, max_size=3),
    st.text("abcd", min_size=1, max_size=3),
    st.integers(1, 6),
    st.sampled_from([0.01, 0.1, 0.3]),
    st.floats(0.05, 1),
    st.sampled_from(MODES),
    st.sampled_from([2, 5]),
    st.sampled_from([0.2, 1.0]),
    st.sampled_from([None, 0.5]),
)
@settings(max_examples=150)
def test_is_its_formula(
    pairs: list[tuple[str, str]], query: str, neighbours: int, threshold: float, strength: float,
    mode: tuple[str, str], top: int, temperature: float, minimum: float | None,
) -> None:  # fmt: skip
    space = GroundingSpace.build(BIGRAM, pairs, embed=last_letter, top=top)
    blend, centre = mode
    model = Shaped(BIGRAM, space, neighbours=neighbours, threshold=threshold, strength=strength, blend=blend,
                   centre=centre, temperature=temperature, minimum_similarity=minimum)  # fmt: skip
    expected = by_hand(prefixes(pairs), query, top, neighbours, threshold, strength, mode, temperature, minimum)
    assert after(model, query).exp().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.paper("2508.02184")
def test_values_are_the_models_own_predictions() -> None:
    """Not the token that came next, which would be kNN-LM."""
    space = GroundingSpace.build(TABLE, PAIRS)
    expected = torch.stack([row(TABLE, text) for text in prefixes(PAIRS)])
    torch.testing.assert_close(space.values(torch.arange(len(expected))).double(), expected, atol=1e-6, rtol=0)
    assert space.example == "ab"


@given(st.integers(1, 6), st.floats(-30, 30), st.integers(0, 100))
@settings(max_examples=30)
def test_values_are_normalised_and_cut_at_the_top(top: int, constant: float, seed: int) -> None:
    logits = 3 * torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).double() + constant
    space = GroundingSpace.of(TABLE, ["a", "b"], logits, embed=last_letter, top=top)
    said, kept = torch.log_softmax(logits, -1), space.values(torch.arange(2)).double()
    torch.testing.assert_close(kept.logsumexp(-1), torch.zeros(2).double(), atol=1e-5, rtol=0)
    best = said.topk(min(top, 5)).indices
    torch.testing.assert_close(kept.gather(1, best), said.gather(1, best), atol=1e-5, rtol=0)
    torch.testing.assert_close(space.mean.double(), said.mean(-1), atol=1e-5, rtol=0)


def test_a_context_is_read_before_the_values_and_not_embedded() -> None:
    space = GroundingSpace.build(TABLE, [("", "ab")], context="dc", embed=last_letter)
    torch.testing.assert_close(space.values(torch.tensor([0]))[0].double(), row(TABLE, "dc"), atol=1e-6, rtol=0)
    torch.testing.assert_close(space.values(torch.tensor([1]))[0].double(), row(TABLE, "dca"), atol=1e-6, rtol=0)
    assert torch.equal(space.keys, last_letter(["", "a"])) and space.example == ""


@pytest.mark.parametrize("idle", [{"strength": 0.0}, {"threshold": 1.1}, {"minimum_similarity": 1.5}])
@pytest.mark.parametrize("blend", ["add", "interpolate"])
def test_without_effect_it_is_the_model_to_the_bit(idle: dict[str, float], blend: str) -> None:
    nano = load("nano")
    for base, text in ((TABLE, "abca"), (nano, "Call me")):
        pairs = PAIRS if base is TABLE else [("Call", " me Ishmael.")]
        model = Shaped(base, GroundingSpace.build(base, pairs), blend=blend, **idle)  # type: ignore[arg-type]
        assert torch.equal(after(model, text), after(base, text))
        ids = [[base.vocab.bos_id, *base.vocab.encode(text).ids]]
        fed, own = model.extend(model.start(), ids), base.extend(base.start(), ids)
        assert torch.equal(fed.log_probs(), own.log_probs())


@pytest.mark.paper("2508.02184")
def test_one_neighbour_at_full_strength_is_the_stored_distribution() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(3)).double()
    space = GroundingSpace.of(TABLE, ["a", "b", "c"], logits, embed=last_letter)
    model = Shaped(TABLE, space, neighbours=1, strength=1.0, blend="interpolate", threshold=0.0)
    for entry, query in enumerate(("cca", "b", "dc")):
        torch.testing.assert_close(after(model, query), torch.log_softmax(logits[entry], -1), atol=1e-6, rtol=0)


def test_equally_similar_entries_count_equally() -> None:
    space = GroundingSpace.build(TABLE, PAIRS, embed=constant)
    model = Shaped(TABLE, space, neighbours=99, strength=1.0, blend="interpolate", threshold=0.0)
    mean = torch.stack([row(TABLE, text) for text in prefixes(PAIRS)]).mean(0)
    torch.testing.assert_close(after(model, "bd"), torch.log_softmax(mean, -1), atol=1e-6, rtol=0)


@pytest.mark.paper("2508.02184")
@pytest.mark.parametrize("mode", MODES)
def test_constants_of_the_logits_do_not_count(mode: tuple[str, str]) -> None:
    texts = prefixes(PAIRS)
    logits = torch.stack([row(TABLE, text) for text in texts])
    moved = logits + torch.arange(len(texts))[:, None] * 7.3 - 20
    said = [
        after(Shaped(TABLE, GroundingSpace.of(TABLE, texts, l), blend=mode[0], centre=mode[1], threshold=0.1), "bd")
        for l in (logits, moved)  # noqa: E741
    ]
    torch.testing.assert_close(said[0], said[1], atol=1e-6, rtol=0)


@given(st.text("abcd", min_size=1, max_size=4), st.floats(0.02, 0.4), st.floats(0.1, 3))
@settings(max_examples=60)
def test_what_each_centre_does_to_the_support(text: str, threshold: float, strength: float) -> None:
    """Against the rest, `threshold` lowers no token of S, `logsumexp` raises none; the rest keeps its proportions."""
    space = GroundingSpace.build(BIGRAM, PAIRS, embed=last_letter)
    own = row(BIGRAM, text)[:4]
    moved = {}
    for centre in ("threshold", "logsumexp"):
        model = Shaped(BIGRAM, space, threshold=threshold, strength=strength, centre=centre)
        moved[centre] = after(model, text)[:4] - own
    entries, weights = model.retrieve([text])
    mixed = (weights[0, :, None] * space.values(entries[0]).double()).sum(0)
    inside = (torch.log_softmax(mixed, -1) >= math.log(threshold))[:4]
    if bool(inside.all()) or not bool(inside.any()):
        return
    for change in moved.values():
        still = change[~inside]
        assert float(still.max() - still.min()) < 1e-6
    assert bool((moved["threshold"][inside] >= moved["threshold"][~inside][0] - 1e-6).all())
    assert bool((moved["logsumexp"][inside] <= moved["logsumexp"][~inside][0] + 1e-6).all())


def test_every_chunk_th_position_is_kept() -> None:
    for chunk in (1, 2, 3):
        space = GroundingSpace.build(TABLE, PAIRS, embed=last_letter, chunk=chunk)
        assert torch.equal(space.keys, last_letter(prefixes(PAIRS, chunk)))


def test_a_token_across_the_boundary_belongs_to_the_answer() -> None:
    model = TableModel.random(["a", "b", "ab"], order=1, seed=0)
    space = GroundingSpace.build(model, [("ba", "ba")])
    assert space.example == "b" and len(space.keys) == 2  # b | ab a


def test_texts_end_with_a_whole_character() -> None:
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> Tensor:
        seen.extend(texts)
        return torch.tensor([[1.0, len(text)] for text in texts])

    model = TableModel.random([b"\xc3", b"\xa9", b"a"], order=1, seed=0)
    shaped = Shaped(model, GroundingSpace.build(model, [("a", "éa")], embed=embed))
    shaped.predict([[3, 2, 0, 1, 0, 2]]).log_probs()
    assert seen[:3] == ["a", "a", "aé"]
    assert seen[3:] == ["", "a", "a", "aé", "aé", "aéa"]  # a lone byte is never a character


def test_nothing_is_embedded_before_it_is_asked_for() -> None:
    asked: list[int] = []

    def embed(texts: Sequence[str]) -> Tensor:
        asked.append(len(texts))
        return last_letter(texts)

    shaped = Shaped(TABLE, GroundingSpace.build(TABLE, PAIRS, embed=embed))
    asked.clear()
    following = shaped.predict([[4, 0, 1, 2, 3]])
    assert asked == []
    following[0, -1].log_probs()
    assert asked == [1]


@given(st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=60)
def test_ngram_vectors_tell_texts_apart(one: str, two: str) -> None:
    vectors = torch.nn.functional.normalize(NgramVectors()([one, two, one]), dim=-1)
    assert float(vectors[0] @ vectors[2]) == pytest.approx(1)
    assert (float(vectors[0] @ vectors[1]) > 1 - 1e-9) == (one == two)


def test_ngram_vectors_weigh_the_end_of_a_text() -> None:
    query, end, begin = NgramVectors()(["the cat sat on the mat", "a dog sat on the mat", "the cat sat on a chair"])
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(query, end, 0) > cosine(query, begin, 0) > 0.1


def test_a_saved_space_is_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    space = GroundingSpace.build(TABLE, PAIRS, top=3)
    space.save(tmp_path / "space.safetensors")
    again = GroundingSpace.load(tmp_path / "space.safetensors", model=TABLE)
    assert again.digest == space.digest
    assert torch.equal(after(Shaped(TABLE, again), "bd"), after(Shaped(TABLE, space), "bd"))


def test_a_space_of_another_making_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    space = GroundingSpace.build(TABLE, PAIRS)
    path = tmp_path / "space.safetensors"
    space.save(path)
    for other in (TableModel.random(4, order=2, seed=2), TableModel.random(3, order=2, seed=1)):
        with pytest.raises(ModelError, match="build it anew"):
            GroundingSpace.load(path, model=other)
        with pytest.raises(ModelError, match="build it anew"):
            Shaped(other, space)
    for embed in (last_letter, NgramVectors(reach=2.0)):
        with pytest.raises(ModelError, match="another embedder"):
            GroundingSpace.load(path, model=TABLE, embed=embed)
    (tmp_path / "other").write_text("no space")
    for wrong in ("missing", "other"):
        with pytest.raises(InputError, match="not a grounding space"):
            GroundingSpace.load(tmp_path / wrong, model=TABLE)


def test_texts_are_generated_from_it() -> None:
    """Where one neighbour at full strength says what to do, its value is followed."""
    logits = torch.full((4, 5), -5.0)
    for entry in range(4):
        logits[entry, (entry + 1) % 4] = 5.0
    space = GroundingSpace.of(BIGRAM, ["a", "b", "c", "d"], logits, embed=last_letter)
    model = Shaped(BIGRAM, space, neighbours=1, strength=20.0)
    assert generate(model, "a", transform="greedy", max_tokens=7).text == "bcdabcd"


def test_digests_tell_settings_apart() -> None:
    space, other = GroundingSpace.build(TABLE, PAIRS), GroundingSpace.build(TABLE, PAIRS[:2])
    options = [{}, {"neighbours": 2}, {"threshold": 0.1}, {"strength": 1.0}, {"centre": "mean"}, {"temperature": 0.5},
               {"minimum_similarity": 0.2}, {"blend": "interpolate"}]  # fmt: skip
    digests = {Shaped(TABLE, s, **option).digest for s, option in itertools.product((space, other), options)}
    assert len(digests) == 2 * len(options) and TABLE.digest not in digests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 0}, "neighbours"),
        ({"threshold": -0.1}, "threshold"),
        ({"temperature": 0.0}, "temperature"),
        ({"strength": -1.0}, "strength"),
        ({"strength": 1.5, "blend": "interpolate"}, "strength"),
        ({"blend": "multiply"}, "blend"),
        ({"centre": "median"}, "centre"),
        ({"threshold": 0.0}, "no edge"),
    ],
)
def test_misuse_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shaped(TABLE, GroundingSpace.build(TABLE, PAIRS), **options)  # type: ignore[arg-type]


def test_misuse_of_a_space_is_refused() -> None:
    with pytest.raises(ValueError, match="no position"):
        GroundingSpace.build(TABLE, [("ab", "")])
    with pytest.raises(ValueError, match="chunk"):
        GroundingSpace.build(TABLE, PAIRS, chunk=0)
    with pytest.raises(ValueError, match="top"):
        GroundingSpace.build(TABLE, PAIRS, top=0)
    with pytest.raises(ValueError, match="embed must give"):
        GroundingSpace.build(TABLE, PAIRS, embed=lambda texts: torch.ones(3))

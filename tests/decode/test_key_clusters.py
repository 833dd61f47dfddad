"""Clusters of keys, and the diagnosis on keys made by hand, where it has a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextoken.decode.key_clusters import diagnose, key_clusters, mean_precision, output_keys
from nextoken.decode.navigation import Listing
from nextoken.errors import ModelError
from nextoken.head import Head
from nextoken.model.base import LanguageModel, Memory, NoMemory, State
from nextoken.model.loading import load
from nextoken.model.next import HeadNext, Next
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab

BARE = Listing(opening="{instruction}", item="{answer}.", open_item="", stops=(".",))


class Grouped(LanguageModel):
    """Letters a b c d and w x y z with keys in two tight groups, ranked in this order; the stop follows each."""

    name = "grouped"
    supports_trees = False

    def __init__(self) -> None:
        self.vocab = Vocab([*(letter.encode() for letter in "abcdwxyz."), b""], bos_id=9)
        keys, small = torch.zeros(10, 3), torch.arange(4) * 0.01
        keys[:4, 0], keys[4:8, 1], keys[8, 2], keys[9, 2] = 1 - small, 1 - small, 9.0, -9.0
        self.head = Head(keys)

    def _remember(self, batch: int) -> Memory:
        return NoMemory()

    def _feed(self, state: State, tokens: torch.Tensor, parents: torch.Tensor | None) -> Next:
        begin, letter = torch.tensor([3.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 9.0])
        return HeadNext(torch.where((tokens < 8)[..., None], letter, begin), self.head)


def spread(keys: torch.Tensor, clusters: torch.Tensor) -> float:
    """sum_v |k_v - mean of its cluster|^2."""
    return sum(
        float((part - part.mean(0)).square().sum()) for c in clusters.unique() for part in (keys[clusters == c],)
    )


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(8, 40))
def test_every_key_is_nearest_to_its_own_mean(seed: int, clusters: int, count: int) -> None:
    keys = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    found = key_clusters(keys, clusters=clusters, seed=seed)
    assert found.unique().tolist() == list(range(clusters))
    means = torch.stack([keys[found == c].mean(0) for c in range(clusters)])
    distances = torch.cdist(keys, means)
    own = distances.gather(1, found[:, None])[:, 0]
    assert bool((own <= distances.amin(1) + 1e-5).all())
    assert torch.equal(found, key_clusters(keys, clusters=clusters, seed=seed))


def test_tight_groups_are_found() -> None:
    centres = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 10
    labels = torch.arange(120) % 6
    keys = centres[labels] + 0.01 * torch.randn(120, 4, generator=torch.Generator().manual_seed(1))
    found = key_clusters(keys, clusters=6, seed=3)
    assert spread(keys, found) == pytest.approx(spread(keys, labels))
    assert spread(keys, found) < spread(keys, key_clusters(keys, clusters=3)) / 100


def test_equal_keys_make_fewer_clusters() -> None:
    keys = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0]])
    assert key_clusters(keys, clusters=4).unique().numel() == 2
    with pytest.raises(ValueError, match="clusters"):
        key_clusters(keys, clusters=6)


@pytest.mark.paper("2410.02284")
def test_the_diagnosis_of_two_groups_has_a_closed_form() -> None:
    """Ranked a b | c d (inside) w x y z (outside); right are a, c, w, x and y."""
    model = Grouped()
    clusters = key_clusters(output_keys(model), clusters=4)
    assert len({int(c) for c in clusters[:4]}) == len({int(c) for c in clusters[4:8]}) == 1
    found = diagnose(model, "", judge=set("acwxy").__contains__, clusters=clusters, candidates=8, top=2, listing=BARE)
    assert [answer.text for answer in found.answers] == list("abcdwxyz")
    assert (found.inside.count, found.inside.accuracy, found.inside.mean_rank) == (2, 0.5, 2.5)
    assert (found.outside.count, found.outside.accuracy, found.outside.mean_rank) == (4, 0.75, 5.5)
    assert (found.inside.share, found.outside.share) == (pytest.approx(2 / 6), pytest.approx(4 / 6))
    assert found.mean_precision(4) == pytest.approx((1 + 1 / 2 + 2 / 3 + 2 / 4) / 4)
    one = diagnose(model, "", judge=bool, clusters=torch.zeros(10), candidates=8, top=2, listing=BARE)
    assert one.outside.count == 0 and math.isnan(one.outside.accuracy) and one.inside.share == 1


def test_the_keys_of_a_network_are_its_output_layer() -> None:
    nano = load("nano")
    assert torch.equal(output_keys(nano), nano.model.get_output_embeddings().weight)
    with pytest.raises(ModelError, match="linear layer"):
        output_keys(TableModel.random(3, seed=0))
    with pytest.raises(ValueError, match="candidates"):
        diagnose(nano, "x", judge=bool, clusters=torch.zeros(nano.vocab.size), candidates=5, top=5)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_mean_precision_is_its_formula(right: list[bool]) -> None:
    share = [sum(right[: i + 1]) / (i + 1) for i in range(len(right))]
    assert mean_precision(right) == pytest.approx(sum(share) / len(share))
    assert mean_precision(right, 1) == float(right[0])

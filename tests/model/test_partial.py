"""PartialNext: what it tells is the truth, what it does not know it does not tell, and its bounds are sharp."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.head import statistics_from_logits
from nextoken.model.partial import PartialNext, PartialStatistics


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def listed(p: Tensor, k: int, **options: object) -> PartialNext:
    """The k most probable tokens of distributions p [B, n, V], shuffled."""
    values, ids = p.log().topk(k, dim=-1)
    shuffle = torch.randperm(k)
    return PartialNext(ids[..., shuffle], values[..., shuffle], vocab_size=p.shape[-1], **options)  # type: ignore[arg-type]


def random(seed: int, size: int, sharpness: float, zeros: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(2, 3, size, dtype=torch.float64, generator=generator)
    logits[torch.rand(2, 3, size, generator=generator) < zeros] = -math.inf
    logits[..., 0] = 0.0
    return logits.softmax(-1)


cases = given(st.integers(0, 10_000), st.integers(1, 40), st.floats(0, 6), st.floats(0, 0.5), st.data())


@cases
@settings(max_examples=80, deadline=None)
def test_the_entropy_lies_within_the_bounds(
    seed: int, size: int, sharpness: float, zeros: float, data: st.DataObject
) -> None:
    p = random(seed, size, sharpness, zeros)
    k = data.draw(st.integers(0, size))
    came = torch.randint(0, size, (2, 3, 1), generator=torch.Generator().manual_seed(seed))
    for options in ({}, {"other_ids": came, "other_logprobs": p.log().gather(-1, came)}):
        lower, upper = listed(p, k, **options).entropy_bounds()
        assert (lower <= entropy(p) + 1e-9).all()
        assert (entropy(p) <= upper + 1e-9).all()
        if k == size:
            assert torch.allclose(lower, upper, atol=1e-9)
    # Knowing one more token never widens them.
    wide, narrow = listed(p, k).entropy_bounds(), listed(p, k, **options).entropy_bounds()  # type: ignore[arg-type]
    assert (narrow[0] >= wide[0] - 1e-9).all()
    assert (narrow[1] <= wide[1] + 1e-9).all()


@cases
@settings(max_examples=60, deadline=None)
def test_both_bounds_are_attained(seed: int, size: int, sharpness: float, zeros: float, data: st.DataObject) -> None:
    p = random(seed, size, sharpness, zeros).sort(dim=-1, descending=True).values
    k = data.draw(st.integers(1, size))
    rest, cap = p[..., k:].sum(-1), p[..., k - 1]
    # Packed: as many tokens at the least listed probability as the rest allows, then what is left.
    packed, left = p.clone(), rest.clone()
    for place in range(k, size):
        packed[..., place] = torch.minimum(left, cap)
        left = left - packed[..., place]
    spread = p.clone()
    if k < size:
        spread[..., k:] = (rest / (size - k))[..., None]
    for distribution in (packed, spread):
        assert torch.allclose(distribution.sum(-1), torch.ones(2, 3, dtype=torch.float64))
        assert (distribution[..., k:] <= cap[..., None] + 1e-15).all()
    lower, upper = listed(p, k).entropy_bounds()
    assert torch.allclose(lower, entropy(packed), atol=1e-7)
    assert torch.allclose(upper, entropy(spread), atol=1e-7)


@cases
@settings(max_examples=60, deadline=None)
def test_what_is_told_equals_the_whole_distribution(
    seed: int, size: int, sharpness: float, zeros: float, data: st.DataObject
) -> None:
    p = random(seed, size, sharpness, zeros)
    k, top = data.draw(st.integers(1, size)), data.draw(st.integers(0, 50))
    targets = torch.randint(-1, size, (2, 3), generator=torch.Generator().manual_seed(seed))
    told = listed(p, k).statistics(targets, top=top)
    truth = statistics_from_logits(p.log(), targets, top=top)
    assert isinstance(told, PartialStatistics)
    assert told.logprob is not None and told.rank is not None and told.mass_above is not None
    assert truth.logprob is not None and truth.rank is not None and truth.mass_above is not None
    in_list = (p >= p.topk(k).values[..., -1:]).gather(-1, targets.clamp(min=0)[..., None])[..., 0] & (targets >= 0)
    known = ~told.logprob.isnan()
    assert (known <= in_list).all()  # of tokens tied with the last of the list some may be missing
    strictly = (p > p.topk(k).values[..., -1:]).gather(-1, targets.clamp(min=0)[..., None])[..., 0] & (targets >= 0)
    assert (strictly <= known).all()
    assert torch.allclose(told.logprob[known], truth.logprob[known], atol=1e-5)
    assert torch.equal(told.rank[known], truth.rank[known])
    assert torch.allclose(told.mass_above[known], truth.mass_above[known], atol=1e-5)
    assert (told.rank[~known] == -1).all() and told.mass_above[~known].isnan().all()
    assert torch.allclose(told.top1_prob, truth.top1_prob, atol=1e-6)
    if k > 1 or size == 1:
        assert torch.allclose(told.margin, truth.margin, atol=1e-6)
    else:
        assert told.margin.isnan().all()
    if top:
        assert told.top_logprobs is not None and told.top_ids is not None and truth.top_logprobs is not None
        shared = min(k, top)
        assert told.top_logprobs.shape[-1] == min(top, size)
        assert torch.allclose(told.top_logprobs[..., :shared], truth.top_logprobs[..., :shared], atol=1e-5)
        assert told.top_logprobs[..., shared:].isnan().all() and (told.top_ids[..., shared:] == -1).all()
    if top <= k:
        assert torch.allclose(told.rest_mass, truth.rest_mass, atol=1e-6)
    for name in ("entropy", "varentropy", "collision", "log_normalizer", "half_sum", "kurtosis"):
        assert getattr(told, name).isnan().all()


def example(**options: object) -> PartialNext:
    """p = (0.5, 0.3, 0.1, 0.06, 0.04), of which the first two are listed."""
    p = torch.tensor([[[0.5, 0.3, 0.1, 0.06, 0.04]]], dtype=torch.float64)
    return listed(p, 2, **options)


def test_a_known_token_below_the_list_has_a_logprob_but_no_rank() -> None:
    other = {"other_ids": torch.tensor([[[3]]]), "other_logprobs": torch.tensor([[[0.06]]]).log()}
    told = example(**other).statistics(torch.tensor([[3]]), top=2)
    assert told.logprob is not None and told.rank is not None and told.mass_above is not None
    assert told.logprob.item() == pytest.approx(math.log(0.06))
    assert told.rank.item() == -1
    assert told.mass_above.isnan().all()
    assert told.rest_mass.item() == pytest.approx(0.2)
    # It narrows the bounds: 0.14 are left to two tokens.
    known = -sum(p * math.log(p) for p in (0.5, 0.3, 0.06))
    assert told.entropy_lower.item() == pytest.approx(known - 0.14 * math.log(0.14))
    assert told.entropy_upper.item() == pytest.approx(known - 0.14 * math.log(0.07))


def test_an_incomplete_list_claims_no_ranks() -> None:
    told = example(is_complete=torch.tensor([[False]])).statistics(torch.tensor([[1]]), top=2)
    assert told.logprob is not None and told.rank is not None
    assert told.logprob.item() == pytest.approx(math.log(0.3))
    assert told.rank.item() == -1
    assert told.top1_prob.isnan().all() and told.margin.isnan().all()
    # Of (0.3, 0.1) with 0.6 missing, one token may have it all.
    p = torch.tensor([[[0.3, 0.1]]], dtype=torch.float64)
    lower, _ = PartialNext(
        torch.tensor([[[0, 1]]]), p.log(), vocab_size=9, is_complete=torch.tensor([[False]])
    ).entropy_bounds()
    assert lower.item() == pytest.approx(float(entropy(torch.tensor([0.3, 0.1, 0.6]))))


def test_an_impossible_token_ranks_below_the_possible_ones_only() -> None:
    p = torch.tensor([[[0.7, 0.3, 0.0, 0.0]]], dtype=torch.float64)
    told = listed(p, 4).statistics(torch.tensor([[3]]), top=4)
    assert told.logprob is not None and told.rank is not None and told.mass_above is not None
    assert (told.logprob.item(), told.rank.item(), told.mass_above.item()) == (-math.inf, 2, 1)


def test_nothing_known_is_said_so() -> None:
    empty = torch.zeros(1, 2, 0)
    told = PartialNext(empty.long(), empty, vocab_size=7).statistics(torch.tensor([[1, -1]]), top=2)
    assert told.logprob is not None and told.rank is not None
    assert told.logprob.isnan().all() and (told.rank == -1).all() and told.top1_prob.isnan().all()
    assert told.rest_mass.tolist() == [[1.0, 1.0]]
    assert told.entropy_lower.tolist() == [[0.0, 0.0]]
    assert told.entropy_upper[0, 0].item() == pytest.approx(math.log(7))


def test_an_unknown_vocabulary_has_no_upper_bound() -> None:
    lower, upper = example(choices=None).entropy_bounds()
    assert upper.item() == math.inf
    assert lower.item() == pytest.approx(float(entropy(torch.tensor([0.5, 0.3, 0.2]))))


def test_tokens_without_an_id_still_count() -> None:
    p = torch.tensor([[[0.5, 0.3]]], dtype=torch.float64)
    told = PartialNext(torch.tensor([[[-1, 4]]]), p.log(), vocab_size=5).statistics(torch.tensor([[4]]), top=2)
    assert told.rank is not None and told.top_ids is not None
    assert told.rank.item() == 1
    assert told.top_ids.tolist() == [[[-1, 4]]]
    unknown = PartialNext(torch.tensor([[[-1, 4]]]), p.log(), vocab_size=5).statistics(torch.tensor([[-1]]))
    assert unknown.logprob is not None and unknown.logprob.isnan().all()


def test_what_needs_the_whole_distribution_is_refused() -> None:
    with pytest.raises(ModelError, match="only the 2 most probable of 5 tokens"):
        example().log_probs()
    with pytest.raises(ModelError, match="without changing it"):
        example().sample()
    with pytest.raises(ValueError, match="targets must lie in"):
        example().statistics(torch.tensor([[5]]))
    with pytest.raises(ValueError, match="targets must have shape"):
        example().statistics(torch.tensor([5]))


def test_narrowing_and_joining_keep_the_bounds() -> None:
    p = random(3, 12, 2.0)
    whole = listed(p, 4)
    told, lower = whole.statistics(top=3), whole.entropy_bounds()[0]
    part = whole[1, 1:].statistics(top=3)
    assert torch.equal(part.entropy_lower, told.entropy_lower[1:, 1:])
    assert torch.equal(
        whole[torch.tensor([[True, False, True], [False] * 3])].entropy_bounds()[0][:, 0], lower[0, [0, 2]]
    )
    joined = PartialStatistics.concat([told[:1], told[1:]])
    assert isinstance(joined, PartialStatistics)
    assert torch.equal(joined.entropy_upper, told.entropy_upper)
    assert torch.equal(told.reshape(6).entropy_upper, told.entropy_upper.reshape(6))
    assert "entropy_lower" in told.as_dict()

"""Statistics of softmax(h W^T): the sweep against the textbook."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from head.formulas import assert_matches, brute, logits64
from nextoken.head import Head, Statistics, _read, _sweep, statistics, statistics_from_logits


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Set the block size: rows per block, tokens per block (a multiple of nothing)."""

    def use(width: int, rows: int = 3) -> None:
        monkeypatch.setattr(_read, "ROWS", rows)
        monkeypatch.setattr(_read, "block_width", lambda *_: width)

    return use


def problem(n: int, size: int, width: int, *, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator)
    weight = torch.randn(size, width, generator=generator) * spread / width**0.5
    return hidden, weight, torch.randint(0, size, (n,), generator=generator)


def stable_top(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = z.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.5, None), (True, 2.0, 15.0)])
def test_every_dtype_and_head(dtype: torch.dtype, bias: bool, scale: float, softcap: float | None) -> None:
    hidden, weight, targets = problem(9, 1511, 40, spread=3.0)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    head = Head(weight, torch.randn(1511).to(dtype) if bias else None, scale, softcap)
    found = statistics(hidden, head, targets, top=7)
    z = logits64(hidden, head)
    assert_matches(found, brute(z, targets), rtol=5e-5)
    values, ids = stable_top(z, 7)
    assert torch.equal(found.top_ids, ids)
    logp = values - z.logsumexp(1, keepdim=True)
    torch.testing.assert_close(found.top_logprobs.double(), logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.rest_mass.double(), 1 - logp.exp().sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [1, 7, 32, 64, 100, 101, 106])
@pytest.mark.parametrize("top", [0, 1, 3, 200])
def test_every_block_size(small_blocks, width: int, top: int) -> None:
    hidden, weight, targets = problem(8, 101, 16, spread=4.0)
    head = Head(weight)
    small_blocks(width)
    found = statistics(hidden, head, targets, top=top)
    z = logits64(hidden, head)
    assert_matches(found, brute(z, targets))
    if top == 0:
        assert found.top_ids is None and found.top_logprobs is None
        assert torch.equal(found.rest_mass, torch.ones(8))
    else:
        assert torch.equal(found.top_ids, stable_top(z, top)[1])
        assert found.top_ids.shape == (8, min(top, 101))


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 4.0, 15.0])
def test_moments_of_wide_vocabularies(spread: float) -> None:
    """From near-uniform to peaked rows at V = 150,001: every moment to 1e-4 relative."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, 150_001, generator=generator) * spread + 7.0
    targets = torch.randint(0, 150_001, (4,), generator=generator)
    found = statistics_from_logits(z, targets)
    assert_matches(found, brute(z.double(), targets), rtol=1e-4, atol=1e-9, skip=("skewness", "margin"))
    assert_matches(found, {"skewness": brute(z.double())["skewness"]}, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "count"), [(4.0, 1), (5.0, 300), (30.0, 300), (200.0, 40), (12.0, 3)])
def test_a_late_block_that_moves_the_centre(small_blocks, height: float, count: int) -> None:
    """Tokens far above the rest appear in the last block, when every running centre is already wrong."""
    z = torch.randn(3, 40_000) * 1e-3
    z[:, 39_000 : 39_000 + count] += height
    z = z.float()
    small_blocks(2048)
    expected = brute(z.double())
    found = statistics_from_logits(z)
    assert_matches(found, expected, rtol=2e-4, atol=1e-11, skip=("margin", "skewness", "kurtosis"))
    assert_matches(found, {name: expected[name] for name in ("skewness", "kurtosis")}, rtol=1e-3, atol=1e-3)


def test_the_rest_mass_of_a_sure_row_is_not_rounding() -> None:
    z = torch.zeros(1, 1000)
    z[0, 17] = 40.0
    found = statistics_from_logits(z, torch.tensor([17]), top=1)
    expected = 999 * math.exp(-40.0)
    assert found.rest_mass.item() == pytest.approx(expected, rel=1e-5)
    assert found.entropy.item() == pytest.approx(expected * 41.0, rel=1e-4)
    assert found.logprob.item() == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("z", [torch.full((2, 777), -3.25), torch.tensor([[0.0, -1e4, -1e4]])])
def test_flat_and_sure_rows_have_no_shape(z: Tensor) -> None:
    found = statistics_from_logits(z)
    assert torch.equal(found.kurtosis, torch.zeros(z.shape[0])) and torch.equal(found.skewness, torch.zeros(z.shape[0]))
    assert (found.varentropy < 1e-9).all()


def test_noise_of_single_precision_is_not_a_shape() -> None:
    """A uniform distribution whose logits carry rounding noise must not report the kurtosis of the noise."""
    z = torch.full((2, 5000), 37.0) + (torch.randint(0, 2, (2, 5000)) * 2 - 1) * 4e-6
    assert torch.equal(statistics_from_logits(z).kurtosis, torch.zeros(2))


def test_extreme_logits() -> None:
    z = (torch.rand(5, 3000) * 2 - 1) * 1e4
    targets = z.argmax(1)
    found = statistics_from_logits(z, targets, top=2)
    expected = brute(z.double(), targets)
    assert_matches(found, expected, rtol=1e-3, atol=1e-6, skip=("skewness", "kurtosis"))
    for value in found.as_dict().values():
        assert value.isfinite().all()
    assert torch.equal(found.rank, torch.zeros(5, dtype=torch.int64)) and torch.equal(found.mass_above, torch.zeros(5))


def test_one_token_and_one_row() -> None:
    found = statistics(torch.randn(1, 4), Head(torch.randn(1, 4)), torch.tensor([0]), top=3)
    assert found.top_ids.tolist() == [[0]] and found.margin.item() == 1.0 and found.top1_prob.item() == 1.0
    for name in ("logprob", "mass_above", "entropy", "varentropy", "rest_mass", "std_logprob", "mean_logprob"):
        assert getattr(found, name).item() == 0.0, name
    assert found.rank.item() == 0 and found.collision.item() == 1.0


@pytest.mark.parametrize("width", [33, 64, 4096])
def test_ties(small_blocks, width: int) -> None:
    """Equal logits: ids ascend in the top-k, and no tied token counts as more probable."""
    small_blocks(width)
    z = torch.randint(0, 4, (6, 1000)).float()
    targets = torch.randint(0, 1000, (6,))
    found = statistics_from_logits(z, targets, top=9)
    assert torch.equal(found.top_ids, stable_top(z, 9)[1])
    assert_matches(found, brute(z.double(), targets))
    flat = statistics_from_logits(torch.zeros(2, 500), torch.tensor([499, 3]), top=4)
    assert flat.top_ids.tolist() == [[0, 1, 2, 3]] * 2 and flat.rank.tolist() == [0, 0]


def test_identical_rows_of_the_head_are_never_above_each_other() -> None:
    hidden, weight, _ = problem(40, 64, 333, spread=5.0)
    head = Head(weight.repeat(20, 1))
    targets = torch.arange(40)
    distinct = statistics(hidden, Head(weight), targets)
    copies = statistics(hidden, head, targets + 64 * 13)
    assert torch.equal(copies.rank, distinct.rank * 20)
    torch.testing.assert_close(copies.mass_above, distinct.mass_above, rtol=1e-4, atol=1e-6)


def test_the_argmax_has_rank_zero() -> None:
    hidden, weight, _ = problem(200, 4001, 64, spread=3.0)
    best = statistics(hidden, Head(weight), top=1).top_ids[:, 0]
    again = statistics(hidden, Head(weight), best)
    assert (again.rank == 0).all() and (again.mass_above == 0).all()
    torch.testing.assert_close(again.logprob.exp(), again.top1_prob)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_tokens(softcap: float | None) -> None:
    hidden, weight, _ = problem(6, 900, 12, spread=3.0)
    bias = torch.zeros(900)
    bias[3:880] = -torch.inf
    head = Head(weight, bias, 0.7, softcap)
    targets = torch.tensor([0, 1, 2, 890, 899, 4])
    found = statistics(hidden, head, targets, top=40)
    z = logits64(hidden, head)
    assert_matches(found, brute(z, targets))
    assert found.logprob[5].item() == -math.inf and found.rank[5].item() == 23
    assert torch.equal(found.top_ids, stable_top(z, 40)[1])
    assert (found.top_logprobs[:, 23:] == -math.inf).all()
    torch.testing.assert_close(found.rest_mass, torch.zeros(6), atol=1e-6, rtol=0)


def test_rows_that_are_no_distribution_are_nan_and_leave_the_others_alone() -> None:
    z = torch.randn(5, 400)
    alone = statistics_from_logits(z[4:], torch.tensor([7]), top=2)
    z[0, 5], z[1, 6], z[2] = math.nan, math.inf, -math.inf
    found = statistics_from_logits(z, torch.full((5,), 7), top=2)
    for name, value in found.as_dict().items():
        if name == "rank":
            assert value[:3].tolist() == [-1, -1, -1] and (value[3:] >= 0).all()
        elif name != "top_ids":
            assert value[:3].isnan().all() and not value[3:].isnan().any(), name
        torch.testing.assert_close(value[4:], alone.as_dict()[name])


def test_no_target_is_marked() -> None:
    z = torch.randn(3, 50)
    found = statistics_from_logits(z, torch.tensor([4, -1, 5]))
    assert found.rank[1] == -1 and found.logprob[1].isnan() and found.mass_above[1].isnan()
    assert not found.logprob[::2].isnan().any()
    without = statistics_from_logits(z)
    assert without.logprob is None and without.rank is None and without.mass_above is None


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 300),
    constant=st.floats(-50, 50),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
)
def test_order_of_tokens_and_a_constant_do_not_matter(seed: int, size: int, constant: float, spread: float) -> None:
    hidden, weight, targets = problem(4, size, 8, spread=spread, seed=seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    found = statistics(hidden, Head(weight), targets, top=5)
    moved = statistics(hidden, Head(weight[order], torch.full((size,), constant)), place[targets], top=5)
    assert torch.equal(order[moved.top_ids], found.top_ids) or spread == 0.01  # near ties may swap under rounding
    # A token within rounding of the target counts as tied with it, and rounding depends on order and constant.
    logits = hidden.double() @ weight.double().T
    gaps = (logits - logits.gather(1, targets[:, None])).abs().scatter(1, targets[:, None], float("inf"))
    steady = gaps.amin(1) > 1e-3
    for name, value in found.as_dict().items():
        if name in ("skewness", "kurtosis", "rank", "top_ids"):
            continue
        other = moved.as_dict()[name] - (constant if name == "log_normalizer" else 0.0)
        if name == "mass_above":
            value, other = value[steady], other[steady]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 9), cut=st.integers(0, 9), size=st.integers(1, 200))
def test_rows_are_independent(n: int, cut: int, size: int) -> None:
    hidden, weight, targets = problem(n, size, 8, spread=3.0)
    head = Head(weight)
    cut = min(cut, n)
    whole = statistics(hidden, head, targets, top=2)
    parts = [statistics(hidden[part], head, targets[part], top=2) for part in (slice(cut), slice(cut, n))]
    for name, value in Statistics.concat(parts).as_dict().items():
        torch.testing.assert_close(value, whole.as_dict()[name], rtol=1e-4, atol=1e-5)


def test_shapes_follow_the_batch() -> None:
    hidden, weight, targets = problem(6, 90, 8)
    found = statistics(hidden.view(2, 3, 8), Head(weight), targets.view(2, 3), top=4)
    assert found.shape == (2, 3) and found.top_ids.shape == (2, 3, 4) and found.rank.shape == (2, 3)
    assert found[1].shape == (3,) and found[1].top_logprobs.shape == (3, 4)
    assert found[:, 0].shape == (2,) and found[0, 1].top_ids.shape == (4,)
    assert found[torch.tensor([[True, False, True], [False] * 3])].top_ids.shape == (2, 4)
    flat = found.reshape(-1)
    assert torch.equal(flat.top_ids, statistics(hidden, Head(weight), targets, top=4).top_ids)
    assert flat.to("cpu").shape == (6,)
    assert statistics(hidden[:0], Head(weight), targets[:0], top=4).top_ids.shape == (0, 4)
    assert statistics(hidden[0], Head(weight), targets[0]).entropy.shape == ()


def test_naive_is_the_same_contract() -> None:
    hidden, weight, targets = problem(5, 300, 8, spread=2.0)
    targets[2] = -1
    head = Head(weight, torch.randn(300), 0.5, 9.0)
    one, other = (statistics(hidden, head, targets, top=6, impl=impl) for impl in ("torch", "naive"))
    for name, value in other.as_dict().items():
        torch.testing.assert_close(one.as_dict()[name], value, rtol=1e-4, atol=2e-6, equal_nan=True)


def test_logits_of_a_head_match_the_formula() -> None:
    hidden, weight, _ = problem(5, 30, 8)
    head = Head(weight, torch.randn(30), 0.5, 2.0)
    torch.testing.assert_close(head.logits(hidden).double(), logits64(hidden, head))
    assert head.vocab_size == 30 and head.hidden_size == 8


def test_errors_say_what_to_do() -> None:
    hidden, weight, targets = problem(3, 20, 8)
    head = Head(weight)
    for call, words in (
        (lambda: statistics(hidden[:, :5], head), "H = 8"),
        (lambda: statistics(hidden, head, targets[:2]), "batch's shape"),
        (lambda: statistics(hidden, head, targets + 20), "must lie in"),
        (lambda: statistics(hidden, head, targets.float()), "integer"),
        (lambda: statistics(hidden, head, top=-1), "top must"),
        (lambda: statistics(hidden, head, impl="gpu"), "expected 'auto'"),
        (lambda: statistics_from_logits(torch.empty(3, 0)), "V >= 1"),
        (lambda: Head(weight, torch.zeros(3)), "bias must"),
        (lambda: Head(weight, softcap=0.0), "softcap"),
        (lambda: Statistics.concat([]), "at least one"),
        (lambda: Statistics.concat([statistics(hidden, head), statistics(hidden, head, top=1)]), "same top-k"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_poor_centre_is_noticed(monkeypatch: pytest.MonkeyPatch, small_blocks) -> None:
    """The check of the centre is not decoration: without it this row's varentropy is wrong."""
    z = torch.randn(2, 8192) * 1e-3
    z[:, 5000:5002] += 5.0  # all that is known of the row when its only block is centred, and 3 % of its mass
    small_blocks(8192)
    again = _sweep.Sweep._again
    calls = itertools.count()
    monkeypatch.setattr(_sweep.Sweep, "_again", lambda *args: (next(calls), again(*args))[1])
    assert_matches(statistics_from_logits(z), brute(z.double()), rtol=2e-4, skip=("margin", "skewness"))
    assert next(calls) > 0

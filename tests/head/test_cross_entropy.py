"""Cross-entropy and its companions: values and gradients against autograd on all logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy as reference

from head.formulas import logits64
from nextoken.head import Head, _terms, cross_entropy, entropy, kl_to_teacher

V = 101


@pytest.fixture(params=[1, 7, V - 1, V, V + 5])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens per block; 4 rows per block."""
    monkeypatch.setattr(_terms, "ROWS", 4)
    monkeypatch.setattr(_terms, "ENTRIES", 4 * request.param)
    return request.param


def leaves(n: int = 10, size: int = V, width: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((n, width), (size, width), (size,))
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def assert_same(loss: Tensor, wanted: Tensor, inputs: list[Tensor], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(loss)
    found, right = (torch.autograd.grad(value, inputs, upstream, retain_graph=True) for value in (loss, wanted))
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.paper("2411.09009")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.6, 4.0)])
def test_values_and_gradients(block: int, reduction: str, scale: float, softcap: float | None) -> None:
    hidden, weight, bias = leaves()
    targets = torch.randint(0, V, (10,))
    targets[[2, 7]] = -100
    targets[3] = targets[4]
    head = Head(weight, bias, scale, softcap)
    loss = cross_entropy(hidden, head, targets, reduction=reduction)
    assert_same(loss, reference(logits64(hidden, head), targets, reduction=reduction), [hidden, weight, bias])


@pytest.mark.parametrize("shift", [1, 2])
def test_shift_pairs_a_state_with_a_later_token(shift: int) -> None:
    hidden, weight, bias = leaves(12)
    sequences = hidden.view(3, 4, 6)
    targets = torch.randint(0, V, (3, 4))
    targets[1, 2] = -7
    head = Head(weight, bias)
    loss = cross_entropy(sequences, head, targets, reduction="none", shift=shift, ignore_index=-7)
    assert loss.shape == (3, 4 - shift)
    z = logits64(sequences[:, :-shift], head)
    wanted = reference(z.flatten(0, 1), targets[:, shift:].flatten(), reduction="none", ignore_index=-7)
    assert_same(loss, wanted.view(3, 4 - shift), [hidden, weight, bias])


def test_all_terms_together(block: int) -> None:
    hidden, weight, bias = leaves()
    targets = torch.randint(0, V, (10,))
    targets[5] = -100
    head = Head(weight, bias, 0.8, 6.0)
    teacher_hidden, teacher_head = (
        torch.randn(10, 3).double(),
        Head(torch.randn(V, 3).double(), torch.randn(V).double()),
    )
    loss = cross_entropy(
        hidden,
        head,
        targets,
        z_loss=0.1,
        entropy_weight=0.3,
        teacher=(teacher_hidden, teacher_head),
        teacher_weight=0.7,
        teacher_temperature=1.5,
    )
    z = logits64(hidden, head)
    log_p = z.log_softmax(1)
    soft, taught = (z / 1.5).log_softmax(1), (logits64(teacher_hidden, teacher_head) / 1.5).log_softmax(1)
    terms = (
        0.1 * z.logsumexp(1) ** 2 + 0.3 * (log_p.exp() * log_p).sum(1) + 0.7 * (taught.exp() * (taught - soft)).sum(1)
    )
    valid = targets != -100
    wanted = reference(z, targets) + terms[valid].mean()
    assert_same(loss, wanted, [hidden, weight, bias])


def test_entropy_and_divergence_alone(block: int) -> None:
    hidden, weight, bias = leaves()
    head = Head(weight, bias)
    log_p = logits64(hidden, head).log_softmax(1)
    assert_same(entropy(hidden, head), -(log_p.exp() * log_p).sum(1), [hidden, weight, bias])
    taught_by, teacher = torch.randn(10, 4).double(), Head(torch.randn(V, 4).double())
    log_t = logits64(taught_by, teacher).log_softmax(1)
    wanted = (log_t.exp() * (log_t - log_p)).sum(1)
    assert_same(kl_to_teacher(hidden, head, taught_by, teacher), wanted, [hidden, weight, bias])


def test_gradcheck() -> None:
    hidden, weight, bias = leaves(3, 11, 4)
    targets = torch.tensor([0, 10, 3])

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(h, Head(w, b, 0.7, 3.0), targets, reduction="none", z_loss=0.2, entropy_weight=-0.5)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_is_accumulated_in_single(dtype: torch.dtype, tolerance: float) -> None:
    """Only the final rounding of dW and dh to their dtype may be seen: relative to the largest entry."""
    hidden, weight, bias = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves(700, 300, 32))
    targets = torch.randint(0, 300, (700,))
    loss = cross_entropy(hidden, Head(weight, bias), targets, reduction="sum")
    assert loss.dtype == torch.float32
    wanted = reference(logits64(hidden, Head(weight, bias)), targets, reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    doubles = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    exact = reference(logits64(doubles[0], Head(*doubles[1:])), targets, reduction="sum")
    ours = torch.autograd.grad(loss, [hidden, weight, bias])
    for found, right in zip(ours, torch.autograd.grad(exact, doubles), strict=True):
        assert found.dtype == dtype
        assert ((found.double() - right).abs().amax() / right.abs().amax()).item() < tolerance


def test_no_valid_token_is_zero_with_zero_gradients() -> None:
    hidden, weight, bias = leaves()
    loss = cross_entropy(hidden, Head(weight, bias), torch.full((10,), -100))
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, [hidden, weight, bias]))


def test_all_but_one_ignored_and_single_row_and_token() -> None:
    hidden, weight, bias = leaves()
    targets = torch.full((10,), -100)
    targets[6] = 17
    head = Head(weight, bias)
    assert_same(
        cross_entropy(hidden, head, targets), reference(logits64(hidden, head), targets), [hidden, weight, bias]
    )
    one = leaves(1, 1)
    loss = cross_entropy(one[0], Head(one[1], one[2]), torch.tensor([0]))
    assert loss.item() == 0.0 and all((g == 0).all() for g in torch.autograd.grad(loss, one))


def test_extreme_logits_and_masked_tokens(block: int) -> None:
    hidden, weight, bias = leaves()
    with torch.no_grad():
        weight *= 2e3
        bias[20:60] = -torch.inf
    targets = torch.randint(0, 20, (10,))
    head = Head(weight, bias)
    loss = cross_entropy(hidden, head, targets, reduction="none")
    assert_same(loss, reference(logits64(hidden, head), targets, reduction="none"), [hidden, weight, bias], 1e-9)
    for gradient in torch.autograd.grad(entropy(hidden, head).sum(), [hidden, weight, bias]):
        assert gradient.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), constant=st.floats(-20, 20))
def test_order_of_tokens_and_a_constant_do_not_matter(seed: int, constant: float) -> None:
    torch.manual_seed(seed)
    hidden, weight, bias = leaves()
    targets, order = torch.randint(0, V, (10,)), torch.randperm(V)
    inputs = [hidden, weight, bias]
    plain = cross_entropy(hidden, Head(weight, bias), targets)
    moved = cross_entropy(hidden, Head(weight[order], bias[order] + constant), order.argsort()[targets])
    assert_same(moved, plain, inputs, 1e-9)
    assert abs(torch.autograd.grad(moved, bias)[0].sum().item()) < 1e-12  # sum_v (p - onehot)_v = 0


@pytest.mark.parametrize("filter_weight", [False, True])
def test_the_filter_keeps_its_bound(monkeypatch: pytest.MonkeyPatch, filter_weight: bool) -> None:
    """What is dropped is below eps |g| per logit: dh moves by at most eps |g| sum_v |W_v|, dW only if asked to."""
    monkeypatch.setattr(_terms, "ENTRIES", 4 * 8)
    monkeypatch.setattr(_terms, "ROWS", 4)
    hidden, weight, bias = leaves()
    hidden = (hidden.detach() * 3).requires_grad_()
    targets = torch.randint(0, V, (10,))
    head, inputs, eps = Head(weight, bias), [hidden, weight, bias], 1e-3
    exact = torch.autograd.grad(cross_entropy(hidden, head, targets, reduction="sum"), inputs)
    loss = cross_entropy(hidden, head, targets, reduction="sum", filter_eps=eps, filter_weight=filter_weight)
    found = torch.autograd.grad(loss, inputs)
    moved = (found[0] - exact[0]).abs()
    assert moved.amax() > 1e-7 and (moved <= eps * weight.detach().abs().sum(0)).all()
    moved = (found[1] - exact[1]).abs()
    assert (moved <= eps * hidden.detach().abs().sum(0)).all()
    assert (moved.amax() > 1e-7) == filter_weight
    harmless = cross_entropy(hidden, head, targets, reduction="sum", filter_eps="auto")
    torch.testing.assert_close(torch.autograd.grad(harmless, inputs), exact, rtol=1e-9, atol=1e-9)


def test_errors_say_what_to_do() -> None:
    hidden, weight, _ = (leaf.detach() for leaf in leaves())
    head, targets = Head(weight), torch.zeros(10, dtype=torch.int64)
    teacher = (hidden, Head(torch.randn(V - 1, 6).double()))
    for call, words in (
        (lambda: cross_entropy(hidden, head, targets[:3]), "targets must be"),
        (lambda: cross_entropy(hidden, head, targets + V), "must lie in"),
        (lambda: cross_entropy(hidden, head, targets - 1), "ignore_index"),
        (lambda: cross_entropy(hidden, head, targets, reduction="max"), "reduction"),
        (lambda: cross_entropy(hidden, head, targets, impl="cuda"), "expected 'auto'"),
        (lambda: cross_entropy(hidden, head, targets, shift=11), "shift must"),
        (lambda: cross_entropy(hidden, head, targets, filter_eps=1e-3, entropy_weight=1.0), "filter_eps"),
        (lambda: cross_entropy(hidden, head, targets, teacher=teacher), "share a vocabulary"),
        (lambda: kl_to_teacher(hidden, head, hidden[:2], head), "one batch shape"),
        (lambda: kl_to_teacher(hidden, head, hidden, head, temperature=0.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_it_is_in_the_registry() -> None:
    from nextoken.methods import _REGISTRY

    entry = _REGISTRY["CCE"]
    assert entry.arxiv == "2411.09009" and entry.room == "head" and entry.access == "white"

"""Log-ratios: a next-token distribution in about as many numbers as the model's hidden state has, without loss.

codec = LogRatioCodec.of_model(model)            # or .from_outputs(log_probs), of a model nobody shows
small = codec.compress(log_probs)                # [..., V] -> [..., k]
codec.decompress(small)                          # and back
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.head import Head
from nextoken.methods import method
from nextoken.model.hf import HFModel

EXTRA = 100
"""Tokens kept beyond as many as the hidden state is wide, which make the inverse well-conditioned."""


def additive_log_ratios(log_probs: Tensor, reference: int) -> Tensor:
    """alr(l)_v = l_v - l_r [..., V], float64, r the reference token.

    For logits z = W h + b these are (w_v - w_r) . h + b_v - b_r: what normalised the distribution is gone, and up to
    the known b they lie in a linear space of as many dimensions as h has.
    """
    wide = log_probs.double()
    return wide - wide[..., reference, None]


def dimension(log_probs: Tensor, *, reference: int = 0, tolerance: float | None = None) -> int:
    """Numerical rank of the log-ratios of distributions [N, V]: the width of the hidden state behind them.

    At most N is found, so give more distributions than the width. The raw log-probabilities have one dimension more.

    Args:
        log_probs: of a head without bias and soft-capping.
        reference: r.
        tolerance: singular values below this share of the greatest count as 0; default 100 times the rounding of
            `log_probs`' own precision, with which the ratios of large log-probabilities are known.
    """
    ratios = additive_log_ratios(log_probs, reference)
    values = torch.linalg.svdvals(ratios)
    share = 100 * torch.finfo(log_probs.dtype).eps if tolerance is None else tolerance
    return int((values > share * values[0]).sum())


@method(
    name="PILS compression",
    arxiv="2506.17090",
    access="gray",
    summary="log-probabilities of the whole vocabulary from those of a few tokens, without loss",
)
@dataclass(frozen=True, eq=False)
class LogRatioCodec:
    """x = alr(l)[K] [k] for tokens K, and back: h = pinv(B_K) (x - c_K), l = log softmax(B h + c).

    B [V, d] spans the log-ratios and c [V] is their known offset (of a bias): B = W - 1 w_r^T from a model, or the
    principal components of outputs. If the rows of B for K have rank d, x determines l: nothing is lost but rounding,
    which `condition` may amplify.

    Source: PILS, arXiv:2506.17090, section 3. The tokens K are drawn at random from the spelled ones; the official code
        draws them from all, padding rows included, which say nothing.
    """

    tokens: tuple[int, ...]
    """K, in the order of x."""
    reference: int
    basis: Tensor
    """B [V, d], float64."""
    offset: Tensor
    """c [V], float64."""

    @classmethod
    def of_model(cls, model: HFModel, *, extra: int = EXTRA, seed: int = 0) -> LogRatioCodec:
        """From the model's own output layer.

        Args:
            model: with a linear output layer (`has_fused_head`).
            extra: tokens kept beyond d.
            seed: of their choice.

        Raises:
            ValueError: the output layer is not linear, or soft-caps its logits, after which they fill no linear space;
                the vocabulary has fewer than d + extra + 1 spelled tokens.
        """
        head = _linear(model)
        weight = head.weight.double().cpu() * head.scale
        bias = (
            torch.zeros(len(weight), dtype=torch.float64)
            if head.bias is None
            else head.bias.double().cpu() * head.scale
        )
        chosen = _drawn(model, weight.shape[1] + extra + 1, seed)
        reference, kept = chosen[0], chosen[1:]
        return cls(tuple(kept), reference, weight - weight[reference], bias - bias[reference])

    @classmethod
    def from_outputs(
        cls,
        log_probs: Tensor,
        *,
        tokens: Sequence[int] | None = None,
        reference: int | None = None,
        width: int | None = None,
        extra: int = EXTRA,
        seed: int = 0,
    ) -> LogRatioCodec:
        """From distributions [N, V] alone: B are the principal directions of their log-ratios, c their mean.

        Args:
            log_probs: whole and unprocessed (no truncation, no penalties); more of them than the width.
            tokens, reference: K and r; drawn with `seed` by default.
            width: d; by default the numerical rank.
            extra: tokens kept beyond d.

        Raises:
            ValueError: a probability of 0 (something cut the distributions), too few of them, or too few tokens.
        """
        if log_probs.ndim != 2 or not bool(torch.isfinite(log_probs).all()):
            raise ValueError("log_probs must be [N, V] and finite: truncated distributions have no log-ratios")
        size = log_probs.shape[1]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
        reference = order[0] if reference is None else reference
        ratios = additive_log_ratios(log_probs, reference)
        offset = ratios.mean(0)
        _, values, directions = torch.linalg.svd(ratios - offset, full_matrices=False)
        share = 100 * torch.finfo(log_probs.dtype).eps
        found = int((values > share * values[0]).sum()) if width is None else width
        if found >= len(log_probs) - 1:
            raise ValueError(
                f"{len(log_probs)} distributions span {found} dimensions, which may be all that so few can: give more "
                "than the hidden state is wide"
            )
        if tokens is None:
            tokens = [token for token in order if token != reference][: found + extra]
        if len(tokens) < found:
            raise ValueError(f"{found} dimensions need at least as many tokens, got {len(tokens)}")
        return cls(tuple(tokens), reference, directions[:found].T.contiguous(), offset)

    @property
    def size(self) -> int:
        """k, the numbers kept of a distribution."""
        return len(self.tokens)

    @property
    def condition(self) -> float:
        """Greatest over least singular value of B_K: by how much errors of x may grow in h."""
        values = torch.linalg.svdvals(self.basis[list(self.tokens)])
        return float(values[0] / values[-1])

    def compress(self, log_probs: Tensor) -> Tensor:
        """x [..., k], float64, from log-probabilities [..., V] or raw logits.

        Raises:
            ValueError: a kept token has probability 0.
        """
        wide = log_probs.double().cpu()
        found = wide[..., list(self.tokens)] - wide[..., self.reference, None]
        if not bool(torch.isfinite(found).all()):
            raise ValueError("a kept token has probability 0: give distributions that nothing has truncated")
        return found

    def hidden(self, compressed: Tensor) -> Tensor:
        """h [..., d]: coordinates in `basis`; with `of_model`, the model's own hidden state."""
        kept = list(self.tokens)
        right = compressed.double() - self.offset[kept]
        flat = right.reshape(-1, self.size).T
        found: Tensor = torch.linalg.lstsq(self.basis[kept], flat).solution
        return found.T.reshape(*right.shape[:-1], -1)

    def decompress(self, compressed: Tensor) -> Tensor:
        """log p [..., V], float64."""
        return torch.log_softmax(self.hidden(compressed) @ self.basis.T + self.offset, -1)


def _linear(model: HFModel) -> Head:
    head = model.network.head() if model.has_fused_head else None
    if head is None:
        raise ValueError(f"{model.name} has no linear output layer whose weights could be read")
    if head.softcap is not None:
        raise ValueError(
            f"{model.name} caps its logits at {head.softcap:g} by tanh, after which they lie in no linear space"
        )
    return head


def _drawn(model: HFModel, count: int, seed: int) -> list[int]:
    spelled = [token for token, data in enumerate(model.vocab.token_bytes) if data]
    if len(spelled) < count:
        raise ValueError(f"{count} tokens are to be kept and the vocabulary spells {len(spelled)}: lower extra")
    order = torch.randperm(len(spelled), generator=torch.Generator().manual_seed(seed))
    return [spelled[place] for place in order[:count].tolist()]

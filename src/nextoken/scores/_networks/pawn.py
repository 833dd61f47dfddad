"""The network of PAWN: features of the metrics, pooled with weights that hidden states decide."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

METRICS = 5


class Block(nn.Module):
    """y = dropout(gelu(norm(W x + b))), and x on top where both are of one width."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.Dropout(dropout)
        self.residual = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(nn.functional.gelu(self.norm(self.linear(x))))
        return x + y if self.residual else y


def perceptron(inputs: int, outputs: int, *, width: int, blocks: int, dropout: float) -> nn.Sequential:
    """`blocks` blocks of one width, then a linear map."""
    widths = [inputs, *[width] * blocks]
    inner = [Block(a, b, dropout) for a, b in pairwise(widths)]
    return nn.Sequential(*inner, nn.Linear(widths[-1], outputs))


class PawnNetwork(nn.Module):
    """score = MLP_a(sum_i w_i * MLP_m(m_i)), w = softmax over i of MLP_g([h_i ; h_{i+1} ; i / length]).

    Args:
        hidden_size: d.
        length: L_max.
        channels: F.
        gates: G, a divisor of F; each weighs F / G neighbouring channels.
        width, blocks, dropout: of the three perceptrons.
        token_dropout: share of the places left out while training.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        length: int,
        channels: int,
        gates: int,
        width: int,
        blocks: int,
        dropout: float,
        token_dropout: float,
    ) -> None:
        super().__init__()
        self.length, self.repeats, self.token_dropout = length, channels // gates, token_dropout
        self.metric = perceptron(METRICS, channels, width=width, blocks=blocks, dropout=dropout)
        self.gate = perceptron(2 * hidden_size + 1, gates, width=width, blocks=blocks, dropout=dropout)
        self.outer = perceptron(channels, 1, width=width, blocks=blocks, dropout=dropout)

    def forward(self, values: dict[str, Tensor], counts: Tensor) -> Tensor:
        """Log-odds [B]: `metrics` [B, n, 5] and `hidden` [B, n, d]; the last row of a text gives only its state."""
        pooled = (self.weights(values, counts) * self.metric(values["metrics"][:, :-1])).sum(1)
        odds: Tensor = self.outer(pooled)[:, 0]
        return odds

    def weights(self, values: dict[str, Tensor], counts: Tensor) -> Tensor:
        """w [B, n - 1, F], 0 past the counts; over the places of a text each channel's weights sum to 1."""
        hidden = values["hidden"]
        places = torch.arange(hidden.shape[1] - 1)
        where = (places / self.length).expand(len(hidden), -1)[..., None]
        gates = self.gate(torch.cat([hidden[:, :-1], hidden[:, 1:], where], -1))
        there = places < counts[:, None] - 1
        if self.training and self.token_dropout > 0:
            there = self._thinned(there)
        weights: Tensor = gates.masked_fill(~there[..., None], -torch.inf).softmax(1)
        return weights.repeat_interleave(self.repeats, -1)

    def _thinned(self, there: Tensor) -> Tensor:
        """Some of the places of each text, at least one: a text that loses all of them is drawn anew."""
        kept = there & (torch.rand(there.shape) >= self.token_dropout)
        while bool((lost := ~kept.any(1)).any()):
            kept[lost] = there[lost] & (torch.rand(there[lost].shape) >= self.token_dropout)
        return kept

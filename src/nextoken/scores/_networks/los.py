"""The network of LOS-Net: a small transformer over sorted, standardised log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LosNetwork(nn.Module):
    """x_t = [W S_t + b ; a_t e_t w_r + a_t w_a] + position, behind a learned CLS; encoder layers; one number.

    With top = 0 there is no S_t, and the second half takes the whole width.

    Args:
        top: K.
        vocab_size: V.
        length: most rows.
        width, layers, heads, dropout: of the encoder, whose feed-forward part is as wide.
        embedded: rank feature a_t Emb[r_t] in place of a_t e_t w_r.
        pool: "cls", or "mean" of all places.
        masked: whether padding is hidden from attention and mean.
        moments: two more channels beside S_t.
    """

    def __init__(
        self,
        *,
        top: int,
        vocab_size: int,
        length: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        embedded: bool,
        pool: str,
        masked: bool,
        moments: bool,
    ) -> None:
        super().__init__()
        self.top, self.vocab_size, self.length = top, vocab_size, length
        self.pool, self.masked, self.moments = pool, masked, moments
        channels = top + 2 * moments
        half = width // 2 if channels else width
        self.token = nn.Parameter(torch.randn(half))
        self.rank = nn.Embedding(vocab_size, half) if embedded else nn.Parameter(torch.randn(half))
        self.inner = nn.Linear(channels, width - half) if channels else None
        self.first = nn.Parameter(torch.randn(width))
        self.position = nn.Embedding(length + 1, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, width, dropout, batch_first=True) for _ in range(layers)
        )
        self.outer = nn.Linear(width, 1)

    def forward(self, values: dict[str, Tensor], counts: Tensor) -> Tensor:
        """Log-odds [B].

        Args:
            values: `sorted` [B, n, K or more], `token` and `rank` [B, n], `moments` [B, n, 2], 0 past the counts.
            counts: rows of each text [B].
        """
        if not self.masked:
            missing = self.length - values["token"].shape[1]
            values = {name: _longer(value, missing) for name, value in values.items()}
        x = self._tokens(values)
        x = torch.cat([self.first.expand(len(x), 1, -1), x], 1)
        steps = torch.arange(x.shape[1])
        x = x + self.position(steps)
        hidden = steps > counts[:, None] if self.masked else torch.zeros(x.shape[:2], dtype=torch.bool)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=hidden if self.masked else None)
        if self.pool == "cls":
            pooled = x[:, 0]
        else:
            pooled = x.masked_fill(hidden[..., None], 0.0).sum(1) / (~hidden).sum(1, keepdim=True)
        odds: Tensor = self.outer(pooled)[:, 0]
        return odds

    def _tokens(self, values: dict[str, Tensor]) -> Tensor:
        actual, rank = values["token"][..., None], values["rank"].long()
        if isinstance(self.rank, nn.Embedding):
            ranked = self.rank(rank)
        else:
            ranked = 2 * (0.5 - rank[..., None] / self.vocab_size) * self.rank
        x: Tensor = actual * ranked + actual * self.token
        if self.inner is None:
            return x
        channels = values["sorted"][..., : self.top]
        if self.moments:
            channels = torch.cat([channels, values["moments"]], -1)
        return torch.cat([self.inner(channels), x], -1)


def _longer(value: Tensor, missing: int) -> Tensor:
    """Zeros behind the rows [B, n, ...] -> [B, n + missing, ...]."""
    return torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], 1)

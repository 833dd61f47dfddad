"""PAWN: five metrics of every token, pooled with weights that the model's hidden states decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nextoken.methods import method
from nextoken.scores.feature_cache import Features, Source, first_rows
from nextoken.scores.learned import Judged, Learned, Recipe
from nextoken.signature.signature import Signature

if TYPE_CHECKING:
    from torch import nn

_RECIPE = Recipe(epochs=5, rate=1e-3, decay=1e-2, batch=16, clip=1.0)
_LEAST = float(np.log(np.finfo(np.float32).smallest_subnormal))
"""In place of the logarithm of an impossible token's probability, nats."""


def pawn_features(signature: Signature, *, length: int = 512) -> Features:
    """m_t = (H_t, max_v l_t[v], l_t[x_t], (r_t + 1) / V, P_t) [N, 5], and the hidden state that predicted x_t [N, d].

    l_t are log-probabilities and H_t their entropy, nats; r_t counts the tokens strictly more probable than x_t, and
    P_t is their probability and that of x_t, the nucleus that just holds it. Where other tokens tie with x_t, the paper
    counts them in both; a signature does not tell them.

    Args:
        signature: read with `hidden=True`.
        length: pairs of neighbouring rows that are kept of each text, and so one row more.

    Raises:
        ValueError: the signature has no hidden states, or `length` < 1.

    Source: PAWN, arXiv:2501.03940, section 3.
    """
    about = signature.metadata
    if "hidden" not in signature.columns:
        raise ValueError("PAWN weighs tokens by hidden states, which this signature lacks: read with hidden=True")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    rows, offsets = first_rows(signature, length + 1)
    column = {
        name: signature.column(name)[rows].astype(np.float64)
        for name in ("entropy", "top1_prob", "logprob", "rank", "mass_above")
    }
    metrics = [
        column["entropy"],
        np.log(column["top1_prob"]),
        np.maximum(column["logprob"], _LEAST),
        (column["rank"] + 1) / about.vocab_size,
        np.minimum(column["mass_above"] + np.exp(column["logprob"]), 1.0),
    ]
    values = {
        "metrics": np.stack(metrics, 1).astype(np.float32),
        "hidden": np.ascontiguousarray(signature.column("hidden")[rows], dtype=np.float32),
    }
    return Features(values, offsets, Source.of("pawn", about), length + 1)


@method(
    name="PAWN",
    arxiv="2501.03940",
    access="white",
    trained=True,
    summary="per-token metrics pooled with weights from the hidden states, trained on labelled texts",
)
class Pawn(Learned):
    """log-odds of the label = MLP_a(sum_i w_i * MLP_m(m_i)), w = softmax over i of MLP_g([h_i ; h_{i+1} ; i / length]).

    m_i are the metrics of `pawn_features` for the i-th row, h_i the state before its token came and h_{i+1} the one
    after, w_i [F] of G gates, each for F / G channels. The states decide only how much a place counts: what is said of
    it comes from the metrics. The state after a text's last token is not in a signature, so its last row gives no
    metric, and a text needs two rows. For detection the label is 1 for machine text.

    Perceptrons have `blocks` blocks gelu(norm(W x + b)) of one width with residuals. Token dropout, which leaves out
    places while training, is off when it judges; one public re-implementation leaves it on.

    Args:
        length: L_max, most pairs of neighbouring rows that it looks at.
        channels: F, what MLP_m says of each place.
        gates: G, a divisor of F.
        width, blocks, dropout: of the three perceptrons.
        token_dropout: share of the places left out while training.
        recipe: of training; the default is that of the re-implementation, for thousands of texts.

    Raises:
        ValueError: sizes do not go together.

    Source: PAWN, arXiv:2501.03940, section 3; sizes and recipe of the re-implementation PAWN++.
    """

    kind = "pawn"

    def __init__(
        self,
        *,
        length: int = 512,
        channels: int = 256,
        gates: int = 256,
        width: int = 256,
        blocks: int = 3,
        dropout: float = 0.0,
        token_dropout: float = 0.15,
        recipe: Recipe = _RECIPE,
    ) -> None:
        super().__init__()
        if length < 1 or blocks < 0 or min(channels, gates, width) < 1 or channels % gates:
            raise ValueError(
                f"PAWN needs length and width >= 1, blocks >= 0 and channels that are a multiple of the gates, got "
                f"{length}, {width}, {blocks}, {channels} and {gates}"
            )
        if not (0 <= dropout < 1 and 0 <= token_dropout < 1):
            raise ValueError(f"dropout must be from 0 to below 1, got {dropout} and {token_dropout}")
        self.length, self.channels, self.gates, self.width, self.blocks = length, channels, gates, width, blocks
        self.dropout, self.token_dropout, self.recipe = dropout, token_dropout, recipe

    @property
    def rows(self) -> int:
        return self.length + 1

    def features(self, signature: Signature) -> Features:
        """`pawn_features` of its own length."""
        return pawn_features(signature, length=self.length)

    def weights(self, texts: Judged) -> list[np.ndarray]:
        """w of every text [pairs, F]: which places decide; each column sums to 1. Without pairs [0, F].

        Raises:
            ValueError: as of `decision_function`.
        """
        import torch

        from nextoken.scores._networks.pawn import PawnNetwork
        from nextoken.scores._networks.training import batch

        network, source = self._fitted()
        assert isinstance(network, PawnNetwork)
        features = self._features(texts)
        self._fitting(features, source, self._sizes)
        found = [np.zeros((0, self.channels), dtype=np.float32)] * len(features)
        for number in np.flatnonzero(self._judged(features.counts)):
            values, counts = batch(features, np.array([number]), length=self.rows)
            with torch.no_grad():
                found[number] = network.weights(values, counts)[0].numpy()
        return found

    def _sized(self, features: Features) -> dict[str, int]:
        return {"hidden_size": features.values["hidden"].shape[1]}

    def _made(self, sizes: dict[str, int]) -> nn.Module:
        from nextoken.scores._networks.pawn import PawnNetwork

        return PawnNetwork(
            hidden_size=sizes["hidden_size"],
            length=self.length,
            channels=self.channels,
            gates=self.gates,
            width=self.width,
            blocks=self.blocks,
            dropout=self.dropout,
            token_dropout=self.token_dropout,
        )

    def _judged(self, counts: np.ndarray) -> np.ndarray:
        return np.asarray(counts > 1)

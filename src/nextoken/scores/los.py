"""LOS-Net: a small transformer over whole next-token distributions, sorted, and the tokens that came."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import numpy as np

from nextoken.methods import method
from nextoken.scores.feature_cache import Features, Source, first_rows
from nextoken.scores.learned import Judged, Learned, Recipe
from nextoken.signature.signature import Signature

if TYPE_CHECKING:
    from torch import nn

_RECIPE = Recipe(epochs=300, rate=1e-4, decay=1e-3, batch=64, warm_up=0.1, patience=30)


def los_features(signature: Signature, *, length: int = 100) -> Features:
    """S_t = (sorted l_t - mu_t) / sd_t [N, k], a_t = (l_t[x_t] - mu_t) / sd_t [N], rank r_t [N], (mu_t, sd_t) [N, 2].

    l_t are the log-probabilities of the whole vocabulary, nats, of which S_t has the k greatest, as many as the
    signature holds; mu_t and sd_t are their unweighted mean and deviation, r_t counts tokens strictly more probable. No
    token is named, only how the distribution falls. S_t, a_t and r_t are the same at every temperature.

    The deviation is that of all V entries; official code takes that of a sample, which is sqrt(V / (V - 1)) times as
    large. An impossible token, whose logarithm is -inf, stands at -sqrt(V - 1), below which no finite one can; a
    uniform distribution has S_t = a_t = 0.

    Args:
        signature: read with `top` = K, 1000 in the paper.
        length: first rows of each text that are kept.

    Raises:
        ValueError: the model told only its most probable tokens, so mean and deviation are unknown; or `length` < 1.

    Source: LOS-Net, arXiv:2503.14043, section 4, and its released code.
    """
    about = signature.metadata
    if about.is_partial:
        raise ValueError(
            f"{about.model} tells only its most probable tokens, and LOS-Net standardises by mean and deviation over "
            "the whole vocabulary: read the texts with a model that gives whole distributions"
        )
    rows, offsets = first_rows(signature, length)
    moments = np.stack([signature.column(name)[rows] for name in ("mean_logprob", "std_logprob")], 1)
    moments = moments.astype(np.float32).reshape(-1, 2)
    top = signature.column("top_logprobs")
    top = top[rows] if len(top) else np.zeros((0, min(about.top, about.vocab_size)))
    values = {
        "sorted": _standardised(top, moments[:, :1], moments[:, 1:], about.vocab_size),
        "token": _standardised(signature.column("logprob")[rows], moments[:, 0], moments[:, 1], about.vocab_size),
        "rank": signature.column("rank")[rows].astype(np.int32),
        "moments": moments,
    }
    return Features(values, offsets, Source.of("los", about), length)


@method(
    name="LOS-Net",
    arxiv="2503.14043",
    access="gray",
    trained=True,
    summary="a small transformer over sorted next-token distributions, trained on labelled texts",
)
class LosNet(Learned):
    """log-odds of the label = u . encoder([CLS, x_1, ..., x_n]) + c, x_t = [W S_t + b ; a_t e_t w_r + a_t w_a] + place.

    S_t, a_t, r_t are of `los_features`, e_t = 1 - 2 r_t / V, the vectors of the place and of CLS are learnt; the
    encoder has post-norm layers with ReLU. What label 1 means is the caller's: in the paper members of the training
    data, or correct answers.

    Because S_t and a_t are standardised, confidence, entropy and perplexity cannot be recovered from them: what depends
    on temperature alone is invisible unless `moments` is set. Official code hides no padding, so that the length of a
    text can be read off (`masked=False`); whichever you choose, put a score of length alone beside it.

    Args:
        top: K, at most what the signature holds; None for as much as it does, 0 for the ablation without S_t.
        length: first rows of a text that it looks at.
        width, layers, heads, dropout: of the encoder.
        ranks: "scale" as above, or "embedding" for a_t Emb[r_t], a vector for each rank, in place of a_t e_t w_r.
        pool: what the verdict is read off: "cls", the place before the text, or the "mean" of all places.
        masked: hide padding.
        moments: mu_t and sd_t as two more channels beside S_t; not in the paper.
        recipe: of training; with validation texts, early stopping.

    Raises:
        ValueError: sizes do not go together.

    Source: LOS-Net, arXiv:2503.14043, section 4, and its released code.
    """

    kind = "los"

    def __init__(
        self,
        *,
        top: int | None = None,
        length: int = 100,
        width: int = 128,
        layers: int = 1,
        heads: int = 8,
        dropout: float = 0.3,
        ranks: Literal["scale", "embedding"] = "scale",
        pool: Literal["cls", "mean"] = "cls",
        masked: bool = True,
        moments: bool = False,
        recipe: Recipe = _RECIPE,
    ) -> None:
        super().__init__()
        if (top is not None and top < 0) or length < 1 or layers < 0 or not 0 <= dropout < 1:
            raise ValueError(
                f"LOS-Net needs top, layers >= 0, length >= 1 and dropout from 0 to below 1, got {top}, {layers}, "
                f"{length} and {dropout}"
            )
        if width < 2 or width % 2 or heads < 1 or width % heads:
            raise ValueError(f"the width must be even and a multiple of the {heads} heads, got {width}")
        if ranks not in ("scale", "embedding") or pool not in ("cls", "mean"):
            raise ValueError(f"ranks are 'scale' or 'embedding' and pool 'cls' or 'mean', got {ranks!r} and {pool!r}")
        self.top, self.length, self.width, self.layers, self.heads = top, length, width, layers, heads
        self.dropout, self.ranks, self.pool, self.masked, self.moments = dropout, ranks, pool, masked, moments
        self.recipe = recipe

    @property
    def rows(self) -> int:
        return self.length

    def features(self, signature: Signature) -> Features:
        """`los_features` of its own length."""
        return los_features(signature, length=self.length)

    def transferred(self, to: Judged) -> LosNet:
        """A copy that judges texts read by another model, with the weights as they are: its features name no token.

        Whether that works must be measured: the paper's transfers are uneven.

        Args:
            to: some texts read by the other model.

        Raises:
            ValueError: it was not fitted, or has a vector for each rank of one vocabulary (`ranks="embedding"`).

        Source: LOS-Net, arXiv:2503.14043, section 5.
        """
        from nextoken.scores._networks.los import LosNetwork

        self._fitted()
        if self.ranks == "embedding":
            raise ValueError("ranks of one vocabulary mean nothing in another: transfer a LOS-Net with ranks='scale'")
        made = copy.deepcopy(self)
        made.source = self._features(to).source
        made._sizes = self._sizes | {"vocab_size": made.source.vocab_size}
        assert isinstance(made.network, LosNetwork)
        made.network.vocab_size = made.source.vocab_size
        return made

    def _sized(self, features: Features) -> dict[str, int]:
        held = features.values["sorted"].shape[1]
        if self.top is not None and held < self.top:
            raise ValueError(
                f"LOS-Net with top={self.top} needs as many log-probabilities at each token and the signature has "
                f"{held}: read with top={self.top}, or take top=None"
            )
        return {"top": held if self.top is None else self.top, "vocab_size": features.source.vocab_size}

    def _made(self, sizes: dict[str, int]) -> nn.Module:
        from nextoken.scores._networks.los import LosNetwork

        return LosNetwork(
            top=sizes["top"],
            vocab_size=sizes["vocab_size"],
            length=self.length,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            dropout=self.dropout,
            embedded=self.ranks == "embedding",
            pool=self.pool,
            masked=self.masked,
            moments=self.moments,
        )

    def _judged(self, counts: np.ndarray) -> np.ndarray:
        return np.asarray(counts > 0)


def _standardised(logs: np.ndarray, mean: np.ndarray, deviation: np.ndarray, size: int) -> np.ndarray:
    """(logs - mean) / deviation in float32, held above -sqrt(size - 1), the least that a finite entry can reach."""
    flat = deviation <= 0
    z = (logs.astype(np.float64) - mean) / np.where(flat, 1.0, deviation)
    z = np.where(flat & np.isfinite(logs), 0.0, np.maximum(z, -np.sqrt(max(size - 1, 1))))
    return np.ascontiguousarray(z, dtype=np.float32)

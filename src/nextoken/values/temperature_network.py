"""TemperatureNetwork: a temperature for every next-token distribution, learnt from the logits by a robust loss."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.decode.transform import Context, Transform
from nextoken.methods import method
from nextoken.model import _saved
from nextoken.model.base import LanguageModel

Shift = Literal["max", "mean"]

_WHAT = "temperature network"


class TemperatureNetwork(nn.Module):
    """tau [...] from logits s [..., V], in `low` to `high`:

        x = (s - shift) / ||s - shift||,  h = W_2 dropout(sigmoid(W_1 x + b_1)) + b_2 [..., D],  a = softmax(h / e^c)
        tau = low + (high - low) sigmoid(w_o . ((a - 1/D) h) + b_o)

    w_o begins at 1, b_o and c at 0. x knows neither the constant that logits are known up to nor their scale: of two
    distributions that differ by a temperature only it says the same.

    Args:
        vocab_size: V.
        low, high: of tau.
        width: D.
        shift: what is taken off the logits: their mean, or their greatest, as in the released code for generation. With
            the latter all are far below 0, x is nearly the same everywhere, and less is learnt. (The released code for
            training takes off nothing, so that its network is fed something else than in use.)
        true_size: tokens there really are, where the rows behind them only fill the output layer up; these are left
            out.
        dropout: while training.

    Raises:
        ValueError: a number is out of range.

    Source: TempNet, arXiv:2404.04575, section 4, and its released code (the form for language models).
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        low: float = 0.5,
        high: float = 2.0,
        width: int = 256,
        shift: Shift = "mean",
        true_size: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        size = vocab_size if true_size is None else true_size
        if not 0 < low <= high < math.inf or not 0 <= dropout < 1:
            raise ValueError(
                f"a temperature network needs 0 < low <= high and dropout from 0 to below 1; got {low}, {high} and "
                f"{dropout}"
            )
        if not 1 < size <= vocab_size or width < 2 or shift not in get_args(Shift):
            raise ValueError(
                f"true_size must be from 2 to {vocab_size}, width at least 2 and shift 'max' or 'mean'; got {size}, "
                f"{width} and {shift!r}"
            )
        self.vocab_size, self.true_size, self.width = vocab_size, size, width
        self.low, self.high, self.shift, self.dropout = low, high, shift, dropout
        self.inner, self.outer = nn.Linear(size, width), nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.weights, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        own = logits[..., : self.true_size].to(self.inner.weight.dtype)
        own = own - (own.amax(-1, keepdim=True) if self.shift == "max" else own.mean(-1, keepdim=True))
        inside = torch.sigmoid(self.inner(F.normalize(own, dim=-1)))
        h = self.outer(F.dropout(inside, self.dropout, self.training))
        attention = torch.softmax(h / self.log_scale.exp(), -1)
        said = ((attention - 1 / self.width) * h) @ self.weights + self.bias
        return self.low + (self.high - self.low) * torch.sigmoid(said)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over settings and weights."""
        sha = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for key, tensor in sorted(self.state_dict().items()):
            sha.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    @property
    def settings(self) -> dict[str, float | str]:
        """The arguments it was made with."""
        names = ("vocab_size", "true_size", "width", "low", "high", "shift", "dropout")
        return {name: getattr(self, name) for name in names}


@method(
    name="TempNet",
    arxiv="2404.04575",
    access="gray",
    trained=True,
    summary="a small network reads the logits and sets the temperature of each token, learnt by a robust loss",
)
@dataclass(frozen=True, eq=False)
class LearnedTemperature(Transform):
    """l / tau(l), tau of a network; no other temperature is needed after it.

        LearnedTemperature(network) | TopP(0.95)

    It reads the model's own logits, so it comes first in a chain: before penalties, biases and truncation.

    Args:
        network: trained on the logits of the model in use, see `fit_temperature`.
        rho: radius it was trained with, for the record.
        model: digest of that model, empty where unknown.

    Raises:
        ValueError: when applied, a token has been removed already, or the logits are of another size.
    """

    network: TemperatureNetwork
    rho: float
    model: str = ""

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return scores / self.temperatures(scores)[:, None].to(scores.dtype)

    @torch.no_grad()
    def temperatures(self, logits: Tensor) -> Tensor:
        """tau [B] for logits [B, V]."""
        if logits.shape[-1] != self.network.vocab_size:
            raise ValueError(
                f"the temperature network reads logits of {self.network.vocab_size} tokens, got {logits.shape[-1]}; "
                "train one for this model"
            )
        if not bool(torch.isfinite(logits[..., : self.network.true_size]).all()):
            raise ValueError(
                "the temperature network reads the model's own logits, and some tokens are removed already: put it "
                "first in the chain"
            )
        # Training leaves dropout on, in a network that a caller holds too.
        mode = self.network.training
        self.network.eval()
        try:
            said: Tensor = self.network(logits.to(self.network.bias.device))
        finally:
            self.network.train(mode)
        return said.to(logits.device)

    def save(self, folder: str | Path) -> None:
        """Write to a folder: weights as safetensors, settings and the shift of the logits as JSON.

        Raises:
            OutputError: the folder cannot be written.
        """
        _saved.save(
            folder,
            _WHAT,
            settings={"rho": self.rho, "network": self.network.settings},
            weights=self.network.state_dict(),
            digests={"model": self.model},
        )

    @classmethod
    def load(cls, folder: str | Path, model: LanguageModel) -> LearnedTemperature:
        """Read what `save` wrote, for the model it was trained on.

        Raises:
            ModelError: there is no network in the folder, or it was trained on another model's logits.
        """
        saved = _saved.load(folder, _WHAT)
        network = saved.build(TemperatureNetwork, "network")
        saved.check(model=model.digest)
        return cls(network, float(saved.settings["rho"]), saved.digests["model"])

"""PostHoc: a learned deferral rule, from quantiles of the log-probabilities of an answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.errors import ModelError
from nextoken.methods import method
from nextoken.model import _saved
from nextoken.model.base import LanguageModel
from nextoken.route.confidence import Answer, DeferralRule, Floats, quantiles

_WHAT = "deferral rule"
_LOWEST = -100.0
"""Nats at which log-probabilities are cut off, so that impossible tokens leave finite features."""


@dataclass(frozen=True)
class Features:
    """phi [F] of an answer: quantiles of its log-probabilities at evenly spaced levels, whatever its length.

    Args:
        levels: of the quantiles, from 0 to 1, both ends included; at least 2. The paper does not tell its grid.
        totals: append the sum and the mean.
        embedding: append the mean final hidden state (Embed-1 of the paper), for which answers must have it.
    """

    levels: int = 11
    totals: bool = False
    embedding: bool = False

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"at least 2 levels are needed, the least and the greatest; got {self.levels}")

    def of(self, answers: Sequence[Answer]) -> Floats:
        """[N, F].

        Raises:
            ValueError: there is no answer, or one has no embedding and it is wanted.
        """
        if not answers:
            raise ValueError("there is no answer to take features of")
        grid = np.linspace(0, 1, self.levels)
        rows = [self._row(answer, grid) for answer in answers]
        if len({len(row) for row in rows}) > 1:
            raise ValueError("the embeddings of the answers differ in width; take answers of one model")
        return np.stack(rows)

    def _row(self, answer: Answer, grid: Floats) -> Floats:
        cut = np.maximum(answer.logprobs, _LOWEST)
        parts = [quantiles(cut, grid)]
        if self.totals:
            parts.append(np.array([cut.sum(), cut.mean()]))
        if self.embedding:
            if answer.embedding is None:
                raise ValueError("an answer has no embedding: make answers with Answer.of(..., embedding=True)")
            parts.append(answer.embedding)
        return np.concatenate(parts)


class DeferralNetwork(nn.Module):
    """g [N] = MLP of five layers on standardised features [N, F], with relu between.

    Args:
        inputs: F.
        width: of the four inner layers.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, inputs: int, *, width: int = 64) -> None:
        super().__init__()
        self.inputs, self.width = inputs, width
        sizes = [inputs, *[width] * 4, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.register_buffer("shift", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))

    def forward(self, features: Tensor) -> Tensor:
        inside = ((features - self.shift) / self.scale).float()
        *inner, outer = self.layers
        for layer in inner:
            inside = F.relu(layer(inside))
        said: Tensor = outer(inside)
        return said[:, 0]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the weights."""
        return _saved.fingerprint(self.state_dict())


@method(
    name="Post-Hoc-Quantile",
    arxiv="2404.10136",
    access="gray",
    trained=True,
    summary="a learned deferral rule on quantiles of token log-probabilities",
)
class PostHoc(DeferralRule):
    """confidence = -g(phi), where g estimates E[q_L - q_S | phi]: what deferring the answer would gain.

    With a threshold of -c the answers are deferred whose expected gain is above c, which is the best that can be done
    with phi if a deferral costs c. Made by `fit_post_hoc` or `load`.

    Args:
        network: g.
        features: phi.
        model_digest, vocab_digest: of the small model, whose answers and tokens alone it understands; empty where
            unknown.

    Source: Language Model Cascades, arXiv:2404.10136, section 3 (Post-Hoc-Quantile; Post-Hoc-Embed-1 with embeddings).
    """

    def __init__(
        self, network: DeferralNetwork, features: Features, *, model_digest: str = "", vocab_digest: str = ""
    ) -> None:
        self.network, self.features = network.eval(), features
        self.model_digest, self.vocab_digest = model_digest, vocab_digest

    @property
    def wants_embedding(self) -> bool:  # type: ignore[override]
        return self.features.embedding

    @torch.no_grad()
    def confidence(self, answers: Sequence[Answer]) -> Floats:
        found = self.features.of(answers)
        if found.shape[1] != self.network.inputs:
            raise ValueError(
                f"the rule takes {self.network.inputs} features and these answers give {found.shape[1]}: their "
                "embedding is of another model"
            )
        said: Floats = -self.network(torch.from_numpy(found)).double().numpy()
        return said

    def check(self, model_digest: str, vocab_digest: str) -> None:
        """Whether this is the model it was fitted for.

        Raises:
            ModelError: model or vocabulary is another.
        """
        ours, theirs = (self.model_digest, self.vocab_digest), (model_digest, vocab_digest)
        named = zip(("model", "vocabulary"), ours, theirs, strict=True)
        wrong = [what for what, mine, given in named if mine and given and mine != given]
        if wrong:
            raise ModelError(
                f"the deferral rule was fitted for another {' and '.join(wrong)}, whose log-probabilities mean "
                "something else; fit one on answers of this model"
            )

    def save(self, folder: str | Path) -> None:
        """Write to a folder: weights as safetensors, settings and digests as JSON.

        Raises:
            OutputError: the folder cannot be written.
        """
        _saved.save(
            folder,
            _WHAT,
            settings={
                "network": {"inputs": self.network.inputs, "width": self.network.width},
                "features": asdict(self.features),
            },
            weights=self.network.state_dict(),
            digests={"model": self.model_digest, "vocabulary": self.vocab_digest},
        )

    @classmethod
    def load(cls, folder: str | Path, *, model: LanguageModel) -> PostHoc:
        """Read what `save` wrote.

        Args:
            folder: where it is.
            model: the small model whose answers it is to judge.

        Raises:
            ModelError: there is no whole rule in the folder, or it was fitted for another model.
        """
        saved = _saved.load(folder, _WHAT)
        network = saved.build(DeferralNetwork, "network")
        features = saved.built(Features, "features")
        digests = saved.digests
        rule = cls(network, features, model_digest=digests["model"], vocab_digest=digests["vocabulary"])
        rule.check(model.digest, model.vocab.digest)
        return rule

"""NeuralRouter: a residual network that tells, from what the small model saw, whether its token leads elsewhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.model import _saved
from nextoken.model.base import LanguageModel
from nextoken.model.soft import SoftModel
from nextoken.route.token_router import Sight, TokenRouter

_WHAT = "token router"
_LOWEST = -100.0
"""Logits are cut off here, so that impossible tokens leave finite features."""
_ENTRIES = 1 << 24
"""Inner values of the network held at once."""


@dataclass(frozen=True)
class RouterSizes:
    """Sizes of a `RouterNetwork`; the defaults are the paper's.

    Args:
        width: between the blocks; the paper's small models are about as wide.
        blocks: their number.
        expansion: inner width of a block over `width`.
        logits: how many of the highest logits it sees, all where the vocabulary has fewer.
        dropout: share of the inner values left out in training.
    """

    width: int = 1024
    blocks: int = 6
    expansion: int = 4
    logits: int = 100
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.width, self.expansion, self.logits) < 1 or self.blocks < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "width, expansion and logits must be at least 1, blocks at least 0 and dropout below 1, got "
                f"{self.width}, {self.expansion}, {self.logits}, {self.blocks} and {self.dropout}"
            )


class RouterNetwork(nn.Module):
    """z [N] = w . LayerNorm(x_L), x_(l+1) = x_l + MLP_l(LayerNorm(x_l)), x_0 = B A [h; e_y; P l].

    h [H] is the hidden state, e_y [E] the input embedding of the token and l [K] the highest logits, from the highest
    down; P widens them to H, or to E where the model has no hidden state. Each MLP has a gelu between its two maps, and
    dropout after either.

    Args:
        hidden, embedded, logits: H (0 for none), E and K.
        sizes: `sizes.logits` is not looked at.
    """

    def __init__(self, hidden: int, embedded: int, logits: int, *, sizes: RouterSizes) -> None:
        super().__init__()
        self.hidden, self.embedded, self.logits, self.sizes = hidden, embedded, logits, sizes
        spread = hidden or embedded
        self.widen = nn.Linear(logits, spread)
        self.combine = nn.Linear(hidden + embedded + spread, sizes.width)
        self.enter = nn.Linear(sizes.width, sizes.width)
        self.blocks = nn.ModuleList(_block(sizes) for _ in range(sizes.blocks))
        self.norm = nn.LayerNorm(sizes.width)
        self.out = nn.Linear(sizes.width, 1)
        # As in the released code, where the two maps of the inputs keep torch's own initialisation.
        for layer in (self.enter, self.out, *self.blocks.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, embedded: Tensor, logits: Tensor) -> Tensor:
        x = self.enter(self.combine(torch.cat([hidden, embedded, self.widen(logits)], -1)))
        for block in self.blocks:
            x = x + block(x)
        said: Tensor = self.out(self.norm(x))[..., 0]
        return said


def _block(sizes: RouterSizes) -> nn.Sequential:
    inner = sizes.width * sizes.expansion
    return nn.Sequential(
        nn.LayerNorm(sizes.width),
        nn.Linear(sizes.width, inner),
        nn.GELU(),
        nn.Dropout(sizes.dropout),
        nn.Linear(inner, sizes.width),
        nn.Dropout(sizes.dropout),
    )


class NeuralRouter(TokenRouter):
    """score(y | s) = sigmoid(z(h, e_y, l)): how likely y is to lead elsewhere than the large model would go.

    h is the small model's final hidden state after s, l its highest raw logits, e_y its input embedding of y; without
    hidden states h is left out, and without embeddings e_y has a 1 at y. Made by `fit_token_router` or `load`.

    Args:
        network: z, in float32.
        threshold: from which score on tokens are routed.
        digests: of what it was trained with, by the names "small model", "large model" and "vocabulary".

    Source: R2R, arXiv:2505.21600, section 4.2 and its released code (HiddenStatesTokenLMHeadLogitsClassifier).
    """

    def __init__(self, network: RouterNetwork, *, threshold: float, digests: dict[str, str] | None = None) -> None:
        self.network, self.threshold, self.digests = network.eval(), float(threshold), dict(digests or {})
        self.parameters = sum(weight.numel() for weight in network.parameters())

    @classmethod
    def untrained(cls, small: LanguageModel, *, sizes: RouterSizes | None = None, seed: int = 0) -> NeuralRouter:
        """A router of the right sizes for a small model, with weights that depend on the seed alone."""
        how = sizes or RouterSizes()
        first = small.predict([[0]])
        hidden = 0 if first.hidden is None else first.hidden.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = RouterNetwork(hidden, _width(small), min(how.logits, first.vocab_size), sizes=how)
        return cls(network, threshold=0.5)

    @property
    def digest(self) -> str:  # type: ignore[override]
        return _saved.fingerprint(self.network.state_dict())

    @torch.no_grad()
    def scores(self, small: LanguageModel, sight: Sight, tokens: Tensor) -> Tensor:
        hidden, logits = self.features(sight)
        places, count = logits.shape[:-1].numel(), tokens.shape[-1]
        found = torch.empty(places, count)
        rows = [part.reshape(places, -1) for part in (hidden, logits)]
        flat = tokens.reshape(places, count)
        sizes = self.network.sizes
        step = max(1, _ENTRIES // (count * (sizes.width * sizes.expansion + self.network.embedded)))
        for begin in range(0, places, step):
            some = slice(begin, begin + step)
            seen = [part[some, None].expand(-1, count, -1) for part in rows]
            said = self.network(seen[0], self.embedded(small, flat[some]), seen[1])
            found[some] = said.sigmoid().cpu()
        return found.reshape(tokens.shape)

    def features(self, sight: Sight) -> tuple[Tensor, Tensor]:
        """h [..., H] and l [..., K] of a sight, on the network's device.

        Raises:
            ModelError: they are not as wide as those of the model it was made for.
        """
        like, count = self.network.out.weight, self.network.logits
        shape = sight.logits.shape[:-1]
        hidden = sight.logits.new_zeros(*shape, 0) if sight.hidden is None else sight.hidden
        if hidden.shape[-1] != self.network.hidden or sight.logits.shape[-1] < count:
            raise ModelError(
                f"the token router takes hidden states of width {self.network.hidden} and {count} logits, and this "
                f"model has {hidden.shape[-1]} and {sight.logits.shape[-1]}; train one for this model"
            )
        highest = sight.logits.topk(count).values.clamp(min=_LOWEST)
        return hidden.to(like), highest.to(like)

    def embedded(self, small: LanguageModel, tokens: Tensor) -> Tensor:
        """e [..., E] of tokens [...], on the network's device."""
        like = self.network.out.weight
        if isinstance(small, SoftModel):
            return small.embeddings(tokens).detach().to(like)
        return nn.functional.one_hot(tokens, small.vocab.size).to(like)

    def check(self, small: LanguageModel, large: LanguageModel) -> None:
        """Refuse models that it was not trained with.

        Raises:
            ModelError: a digest is known on both sides and differs.
        """
        found = _digests(small, large)
        wrong = [what for what, own in self.digests.items() if own and found.get(what, own) not in ("", own)]
        if wrong:
            raise ModelError(
                f"the token router was trained with another {' and another '.join(wrong)}: what diverges is a matter "
                "of both models; train one for this pair"
            )

    def save(self, folder: str | Path) -> None:
        """Write to a folder: weights as safetensors, sizes, threshold and digests as JSON.

        Raises:
            OutputError: the folder cannot be written.
        """
        network = self.network
        settings = {
            "hidden": network.hidden,
            "embedded": network.embedded,
            "logits": network.logits,
            "sizes": asdict(network.sizes),
            "threshold": self.threshold,
        }
        _saved.save(folder, _WHAT, settings=settings, weights=network.state_dict(), digests=self.digests)

    @classmethod
    def load(cls, folder: str | Path, *, small: LanguageModel, large: LanguageModel) -> NeuralRouter:
        """Read what `save` wrote.

        Args:
            folder: where it is.
            small, large: the models it is to stand between.

        Raises:
            ModelError: there is no whole router in the folder, or it was trained with another model.
        """
        saved = _saved.load(folder, _WHAT)
        saved.check(**_digests(small, large))
        try:
            how = saved.settings
            sizes = RouterSizes(**how["sizes"])
            network = RouterNetwork(how["hidden"], how["embedded"], how["logits"], sizes=sizes)
            threshold = float(how["threshold"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder} holds no whole {_WHAT}: {error}; save it again") from error
        saved.fill(network)
        return cls(network, threshold=threshold, digests=saved.digests)


def _digests(small: LanguageModel, large: LanguageModel) -> dict[str, str]:
    return {"small model": small.digest, "large model": large.digest, "vocabulary": small.vocab.digest}


def _width(small: LanguageModel) -> int:
    return small.embedding_width if isinstance(small, SoftModel) else small.vocab.size

"""DuoRouters: per layer a linear look at the hidden state, which chooses a token's width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.model import _saved
from nextoken.route.duo import DuoLLM
from nextoken.route.duo_route import Decide, Width

_WHAT = "duo routers"


class DuoRouters(nn.Module):
    """r_l = argmax_w (W_l x + b_l)_w over the widths offered, x [H] what goes into layer l's block.

    At first all weights are 0, and every width is as likely as another.

    Args:
        duo: whose blocks it routes; it serves no other.
        widths: those offered.

    Raises:
        ValueError: fewer than two widths are offered.
    """

    def __init__(self, duo: DuoLLM, *, widths: Iterable[Width] = (Width.SMALL, Width.BIG)) -> None:
        super().__init__()
        self.widths = tuple(sorted({Width(width) for width in widths}))
        if len(self.widths) < 2:
            raise ValueError(f"routers need two widths to choose from, got {len(self.widths)}")
        like = duo.blocks[0].big.gate_proj.weight
        shape = (duo.depth, len(self.widths))
        self.weight = nn.Parameter(torch.zeros(*shape, duo.blocks[0].big.hidden, device=like.device))
        self.bias = nn.Parameter(torch.zeros(shape, device=like.device))
        self.duo_digest, self.vocab_digest = duo.inner.digest, duo.vocab.digest

    @property
    def size(self) -> int:
        """Weights of one layer's router."""
        return self.weight[0].numel() + self.bias[0].numel()

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits [..., C] of the widths offered, for x [..., H] of a layer."""
        return nn.functional.linear(hidden.float(), self.weight[layer], self.bias[layer])

    def decides(self, tokens: Tensor, positions: Tensor, depth: int) -> Sequence[Decide]:
        """The rule of `DuoLLM.along`."""
        if depth != len(self.weight):
            raise ValueError(f"these routers are for {len(self.weight)} layers, the model has {depth}")
        return [self._decide(layer) for layer in range(depth)]

    def _decide(self, layer: int) -> Decide:
        def decide(hidden: Tensor) -> Tensor:
            offered = torch.tensor(self.widths, device=hidden.device)
            return offered[self.logits(layer, hidden).argmax(-1)]

        return decide

    def __repr__(self) -> str:
        return f"DuoRouters({_saved.fingerprint(self.state_dict())}, {[int(width) for width in self.widths]})"

    def save(self, folder: str | Path) -> None:
        """Write weights and settings to a folder.

        Raises:
            OutputError: it cannot be written.
        """
        digests = {"duo": self.duo_digest, "vocabulary": self.vocab_digest}
        settings = {"widths": [int(width) for width in self.widths]}
        _saved.save(folder, _WHAT, settings=settings, weights=self.state_dict(), digests=digests)

    @classmethod
    def load(cls, folder: str | Path, duo: DuoLLM) -> DuoRouters:
        """What `save` wrote.

        Raises:
            ModelError: there is nothing whole in the folder, or it was trained for other weights than the duo's.
        """
        saved = _saved.load(folder, _WHAT)
        saved.check(duo=duo.inner.digest, vocabulary=duo.vocab.digest)
        try:
            routers = cls(duo, widths=saved.settings["widths"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"the settings of the routers in {folder} are not whole ({error}); save them again"
            ) from error
        saved.fill(routers)
        return routers

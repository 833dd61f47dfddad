"""GatedLora: low-rank additions to the linear layers of a decoder, on at some tokens and off at others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.model.stack import Stack


class GatedLora(nn.Module):
    """W u + g (alpha / r) B A u in place of W u, A [r, d_in] and B [d_out, r] of every adapted layer, g of each token.

    Where g is 0 a layer gives what it gave, to the last bit. B begins at 0, so that nothing changes before training.

    Args:
        stack: the decoder; its own weights stay as they are.
        rank: r.
        alpha: the scale is alpha / r.
        targets: last names of the linear layers that are adapted; None for all within decoder layers.
        dropout: share of u left out while training.
        seed: of A.

    Raises:
        ModelError: there are no linear layers of these names.
        ValueError: rank below 1.

    Source: Hu et al., arXiv:2106.09685, section 4.1; the gate is that of arXiv:2507.11851, section 3.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str] | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets = None if targets is None else tuple(targets)
        found = {
            f"{number}.{path}": part
            for number, layer in enumerate(stack.layers)
            for path, part in layer.named_modules()
            if isinstance(part, nn.Linear) and (targets is None or path.rpartition(".")[2] in targets)
        }
        if not found:
            raise ModelError(f"{stack.model.name} has no linear layers named {targets} to adapt")
        generator = torch.Generator().manual_seed(seed)
        downs, ups = dict[str, nn.Parameter](), dict[str, nn.Parameter]()
        for path, part in found.items():
            key = path.replace(".", "_")
            start = torch.randn(rank, part.in_features, generator=generator) * part.in_features**-0.5
            device = part.weight.device
            downs[key] = nn.Parameter(start.to(device))
            ups[key] = nn.Parameter(torch.zeros(part.out_features, rank, device=device))
        self.downs, self.ups = nn.ParameterDict(downs), nn.ParameterDict(ups)
        # In a plain dictionary, for the decoder's weights are no parts of this module.
        self._adapted = {path.replace(".", "_"): part for path, part in found.items()}

    @contextmanager
    def at(self, gate: Tensor | float) -> Iterator[None]:
        """Have it on while the context lasts, with g [B, n] of the tokens [B, n] that layers are run on, or one g."""
        spread = gate[..., None] if isinstance(gate, Tensor) else torch.tensor(gate)
        handles = [part.register_forward_hook(partial(self._add, key, spread)) for key, part in self._adapted.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def addition(self, key: str, inputs: Tensor) -> Tensor:
        """(alpha / r) B A u of one adapted layer, in the precision of u."""
        kept = nn.functional.dropout(inputs.to(self.downs[key].dtype), self.dropout, self.training)
        low = nn.functional.linear(nn.functional.linear(kept, self.downs[key]), self.ups[key])
        return (low * (self.alpha / self.rank)).to(inputs.dtype)

    def _add(self, key: str, gate: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        device = output.device
        is_on = (gate != 0)[..., 0].to(device) if gate.ndim else gate != 0
        if bool(is_on.all()):
            return output + gate.to(device, output.dtype) * self.addition(key, inputs[0])
        # Most tokens are off where several are guessed ahead or few are hard: nothing is multiplied for them.
        is_on = is_on.expand(output.shape[:-1])
        shares = gate.to(device, output.dtype).expand(*output.shape[:-1], 1)[is_on]
        changed = output[is_on] + shares * self.addition(key, inputs[0][is_on])
        return output.index_put(is_on.nonzero(as_tuple=True), changed)

"""Where the activations of a transformers network are read or edited, in every decoder layer.

Families differ in what they call their parts, so parts are looked for under the names in use, and what was found is
then tried on three tokens: it must be run once per pass, with one vector per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nextoken.errors import ModelError
from nextoken.model._network import Network

Site = Literal["attention", "ffn", "layer"]
"""`attention`: the concatenated outputs of the heads, which go into the output projection; `ffn`: what the feed-forward
block adds to the residual stream, as its down projection makes it; `layer`: the residual stream after the layer."""

Act: TypeAlias = Callable[[Tensor], Tensor | None]
"""Given the activations [..., D] of a pass, what is to stand in their place; None leaves them."""

_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_BLOCKS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_DOWNS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
_TRIED = 3


@dataclass(frozen=True)
class Spot:
    """What goes into a module, or what comes out of it."""

    module: nn.Module
    side: Literal["input", "output"]
    name: str

    def hook(self, act: Act, *, first: bool) -> RemovableHandle:
        """Call `act` at every pass, before or after what is called there already."""
        if self.side == "input":
            return self.module.register_forward_pre_hook(partial(_entering, act), prepend=first, with_kwargs=True)
        return self.module.register_forward_hook(partial(_leaving, act), prepend=first)


@contextmanager
def editing(acts: Iterable[tuple[Spot, Act]]) -> Iterator[None]:
    """Put other activations in place of these while the context lasts; edits of a context within come first."""
    with _hooked(acts, first=True):
        yield


@contextmanager
def watching(acts: Iterable[tuple[Spot, Act]]) -> Iterator[None]:
    """See the activations while the context lasts, as all edits leave them."""
    with _hooked(acts, first=False):
        yield


@dataclass(frozen=True)
class Sites:
    """The spots of one site in a network, one per decoder layer, and their width D."""

    site: Site
    spots: tuple[Spot, ...]
    width: int

    @property
    def depth(self) -> int:
        """L, the number of decoder layers."""
        return len(self.spots)

    @classmethod
    def find(cls, network: Network, site: Site) -> Sites:
        """Those of a network.

        Raises:
            ValueError: there is no such site.
            ModelError: the parts have names that are not known here, are not run once per pass, or differ in width.
        """
        if site not in get_args(Site):
            raise ValueError(f"site must be one of {', '.join(get_args(Site))}; got {site!r}")
        layers = decoder_layers(network)[1]
        spots = tuple(_spot(network, layer, site, number) for number, layer in enumerate(layers))
        widths = set(_widths(network, spots))
        if len(widths) > 1:
            raise ModelError(
                f"{_kind(network)} has layers of widths {sorted(widths)} at {site!r}, which do not make one table of "
                "units; choose site='layer'"
            )
        return cls(site, spots, widths.pop())


def decoder_layers(network: Network) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder layers, and they.

    Raises:
        ModelError: there is no list of as many modules as the configuration has layers.
    """
    depth = network.config.num_hidden_layers
    for name, module in network.decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return network.decoder.get_submodule(name.rpartition(".")[0]), module
    raise ModelError(
        f"{_kind(network)} keeps its {depth} layers in no list that could be found: it cannot be looked into"
    )


def residual_stream(network: Network) -> tuple[Spot, ...]:
    """h_0, ..., h_N: what goes into the first decoder layer, then what comes out of each."""
    layers = decoder_layers(network)[1]
    after = [Spot(layer, "output", f"layer {number}") for number, layer in enumerate(layers)]
    return (Spot(layers[0], "input", "embedding"), *after)


def trial_tokens(network: Network) -> Tensor:
    """A few token ids [1, n] on which to see what a network does."""
    return (torch.arange(1, _TRIED + 1) % network.vocab_size)[None]


@contextmanager
def _hooked(acts: Iterable[tuple[Spot, Act]], *, first: bool) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    try:
        for spot, act in acts:
            handles.append(spot.hook(act, first=first))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spot(network: Network, layer: nn.Module, site: Site, number: int) -> Spot:
    label = f"layer {number}"
    if site == "layer":
        return Spot(layer, "output", label)
    if site == "attention":
        module = _descendant(_child(layer, _ATTENTIONS), _OUTPUTS)
        looked = "an attention block with an output projection"
    else:
        # Some families have no block of its own, and those with experts no one projection.
        block = _child(layer, _BLOCKS)
        module = _child(layer if block is None else block, _DOWNS) or block
        looked = "a feed-forward block"
    if module is None:
        raise ModelError(
            f"in {label} of {_kind(network)}, {looked} was not found under any known name (its parts are "
            f"{', '.join(name for name, _ in layer.named_children())}); site='layer' works with every family"
        )
    return Spot(module, "input" if site == "attention" else "output", label)


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, nn.Module)), None)


def _descendant(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    if module is None:
        return None
    return next((part for path, part in module.named_modules() if path.rpartition(".")[2] in names), None)


def _widths(network: Network, spots: Iterable[Spot]) -> list[int]:
    """D of each spot, seen on a few tokens."""
    spots = tuple(spots)
    shapes: list[list[torch.Size]] = [[] for _ in spots]
    with torch.no_grad(), watching([(spot, partial(_note, seen)) for spot, seen in zip(spots, shapes, strict=True)]):
        network.run(trial_tokens(network), use_cache=False)
    for spot, seen in zip(spots, shapes, strict=True):
        if len(seen) != 1 or seen[0].numel() != _TRIED * seen[0][-1]:
            raise ModelError(
                f"{spot.name} of {_kind(network)}: {type(spot.module).__name__} was run with activations of shape "
                f"{[tuple(shape) for shape in seen]} on {_TRIED} tokens; one vector per token, once per pass, is needed"
            )
    return [seen[0][-1] for seen in shapes]


def _note(seen: list[torch.Size], activations: Tensor) -> None:
    seen.append(activations.shape)


def _kind(network: Network) -> str:
    return type(network.module).__name__


def _entering(act: Act, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if args:
        changed = act(args[0])
        return None if changed is None else ((changed, *args[1:]), kwargs)
    named = kwargs.get("hidden_states")
    changed = None if named is None else act(named)
    return None if changed is None else (args, {**kwargs, "hidden_states": changed})


def _leaving(act: Act, module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, tuple):
        return act(output)
    changed = act(output[0])
    return None if changed is None else (changed, *output[1:])

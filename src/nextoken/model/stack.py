"""Stack: a transformers decoder taken apart, so that some of its layers can be run on some tokens.

stack = Stack(model)
memory = stack.memory(batch)
call = stack.call(memory, tokens)                  # where the tokens stand, and what they see
hidden = stack.run(stack.embed(tokens), range(2), call)
hidden = stack.run(hidden, range(2, stack.depth), call)
memory.advance([tokens.shape[1]] * batch)
following = stack.next(hidden)                     # what the model itself says
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nextoken.errors import ModelError
from nextoken.head import Head
from nextoken.model._derived import Derived, transformers_model
from nextoken.model._kv import KVMemory, SlotCache, Visibility, laid_out
from nextoken.model._sites import decoder_layers, trial_tokens
from nextoken.model.hf import HFModel
from nextoken.model.next import HeadNext

_EXACT, _ROUNDED = 1e-4, 3e-2
"""Of the largest hidden state, between layers run one by one and the model's own pass: in float32, and in less."""


@dataclass(eq=False)
class Call:
    """Where the tokens of a call stand, and what they see; the same for whatever layers are run on them.

    Args:
        positions: [B, n], for the rotary embedding.
        visible: [B, n, S], which slots a token sees; None for those up to its own, where nothing else needs a mask.
        held: [B or 1, S], the position of what each slot holds; needed where a layer sees a window only.
        cache: to which keys and values are written, and from which those of other tokens come; None for neither, and
            then the slots are the tokens of the call.
        past, end: slots in use before the call and after it, of `cache`.
        slots: [B, n], to which the tokens are written; None for those from `past` on.
    """

    positions: Tensor
    visible: Tensor | None = None
    held: Tensor | None = None
    cache: SlotCache | None = None
    past: int = 0
    end: int = 0
    slots: Tensor | None = None
    _angles: Any = field(default=None, init=False, repr=False)
    _masks: Any = field(default=None, init=False, repr=False)


class Stack:
    """h_0 = E[tokens], h_l = layer_l(h_{l-1}) for l = 1..N, p = softmax(head(norm(h_N))).

    Layers are numbered from 0 here, so that layer number l makes h_{l+1} of h_l. It works on the weights of the model
    it is made of, which it runs in evaluation mode, and passes gradients on.

    On construction a few tokens are run layer by layer and must come out as from the model.

    Args:
        model: a transformers model of the families built like Llama: token embeddings, layers that are told positions
            as rotary angles, a final norm, a linear head.

    Raises:
        ModelError: the model is built otherwise.
        ValueError: it is no transformers model.
    """

    def __init__(self, model: HFModel | Derived) -> None:
        self.model = transformers_model(model)
        self.network = self.model.network
        if not self.model.supports_trees or not self.network.is_fused:
            raise self._unlike("it has no linear head or keeps no keys and values")
        owner, layers = decoder_layers(self.network)
        self.layers = layers
        rotary, norm = getattr(owner, "rotary_emb", None), getattr(owner, "norm", None)
        if not isinstance(rotary, nn.Module) or not isinstance(norm, nn.Module):
            raise self._unlike("its decoder has no rotary_emb and norm")
        self.rotary, self.norm = rotary, norm
        self._takes = frozenset(inspect.signature(type(self.layers[0]).forward).parameters)
        visibility = Visibility.of(self.network.config)
        if visibility is None:
            raise self._unlike("its layers see in ways that masks cannot tell")
        self.visibility = visibility
        # Without a mask this kernel lets a token see those up to its own.
        self._is_causal = getattr(self.network.config, "_attn_implementation", None) == "sdpa"
        self._kinds = list(getattr(self.network.config, "layer_types", None) or [])
        self._prove()

    @property
    def depth(self) -> int:
        """N, the number of layers."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """H of the hidden states."""
        return self.head.hidden_size

    @property
    def head(self) -> Head:
        """The head over the normed states."""
        head = self.network.head()
        assert head is not None
        return head

    @cached_property
    def layer_parameters(self) -> tuple[int, ...]:
        """Weights of each layer."""
        return tuple(sum(weight.numel() for weight in layer.parameters()) for layer in self.layers)

    def embed(self, tokens: Tensor) -> Tensor:
        """h_0 [B, n, H] of ids [B, n]; ABSENT ones get the embedding of token 0."""
        return self.network.embeddings(tokens.clamp(min=0))

    def memory(self, batch: int) -> KVMemory:
        """An empty memory of keys and values, in which the slot of a token is its position."""
        return KVMemory([0] * batch, self.visibility)

    def call(
        self, memory: KVMemory, tokens: Tensor, parents: Tensor | None = None, *, lengths: Sequence[int] | None = None
    ) -> Call:
        """The call for tokens [B, n], a chain or a tree as in `LanguageModel.extend`, over what a memory holds.

        The memory is not changed; what layers write for the call counts once `advance` or `keep` takes it as kept.

        Args:
            lengths: how many tokens of each row are held in the layers that will be run, where they are others than
                the memory has as kept.
        """
        before = list(memory.lengths if lengths is None else lengths)
        past, n = max(before), tokens.shape[1]
        device = self.network.device
        windows = [window for window in self.visibility.windows.values() if window is not None]
        if parents is None and min(before) == past and (n == 1 or (past == 0 and self._is_causal)):
            positions = torch.arange(past, past + n, device=device).expand(len(before), n)
            if all(window >= past + n for window in windows):
                return Call(positions, cache=memory.cache, past=past, end=past + n)
        positions, slots, held, visible = laid_out(before, tokens, parents)
        return Call(
            positions.to(device), visible.to(device), held.to(device), memory.cache, past, past + n, slots.to(device)
        )

    def parallel(self, positions: Tensor, visible: Tensor | None = None) -> Call:
        """The call for whole texts of which nothing is remembered, as trainers want it.

        Args:
            positions: [B or 1, n].
            visible: [B, n, n], which tokens of the call each token sees; None for those up to its own.
        """
        positions = positions.to(self.network.device)
        n = positions.shape[1]
        windows = [window for window in self.visibility.windows.values() if window is not None]
        # The kernel's own mask knows of no window.
        is_narrow = bool(windows) and int(positions.max() - positions.min()) >= min(windows)
        if visible is None and (is_narrow or not self._is_causal):
            visible = torch.ones(1, n, n, dtype=torch.bool).tril()
        return Call(positions, None if visible is None else visible.to(positions.device))

    def run(self, hidden: Tensor, layers: Sequence[int], call: Call) -> Tensor:
        """h [B, n, H] after these layers, one after the other, of h before the first of them."""
        with self.network.running():
            if call.cache is not None:
                call.cache.reach(self.depth)
                call.cache.open(call.past, call.end, call.slots)
            for number in layers:
                out = self.layers[number](hidden, **self._told(hidden, number, call))
                hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """norm(h) [B, n, H], what the head reads."""
        with self.network.running():
            normed: Tensor = self.norm(hidden)
            return normed

    def next(self, hidden: Tensor) -> HeadNext:
        """What follows each token, from the states h [B, n, H] after the last layer that was run."""
        head = self.head
        return HeadNext(self.finish(hidden).to(head.weight.device), head)

    def _told(self, hidden: Tensor, number: int, call: Call) -> dict[str, Any]:
        """What a layer is called with."""
        if call._angles is None:
            call._angles = self.rotary(hidden, position_ids=call.positions)
        told: dict[str, Any] = {
            "attention_mask": self._mask(hidden, number, call),
            "position_ids": call.positions,
            "position_embeddings": call._angles,
        }
        if self.network.cache_argument is not None:
            told[self.network.cache_argument] = call.cache
        if "use_cache" in self._takes:
            told["use_cache"] = call.cache is not None
        return told

    def _mask(self, hidden: Tensor, number: int, call: Call) -> Tensor | None:
        if call.visible is None:
            return None
        if call._masks is None:
            held = call.positions if call.held is None else call.held
            call._masks = self.visibility.mask(call.positions, held, call.visible, hidden.dtype)
        masks = call._masks
        mask: Tensor = masks[self._kinds[number]] if isinstance(masks, dict) else masks
        return mask

    @torch.no_grad()
    def _prove(self) -> None:
        tokens = trial_tokens(self.network)
        expected = self.network.run(tokens, use_cache=False).float()
        try:
            memory = self.memory(1)
            head = self.run(self.embed(tokens[:, :1]), range(self.depth), self.call(memory, tokens[:, :1]))
            memory.advance([1])
            rest = self.run(self.embed(tokens[:, 1:]), range(self.depth), self.call(memory, tokens[:, 1:]))
            found = self.finish(torch.cat([head, rest], 1)).float()
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._unlike(str(error).splitlines()[0]) from error
        slack = _EXACT if self.network.dtype == torch.float32 else _ROUNDED
        if not bool((found - expected).abs().max() <= slack * expected.abs().max()):
            raise self._unlike("its layers run one by one do not make the states of a whole pass")

    def _unlike(self, why: str) -> ModelError:
        return ModelError(
            f"{self.model.name} ({type(self.network.module).__name__}) cannot be run layer by layer ({why}); families "
            "built like Llama can (Llama, Mistral, Qwen, SmolLM, OLMo)"
        )

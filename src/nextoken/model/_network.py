"""A causal LM of transformers taken apart: the decoder that makes hidden states, the head that makes logits of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from nextoken.head import Head
from nextoken.model.next import DenseNext, HeadNext, Next

# transformers from 5.24 on, before it, and its state-space models.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class Network:
    """Forward passes of a live transformers model, whatever mode it is in.

    What a pass returns is `raw`: final hidden states [B, n, H] while `is_fused`, else logits [B, n, V]; `next` makes a
    `Next` of either.

    Args:
        module: a causal LM; it is run in evaluation mode and left in the mode it was in.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.config = module.config.get_text_config(decoder=True)
        self.decoder: nn.Module = module.get_decoder() if hasattr(module, "get_decoder") else module.base_model
        self._embedding, self._output = module.get_input_embeddings(), module.get_output_embeddings()
        setting = partial(getattr, self.config)
        scale = float(setting("logit_scale", None) or 1.0)  # Cohere
        scale *= float(setting("lm_head_multiplier", None) or 1.0)  # Falcon-H1
        scale /= float(setting("logits_scaling", None) or 1.0)  # Granite
        cap = setting("final_logit_softcapping", None) or setting("logits_soft_cap", None)  # Gemma, RecurrentGemma
        self._scale, self._softcap = scale, cap
        self.is_fused = self.decoder is not module and self.head() is not None

    def head(self) -> Head | None:
        """The head as the configuration tells it, None where the output layer is not linear with weights in memory.

        Made anew each time, for the weights of a live model may be moved.
        """
        layer = self._output
        if type(layer) is not nn.Linear:
            return None
        weight, bias = layer.weight.detach(), layer.bias
        if not weight.is_floating_point() or weight.is_meta:
            return None
        return Head(weight, None if bias is None else bias.detach(), scale=self._scale, softcap=self._softcap)

    @property
    def vocab_size(self) -> int:
        """V: rows of the output layer."""
        return int(getattr(self._output, "out_features", None) or self.config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the hidden states."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self._embedding.weight.device
        return torch.device("cpu") if device.type == "meta" else device

    def accepts(self, argument: str) -> bool:
        """Whether the decoder's forward pass has an argument of this name."""
        return argument in inspect.signature(self.decoder.forward).parameters

    @cached_property
    def cache_argument(self) -> str | None:
        """What the decoder calls the argument that takes a cache, None where it takes none."""
        return next((name for name in _CACHE_NAMES if self.accepts(name)), None)

    @property
    def embedding_width(self) -> int:
        """d of the input embeddings, which some families project to another width."""
        return int(self._embedding.weight.shape[-1])

    def embeddings(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., d] of ids, as the embedding layer gives them: scaled where its family scales them."""
        with self.running():
            found: Tensor = self._embedding(ids.to(self.device))
            return found

    @cached_property
    def takes_embeddings(self) -> bool:
        """Whether a pass says of the embeddings of tokens what it says of the tokens; found out by trying."""
        if not self.accepts("inputs_embeds"):
            return False
        ids = (torch.arange(1, 4) % self.vocab_size)[None]
        with torch.no_grad():
            try:
                seen, expected = (self.run(x, use_cache=False).float() for x in (self.embeddings(ids), ids))
            except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                return False
        return bool((seen - expected).abs().max() <= 1e-3 * expected.abs().max())

    def run(self, ids: Tensor, **arguments: Any) -> Tensor:
        """raw [B, n, ...] for ids [B, n], or for input embeddings [B, n, d]."""
        with self.running():
            if self.is_fused:
                hidden: Tensor = self.decoder(**self._named(ids), **arguments).last_hidden_state
                return hidden
            return self.logits(ids, **arguments)

    def logits(self, ids: Tensor, **arguments: Any) -> Tensor:
        """The model's own logits [B, n, V]."""
        with self.running():
            logits: Tensor = self.module(**self._named(ids), **arguments).logits
            return logits

    def _named(self, inputs: Tensor) -> dict[str, Tensor]:
        if inputs.is_floating_point():
            return {"inputs_embeds": inputs.to(self.device, self._embedding.weight.dtype)}
        return {"input_ids": inputs.to(self.device)}

    def next(self, raw: Tensor) -> Next:
        """The distributions that `run` computed."""
        if not self.is_fused:
            return DenseNext(raw)
        head = self.head()
        assert head is not None
        return HeadNext(raw.to(head.weight.device), head)

    def blank(self, batch: int, n: int) -> Tensor:
        """raw [B, n, ...] of a pass in which no row had a token."""
        head = self.head() if self.is_fused else None
        width = self.vocab_size if head is None else head.hidden_size
        return torch.zeros(batch, n, width, dtype=self.dtype, device=self.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The state in which all passes are made: evaluation mode, from which the module returns to what it was in."""
        if not self.module.training:
            yield
            return
        training = [part for part in self.module.modules() if part.training]
        self.module.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True

"""HFValue: values of every next token, from the hidden states of a transformers model."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.errors import ModelError
from nextoken.model import _saved
from nextoken.model._network import Network
from nextoken.model.base import State, Tokens
from nextoken.model.hf import HFModel
from nextoken.model.value import ValueModel

_WHAT, _BODY = "value", "body"


class ValueHead(nn.Module):
    """q = W_2 dropout(relu(W_1 h + b_1)) + b_2: values [..., V] from hidden states [..., H], 2 H wide inside.

    W_2 and b_2 begin at 0, so that a token never seen in training keeps a value near 0: nothing is known against it.
    (The released code of rectification begins at random.)

    Args:
        hidden_size, vocab_size: H and V.
        dropout: share of the inner units left out while training.
    """

    def __init__(self, hidden_size: int, vocab_size: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden_size, self.vocab_size, self.dropout = hidden_size, vocab_size, dropout
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.outer = nn.Linear(2 * hidden_size, vocab_size)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(self._inside(hidden), self.outer.weight, self.outer.bias)

    def taken(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """q [...] of one token each: hidden [..., H], actions [...]; nothing of size V is made."""
        inside = self._inside(hidden)
        return (inside * F.embedding(actions, self.outer.weight)).sum(-1) + self.outer.bias[actions]

    def _inside(self, hidden: Tensor) -> Tensor:
        inside = F.relu(self.inner(hidden.to(self.inner.weight.dtype)))
        return F.dropout(inside, self.dropout, self.training)


class HFValue(ValueModel):
    """Q(s, a) = head(h(s))[a], h(s) the final hidden state of a transformers model after the tokens s.

    It remembers as the body does: keys and values, trees, rows of different lengths. Values are clamped to the bounds.

    Args:
        body: its weights are trained along with the head, so do not lend it to another model: see `on`.
        head: over the body's vocabulary.
        low, high: the least and the greatest return.
        name: for display.

    Raises:
        ModelError: the body gives no hidden states.
        ValueError: the head does not fit the body, or the bounds are none.
    """

    def __init__(
        self, body: HFModel, head: ValueHead, *, low: float = -1.0, high: float = 0.0, name: str | None = None
    ) -> None:
        if not body.has_fused_head:
            raise ModelError(f"{body.name} gives no hidden states, which a value head reads; take another body")
        width = int(body.model.get_output_embeddings().weight.shape[1])
        if (head.hidden_size, head.vocab_size) != (width, body.vocab.size):
            raise ValueError(
                f"the head is for width {head.hidden_size} and {head.vocab_size} tokens, {body.name} has {width} and "
                f"{body.vocab.size}"
            )
        if not low < high:
            raise ValueError(f"values need low < high, got {low} and {high}")
        self.body, self.head, self.low, self.high = body, head.eval(), low, high
        self.name, self.vocab = name or f"value({body.name})", body.vocab
        self.context_length, self.supports_trees = body.context_length, body.supports_trees

    @classmethod
    def on(
        cls, model: HFModel, *, low: float = -1.0, high: float = 0.0, dropout: float = 0.0, seed: int = 0
    ) -> HFValue:
        """A new head on a copy of `model`, which stays as it is; the copy is in float32."""
        network = copy.deepcopy(model.model).to(torch.float32)
        body = HFModel(network, model.tokenizer, name=model.name)
        width = int(network.get_output_embeddings().weight.shape[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = ValueHead(width, model.vocab.size, dropout=dropout)
        return cls(body, head.to(network.device), low=low, high=high)

    @property
    def digest(self) -> str:
        """Of the body, the head and the bounds; empty where the body's is."""
        parts = (self.body.digest, _saved.fingerprint(self.head.state_dict()), self.low, self.high)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16] if parts[0] else ""

    def start(self, batch: int = 1) -> State:
        return self.body.start(batch)

    @torch.no_grad()
    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        return self._valued(self.body.extend(state, tokens, parents).hidden)

    @torch.no_grad()
    def predict(self, tokens: Tokens) -> Tensor:
        return self._valued(self.body.predict(tokens).hidden)

    def hidden(self, ids: Tensor) -> Tensor:
        """h [B, n, H] along rows of ids [B, n], with gradients; what stands to the right of a token does not matter."""
        return Network(self.body.model).run(ids, use_cache=False)

    def save(self, folder: str | Path) -> None:
        """Write to a folder: body and tokenizer in Hugging Face layout, head as safetensors, settings as JSON.

        Raises:
            OutputError: the folder cannot be written.
        """
        self.body.save(Path(folder) / _BODY)
        _saved.save(
            folder,
            _WHAT,
            settings={
                "name": self.name,
                "head": {
                    "hidden_size": self.head.hidden_size,
                    "vocab_size": self.head.vocab_size,
                    "dropout": self.head.dropout,
                },
                "low": self.low,
                "high": self.high,
            },
            weights=self.head.state_dict(),
            digests={"vocabulary": self.vocab.digest, "body": self.body.digest},
        )

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device | None = None) -> HFValue:
        """Read what `save` wrote.

        Raises:
            ModelError: there is no value in the folder, or weights or tokenizer are not those that were saved.
        """
        saved = _saved.load(folder, _WHAT)
        body = HFModel.from_pretrained(Path(folder) / _BODY, device=device, dtype="float32", local_files_only=True)
        saved.check(vocabulary=body.vocab.digest, body=body.digest)
        head = saved.build(ValueHead, "head").to(body.model.device)
        settings = saved.settings
        return cls(body, head, low=settings["low"], high=settings["high"], name=settings["name"])

    def _valued(self, hidden: Tensor | None) -> Tensor:
        assert hidden is not None
        values: Tensor = self.head(hidden)
        return values.clamp(self.low, self.high)

"""HFValue: values of every next token, from the hidden states of a transformers model."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.errors import ModelError, OutputError
from nextoken.model._network import Network
from nextoken.model.base import State, Tokens
from nextoken.model.hf import HFModel
from nextoken.model.value import ValueModel

_FORMAT = 1
_SETTINGS, _HEAD, _BODY = "value.json", "head.safetensors", "body"


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
        parts = (self.body.digest, _digest(self.head), self.low, self.high)
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
        target = Path(folder)
        settings = {
            "format": _FORMAT,
            "name": self.name,
            "hidden_size": self.head.hidden_size,
            "vocab_size": self.head.vocab_size,
            "dropout": self.head.dropout,
            "low": self.low,
            "high": self.high,
            "digests": {"vocab": self.vocab.digest, "body": self.body.digest, "head": _digest(self.head)},
        }
        try:
            target.mkdir(parents=True, exist_ok=True)
            # The settings come last: a folder without them is not whole.
            (target / _SETTINGS).unlink(missing_ok=True)
            self.body.model.save_pretrained(target / _BODY)
            self.body.tokenizer.save_pretrained(target / _BODY)
            weights = {key: tensor.detach().cpu().contiguous() for key, tensor in self.head.state_dict().items()}
            save_file(weights, target / _HEAD)
            (target / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OutputError(f"the value cannot be written to {target}: {error}") from error

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device | None = None) -> HFValue:
        """Read what `save` wrote.

        Raises:
            ModelError: there is no value in the folder, or weights or tokenizer are not those that were saved.
        """
        source = Path(folder)
        settings = _settings(source)
        body = HFModel.from_pretrained(source / _BODY, device=device, dtype="float32", local_files_only=True)
        try:
            head = ValueHead(settings["hidden_size"], settings["vocab_size"], dropout=settings["dropout"])
            head.load_state_dict(load_file(source / _HEAD))
            bounds, name, digests = (settings["low"], settings["high"]), settings["name"], settings["digests"]
            found = {"vocab": body.vocab.digest, "body": body.digest, "head": _digest(head)}
            wrong = [part for part, digest in found.items() if digest != digests[part]]
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
            raise ModelError(f"{source} holds no whole value: {str(error).splitlines()[0]}; save it again") from error
        if wrong:
            raise ModelError(
                f"{' and '.join(wrong)} of the value in {source} are not those it was saved with; save it again, or "
                "train one for this tokenizer"
            )
        return cls(body, head.to(body.model.device), low=bounds[0], high=bounds[1], name=name)

    def _valued(self, hidden: Tensor | None) -> Tensor:
        assert hidden is not None
        values: Tensor = self.head(hidden)
        return values.clamp(self.low, self.high)


def _settings(source: Path) -> dict[str, Any]:
    path = source / _SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{source} holds no {_SETTINGS} that can be read; give a folder written by save()") from error
    if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
        raise ModelError(
            f"the value in {source} is of another format than {_FORMAT}; load it with the version it is of"
        )
    return settings


def _digest(head: nn.Module) -> str:
    sha = hashlib.sha256()
    for key, tensor in sorted(head.state_dict().items()):
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]

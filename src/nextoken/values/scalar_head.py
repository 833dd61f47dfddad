"""ScalarValue: one number for every text begun so, from the hidden states of a transformers model."""

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

_WHAT, _BODY = "scalar value", "body"


class ScalarHead(nn.Module):
    """z = W_2 silu(W_1 h + b_1) + b_2: one number [...] from each hidden state [..., H].

    W_2 and b_2 begin at 0: before training z is 0 everywhere.

    Args:
        hidden_size: H.
        inner_size: rows of W_1; H where it is not given.
    """

    def __init__(self, hidden_size: int, *, inner_size: int | None = None) -> None:
        super().__init__()
        self.hidden_size, self.inner_size = hidden_size, inner_size or hidden_size
        self.inner = nn.Linear(self.hidden_size, self.inner_size)
        self.outer = nn.Linear(self.inner_size, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        inside = F.silu(self.inner(hidden.to(self.inner.weight.dtype)))
        return F.linear(inside, self.outer.weight, self.outer.bias)[..., 0]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the weights."""
        return _saved.fingerprint(self.state_dict())


class ScalarValue:
    """z(s) = head(h(s)), h(s) the final hidden state of a transformers model after the tokens s.

        state = value.start(batch=B)
        z = value.extend(state, tokens)               # [B, n], float32

    It is driven as a `LanguageModel` is, and remembers as its body does: keys and values, trees, rows of different
    lengths. What z means (a logit, a length) is for who trains it to say.

    Args:
        body: any transformers model that gives hidden states.
        head: of the body's width.
        owns_body: whether the body belongs to this value alone: then training may change it and `save` writes it.
            Otherwise it is another's, is left as it is, and has to be given again to `load`.
        name: for display.

    Raises:
        ModelError: the body gives no hidden states.
        ValueError: the head is of another width.
    """

    def __init__(self, body: HFModel, head: ScalarHead, *, owns_body: bool = False, name: str | None = None) -> None:
        if not body.has_fused_head:
            raise ModelError(f"{body.name} gives no hidden states, which a value head reads; take another body")
        width = _width(body)
        if head.hidden_size != width:
            raise ValueError(f"the head is for hidden states of width {head.hidden_size}, {body.name} has {width}")
        self.body, self.head, self.owns_body = body, head.to(body.network.device).eval(), owns_body
        self.name, self.vocab = name or f"value({body.name})", body.vocab
        self.context_length, self.supports_trees = body.context_length, body.supports_trees

    @classmethod
    def on(cls, model: HFModel, *, inner_size: int | None = None, seed: int = 0) -> ScalarValue:
        """A new head on `model` itself, which is read and never changed."""
        return cls(model, _new_head(model, inner_size, seed))

    @classmethod
    def on_copy(cls, model: HFModel, *, inner_size: int | None = None, seed: int = 0) -> ScalarValue:
        """A new head on a copy of `model` in float32, to be trained along with it; the model stays as it is."""
        network = copy.deepcopy(model.model).to(torch.float32)
        body = HFModel(network, model.tokenizer, name=model.name)
        return cls(body, _new_head(body, inner_size, seed), owns_body=True)

    @property
    def digest(self) -> str:
        """Of body and head; empty where the body's is."""
        parts = (self.body.digest, self.head.digest)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16] if parts[0] else ""

    def start(self, batch: int = 1) -> State:
        """A state of `batch` rows that have seen no token."""
        return self.body.start(batch)

    @torch.no_grad()
    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        """Feed n tokens to each row; z [B, n], entry (b, i) after the i-th token of the call in row b.

        Arguments and errors as of `LanguageModel.extend`; what stands at absent tokens is undefined.
        """
        return self._said(self.body.extend(state, tokens, parents).hidden)

    @torch.no_grad()
    def predict(self, tokens: Tokens) -> Tensor:
        """z [B, n] along rows [B, n] read from their start, remembering nothing."""
        return self._said(self.body.predict(tokens).hidden)

    def hidden(self, ids: Tensor) -> Tensor:
        """h [B, n, H] along rows of ids [B, n], with gradients where the body is this value's own.

        What stands to the right of a token does not matter to it.
        """
        with torch.set_grad_enabled(self.owns_body and torch.is_grad_enabled()):
            return Network(self.body.model).run(ids, use_cache=False)

    def parameters(self) -> list[nn.Parameter]:
        """What training changes: the head's weights, and the body's where it is this value's own."""
        body = [weight for weight in self.body.model.parameters() if weight.requires_grad] if self.owns_body else []
        return [*body, *self.head.parameters()]

    def save(self, folder: str | Path) -> None:
        """Write to a folder: head as safetensors, settings as JSON, and the body, in Hugging Face layout, if owned.

        Raises:
            OutputError: the folder cannot be written.
        """
        if self.owns_body:
            self.body.save(Path(folder) / _BODY)
        _saved.save(
            folder,
            _WHAT,
            settings={
                "name": self.name,
                "owns_body": self.owns_body,
                "head": {"hidden_size": self.head.hidden_size, "inner_size": self.head.inner_size},
            },
            weights=self.head.state_dict(),
            digests={"vocabulary": self.vocab.digest, "body": self.body.digest},
        )

    @classmethod
    def load(
        cls, folder: str | Path, *, body: HFModel | None = None, device: str | torch.device | None = None
    ) -> ScalarValue:
        """Read what `save` wrote.

        Args:
            folder: where it is.
            body: the model the head was trained on, where that was not the value's own.
            device: of a body that is in the folder.

        Raises:
            ModelError: there is no value in the folder, or body, weights or tokenizer are not those it was saved with.
            ValueError: a body is needed and not given, or given and in the folder already.
        """
        source, saved = Path(folder), _saved.load(folder, _WHAT)
        owned = bool(saved.settings.get("owns_body"))
        if owned == (body is not None):
            raise ValueError(
                f"the value in {source} has a body of its own: leave out body"
                if owned
                else f"the value in {source} is a head on another's hidden states: pass that model as body"
            )
        if body is None:
            body = HFModel.from_pretrained(source / _BODY, device=device, dtype="float32", local_files_only=True)
        head = saved.build(ScalarHead, "head")
        saved.check(vocabulary=body.vocab.digest, body=body.digest)
        return cls(body, head, owns_body=owned, name=str(saved.settings["name"]))

    def _said(self, hidden: Tensor | None) -> Tensor:
        assert hidden is not None
        said: Tensor = self.head(hidden)
        return said


def _width(body: HFModel) -> int:
    return int(body.model.get_output_embeddings().weight.shape[1])


def _new_head(body: HFModel, inner_size: int | None, seed: int) -> ScalarHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ScalarHead(_width(body), inner_size=inner_size)

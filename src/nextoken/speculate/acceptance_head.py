"""AcceptanceHead: whether a guess will stand, told from the draft's hidden state at the guess."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.errors import ModelError
from nextoken.model import _saved
from nextoken.model.base import LanguageModel

_WHAT = "acceptance head"


class AcceptanceHead(nn.Module):
    """log a [...] in nats from hidden states [..., H]: a = softmax(W z + b)_1, z = h after x <- x + silu(W_l x + b_l)
    for every layer l.

    a is the predicted chance that the token whose own hidden state h is stands, given that those before it stand.

    Args:
        hidden_size: H of the draft.
        layers: each with weights of its own, as the paper has it. (In the released code all layers are one and the same
            module, applied as often.)
        seed: of the weights to begin with.
    """

    def __init__(self, hidden_size: int, *, layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        if hidden_size < 1 or layers < 0:
            raise ValueError(f"hidden_size must be at least 1 and layers at least 0, got {hidden_size} and {layers}")
        self.hidden_size, self.layers = hidden_size, layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(layers))
            self.outer = nn.Linear(hidden_size, 2)

    @classmethod
    def on(cls, draft: LanguageModel, *, layers: int = 3, seed: int = 0) -> AcceptanceHead:
        """A new head for this draft, which is read and never changed.

        Raises:
            ModelError: the draft gives no hidden states.
        """
        return cls(hidden_width(draft), layers=layers, seed=seed)

    def forward(self, hidden: Tensor) -> Tensor:
        """log [P(rejected), P(stands)] [..., 2] in float32."""
        inside = hidden.to(self.outer.weight.device, torch.float32)
        for block in self.blocks:
            inside = inside + F.silu(block(inside))
        return torch.log_softmax(self.outer(inside), -1)

    def log_chances(self, hidden: Tensor) -> Tensor:
        """log a [...] of hidden states [..., H]."""
        found: Tensor = self(hidden)[..., 1]
        return found

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the weights."""
        return _saved.fingerprint(self.state_dict())

    def save(self, folder: str | Path, *, draft: LanguageModel) -> None:
        """Write to a folder: weights as safetensors, settings and the draft's digests as JSON.

        Raises:
            OutputError: the folder cannot be written.
        """
        _saved.save(
            folder,
            _WHAT,
            settings={"hidden_size": self.hidden_size, "layers": self.layers},
            weights=self.state_dict(),
            digests={"vocabulary": draft.vocab.digest, "draft": draft.digest},
        )

    @classmethod
    def load(cls, folder: str | Path, *, draft: LanguageModel) -> AcceptanceHead:
        """Read what `save` wrote, for the same draft.

        Raises:
            ModelError: there is no whole head in the folder, its weights are not those saved, or the draft is another.
        """
        saved = _saved.load(folder, _WHAT)
        head = saved.build(cls)
        saved.check(vocabulary=draft.vocab.digest, draft=draft.digest)
        return head


def hidden_width(draft: LanguageModel) -> int:
    """H of the hidden states that a model gives.

    Raises:
        ModelError: it gives none.
    """
    hidden = draft.predict([[draft.vocab.bos_id or 0]]).hidden
    if hidden is None:
        raise ModelError(
            f"{draft.name} gives no hidden states, from which an acceptance head tells what will stand: draft from a "
            "transformers model, or stop by the draft's own confidence (Chain(confidence=...))"
        )
    return int(hidden.shape[-1])

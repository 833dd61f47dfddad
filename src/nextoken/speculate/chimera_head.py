"""ChimeraHead: a small network that says what comes two and more tokens on, from the states a target already has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextoken.errors import ModelError
from nextoken.head import Head
from nextoken.model import _saved
from nextoken.model._derived import Derived
from nextoken.model.hf import HFModel
from nextoken.model.next import HeadNext
from nextoken.model.stack import Stack
from nextoken.speculate.context_encoder import Angles, ContextEncoder, KeysValues, LayerSizes, joined

Output = Literal["own", "shared"]
Feed = Literal["text", "guess"]
_WHAT = "chimera head"


class TrigramEncoder(nn.Module):
    """u = P R([E(x_t-2); E(x_t-1); E(x_t)]) [..., H], R(v) = v + silu(A v + b), of embeddings [..., 3, d].

    R begins as the identity, and P, where d = H, as what leaves the last embedding.

    Args:
        span: tokens it reads; 3 for trigrams.
        embedding_width: d.
        width: H.
    """

    def __init__(self, span: int, *, embedding_width: int, width: int) -> None:
        super().__init__()
        self.residual = nn.Linear(span * embedding_width, span * embedding_width)
        self.project = nn.Linear(span * embedding_width, width, bias=False)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)
        if embedding_width == width:
            with torch.no_grad():
                self.project.weight.zero_()[:, -width:] = torch.eye(width)

    def forward(self, embedded: Tensor) -> Tensor:
        together = embedded.flatten(-2)
        found: Tensor = self.project(together + F.silu(self.residual(together)))
        return found


class OwnOutput(nn.Module):
    """Q [h; f] [..., V], Q [V, 2H] a matrix of its own that begins as [W; W]."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([head.weight, head.weight], 1).float())

    def forward(self, last: Tensor, guessed: Tensor, head: Head) -> HeadNext:
        return HeadNext(torch.cat([last, guessed], -1), Head(self.weight, head.bias, head.scale, head.softcap))


class SharedOutput(nn.Module):
    """W (h + f + A [h; f]) [..., V], W the target's own and A [H, 2H], which begins at 0."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.change = nn.Linear(2 * head.hidden_size, head.hidden_size, bias=False)
        nn.init.zeros_(self.change.weight)

    def forward(self, last: Tensor, guessed: Tensor, head: Head) -> HeadNext:
        return HeadNext(last + guessed + self.change(torch.cat([last, guessed], -1)), head)


_OUTPUTS = {"own": OwnOutput, "shared": SharedOutput}


class ChimeraHead(nn.Module):
    """After the tokens x_1..x_n+1, of which the target has read n: step j says x_n+1+j, for j = 1..k.

        u_n+j = trigrams(x_n+j-2, x_n+j-1, x_n+j)
        f_n+j = layer(u_n+j; h_1..h_n, f_n+1..f_n+j-1)
        step j = softmax(Q_j [h_n; f_n+j])

    h_t [H] are the target's final states (after its last norm), and f_t stand in for those that it has not yet made.
    u_t and f_t have position t. x_n+2 and the tokens after it are guesses. Trigrams that begin before the text have its
    first token there. Q_j begins as [W; W], W the target's head; f_t as u_t, and u_t as the token's embedding,
    with which short trainings get further than with a layer and a P that are drawn, as published.

    All is float32, on the target's device; the target's weights are no parts of it and stay as they are.

    Args:
        model: the target, one that `Stack` can take apart.
        depth: k.
        output: "own" for a Q_j of V x 2H in each step, as published; "shared" for W with a matrix of H x 2H, which is
            far smaller where V is large.
        span: tokens in a trigram.
        context: whether there is the layer; without it f = u.
        inner: width of the layer's feed-forward part; None for that of the target's layers.
        seed: of the weights to begin with.

    Raises:
        ModelError: the model cannot be taken apart.
        ValueError: depth, span or inner below 1, or another output.

    Source: Zeng et al., arXiv:2402.15758, section 3; details as in the released code (chimera/model/Chimera_model.py),
    where the second trigram of a text has its second token twice, and not its first.
    """

    def __init__(
        self,
        model: HFModel | Derived,
        *,
        depth: int = 4,
        output: Output = "own",
        span: int = 3,
        context: bool = True,
        inner: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if depth < 1 or span < 1 or (inner is not None and inner < 1):
            raise ValueError(f"depth, span and inner must be at least 1, got {depth}, {span} and {inner}")
        if output not in get_args(Output):
            raise ValueError(f"output must be 'own' or 'shared', got {output!r}")
        self.depth, self.output, self.span = depth, output, span
        self._of = (model, Stack(model))  # in a tuple, for their weights are no parts of this module
        head = self.stack.head
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = self.stack.model.embedding_width
            self.trigrams = TrigramEncoder(span, embedding_width=width, width=head.hidden_size)
            sizes = LayerSizes.of(self.stack.network.config)
            self.layer = ContextEncoder(sizes if inner is None else replace(sizes, inner=inner)) if context else None
            self.outputs = nn.ModuleList(_OUTPUTS[output](head) for _ in range(depth))
        self.to(head.weight.device)

    @property
    def model(self) -> HFModel | Derived:
        """The target."""
        return self._of[0]

    @property
    def stack(self) -> Stack:
        """The target taken apart."""
        return self._of[1]

    def remembered(self, states: Tensor, positions: Tensor) -> KeysValues | None:
        """Keys and values [B, G, n, D] of states [B, n, H] at positions [B or 1, n]; None where nothing looks at them.

        It is all that has to be kept of h_1..h_n-1.
        """
        if self.layer is None:
            return None
        return self.layer.remembered(states.float(), self._angles(states, positions))

    def look(
        self,
        grams: Tensor,
        positions: Tensor,
        *,
        context: KeysValues | None,
        visible: Tensor,
        path: KeysValues | None,
    ) -> Tensor:
        """f [B, n, H] of tokens [B, n, span], the last of which stand at positions [B or 1, n].

        Args:
            context, visible: see `ContextEncoder.forward`; of h_1..h_n.
            path: of the guesses f between them and the last tokens, see `onwards`.
        """
        fresh: Tensor = self.trigrams(self.stack.embed(grams).detach().float())
        if self.layer is None or context is None:
            return fresh
        found: Tensor = self.layer(fresh, self._angles(fresh, positions), context=context, visible=visible, path=path)
        return found

    def onwards(self, guessed: Tensor, positions: Tensor, path: KeysValues | None) -> KeysValues | None:
        """The path [B, G, n, j, D] of what continues each of the guesses f [B, n, H]."""
        last = self.remembered(guessed, positions)
        return None if last is None else joined(path, last)

    def said(self, step: int, last: Tensor, guessed: Tensor) -> HeadNext:
        """What step number `step` (from 0) says [B, n] of h_n [B, n or 1, H] and f [B, n, H]."""
        found: HeadNext = self.outputs[step](last.float().expand_as(guessed), guessed, self.stack.head)
        return found

    def forward(self, hidden: Tensor, tokens: Tensor, *, feed: Feed = "text") -> list[HeadNext]:
        """What the steps say [B, T - 1] along texts: entry i of step j is of x_i+j+1 after x_0..x_i+1, i from 0.

        All places of the texts at once: each sees h_0..h_i and its own path, as if it were the last.

        Args:
            hidden: h [B, T, H].
            tokens: x [B, T]; T is at least 2.
            feed: what step j reads of x_i+2..x_i+j: "text" for the tokens that came, which is the case a step is needed
                for, since guesses after a wrong one never stand; "guess" for the best of the step before.
        """
        places = torch.arange(tokens.shape[1] - 1, device=hidden.device)
        tokens, states = tokens.to(hidden.device), hidden[:, :-1]
        back = torch.arange(1 - self.span, 1, device=hidden.device)
        grams = tokens[:, (places[:, None] + 1 + back).clamp(min=0)]
        context, path = self.remembered(states, places[None]), None
        visible = torch.ones(1, len(places), len(places), dtype=torch.bool, device=hidden.device).tril()
        found = []
        for step in range(self.depth):
            at = (places + step + 1)[None]
            guessed = self.look(grams, at, context=context, visible=visible, path=path)
            found.append(self.said(step, states, guessed))
            if step + 1 < self.depth:
                path = self.onwards(guessed, at, path)
                if feed == "text":
                    following = tokens[:, (at[0] + 1).clamp(max=tokens.shape[1] - 1)]
                else:
                    following = found[-1].logits().argmax(-1)
                grams = torch.cat([grams[..., 1:], following[..., None]], -1)
        return found

    def save(self, folder: str | Path) -> None:
        """Write to a folder; without the target.

        Raises:
            OutputError: the folder cannot be written.
        """
        settings = {
            "depth": self.depth,
            "output": self.output,
            "span": self.span,
            "context": self.layer is not None,
            "inner": None if self.layer is None else self.layer.sizes.inner,
        }
        digests = {"target": self.model.digest, "vocabulary": self.model.vocab.digest}
        _saved.save(folder, _WHAT, settings=settings, weights=self.state_dict(), digests=digests)

    @classmethod
    def load(cls, folder: str | Path, *, model: HFModel | Derived) -> ChimeraHead:
        """Read what `save` wrote, for the same target.

        Raises:
            ModelError: there is no whole head in the folder, or the target is another.
        """
        saved = _saved.load(folder, _WHAT)
        saved.check(target=model.digest, vocabulary=model.vocab.digest)
        try:
            head = cls(model, **saved.settings)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{folder} holds no whole {_WHAT}: {error}; save it again") from error
        saved.fill(head)
        return head

    def _angles(self, like: Tensor, positions: Tensor) -> Angles:
        cos, sin = self.stack.rotary(like.float(), position_ids=positions.to(like.device))
        return cos, sin

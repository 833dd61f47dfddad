"""What a model can do, found out by trying: is its head linear, and which memory reproduces its plain forward pass?

A model family that reads positions off the cache, ignores a mask or cannot go on from its cache by several tokens gives
wrong numbers without a word. So nothing is believed of a family by name: each way of remembering is run on a few tokens
and compared with the model's own logits, and the first that reproduces them is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.model._chains import ChainMemory, Manner
from nextoken.model._kv import KVMemory, Visibility
from nextoken.model._network import Network
from nextoken.model.base import ABSENT
from nextoken.model.tree import chain

Remembering = Literal["slots", "chunks", "steps", "rereads"]
"""`slots`: keys and values of all tokens, trees and ragged rows in one pass; the others as in `_chains.Manner`."""

# Largest root mean square differences of log-probabilities, per nat of the logits' own, of the head on the same hidden
# states and of hidden states computed on another way. Rounding stays well below them; a wrong position, or a token seen
# that should not be, is well above in a trained model.
_HEAD_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_PATH_LIMIT = {torch.float64: 1e-6, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FINE = {torch.float64, torch.float32}
_REDUCED = torch.float16  # as coarse as float32 matrix products that are allowed less than full precision (TF32)


class Proof:
    """The plain forward pass on three strings, and what agrees with it.

    Raises:
        ModelError: what follows a token changes what the model says after it: not a causal model.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        size = network.vocab_size
        # Five tokens away from both ends of the vocabulary, where specials live.
        self.a, self.b, self.c, self.d, self.e = (size // 7 * i if size >= 14 else i % size for i in range(1, 6))
        self.strings = torch.tensor(
            [[self.a, self.b, self.c, self.d], [self.a, self.b, self.d, self.e], [self.b, self.c, self.e, self.a]]
        )
        logits = network.logits(self.strings, use_cache=False).double()
        self.expected = torch.log_softmax(logits, -1)
        reduced = network.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        precision = _REDUCED if reduced else network.dtype
        scale = max(1.0, float(logits.std()))
        self.head_limit = _HEAD_LIMIT.get(precision, _HEAD_LIMIT[torch.bfloat16]) * scale
        self.path_limit = _PATH_LIMIT.get(precision, _PATH_LIMIT[torch.bfloat16]) * scale
        if precision in _FINE:
            # Where context hardly matters (random weights), so do mistakes about it: look closer, down to rounding.
            effect = float((self.expected[0, 2] - self.expected[2, 1]).square().mean().sqrt())
            self.path_limit = max(0.1 * self.path_limit, min(self.path_limit, 1e-3 * effect))
        if size >= 14 and not self._close(self.expected[0, :2], self.expected[1, :2], self.path_limit):
            raise ModelError(
                f"{type(network.module).__name__} is not causal: what it says after a token depends on the tokens that "
                "follow (a masked or bidirectional model); give a model that predicts the next token"
            )

    def settle_head(self) -> None:
        """Leave the fused head on only if it reproduces the logits."""
        network = self.network
        if not network.is_fused:
            return
        try:
            raw = network.run(self.strings, use_cache=False)
            agrees = self._close(network.next(raw).log_probs(), self.expected, self.head_limit)
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
            _rethrow_out_of_memory(error)
            agrees = False
        network.is_fused = agrees

    def visibility(self) -> Visibility | None:
        """How masks must describe trees and ragged rows to the model, None where it cannot be told."""
        network = self.network
        visibility = Visibility.of(network.config)
        needed = ("attention_mask", "position_ids")
        if visibility is None or network.cache_argument is None or not all(map(network.accepts, needed)):
            return None
        return visibility if self._holds(partial(self._tree_holds, visibility)) else None

    def manner(self) -> Manner:
        """The cheapest way to go on from a cache of the model's own."""
        candidates: tuple[Manner, ...] = ("chunks", "steps")
        for manner in candidates:
            if self._holds(partial(self._chain_holds, manner)):
                return manner
        return "rereads"

    def _tree_holds(self, visibility: Visibility) -> bool:
        """Two rows of different lengths, a tree of two branches on each, one branch kept, and one token more."""
        a, b, c, d, e = self.a, self.b, self.c, self.d, self.e
        memory = KVMemory([0, 0], visibility)
        prefix = self._feed(memory, [[a, b], [b, ABSENT]])
        branches = self._feed(memory, [[c, d], [e, c]], tree=True)
        memory.keep([[1], [1]])
        after = self._feed(memory, [[e], [e]])
        seen = [
            prefix[0, 0],
            prefix[0, 1],
            prefix[1, 0],
            branches[0, 0],
            branches[0, 1],
            branches[1, 1],
            after[0, 0],
            after[1, 0],
        ]
        expected = self.expected
        at = [(0, 0), (0, 1), (2, 0), (0, 2), (1, 2), (2, 1), (1, 3), (2, 2)]
        return self._close(torch.stack(seen), torch.stack([expected[where] for where in at]), self.path_limit)

    def _chain_holds(self, manner: Manner) -> bool:
        memory = ChainMemory.empty(self.network, manner, len(self.strings))
        pieces = [memory.feed(piece) for piece in torch.split(self.strings, [1, 2, 1], 1)]
        return self._close(self.network.next(torch.cat(pieces, 1)).log_probs(), self.expected, self.path_limit)

    def _feed(self, memory: KVMemory, rows: list[list[int]], *, tree: bool = False) -> Tensor:
        tokens = torch.tensor(rows)
        parents = torch.full_like(tokens, -1) if tree else None
        # A chain is fed as a tree, too, for its mask is what is to be proved.
        arguments = memory.arguments(tokens, chain(*tokens.shape) if parents is None else parents, self.network)
        raw = self.network.run(tokens.clamp(min=0), **arguments)
        if not tree:
            memory.advance((tokens != ABSENT).sum(1).tolist())
        return self.network.next(raw).log_probs()

    def _holds(self, trial: Callable[[], bool]) -> bool:
        try:
            return trial()
        except (
            AttributeError,
            TypeError,
            ValueError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            _rethrow_out_of_memory(error)
            return False

    def _close(self, left: Tensor, right: Tensor, limit: float) -> bool:
        gap = (left.double().to(right.device) - right.double()).square().mean().sqrt()
        return bool(gap <= limit)


def _rethrow_out_of_memory(error: Exception) -> None:
    if isinstance(error, torch.OutOfMemoryError):
        raise error

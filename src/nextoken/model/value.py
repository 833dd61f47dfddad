"""ValueModel: what every possible next token is worth, given the tokens so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from hashlib import sha256

import torch
from torch import Tensor

from nextoken.model import tree
from nextoken.model.base import ABSENT, LanguageModel, State, Tokens
from nextoken.model.vocab import Vocab

Reward = Callable[[tuple[int, ...]], float]
"""The reward of a finished text, given as its tokens."""


class ValueModel(ABC):
    """Q(s, a) for every token a at once: the return to be expected when a is drawn after the tokens s.

        state = value.start(batch=B)
        q = value.extend(state, tokens)               # [B, n] -> Q of shape [B, n, V], from `low` to `high`

    It is driven as a `LanguageModel` is: chains and trees in `extend`, and a state with `keep`, `rewind`, `fork` and
    `join`. So a model and a value that are fed the same tokens stay in step.
    """

    name: str
    vocab: Vocab
    low: float = -1.0
    """The least return there is; -1 for a text that ends as it should not."""
    high: float = 0.0
    """The greatest."""
    context_length: int | None = None
    """The most tokens a row may hold, None for no limit."""
    supports_trees: bool = True

    @property
    def digest(self) -> str:
        """A short fingerprint: equal digests give equal values. Empty where unknown."""
        return ""

    @abstractmethod
    def start(self, batch: int = 1) -> State:
        """A state of `batch` rows that have seen no token."""

    @abstractmethod
    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        """Feed n tokens to each row; Q [B, n, V], entry (b, i, a) of token a after the i-th token of the call in row b.

        Arguments and errors as of `LanguageModel.extend`; what stands at absent tokens is undefined.
        """

    def predict(self, tokens: Tokens) -> Tensor:
        """Q [B, n, V] along rows [B, n] read from their start, remembering nothing."""
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
        return self.extend(self.start(ids.shape[0] if ids.ndim == 2 else 1), ids)


class TableValue(ValueModel):
    """Q(s, a) = E[reward of the finished text | s, then a, then tokens of the policy], exactly, by dynamic programming.

    A text is finished by an end token or by its `length`-th token, the begin token counted. With v(x) the reward where
    x is finished and else sum_a p(a | x) v(x a), Q(s, a) = v(s a). For rewards of -1 for an undesired text and 0 for
    others, -Q is the probability of an undesired ending. Tokens after the end of a text change nothing.

    Every string of a tree of V^length is visited once: this is an oracle, for tables and short texts.

    Args:
        policy: what draws the tokens; any language model that gives whole distributions.
        reward: of a finished text, its begin token and its end token among the tokens.
        length: tokens of the longest text.
        low, high: bounds of the reward.

    Raises:
        ValueError: the policy tells only its top tokens, or no text has two tokens.
    """

    def __init__(
        self, policy: LanguageModel, reward: Reward, *, length: int, low: float = -1.0, high: float = 0.0
    ) -> None:
        if policy.is_partial:
            raise ValueError(f"{policy.name} tells only its most probable tokens; whole distributions are needed")
        if length < 2:
            raise ValueError(f"length must be at least 2, the begin token and one more; got {length}")
        self.policy, self.reward, self.length = policy, reward, length
        self.name, self.vocab = f"value({policy.name})", policy.vocab
        self.low, self.high = low, high
        self.context_length, self.supports_trees = policy.context_length, policy.supports_trees
        self._known: dict[tuple[int, ...], float] = {}

    @property
    def digest(self) -> str:
        """Of the policy and of the reward's name; what the function computes cannot be told."""
        name = getattr(self.reward, "__qualname__", type(self.reward).__qualname__)
        return sha256(repr((self.policy.digest, name, self.length, self.low, self.high)).encode()).hexdigest()[:16]

    def start(self, batch: int = 1) -> State:
        return self.policy.start(batch)

    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        kept = state.tokens
        self.policy.extend(state, tokens, parents)
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu").reshape(len(kept), -1)
        above = tree.chain(*ids.shape) if parents is None else torch.as_tensor(parents, device="cpu").expand(ids.shape)
        values = torch.zeros(*ids.shape, self.vocab.size, dtype=torch.float64)
        for row, (begun, fed, parent) in enumerate(zip(kept, ids.tolist(), above.tolist(), strict=True)):
            strings: list[tuple[int, ...]] = []
            for node, token in enumerate(fed):
                before = begun if parent[node] < 0 else strings[parent[node]]
                strings.append(before if token == ABSENT else (*before, token))
                if token != ABSENT:
                    values[row, node] = self.row(strings[node])
        return values

    def row(self, text: tuple[int, ...]) -> Tensor:
        """Q(text, .) [V], float64."""
        return torch.tensor([self.of((*text, token)) for token in range(self.vocab.size)], dtype=torch.float64)

    def of(self, text: tuple[int, ...]) -> float:
        """v(text): its reward if it is finished, else what is to be expected."""
        end = next((i + 1 for i, token in enumerate(text) if token in self.vocab.eos_ids), self.length)
        text = text[: min(end, self.length)]
        if text not in self._known:
            if len(text) == self.length or text[-1] in self.vocab.eos_ids:
                self._known[text] = self._rewarded(text)
            else:
                p = self.policy.predict([text]).log_probs()[0, -1].double().exp().tolist()
                self._known[text] = sum(share * self.of((*text, a)) for a, share in enumerate(p) if share > 0)
        return self._known[text]

    def _rewarded(self, text: tuple[int, ...]) -> float:
        reward = float(self.reward(text))
        if not self.low <= reward <= self.high:
            raise ValueError(f"the reward of {text} is {reward}, outside {self.low} to {self.high}")
        return reward

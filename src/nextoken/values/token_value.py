"""TokenValue: the probability that a solution begun so comes out right, after each of its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nextoken.head import cross_entropy
from nextoken.methods import method
from nextoken.model.base import ABSENT, LanguageModel, State, Tokens
from nextoken.model.hf import HFModel
from nextoken.model.sarsa import FitStep
from nextoken.model.value import Reward, TableValue
from nextoken.model.vocab import Vocab
from nextoken.values._descent import Schedule, descend
from nextoken.values.prefix_labels import PrefixLabels, Solution, prefix_labels
from nextoken.values.scalar_head import ScalarValue


class TokenValue(ABC):
    """V(t_1..k) in [0, 1] after every token t_k: what is to be expected of the outcome of a text that begins so.

        state = value.start(batch=B)
        v = value.extend(state, tokens)               # [B, n] -> [B, n]

    It is driven as a `LanguageModel` is, so a model and a value that are fed the same tokens stay in step.
    """

    name: str
    vocab: Vocab
    context_length: int | None = None

    @abstractmethod
    def start(self, batch: int = 1) -> State:
        """A state of `batch` rows that have seen no token."""

    @abstractmethod
    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        """Feed n tokens to each row; V [B, n] after each. Arguments and errors as of `LanguageModel.extend`."""

    def predict(self, tokens: Tokens) -> Tensor:
        """V [B, n] along rows [B, n] read from their start, remembering nothing."""
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
        return self.extend(self.start(ids.shape[0] if ids.ndim == 2 else 1), ids)

    def check(self, model: LanguageModel) -> None:
        """Make sure that it reads the token ids of `model`.

        Raises:
            ValueError: the vocabularies differ.
        """
        if self.vocab is not model.vocab and self.vocab.digest != model.vocab.digest:
            raise ValueError(
                f"{self.name} and {model.name} have different vocabularies: learn the value on a model with the same "
                "tokenizer"
            )


class TableTokenValue(TokenValue):
    """V(s) = E[outcome of the finished text | s, then tokens of the policy], exactly: the oracle of what is learnt.

    Args:
        policy: what draws the tokens; small, for every string is visited once.
        outcome: of a finished text, given as its tokens with its begin and end token; from 0 to 1.
        length: tokens of the longest text, the begin token counted; longer ones are cut there.
    """

    def __init__(self, policy: LanguageModel, outcome: Reward, *, length: int) -> None:
        self._exact = TableValue(policy, outcome, length=length, low=0.0, high=1.0)
        self.name, self.vocab, self.context_length = self._exact.name, policy.vocab, policy.context_length

    def start(self, batch: int = 1) -> State:
        return self._exact.start(batch)

    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        if parents is not None:
            raise ValueError("exact token values follow chains: leave out parents")
        kept = state.tokens
        self._exact.policy.extend(state, tokens)
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu").reshape(len(kept), -1)
        values = torch.full(ids.shape, torch.nan, dtype=torch.float64)
        for row, (begun, fed) in enumerate(zip(kept, ids.tolist(), strict=True)):
            for k in range(sum(token != ABSENT for token in fed)):
                values[row, k] = self.of((*begun, *fed[: k + 1]))
        return values

    def of(self, text: tuple[int, ...]) -> float:
        """V of a text, its begin token included."""
        return self._exact.of(text)


class HFTokenValue(TokenValue):
    """V = sigmoid(z), z the number that a `ScalarValue` gives of a transformers model's hidden state after the token.

    Args:
        scalar: body and head; what was learnt with it lies in its weights.
    """

    def __init__(self, scalar: ScalarValue) -> None:
        self.scalar, self.name, self.vocab = scalar, scalar.name, scalar.vocab
        self.context_length = scalar.context_length

    @property
    def digest(self) -> str:
        """Of body and head; empty where the body's is."""
        return self.scalar.digest

    def start(self, batch: int = 1) -> State:
        return self.scalar.start(batch)

    def extend(self, state: State, tokens: Tokens, parents: Tokens | None = None) -> Tensor:
        return self.scalar.extend(state, tokens, parents).sigmoid()

    def predict(self, tokens: Tokens) -> Tensor:
        return self.scalar.predict(tokens).sigmoid()

    def save(self, folder: str | Path) -> None:
        """Write to a folder; errors as of `ScalarValue.save`."""
        self.scalar.save(folder)

    @classmethod
    def load(cls, folder: str | Path, *, body: HFModel | None = None) -> HFTokenValue:
        """Read what `save` wrote; arguments and errors as of `ScalarValue.load`."""
        return cls(ScalarValue.load(folder, body=body))


@method(
    name="TVM",
    arxiv="2407.12863",
    access="white",
    trained=True,
    summary="a value after every token, learnt from how often the sampled solutions with that prefix came out right",
)
def fit_token_value(
    model: HFModel,
    solutions: Sequence[Solution],
    *,
    labels: PrefixLabels | None = None,
    lm_weight: float = 0.0,
    schedule: Schedule | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> HFTokenValue:
    """Minimise the mean over drawn tokens of (V(t_1..k) - y_k)^2, V the sigmoid of a head on a copy of the model.

    With `lm_weight` w the loss has in addition w times the mean over the same tokens of -log p(t_k) in nats. Each
    batch's mean is over all its tokens together, so that tokens weigh alike whatever the length of their solution.

    The squared error's gradient is affine in y, and a prefix's visits times its y is the sum of the outcomes over the
    solutions that share it. Over all solutions together the gradient is therefore the same as with `outcome_labels`
    (an outcome reward model): what prefix labels take away is the noise of mini-batches, and they can gain only where
    that noise, few epochs or a capacity to learn single solutions by heart do harm.

    Args:
        model: mostly the sampler of the solutions; it stays as it is.
        solutions: at least one; of the sampler and the temperature that V is to hold for.
        labels: of these solutions; `prefix_labels` of them by default.
        lm_weight: 0 for none; the paper's is 1.
        schedule: how to train.
        seed: of the head's first weights and of the order of the solutions.
        on_step: called after each step.

    Returns:
        The value, with a body of its own.

    Raises:
        ValueError: there are no solutions, one does not fit the vocabulary or the context, or the labels are of others.
        ModelError: the model gives no hidden states.

    Source: Lee et al., arXiv:2407.12863, section 3.
    """
    _check(model, solutions)
    counted = labels or prefix_labels(solutions)
    if [len(row) for row in counted.labels] != [len(one.tokens) for one in solutions]:
        raise ValueError("the labels are not of these solutions: their numbers of tokens differ")
    if lm_weight < 0:
        raise ValueError(f"lm_weight must be at least 0, got {lm_weight}")
    value = HFTokenValue(ScalarValue.on_copy(model, seed=seed))

    def loss_of(chosen: list[int]) -> Tensor:
        return token_value_loss(
            value, [solutions[i] for i in chosen], [counted.labels[i] for i in chosen], lm_weight=lm_weight
        )

    weights = value.scalar.parameters()
    descend(weights, loss_of, len(solutions), schedule=schedule or Schedule(), seed=seed, on_step=on_step)
    return value


def token_value_loss(
    value: HFTokenValue, solutions: Sequence[Solution], labels: Sequence[Sequence[float]], *, lm_weight: float = 0.0
) -> Tensor:
    """mean_k (V(t_1..k) - y_k)^2 + lm_weight mean_k -log p(t_k) over all drawn tokens of the solutions, with gradients.

    Args:
        value: its hidden states are read anew.
        solutions, labels: as many of each, y of the token after which V is read.
    """
    rows = [[*one.prompt, *one.tokens] for one in solutions]
    width = max(map(len, rows))
    # Padded to the right, where a causal body does not look.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    places = torch.arange(width)
    begins = torch.tensor([len(one.prompt) for one in solutions])[:, None]
    drawn = (places >= begins) & (places < torch.tensor([len(row) for row in rows])[:, None])
    hidden = value.scalar.hidden(ids)
    drawn = drawn.to(hidden.device)
    targets = torch.tensor([y for row in labels for y in row], device=hidden.device)
    said = value.scalar.head(hidden[drawn]).sigmoid()
    loss = F.mse_loss(said, targets.to(said.dtype))
    if lm_weight == 0:
        return loss
    network = value.scalar.body.network
    head, layer = network.head(), value.scalar.body.model.get_output_embeddings()
    assert head is not None
    # The network's own head is cut off from the graph.
    live = replace(head, weight=layer.weight, bias=layer.bias)
    before = drawn.roll(-1, 1)
    return loss + lm_weight * cross_entropy(hidden[before], live, ids.to(hidden.device)[drawn])


def _check(model: HFModel, solutions: Sequence[Solution]) -> None:
    if not solutions:
        raise ValueError("there are no solutions to learn from")
    for number, one in enumerate(solutions):
        row = (*one.prompt, *one.tokens)
        if not 0 <= min(row) <= max(row) < model.vocab.size:
            raise ValueError(f"solution {number} has token ids outside the vocabulary of {model.vocab.size}")
        if model.context_length is not None and len(row) > model.context_length:
            raise ValueError(
                f"solution {number} has {len(row)} tokens and the context of {model.name} holds "
                f"{model.context_length}: shorten it"
            )

"""TableModel: exact conditional tables over a small vocabulary, the oracle of the tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nextoken.model.base import ABSENT, LanguageModel, NoMemory, State
from nextoken.model.next import DenseNext, Next
from nextoken.model.vocab import Vocab

BOS, EOS = "<bos>", "<eos>"


class TableModel(LanguageModel):
    """p(x | last m tokens) from a table of every context, in float64.

    The vocabulary is the symbols, then `<bos>`, then `<eos>` if wanted. Contexts shorter than m are filled on the left
    with `<bos>`, which is never predicted. So small that every string can be enumerated, a table is what decoders,
    scores and proofs are tested against.

    Args:
        table: probabilities [V, ..., V, V] with m context axes (oldest first) and the predicted token last. Each row
            must sum to 1.
        symbols: the text of each ordinary token; V is their number plus 1, or plus 2 with `eos`.
        eos: whether the last id is an end token.

    Raises:
        ValueError: the shape does not fit the symbols, a row is no distribution, or `<bos>` has probability.
    """

    def __init__(
        self, table: Tensor, symbols: Sequence[str | bytes], *, eos: bool = False, name: str = "table"
    ) -> None:
        spelled = [s.encode() if isinstance(s, str) else s for s in symbols]
        size = len(spelled) + 1 + eos
        probs = torch.as_tensor(table, dtype=torch.float64)
        if probs.ndim < 1 or any(axis != size for axis in probs.shape):
            raise ValueError(f"a table over {size} tokens must have every axis {size}, got {tuple(probs.shape)}")
        if bool((probs < 0).any()) or not torch.allclose(probs.sum(-1), torch.ones((), dtype=torch.float64), atol=1e-9):
            raise ValueError("every context's probabilities must be at least 0 and sum to 1")
        bos_id = len(spelled)
        if bool((probs[..., bos_id] > 0).any()):
            raise ValueError("<bos> begins texts and cannot be predicted: give it probability 0")
        labels = {bos_id: BOS} | ({bos_id + 1: EOS} if eos else {})
        self.vocab = Vocab(
            [*spelled, b"", *([b""] if eos else [])], labels=labels, bos_id=bos_id, eos_ids=[bos_id + 1] if eos else []
        )
        self.name = name
        self.order = probs.ndim - 1
        self._log_table = probs.log().reshape(-1, size)

    @classmethod
    def random(
        cls,
        symbols: int | Sequence[str | bytes] = 4,
        *,
        order: int = 2,
        eos: bool = False,
        concentration: float = 1.0,
        zeros: float = 0.0,
        seed: int = 0,
        name: str = "table",
    ) -> TableModel:
        """Independent Dirichlet(concentration) rows; a share `zeros` of the entries is impossible.

        Args:
            symbols: their texts, or a number up to 26 for "a", "b", "c", ...
            concentration: below 1 peaked rows, above 1 flat ones.
            zeros: expected share of entries set to probability 0 (at least one per row is left).
        """
        texts = [chr(ord("a") + i) for i in range(symbols)] if isinstance(symbols, int) else list(symbols)
        size = len(texts) + 1 + eos
        generator = torch.Generator().manual_seed(seed)
        shape = (size,) * (order + 1)
        # A Dirichlet draw is a normalised row of Gamma draws; torch's sampler takes no generator except this way.
        weights = torch._standard_gamma(torch.full(shape, concentration, dtype=torch.float64), generator=generator)
        weights = weights.clamp(min=1e-12)
        mask = torch.rand(shape, generator=generator) < zeros
        keep = torch.randint(0, len(texts), shape[:-1], generator=generator)
        mask.scatter_(-1, keep[..., None], False)
        weights = weights.masked_fill(mask, 0.0)
        weights[..., len(texts)] = 0.0
        return cls(weights / weights.sum(-1, keepdim=True), texts, eos=eos, name=name)

    @classmethod
    def from_counts(
        cls,
        texts: Sequence[Sequence[int]],
        symbols: Sequence[str | bytes],
        *,
        order: int = 1,
        smoothing: float = 0.0,
        eos: bool = False,
        name: str = "table",
    ) -> TableModel:
        """Relative frequencies (count + smoothing) / (total + smoothing * choices) over token sequences.

        Contexts that never occurred are uniform. With `eos` every sequence counts an end.
        """
        size = len(symbols) + 1 + eos
        bos_id = len(symbols)
        counts = torch.full((size,) * (order + 1), float(smoothing), dtype=torch.float64)
        for text in texts:
            padded = [bos_id] * order + list(text) + ([bos_id + 1] if eos else [])
            for end in range(order, len(padded)):
                counts[tuple(padded[end - order : end + 1])] += 1
        counts[..., bos_id] = 0.0
        unseen = counts.sum(-1) == 0
        uniform = torch.ones(size, dtype=torch.float64)
        uniform[bos_id] = 0.0
        counts[unseen] = uniform
        return cls(counts / counts.sum(-1, keepdim=True), symbols, eos=eos, name=name)

    @classmethod
    def given(
        cls,
        rows: Mapping[tuple[int, ...], Sequence[float]],
        symbols: Sequence[str | bytes],
        *,
        eos: bool = False,
        name: str = "table",
    ) -> TableModel:
        """A table from some contexts: each uses the longest of its suffixes that is in `rows`.

        Args:
            rows: context -> probabilities over the symbols (then `<eos>`), without `<bos>`; `()` must be there.
                Contexts may contain the id of `<bos>`, `len(symbols)`, to mean the beginning of the text.
        """
        if () not in rows:
            raise ValueError("rows needs the empty context () as the last resort")
        size, order, bos_id = len(symbols) + 1 + eos, max(map(len, rows)), len(symbols)
        table = torch.zeros((size,) * (order + 1), dtype=torch.float64)
        for context in _products(size, order):
            row = next(rows[context[cut:]] for cut in range(order + 1) if context[cut:] in rows)
            values = [*row[:bos_id], 0.0, *row[bos_id:]]
            if len(values) != size:
                raise ValueError(f"a row must have {size - 1} probabilities, got {len(row)}")
            table[context] = torch.tensor(values, dtype=torch.float64)
        return cls(table, symbols, eos=eos, name=name)

    @property
    def dtype(self) -> str:
        return "float64"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self._log_table.numpy().tobytes()).hexdigest()[:16]

    def row(self, context: Sequence[int] = ()) -> Tensor:
        """log p(. | context) [V]; the context without `<bos>`."""
        bos = self.vocab.size - 1 - len(self.vocab.eos_ids)
        padded = ([bos] * self.order + list(context))[len(context) :] if self.order else []
        return self._log_table[self._index(torch.tensor(padded, dtype=torch.long))]

    def enumerate(self, depth: int, *, prefix: Sequence[int] = ()) -> dict[tuple[int, ...], float]:
        """Every string of `depth` further tokens, or fewer where it ended, with its probability given `prefix`.

        The probabilities sum to 1. Strings that ended include the end token. Impossible strings are left out.
        """
        found: dict[tuple[int, ...], float] = {}

        def walk(string: tuple[int, ...], log_prob: float) -> None:
            if len(string) == depth or (string and string[-1] in self.vocab.eos_ids):
                found[string] = torch.tensor(log_prob, dtype=torch.float64).exp().item()
                return
            for token, step in enumerate(self.row((*prefix, *string)).tolist()):
                if step > float("-inf"):
                    walk((*string, token), log_prob + step)

        walk((), 0.0)
        return found

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        batch, n = tokens.shape
        if self.order == 0:
            return DenseNext(self._log_table.expand(batch, n, -1))
        bos_id = self.vocab.bos_id
        kept = state.tail(self.order)
        kept = torch.where(kept == ABSENT, bos_id, kept)  # type: ignore[arg-type]
        # One line of memory: the kept tail, then the nodes; `node` walks from each token to its parent, then the tail.
        line = torch.cat([kept, torch.where(tokens == ABSENT, bos_id, tokens)], dim=1)  # type: ignore[arg-type]
        if parents is None:
            parents = torch.arange(-1, n - 1).expand(batch, n)
        tail = torch.arange(-1, self.order - 1).expand(batch, -1)
        up = torch.cat([tail, torch.where(parents < 0, self.order - 1, parents + self.order)], dim=1)
        node = torch.arange(self.order, self.order + n).expand(batch, n)
        context = torch.empty(batch, n, self.order, dtype=torch.long)
        for back in range(self.order - 1, -1, -1):
            context[:, :, back] = torch.gather(line, 1, node)
            node = torch.gather(up, 1, node).clamp(min=0)
        return DenseNext(self._log_table[self._index(context)])

    def _index(self, context: Tensor) -> Tensor:
        """Row of the flattened table for contexts [..., m]."""
        weights = self.vocab.size ** torch.arange(self.order - 1, -1, -1)
        return (context * weights).sum(-1) if self.order else torch.zeros((), dtype=torch.long)


def _products(size: int, order: int) -> Iterator[tuple[int, ...]]:
    for flat in range(size**order):
        yield tuple((flat // size**place) % size for place in range(order - 1, -1, -1))

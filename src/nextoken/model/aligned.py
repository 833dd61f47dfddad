"""Aligned: a model with a tokenizer of its own, seen as a model over another vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nextoken.head import Statistics, statistics_from_logits
from nextoken.model import tree
from nextoken.model._trie import Trie, feed_apart, feed_together
from nextoken.model.alignment import Alignment, counterparts, marks
from nextoken.model.base import ABSENT, LanguageModel, Memory, State
from nextoken.model.next import Next
from nextoken.model.vocab import Vocab

_ENTRIES = 1 << 24
"""Distributions are made in blocks of about this many probabilities where only their statistics are wanted."""


@dataclass(frozen=True)
class Spelling:
    """A text in source tokens: those up to its last mark, and the bytes since, which further bytes may still join."""

    settled: tuple[int, ...] = ()
    open: bytes = b""


class SourceMemory(Memory):
    """A state of the source model, which holds some beginning of each row's text in source tokens.

    How much of it does not matter: each call goes back to what its prefixes share with the state, and on from there. So
    forgetting costs nothing now. `waiting` are the tries of a tree that waits for `keep`.
    """

    def __init__(self, inner: State) -> None:
        self.inner = inner
        self.waiting: Sequence[Trie] | None = None

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        if self.waiting is not None:
            tries = zip(self.waiting, nodes, strict=True)
            self.inner.keep([trie.path(path[-1]) if path else [] for trie, path in tries])
            self.waiting = None

    def rewind(self, lengths: Sequence[int]) -> None:
        pass

    def fork(self, rows: Sequence[int]) -> SourceMemory:
        return SourceMemory(self.inner.fork(rows))

    def join(self, others: Sequence[Memory]) -> SourceMemory:
        return SourceMemory(self.inner.join(*(other.inner for other in others if isinstance(other, SourceMemory))))


class Aligned(LanguageModel):
    """p(v | t_1..t_n) = (p_s A)(v) / sum_u (p_s A)(u), p_s = p_source(. | encode(text of t_1..t_n)).

    The text of the tokens so far is encoded by the source's tokenizer anew after every token, as a whole, and only what
    is new of it is fed: source tokens at the seam may change as the text grows. So the distribution after a prefix
    depends on the prefix alone. Encoding takes O(n) time per token; a text read in one call is one pass of the source
    over the tree of all its prefixes or, where the source takes chains only, a pass for each branch of that tree.

    - The begin token stands for `begin`, and so does the beginning of a text without one. Other marks (specials, end
      tokens) become the source's own by `counterparts`, or nothing where it has none.
    - Bytes that are not UTF-8, such as the beginning of a character whose rest is still to come, are spelled by the
      longest source tokens that have these bytes. Bytes that have no token are left out, so that the source speaks of
      the last complete character.
    - Texts beyond the source's context are seen from a later place, which moves on by half a context at a time.
    - Mass lost by A is made up for by renormalising; `AlignedNext.projected` has p_s A as it is. Where all of it is
      lost, p is uniform over the tokens that A reaches.

    Args:
        model: the source.
        vocab: the target, usually another model's.
        alignment: A, from the source's vocabulary to `vocab`.
        begin: source tokens that every text begins with; by default the source's begin token.

    Raises:
        ValueError: the alignment does not fit or reaches no token, the source tells only its top tokens, or has no
            begin token and none is given. `extend` raises it for texts the source's tokenizer has no tokens for.
    """

    def __init__(
        self, model: LanguageModel, vocab: Vocab, alignment: Alignment, *, begin: Sequence[int] | None = None
    ) -> None:
        if alignment.shape != (model.vocab.size, vocab.size):
            raise ValueError(
                f"an alignment from {model.name} to this vocabulary must be [{model.vocab.size}, {vocab.size}], "
                f"got {list(alignment.shape)}"
            )
        if len(alignment.unreached) == vocab.size:
            raise ValueError("the alignment is empty: no source token has a target, so nothing could be predicted")
        if model.is_partial:
            raise ValueError(f"{model.name} tells only its most probable tokens; whole distributions are needed")
        if begin is None and model.vocab.bos_id is not None:
            begin = (model.vocab.bos_id,)
        if not begin or any(not 0 <= token < model.vocab.size for token in begin):
            raise ValueError(
                f"{model.name} must be told how texts begin: pass begin=[...] with at least one of its token ids, such "
                "as its end token"
            )
        if model.context_length is not None and len(begin) >= model.context_length:
            raise ValueError(f"begin has {len(begin)} tokens; the context of {model.name} holds {model.context_length}")
        self.model, self.vocab, self.alignment, self.begin = model, vocab, alignment, tuple(begin)
        self.name = f"aligned({model.name})"
        self._marks = marks(vocab)
        self._counterparts = counterparts(vocab, model.vocab)

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def digest(self) -> str:
        parts = (self.model.digest, self.model.vocab.digest, self.vocab.digest, self.alignment.digest, self.begin)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16] if self.model.digest else ""

    def encode(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The source tokens of a target prefix, those of `begin` included."""
        spelling = Spelling()
        for token in tokens:
            spelling = self._read(spelling, token)
        return self._encoded(spelling)

    def _read(self, spelling: Spelling, token: int) -> Spelling:
        settled = spelling.settled or self.begin
        if token not in self._marks:
            return Spelling(settled, spelling.open + self.vocab.token_bytes[token])
        if not spelling.settled and token == self.vocab.bos_id:
            return Spelling(self.begin)
        mark = (self._counterparts[token],) if token in self._counterparts else ()
        return Spelling((*settled, *spell(self.model.vocab, spelling.open), *mark))

    def _encoded(self, spelling: Spelling) -> tuple[int, ...]:
        ids = (*(spelling.settled or self.begin), *spell(self.model.vocab, spelling.open))
        limit = self.model.context_length
        if limit is None or len(ids) <= limit:
            return ids
        # In strides: a place that moved on with every token would have the source read everything again each time.
        stride = max(1, (limit - len(self.begin)) // 2)
        return (*self.begin, *ids[len(self.begin) + -(-(len(ids) - limit) // stride) * stride :])

    def _remember(self, batch: int) -> SourceMemory:
        return SourceMemory(self.model.start(batch))

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        memory = state.memory
        assert isinstance(memory, SourceMemory)
        nodes = tree.chain(*tokens.shape) if parents is None else parents
        rows = zip(state.tokens, tokens.tolist(), nodes.tolist(), strict=True)
        prefixes = [self._prefixes(*row) for row in rows]
        inner = memory.inner
        tries = [Trie.of(held, strings) for held, strings in zip(inner.tokens, prefixes, strict=True)]
        inner.rewind([length - trie.kept for length, trie in zip(inner.lengths, tries, strict=True)])
        last = [sum(string is not None for string in strings) - 1 for strings in prefixes]
        if self.model.supports_trees:
            said = feed_together(self.model, inner, tries)
            memory.waiting = tries
            if parents is None:
                memory.keep([[end] if end >= 0 else [] for end in last])
        else:
            ended, said = feed_apart(self.model, inner, tries, last)
            # The path kept of a tree is read again by the next call: until then no row says which it will be.
            memory.inner = ended if parents is None else inner
        return AlignedNext(said, self.alignment)

    def _prefixes(
        self, kept: Sequence[int], tokens: Sequence[int], parents: Sequence[int]
    ) -> list[tuple[int, ...] | None]:
        """The whole prefix of each node in source tokens, None at absent nodes."""
        root = Spelling()
        for token in kept:
            root = self._read(root, token)
        spellings: list[Spelling] = []
        for token, parent in zip(tokens, parents, strict=True):
            above = spellings[parent] if parent >= 0 else root
            spellings.append(above if token == ABSENT else self._read(above, token))
        return [
            None if token == ABSENT else self._encoded(spelling)
            for token, spelling in zip(tokens, spellings, strict=True)
        ]


class AlignedNext(Next):
    """Distributions of a source model, brought into another vocabulary when asked for."""

    def __init__(self, source: Next, alignment: Alignment) -> None:
        self.source, self.alignment = source, alignment
        self.shape = source.shape
        self.vocab_size = alignment.shape[1]

    def projected(self) -> Tensor:
        """p_s A [B, n, V_t]: at least 0, and summing to 1 less the mass of the source tokens without a target."""
        return self.alignment.project(self.source.log_probs().exp())

    @cached_property
    def _log_even(self) -> Tensor:
        """log of the uniform distribution [V_t] over the tokens that A reaches."""
        even = torch.ones(self.vocab_size, dtype=torch.float64)
        even[self.alignment.unreached] = 0.0
        return (even / even.sum()).log()

    def log_probs(self) -> Tensor:
        said = self.source.log_probs()
        # In float64, where a probability does not vanish before its logarithm is below -700.
        shares = self.alignment.project(said.double().exp())
        total = shares.sum(-1, keepdim=True)
        return torch.where(total > 0, (shares / total).log(), self._log_even.to(shares.device)).to(said.dtype)

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        batch, n = self.shape
        if not batch * n:
            return statistics_from_logits(torch.empty(batch, n, self.vocab_size), targets, top=top)
        rows, columns = torch.meshgrid(torch.arange(batch), torch.arange(n), indexing="ij")
        line = self._take(rows.reshape(-1, 1), columns.reshape(-1, 1))
        flat = None if targets is None else targets.reshape(-1, 1)
        size = max(1, _ENTRIES // max(self.alignment.shape))
        parts = [
            statistics_from_logits(
                line[at : at + size].log_probs(), None if flat is None else flat[at : at + size], top=top
            )
            for at in range(0, batch * n, size)
        ]
        return Statistics.concat(parts).reshape(batch, n)

    def _take(self, rows: Tensor, columns: Tensor) -> AlignedNext:
        return AlignedNext(self.source._take(rows, columns), self.alignment)


def spell(vocab: Vocab, data: bytes) -> tuple[int, ...]:
    """Tokens of any bytes: of the UTF-8 in them as encoded, of the rest the longest that there are, or none.

    Raises:
        ValueError: the vocabulary has no tokens for some text.
    """
    ids: list[int] = []
    while data:
        try:
            return (*ids, *vocab.encode(data).ids)
        except UnicodeDecodeError as error:
            ids += vocab.encode(data[: error.start]).ids
            broken, data = data[error.start : error.end], data[error.end :]
        try:
            ids += Vocab.encode(vocab, broken).ids
        except ValueError:
            continue  # a byte of it has no token: nothing the source could have read
    return tuple(ids)

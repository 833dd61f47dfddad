"""LengthControlled: a model whose tokens are chosen by how long they make the rest."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.generate import Prompt, prompt_tokens
from nextoken.decode.transform import Context, Transform, normalise
from nextoken.decode.truncation import MinP
from nextoken.head import Statistics, statistics_from_logits
from nextoken.methods import method
from nextoken.model import tree
from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.model.combined import InStep
from nextoken.model.next import Next
from nextoken.values.length_rule import Candidates, LengthRule
from nextoken.values.length_value import LengthValue

_REMOVED = float("-inf")
_LIKELY = MinP(0.01)
_NODES = 2048
"""Most tokens of one tree fed to the value, its mask being of this size squared."""


@method(
    name="LenVM control",
    arxiv="2604.27039",
    access="gray",
    trained=True,
    summary="candidates reweighted by the length each leads to: exact, least or most lengths, or an exponential tilt",
)
class LengthControlled(LanguageModel):
    """p'(x | s) from p(x | s) and l(s x) of each candidate x, by a rule; -inf for tokens that are no candidate.

        shorter = LengthControlled(model, value, Tilt(-50))
        exact = LengthControlled(model, value, HardTarget(40), prompts=["Once upon a time"])
        generate(exact, "Once upon a time")

    The candidates of all places are given to the value as one tree. It is a language model as any other: rows of
    different lengths, seeds, searches, speculation and signatures are as with the model itself. What is drawn under a
    rule is no longer the policy that the value knows, so that its lengths are those of a text going on without it.

    Args:
        model: any language model that gives whole distributions.
        value: over the same vocabulary, and able to look at trees.
        rule: `Tilt`, `Scaled`, `SoftTarget`, `HardTarget`, or one of your own.
        prompts: those that texts are to be drawn after. Where a text ends within a prompt the model is left as it is,
            so that reading prompts costs nothing; a rule that counts the tokens drawn needs them. The tokens themselves
            then tell where the output begins, in whatever batch or tree.
        candidates: what of p is looked at, as a transform of p alone; the paper takes MinP(0.01) to tilt and
            TopP(0.999) | TopK(15) for hard targets. The value is asked for each of them.

    Raises:
        ValueError: the vocabularies differ, the model tells only its top tokens, the value takes no trees, the
            candidates flip coins, the rule needs prompts and has none, or one prompt is the beginning of another.

    Source: Length Value Model, arXiv:2604.27039, section 5, and its released code. The paper prints the tilt with V,
    which is -u, and reads its sign as here, with u.
    """

    def __init__(
        self,
        model: LanguageModel,
        value: LengthValue,
        rule: LengthRule,
        *,
        prompts: Sequence[Prompt] | None = None,
        candidates: Transform = _LIKELY,
    ) -> None:
        if model.is_partial:
            raise ValueError(f"{model.name} tells only its most probable tokens; whole distributions are needed")
        if value.vocab.digest != model.vocab.digest:
            raise ValueError(
                f"{value.name} and {model.name} have different vocabularies, so the value's tokens are others; train "
                "a value whose body has the model's tokenizer"
            )
        if not value.supports_trees:
            raise ValueError(f"{value.name} takes chains only; candidates are looked at as a tree")
        if candidates.is_random:
            raise ValueError("the candidates must be the same each time, and this transform flips coins: leave it out")
        if rule.needs_prompt and prompts is None:
            raise ValueError(
                f"{rule} counts the tokens drawn, so it must know where the prompt ends: pass prompts=[...], those to "
                "be drawn after"
            )
        self.model, self.value, self.rule, self.candidates = model, value, rule, candidates
        self.prompts = None if prompts is None else _distinct([prompt_tokens(model, prompt) for prompt in prompts])
        self._sizes = sorted({len(prompt) for prompt in self.prompts or ()})
        self._longest = max(self._sizes, default=0)
        self.name, self.vocab = f"length controlled({model.name})", model.vocab
        self.supports_trees = model.supports_trees
        # A candidate stands after the last token.
        limits = [model.context_length, None if value.context_length is None else value.context_length - 1]
        self.context_length = min((limit for limit in limits if limit is not None), default=None)

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def digest(self) -> str:
        if not self.model.digest or not self.value.digest:
            return ""
        parts = (
            self.model.digest,
            self.value.digest,
            repr(self.rule),
            sorted(self.prompts or ()),
            repr(self.candidates),
        )
        return hashlib.sha256(repr(("LengthControlled", *parts)).encode()).hexdigest()[:16]

    def _remember(self, batch: int) -> InStep:
        return InStep([self.model.start(batch), self.value.start(batch)])

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        memory = state.memory
        assert isinstance(memory, InStep)
        own, valued = memory.states
        drawn = self._drawn(state.tokens, tokens, parents)
        following = self.model.extend(own, tokens, parents)
        places = drawn >= 0
        if not bool(places.any()):
            self.value.extend(valued, tokens, parents)
            return following
        log_p, ids = self._chosen(following[places].logits()[:, 0])
        looked = _Candidates(places, ids.masked_fill(log_p == _REMOVED, ABSENT).cpu())
        if parents is None:
            lengths = self._along(valued, tokens, looked)
        else:
            lengths = self._look(valued, tokens, parents, looked)
        scores = self.rule(
            Candidates(log_p, lengths.to(log_p.device), drawn[places].to(log_p.device), self.value.discount)
        )
        number = torch.full(places.shape, -1).masked_scatter(places, torch.arange(len(ids)))
        return ControlledNext(following, number, ids, torch.log_softmax(scores.double(), -1))

    def _drawn(self, kept: Sequence[Sequence[int]], tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Tokens of the output at each place [B, n]; -1 at absent ones, and where the prompt has not ended."""
        if self.prompts is None:
            return torch.where(tokens == ABSENT, -1, 0)
        above = tree.chain(*tokens.shape) if parents is None else parents
        drawn = torch.full(tokens.shape, -1)
        for row, (begun, fed, parent) in enumerate(zip(kept, tokens.tolist(), above.tolist(), strict=True)):
            # How long each text is, and how it begins, which is all that can tell its prompt.
            texts: list[tuple[int, tuple[int, ...]]] = []
            begin = (len(begun), tuple(begun[: self._longest]))
            for node, token in enumerate(fed):
                size, head = begin if parent[node] < 0 else texts[parent[node]]
                if token != ABSENT:
                    size, head = size + 1, (*head, token) if len(head) < self._longest else head
                    prompt = self._prompt_of(head)
                    drawn[row, node] = -1 if prompt is None else size - prompt
                texts.append((size, head))
        return drawn

    def _prompt_of(self, head: tuple[int, ...]) -> int | None:
        """Tokens of the prompt that a text begins with."""
        assert self.prompts is not None
        return next((size for size in self._sizes if size <= len(head) and head[:size] in self.prompts), None)

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """log p [N, K] and ids [N, K] of the candidates, the most probable first, of equal ones that of lower id."""
        log_p = normalise(self.candidates(logits, Context(vocab=self.vocab)))
        count = int((log_p > _REMOVED).sum(-1).max())
        ids = log_p.topk(count).indices.sort(-1).values
        ordered, places = log_p.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
        return ordered, ids.gather(-1, places)

    def _along(self, valued: State, tokens: Tensor, looked: _Candidates) -> Tensor:
        """l of the candidates after the places of a chain, which the state then keeps."""
        lengths = torch.zeros(looked.ids.shape, dtype=torch.float64)
        for begin, end in looked.pieces():
            chain = tokens[:, begin:end]
            numbers, part = looked.between(begin, end)
            if not len(numbers):
                self.value.extend(valued, chain)
                continue
            lengths[numbers] = self._look(valued, chain, tree.chain(*chain.shape), part)
            valued.keep([list(range(count)) for count in (chain != ABSENT).sum(1).tolist()])
        return lengths

    def _look(self, valued: State, tokens: Tensor, parents: Tensor, looked: _Candidates) -> Tensor:
        """l [N, K] of candidates that hang on a tree of tokens, fed with it; what hangs there is not to be kept."""
        (batch, n), count = tokens.shape, looked.ids.shape[1]
        columns = looked.places.any(0).nonzero()[:, 0]
        leaves = torch.full((batch, n, count), ABSENT)
        leaves[looked.places] = looked.ids
        fed = torch.cat([tokens, leaves[:, columns].flatten(1)], 1)
        hang = columns.repeat_interleave(count).expand(batch, -1)
        lengths = self.value.extend(valued, fed, torch.cat([parents, hang], 1))[:, n:].cpu()
        return lengths.reshape(batch, len(columns), count)[looked.places[:, columns]]


@dataclass(frozen=True)
class _Candidates:
    """places [B, n], and the candidates at each of them, row by row: ids [N, K], ABSENT where there is none."""

    places: Tensor
    ids: Tensor

    def pieces(self) -> list[tuple[int, int]]:
        """Columns cut so that those of a piece, with their candidates, are few enough for one tree."""
        found, begin, nodes = [], 0, 0
        for column, busy in enumerate(self.places.any(0).tolist()):
            more = 1 + busy * self.ids.shape[1]
            if nodes + more > _NODES and column > begin:
                found.append((begin, column))
                begin, nodes = column, 0
            nodes += more
        return [*found, (begin, self.places.shape[1])]

    def between(self, begin: int, end: int) -> tuple[Tensor, _Candidates]:
        """Numbers, among the N, of those in some columns; and these alone."""
        number = torch.full(self.places.shape, -1).masked_scatter(self.places, torch.arange(len(self.ids)))
        within = self.places[:, begin:end]
        numbers = number[:, begin:end][within]
        return numbers, _Candidates(within, self.ids[numbers])


class ControlledNext(Next):
    """The model's own distributions, of which some are replaced by others over a few candidates.

    Args:
        own: of the model.
        number: which of the N replaces it [B, n], -1 for none.
        ids, log_probs: candidates of each of the N, and their log-probabilities, both [N, K].
    """

    def __init__(self, own: Next, number: Tensor, ids: Tensor, log_probs: Tensor) -> None:
        self._own, self._number, self._ids, self._log_probs = own, number, ids, log_probs
        self.shape, self.vocab_size = own.shape, own.vocab_size

    def log_probs(self) -> Tensor:
        log_probs = self._own.log_probs().clone()
        replaced = self._number >= 0
        chosen = self._number[replaced].to(self._ids.device)
        full = torch.full((len(chosen), self.vocab_size), _REMOVED, dtype=log_probs.dtype, device=log_probs.device)
        full.scatter_(-1, self._ids[chosen], self._log_probs[chosen].to(log_probs.dtype))
        log_probs[replaced.to(log_probs.device)] = full
        return log_probs

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        return statistics_from_logits(self.log_probs(), targets, top=top)

    def _take(self, rows: Tensor, columns: Tensor) -> ControlledNext:
        return ControlledNext(self._own._take(rows, columns), self._number[rows, columns], self._ids, self._log_probs)


def _distinct(prompts: Sequence[tuple[int, ...]]) -> frozenset[tuple[int, ...]]:
    ordered = sorted(set(prompts))
    if not ordered:
        raise ValueError("prompts is empty: give those that texts are to be drawn after")
    for first, second in itertools.pairwise(ordered):
        if second[: len(first)] == first:
            raise ValueError(
                f"one prompt ({len(first)} tokens) is the beginning of another ({len(second)}), so that a text does "
                "not tell which it came after; make a model for each"
            )
    return frozenset(ordered)

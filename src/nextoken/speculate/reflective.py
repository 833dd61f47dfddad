"""ReflectiveSpeculation: guesses are judged by what the target says and by what it would say on second thought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.head import Statistics, statistics_from_logits
from nextoken.methods import method
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.next import Next
from nextoken.speculate.acceptance import Acceptance, Candidates, Uniform
from nextoken.speculate.draft import Draft, Row
from nextoken.speculate.loop import Speculation, SpeculativeLoop


def fuse(original: Tensor, reflected: Tensor, *, weight: float) -> Tensor:
    """(1 - a) o + a s [..., V], logits of norm(p_o^(1-a) p_s^a); o where no token is possible in both.

    Args:
        original, reflected: o and s, logits [..., V] up to a constant each.
        weight: a; 0 gives o and 1 gives s.
    """
    if weight in (0, 1):  # 0 times -inf is no number
        return reflected if weight else original
    mixed = (1 - weight) * original + weight * reflected
    return torch.where(mixed.amax(-1, keepdim=True) == float("-inf"), original, mixed)


@method(
    name="Reflective verification",
    arxiv="2505.18629",
    access="gray",
    summary="let guesses stand that the target would write on second thought; changes the distribution",
)
@dataclass(frozen=True)
class ReflectiveSpeculation(Speculation):
    """Every guess d_i is judged by f_i = norm(o_i^(1-a) s_i^a) in place of the target's own o_i.

    One pass of the target reads c d_1 .. d_g r_1 .. r_m d_1 .. d_g: o_i is what it says before d_i in the first copy,
    s_i before d_i in the second, after it has seen the whole draft and the prompt r. What is rejected is replaced by a
    draw from f_i; the token after the last guess is drawn from o alone. The prompt and the second copy are then
    forgotten. A pass feeds 1 + 2 g + m tokens instead of 1 + g.

    Not lossless, unless a = 0: the law of the output depends on the drafter, and `acceptance.lossless` says so. A
    target that repeats what it has just read lets wrong guesses stand as well: judge the texts along with the speed.

    Rows without a guess, or whose second copy does not fit the context, are verified as usual. Transforms, surprisals
    and entropies are those of f. The first token after a prompt is the target's own.

    Args:
        drafter, acceptance, tally: as of `Speculation`; the drafter guesses chains.
        prompt: r, token ids, at least one; it should end so that the next token is the first of the draft.
        weight: a, from 0 to 1.

    Raises:
        ValueError: no prompt, a weight that is none, or a drafter of trees.

    Source: arXiv:2505.18629. Its text leaves open the formula of the fusion, its weight and the prompt: the fusion is
    that of logits, and the prompt an argument.
    """

    prompt: tuple[int, ...] = ()
    weight: float = 0.3

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("reflection needs a prompt: give token ids, such as those of ' Read again:'")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is that of the second thought and must be from 0 to 1, got {self.weight}")
        if self.drafter.needs_trees:
            raise ValueError(f"{type(self.drafter).__name__} guesses trees, and reflection reads chains: draft a chain")
        # `dataclasses.replace` gives the label of another weight back.
        rule = self.acceptance.rule if isinstance(self.acceptance, _Fused) else self.acceptance
        object.__setattr__(self, "acceptance", _Fused(rule, self.weight))

    def loop(self, model: LanguageModel, *, max_rows: int = 64, entropies: bool = False) -> SpeculativeLoop:
        """A decoding loop of this target.

        Raises:
            ValueError: the prompt has tokens outside the target's vocabulary.
        """
        if not all(0 <= token < model.vocab.size for token in self.prompt):
            raise ValueError(f"the prompt has tokens outside the vocabulary of {model.name}, {model.vocab.size}")
        return ReflectiveLoop(model, self, max_rows=max_rows, entropies=entropies)


class ReflectiveLoop(SpeculativeLoop):
    """`SpeculativeLoop` whose every pass reads each draft twice; its law is not that of `Loop`."""

    def __init__(
        self, model: LanguageModel, speculation: ReflectiveSpeculation, *, max_rows: int = 64, entropies: bool = False
    ) -> None:
        super().__init__(model, speculation, max_rows=max_rows, entropies=entropies)
        self.prompt, self.weight = speculation.prompt, speculation.weight

    def _verified(self, rows: Sequence[Row], draft: Draft) -> tuple[Next, Next]:
        if not draft.is_chain:
            raise ValueError(f"{type(self.drafter).__name__} guessed a tree, and reflection reads chains")
        assert self._state is not None
        fed, second = self._doubled(rows, draft)
        said = self.model.extend(self._state, fed)
        return FusedNext.of(said, second, weight=self.weight), said[:, : draft.size]

    def _doubled(self, rows: Sequence[Row], draft: Draft) -> tuple[Tensor, Tensor]:
        """What is fed [B, n], and for each place [B, size] where the second thought on it stands, ABSENT for none."""
        limit, extra = self.model.context_length, len(self.prompt)
        fed: list[list[int]] = []
        second = torch.full((len(rows), draft.size), ABSENT)
        for number, (row, branches) in enumerate(zip(rows, draft.rows, strict=True)):
            guesses = list(branches.tokens)
            fed.append([row.context[-1], *guesses])
            size = len(guesses)
            if size and (limit is None or len(row.context) + 2 * size + extra <= limit):
                fed[-1] += [*self.prompt, *guesses]
                second[number, :size] = size + extra + torch.arange(size)
        width = max(map(len, fed))
        return torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in fed]), second


class FusedNext(Next):
    """f [B, n] of places in a pass that read drafts twice; see `fuse`.

    Args:
        said: the whole pass [B, N].
        rows, first, second: of each place [B, n] its row in the pass and its two columns, the second ABSENT for none.
        weight: a.
    """

    def __init__(self, said: Next, rows: Tensor, first: Tensor, second: Tensor, *, weight: float) -> None:
        self._said, self._rows, self._first, self._second, self.weight = said, rows, first, second, weight
        self.shape, self.vocab_size = (first.shape[0], first.shape[1]), said.vocab_size

    @classmethod
    def of(cls, said: Next, second: Tensor, *, weight: float) -> FusedNext:
        """The first n places of every row, `second` [B, n] telling where they are judged again."""
        batch, n = second.shape
        rows, first = torch.meshgrid(torch.arange(batch), torch.arange(n), indexing="ij")
        return cls(said, rows, first, second, weight=weight)

    def logits(self) -> Tensor:
        original = self._said._take(self._rows, self._first).logits()
        again = self._second != ABSENT
        if not bool(again.any()):
            return original
        original = original.to(torch.promote_types(original.dtype, torch.float32))
        reflected = self._said._take(self._rows[again][:, None], self._second[again][:, None]).logits()[:, 0]
        fused = original.clone()
        fused[again.to(fused.device)] = fuse(
            original[again.to(fused.device)], reflected.to(original.dtype), weight=self.weight
        )
        return fused

    def log_probs(self) -> Tensor:
        wide = self.logits()
        return torch.log_softmax(wide.to(torch.promote_types(wide.dtype, torch.float32)), -1)

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> Statistics:
        return statistics_from_logits(self.logits(), targets, top=top)

    def _take(self, rows: Tensor, columns: Tensor) -> FusedNext:
        at = rows, columns
        return FusedNext(self._said, self._rows[at], self._first[at], self._second[at], weight=self.weight)


@dataclass(frozen=True)
class _Fused(Acceptance):
    """A rule applied to f; lossless only where f is the target's own distribution."""

    rule: Acceptance
    weight: float

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return self.weight == 0 and self.rule.lossless

    def __call__(self, p: Tensor, candidates: Candidates, uniform: Uniform) -> int:
        return self.rule(p, candidates, uniform)

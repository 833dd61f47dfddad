"""Verifier: whether two ways on from the same context come to the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from nextoken.decode.generate import Prompt, prompt_tokens
from nextoken.decode.loop import Loop
from nextoken.decode.request import Request
from nextoken.decode.scaling import Greedy
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.vocab import Vocab

Row: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Fork:
    """Two ways on from one context, which differ in their first token.

    Args:
        context: tokens before, those of the prompt among them.
        one: the large model's own way to the end of the sentence.
        other: its way to the end of the sentence after the small model's token.
        rest: what it had written itself after `one`, to the end of the answer.
    """

    context: Row
    one: Row
    other: Row
    rest: Row = ()


class Verifier(ABC):
    """Judges forks, many at once."""

    @abstractmethod
    def judge(self, forks: Sequence[Fork]) -> list[bool | None]:
        """For each whether it diverges; None where that cannot be said."""


class SameRest(Verifier):
    """A fork diverges unless one[1:] = other[1:]: after the first token both ways are the same to the letter.

    Cheap and strict: what is said in other words counts as divergent. But what changes only after the sentence goes
    unseen, for the sentence is all there is to compare.
    """

    def judge(self, forks: Sequence[Fork]) -> list[bool | None]:
        return [fork.one[1:] != fork.other[1:] for fork in forks]


class SameAnswer(Verifier):
    """A fork diverges if the answers at the ends of both texts differ: answer(text_one) != answer(text_other).

    The large model goes on greedily after `other` to the end of its text; the other text is what it had written itself.

    Args:
        large: the model whose answers they are.
        answer: what a text, given as all its tokens, says in the end; it may be None where it says nothing.
        max_tokens: most tokens after the sentence. A text cut off there is judged as it is.
        max_rows: texts at work at once.
    """

    def __init__(
        self,
        large: LanguageModel,
        answer: Callable[[Row], Hashable],
        *,
        max_tokens: int = 256,
        max_rows: int = 64,
    ) -> None:
        self.large, self.answer, self.max_tokens, self.max_rows = large, answer, max_tokens, max_rows

    def judge(self, forks: Sequence[Fork]) -> list[bool | None]:
        texts = [(*fork.context, *fork.other) for fork in forks]
        open_ones = [place for place, text in enumerate(texts) if text[-1] not in self.large.vocab.eos_ids]
        loop = Loop(self.large, max_rows=self.max_rows)
        fits = self.large.context_length or max(map(len, texts), default=0)
        running = {
            loop.submit(Request(texts[place], Greedy(), max_tokens=self.max_tokens, seed=0)): place
            for place in open_ones
            if len(texts[place]) <= fits
        }
        for piece in loop.run():
            place = running[piece.ticket]
            texts[place] = (*texts[place], piece.token)
        return [
            self.answer((*fork.context, *fork.one, *fork.rest)) != self.answer(text)
            for fork, text in zip(forks, texts, strict=True)
        ]


def asking(context: str, one: str, other: str) -> Prompt:
    """The question put to a model by `AskedVerifier` where none is given."""
    return (
        "Two sentences continue the same text. They part at the word between << and >>; the marks are not part of the "
        "text.\n\n"
        f"Text so far: {context}\n\nSentence A: {one}\n\nSentence B: {other}\n\n"
        "Does the difference change what is meant, the reasoning, or what follows from it? Say 1 if it does. Say 0 if "
        "both say the same in other words.\nAnswer:"
    )


class AskedVerifier(Verifier):
    """A fork diverges if log P("1") - log P("0") > margin for a model asked whether the difference matters.

    P is the model's next-token probability after the question, summed over the tokens that spell the digit with or
    without spaces around it; so there is always a verdict, whatever the model would have gone on to say.

    Args:
        model: any language model; the better it follows instructions, the better.
        vocab: of the models whose tokens the forks are made of.
        question: makes the prompt, a text or a conversation, of the texts of context, one and other, the token that
            differs between << and >>.
        context_bytes: how much of the end of the context is shown.
        margin: in nats.
        max_rows: questions asked at once.

    Raises:
        ValueError: a digit has no token of its own in the model's vocabulary.

    Source: R2R, arXiv:2505.21600, section 4.1, where the model writes its verdict and reasons in up to 16 tokens, from
    which the first number is taken, and verdicts that cannot be read are dropped.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        vocab: Vocab,
        question: Callable[[str, str, str], Prompt] = asking,
        context_bytes: int = 2000,
        margin: float = 0.0,
        max_rows: int = 16,
    ) -> None:
        self.model, self.vocab, self.question = model, vocab, question
        self.context_bytes, self.margin, self.max_rows = context_bytes, margin, max_rows
        self._digits = [
            [i for i, spelt in enumerate(model.vocab.token_bytes) if spelt.strip() == digit] for digit in (b"1", b"0")
        ]
        if not all(self._digits):
            raise ValueError(f"{model.name} has no token that spells 1, or none that spells 0: it cannot be asked")

    def judge(self, forks: Sequence[Fork]) -> list[bool | None]:
        verdicts: list[bool | None] = []
        for begin in range(0, len(forks), self.max_rows):
            verdicts += [odds > self.margin for odds in self.log_odds(forks[begin : begin + self.max_rows])]
        return verdicts

    @torch.no_grad()
    def log_odds(self, forks: Sequence[Fork]) -> list[float]:
        """log P("1") - log P("0") in nats of each fork."""
        rows = [prompt_tokens(self.model, self._asked(fork)) for fork in forks]
        width = max(map(len, rows))
        padded = torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows])
        last = torch.zeros(padded.shape, dtype=torch.bool)
        last[range(len(rows)), [len(row) - 1 for row in rows]] = True
        said = self.model.predict(padded)[last].log_probs()[:, 0]
        yes, no = (said[:, ids].logsumexp(-1) for ids in self._digits)
        odds: list[float] = (yes - no).tolist()
        return odds

    def _asked(self, fork: Fork) -> Prompt:
        context = self.vocab.decode(fork.context)[-self.context_bytes :].decode("utf-8", errors="ignore")
        return self.question(context, self._marked(fork.one), self._marked(fork.other))

    def _marked(self, way: Row) -> str:
        return f"<<{self.vocab.decode_text(way[:1])}>>{self.vocab.decode_text(way[1:])}"

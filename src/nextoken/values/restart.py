"""Restart prediction: whether another attempt would be better than this one, asked of the model, even midway.

r(x, y_1..t) = P(stay) / (P(stay) + P(restart)) after the question I is put behind what has been written, where "stay"
is the token that says a restart would not help. Trained on pairs of the model's own responses, it is the probability
that this response is at least as good as a fresh one: high where the response is good, and where nothing better is to
be had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from nextoken.model import _saved
from nextoken.model.base import ABSENT, LanguageModel, State
from nextoken.model.hf import HFModel
from nextoken.model.vocab import Vocab

_WHAT, _BODY = "restart predictor", "body"


@dataclass(frozen=True)
class Question:
    """What is put behind a response, and the tokens that answer it.

    Args:
        tokens: of the question; a turn of its own where the model is a chat model.
        restart: ids that say a fresh start would do better ("Yes"); the first is what is trained.
        stay: ids that say it would not ("No").
    """

    tokens: tuple[int, ...]
    restart: tuple[int, ...]
    stay: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tokens or not self.restart or not self.stay or set(self.restart) & set(self.stay):
            raise ValueError(
                "a question needs tokens, and answers for restart and for stay that are not the same; got "
                f"{len(self.tokens)} tokens, restart {self.restart} and stay {self.stay}"
            )

    @classmethod
    def of(
        cls,
        vocab: Vocab,
        text: str = "\n\nWould starting over give a better response? Answer Yes or No.\nAnswer:",
        *,
        restart: Sequence[str] = (" Yes",),
        stay: Sequence[str] = (" No",),
    ) -> Question:
        """The question in a vocabulary.

        Args:
            vocab: of the model.
            text: the question. For a chat model, write its turns out, or make `tokens` yourself.
            restart, stay: spellings of either answer, with the space they have behind the text; each must be one token.

        Raises:
            ValueError: an answer is not one token of this vocabulary.
        """

        def single(answers: Sequence[str]) -> tuple[int, ...]:
            found = [vocab.encode(answer).ids for answer in answers]
            for answer, ids in zip(answers, found, strict=True):
                if len(ids) != 1:
                    raise ValueError(f"the answer {answer!r} is {len(ids)} tokens of this vocabulary; take one of one")
            return tuple(ids[0] for ids in found)

        return cls(vocab.encode(text).ids, single(restart), single(stay))


class Restart(ABC):
    """r: the probability that a response, or the beginning of one, is at least as good as a fresh one."""

    vocab: Vocab

    @abstractmethod
    def probabilities(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> Tensor:
        """r [N] of responses to one prompt, each given as the tokens drawn so far, an end token included."""

    def probability(self, prompt: str | Sequence[int], response: str | Sequence[int]) -> float:
        """r of one response, finished or not; texts are tokenised, the prompt after the begin token if there is one.

        Where the response was drawn, give the ids that were drawn: a text may be cut into other tokens, and has no end
        token.
        """
        if isinstance(prompt, str):
            begin = () if self.vocab.bos_id is None else (self.vocab.bos_id,)
            prompt = (*begin, *self.vocab.encode(prompt).ids)
        ids = self.vocab.encode(response).ids if isinstance(response, str) else response
        return float(self.probabilities(prompt, [ids])[0])

    @abstractmethod
    def cost(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
        """Tokens that `probabilities` feeds to a model."""


class TableRestart(Restart):
    """r(s) = E[r(y) | s], r(y) = P(score(y') <= score(y)) with y' a fresh response; exact, ties on y's side.

    By the law of total expectation r is a martingale along a response. Every string is visited: an oracle.

    Args:
        policy: draws the responses, given their prompt.
        score: of a finished response, given as its tokens.
        max_tokens: most tokens of a response.
        margin: scores that differ by less are ties.
    """

    def __init__(
        self,
        policy: LanguageModel,
        score: Callable[[tuple[int, ...]], float],
        *,
        max_tokens: int,
        margin: float = 0.0,
    ) -> None:
        self.policy, self.vocab, self.score = policy, policy.vocab, score
        self.max_tokens, self.margin = max_tokens, margin
        self._known: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}

    def probabilities(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> Tensor:
        given = tuple(prompt)
        if given not in self._known:
            self._known[given] = self._all(given)
        return torch.tensor([self._known[given][tuple(response)] for response in responses], dtype=torch.float64)

    def cost(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
        return 0

    def _all(self, prompt: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        """r of every response and every beginning of one."""
        reach: dict[tuple[int, ...], float] = {(): 1.0}
        ends: list[tuple[int, ...]] = []
        waiting: list[tuple[int, ...]] = [()]
        while waiting:
            text = waiting.pop()
            if len(text) == self.max_tokens or (text and text[-1] in self.vocab.eos_ids):
                ends.append(text)
                continue
            p = self.policy.predict([[*prompt, *text]]).log_probs()[0, -1].double().exp().tolist()
            for token, share in enumerate(p):
                if share > 0:
                    reach[(*text, token)] = reach[text] * share
                    waiting.append((*text, token))
        mass = torch.tensor([reach[text] for text in ends], dtype=torch.float64)
        scores = torch.tensor([float(self.score(text)) for text in ends], dtype=torch.float64)
        gap = scores[:, None] - scores[None, :]
        wins = ((gap >= 0) | (gap.abs() < self.margin)).double() @ mass
        weighted = dict.fromkeys(reach, 0.0)
        for text, r in zip(ends, wins.tolist(), strict=True):
            for size in range(len(text) + 1):
                weighted[text[:size]] += reach[text] * r
        return {text: weighted[text] / reach[text] for text in reach}


@dataclass(frozen=True)
class Answers:
    """r [N], and the probability [N] that the model gives to the answers at all; far below 1 it is not answering."""

    stay: Tensor
    mass: Tensor


class RestartPredictor(Restart):
    """r from the answer of a language model to the question.

    Args:
        model: best one that `fit_restart` has trained.
        question: that it was trained on.
    """

    def __init__(self, model: LanguageModel, question: Question) -> None:
        if max(*question.tokens, *question.restart, *question.stay) >= model.vocab.size:
            raise ValueError(f"the question has token ids outside the vocabulary of {model.name}, {model.vocab.size}")
        self.model, self.question, self.vocab = model, question, model.vocab

    @torch.no_grad()
    def ask(self, state: State) -> Answers:
        """Put the question behind what each row of a state of `model` has kept, and take it away again.

        The cost is the question's tokens per row; what has been read is not read again, and the state is as before.

        Raises:
            ValueError: the question does not fit the context behind the longest row.
        """
        asked = torch.tensor(self.question.tokens).expand(state.batch, -1)
        log_probs = self.model.extend(state, asked)[:, -1].log_probs()[:, 0].double()
        state.rewind(len(self.question.tokens))
        stay = log_probs[:, list(self.question.stay)].logsumexp(-1)
        restart = log_probs[:, list(self.question.restart)].logsumexp(-1)
        return Answers((stay - restart).sigmoid(), torch.logaddexp(stay, restart).exp())

    def answers(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> Answers:
        """Read prompt and responses and ask; the prompt is read once."""
        state = self.model.start()
        self.model.extend(state, [list(prompt)])
        state = state.fork([0] * len(responses))
        width = max(map(len, responses))
        if width:
            self.model.extend(state, torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in responses]))
        return self.ask(state)

    def probabilities(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> Tensor:
        return self.answers(prompt, responses).stay

    def cost(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
        return len(prompt) + sum(len(row) + len(self.question.tokens) for row in responses)

    def save(self, folder: str | Path) -> None:
        """Write to a folder: model and tokenizer in Hugging Face layout, the question as JSON.

        Raises:
            OutputError: the folder cannot be written.
            ValueError: the model is not a transformers model.
        """
        if not isinstance(self.model, HFModel):
            raise ValueError(f"only a transformers model can be saved; {self.model.name} is none")
        self.model.save(Path(folder) / _BODY)
        _saved.save(
            folder,
            _WHAT,
            settings={"name": self.model.name, "question": asdict(self.question)},
            weights={},
            digests={"vocabulary": self.vocab.digest, "model": self.model.digest},
        )

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device | None = None) -> RestartPredictor:
        """Read what `save` wrote.

        Raises:
            ModelError: there is no predictor in the folder, or model or tokenizer are not those that were saved.
        """
        saved = _saved.load(folder, _WHAT)
        question = saved.built(_question, "question")
        model = HFModel.from_pretrained(Path(folder) / _BODY, device=device, dtype="float32", local_files_only=True)
        saved.check(vocabulary=model.vocab.digest, model=model.digest)
        model.name = str(saved.settings["name"])
        return cls(model, question)


def _question(**ids: Sequence[int]) -> Question:
    return Question(**{key: tuple(some) for key, some in ids.items()})

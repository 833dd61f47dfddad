"""ServerModel: a language model behind an OpenAI-compatible server, of which only the most probable tokens are told."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.model._answers import Known
from nextoken.model._dialect import settle
from nextoken.model._http import Connection, Refused
from nextoken.model._interpreter import Ids, Interpreter
from nextoken.model._server_vocab import EchoTokenization, ServerVocab, tokenization_of
from nextoken.model.base import ABSENT, LanguageModel, NoMemory, State
from nextoken.model.next import Generators, Next
from nextoken.model.partial import PartialNext, PartialStatistics, draw_impossible, whole_unknown
from nextoken.model.tokenizer import TokenizerVocab
from nextoken.model.vocab import Vocab

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

API_KEY = "NEXTOKEN_API_KEY"
"""Environment variable that holds the API key where none is given."""


class ServerModel(LanguageModel):
    """The k most probable next tokens, and the log-probability of the token that came, from `POST /v1/completions`.

    Works with vLLM (`prompt_logprobs`), llama.cpp's server, llama-cpp-python (`echo`), nextoken's own service, and
    other servers with OpenAI's completions. What a server understands is found out when the model is made. Where it
    tells nothing about prompts, every position costs a request of its own and tokens outside the top k stay unknown; a
    warning says so. Questions are asked when an answer is needed: `extend` itself sends nothing, `statistics` does.

    Token ids are exact with `tokenizer=`, and with servers that tell ids (vLLM, llama.cpp, nextoken). Without a
    tokenizer the vocabulary is asked for at `/tokenize` and `/detokenize`, else it grows with the texts of tokens seen,
    numbered in the order they are seen. Where the number of tokens is not known the entropy has no upper bound.

    Each row is read from its beginning; a tree is one prompt per leaf.

    Args:
        url: of the server, with or without `/v1`.
        model: as the server calls it; may be left out if it has one only.
        tokenizer: that of the model: a `Vocab`, a tokenizer of transformers, or where to load one from.
        top: k; by default 20, or the most the server gives if that is 10, 5 or 1.
        timeout, retries, api_key: see `Connection`; the key also from the environment variable NEXTOKEN_API_KEY.
        vocab_size: V, where neither server nor tokenizer tells it.
        context_length: most tokens of a row, where the server does not tell.
        concurrency: requests under way at once.

    Raises:
        ModelError: unreachable, unknown model, refused key, no log-probabilities, or an answer in another form.
    """

    is_partial = True

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        tokenizer: Vocab | PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
        top: int | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        api_key: str | None = None,
        vocab_size: int | None = None,
        context_length: int | None = None,
        concurrency: int = 4,
    ) -> None:
        if top is not None and top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        connection = Connection(url, timeout=timeout, retries=retries, api_key=api_key or os.environ.get(API_KEY))
        self.url = connection.root
        self.name, card = _served(connection, model)
        meta = card.get("meta") or {}
        size = vocab_size or meta.get("n_vocab")
        echo = None
        if tokenizer is not None:
            self.vocab = _vocab(tokenizer, size)
            size = self.vocab.size
        else:
            tokenization = tokenization_of(connection, self.name)
            if tokenization is None:
                tokenization = echo = EchoTokenization(connection, self.name)
                size = None
            self.vocab = ServerVocab(tokenization, size=size, name=self.name)
        self._digest = str(meta.get("digest", ""))
        zero = card.get("owned_by") == "nextoken"
        self._interpreter = Interpreter(
            connection, self.name, self.vocab, size=size, echo=echo, concurrency=concurrency
        )
        self.dialect = settle(self._interpreter, top, zero=zero)
        limit = card.get("max_model_len")
        # The server counts the token it generates, and the one that came last where nothing is asked about it.
        told = None if limit is None else max(1, int(limit) - (1 if zero else 2))
        self.context_length = context_length or told
        if self.dialect.reading is None:
            warnings.warn(
                f"{self.url} tells nothing about the tokens of a prompt: reading with {self.name} takes one request "
                f"per token, and tokens outside the top {self.dialect.top} stay unknown",
                stacklevel=2,
            )

    @property
    def digest(self) -> str:
        return self._digest

    def _remember(self, batch: int) -> NoMemory:
        return NoMemory()

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        batch, n = tokens.shape
        strings: list[Ids] = []
        string_of = torch.full((batch, n), -1, dtype=torch.long)
        lengths = torch.zeros(batch, n, dtype=torch.long)
        for row, (kept, fed) in enumerate(zip(state.tokens, tokens.tolist(), strict=True)):
            paths = {-1: kept}
            for node, token in enumerate(fed):
                if token == ABSENT:
                    continue
                if parents is None:
                    string_of[row, node], lengths[row, node] = len(strings), len(kept) + node + 1
                else:
                    paths[node] = (*paths[int(parents[row, node])], token)
                    string_of[row, node], lengths[row, node] = len(strings), len(paths[node])
                    strings.append(paths[node])
            if parents is None:
                strings.append((*kept, *(token for token in fed if token != ABSENT)))
        return ServerNext(self._interpreter, strings, string_of, lengths)


class ServerNext(Next):
    """Distributions after prefixes: places (string, length) [B, n] of some token strings, asked for when needed."""

    is_partial = True

    def __init__(
        self,
        interpreter: Interpreter,
        strings: Sequence[Ids],
        string_of: Tensor,
        lengths: Tensor,
        asked: dict[tuple[Ids, bool], list[Known | None]] | None = None,
    ) -> None:
        self._interpreter = interpreter
        self._strings, self._string_of, self._lengths = strings, string_of, lengths
        self._asked = {} if asked is None else asked
        self.shape = (string_of.shape[0], string_of.shape[1])
        self.vocab_size = interpreter.vocab.size

    def log_probs(self) -> NoReturn:
        """Not to be had, see `PartialNext`."""
        raise whole_unknown(self._interpreter.dialect.top, self.vocab_size)

    def sample(self, generator: Generators | None = None) -> NoReturn:
        """Not to be had, see `PartialNext`."""
        raise draw_impossible(self._interpreter.dialect.top)

    def statistics(self, targets: Tensor | None = None, *, top: int = 0) -> PartialStatistics:
        """What the server tells, see `PartialStatistics`; targets are asked about where it can read prompts."""
        if targets is not None and tuple(targets.shape) != self.shape:
            raise ValueError(f"targets must have shape {self.shape}, got {tuple(targets.shape)}")
        return self.known(targets).statistics(targets, top=top)

    def entropy_bounds(self) -> tuple[Tensor, Tensor]:
        """See `PartialNext.entropy_bounds`."""
        return self.known().entropy_bounds()

    def known(self, targets: Tensor | None = None) -> PartialNext:
        """The answers of the server, with the log-probabilities of `targets` [B, n] where it tells them."""
        batch, n = self.shape
        places = [
            (string, length, target)
            for string, length, target in zip(
                self._string_of.flatten().tolist(),
                self._lengths.flatten().tolist(),
                [ABSENT] * (batch * n) if targets is None else targets.flatten().tolist(),
                strict=True,
            )
        ]
        found = self._followed(places) if self._interpreter.dialect.reading is None else self._read(places)
        return _partial(found, (batch, n), self.vocab_size, self._interpreter.size)

    def _followed(self, places: list[tuple[int, int, int]]) -> list[Known | None]:
        prefixes = [self._strings[string][:length] if string >= 0 else () for string, length, _ in places]
        missing = list(dict.fromkeys(p for p in prefixes if p and (p, True) not in self._asked))
        for prefix, known in zip(missing, self._interpreter.follow(missing), strict=True):
            self._asked[prefix, True] = [known]
        return [self._asked[prefix, True][-1] if prefix else None for prefix in prefixes]

    def _read(self, places: list[tuple[int, int, int]]) -> list[Known | None]:
        # The prompt that answers each place, and how far it must reach: one token beyond where a target is asked about.
        prompts: dict[tuple[int, int], Ids] = {}
        reach: dict[tuple[int, int], int] = {}
        keys: list[tuple[int, int] | None] = []
        for number, (string, length, target) in enumerate(places):
            if string < 0:
                keys.append(None)
                continue
            whole, key = self._strings[string], (string, -1)
            own = prompts.get(key, whole)
            if target != ABSENT and length == len(own):
                own = (*whole, target)
            elif target != ABSENT and own[length] != target:
                own, key = (*whole[:length], target), (string, number)
            prompts[key] = own
            reach[key] = max(reach.get(key, 0), length + (target != ABSENT))
            keys.append(key)
        asked: dict[tuple[int, int], tuple[Ids, bool]] = {}
        for key, reached in reach.items():
            asked[key] = (prompts[key][:reached], False)
        for wanted, (_, length, _) in zip(keys, places, strict=True):
            if wanted is not None and length == len(asked[wanted][0]):
                asked[wanted] = (asked[wanted][0], True)
        missing = list(dict.fromkeys(question for question in asked.values() if question not in self._asked))
        for question, known in zip(missing, self._interpreter.read(missing), strict=True):
            self._asked[question] = known
        return [
            None if wanted is None else self._asked[asked[wanted]][length - 1]
            for wanted, (_, length, _) in zip(keys, places, strict=True)
        ]

    def _take(self, rows: Tensor, columns: Tensor) -> ServerNext:
        return ServerNext(
            self._interpreter, self._strings, self._string_of[rows, columns], self._lengths[rows, columns], self._asked
        )


def _partial(found: list[Known | None], shape: tuple[int, int], vocab_size: int, size: int | None) -> PartialNext:
    """The answers as tensors."""
    k = max((len(known.top) for known in found if known is not None), default=0)
    ids = torch.full((len(found), k), -1)
    logprobs = torch.full((len(found), k), torch.nan, dtype=torch.float64)
    other_ids = torch.full((len(found), 1), -1)
    other_logprobs = torch.full((len(found), 1), torch.nan, dtype=torch.float64)
    complete = torch.zeros(len(found), dtype=torch.bool)
    for i, known in enumerate(found):
        if known is None:
            continue
        ids[i, : len(known.top)] = torch.tensor([token for token, _ in known.top], dtype=torch.long)
        logprobs[i, : len(known.top)] = torch.tensor([value for _, value in known.top], dtype=torch.float64)
        complete[i] = known.is_complete
        if known.came is not None:
            other_ids[i, 0], other_logprobs[i, 0] = known.came
    return PartialNext(
        ids.reshape(*shape, k),
        logprobs.reshape(*shape, k),
        vocab_size=vocab_size,
        other_ids=other_ids.reshape(*shape, 1),
        other_logprobs=other_logprobs.reshape(*shape, 1),
        is_complete=complete.reshape(shape),
        choices=size,
    )


def _served(connection: Connection, model: str | None) -> tuple[str, dict[str, Any]]:
    """The model's name at the server, and what /v1/models says of it."""
    try:
        answer = connection.get("/v1/models")
    except Refused as refusal:
        if refusal.status != 404:
            raise
        if model is None:
            raise ModelError(f"{connection.root} does not list its models: say which one (model=)") from None
        return model, {}
    try:
        cards = {str(card["id"]): dict(card) for card in answer["data"]}
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{connection.root}/v1/models answered in a form that is not OpenAI's") from None
    names = ", ".join(list(cards)[:10]) + (", ..." if len(cards) > 10 else "")
    if model is None and len(cards) == 1:
        model = next(iter(cards))
    if model is None:
        raise ModelError(f"{connection.root} has {names or 'no models'}: say which one (model=)")
    if model not in cards:
        raise ModelError(f"{connection.root} has no model {model!r}; it has {names or 'none'}")
    return model, cards[model]


def _vocab(tokenizer: Any, size: int | None) -> Vocab:
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the tokenizer {tokenizer}: {str(error).splitlines()[0]}") from error
    vocab = tokenizer if isinstance(tokenizer, Vocab) else TokenizerVocab(tokenizer, size=size)
    if size is not None and vocab.size != size:
        raise ModelError(f"the tokenizer has {vocab.size} tokens, but the server's model {size}: it is another model's")
    return vocab

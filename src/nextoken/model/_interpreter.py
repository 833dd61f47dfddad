"""Asking /v1/completions in the dialect that a server understands, and understanding what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from nextoken.errors import ModelError
from nextoken.model._answers import (
    UNNAMED,
    Known,
    from_lists,
    from_prompt_logprobs,
    names_of,
    place_of,
)
from nextoken.model._http import Connection
from nextoken.model._server_vocab import EchoTokenization
from nextoken.model.vocab import Vocab

Ids: TypeAlias = tuple[int, ...]
Reading: TypeAlias = Literal["prompt_logprobs", "echo"] | None

BATCH = 8
"""Prompts per request."""
_DRAWS = 4
"""Tries to see a distribution whose drawn token was an end, which some servers leave out of the answer."""


@dataclass(frozen=True)
class Dialect:
    """What a server understands.

    Args:
        ids: prompts may be token ids; otherwise they are text, before which the server may put its begin token.
        reading: how log-probabilities of a prompt are had; None if they are not.
        named_by_id: tokens can be asked to be named by id.
        zero: `max_tokens` may be 0.
        top: k, the number of log-probabilities per token.
        batch: prompts per request.
        adds_bos: whether text gets a begin token; None if not told.
    """

    ids: bool
    reading: Reading
    named_by_id: bool
    zero: bool
    top: int
    batch: int = 1
    adds_bos: bool | None = None


class Interpreter:
    """Asks a server in its dialect and understands the answers.

    Args:
        size: V, None if unknown.
        echo: the vocabulary learned from echoed text, for servers that tell no ids.
        concurrency: requests under way at once.
    """

    def __init__(
        self,
        connection: Connection,
        model: str,
        vocab: Vocab,
        *,
        size: int | None,
        echo: EchoTokenization | None,
        concurrency: int,
    ) -> None:
        self.connection, self.model, self.vocab = connection, model, vocab
        self.size = size
        self.echo = echo
        self._concurrency = concurrency
        self.dialect = Dialect(ids=echo is None, reading=None, named_by_id=False, zero=False, top=1)

    def read(self, prompts: Sequence[tuple[Ids, bool]]) -> list[list[Known | None]]:
        """Of each (ids, whether what follows the last is wanted): what follows each token, None if unknown."""
        results: list[list[Known | None]] = [[] for _ in prompts]
        groups = [[i for i, (_, final) in enumerate(prompts) if final == wanted] for wanted in (True, False)]
        chunks = [chunk for group in groups for chunk in _chunks(group, self.dialect.batch)]

        def answer(chunk: list[int]) -> None:
            found = self.ask([prompts[i][0] for i in chunk], reading=True, final=prompts[chunk[0]][1])
            for i, known in zip(chunk, found, strict=True):
                results[i] = known

        self._at_once(answer, chunks)
        return results

    def follow(self, prompts: Sequence[Ids]) -> list[Known | None]:
        """What follows each prompt, without reading it."""
        results: list[Known | None] = [None] * len(prompts)

        def answer(chunk: list[int]) -> None:
            found = self.ask([prompts[i] for i in chunk], reading=False, final=True)
            for i, known in zip(chunk, found, strict=True):
                results[i] = known[-1]

        self._at_once(answer, list(_chunks(range(len(prompts)), self.dialect.batch)))
        return results

    def _at_once(self, answer: Callable[[list[int]], None], chunks: list[list[int]]) -> None:
        if len(chunks) < 2:
            for chunk in chunks:
                answer(chunk)
            return
        with ThreadPoolExecutor(min(self._concurrency, len(chunks))) as pool:
            futures = [pool.submit(answer, chunk) for chunk in chunks]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def ask(
        self, prompts: Sequence[Ids], *, reading: bool, final: bool, retries: int | None = None
    ) -> list[list[Known | None]]:
        """What follows each token of each prompt (of the last only, unless `reading`): one request, but for redraws."""
        found = self._ask(prompts, 0, reading=reading, final=final, retries=retries)
        for draw in range(1, _DRAWS if final else 1):
            missing = [i for i, known in enumerate(found) if known[-1] is None]
            if not missing:
                break
            again = self._ask([prompts[i] for i in missing], draw, reading=False, final=True, retries=retries)
            for i, known in zip(missing, again, strict=True):
                found[i][-1] = known[-1]
        return found

    def _ask(
        self, prompts: Sequence[Ids], seed: int, *, reading: bool, final: bool, retries: int | None
    ) -> list[list[Known | None]]:
        dialect = self.dialect
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": [list(ids) for ids in prompts] if dialect.ids else [self.text(ids) for ids in prompts],
            "max_tokens": 0 if dialect.zero and not final else 1,
            # At temperature 1 every server's numbers are those of the model itself.
            "temperature": 1.0,
            "seed": seed,
            "logprobs": dialect.top,
        }
        if dialect.named_by_id:
            body["return_tokens_as_token_ids"] = True
        if reading and dialect.reading == "prompt_logprobs":
            body["prompt_logprobs"] = dialect.top
        if reading and dialect.reading == "echo":
            body["echo"] = True
        answer = self.connection.post("/v1/completions", body, retries=retries)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(choices) != len(prompts):
                raise ValueError(f"{len(choices)} choices for {len(prompts)} prompts")
            return [self._parsed(*pair, reading, final) for pair in zip(choices, prompts, strict=True)]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ModelError(
                f"{self.connection.root} answered in a form that is not OpenAI's completions with logprobs "
                f"({type(error).__name__}: {error})"
            ) from None

    def _parsed(self, choice: dict[str, Any], ids: Ids, reading: bool, final: bool) -> list[Known | None]:
        known: list[Known | None] = [None] * len(ids)
        k, size, lists = self.dialect.top, self.size, choice["logprobs"]
        after = 0
        if reading and self.dialect.reading == "prompt_logprobs":
            entries = choice["prompt_logprobs"]
            if len(entries) != len(ids):
                raise ValueError(f"{len(entries)} prompt_logprobs for {len(ids)} tokens")
            for i in range(1, len(ids)):
                known[i - 1] = from_prompt_logprobs(entries[i], ids[i], k, size)
        elif reading and self.dialect.reading == "echo":
            shift = self._place(lists["tokens"], ids)
            after = len(ids) + shift
            for i in range(max(1, 1 - shift), len(ids)):
                known[i - 1] = from_lists(lists, i + shift, k, size, self._id_of, came=ids[i])
        if final and lists is not None and len(lists["content" if "content" in lists else "tokens"]) > after:
            known[-1] = from_lists(lists, after, k, size, self._id_of)
        elif final and lists is None:
            raise ValueError("logprobs is null")
        return known

    def _place(self, tokens: Sequence[str], ids: Ids) -> int:
        """Index of ids[0] among the tokens of an answer; -1 where a begin token is left out."""
        names = [names_of(self.vocab.token_bytes[i], self.vocab.label(i), i) for i in ids]
        if ids[0] == self.vocab.bos_id:
            try:
                return place_of(tokens, names)
            except ModelError:
                return place_of(tokens, names[1:]) - 1
        return place_of(tokens, names)

    def text(self, ids: Ids) -> str:
        """A prompt for servers that take text, with the begin token that they put before it themselves taken off."""
        bos, adds = self.vocab.bos_id, self.dialect.adds_bos
        begins = bos is not None and ids[0] == bos
        if begins and adds is False:
            raise ModelError(f"{self.model} at this server has no begin token: read without one (bos=False)")
        if not begins and bos is not None and adds:
            raise ModelError(f"this server puts {self.vocab.label(bos)} before every text, so rows must begin with it")
        whole = None if self.echo is None else self.echo.text_of(ids)
        if whole is not None:
            return whole
        data = self.vocab.decode(ids[1:] if begins else ids)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(
                "this server takes text only, and these tokens end within a character: give a whole text"
            ) from None

    def _id_of(self, name: str) -> int:
        if self.echo is not None:
            return self.echo.id_of(name)
        return self._ids_by_name.get(name, UNNAMED)

    @cached_property
    def _ids_by_name(self) -> dict[str, int]:
        """Names that are one token's only."""
        table: dict[str, int] = {}
        if self.size is None or not isinstance(self.vocab.token_bytes, tuple):
            return table  # a vocabulary that is asked for token by token
        for token_id, spelled in enumerate(self.vocab.token_bytes):
            for name in names_of(spelled, self.vocab.label(token_id), token_id):
                table[name] = UNNAMED if name in table else token_id
        return table


def _chunks(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    several = list(indices)
    for at in range(0, len(several), size):
        yield several[at : at + size]

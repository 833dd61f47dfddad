"""JsonSchema and Lark: texts that a JSON schema or a context-free grammar describes, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from nextoken.constrain._matching import Alphabet, alphabet, llguidance
from nextoken.constrain.constraint import Constraint, Place
from nextoken.methods import method
from nextoken.model.vocab import Vocab


class Grammar(Constraint):
    """The texts that a grammar of llguidance describes; `JsonSchema` and `Lark` are two ways to write one.

    Args:
        grammar: in llguidance's own form.
        what: what to call it in errors.

    Raises:
        ValueError: it is no grammar, or has a part that llguidance does not know.
        NextokenError: llguidance is not installed.
    """

    def __init__(self, grammar: str, *, what: str = "the grammar") -> None:
        self._grammar, self._what = grammar, what
        self._bytes = Alphabet()
        self._starts: WeakKeyDictionary[Vocab, Any] = WeakKeyDictionary()
        self._start = self._begun(self._bytes)

    def start(self) -> Place:
        return _GrammarPlace(self, b"", self._start, self._bytes)

    def _begun(self, letters: Alphabet) -> Any:
        matcher = llguidance().LLMatcher(letters.tokenizer, self._grammar, log_level=0)
        return self._sound(matcher, f"{self._what} cannot be used")

    def _over(self, vocab: Vocab) -> tuple[Any, Alphabet]:
        """A matcher at the beginning that knows the tokens of a vocabulary."""
        letters = alphabet(vocab)
        if vocab not in self._starts:
            self._starts[vocab] = self._begun(letters)
        return self._starts[vocab], letters

    def _sound(self, matcher: Any, trouble: str) -> Any:
        if matcher.is_error():
            raise ValueError(f"{trouble}: {matcher.get_error().strip()}")
        return matcher

    def _moved(self, matcher: Any, letters: Alphabet, data: bytes) -> Any | None:
        """A new matcher, `data` further on; None if no text of the grammar goes on so."""
        fresh = matcher.deep_copy()
        taken = fresh.try_consume_tokens(letters(data))
        self._sound(fresh, f"llguidance gave up on {self._what}")
        return fresh if taken == len(data) else None


class _GrammarPlace(Place):
    """The matcher speaks of bytes alone until masks of a vocabulary are wanted, and of its tokens from then on."""

    def __init__(self, grammar: Grammar, read: bytes, matcher: Any, letters: Alphabet) -> None:
        self._grammar, self._read, self._matcher, self._letters = grammar, read, matcher, letters

    def advance(self, data: bytes) -> Place | None:
        matcher = self._grammar._moved(self._matcher, self._letters, data)
        return None if matcher is None else _GrammarPlace(self._grammar, self._read + data, matcher, self._letters)

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    def allowed(self, vocab: Vocab) -> Tensor:
        if self._letters is not alphabet(vocab):
            start, letters = self._grammar._over(vocab)
            self._matcher, self._letters = self._grammar._moved(start, letters, self._read), letters
        mask = self._letters.mask(self._matcher)
        self._grammar._sound(self._matcher, f"llguidance gave up on {self._grammar._what}")
        mask[sorted(vocab.eos_ids)] = self.is_complete
        return mask

    def narrow(self, mask: Tensor, vocab: Vocab) -> Tensor:
        return mask & self.allowed(vocab)


@method(name="JSON schema constraint", access="gray", summary="texts that are JSON and valid under a schema")
class JsonSchema(Grammar):
    """{s : s is JSON, valid under the schema}, as llguidance reads JSON Schema.

    Of the ways to write a valid value it holds those with properties in the order of the schema and with characters as
    they are rather than as `\\u` escapes. A keyword that llguidance does not know is refused rather than passed over.

    Args:
        schema: as a mapping, or its JSON text.
        whitespace: what may stand between the parts, a regular expression of llguidance. JSON allows any amount,
            `[ \\n\\r\\t]*`, in which a model may go on for ever; `` (empty) allows none.

    Raises:
        ValueError: the schema is no JSON, no schema, has an unknown keyword, or nothing is valid under it.
        NextokenError: llguidance is not installed.
    """

    def __init__(self, schema: Mapping[str, Any] | bool | str, *, whitespace: str = " ?") -> None:
        try:
            self.schema = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
        except (ValueError, TypeError) as error:
            raise ValueError(f"the JSON schema is no JSON: {error}") from None
        if not isinstance(self.schema, dict | bool):
            raise ValueError(f"a JSON schema is an object, true or false; got {type(self.schema).__name__}")
        if self.schema is False:
            raise ValueError("the JSON schema false has no valid text")
        options = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
        text = json.dumps({} if self.schema is True else self.schema)
        grammar = llguidance().LLMatcher.grammar_from_json_schema(text, overrides=options)
        super().__init__(grammar, what="the JSON schema")

    def __repr__(self) -> str:
        return f"JsonSchema({self.schema!r})"


@method(name="Grammar constraint", access="gray", summary="texts of a context-free grammar")
class Lark(Grammar):
    """{s : start derives s} for a context-free grammar in llguidance's variant of the notation of Lark.

        start: sum
        sum: NUMBER ("+" NUMBER)*
        NUMBER: /[0-9]+/

    Rules are written small, terminals in capitals, `start` is where it begins. Spaces between parts are not passed over
    unless the grammar says `%ignore`. Tokens of a vocabulary cannot be named: a constraint speaks of bytes.

    Args:
        grammar: its text.

    Raises:
        ValueError: it is malformed; the message shows where.
        NextokenError: llguidance is not installed.
    """

    def __init__(self, grammar: str) -> None:
        if not isinstance(grammar, str):
            raise ValueError(f"a grammar is a text (str), got {type(grammar).__name__}")
        self.grammar = grammar
        super().__init__(llguidance().LLMatcher.grammar_from_lark(grammar), what="the grammar")

    def __repr__(self) -> str:
        return f"Lark({self.grammar!r})"

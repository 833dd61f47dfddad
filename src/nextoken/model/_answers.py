"""What servers tell of a distribution, in the several forms they have for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nextoken.errors import ModelError

UNNAMED = -1
_IMPOSSIBLE = -9999.0
"""How servers write log 0."""
_BY_ID = "token_id:"

IdOf: TypeAlias = Callable[[str], int]
"""The id of the token that a server calls so; UNNAMED if several or none have that name."""


@dataclass(frozen=True)
class Known:
    """What is known of one distribution.

    Args:
        top: (id, log p) of the tokens in the server's list; ids may be UNNAMED.
        came: the token that came and its log p, where it is told beside the list.
        is_complete: no token outside `top` is more probable than the least of it.
    """

    top: tuple[tuple[int, float], ...] = ()
    came: tuple[int, float] | None = None
    is_complete: bool = False


def from_prompt_logprobs(entry: Mapping[str, Any] | None, came: int, k: int, vocab_size: int | None) -> Known | None:
    """One place of vLLM's `prompt_logprobs`: log-probabilities by token id."""
    if entry is None:
        return None
    listed = {int(i): _number(what["logprob"]) for i, what in entry.items()}
    return _by_id(listed, came, k, vocab_size)


def from_lists(
    logprobs: Mapping[str, Any], place: int, k: int, vocab_size: int | None, id_of: IdOf, *, came: int | None = None
) -> Known | None:
    """One place of a completion's `logprobs`: OpenAI's lists by token name, or llama.cpp's `content` by id.

    Args:
        came: id of the token there, if known; without it the token drawn is left out where it is not among the top.
    """
    if "content" in logprobs:
        what = logprobs["content"][place]
        listed = {int(one["id"]): _number(one["logprob"]) for one in what["top_logprobs"]}
        return _by_id(listed, None, k, vocab_size)
    by_name = logprobs["top_logprobs"][place]
    own = logprobs["token_logprobs"][place]
    if by_name is None or own is None:
        return None
    name = logprobs["tokens"][place]
    listed_names = {key: _number(value) for key, value in by_name.items()}
    if all(key.startswith(_BY_ID) for key in listed_names):
        listed = {int(key.removeprefix(_BY_ID)): value for key, value in listed_names.items()}
        drawn = int(name.removeprefix(_BY_ID))
        known = _by_id({**listed, drawn: _number(own)}, drawn, k, vocab_size)
        return known if came is not None else Known(known.top, None, known.is_complete)
    return _by_name({**listed_names, name: _number(own)}, name, k, vocab_size, id_of, came)


def _by_id(listed: dict[int, float], came: int | None, k: int, vocab_size: int | None) -> Known:
    beside = None
    if came is not None and came in listed and len(listed) > k:
        beside = (came, listed.pop(came))
    most = sorted(listed.items(), key=lambda pair: -pair[1])
    return Known(tuple(most), beside, len(most) >= min(k, vocab_size or k))


def _by_name(
    listed: dict[str, float], name: str, k: int, vocab_size: int | None, id_of: IdOf, came: int | None
) -> Known:
    """Names may be shared by tokens that are parts of characters: of those a server's table holds only one."""
    own = listed[name]
    is_lowest = own <= min(listed.values())
    drop = len(listed) > k
    beside = None
    if drop:
        listed = {key: value for key, value in listed.items() if key != name}
        beside = None if came is None else (came, own)
    wanted = min(k, vocab_size or k)
    # With just k names of which the one that came is the last, two tokens of the true list may have shared a name.
    is_complete = len(listed) >= wanted and (drop or not is_lowest or (vocab_size is not None and k >= vocab_size))
    top = [(came if key == name and came is not None else id_of(key), value) for key, value in listed.items()]
    seen: set[int] = set()
    distinct = []
    for token, value in sorted(top, key=lambda pair: -pair[1]):
        distinct.append((UNNAMED if token in seen else token, value))
        seen.add(token)
    return Known(tuple(distinct), beside, is_complete)


def _number(value: Any) -> float:
    number = float(value)
    if math.isnan(number) or number > 1e-3:
        raise ValueError(f"{value} is no log-probability")
    return -math.inf if number <= _IMPOSSIBLE else min(number, 0.0)


def place_of(tokens: Sequence[str], expected: Sequence[frozenset[str]]) -> int:
    """Where in a server's tokens the expected ones begin (behind a begin token of its own), each by any of its names.

    Raises:
        ModelError: they are not there: the server cuts the text into other tokens.
    """
    for offset in range(min(2, len(tokens) - len(expected) + 1)):
        if all(token in names for token, names in zip(tokens[offset:], expected, strict=False)):
            return offset
    raise ModelError(
        "the server cuts the text into other tokens than were fed to it: give the tokenizer of its model (tokenizer=)"
    )


def names_of(spelled: bytes, label: str, token_id: int) -> frozenset[str]:
    """The names a server may have for a token."""
    names = {label, f"{_BY_ID}{token_id}"}
    if spelled:
        names |= {spelled.decode("utf-8", errors=errors) for errors in ("ignore", "replace", "backslashreplace")}
        names.add("bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled))
    else:
        names.add("")
    return frozenset(names)

"""Spelling: the bytes of tokens as the characters of their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Spelled(NamedTuple):
    """A token as it stands in its text.

    Args:
        text: the characters that begin in the token; empty for one that holds only the rest of a character.
        is_whole: False where its bytes belong to no character at all and `text` shows them as \\xNN.
    """

    text: str
    is_whole: bool


def spelled(tokens: Sequence[bytes]) -> list[Spelled]:
    """The tokens of one text: a character spread over several belongs to the one it begins in.

    Whole tokens joined give the text. Bytes that are not UTF-8 even together are shown as \\xNN.
    """
    shown: list[Spelled] = []
    row = 0
    while row < len(tokens):
        try:
            shown.append(Spelled(tokens[row].decode(), True))
            row += 1
            continue
        except UnicodeDecodeError:
            end = _joined(tokens, row)
        shown += _shared(tokens[row:end])
        row = end
    return shown


def _joined(tokens: Sequence[bytes], row: int) -> int:
    """The end of the shortest run from `row` that is UTF-8 together, or of this one token if there is none."""
    data = b""
    for end in range(row, len(tokens)):
        data += tokens[end]
        try:
            data.decode()
            return end + 1
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                break
    return row + 1


def _shared(tokens: Sequence[bytes]) -> list[Spelled]:
    data = b"".join(tokens)
    try:
        data.decode()
    except UnicodeDecodeError:
        return [Spelled(token.decode(errors="backslashreplace"), False) for token in tokens]
    shown, begin, taken = [], 0, 0
    for token in tokens:
        begin += len(token)
        # The token's last character may end in a later one: its further bytes (10xxxxxx) come along.
        end = begin
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end += 1
        shown.append(Spelled(data[taken:end].decode(), True))
        taken = end
    return shown

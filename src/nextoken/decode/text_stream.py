"""TextStream: the bytes of a growing output as text, never half a character, never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of tokens into text as soon as it is sure.

    Bytes wait while they may be the beginning of a stop string, or of a character. Invalid UTF-8 comes out as U+FFFD,
    as soon as it is known to be invalid.

    Args:
        stops: byte strings that end the text; matched across token boundaries, the earliest match wins, and neither it
            nor what follows is part of the text.
    """

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._waiting = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text that has come out."""
        return "".join(self._pieces)

    def push(self, fresh: bytes) -> str:
        """Take the bytes of a token and return the text that is now sure; `stopped` tells whether a stop was found."""
        if self.stopped:
            raise ValueError("the text has ended at a stop string")
        if not self._stops:
            return self._out(fresh)
        self._waiting += fresh
        found = [at for stop in self._stops if (at := self._waiting.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._waiting = self._waiting[: min(found)], b""
            return self._out(text, final=True)
        sure = len(self._waiting) - self._held()
        text, self._waiting = self._waiting[:sure], self._waiting[sure:]
        return self._out(text)

    def finish(self) -> str:
        """The end of the output: what was waiting comes out."""
        if self.stopped:
            return ""
        waiting, self._waiting = self._waiting, b""
        return self._out(waiting, final=True)

    def _held(self) -> int:
        """Bytes at the end that may be the beginning of a stop string."""
        for size in range(min(self._longest - 1, len(self._waiting)), 0, -1):
            tail = self._waiting[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0

    def _out(self, data: bytes, *, final: bool = False) -> str:
        piece = self._decoder.decode(data, final)
        if piece:
            self._pieces.append(piece)
        return piece

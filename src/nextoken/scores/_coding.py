"""Coding of pieces of a file side by side, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nextoken.errors import InputError
from nextoken.scores._arithmetic import Decoder, Encoder
from nextoken.scores._container import Part
from nextoken.scores._raw import RawReader, RawWriter
from nextoken.scores._spelled import Spelled, spell
from nextoken.scores._stride import BITS, Stride

if TYPE_CHECKING:
    from nextoken.model.base import LanguageModel

Report = Callable[[int], None]
"""Called with the bytes of the original that are newly done."""


def encoded(model: LanguageModel, pieces: Sequence[bytes], *, overlap: int | None, report: Report) -> list[Part]:
    """Each piece as a part, all of them coded side by side."""
    import torch

    spelled = [spell(model.vocab, piece) for piece in pieces]
    longest = max(len(one.ids) for one in spelled)
    encoders = [Encoder() for _ in pieces]
    raws = [RawWriter(encoder, one) for encoder, one in zip(encoders, spelled, strict=True)]
    stride = Stride(model, len(pieces), longest, overlap=overlap)
    done = _Steps(sum(map(len, pieces)), longest, report)
    for step in range(longest):
        chosen = torch.tensor([one.ids[step] if step < len(one.ids) else 0 for one in spelled])
        bounds = stride.bounds()
        ends = bounds.gather(1, torch.stack([chosen, chosen + 1], 1).to(bounds.device)).tolist()
        for row, (start, end) in enumerate(ends):
            if step < len(spelled[row].ids):
                raws[row].put(step)
                encoders[row].put(start, end - start, BITS)
        stride.take(chosen)
        done.step()
    for raw, one in zip(raws, spelled, strict=True):
        raw.put(len(one.ids))
    done.finish()
    parts = []
    for piece, one, encoder in zip(pieces, spelled, encoders, strict=True):
        code = encoder.finish()
        parts.append(Part(len(piece), len(one.ids), len(one.raw), code if len(code) < len(piece) else piece))
    return parts


def decoded(model: LanguageModel, parts: Sequence[Part], *, overlap: int | None, report: Report) -> list[bytes]:
    """The pieces again.

    Raises:
        InputError: they have not the lengths they should have.
    """
    import torch

    # Stored parts were rows of the batch in coding, and are so again: with the same calls come the same numbers.
    stored = [spell(model.vocab, part.code).ids if part.is_stored else None for part in parts]
    longest = max(part.tokens for part in parts)
    decoders = [Decoder(part.code) for part in parts]
    raws = [RawReader(decoder, part) for decoder, part in zip(decoders, parts, strict=True)]
    spelled = [Spelled() for _ in parts]
    stride = Stride(model, len(parts), longest, overlap=overlap)
    done = _Steps(sum(part.length for part in parts), longest, report)
    for step in range(longest):
        bounds = stride.bounds()
        at_work = [row for row, part in enumerate(parts) if step < part.tokens and not part.is_stored]
        targets = torch.zeros(len(parts), 1, dtype=torch.long)
        for row in at_work:
            spelled[row].raw |= raws[row].take(step)
            targets[row] = decoders[row].peek(BITS)
        found = torch.searchsorted(bounds, targets.to(bounds.device), right=True) - 1
        found = found.clamp(max=model.vocab.size - 1)
        ends = bounds.gather(1, torch.cat([found, found + 1], 1)).tolist()
        chosen = [ids[step] if ids is not None and step < len(ids) else 0 for ids in stored]
        for row, token in enumerate(found[:, 0].tolist()):
            if row in at_work:
                start, end = ends[row]
                decoders[row].take(start, end - start, BITS)
                spelled[row].ids.append(token)
                chosen[row] = token
        stride.take(torch.tensor(chosen))
        done.step()
    done.finish()
    pieces = []
    for part, raw, one in zip(parts, raws, spelled, strict=True):
        if not part.is_stored:
            one.raw |= raw.take(part.tokens)
        pieces.append(part.code if part.is_stored else one.joined(model.vocab))
        if len(pieces[-1]) != part.length:
            raise InputError(f"a part has {len(pieces[-1])} bytes instead of {part.length}")
    return pieces


class _Steps:
    """Steps of a round told as bytes."""

    def __init__(self, size: int, steps: int, report: Report) -> None:
        self._size, self._steps, self._report = size, steps, report
        self._at = self._told = 0

    def step(self) -> None:
        self._at += 1
        self._tell(self._size * self._at // self._steps)

    def finish(self) -> None:
        self._tell(self._size)

    def _tell(self, done: int) -> None:
        if done > self._told:
            self._report(done - self._told)
            self._told = done

"""Masked: tokens that a constraint forbids, removed before anything is drawn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextoken.constrain.constraint import Constraint, Place
from nextoken.decode.transform import REMOVED, Context, EmptyDistribution, Transform
from nextoken.methods import method
from nextoken.model.vocab import Vocab

_MOST_PLACES = 4096
"""Places kept: some for each text under way, most of them one token apart."""


class DeadEnd(EmptyDistribution):
    """No token can follow: the constraint leaves none, or none that is possible. `text` is what was read so far."""

    def __init__(self, message: str, *, text: bytes) -> None:
        super().__init__(message)
        self.text = text


@method(name="Constraint mask", access="gray", summary="tokens that a constraint forbids get no probability")
@dataclass(frozen=True)
class Masked(Transform):
    """l(v) where the constraint allows v after the output so far, else -inf: a text of the constraint, if it ends.

        generate(model, prompt, transform=Masked(Regex("[0-9]{4}")) | Temperature(0.7))

    The output is constrained, not the prompt. End tokens are allowed where the output is complete, and after one only
    end tokens. Put it first: a truncation before it may leave only tokens that it forbids. At `max_tokens`, a full
    context or a stop string the output is cut off, and may be incomplete: `constraint.complete(text)` tells.

    Masking is local: each token has the law of the model given that *some* continuation exists, however improbable. It
    is not the law of the model's texts given that they are in the set, from which `smc` of this room draws.

    Args:
        constraint: the set of texts.

    Raises:
        ValueError: the model has no end token, so that no text could end where the constraint wants it to.
        DeadEnd: no token can follow: none spells what the constraint asks for, or a transform before this one, or the
            model, gave all that do a probability of 0. The message tells the output so far.
    """

    constraint: Constraint
    _places: OrderedDict[bytes, Place] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.constraint, Constraint):
            raise ValueError(f"Masked takes a constraint, such as Regex('[0-9]+'); got {self.constraint!r}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        vocab = context.vocab
        if vocab is None:
            raise ValueError("a constraint needs to know the tokens' bytes: give the Context a vocab")
        if not vocab.eos_ids:
            raise ValueError("the model has no end token, so a text could not end where the constraint wants it to")
        allowed = torch.stack([self._allowed(output, vocab) for output in context.outputs]).to(scores.device)
        masked = scores.masked_fill(~allowed, REMOVED)
        possible = (masked > REMOVED).any(-1)
        if not bool(possible.all()):
            row = int((~possible).nonzero()[0])
            self._complain(vocab.decode(context.outputs[row]), has_tokens=bool(allowed[row].any()))
        return masked

    def _allowed(self, output: Sequence[int], vocab: Vocab) -> Tensor:
        if any(token in vocab.eos_ids for token in output):
            ends = torch.zeros(vocab.size, dtype=torch.bool)
            ends[sorted(vocab.eos_ids)] = True
            return ends
        return self._place(output, vocab).allowed(vocab)

    def _place(self, output: Sequence[int], vocab: Vocab) -> Place:
        """The place after an output: read on from the longest beginning of it that is known."""
        spelled = [vocab.token_bytes[token] for token in output]
        read, known = b"".join(spelled), len(output)
        place = self._places.get(read)
        while place is None and known:
            known -= 1
            read = read[: len(read) - len(spelled[known])]
            place = self._places.get(read)
        if place is None:
            place = self.constraint.start()
            self._keep(b"", place)
        for data in spelled[known:]:
            following = place.advance(data)
            if following is None:
                raise DeadEnd(f"the constraint has no text that begins with {_shown(read + data)}", text=read + data)
            place, read = following, read + data
            self._keep(read, place)
        return place

    def _keep(self, read: bytes, place: Place) -> None:
        self._places[read] = place
        self._places.move_to_end(read)
        if len(self._places) > _MOST_PLACES:
            self._places.popitem(last=False)

    def _complain(self, text: bytes, *, has_tokens: bool) -> None:
        if has_tokens:
            reason = (
                "the tokens that the constraint allows all have probability 0: put Masked before the transforms that "
                "remove tokens, or the model itself excludes them"
            )
        else:
            reason = "no token of the vocabulary spells what the constraint asks for next"
        raise DeadEnd(f"nothing can follow the output {_shown(text)}: {reason}", text=text)


def _shown(text: bytes) -> str:
    """As it reads, or only its end where it is long."""
    readable = text.decode("utf-8", errors="backslashreplace")
    return repr(readable) if len(readable) <= 80 else f"...{readable[-77:]!r}"

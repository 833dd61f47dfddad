"""Reencoded: guesses of a model with another tokenizer, as text that is encoded anew in the target's tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from nextoken.methods import method
from nextoken.model.aligned import spell
from nextoken.model.alignment import counterparts, marks
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.vocab import Vocab
from nextoken.speculate.draft import ROOT, Branches, Draft, Drafter, Row
from nextoken.speculate.draft_model import Follower

_WINDOW = 8  # of the text's last tokens, encoded together with what is guessed so that words keep their beginning


@method(
    name="String-level exact match",
    arxiv="2502.05202",
    access="gray",
    summary="a draft model with any tokenizer guesses text, which is encoded anew in the target's tokens",
)
class Reencoded(Drafter):
    """The draft reads the text in its own tokens and says its `length` likeliest next ones, one after the other; their
    text x is encoded in the target's tokens, and those that more text would not change are the guess.

    A token of the encoding is settled if no longer token of the target begins with what x has from there on; for
    vocabularies that spell by longest tokens this is exact, for others a rule of thumb that costs or saves guesses
    and nothing else. An end token of the draft settles all, and ends the guess. The guess is a point mass: given the
    text it is certain. So it stands if the target draws it, under any lossless rule, which keeps the law whatever the
    two vocabularies have in common, where the distributions of `Aligned` must be brought from one to the other and
    guess no token that has no counterpart. The last tokens of the text are encoded together with x; where that gives
    no token boundary at their end, x is encoded alone. A text or guess that cannot be encoded has no guess.

    Args:
        model: the draft, over any vocabulary.
        length: tokens of the draft guessed per pass.
        begin: its tokens that every text begins with; by default its begin token.

    Raises:
        ValueError: length is below 1, the draft tells only its most probable tokens, or it has no begin token and none
            is given.

    Source: Timor et al., arXiv:2502.05202, algorithm 2 (SLEM). There the draft may be drawn; here the likeliest
    tokens are taken, and of the encoding only what is settled.
    """

    def __init__(self, model: LanguageModel, *, length: int = 6, begin: Sequence[int] | None = None) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if model.is_partial:
            raise ValueError(f"{model.name} tells only its most probable tokens; a draft needs whole distributions")
        if begin is None and model.vocab.bos_id is not None:
            begin = (model.vocab.bos_id,)
        if not begin:
            raise ValueError(f"{model.name} must be told how texts begin: pass begin=[...] with some of its token ids")
        self.model, self.length, self.begin = model, length, tuple(begin)
        self._follower = Follower(model)
        self._target: Vocab | None = None

    def check(self, target: LanguageModel) -> None:
        self._target = target.vocab
        self._marks, self._own_marks = marks(target.vocab), marks(self.model.vocab)
        self._counterparts = counterparts(target.vocab, self.model.vocab)
        self._spellings = sorted(set(target.vocab.token_bytes))

    def propose(self, rows: Sequence[Row]) -> Draft:
        read = [self._read(row.context) for row in rows]
        limit = self.model.context_length
        able = [
            index
            for index, (row, ids) in enumerate(zip(rows, read, strict=True))
            if row.room > 0 and ids and (limit is None or len(ids) + self.length <= limit)
        ]
        guesses = [Branches()] * len(rows)
        if able:
            said = self._said([rows[index].running.ticket for index in able], [read[index] for index in able])
            for index, ids in zip(able, said, strict=True):
                tokens = self._guess(rows[index], ids)
                guesses[index] = Branches.chosen(tokens, range(ROOT, len(tokens) - 1))
        return Draft(tuple(guesses))

    def _read(self, context: Sequence[int]) -> tuple[int, ...]:
        """The text in the draft's tokens; nothing if it has none for it."""
        assert self._target is not None
        ids, text = list(self.begin), b""
        try:
            for number, token in enumerate(context):
                if token not in self._marks:
                    text += self._target.token_bytes[token]
                elif number or token != self._target.bos_id:
                    ids += spell(self.model.vocab, text)
                    text = b""
                    ids += [self._counterparts[token]] if token in self._counterparts else []
            ids += spell(self.model.vocab, text)
        except ValueError:
            return ()
        limit = self.model.context_length
        if limit is None or len(ids) + self.length <= limit:
            return tuple(ids)
        # In strides: a place that moved on with every token would have the draft read everything again each time.
        begin, stride = len(self.begin), max(1, (limit - len(self.begin)) // 2)
        over = len(ids) + self.length - limit
        return (*self.begin, *ids[begin + -(-over // stride) * stride :])

    def _said(self, tickets: Sequence[int], contexts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The draft's likeliest tokens after each text, up to a mark, which is kept."""
        logits = self._follower.follow(tickets, contexts)
        state = self._follower.state
        assert state is not None
        said: list[list[int]] = [[] for _ in tickets]
        going = list(range(len(tickets)))
        while True:
            best = logits.argmax(-1).tolist()
            for row in going:
                said[row].append(best[row])
            going = [row for row in going if len(said[row]) < self.length and said[row][-1] not in self._own_marks]
            if not going:
                return said
            fed = [[said[row][-1] if row in going else ABSENT] for row in range(len(tickets))]
            logits = self.model.extend(state, torch.tensor(fed)).logits()[:, 0]

    def _guess(self, row: Row, ids: Sequence[int]) -> list[int]:
        """What the draft said in the target's tokens, as far as it is settled and there is room."""
        assert self._target is not None
        is_over = ids[-1] in self.model.vocab.eos_ids
        text = self.model.vocab.decode(ids[:-1] if ids[-1] in self._own_marks else ids)
        tokens = self._encoded(row.context, text, is_over=is_over)
        if is_over and tokens is not None and self._target.eos_ids and not row.running.request.ignore_eos:
            tokens.append(min(self._target.eos_ids))
        return (tokens or [])[: row.room]

    def _encoded(self, context: Sequence[int], text: bytes, *, is_over: bool) -> list[int] | None:
        """The text in the target's tokens, after those of the context; None if it has none for it."""
        assert self._target is not None
        before = self._before(context)
        whole = _complete(before + text)
        if len(whole) < len(before):
            return None
        try:
            for start in (len(before), 0):
                known = before[len(before) - start :]
                encoding = self._target.encode(_complete(known + text))
                if start in (*encoding.starts, *encoding.ends, 0):
                    break
        except ValueError:
            return None
        data = known + text
        tokens = []
        for token, begin in zip(encoding.ids, encoding.starts, strict=True):
            if begin >= start:
                if not is_over and self._is_open(data[begin:]):
                    break
                tokens.append(token)
        return tokens

    def _before(self, context: Sequence[int]) -> bytes:
        """The bytes of the last few tokens, from the beginning of a character."""
        assert self._target is not None
        text = b""
        for number, token in enumerate(reversed(context)):
            if token in self._marks or (number >= _WINDOW and text[0] & 0xC0 != 0x80):
                break
            text = self._target.token_bytes[token] + text
        return text

    def _is_open(self, text: bytes) -> bool:
        """Whether a longer token begins with this text."""
        place = bisect_right(self._spellings, text)
        return place < len(self._spellings) and self._spellings[place].startswith(text)


def _complete(text: bytes) -> bytes:
    """The text without a character at its end whose rest is missing."""
    for back in range(1, min(3, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 2 + (byte >= 0xE0) + (byte >= 0xF0) if byte >= 0xC0 else 1
        return text[:-back] if needed > back else text
    return text

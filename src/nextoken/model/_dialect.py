"""Finding out how a server's /v1/completions wants to be asked."""

from __future__ import annotations

from dataclasses import replace

from nextoken.errors import ModelError
from nextoken.model._http import Refused
from nextoken.model._interpreter import BATCH, Dialect, Ids, Interpreter, Reading

_AGREEMENT = 0.25
"""Nats by which a server's two ways of telling the same number may differ."""


def settle(interpreter: Interpreter, top: int | None, *, zero: bool) -> Dialect:
    """Find the dialect in which a server tells most, and set it.

    Tried in order: prompts as ids before text; `prompt_logprobs` (vLLM) before `echo` before no reading at all; names
    by id before names by text. A way of reading counts only if its numbers agree with those of plain generation.

    Args:
        top: k; without it the largest of 20, 10, 5 and 1 that is given.

    Raises:
        ModelError: the server gives no log-probabilities.
    """
    trouble: ModelError | None = None
    ways: list[tuple[bool, Reading]] = [
        (True, "prompt_logprobs"),
        (True, "echo"),
        (False, "echo"),
        (True, None),
        (False, None),
    ]
    probe = _probe(interpreter)
    for ids, reading in ways:
        if ids and interpreter.echo is not None:
            continue
        for named_by_id in (True, False):
            for k in [top] if top is not None else [20, 10, 5, 1]:
                interpreter.dialect = Dialect(ids, reading, named_by_id, zero, k)
                try:
                    if _works(interpreter, probe):
                        interpreter.dialect = replace(
                            interpreter.dialect,
                            batch=_batch(interpreter, probe),
                            adds_bos=None if ids else _adds_bos(interpreter, probe),
                        )
                        return interpreter.dialect
                    break
                except Refused as refusal:
                    if refusal.status in (401, 403, 404):
                        raise
                    trouble = refusal
                    if "logprob" not in str(refusal).lower():
                        break
                except ModelError as error:
                    if not isinstance(error, Refused) and trouble is None:
                        trouble = error
                    break
    raise ModelError(
        f"{interpreter.connection.root} gives no log-probabilities of {interpreter.model}"
        + (f": {trouble}" if trouble is not None else "")
    )


def _works(interpreter: Interpreter, probe: Ids) -> bool:
    reading = interpreter.dialect.reading is not None
    (found,) = interpreter.ask([probe], reading=reading, final=True, retries=0)
    if found[-1] is None or not found[-1].top:
        return False
    if not reading:
        return True
    told = found[-2]
    ((*_, plain),) = interpreter.ask([probe[:-1]], reading=False, final=True, retries=0)
    if told is None or plain is None or not told.top or not plain.top:
        return False
    return all(abs(a - b) < _AGREEMENT for (_, a), (_, b) in zip(told.top[:3], plain.top[:3], strict=False) if b > -20)


def _batch(interpreter: Interpreter, probe: Ids) -> int:
    try:
        interpreter.ask([probe, probe[:-1]], reading=False, final=True, retries=0)
    except ModelError:
        return 1
    return BATCH


def _adds_bos(interpreter: Interpreter, probe: Ids) -> bool | None:
    """Whether the server counts one token more than a text has."""
    own = probe[1:] if probe[0] == interpreter.vocab.bos_id else probe
    body = {"model": interpreter.model, "prompt": interpreter.text(own), "max_tokens": 1}
    usage = interpreter.connection.post("/v1/completions", body).get("usage") or {}
    counted = usage.get("prompt_tokens")
    return None if counted is None else {len(own): False, len(own) + 1: True}.get(int(counted))


def _probe(interpreter: Interpreter) -> Ids:
    """A few tokens that every server of the model should take."""
    vocab = interpreter.vocab
    begin = () if vocab.bos_id is None else (vocab.bos_id,)
    try:
        ids = vocab.encode("One, two and three").ids
    except (ValueError, Refused):
        ids = ()
    if len(ids) < 3:
        ids = tuple([i for i in range(vocab.size) if i not in vocab.specials][:3])
    return (*begin, *ids)

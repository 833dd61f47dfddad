"""In-context navigation: to get other answers, list in the prompt those that were already found.

p(v | x) = softmax_v(q(x) . k_v): tokens ranked below the first few owe their rank to output embeddings k_v that look
like those on top. Listing what was found moves the query q(x) elsewhere; forbidding it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nextoken.decode.generate import prompt_tokens
from nextoken.decode.request import Finish
from nextoken.decode.text_stream import TextStream
from nextoken.methods import method
from nextoken.model.base import LanguageModel, State


@dataclass(frozen=True)
class Listing:
    """A prompt that lists answers and leaves the next one open: opening, an item for each, and the next number.

    Args:
        opening: with {instruction}.
        item: with {number} and {answer}.
        open_item: with {number}.
        stops: what ends an answer.
        lists_unfinished: whether answers that met none of the stops are listed too. The released code lists them; where
            an answer is a name in quotation marks, they are what goes wrong.
    """

    opening: str = "{instruction}\n\nAnswer:\n"
    item: str = '{number}. "{answer}"\n'
    open_item: str = '{number}. "'
    stops: tuple[str, ...] = ('"',)
    lists_unfinished: bool = False

    def prompt(self, instruction: str, answers: Sequence[str] = ()) -> str:
        """The prompt that lists these answers."""
        items = [self.item.format(number=i, answer=answer) for i, answer in enumerate(answers, 1)]
        return "".join(
            [self.opening.format(instruction=instruction), *items, self.open_item.format(number=len(items) + 1)]
        )


@dataclass(frozen=True)
class Answer:
    """One answer and how its first token was found.

    Args:
        text: without the stop.
        tokens: the first token, which was forced, and the greedy ones after it.
        finish: `stop` where it met its end, else what cut it off.
        run: in which run, from 0.
        rank, log_prob: of the first token where it was taken; the most probable has rank 0.
        clean_rank, clean_log_prob: of the same under the prompt that lists nothing.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    run: int
    rank: int
    log_prob: float
    clean_rank: int
    clean_log_prob: float


@dataclass(frozen=True)
class Shift:
    """What a listing does to the first tokens explored before it: their mean under it less that under the clean prompt.

    Args:
        run: the run whose prompt it is.
        log_prob: in nats; below 0 where the listing keeps the model from saying the same again, above where it copies.
            Of log-probabilities, since logits are known up to a constant per prompt only.
        rank: in places; above 0 where they fell.
    """

    run: int
    log_prob: float
    rank: float


@dataclass(frozen=True)
class Navigation:
    """Answers in the order found, and the effect of each run's listing on what came before it."""

    answers: tuple[Answer, ...]
    shifts: tuple[Shift, ...] = field(default=())

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(answer.text for answer in self.answers)

    @property
    def mean_shift(self) -> tuple[float, float] | None:
        """Mean shift of log-probability (nats) and of rank over the runs that listed something, None without any."""
        if not self.shifts:
            return None
        count = len(self.shifts)
        return sum(s.log_prob for s in self.shifts) / count, sum(s.rank for s in self.shifts) / count


@method(
    name="In-context navigation",
    arxiv="2410.02284",
    access="gray",
    summary="first tokens from prompts that list the answers found so far, completed from the plain prompt",
)
@torch.no_grad()
def navigate(
    model: LanguageModel,
    instruction: str,
    *,
    runs: int = 10,
    k: int = 10,
    complete: Literal["clean", "navigated"] = "clean",
    listing: Listing | None = None,
    max_tokens: int = 64,
    memory: int | None = None,
) -> Navigation:
    """In each of `runs` runs the k best first tokens not taken before, each decoded greedily to an answer.

    With E the answers so far and F the first tokens so far, a run ranks the vocabulary by p(. | listing of E), takes
    from the top k tokens whose bytes no member of F has, and completes each from the prompt that lists nothing
    (`clean`, as released) or from that of E (`navigated`). The first run, with E empty, is plain branching over the k
    best tokens. F never repeats, and k runs >= V visits every token that stands for some text; impossible ones are not
    taken.

    Args:
        model: any; the effect is that of models that follow instructions. Others may copy what is listed: see `shifts`.
        instruction: what the answers are asked by.
        runs, k: as above.
        complete: from which prompt.
        listing: the form of the prompt.
        max_tokens: most tokens of an answer, its first included.
        memory: list the last so many answers only, for long answers and short contexts.

    Raises:
        ValueError: an argument is out of range, or a listing does not fit the context.

    Source: Peng et al., arXiv:2410.02284, and its released code. Tokens count as the same if their bytes are equal; the
    code compares decoded strings, which takes all incomplete characters for one. Empty answers are not listed.
    """
    if complete not in ("clean", "navigated"):
        raise ValueError(f"complete must be 'clean' or 'navigated', got {complete!r}")
    return explore(
        model,
        instruction,
        runs=runs,
        k=k,
        listing=listing or Listing(),
        max_tokens=max_tokens,
        memory=memory,
        clean=complete == "clean",
    )


@torch.no_grad()
def ban_only(
    model: LanguageModel,
    instruction: str,
    *,
    runs: int = 10,
    k: int = 10,
    listing: Listing | None = None,
    max_tokens: int = 64,
) -> Navigation:
    """The control of `navigate`: the same runs and exclusions, but nothing is ever listed in the prompt.

    Since no prompt changes, it is plain branching over the runs * k best first tokens. Arguments as of `navigate`.
    """
    form = listing or Listing()
    return explore(model, instruction, runs=runs, k=k, listing=form, max_tokens=max_tokens, memory=0)


class _Point:
    """The end of a prompt: its state, which is forked and never moved, and the ranking of what may follow."""

    def __init__(self, model: LanguageModel, prompt: str) -> None:
        self.ids = prompt_tokens(model, prompt)
        limit = model.context_length
        if limit is not None and len(self.ids) >= limit:
            raise ValueError(
                f"a prompt of {len(self.ids)} tokens leaves no room in the context of {model.name}, {limit}: list "
                "fewer answers (memory=...) or shorten the instruction"
            )
        self.state: State = model.start()
        self.log_probs: Tensor = model.extend(self.state, [self.ids])[0, -1].log_probs()[0, 0].cpu()
        self.order: list[int] = self.log_probs.argsort(descending=True, stable=True).tolist()
        self.rank = torch.empty(len(self.order), dtype=torch.long)
        self.rank[self.order] = torch.arange(len(self.order))


def explore(
    model: LanguageModel,
    instruction: str,
    *,
    runs: int,
    k: int,
    listing: Listing,
    max_tokens: int,
    memory: int | None,
    clean: bool = True,
    within: int | None = None,
) -> Navigation:
    """`navigate`, with a memory of 0 for its control and first tokens among the `within` best only."""
    if min(runs, k, max_tokens) < 1:
        raise ValueError(f"runs, k and max_tokens must be at least 1, got {runs}, {k} and {max_tokens}")
    if memory is not None and memory < 0:
        raise ValueError(f"memory must be at least 0, or None to list all answers, got {memory}")
    plain = _Point(model, listing.prompt(instruction))
    spelled = model.vocab.token_bytes
    seen: set[bytes] = set()
    answers: list[Answer] = []
    shifts: list[Shift] = []
    for run in range(runs):
        told = [a.text for a in answers if a.text and (a.finish == "stop" or listing.lists_unfinished)]
        told = told if memory is None else told[max(0, len(told) - memory) :]
        point = _Point(model, listing.prompt(instruction, told)) if told else plain
        if told:
            shifts.append(_shift(run, [a.tokens[0] for a in answers], point, plain))
        firsts: list[int] = []
        for token in point.order[:within]:
            if len(firsts) == k or point.log_probs[token] == float("-inf"):
                break
            # Tokens that stand for no text, an end token for one, are no beginning of an answer.
            if spelled[token] and spelled[token] not in seen:
                seen.add(spelled[token])
                firsts.append(token)
        if not firsts:
            break
        for tokens, text, finish in _complete(model, plain if clean else point, firsts, listing.stops, max_tokens):
            first = tokens[0]
            ranks = int(point.rank[first]), int(plain.rank[first])
            said = float(point.log_probs[first]), float(plain.log_probs[first])
            answers.append(Answer(text, tokens, finish, run, ranks[0], said[0], ranks[1], said[1]))
    return Navigation(tuple(answers), tuple(shifts))


def _shift(run: int, firsts: Sequence[int], point: _Point, plain: _Point) -> Shift:
    now, before = point.log_probs[firsts], plain.log_probs[firsts]
    # A token impossible under both prompts has not moved.
    moved = torch.where(now == before, 0.0, now - before).mean()
    return Shift(run, float(moved), float((point.rank[firsts] - plain.rank[firsts]).double().mean()))


def _complete(
    model: LanguageModel, point: _Point, firsts: Sequence[int], stops: Sequence[str], max_tokens: int
) -> list[tuple[tuple[int, ...], str, Finish]]:
    """Tokens, text and end of the greedy continuation of each first token; ids are appended, never spelt anew."""
    limit, ends, spelled = model.context_length, model.vocab.eos_ids, model.vocab.token_bytes
    rows = [[first] for first in firsts]
    streams = [TextStream([stop.encode() for stop in stops]) for _ in firsts]
    finishes: list[Finish] = ["length"] * len(firsts)
    active, places, state = list(range(len(firsts))), [0] * len(firsts), point.state
    while True:
        going: list[int] = []
        for place, i in enumerate(active):
            streams[i].push(spelled[rows[i][-1]])
            if rows[i][-1] in ends:
                finishes[i] = "eos"
            elif streams[i].stopped:
                finishes[i] = "stop"
            elif limit is not None and len(point.ids) + len(rows[i]) > limit:
                finishes[i] = "context"
            elif len(rows[i]) < max_tokens:
                going.append(place)
        active, places = [active[place] for place in going], [places[place] for place in going]
        if not active:
            break
        state = state.fork(places)
        places = list(range(len(active)))
        logits = model.extend(state, torch.tensor([[rows[i][-1]] for i in active])).logits()[:, -1]
        for i, token in zip(active, logits.argmax(-1).tolist(), strict=True):
            rows[i].append(token)
    for stream in streams:
        stream.finish()
    return [(tuple(row), stream.text, end) for row, stream, end in zip(rows, streams, finishes, strict=True)]

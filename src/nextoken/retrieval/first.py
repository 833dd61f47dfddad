"""FIRST: a list ranked from one token's distribution, that of the first identifier a ranking would begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import torch
from torch import Tensor

from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.loading import load

WINDOW, STRIDE = 20, 10
_OPENING = "["


@dataclass(frozen=True)
class Reranked:
    """An order of passages, best first, and what it took.

    Args:
        order: numbers of the passages as they were given.
        scores: of the passages in that order: logits of their identifiers in the last window each stood in.
        passes: prompts read.
        tokens: fed to the model, prompts and what was generated.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...]
    passes: int
    tokens: int


@method(
    name="FIRST",
    arxiv="2406.15657",
    access="gray",
    summary="listwise reranking from the logits of one token: the first identifier of the ranking",
)
@torch.no_grad()
def rerank(
    model: LanguageModel | str | Path,
    query: str,
    passages: Sequence[str],
    *,
    window: int = WINDOW,
    stride: int = STRIDE,
    max_tokens: int = 100,
) -> Reranked:
    """Passages by descending logit s_i of identifier A, B, ... where "Ranking: [" leaves off; one pass per window.

    A list longer than a window is sorted window by window from its end, each `stride` before the last, so that what is
    good rises: ceil((n - window) / stride) + 1 passes, after which the first window - stride places are those of one
    sort of the whole, if the model's order does not depend on what else is in the window. Ties keep the order given.

    Args:
        model: any that gives whole distributions, or what `nextoken.load` takes; one trained to rank
            (`fit_first`) ranks far better.
        passages: at least one; each is cut after its first `max_tokens` tokens.
        window: passages in a prompt, at most 26.
        stride: by how many places a window lies before the last, below or equal to `window`.

    Raises:
        ValueError: no passages, a window or stride out of range, a prompt beyond the context, or a vocabulary in which
            some letter is no token.

    Source: Gangi Reddy et al., arXiv:2406.15657, section 3; arXiv:2411.05508.
    """
    model = load(model)
    _check(passages, window, stride)
    letters = identifiers(model, min(window, len(passages)))
    order = list(range(len(passages)))
    values = [0.0] * len(passages)
    passes = tokens = 0
    for begin in windows(len(passages), window=window, stride=stride):
        inside = order[begin : begin + window]
        prompt = ranking_prompt(model, query, [passages[number] for number in inside], max_tokens=max_tokens)
        found = letter_scores(model.predict([prompt])[:, -1].logits()[0, 0], letters[: len(inside)])
        sorted_ = torch.argsort(found, descending=True, stable=True).tolist()
        order[begin : begin + window] = [inside[place] for place in sorted_]
        for place in sorted_:
            values[inside[place]] = float(found[place])
        passes, tokens = passes + 1, tokens + len(prompt)
    return Reranked(tuple(order), tuple(values[number] for number in order), passes, tokens)


@torch.no_grad()
def rerank_by_generation(
    model: LanguageModel | str | Path,
    query: str,
    passages: Sequence[str],
    *,
    window: int = WINDOW,
    stride: int = STRIDE,
    max_tokens: int = 100,
) -> Reranked:
    """Passages as the model lists them, `[B] > [A] > ...`, written out greedily: what `rerank` saves.

    At each identifier the best of those not yet listed is taken, so the outcome is always an order. Arguments and
    errors as of `rerank`.
    """
    model = load(model)
    _check(passages, window, stride)
    letters = identifiers(model, min(window, len(passages)))
    joint = model.vocab.encode("] > [").ids
    order = list(range(len(passages)))
    values = [0.0] * len(passages)
    passes = tokens = 0
    for begin in windows(len(passages), window=window, stride=stride):
        inside = order[begin : begin + window]
        prompt = ranking_prompt(model, query, [passages[number] for number in inside], max_tokens=max_tokens)
        state = model.start()
        logits = model.extend(state, [prompt])[:, -1].logits()[0, 0]
        tokens += len(prompt)
        listed: list[int] = []
        while len(listed) < len(inside):
            found = letter_scores(logits, letters[: len(inside)])
            found[listed] = float("-inf")
            listed.append(int(found.argmax()))
            values[inside[listed[-1]]] = float(found[listed[-1]])
            if len(listed) < len(inside):
                following = [int(letters[listed[-1]][0]), *joint]
                logits = model.extend(state, [following])[:, -1].logits()[0, 0]
                tokens += len(following)
        order[begin : begin + window] = [inside[place] for place in listed]
        passes += 1
    return Reranked(tuple(order), tuple(values[number] for number in order), passes, tokens)


def windows(count: int, *, window: int, stride: int) -> list[int]:
    """Where the windows begin, from the end of the list to its start: ceil((count - window) / stride) + 1 of them."""
    begins, begin = [], max(0, count - window)
    while True:
        begins.append(begin)
        if begin == 0:
            return begins
        begin = max(0, begin - stride)


def identifiers(model: LanguageModel, count: int) -> list[Tensor]:
    """For A, B, ... the ids of the tokens that spell exactly that letter.

    Raises:
        ValueError: some letter is no token of its own, or more than 26 are wanted.
    """
    if count > len(ascii_uppercase):
        raise ValueError(f"{count} passages need more than the 26 letters: give a window of at most 26")
    found = []
    for letter in ascii_uppercase[:count]:
        ids = [token for token, spelled in enumerate(model.vocab.token_bytes) if spelled == letter.encode()]
        if not ids:
            raise ValueError(f"the vocabulary of {model.name} has no token {letter!r}, which is to name a passage")
        found.append(torch.tensor(ids))
    return found


def letter_scores(logits: Tensor, letters: Sequence[Tensor]) -> Tensor:
    """s [m] from logits [V]: of each letter the greatest among its tokens."""
    return torch.stack([logits[ids.to(logits.device)].amax() for ids in letters]).float()


def ranking_prompt(model: LanguageModel, query: str, passages: Sequence[str], *, max_tokens: int = 100) -> list[int]:
    """The ids of the list, the query, and the beginning of the answer up to its first bracket.

    As a chat where the model has a template, else as plain text.

    Raises:
        ValueError: it does not fit the context.
    """
    vocab = model.vocab
    cut = [_cut(passage, model, max_tokens) for passage in passages]
    listed = "\n".join(f"[{ascii_uppercase[place]}] {passage}" for place, passage in enumerate(cut))
    asked = (
        f"Here are {len(passages)} passages, each with a letter in brackets.\n{listed}\n"
        f"Query: {query}\nRank them by how relevant they are to the query, the most relevant first, as in [B] > [A]."
    )
    try:
        begun = vocab.chat([{"role": "user", "content": asked}])
    except ValueError:  # no chat template
        start = () if vocab.bos_id is None else (vocab.bos_id,)
        begun = (*start, *vocab.encode(asked + "\nRanking: ").ids)
    prompt = [*begun, *vocab.encode(_OPENING).ids]
    if model.context_length is not None and len(prompt) > model.context_length:
        raise ValueError(
            f"{len(passages)} passages make a prompt of {len(prompt)} tokens, and the context of {model.name} holds "
            f"{model.context_length}: give a smaller window or lower max_tokens, now {max_tokens}"
        )
    return prompt


def _cut(text: str, model: LanguageModel, most: int) -> str:
    """One line of at most so many tokens."""
    line = " ".join(text.split())
    ends = model.vocab.encode(line).ends
    return line if len(ends) <= most else line.encode()[: ends[most - 1]].decode(errors="ignore")


def _check(passages: Sequence[str], window: int, stride: int) -> None:
    if not passages:
        raise ValueError("there is no passage to rank")
    if not 2 <= window <= len(ascii_uppercase) or not 1 <= stride <= window:
        raise ValueError(f"window must be from 2 to 26 and stride from 1 to window, got {window} and {stride}")

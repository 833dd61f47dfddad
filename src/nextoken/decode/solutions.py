"""Solutions of one problem that begin differently, by in-context navigation, and the vote on their results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nextoken.decode.generate import prompt_tokens
from nextoken.decode.loop import Loop
from nextoken.decode.navigation import Listing, Navigation, explore
from nextoken.decode.request import Request
from nextoken.decode.scaling import Greedy
from nextoken.methods import method
from nextoken.model.base import LanguageModel


def number(text: str) -> str | None:
    """The first number in a text, less thousands separators."""
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[0].replace(",", "") if found else None


def letter(text: str) -> str | None:
    """The first of the letters A to E that stands alone in a text."""
    found = re.search(r"\b[A-E]\b", text)
    return found[0] if found else None


WAYS = Listing(
    opening="{instruction}\n\n",
    item="### Way {number}:\n* **Step 1:**\n{answer}\n\n",
    open_item="### Way {number}:\n* **Step 1:**\n",
    stops=("#",),
    lists_unfinished=True,
)
"""The listing of solutions of a problem."""


@dataclass(frozen=True)
class Ways:
    """How a problem is solved several times; the defaults are those of the paper's runs on GSM8K.

    Args:
        paths: solutions, each with a first token of its own.
        within: how far down the ranking a first token may be.
        max_tokens: most tokens of a solution.
        request: put after the question.
        suffix: put after a solution, to ask for its result.
        result_tokens: decoded after the suffix.
        extract: the result from what was decoded, None where there is none.
        listing: the form of the prompt.
        memory: list the last so many solutions only; None lists all.
    """

    paths: int = 4
    within: int = 100
    max_tokens: int = 256
    request: str = "\nShow different ways to solve this problem step by step."
    suffix: str = "\nTherefore, the final answer is "
    result_tokens: int = 8
    extract: Callable[[str], str | None] = number
    listing: Listing = WAYS
    memory: int | None = None


@dataclass(frozen=True)
class Vote:
    """Solutions, the result of each (None where none was found), and the most frequent one, of equals the first."""

    navigation: Navigation
    results: tuple[str | None, ...]
    result: str | None


@method(
    name="In-context navigation of solutions",
    arxiv="2410.02284",
    access="gray",
    summary="solutions that begin with tokens ranked after a list of the solutions so far, and a vote on their results",
)
@torch.no_grad()
def navigate_reasoning(model: LanguageModel, question: str, *, ways: Ways | None = None) -> Vote:
    """result = argmax_r #{i : extract(solution_i) = r} over solutions whose first tokens come from `navigate`, k = 1.

    Each solution is decoded greedily from the plain prompt and its own first token; then the suffix is appended and the
    result decoded greedily.

    Args:
        model: any that gives whole distributions; the method is made for those that follow instructions.
        question: the problem.
        ways: the settings.

    Raises:
        ValueError: a setting is out of range, or a listing does not fit the context.

    Source: Peng et al., arXiv:2410.02284, and its released code. The wording of request and suffix is ours.
    """
    settings = ways or Ways()
    return _vote(model, question, settings, settings.memory)


@torch.no_grad()
def branch_reasoning(model: LanguageModel, question: str, *, ways: Ways | None = None) -> Vote:
    """The control of `navigate_reasoning`: the same from the best first tokens of the plain prompt, nothing listed."""
    return _vote(model, question, ways or Ways(), memory=0)


def _vote(model: LanguageModel, question: str, ways: Ways, memory: int | None) -> Vote:
    instruction = question + ways.request
    found = explore(
        model,
        instruction,
        runs=ways.paths,
        k=1,
        listing=ways.listing,
        max_tokens=ways.max_tokens,
        memory=memory,
        within=ways.within,
    )
    begin = prompt_tokens(model, ways.listing.prompt(instruction))
    ask = model.vocab.encode(ways.suffix).ids
    loop, said, asked = Loop(model), [""] * len(found.answers), {}
    for i, answer in enumerate(found.answers):
        # The token that holds the stop, or ends the text, is no part of the solution.
        kept = answer.tokens[:-1] if answer.finish in ("stop", "eos") else answer.tokens
        prompt = (*begin, *kept, *ask)
        # A solution that fills the context leaves no room to ask for its result: it has none.
        if model.context_length is None or len(prompt) <= model.context_length:
            asked[loop.submit(Request(prompt, Greedy(), ways.result_tokens))] = i
    for piece in loop.run():
        said[asked[piece.ticket]] += piece.text
    results = tuple(ways.extract(text) for text in said)
    counts = Counter(result for result in results if result is not None)
    return Vote(found, results, counts.most_common(1)[0][0] if counts else None)

"""logged(): texts sampled from a model and scored, to learn values from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from nextoken.decode.generate import Prompt, generate
from nextoken.decode.generation import Generation
from nextoken.decode.transform import Transform
from nextoken.model.base import LanguageModel
from nextoken.model.sarsa import LoggedText

Score = Callable[[Sequence[str]], Sequence[float]]
"""How undesired each of these texts is, prompt and continuation, from 0 to 1."""


def logged(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    score: Score,
    *,
    n: int = 25,
    max_tokens: int = 20,
    threshold: float = 0.5,
    keep: Literal["all", "most"] = "all",
    transform: Transform | str | None = None,
    seed: int = 0,
    max_rows: int = 64,
) -> list[LoggedText]:
    """n continuations of each prompt, with reward -1 where score(text) >= threshold and else 0.

    Args:
        model, transform, max_tokens, seed, max_rows: as of `nextoken.generate`; by default plain sampling.
        prompts: at least one.
        score: a function of the user's; called once, with all texts.
        threshold: from which score on a text is undesired.
        n: continuations of each prompt.
        keep: all of them, or of each prompt the `most` and the least undesired one, as in rectification's released
            runs. The latter shifts how many texts are undesired, so that values learnt from them are no longer
            calibrated.

    Raises:
        ValueError: the scores are not one per text, or not from 0 to 1; and as of `nextoken.generate`.

    Source: Cao et al., arXiv:2302.14003, and its released code. That also drops, at random, half of the prompts without
    an undesired text: leave out what you like of the list.
    """
    if not prompts or keep not in ("all", "most") or (keep == "most" and n < 2):
        raise ValueError(f"give a prompt, keep='all', or keep='most' with n of at least 2; got {keep!r} and n = {n}")
    made = generate(model, list(prompts), transform=transform, max_tokens=max_tokens, n=n, seed=seed, max_rows=max_rows)
    assert isinstance(made, list)
    texts = [(*one.request.prompt, *one.tokens) for one in made]
    scores = [float(x) for x in score([model.vocab.decode_text(text) for text in texts])]
    if len(scores) != len(texts) or not all(0 <= x <= 1 for x in scores):
        raise ValueError(f"score must give a number from 0 to 1 for each of {len(texts)} texts, got {scores[:5]} ...")
    chosen = range(len(texts)) if keep == "all" else _extremes(scores, n)
    return [_text(made[i], -1.0 if scores[i] >= threshold else 0.0) for i in chosen]


def _extremes(scores: Sequence[float], n: int) -> list[int]:
    """Of each n, the index of the highest score and that of the lowest."""
    chosen = []
    for begin in range(0, len(scores), n):
        group = range(begin, begin + n)
        # Of equal scores the first and the last, so that they are two texts.
        chosen += [max(group, key=scores.__getitem__), min(reversed(group), key=scores.__getitem__)]
    return chosen


def _text(made: Generation, reward: float) -> LoggedText:
    prompt = made.request.prompt
    return LoggedText((*prompt, *made.tokens), len(prompt), reward)

"""P(True): a model asked whether an answer is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nextoken.methods import method
from nextoken.scores.rows import Rows

if TYPE_CHECKING:
    from nextoken.model.base import LanguageModel

TEMPLATE = (
    "Question: {question}\nProposed Answer: {answer}\nIs the proposed answer:\n (A) True\n (B) False\n"
    "The proposed answer is:"
)
"""The question of the paper."""
BRAINSTORM = (
    "Question: {question}\nHere are some brainstormed ideas: {ideas}\nPossible Answer: {answer}\n"
    "Is the possible answer:\n (A) True\n (B) False\nThe possible answer is:"
)
"""The question of the paper where other answers are shown too."""


@method(
    name="P(True)",
    arxiv="2207.05221",
    access="gray",
    summary="the probability with which a model calls an answer true rather than false",
)
def p_true(
    model: LanguageModel | str | Path,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    ideas: Sequence[Sequence[str]] | None = None,
    template: str | None = None,
    true: str = " (A)",
    false: str = " (B)",
) -> np.ndarray:
    """p(true) / (p(true) + p(false)) [N], of the two verdicts after the question; high where the model is sure of it.

    Verdicts may have any number of tokens: p is the product of theirs. NaN where both are impossible. lm-polygraph's
    P(True) is -log p(true) alone, which a model that answers in other words calls uncertain.

    Args:
        model: that judges, or what `nextoken.load` takes.
        questions: one per answer.
        answers: that are judged.
        ideas: other answers to each question, which the model is shown first.
        template: with {question} and {answer} (and {ideas}); default the paper's.
        true: the verdict for a right answer.
        false: the verdict for a wrong one.

    Raises:
        ValueError: questions, answers and ideas are not equally many, or a verdict has no text.

    Source: Language Models (Mostly) Know What They Know, arXiv:2207.05221, section 3 and appendix A.
    """
    from nextoken.model.loading import load
    from nextoken.signature.reading import read

    if len(questions) != len(answers) or (ideas is not None and len(ideas) != len(answers)):
        raise ValueError(
            f"{len(questions)} questions, {len(answers)} answers"
            + ("" if ideas is None else f" and {len(ideas)} lists of ideas")
            + ": give one of each per answer"
        )
    if not true or not false:
        raise ValueError("the verdicts must have text: it is their probability that is compared")
    form = template or (TEMPLATE if ideas is None else BRAINSTORM)
    shown = ["\n".join(some) for some in ideas] if ideas is not None else [""] * len(answers)
    asked = [
        form.format(question=question, answer=answer, ideas=idea)
        for question, answer, idea in zip(questions, answers, shown, strict=True)
    ]
    verdicts = [verdict for _ in asked for verdict in (true, false)]
    prompts = [prompt for prompt in asked for _ in range(2)]
    rows = Rows(read(load(model), verdicts, prompts=prompts, top=0, progress=False))
    logprob = np.where(rows.counts > 0, rows.sum(rows["logprob"]), np.nan).reshape(-1, 2)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.exp(logprob[:, 0] - np.logaddexp(logprob[:, 0], logprob[:, 1]))
    return found

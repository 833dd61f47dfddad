"""Verdicts computed from signatures: one reading of a text, many scores."""

from __future__ import annotations

from nextoken.scores.rows import Rows
from nextoken.scores.samples import Samples
from nextoken.scores.score import Given, MissingInput, Score, all_scores, find, register, score, table

__all__ = ["Given", "MissingInput", "Rows", "Samples", "Score", "all_scores", "find", "register", "score", "table"]

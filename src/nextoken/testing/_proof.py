"""Proof: one statement, and how well it held."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """One statement about a model, and how well it held.

    `error` is the largest difference seen, in nats unless the statement says otherwise; `skipped` says why a statement
    was not tried, else None.
    """

    name: str
    statement: str
    error: float = 0.0
    tolerance: float = 0.0
    skipped: str | None = None

    @property
    def holds(self) -> bool:
        return self.skipped is not None or self.error <= self.tolerance

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"-  {self.name}: not tried, {self.skipped}"
        return f"{'ok' if self.holds else 'NO'} {self.name}: {self.statement} (off by {self.error:.1e})"

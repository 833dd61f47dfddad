"""Score: one number per text, or per token, computed from a signature without another forward pass.

    @register("min_k", columns=("logprob",), high="member", summary="mean of the k smallest log-probabilities")
    def min_k(given: Given, *, share: float = 0.2) -> np.ndarray: ...

The decorator makes the function known to `nextoken.score`, `nextoken.scores.table`, the command line and the catalogue:
a score is one function in one file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from nextoken.methods import Access, is_registered, method
from nextoken.scores.rows import Rows
from nextoken.scores.samples import Samples
from nextoken.signature.signature import Signature

Per = Literal["text", "token"]
High = Literal["uncertain", "certain", "machine", "human", "member", "surprising", "compressible"]
"""What a high value speaks for."""
REQUIRED = inspect.Parameter.empty
"""In place of a default: the option has none, and the score is not computed without it."""


class MissingInput(ValueError):
    """A score needs something that was not given."""


@dataclass(frozen=True)
class Given:
    """All that a score may look at.

    Args:
        signature: the texts that are judged, under the model that judges.
        reference: the same texts under another model.
        samples: other texts that the model gave to the same prompts.
    """

    signature: Signature
    reference: Signature | None = None
    samples: Samples | None = None

    def __post_init__(self) -> None:
        if self.reference is not None and self.reference.n_texts != self.signature.n_texts:
            raise ValueError(
                f"the reference has {self.reference.n_texts} texts and the signature {self.signature.n_texts}: "
                "read the same texts with both models"
            )
        if self.samples is not None and len(self.samples.counts) != self.signature.n_texts:
            raise ValueError(
                f"samples are given for {len(self.samples.counts)} texts and the signature has "
                f"{self.signature.n_texts}: give one group of samples per text"
            )

    @property
    def rows(self) -> Rows:
        return Rows(self.signature)


Function = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Score:
    """A named score: what it needs, which way it points, and the function that computes it.

    Args:
        name: by which it is asked for.
        columns: of the signature.
        needs: fields of `Given` beside the signature.
        reference_columns: of the reference's signature.
        per: whether it gives one number per text [T] or per token [N].
        high: what a high value speaks for.
        summary: one line.
        arxiv: of the paper, if it is one paper's.
        function: (given, *, options) -> numbers.
    """

    name: str
    function: Function = field(repr=False)
    columns: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    reference_columns: tuple[str, ...] = ()
    per: Per = "text"
    high: High = "uncertain"
    summary: str = ""
    arxiv: str | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """Its options and their defaults; `REQUIRED` for one that has none."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def missing(self, given: Given, options: Mapping[str, Any] | None = None) -> list[str]:
        """What of its needs is not given, in words; options without a default are needs too."""
        lacks = [f"column {name!r}" for name in self.columns if name not in given.signature.columns]
        lacks += [f"{name}=..." for name in self.needs if getattr(given, name) is None]
        if given.reference is not None:
            lacks += [
                f"column {name!r} of the reference"
                for name in self.reference_columns
                if name not in given.reference.columns
            ]
        required = [name for name, default in self.options.items() if default is REQUIRED]
        lacks += [f"option {name}=..." for name in required if name not in (options or {})]
        return lacks

    def __call__(self, given: Given, **options: Any) -> np.ndarray:
        """Numbers [T], or [N] per token, in float64; NaN where a text has no token to judge.

        Raises:
            MissingInput: something it needs is not given; the message names it.
            TypeError: it has no such option.
            ValueError: an option is out of range, or the function gave other than one number per text or token.
        """
        lacks = self.missing(given, options)
        if lacks:
            raise MissingInput(f"score {self.name!r} needs {', '.join(lacks)}")
        unknown = sorted({*options} - {*self.options})
        if unknown:
            known = ", ".join(self.options) or "none"
            raise TypeError(f"score {self.name!r} has no option {', '.join(unknown)}; its options: {known}")
        found = np.asarray(self.function(given, **options), dtype=np.float64)
        expected = given.signature.n_texts if self.per == "text" else len(given.signature)
        if found.shape != (expected,):
            raise ValueError(f"score {self.name!r} gave {found.shape}, not one number per {self.per}: ({expected},)")
        return found


_SCORES: dict[str, Score] = {}


def register(
    name: str,
    *,
    columns: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
    reference_columns: tuple[str, ...] = (),
    per: Per = "text",
    high: High,
    summary: str,
    arxiv: str | None = None,
    access: Access = "gray",
) -> Callable[[Function], Function]:
    """Register the decorated function as a score; it is returned unchanged. Those of the library are methods, too.

    Raises:
        ValueError: another function is registered under the name.
    """

    def entered(function: Function) -> Function:
        entry = Score(name, function, columns, needs, reference_columns, per, high, summary, arxiv)
        known = _SCORES.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise ValueError(f"score {name!r} is registered in {known.function.__module__} already")
        if function.__module__.startswith("nextoken."):
            method(name=name, access=access, summary=summary, arxiv=arxiv)(function)
        elif is_registered(name):
            raise ValueError(f"{name!r} is registered in the library already: choose another name")
        _SCORES[name] = entry
        return function

    return entered


def all_scores() -> dict[str, Score]:
    """Every registered score by name, in alphabetical order."""
    package = importlib.import_module("nextoken.scores")
    for module in pkgutil.iter_modules(package.__path__, prefix="nextoken.scores."):
        importlib.import_module(module.name)
    return dict(sorted(_SCORES.items()))


def find(name: str) -> Score:
    """The score of this name.

    Raises:
        ValueError: there is none; the message names near ones.
    """
    if name in _SCORES:
        return _SCORES[name]
    known = all_scores()
    if name in known:
        return known[name]
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3)
    raise ValueError(
        f"no score {name!r}; {'did you mean ' + ', '.join(near) if near else 'there are ' + ', '.join(known)}"
    )


def score(
    signature: Signature,
    which: str | Score,
    *,
    reference: Signature | None = None,
    samples: Samples | None = None,
    **options: Any,
) -> np.ndarray:
    """One score of every text of a signature: numbers [T], or [N] for a score per token.

    Args:
        signature: from `nextoken.read`, or of generated texts.
        which: a name of `nextoken.scores.all_scores()`, or a score of your own.
        reference: the same texts under another model, for scores that compare two.
        samples: other answers to the same prompts, for scores that compare answers.
        options: of the score itself; its docstring tells them.

    Raises:
        MissingInput: the score needs a column or an input that is not there.
        ValueError: there is no such score, or an option is out of range.
        TypeError: the score has no such option.
    """
    chosen = which if isinstance(which, Score) else find(which)
    return chosen(Given(signature, reference, samples), **options)


def table(
    signature: Signature,
    which: list[str] | Literal["all"] = "all",
    *,
    reference: Signature | None = None,
    samples: Samples | None = None,
) -> dict[str, np.ndarray]:
    """Many scores per text [T] at their default options, from one signature and no forward pass.

    Args:
        which: names, or "all": every score per text whose needs are given.

    Raises:
        MissingInput: a score asked for by name lacks an input.
        ValueError: a name is unknown, or is that of a score per token.
    """
    given = Given(signature, reference, samples)
    if which == "all":
        chosen = [entry for entry in all_scores().values() if entry.per == "text" and not entry.missing(given)]
    else:
        chosen = [find(name) for name in which]
        wrong = [entry.name for entry in chosen if entry.per == "token"]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} tells numbers per token: ask for it with nextoken.score")
    return {entry.name: entry(given) for entry in chosen}

"""What `--regex`, `--json-schema` and `--grammar` ask of an output: one constraint, or none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nextoken.errors import InputError

if TYPE_CHECKING:
    from nextoken.constrain.constraint import Constraint


def constraint(regex: str | None, schema: Path | None, grammar: Path | None) -> Constraint | None:
    """The constraint that one of the options names.

    Raises:
        InputError: more than one is given, a file cannot be read, or what it holds is malformed.
    """
    given = {"--regex": regex, "--json-schema": schema, "--grammar": grammar}
    named = [option for option, value in given.items() if value is not None]
    if not named:
        return None
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} were given: an output takes one of them")
    from nextoken.constrain.grammar import JsonSchema, Lark
    from nextoken.constrain.regex import Regex

    try:
        if regex is not None:
            return Regex(regex)
        return JsonSchema(_text(schema)) if schema is not None else Lark(_text(grammar))
    except ValueError as error:
        raise InputError(f"{named[0]} {given[named[0]]}: {error}") from None


def _text(path: Path | None) -> str:
    assert path is not None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None

"""Transforms from text: `temperature(0.8) | top_p(0.95)`, parsed, never evaluated."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from nextoken.decode import adaptive, penalty, scaling, truncation
from nextoken.decode.transform import Chain, Transform


def _named() -> dict[str, type[Transform]]:
    classes: dict[str, type[Transform]] = {}
    for module in (scaling, penalty, truncation, adaptive):
        for thing in vars(module).values():
            if isinstance(thing, type) and issubclass(thing, Transform) and thing.__module__ == module.__name__:
                classes[snake(thing.__name__)] = thing
    return classes


def snake(name: str) -> str:
    """`TopNSigma` -> `top_n_sigma`, `DRY` -> `dry`, `Mirostat2` -> `mirostat_2`."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*|[a-z]+|\d+", name)
    return "_".join(part.lower() for part in parts)


TRANSFORMS: Mapping[str, type[Transform]] = _named()
"""Every transform by the name it has in text."""


def transform(text: str) -> Transform:
    """The transform that `text` describes.

    Transforms by name, in the order applied, joined by `|`; arguments are literals, by position or by name:
    `repetition_penalty(1.1) | temperature(0.8) | min_p(m=0.05)`, `greedy`. The empty text changes nothing.

    Raises:
        ValueError: unknown name, wrong arguments, or not of this form; the message says where.
    """
    if not text.strip():
        return Chain()
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot read the transform {text!r}: {error.msg} at character {error.offset}") from None
    return _built(tree, text)


def _built(node: ast.expr, text: str) -> Transform:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _built(node.left, text) | _built(node.right, text)
    name, arguments, keywords = node, [], []
    if isinstance(node, ast.Call):
        name, arguments, keywords = node.func, node.args, node.keywords
    if not isinstance(name, ast.Name):
        raise ValueError(
            f"cannot read {ast.unparse(node)!r} in the transform {text!r}: write name(arguments), joined by |"
        )
    known = TRANSFORMS.get(name.id)
    if known is None:
        raise ValueError(f"no transform {name.id!r}; there are {', '.join(sorted(TRANSFORMS))}")
    try:
        values = [_literal(argument) for argument in arguments]
        named = {str(keyword.arg): _literal(keyword.value) for keyword in keywords}
        return known(*values, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{ast.unparse(node)}: {_plain(error, known)}") from None


def _literal(node: ast.expr) -> Any:
    # A minus infinity for logit_bias has no literal of its own.
    plain = ast.unparse(node)
    if plain in ("-inf", "inf"):
        return float(plain)
    if isinstance(node, ast.Dict):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{plain!r} is not a number, text or list") from None


def _plain(error: Exception, known: type[Transform]) -> str:
    if isinstance(error, TypeError):
        fields = ", ".join(
            f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}"
            for f in dataclasses.fields(known)  # type: ignore[arg-type]
        )
        return f"it takes ({fields})"
    return str(error)

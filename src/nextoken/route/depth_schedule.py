"""Depth schedules: how many experts each layer has."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

Shape: TypeAlias = Literal["uniform", "descending", "ascending", "pyramid-up", "pyramid-down", "wave"]


def depth_schedule(
    shape: Shape, layers: int, *, least: int, most: int, total: int | None = None, cycles: float = 1.0
) -> tuple[int, ...]:
    """E_l for l = 0..L-1, with s = l / (L - 1), a = `least` and b = `most`, rounded to whole numbers (halves up):

        uniform       (a + b) / 2
        descending    b - (b - a) s
        ascending     a + (b - a) s
        pyramid-up    a + (b - a) (1 - |2s - 1|)             the most in the middle
        pyramid-down  b - (b - a) (1 - |2s - 1|)
        wave          a + (b - a) (1 + sin(2 pi cycles s)) / 2

    Sums differ by shape, and models with different numbers of experts are not comparable. `total` makes them equal: the
    same number is added to every value, and what rounding down leaves over goes to the largest remainders.

    Args:
        shape: one of the six.
        layers: L. One layer alone has s = 0.
        least, most: bounds, before `total` shifts them.
        total: sum of E_l.
        cycles: of the wave.

    Raises:
        ValueError: no such shape, bounds that are not 1 <= least <= most, or a total at which a layer has no expert.

    Source: DynaMoE, arXiv:2603.01697. The paper names the shapes; the closed forms are reconstructed.
    """
    if shape not in get_args(Shape):
        raise ValueError(f"shape must be one of {', '.join(get_args(Shape))}; got {shape!r}")
    if layers < 1 or not 1 <= least <= most:
        raise ValueError(f"layers must be at least 1 and 1 <= least <= most; got {layers}, {least} and {most}")
    values = [_value(shape, layer / max(1, layers - 1), least, most, cycles) for layer in range(layers)]
    if total is None:
        return tuple(max(1, math.floor(value + 0.5)) for value in values)
    shift = (total - sum(values)) / layers
    moved = [round(value + shift, 9) for value in values]
    if min(moved) < 1:
        raise ValueError(
            f"{total} experts in {layers} layers leave one with {min(moved):.2f} of them under {shape!r} from {least} "
            f"to {most}; give a larger total, or bounds nearer to each other"
        )
    whole = [math.floor(value) for value in moved]
    remainders = [round(value - below, 9) for value, below in zip(moved, whole, strict=True)]
    # Of equal remainders the larger value comes first, so that a schedule read backwards is the opposite schedule.
    order = sorted(range(layers), key=lambda layer: (-remainders[layer], -moved[layer]))
    for layer in order[: total - sum(whole)]:
        whole[layer] += 1
    return tuple(whole)


def _value(shape: Shape, s: float, least: int, most: int, cycles: float) -> float:
    span = most - least
    if shape == "uniform":
        return (least + most) / 2
    if shape == "descending":
        return most - span * s
    if shape == "ascending":
        return least + span * s
    if shape == "pyramid-up":
        return least + span * (1 - abs(2 * s - 1))
    if shape == "pyramid-down":
        return most - span * (1 - abs(2 * s - 1))
    return least + span * (1 + math.sin(2 * math.pi * cycles * s)) / 2

"""Ramps: the colours of scales, even in lightness, so that they read without telling red from green.

Stops are given in Oklch (lightness 0 to 1, chroma, hue in degrees) and joined by straight lines in Oklab.
Source: Björn Ottosson, "A perceptual color space for image processing", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nextoken.signature.scale import BINS

_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_TO_LINEAR = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)
_DARK_INK, _LIGHT_INK = "#000000", "#ffffff"

Stop = tuple[float, float, float]


@dataclass(frozen=True)
class Ramp:
    """BINS background colours, and on each the ink with the greater contrast, as #rrggbb."""

    colours: tuple[str, ...]
    inks: tuple[str, ...]

    @classmethod
    def through(cls, *stops: Stop) -> Ramp:
        """A ramp through evenly spaced Oklch stops."""
        lightness, chroma, hue = np.array(stops).T
        lab = np.stack([lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))], axis=1)
        at = np.linspace(0, len(stops) - 1, BINS)
        smooth = np.stack([np.interp(at, np.arange(len(stops)), axis) for axis in lab.T], axis=1)
        linear = np.clip((smooth @ _TO_LMS.T) ** 3 @ _TO_LINEAR.T, 0, 1)
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        colours = ["#{:02x}{:02x}{:02x}".format(*row) for row in np.rint(encoded * 255).astype(int)]
        inks = [max(_DARK_INK, _LIGHT_INK, key=lambda ink: contrast(ink, colour)) for colour in colours]
        return cls(tuple(colours), tuple(inks))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21. Source: Web Content Accessibility Guidelines 2.2, relative luminance."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    encoded = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


LIGHT = Ramp.through(
    (1, 0, 90), (0.965, 0.04, 95), (0.915, 0.08, 86), (0.84, 0.112, 66), (0.74, 0.14, 36), (0.6, 0.165, 8)
)
DARK = Ramp.through(
    (0.21, 0, 280), (0.29, 0.05, 285), (0.385, 0.09, 315), (0.5, 0.125, 355), (0.66, 0.13, 40), (0.85, 0.11, 85)
)
LIGHT_DIVERGING = Ramp.through((0.56, 0.16, 255), (0.8, 0.085, 245), (1, 0, 90), (0.84, 0.11, 70), (0.62, 0.165, 45))
DARK_DIVERGING = Ramp.through((0.74, 0.13, 240), (0.45, 0.11, 255), (0.21, 0, 280), (0.47, 0.11, 50), (0.78, 0.15, 65))
# One lightness, hue from blue to orange: these stand out from a light terminal as from a dark one, as grounds, and, a
# little darker, as inks.
TERMINAL = Ramp.through((0.74, 0.05, 250), (0.74, 0.09, 265), (0.74, 0.12, 310), (0.75, 0.15, 0), (0.78, 0.16, 55))
TERMINAL_INK = Ramp.through((0.62, 0.08, 250), (0.62, 0.12, 262), (0.62, 0.15, 310), (0.62, 0.17, 0), (0.64, 0.15, 50))
TERMINAL_DIVERGING = Ramp.through(
    (0.74, 0.13, 245), (0.74, 0.07, 250), (0.74, 0, 90), (0.76, 0.09, 70), (0.78, 0.16, 60)
)
TERMINAL_DIVERGING_INK = Ramp.through(
    (0.62, 0.15, 250), (0.62, 0.13, 250), (0.62, 0, 90), (0.62, 0.12, 60), (0.62, 0.15, 55)
)

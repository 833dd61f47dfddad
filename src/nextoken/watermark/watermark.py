"""Watermark: a mark that whoever holds the key can find in a text, and no one else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from nextoken.decode.transform import Transform


@dataclass(frozen=True)
class Detection:
    """What a detector says of one text.

    Args:
        p_value: probability that a text made without the key looks at least as marked as this one; uniform on (0, 1]
            or larger for such texts. 1 where nothing could be scored.
        statistic: what the p-value is a function of; what it measures, each watermark tells.
        scored: how many tokens (or words) the verdict rests on.
    """

    p_value: float
    statistic: float
    scored: int


class Watermark(ABC):
    """A way of marking texts while they are drawn, and of finding the mark again.

    mark = GumbelWatermark(Key.new())
    text = nextoken.generate(model, prompt, transform=Temperature(0.8) | mark.transform())
    mark.detect(model.vocab.encode(text.text).ids)
    """

    is_distortion_free: bool
    """Whether a marked text has the model's own law, averaged over keys."""

    @abstractmethod
    def transform(self) -> Transform:
        """What marks: it stands last in a chain of transforms, after temperature and truncation."""

    @abstractmethod
    def detect(self, tokens: Sequence[int]) -> Detection:
        """The verdict on the tokens of one text, prompt and special tokens left out."""

"""Marks in generated text: distortion-free ones, green lists, tournaments, synonyms; how to find and to attack them."""

from nextoken.watermark.key import Key
from nextoken.watermark.watermark import Detection, Watermark

__all__ = ["Detection", "Key", "Watermark"]

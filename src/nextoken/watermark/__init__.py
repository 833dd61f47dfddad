"""Marks in generated text: distortion-free ones, green lists, tournaments, synonyms; how to find and to attack them."""

from nextoken.watermark.exponential import ExponentialWatermark
from nextoken.watermark.fluency import Fluency
from nextoken.watermark.green_list import GreenList
from nextoken.watermark.gumbel import GumbelWatermark
from nextoken.watermark.inverse_transform import InverseTransformWatermark
from nextoken.watermark.key import Key
from nextoken.watermark.key_sequence import KeySequenceWatermark, Reference
from nextoken.watermark.masked import MaskedCandidates
from nextoken.watermark.places import Place
from nextoken.watermark.synonyms import Marked, Replacement, SynonymWatermark
from nextoken.watermark.tournament import SynthID
from nextoken.watermark.watermark import Detection, Watermark
from nextoken.watermark.word_rules import SpelledApart, content_word, same_ending

__all__ = [
    "Detection",
    "ExponentialWatermark",
    "Fluency",
    "GreenList",
    "GumbelWatermark",
    "InverseTransformWatermark",
    "Key",
    "KeySequenceWatermark",
    "Marked",
    "MaskedCandidates",
    "Place",
    "Reference",
    "Replacement",
    "SpelledApart",
    "SynonymWatermark",
    "SynthID",
    "Watermark",
    "content_word",
    "same_ending",
]

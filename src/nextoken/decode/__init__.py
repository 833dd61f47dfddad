"""Generating from a distribution that was changed on purpose: transforms, the loop, searches, strategies."""

from nextoken.decode.adaptive import EntropyVarentropy, Mirostat1, Mirostat2
from nextoken.decode.cautious import Caution, cautious
from nextoken.decode.generate import generate, stream
from nextoken.decode.generation import Generation
from nextoken.decode.loop import Loop
from nextoken.decode.mixtures import DirichletMixture, NoisySoft, SoftThinking, TokenMixture
from nextoken.decode.noise import DirichletNoise, GumbelNoise
from nextoken.decode.parsing import TRANSFORMS, transform
from nextoken.decode.penalty import DRY, FrequencyPenalty, NoRepeatNgram, PresencePenalty, RepetitionPenalty
from nextoken.decode.request import Piece, Request
from nextoken.decode.scaling import DynamicTemperature, Greedy, LogitBias, Temperature
from nextoken.decode.search import WithoutReplacement, beam_search, stochastic_beam_search
from nextoken.decode.soft_thinking import think
from nextoken.decode.thinking import ColdStop
from nextoken.decode.thought import Thought
from nextoken.decode.transform import Chain, Context, EmptyDistribution, Transform
from nextoken.decode.truncation import XTC, Epsilon, Eta, MinP, TopK, TopNSigma, TopP, Typical

__all__ = [
    "DRY",
    "TRANSFORMS",
    "XTC",
    "Caution",
    "Chain",
    "ColdStop",
    "Context",
    "DirichletMixture",
    "DirichletNoise",
    "DynamicTemperature",
    "EmptyDistribution",
    "EntropyVarentropy",
    "Epsilon",
    "Eta",
    "FrequencyPenalty",
    "Generation",
    "Greedy",
    "GumbelNoise",
    "LogitBias",
    "Loop",
    "MinP",
    "Mirostat1",
    "Mirostat2",
    "NoRepeatNgram",
    "NoisySoft",
    "Piece",
    "PresencePenalty",
    "RepetitionPenalty",
    "Request",
    "SoftThinking",
    "Temperature",
    "Thought",
    "TokenMixture",
    "TopK",
    "TopNSigma",
    "TopP",
    "Transform",
    "Typical",
    "WithoutReplacement",
    "beam_search",
    "cautious",
    "generate",
    "stochastic_beam_search",
    "stream",
    "think",
    "transform",
]

"""Inversion: a distribution in as few numbers as it is made of, and a prompt read back from what followed it."""

from nextoken.inversion.log_ratios import LogRatioCodec, additive_log_ratios, dimension
from nextoken.inversion.prompt_inverter import PromptInverter, answers, token_f1

__all__ = ["LogRatioCodec", "PromptInverter", "additive_log_ratios", "answers", "dimension", "token_f1"]

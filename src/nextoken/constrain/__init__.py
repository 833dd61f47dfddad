"""Texts under a rule: constraints, and sampling from the model's distribution given that the rule holds."""

from nextoken.constrain.awrs import AWRS
from nextoken.constrain.constraint import Both, Constraint, Place
from nextoken.constrain.grammar import JsonSchema, Lark
from nextoken.constrain.kernel import Draw, End, FullMask, Kernel, NextToken, Proposal, Rejection
from nextoken.constrain.mask import DeadEnd, Masked
from nextoken.constrain.posterior import Posterior, Stage, Text
from nextoken.constrain.predicate import Predicate
from nextoken.constrain.regex import Choice, Regex
from nextoken.constrain.smc import importance, smc

__all__ = [
    "AWRS",
    "Both",
    "Choice",
    "Constraint",
    "DeadEnd",
    "Draw",
    "End",
    "FullMask",
    "JsonSchema",
    "Kernel",
    "Lark",
    "Masked",
    "NextToken",
    "Place",
    "Posterior",
    "Predicate",
    "Proposal",
    "Regex",
    "Rejection",
    "Stage",
    "Text",
    "importance",
    "smc",
]
